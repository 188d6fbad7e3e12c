"""The cache of full attention: every key and value, in the order of the tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnjax.attention import attention
from attnjax.cache.base import (
    cache_bytes,
    check_new,
    check_room,
    new_positions,
    valid_count,
    write_rows,
)
from attnjax.decode import can_decode, decode_attention
from attnjax.masks import Causal


@dataclasses.dataclass(frozen=True)
class DenseCache:
    """All keys and values; slot j of a row holds its token j.

    Attributes:
      key: [b, s, g, d] with s = max_length. The first `length[b]` slots of row b are real.
      value: [b, s, g, e].
      length: [b] int32, tokens stored so far.

    Memory: O(max_length). Shardable by b and g.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array

    @classmethod
    def create(
        cls,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
    ) -> DenseCache:
        """An empty cache for `max_length` tokens."""
        shape = (batch, max_length, num_kv_heads)
        value_dim = key_dim if value_dim is None else value_dim
        return cls(
            jnp.zeros((*shape, key_dim), dtype),
            jnp.zeros((*shape, value_dim), dtype),
            jnp.zeros((batch,), jnp.int32),
        )

    @property
    def max_length(self) -> int:
        """Tokens it can hold."""
        return self.key.shape[-3]

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)

    def append(
        self, key: jax.Array, value: jax.Array, valid: Bool[Array, "b t"] | None = None
    ) -> DenseCache:
        """Stores new tokens behind the old ones of each row.

        Args:
          key: [b, t, g, d].
          value: [b, t, g, e].
          valid: [b, t], True for real tokens, which come first; only they are stored and counted.

        Raises:
          ValueError: on shapes that do not fit, or (outside of jit) when the cache is full.
        """
        check_new("DenseCache", self, key, value, valid)
        where = new_positions(self.length, key.shape[1])
        count = valid_count(valid, where)
        check_room("DenseCache", self.length, count, self.max_length)
        return DenseCache(
            write_rows(self.key, where, key, valid),
            write_rows(self.value, where, value, valid),
            self.length + count,
        )

    def attend(
        self,
        query: Float[Array, "b t h d"],
        key: Float[Array, "b t g d"],
        value: Float[Array, "b t g e"],
        *,
        mask: Any = None,
        valid: Bool[Array, "b t"] | None = None,
        **options: Any,
    ) -> tuple[tuple[Any, ...], DenseCache]:
        """Stores the new tokens, then lets each attend to all tokens up to itself.

        Args:
          query, key, value: the new tokens.
          mask: mask algebra over absolute token indices, or a boolean array broadcastable to
            [b, h, t, max_length]; None is `Causal()`. It must be causal, or else show unwritten
            slots.
          valid: as for `append`; rows of the output at padding are meaningless.
          options: of `attnjax.attention`.

        Returns:
          `((o [b, t, h, e], lse [b, t, h], *captures), cache)`.
        """
        cache = self.append(key, value, valid)
        if can_decode(query, mask, options):
            outputs = decode_attention(
                query, cache.key, cache.value, lengths=self.length + query.shape[1], causal=False,
                mask=Causal() if mask is None else mask, return_residual=True, **options,
            )  # fmt: skip
            return outputs, cache
        outputs = attention(
            query,
            cache.key.astype(query.dtype),
            cache.value.astype(query.dtype),
            mask=Causal() if mask is None else mask,
            q_offset=self.length,
            return_residual=True,
            **options,
        )
        return outputs, cache


jax.tree_util.register_dataclass(DenseCache, data_fields=["key", "value", "length"], meta_fields=[])
