"""Short causal convolution along the tokens, with a state for decoding.

    y_t = b + sum_{i < w} kernel_i ⊙ x_{t - (w - 1) + i}

The last kernel row multiplies the current token. Tokens before the first, and those of another
document, count as zero.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal_conv(
    x: Float[Array, "b t *c"],
    kernel: Float[Array, "w *#c"],
    bias: Float[Array, "*#c"] | None = None,
    *,
    state: Float[Array, "b w1 *c"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t *c"], Float[Array, "b w1 *c"]]:
    """A depthwise causal convolution of width w; every channel has its own taps.

    Args:
      x: any number of channel axes.
      kernel: taps, the oldest token first; channel axes may have size 1 to share taps.
      bias: by channel, or None.
      state: the w - 1 tokens before x, of an earlier call; None is zeros.
      segment_ids: taps do not reach into another document. Not with `state`.
      valid: True for real tokens, which come first; only they enter the new state.

    Returns:
      y in the dtype of x, and the last w - 1 tokens, for the next call.

    Raises:
      ValueError: when shapes do not fit, or segment_ids and state are both given.
    """
    w, t, channels = kernel.shape[0], x.shape[1], x.ndim - 2
    if kernel.ndim != channels + 1:
        raise ValueError(
            f"causal_conv: kernel must have shape [width, *channels] with {channels} channel "
            f"axes, got {kernel.shape} for x {x.shape}."
        )
    if state is not None and segment_ids is not None:
        raise ValueError("causal_conv: segment_ids with a state are not supported; pass one.")
    if state is None:
        state = jnp.zeros((x.shape[0], w - 1, *x.shape[2:]), x.dtype)
    if state.shape != (x.shape[0], w - 1, *x.shape[2:]):
        raise ValueError(
            f"causal_conv: state must have shape {(x.shape[0], w - 1, *x.shape[2:])}, got "
            f"{state.shape}."
        )
    past = jnp.concatenate([state.astype(x.dtype), x], axis=1)  # token t stands at t + w - 1
    y = jnp.zeros_like(x)
    for i in range(w):
        tap = past[:, i : i + t]
        back = w - 1 - i
        if segment_ids is not None and back:
            same = segment_ids[:, back:] == segment_ids[:, : max(t - back, 0)]
            same = jnp.pad(same, ((0, 0), (min(back, t), 0)))[:, :t]
            tap = jnp.where(same.reshape(*same.shape, *(1,) * channels), tap, jnp.zeros_like(tap))
        y = y + tap * kernel[i][None, None].astype(x.dtype)
    if bias is not None:
        y = y + bias[None, None].astype(x.dtype)
    if valid is None:
        return y, past[:, t:]
    count = valid.sum(1, dtype=jnp.int32)
    where = count[:, None] + jnp.arange(w - 1, dtype=jnp.int32)[None]
    where = where.reshape(*where.shape, *(1,) * channels)
    return y, jnp.take_along_axis(past, where, axis=1)
