"""The cache of local blocks plus every s-th block: LongGen's "block" layers and S2 with one phase.

With blocks of c tokens, l local blocks, stride s and phase o, a query in block I sees the tokens
of block J up to itself iff I - J < l or J mod s = o. The ring holds the last l c tokens; the store
holds the blocks with J mod s = o, each token written on arrival and read once its block has left
the local band. Positions are the original ones.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnjax.attention import attention
from attnjax.cache.base import (
    cache_bytes,
    check_new,
    check_room,
    new_positions,
    valid_count,
    write_rows,
)
from attnjax.cache.ring import pad_rows
from attnjax.masks import Window
from attnjax.masks.base import Mask
from attnjax.merge import merge_attention
from pallas_kernels.maskprogram import floor_div, look_up, mask_node, to_class


@dataclasses.dataclass(frozen=True)
class StridedCache:
    """The last `local_blocks` blocks, and every `stride`-th block of the whole text.

    Attributes:
      key: [b, r + n, g, d], value: [b, r + n, g, e] with r = local_blocks · block ring slots and
        n = ceil(max_length / (block · stride)) · block slots of the strided store.
      positions: [b, r + n] int32, the token index that each slot holds; -1 where empty.
      length: [b] int32, tokens seen so far.
      block, stride, local_blocks, offset, max_length: static, in tokens and blocks.

    Memory: O(r + max_length / stride). Shardable by b and g.
    """

    key: jax.Array
    value: jax.Array
    positions: jax.Array
    length: jax.Array
    block: int
    stride: int
    local_blocks: int
    offset: int
    max_length: int

    @classmethod
    def create(
        cls,
        batch: int,
        max_length: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dtype: Any = jnp.float32,
        *,
        block: int,
        stride: int,
        local_blocks: int,
        offset: int = 0,
    ) -> StridedCache:
        """An empty cache for `max_length` tokens.

        Raises:
          ValueError: when block, stride or local_blocks < 1, or offset is not in [0, stride).
        """
        if min(block, stride, local_blocks) < 1 or not 0 <= offset < stride:
            raise ValueError(
                "StridedCache: needs block, stride, local_blocks >= 1 and 0 <= offset < stride, "
                f"got block={block}, stride={stride}, local_blocks={local_blocks}, offset={offset}."
            )
        slots = local_blocks * block + -(-max_length // (block * stride)) * block
        shape = (batch, slots, num_kv_heads)
        value_dim = key_dim if value_dim is None else value_dim
        return cls(
            jnp.zeros((*shape, key_dim), dtype),
            jnp.zeros((*shape, value_dim), dtype),
            jnp.full((batch, slots), -1, jnp.int32),
            jnp.zeros((batch,), jnp.int32),
            block,
            stride,
            local_blocks,
            offset,
            max_length,
        )

    @property
    def ring(self) -> int:
        """Slots of the local ring: local_blocks · block."""
        return self.local_blocks * self.block

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)

    def append(
        self, key: jax.Array, value: jax.Array, valid: Bool[Array, "b t"] | None = None
    ) -> StridedCache:
        """Stores new tokens: all of them in the ring, those of strided blocks in the store as well.

        Args:
          key: [b, t, g, d].
          value: [b, t, g, e].
          valid: [b, t], True for real tokens, which come first; only they are stored and counted.

        Raises:
          ValueError: on shapes that do not fit, or (outside of jit) when the store is full.
        """
        check_new("StridedCache", self, key, value, valid)
        where = new_positions(self.length, key.shape[1])
        count = valid_count(valid, where)
        check_room("StridedCache", self.length, count, self.max_length)
        length = self.length + count
        real = where < length[:, None]
        block = where // self.block
        local = real & (where >= length[:, None] - self.ring)
        strided = real & (block % self.stride == self.offset)
        slot = self.ring + block // self.stride * self.block + where % self.block

        def write(store: jax.Array, new: jax.Array) -> jax.Array:
            return write_rows(write_rows(store, where % self.ring, new, local), slot, new, strided)

        return dataclasses.replace(
            self,
            key=write(self.key, key),
            value=write(self.value, value),
            positions=write(self.positions, where),
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
    ) -> tuple[tuple[Any, ...], StridedCache]:
        """Each new token attends to its local blocks and to the strided blocks before them.

        One new token attends to ring and store at once. Several are split: the local band among
        the new tokens, the old ring for the first of them, and the store; `merge_attention` joins
        the three.

        Args:
          query, key, value: the new tokens.
          valid: as for `append`; rows of the output at padding are meaningless.
          options: of `attnjax.attention`.

        Returns:
          `((o [b, t, h, e], lse [b, t, h]), cache)`. Cost: O(t (r + max_length / stride)).
        """
        cache = self.append(key, value, valid)
        t, ring = query.shape[1], self.ring
        where = new_positions(self.length, t)
        options["return_residual"] = True
        if t == 1:
            near = self._near(where, cache.positions)
            in_ring = (jnp.arange(cache.positions.shape[1]) < ring)[None, None, :]
            seen = (cache.positions >= 0)[:, None, :] & (near == in_ring)
            k, v = cache.key.astype(query.dtype), cache.value.astype(query.dtype)
            return attention(query, k, v, mask=seen[:, None], **options), cache
        shape = (self.block, self.stride, self.local_blocks, self.offset)
        band = Window(ring) & LocalBlocks(self.length, self.block, self.local_blocks)
        parts = [attention(query, key, value, mask=band, **options)]
        m = min(t, ring)
        old = self.positions[:, :ring]
        seen = (old >= 0)[:, None, :] & self._near(where[:, :m], old)
        k, v = self.key[:, :ring].astype(query.dtype), self.value[:, :ring].astype(query.dtype)
        parts.append(pad_rows(attention(query[:, :m], k, v, mask=seen[:, None], **options), t))
        k, v = cache.key[:, ring:].astype(query.dtype), cache.value[:, ring:].astype(query.dtype)
        parts.append(attention(query, k, v, mask=FarBlocks(self.length, *shape), **options))
        return merge_attention(parts), cache

    def _near(self, query: Int[Array, "b t"], key: Int[Array, "b s"]) -> Bool[Array, "b t s"]:
        """Whether the key's block is local to the query's."""
        gap = (query // self.block)[:, :, None] - (key // self.block)[:, None, :]
        return gap < self.local_blocks


@mask_node("start")
class LocalBlocks(Mask):
    """Key k is in one of the last blocks of query q: ⌊(q + start_b) / c⌋ - ⌊(k + start_b) / c⌋ < l.

    Attributes:
      start: [b] integers, absolute index of the first token of each row.
      block: c in tokens.
      local_blocks: l in blocks, counting the query's own.
    """

    start: Any
    block: int
    local_blocks: int

    @property
    def batch_size(self) -> int:
        """Rows of `start`."""
        return self.start.shape[0]

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """See `MaskProgram.predicate`."""
        return self._gap(b, q, k) < self.local_blocks

    def _classify(self, xp: Any, b: Any, h: Any, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        most, least = self._gap(b, q1 - 1, k0), self._gap(b, q0, k1 - 1)
        return to_class(xp, least >= self.local_blocks, most < self.local_blocks)

    def _gap(self, b: Any, q: Any, k: Any) -> Any:
        start = look_up(self.start, b)
        return floor_div(q + start, self.block) - floor_div(k + start, self.block)


@mask_node("start")
class FarBlocks(Mask):
    """Slot k of a strided store is behind the local blocks of query q.

        J(k) = s ⌊k / c⌋ + o,   visible iff ⌊(q + start_b) / c⌋ - J(k) >= l

    Attributes:
      start: [b] integers, absolute index of the first query of each row.
      block, stride, local_blocks, offset: c, s, l, o in tokens and blocks.
    """

    start: Any
    block: int
    stride: int
    local_blocks: int
    offset: int

    @property
    def batch_size(self) -> int:
        """Rows of `start`."""
        return self.start.shape[0]

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """See `MaskProgram.predicate`."""
        return self._gap(b, q, k) >= self.local_blocks

    def _classify(self, xp: Any, b: Any, h: Any, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        most, least = self._gap(b, q1 - 1, k0), self._gap(b, q0, k1 - 1)
        return to_class(xp, most < self.local_blocks, least >= self.local_blocks)

    def _gap(self, b: Any, q: Any, k: Any) -> Any:
        stored = floor_div(k, self.block) * self.stride + self.offset
        return floor_div(q + look_up(self.start, b), self.block) - stored


jax.tree_util.register_dataclass(
    StridedCache,
    data_fields=["key", "value", "positions", "length"],
    meta_fields=["block", "stride", "local_blocks", "offset", "max_length"],
)
