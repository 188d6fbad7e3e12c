"""Boundaries of DHSA's chunks: the predictor, the labels it is trained on, and their choice.

See `attnjax.mechanisms.sparse.dhsa` for what the chunks are for.

Reference: Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for
On-Device LLMs", 2025, arXiv:2510.24606; official code xiongsiheng/DHSA (folder legacy).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.convolution import causal_conv
from attnjax.layers import Projection, default_kernel_init
from pallas_kernels.tilemath import accumulator_dtype

NEVER = -100.0
"""Logit of gaps too near to the ends for two whole windows."""


class BoundaryPredictor(nnx.Module):
    """Logit that a chunk ends at token i, from the w keys on each side of the gap behind it.

        e_i = relu(W_c relu(depthwise conv of keys i-w+1 .. i) + b_c)
        logit_i = MLP([l, r, |l - r|, l * r, cos(l, r)]),   l = e_i,  r = e_{i+w}

    Args:
      features: width of the keys of all heads together.
      window: w in tokens. Paper: 4.
      hidden: width of e and of the MLP. Paper: 256.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        window: int = 4,
        hidden: int = 256,
        *,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if window < 1 or hidden < 1:
            raise ValueError(
                f"BoundaryPredictor: window={window} and hidden={hidden} must be at least 1."
            )
        self.window = window
        kernel = default_kernel_init(rngs.params(), (window, features), param_dtype)
        self.kernel = nnx.Param(kernel, axes=(None, None))
        self.bias = nnx.Param(jnp.zeros((features,), param_dtype), axes=(None,))

        def dense(width: int, out: int, axes: tuple[str | None, str | None]) -> Projection:
            return Projection(
                width, out, in_axes=axes[:1], out_axes=axes[1:], param_dtype=param_dtype, rngs=rngs
            )

        self.mix = dense(features, hidden, (None, "mlp"))
        self.up = dense(4 * hidden + 1, hidden, (None, "mlp"))
        self.down = dense(hidden, 1, ("mlp", None))

    def __call__(
        self, key: Float[Array, "b t g d"], past: Float[Array, "b n g d"] | None = None
    ) -> Float[Array, "b t"]:
        """The logit that becomes known with each token: of the gap behind token j - w at token j.

        Args:
          key: keys as the attention uses them.
          past: the 2w - 1 keys before them; None is zeros.
        """
        w, (b, t) = self.window, key.shape[:2]
        dtype = accumulator_dtype(key.dtype)
        if past is None:
            past = jnp.zeros((b, 2 * w - 1, *key.shape[2:]), key.dtype)
        x = jnp.concatenate([past.astype(dtype), key.astype(dtype)], axis=1)
        x = x.reshape(b, t + 2 * w - 1, -1)
        x, _ = causal_conv(x, self.kernel[...].astype(dtype), self.bias[...].astype(dtype))
        x = jax.nn.relu(self.mix(jax.nn.relu(x)))
        left, right = x[:, w - 1 : w - 1 + t], x[:, 2 * w - 1 :]
        squares = (left**2).sum(-1, keepdims=True) * (right**2).sum(-1, keepdims=True)
        # the clamp keeps the slope of the root finite where an encoding is 0
        cosine = (left * right).sum(-1, keepdims=True) / jnp.sqrt(jnp.maximum(squares, 1e-12))
        x = jnp.concatenate([left, right, jnp.abs(left - right), left * right, cosine], axis=-1)
        return self.down(jax.nn.relu(self.up(x)))[..., 0].astype(dtype)

    def of_gaps(self, key: Float[Array, "b t g d"]) -> Float[Array, "b t"]:
        """The logit of the gap behind each token, for `dhsa_boundaries`; -100 near the ends."""
        w, t = self.window, key.shape[1]
        logits = jnp.pad(self(key)[:, w:], ((0, 0), (0, min(w, t))))
        i = jnp.arange(t)[None]
        return jnp.where((i >= w - 1) & (i < t - w), logits, NEVER)


