"""Sets of keys, visible to every query or to none; sets of queries; keys with a last query."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from attnjax.documents import document_starts
from attnjax.masks.arguments import of_row, size_along
from attnjax.masks.base import Mask
from attnjax.masks.sequences import range_minimum
from pallas_kernels.maskprogram import like, look_up, mask_node, to_class


@mask_node("counts")
class KeySet(Mask):
    """Keys of a set: visible iff counts[b, k + 1] > counts[b, k].

    Made by `key_set` or `document_sinks`. Counting makes every tile exact: it holds counts[k1] -
    counts[k0] keys of the set.

    Attributes:
      counts: [b, s + 1] int32, members among the first 0, 1, ..., s keys.
    """

    counts: Any

    @property
    def batch_size(self) -> int | None:
        """Rows of `counts`, or None when one serves all."""
        return size_along(0, self.counts)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """See `MaskProgram.predicate`."""
        return look_up(self.counts, b, k + 1) > look_up(self.counts, b, k)

    def _classify(self, xp: Any, b: Any, h: Any, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        count = look_up(self.counts, b, k1) - look_up(self.counts, b, k0)
        return to_class(xp, count == 0, count == k1 - k0)


def key_set(keep: Bool[Array, "b s"]) -> KeySet:
    """The keys where `keep` is True.

    Args:
      keep: by row of the batch, or [1, s] for all rows.
    """
    counts = jnp.cumsum(jnp.asarray(keep).astype(jnp.int32), axis=1)
    return KeySet(jnp.pad(counts, ((0, 0), (1, 0))))


def document_sinks(segment_ids: Int[Array, "b s"], sinks: int) -> KeySet:
    """The first tokens of every document of a packed row.

    Args:
      segment_ids: documents are runs of equal ids.
      sinks: number of tokens per document.
    """
    start = document_starts(jnp.asarray(segment_ids))
    return key_set(jnp.arange(start.shape[1], dtype=jnp.int32)[None] - start < sinks)


@mask_node("counts", "start")
class QuerySet(Mask):
    """Queries of a set see every key, the others none; see `query_set`.

    Attributes:
      counts: [b, h, t + 1] int32, members among the first 0, 1, ..., t queries.
      start: absolute index of the first query, an integer or [b] int32.
    """

    counts: Any
    start: Any

    @property
    def num_heads(self) -> int | None:
        """Heads of `counts`, None when one serves all."""
        return size_along(1, self.counts)

    @property
    def batch_size(self) -> int | None:
        """Rows of `counts`, None when one serves all."""
        return size_along(0, self.counts)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """See `MaskProgram.predicate`."""
        return self._members(b, h, q, q + 1) > 0

    def _classify(self, xp: Any, b: Any, h: Any, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        count = self._members(b, h, q0, q1) + 0 * k0
        return to_class(xp, count == 0, count == q1 - q0)

    def _members(self, b: Any, h: Any, q0: Any, q1: Any) -> Any:
        start = of_row(self.start, q0, b)
        return look_up(self.counts, b, h, q1 - start) - look_up(self.counts, b, h, q0 - start)


def query_set(queries: Bool[Array, "b t h"], start: Any = 0) -> QuerySet:
    """The mask under which the given queries see every key and the others none.

    Args:
      queries: by row and head.
      start: absolute index of the first query, an integer or [b] int32.
    """
    counts = jnp.cumsum(queries.swapaxes(1, 2), axis=2, dtype=jnp.int32)
    return QuerySet(jnp.pad(counts, ((0, 0), (0, 0), (1, 0))), start)


@mask_node("end")
class KeptUntil(Mask):
    """Key k is visible to the queries before `end[b, h, k]`; causality is up to another mask.

    Attributes:
      end: [b or 1, h or 1, s] int32, in query indices.
    """

    end: Any

    @property
    def num_heads(self) -> int | None:
        """Heads of `end`, None when one serves all."""
        return size_along(1, self.end)

    @property
    def batch_size(self) -> int | None:
        """Rows of `end`, None when one serves all."""
        return size_along(0, self.end)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """See `MaskProgram.predicate`."""
        return q < like(look_up(self.end, b, h, k), q)

    def _classify(self, xp: Any, b: Any, h: Any, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        rows, heads, s = self.end.shape
        row = (b if rows > 1 else 0) * heads + (h if heads > 1 else 0) + 0 * k0
        flat = self.end.reshape(rows * heads, s)
        last = -range_minimum(xp, -flat, row, k0, k1)
        return to_class(xp, q0 >= last, q1 <= range_minimum(xp, flat, row, k0, k1))
