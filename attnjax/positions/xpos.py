"""xPos: rotary embedding whose planes also decay with the distance, slow planes the least.

    q_m: R(m w_c) zeta_c^(+(m + center) / scale_base)
    k_n: R(n w_c) zeta_c^(-(n + center) / scale_base),   zeta_c = (2c + 0.4 d) / (1.4 d)

The score then carries zeta_c^((m - n) / scale_base); `center` cancels and only keeps the powers
near 1.

Reference: Sun et al., "A Length-Extrapolatable Transformer", 2022, arXiv:2212.10554. The official
  code
(microsoft/torchscale) centers with `xpos_center`, and rotates by the index that is not centered.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from attnjax.positions.angles import AnyArray, angle_dtype, angles, inverse_powers, token_positions
from attnjax.positions.rope import Layout, rotate


def apply_xpos(
    x: Float[AnyArray, "b t h d"],
    positions: Num[AnyArray, "..."],
    *,
    downscale: bool = False,
    center: float | int | Num[AnyArray, ""] = 0,
    base: float = 10000.0,
    scale_base: float = 512.0,
    layout: Layout = "interleaved",
) -> Float[Array, "b t h d"]:
    """Rotates and scales queries, or keys with `downscale=True`.

    Args:
      x: queries or keys, d even.
      positions: [t], [b, t] or [b, h, t], in tokens.
      downscale: inverts the magnitude; set it for keys.
      center: added to positions in the magnitude only, the same for queries and keys.
      base: of the frequencies. Paper: 10000.
      scale_base: tokens over which a plane decays by zeta_c. Paper: 512.
      layout: how channels are paired.

    Raises:
      ValueError: on an odd width, or positions that do not fit x.
    """
    d = x.shape[-1]
    if d % 2:
        raise ValueError(f"apply_xpos: the width must be even, got x of shape {x.shape}.")
    dtype = angle_dtype(x)
    angle = angles("apply_xpos", positions, inverse_powers(base, d), x)
    zeta = (np.arange(0, d, 2) + 0.4 * d) / (1.4 * d)
    exponent = token_positions("apply_xpos", positions, x).astype(dtype)
    exponent = (exponent + jnp.asarray(center, dtype)) / scale_base
    exponent = -exponent if downscale else exponent
    magnitude = jnp.exp(exponent * jnp.asarray(np.log(zeta), dtype).reshape(1, 1, 1, -1))
    cos, sin = jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude
    return rotate(x.astype(dtype), cos, sin, layout).astype(x.dtype)


def xpos_center(length: int, offset: int = 0) -> int:
    """Center of the official code for `length` new tokens after `offset` cached ones, in tokens."""
    return -(length + offset) // 2