def boundary_ratios(weights: Float[Array, "b h t t"], window: int = 4) -> Float[Array, "b t"]:
    """How differently later tokens look at the two sides of a gap; labels of the predictor.

        r_i = (max(A, B) + 1e-6) / (min(A, B) + 1e-6),  0 near the ends

    A and B are the mean heads' attention from tokens i + w on to the w tokens up to i, and to the w
    behind it.

    Args:
      weights: causal attention weights.
      window: w.
    """
    t, w = weights.shape[-1], window
    mass = weights.mean(1).astype(accumulator_dtype(weights.dtype))
    later = jnp.cumsum(mass[:, ::-1], axis=1)[:, ::-1]  # [b, i, j]: from tokens i on to token j
    later = jnp.pad(later, ((0, 0), (0, w), (w, w)))
    i = jnp.arange(t)
    rows = later[:, i + w]  # the last w rows are past the end, and so 0
    places = i[:, None] + jnp.arange(2 * w)[None]
    near = jnp.take_along_axis(rows, (places + 1)[None], axis=2)
    a, b = near[..., :w].sum(-1), near[..., w:].sum(-1)
    ratio = (jnp.maximum(a, b) + 1e-6) / (jnp.minimum(a, b) + 1e-6)
    return jnp.where(((i >= w - 1) & (i < t - w))[None], ratio, 0)


def boundary_loss(
    logits: Float[Array, "b t"],
    ratios: Float[Array, "b t"],
    *,
    alpha: float = 4.0,
    beta: float = 0.0,
    gamma: float = 2.0,
    mask: Bool[Array, "b t"] | None = None,
) -> Float[Array, ""]:
    """Focal binary cross entropy to the soft labels y = sigmoid(alpha (ln(r + 1e-6) - beta)).

        mean of (1 - p_y)^gamma BCE(logit, y),   p_y = p y + (1 - p)(1 - y)

    Args:
      logits: of `BoundaryPredictor.of_gaps`.
      ratios: of `boundary_ratios`.
      alpha, beta, gamma: Paper: 4, 0, 2.
      mask: gaps that count; None is those with a ratio above 0.
    """
    mask = ratios > 0 if mask is None else mask
    y = jax.nn.sigmoid(alpha * (jnp.log(ratios + 1e-6) - beta))
    p = jax.nn.sigmoid(logits)
    bce = -(y * jax.nn.log_sigmoid(logits) + (1 - y) * jax.nn.log_sigmoid(-logits))
    loss = (1 - (p * y + (1 - p) * (1 - y))) ** gamma * bce
    return jnp.where(mask, loss, 0).sum() / jnp.maximum(mask.sum(), 1).astype(loss.dtype)


def dhsa_boundaries(
    logits: Float[Array, "b t"],
    num_chunks: int,
    *,
    theta: float | None = 1.1,
    nms: int = 8,
    instruction_tokens: int | None = None,
) -> Int[Array, "b n"]:
    """Chunk starts by greedy non-maximum suppression of the scores of all gaps.

    Args:
      logits: score of the gap behind each token, logits or `boundary_ratios`.
      num_chunks: most boundaries to accept.
      theta: accept scores above it; None is no threshold.
      nms: accept a gap only if all accepted ones are more than `nms` away; 0 accepts all.
      instruction_tokens: accept the gap t - instruction_tokens first and none behind it.

    Returns:
      [b, num_chunks + 2], increasing: 0, the token behind each accepted gap, then t as often as
      needed. Equal neighbors are empty chunks. Scores tie in favor of the earlier gap.

    Raises:
      ValueError: for num_chunks < 1, nms < 0, or instruction_tokens not in [1, t].
    """
    b, t = logits.shape
    if num_chunks < 1 or nms < 0:
        raise ValueError(
            f"dhsa_boundaries: needs num_chunks >= 1 and nms >= 0, got num_chunks={num_chunks}, "
            f"nms={nms}."
        )
    gaps = jnp.arange(t, dtype=jnp.int32)[None]
    live = jnp.full_like(logits, True, dtype=jnp.bool_) if theta is None else logits > theta
    taken = jnp.full((b, num_chunks), t, jnp.int32)
    first = 0
    if instruction_tokens is not None:
        if not 1 <= instruction_tokens <= t:
            raise ValueError(
                f"dhsa_boundaries: instruction_tokens={instruction_tokens} must be in [1, {t}]."
            )
        forced, first = t - instruction_tokens, 1
        taken = taken.at[:, 0].set(forced + 1)
        live = live & (gaps < forced) & (forced - gaps > nms)

    def accept(n: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        live, taken = state
        best = jnp.argmax(jnp.where(live, logits, -jnp.inf), axis=1).astype(jnp.int32)
        found = live.any(axis=1)
        taken = taken.at[:, n].set(jnp.where(found, best + 1, t))
        return live & (jnp.abs(gaps - best[:, None]) > nms), taken

    _, taken = jax.lax.fori_loop(first, num_chunks, accept, (live, taken))
    ends = jnp.broadcast_to(jnp.array([[0, t]], jnp.int32), (b, 2))
    return jnp.sort(jnp.concatenate([taken, ends], axis=1), axis=1)
