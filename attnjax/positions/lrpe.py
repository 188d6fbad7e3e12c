"""Linearized relative position encoding: for linear attention, applied after the feature map.

    cosine       x -> [x cos(t theta), x sin(t theta)]      q_t . k_s = sum_c q_c k_c cos((t - s)
    theta_c) rotation     x -> R(t theta) x                          rotary embedding with free
    theta permutation  x -> x shifted by t channels, cyclically   q_t . k_s = sum_c q_c k_(c + s -
    t)

All three are unitary, so that scores depend on t - s and the sum over s stays linear. The cosine
form doubles the width and does not rotate; TransNormerLLM uses it in its first layer.

Reference: Qin et al., "Linearized Relative Positional Encoding", 2023, arXiv:2307.09270 (types 1, 2
  and
3). The cosine form follows the released TransNormerLLM code; which permutation the paper's
experiments use was not found, so the simplest is taken.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Num

from attnjax.positions.angles import AnyArray, angle_dtype, angles, token_positions
from attnjax.positions.rope import rotate

LrpeKind = Literal["cosine", "rotation", "permutation"]


def apply_lrpe(
    x: Float[AnyArray, "b t h d"],
    positions: Num[AnyArray, "..."],
    theta: Float[AnyArray, "*h c"] | None = None,
    *,
    kind: LrpeKind = "cosine",
) -> Float[Array, "b t h e"]:
    """Encodes positions into queries or keys.

    Args:
      x: queries or keys, after the feature map.
      positions: [t], [b, t] or [b, h, t], in tokens; integers for kind "permutation".
      theta: radians per token, [c] or [h, c] with c = d for "cosine", d / 2 for "rotation"; not
        used by "permutation". See `lrpe_theta`.
      kind: "cosine" (type 1), "rotation" (type 2) or "permutation" (type 3).

    Returns:
      [b, t, h, 2d] for "cosine", else [b, t, h, d], in the dtype of x; angles are float32 or
      float64.

    Raises:
      ValueError: on an unknown kind, or theta that does not fit.
    """
    if kind == "permutation":
        shift = token_positions("apply_lrpe", positions, x).astype(jnp.int32)
        channel = jnp.arange(x.shape[-1], dtype=jnp.int32).reshape(1, 1, 1, -1)
        source = jnp.broadcast_to((channel + shift) % x.shape[-1], x.shape)
        return jnp.take_along_axis(x, source, axis=-1)
    if kind not in ("cosine", "rotation"):
        raise ValueError(
            f"apply_lrpe: kind must be 'cosine', 'rotation' or 'permutation', got {kind!r}."
        )
    want = x.shape[-1] if kind == "cosine" else x.shape[-1] // 2
    if theta is None or jnp.shape(theta)[-1] != want:
        raise ValueError(
            f"apply_lrpe: kind={kind!r} needs theta of shape [{want}] or [heads, {want}] for x "
            f"of shape {x.shape}, got {None if theta is None else jnp.shape(theta)}."
        )
    angle = angles("apply_lrpe", positions, theta, x)
    wide = x.astype(angle_dtype(x))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if kind == "rotation":
        return rotate(wide, cos, sin, "half").astype(x.dtype)
    return jnp.concatenate([wide * cos, wide * sin], axis=-1).astype(x.dtype)


def lrpe_theta(num_heads: int, head_dim: int, base: float = 10000.0) -> Float[np.ndarray, "h d"]:
    """Initial angles base^(-2c / (h d)), c running over heads and then channels: [h, d] float64."""
    width = num_heads * head_dim
    return (base ** (-2.0 * np.arange(width) / width)).reshape(num_heads, head_dim)


class LRPE(nnx.Module):
    """`apply_lrpe` with angles that are learned for each head.

    Args:
      num_heads, head_dim: h and d of queries and keys.
      kind: see `apply_lrpe`.
      base: of the initial angles. Paper: 10000.
      learned: False keeps the angles fixed.
      param_dtype: type of the angles.
      rngs: accepted as every module does; the angles do not start at random.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        kind: LrpeKind = "cosine",
        base: float = 10000.0,
        learned: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.kind: LrpeKind = kind
        planes = head_dim if kind == "cosine" else head_dim // 2
        variable = nnx.Param if learned else nnx.Variable
        theta = jnp.asarray(lrpe_theta(num_heads, planes, base), param_dtype)
        self.theta = variable(theta, axes=("heads", "head_dim"))

    def __call__(
        self, x: Float[AnyArray, "b t h d"], positions: Num[AnyArray, "..."]
    ) -> Float[Array, "b t h e"]:
        """Queries or keys [b, t, h, d] with their positions; see `apply_lrpe`."""
        return apply_lrpe(x, positions, self.theta[...], kind=self.kind)
