"""Rotary position embedding: tokens are rotated by their position, scores see the distance.

    (y_c, y_c') = R(m w_c) (x_c, x_c'),   q_m . k_n then depends on m - n only

Two layouts pair the channels: "half" pairs c with c + r/2 (Llama, GPT-NeoX), "interleaved" pairs 2c
  with
2c + 1 (GPT-J, RoFormer). r is the number of rotated channels; the rest passes through.

Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021,
arXiv:2104.09864.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from attnjax.positions.angles import AnyArray, angles

Layout = Literal["half", "interleaved"]


def apply_rope(
    x: Float[AnyArray, "b t h d"],
    positions: Num[AnyArray, "..."],
    inv_freq: Float[AnyArray, "c"],
    *,
    layout: Layout = "half",
    attention_factor: float = 1.0,
) -> Float[Array, "b t h d"]:
    """Rotates the first 2c channels of x by positions * inv_freq.

    Args:
      x: queries or keys.
      positions: [t], [b, t] or [b, h, t], in tokens: absolute indices, or any others (packed
        documents, caches, positions by head).
      inv_freq: [c] radians per token, from `rope_frequencies`; 2c <= d, and 2c < d is partial
        rotation.
      layout: "half" or "interleaved".
      attention_factor: multiplies the rotated channels (YaRN and LongRoPE); logits get its square.

    Returns:
      x rotated, in its dtype. Angles are float32 (float64 when x is float64).

    Raises:
      ValueError: on an unknown layout, positions that do not fit, or more planes than d / 2.
    """
    rotated = 2 * jnp.shape(inv_freq)[-1]
    if rotated > x.shape[-1]:
        raise ValueError(
            f"apply_rope: inv_freq has {rotated // 2} planes, which need a width of {rotated}, "
            f"but x has shape {x.shape}; pass rope_frequencies(head_dim={x.shape[-1]}, ...)."
        )
    angle = angles("apply_rope", positions, inv_freq, x)
    cos, sin = jnp.cos(angle) * attention_factor, jnp.sin(angle) * attention_factor
    turned = rotate(x[..., :rotated].astype(angle.dtype), cos, sin, layout).astype(x.dtype)
    if rotated == x.shape[-1]:
        return turned
    return jnp.concatenate([turned, x[..., rotated:]], axis=-1)


def rotate(x: Any, cos: Any, sin: Any, layout: Layout = "half") -> Any:
    """Multiplies channel pairs (x1, x2) by [[cos, -sin], [sin, cos]].

    Args:
      x: [b, t, h, 2c].
      cos, sin: broadcastable to [b, t, h, c], any magnitude.
      layout: "half" or "interleaved".
    """
    if layout == "half":
        x1, x2 = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
    if layout == "interleaved":
        x1, x2 = x[..., 0::2], x[..., 1::2]
        return jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).reshape(x.shape)
    raise ValueError(f"layout must be 'half' or 'interleaved', got {layout!r}.")
