"""Masks of prompts: prefixes and documents seen in both directions, rectangles of queries and keys.

The masks are mask algebra, so that a kernel skips the tiles that they leave empty.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int

from attnjax.masks.arguments import check_int, check_integers, of_row, size_along
from attnjax.masks.base import Mask, common_size
from attnjax.masks.sequences import Prefix, Segments
from attnjax.masks.shapes import Causal
from pallas_kernels.maskprogram import mask_node, to_class


def prefix_lm(prefix: Any) -> Mask:
    """The first tokens see each other in both directions, the others are causal.

        visible iff k <= q or k < n

    Args:
      prefix: n in tokens, an integer for all rows or integers [b]; 0 is `Causal()`.
    """
    return Causal() | Prefix(prefix)


def causal_within_document(document_ids: Int[Array, "b s"]) -> Mask:
    """A token sees what is before it in its own document.

    Args:
      document_ids: [b, s]; tokens with a negative id are in no document and see nothing.
    """
    return Causal() & Segments(document_ids)


def between_documents(document_ids: Int[Array, "b s"]) -> Mask:
    """A token sees all tokens of all other documents, before and after it.

    Args:
      document_ids: [b, s]; tokens with a negative id are in no document and see nothing.
    """
    ids = jnp.asarray(document_ids)
    inside = jnp.where(ids >= 0, jnp.zeros_like(ids), jnp.full_like(ids, -1))
    return Segments(inside) & ~Segments(ids)


def join_masks(program: Mask, mask: Any, t: int, s: int, q_offset: Any = 0) -> Any:
    """What both masks show.

    Args:
      program: a mask.
      mask: a mask, booleans broadcastable to [b, h, t, s], or None for everything.
      t, s: queries and keys.
      q_offset: absolute index of the first query.

    Returns:
      A mask, or booleans where `mask` is an array.
    """
    if mask is None or isinstance(mask, Mask):
        return program if mask is None else program & mask
    return mask & program.dense(t, s, q_offset=q_offset)


@dataclasses.dataclass(frozen=True)
class Documents:
    """Where the documents of each prompt are: one after the other, behind the prefix.

    Attributes:
      prefix: [b] int32, P, tokens before the first document.
      lengths: [b, n] int32, tokens of each document in order; 0 is no document. n counts documents.
    """

    prefix: jax.Array
    lengths: jax.Array

    @classmethod
    def create(cls, prefix: Any, lengths: Any, batch: int | None = None) -> Documents:
        """Documents from numbers.

        Args:
          prefix: tokens before the first document, an integer or [b].
          lengths: tokens of each document, [n] for all rows or [b, n].
          batch: rows; None is the number of rows of the arguments.

        Raises:
          ValueError: on ranks or batch sizes that do not fit, or (where known) negative numbers.
        """
        lengths, prefix = jnp.asarray(lengths, jnp.int32), jnp.asarray(prefix, jnp.int32)
        if lengths.ndim not in (1, 2) or prefix.ndim > 1:
            raise ValueError(
                "Documents: prefix must be a number or [batch], lengths [documents] or [batch, "
                f"documents], got {prefix.shape} and {lengths.shape}."
            )
        rows = {n for n in (batch, *prefix.shape, *lengths.shape[:-1]) if n is not None} - {1}
        if len(rows) > 1:
            raise ValueError(
                f"Documents: prefix {prefix.shape}, lengths {lengths.shape} and batch={batch} "
                "disagree on the number of rows."
            )
        if not isinstance(lengths, Tracer) and not isinstance(prefix, Tracer):
            if int(lengths.min(initial=0)) < 0 or int(prefix.min()) < 0:
                raise ValueError("Documents: prefix and lengths must be at least 0 tokens.")
        size = max(rows, default=1)
        return cls(
            jnp.broadcast_to(prefix.reshape(-1), (size,)),
            jnp.broadcast_to(lengths.reshape(-1, lengths.shape[-1]), (size, lengths.shape[-1])),
        )

    @property
    def stop(self) -> Int[Array, " b"]:
        """Index of the first token after the documents."""
        return self.prefix + self.lengths.sum(1, dtype=jnp.int32)

    def ids(self, index: Int[Array, "b s"]) -> Int[Array, "b s"]:
        """The document of each token, by index; -1 before and after the documents."""
        ends = self.prefix[:, None] + jnp.cumsum(self.lengths, 1, dtype=jnp.int32)  # [b, n]
        place = (index[:, :, None] >= ends[:, None, :]).sum(-1, dtype=jnp.int32)
        inside = (index >= self.prefix[:, None]) & (index < self.stop[:, None])
        return jnp.where(inside, place, jnp.full_like(place, -1))

    def positions(self, index: Int[Array, "b s"]) -> Int[Array, "b s"]:
        """Positions before any shift: all documents end where the last one does."""
        ends = self.prefix[:, None] + jnp.cumsum(self.lengths, 1, dtype=jnp.int32)
        ids = self.ids(index)
        end = jnp.take_along_axis(ends, jnp.maximum(ids, 0), 1)
        moved = index - end + self.stop[:, None]
        return jnp.where(ids < 0, index, moved).astype(jnp.int32)


jax.tree_util.register_dataclass(Documents, data_fields=["prefix", "lengths"], meta_fields=[])


@mask_node("q_start", "q_stop", "k_start", "k_stop")
class Rectangle(Mask):
    """A run of queries sees a run of keys.

        visible iff q_start <= q < q_stop and k_start <= k < k_stop

    Args:
      q_start, q_stop, k_start, k_stop: indices of tokens, each an integer for all rows or integers
        [b]. An empty run shows nothing.
    """

    q_start: Any
    q_stop: Any
    k_start: Any
    k_stop: Any

    def __post_init__(self) -> None:
        for name in ("q_start", "q_stop", "k_start", "k_stop"):
            value = getattr(self, name)
            if isinstance(value, int):
                check_int("Rectangle", name, value, -(2**31))
            else:
                object.__setattr__(self, name, check_integers("Rectangle", name, value, 0, 1))
        common_size("batch_size", tuple(Prefix(x) for x in self._ends() if jnp.ndim(x)))

    @property
    def batch_size(self) -> int | None:
        """Rows of the arrays, None when one rectangle serves all."""
        return size_along(0, *self._ends())

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """Both indices are in their runs."""
        q0, q1, k0, k1 = (of_row(x, q, b) for x in self._ends())
        return (q >= q0) & (q < q1) & (k >= k0) & (k < k1)

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        a0, a1, c0, c1 = (of_row(x, q0, b) for x in self._ends())
        empty = (q1 <= a0) | (q0 >= a1) | (k1 <= c0) | (k0 >= c1) | (a1 <= a0) | (c1 <= c0)
        full = (q0 >= a0) & (q1 <= a1) & (k0 >= c0) & (k1 <= c1)
        return to_class(xp, empty, full)

    def _ends(self) -> tuple[Any, Any, Any, Any]:
        return self.q_start, self.q_stop, self.k_start, self.k_stop
