"""Attention with linear biases: a score falls with the distance, at another rate for each head.

    score_ij - slope_h (i - j),   slope_h = 2^(-8 h / n),  h = 1 .. n

Reference: Press et al., "Train Short, Test Long: Attention with Linear Biases Enables Input Length
Extrapolation", 2021, arXiv:2108.12409.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from attnjax.positions.angles import AnyArray


def alibi_slopes(num_heads: int) -> Float[np.ndarray, "h"]:
    """Slopes of the heads, float64 and positive.

    For n heads that are no power of two: the slopes of the power of two below n, then every other
      slope
    of twice that power, as the official code does.

    Raises:
      ValueError: when num_heads is below 1.
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes: num_heads must be at least 1, got {num_heads}.")
    whole = 2 ** int(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 * np.arange(1, whole + 1) / whole)
    between = 2.0 ** (-4.0 * np.arange(1, 2 * whole + 1, 2) / whole)
    return np.concatenate([slopes, between[: num_heads - whole]])


@dataclasses.dataclass(frozen=True)
class AlibiScore:
    """Score modification that subtracts slope * distance; hashable, so it does not recompile.

    Attributes:
      slopes: one number per query head, for example `tuple(alibi_slopes(8))`.
      symmetric: use |i - j|, for attention in both directions.
    """

    slopes: Sequence[float]
    symmetric: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "slopes", tuple(float(s) for s in self.slopes))

    def __call__(self, score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The score of query q and key k (absolute indices) in head h of row b."""
        distance = jnp.abs(q - k) if self.symmetric else q - k
        slope = jnp.asarray(self.slopes, score.dtype)[h]
        return score - slope * distance.astype(score.dtype)


def alibi_score_mod(num_heads: int, *, symmetric: bool = False) -> AlibiScore:
    """ALiBi as `score_mod` of `attnjax.attention`: nothing of size t x s is stored."""
    return AlibiScore(tuple(alibi_slopes(num_heads)), symmetric)


def alibi_bias(
    slopes: Float[AnyArray, "h"],
    query_positions: Num[AnyArray, "..."],
    key_positions: Num[AnyArray, "..."],
    *,
    symmetric: bool = False,
    dtype: Any = jnp.float32,
) -> Float[Array, "b h t s"]:
    """ALiBi as an explicit bias, for arbitrary positions.

    Args:
      slopes: [h], positive.
      query_positions, key_positions: [t] or [b, t], and [s] or [b, s], in tokens.
      symmetric: use |i - j|, for attention in both directions.
      dtype: type of the result.

    Returns:
      -slope_h (i - j), [b or 1, h, t, s]. Memory: all of it.
    """
    i, j = (jnp.asarray(p).reshape(-1, jnp.shape(p)[-1]) for p in (query_positions, key_positions))
    distance = i[:, None, :, None] - j[:, None, None, :]
    distance = jnp.abs(distance) if symmetric else distance
    slopes = jnp.asarray(slopes).astype(dtype)
    return -slopes.reshape(1, -1, 1, 1) * distance.astype(dtype)
