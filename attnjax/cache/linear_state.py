"""The cache of linear attention: one state per head, whatever the length."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.tilemath import accumulator_dtype


@dataclasses.dataclass(frozen=True)
class LinearCache:
    """The state of a linear recurrence after the tokens seen so far.

    Attributes:
      state: [b, h, k, v], float32 or wider.
      length: [b] int32, tokens seen so far.

    Memory: O(1) in the length. Shardable by b and h.
    """

    state: jax.Array
    length: jax.Array

    @classmethod
    def create(
        cls, batch: int, num_heads: int, key_dim: int, value_dim: int, dtype: Any = jnp.float32
    ) -> LinearCache:
        """An empty state."""
        return cls(
            jnp.zeros((batch, num_heads, key_dim, value_dim), dtype), jnp.zeros((batch,), jnp.int32)
        )


jax.tree_util.register_dataclass(LinearCache, data_fields=["state", "length"], meta_fields=[])


def state_dtype(dtype: Any) -> Any:
    """The dtype of state and decay for inputs of this dtype: float32, or float64 for float64."""
    return accumulator_dtype(jnp.dtype(dtype))
