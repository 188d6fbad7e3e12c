"""Relative position bias of a neighborhood, as a score function on tile order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.maskprogram import look_up
from pallas_kernels.neighborhood.spec import NeighborhoodSpec

BEYOND = 1 << 29
"""Relative index of an additional key: past the end of every table."""


def bias_table_shape(kernel_size: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one head's table: every distance two tokens of a window may have."""
    return tuple(2 * w - 1 for w in kernel_size)


def check_bias(spec: NeighborhoodSpec, rel_bias: Any, num_heads: int) -> None:
    """Checks a bias table.

    Raises:
      ValueError: when its shape does not fit.
      NotImplementedError: for windows with which it has no meaning.
    """
    want = (num_heads, *bias_table_shape(spec.kernel_size))
    if rel_bias.shape != want:
        raise ValueError(
            "neighborhood_attention: rel_bias must have shape [heads, 2 w - 1, ...] = "
            f"{want} for kernel_size={spec.kernel_size}, got {rel_bias.shape}."
        )
    if any(spec.is_causal):
        raise NotImplementedError(
            "neighborhood_attention: rel_bias is for windows in both directions, got "
            f"is_causal={spec.is_causal}; use is_causal=False."
        )
    if any(w % 2 == 0 for w in spec.kernel_size):
        raise NotImplementedError(
            "neighborhood_attention: rel_bias needs odd windows, got "
            f"kernel_size={spec.kernel_size}; use odd sizes."
        )


def relative_score(
    spec: NeighborhoodSpec, rel_bias: jax.Array, additional: int, softcap: float | None
) -> Callable[..., jax.Array]:
    """The score function s + rel_bias[h, (p_k - p_q) + w - 1], soft-capped if asked for.

    p are in-group indices. Additional keys have no position, and get no bias.

    Args:
      spec: the neighborhood; tokens are in its tile order.
      rel_bias: [h, 2 w - 1, ...], any dtype; gets a gradient.
      additional: number of keys behind the last slot.
      softcap: c in c tanh(s / c), applied to the sum.
    """
    heads = rel_bias.shape[0]
    sizes = bias_table_shape(spec.kernel_size)
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    # one more entry for what is beyond the table: indices are clipped
    table = jnp.pad(rel_bias.reshape(heads, -1), ((0, 0), (0, 1)))
    middle = sum((w - 1) * n for w, n in zip(spec.kernel_size, strides))
    flat = len(sizes) == 1 and not additional
    of_q, of_k = _flat_positions(spec, strides, additional)

    def modify(score: jax.Array, b: Any, h: Any, q: Any, k: Any) -> jax.Array:
        # along one axis tile order is the order of the tokens: the bias depends on k - q alone
        index = k - q + middle if flat else look_up(of_k, k) - look_up(of_q, q)
        score = score + look_up(table, h, index).astype(score.dtype)
        if softcap is None:
            return score
        cap = jnp.asarray(softcap, score.dtype)
        return cap * jnp.tanh(score / cap)

    return modify


def _flat_positions(
    spec: NeighborhoodSpec, strides: list[int], additional: int
) -> tuple[np.ndarray, np.ndarray]:
    """Per query [t] and per key [s]: their difference is the index into a head's flat table."""
    steps = np.array(strides, np.int32)[:, None]
    half = np.array(spec.kernel_size, np.int32)[:, None] - 1
    of_q = ((spec.q_layout.coordinates() - half) * steps).sum(0, dtype=np.int32)
    of_k = (spec.kv_layout.coordinates() * steps).sum(0, dtype=np.int32)
    return of_q, np.concatenate([of_k, np.full(additional, BEYOND, np.int32)])
