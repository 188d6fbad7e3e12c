"""The cache of recurrent mechanisms: named states whose size does not depend on the length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.cache.base import cache_bytes


@dataclasses.dataclass(frozen=True)
class StateCache:
    """Named states after the tokens seen so far.

    Attributes:
      state: name -> [b, ...].
      length: [b] int32, tokens seen so far.

    Memory: O(1) in the length. Shardable by b.
    """

    state: dict[str, jax.Array]
    length: jax.Array

    @classmethod
    def create(
        cls, batch: int, shapes: Mapping[str, tuple[int, ...]], dtype: Any = jnp.float32
    ) -> StateCache:
        """States of zeros.

        Args:
          batch: rows.
          shapes: name -> shape of one row's state.
          dtype: of all states, or a mapping from name to dtype.
        """
        kinds = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
        state = {name: jnp.zeros((batch, *shape), kinds[name]) for name, shape in shapes.items()}
        return cls(state, jnp.zeros((batch,), jnp.int32))

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)

    def next(self, count: jax.Array, /, **state: jax.Array) -> StateCache:
        """The cache after `count` [b] more tokens, every state replaced and in its old dtype.

        Raises:
          ValueError: when names or shapes are not those of the cache.
        """
        want = {name: array.shape for name, array in self.state.items()}
        have = {name: array.shape for name, array in state.items()}
        if have != want:
            raise ValueError(f"StateCache: holds {want}, got {have}; every state must be given.")
        kept = {name: array.astype(self.state[name].dtype) for name, array in state.items()}
        return StateCache(kept, self.length + count.astype(jnp.int32))


jax.tree_util.register_dataclass(StateCache, data_fields=["state", "length"], meta_fields=[])
