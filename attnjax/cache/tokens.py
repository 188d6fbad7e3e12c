"""The cache of mechanisms that keep something of every token besides, or instead of, key and value.

Whatever a mechanism needs again of earlier tokens (gate keys, latent vectors, pre-convolution
projections, positions) is stored under its name, in the order of the tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from attnjax.cache.base import cache_bytes, check_room, new_positions, valid_count, write_rows


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Named arrays with one row per token; slot j of a batch row holds its token j.

    Attributes:
      tokens: name -> [b, s, ...] with s = max_length. The first `length[b]` slots are real.
      length: [b] int32, tokens stored so far.

    Memory: O(max_length). Shardable by b.
    """

    tokens: dict[str, jax.Array]
    length: jax.Array

    @classmethod
    def create(
        cls,
        batch: int,
        max_length: int,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: Any = jnp.float32,
    ) -> TokenCache:
        """An empty cache.

        Args:
          batch: rows.
          max_length: tokens per row.
          shapes: name -> shape of what is kept of one token, `()` for a number.
          dtype: of all arrays, or a mapping from name to dtype.
        """
        kinds = dtype if isinstance(dtype, Mapping) else dict.fromkeys(shapes, dtype)
        tokens = {
            name: jnp.zeros((batch, max_length, *shape), kinds[name])
            for name, shape in shapes.items()
        }
        return cls(tokens, jnp.zeros((batch,), jnp.int32))

    @property
    def max_length(self) -> int:
        """Tokens it can hold."""
        return next(iter(self.tokens.values())).shape[1]

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)

    def append(
        self, new: Mapping[str, jax.Array], valid: Bool[Array, "b t"] | None = None
    ) -> TokenCache:
        """Stores new tokens behind the old ones of each row.

        Args:
          new: name -> [b, t, ...], for every name of the cache.
          valid: [b, t], True for real tokens, which come first; only they are stored and counted.

        Raises:
          ValueError: on names or shapes that do not fit, or (outside of jit) when it is full.
        """
        if set(new) != set(self.tokens):
            raise ValueError(
                f"TokenCache: holds {sorted(self.tokens)}, got {sorted(new)}; make the cache with "
                "init_cache of the same module."
            )
        for name, array in new.items():
            old = self.tokens[name]
            if (array.shape[0], *array.shape[2:]) != (old.shape[0], *old.shape[2:]):
                raise ValueError(
                    f"TokenCache: new {name} of shape {array.shape} does not fit the cache, which "
                    f"holds {old.shape}; make the cache with init_cache of the same module and "
                    "batch size."
                )
        first = next(iter(new.values()))
        where = new_positions(self.length, first.shape[1])
        count = valid_count(valid, where)
        check_room("TokenCache", self.length, count, self.max_length)
        tokens = {
            name: write_rows(self.tokens[name], where, array, valid) for name, array in new.items()
        }
        return TokenCache(tokens, self.length + count)


jax.tree_util.register_dataclass(TokenCache, data_fields=["tokens", "length"], meta_fields=[])
