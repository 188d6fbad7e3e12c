"""The cache of a sliding window with sinks: constant memory, whatever the length of the text.

With W slots in the ring and n sinks, token p lives in slot p when p < n, else in slot
n + (p - n) mod W. Positions are the original ones: a key is stored as it was computed and its token
index beside it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnjax.attention import attention
from attnjax.cache.base import cache_bytes, check_new, new_positions, valid_count, write_rows
from attnjax.masks import Window
from attnjax.merge import merge_attention


@dataclasses.dataclass(frozen=True)
class RingCache:
    """The first `sinks` tokens and the last `window` tokens.

    Attributes:
      key: [b, n + W, g, d], value: [b, n + W, g, e].
      positions: [b, n + W] int32, the token index that each slot holds; -1 where empty.
      length: [b] int32, tokens seen so far (not the tokens kept).
      window: W in tokens, counting the query itself. Static.
      sinks: n, tokens at the start that stay visible; 0 for none. Static.

    Memory: O(W + n). Shardable by b and g.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    length: jax.Array
    window: int
    sinks: int

    @classmethod
    def create(
        cls,
        batch: int,
        window: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
        *,
        sinks: int = 0,
    ) -> RingCache:
        """An empty cache.

        Raises:
          ValueError: when window < 1 or sinks < 0.
        """
        if window < 1 or sinks < 0:
            raise ValueError(
                f"RingCache: needs window >= 1 and sinks >= 0, got window={window}, sinks={sinks}."
            )
        shape = (batch, window + sinks, num_kv_heads)
        value_dim = key_dim if value_dim is None else value_dim
        return cls(
            jnp.zeros((*shape, key_dim), dtype),
            jnp.zeros((*shape, value_dim), dtype),
            jnp.full((batch, window + sinks), -1, jnp.int32),
            jnp.zeros((batch,), jnp.int32),
            window,
            sinks,
        )

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)

    def append(
        self, key: jax.Array, value: jax.Array, valid: Bool[Array, "b t"] | None = None
    ) -> RingCache:
        """Stores new tokens, each over the token that leaves the window with it.

        Args:
          key: [b, t, g, d].
          value: [b, t, g, e].
          valid: [b, t], True for real tokens, which come first; only they are stored and counted.

        Raises:
          ValueError: on shapes that do not fit.
        """
        check_new("RingCache", self, key, value, valid)
        where = new_positions(self.length, key.shape[1])
        length = self.length + valid_count(valid, where)
        # of tokens that share a slot only the last may be written: a scatter has no order
        keep = (where < self.sinks) | (where >= length[:, None] - self.window)
        keep = keep & (where < length[:, None])
        slots = jnp.where(
            where < self.sinks, where, self.sinks + (where - self.sinks) % self.window
        )
        return dataclasses.replace(
            self,
            key=write_rows(self.key, slots, key, keep),
            value=write_rows(self.value, slots, value, keep),
            positions=write_rows(self.positions, slots, where, keep),
            length=length,
        )

    def attend(
        self,
        query: Float[Array, "b t h d"],
        key: Float[Array, "b t g d"],
        value: Float[Array, "b t g e"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        **options: Any,
    ) -> tuple[tuple[Any, ...], RingCache]:
        """Each new token attends to the window that ends with it, and to the sinks.

        One new token attends to the ring itself. Several are split so that nothing of size T x T
        is made: the window among the new tokens (block sparse, static), the old ring for the first
        W of them, and the sinks for those that have left them behind; `merge_attention` joins the
        three.

        Args:
          query, key, value: the new tokens.
          valid: as for `append`; rows of the output at padding are meaningless.
          options: of `attnjax.attention`.

        Returns:
          `((o [b, t, h, e], lse [b, t, h]), cache)`. Cost: O(t (W + n)).
        """
        cache = self.append(key, value, valid)
        where = new_positions(self.length, query.shape[1])
        if query.shape[1] == 1:
            seen = (cache.positions >= 0)[:, None, None, :]
            return _attend(query, cache.key, cache.value, seen, **options), cache
        recent = attention(
            query, key, value, mask=Window(self.window), return_residual=True, **options
        )
        # a token further than W behind the start of the chunk is out of every ring
        m = min(query.shape[1], self.window)
        behind = where[:, :m, None] - self.positions[:, None, :]
        seen = (self.positions[:, None, :] >= 0) & (behind < self.window)
        old = _attend(query[:, :m], self.key, self.value, seen[:, None], **options)
        parts = [recent, pad_rows(old, query.shape[1])]
        if self.sinks:
            first = cache.positions[:, : self.sinks]
            behind = where[:, :, None] - first[:, None, :]
            seen = (first[:, None, :] >= 0) & (behind >= self.window)
            sink_key, sink_value = cache.key[:, : self.sinks], cache.value[:, : self.sinks]
            parts.append(_attend(query, sink_key, sink_value, seen[:, None], **options))
        return merge_attention(parts), cache


def pad_rows(part: tuple[jax.Array, jax.Array], length: int) -> tuple[jax.Array, jax.Array]:
    """Extends `(o, lse)` by rows that attended to nothing (0 and -inf) up to `length` queries."""
    o, lse = part
    extra = length - o.shape[1]
    if extra == 0:
        return o, lse
    o = jnp.pad(o, ((0, 0), (0, extra), (0, 0), (0, 0)))
    return o, jnp.pad(lse, ((0, 0), (0, extra), (0, 0)), constant_values=-jnp.inf)


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array, **options: Any
) -> tuple[jax.Array, jax.Array]:
    """Attention to stored keys under a boolean array [b, 1, t, s]."""
    key, value = key.astype(query.dtype), value.astype(query.dtype)
    return attention(query, key, value, mask=seen, return_residual=True, **options)


jax.tree_util.register_dataclass(
    RingCache,
    data_fields=["key", "value", "positions", "length"],
    meta_fields=["window", "sinks"],
)
