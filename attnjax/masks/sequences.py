"""Masks that hold arrays about the sequences of a batch: prefixes, lengths, packed documents.

The arrays may be traced: tile classes are then computed under `jax.jit`. An array whose first axis
has size 1 is shared by all rows of the batch.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from attnjax.masks.arguments import check_int, check_integers, of_row, size_along
from attnjax.masks.base import Mask, common_size
from pallas_kernels.maskprogram import look_up, mask_node, to_class


@mask_node("n")
class Prefix(Mask):
    """The first keys of each sequence are visible to every query.

        visible iff k < n_bh

    `Causal() | Prefix(n)` is the prefix language model: both directions inside the prefix.

    Args:
      n: number of tokens, at least 0: an integer for all rows, or an integer array [b], or [b, h]
        where heads differ.
    """

    n: Any

    def __post_init__(self) -> None:
        if np.ndim(self.n) == 0 and not isinstance(self.n, jax.Array):
            check_int("Prefix", "n", self.n, 0)
        else:
            object.__setattr__(self, "n", check_integers("Prefix", "n", self.n, 0, 1, 2))

    @property
    def num_heads(self) -> int | None:
        """Heads of the array n, None when all have one prefix."""
        return size_along(1, self.n)

    @property
    def batch_size(self) -> int | None:
        """Rows of the array n, None when one number serves all."""
        return size_along(0, self.n)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The key is in the prefix of row b and head h."""
        return k < of_row(self.n, k, b, h)

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        n = of_row(self.n, k0, b, h)
        return to_class(xp, k0 >= n, k1 <= n)


@mask_node("kv_lengths", "q_lengths")
class Lengths(Mask):
    """Each sequence ends somewhere: suffix padding is hidden.

        visible iff k < kv_lengths_b and q < q_lengths_b

    Args:
      kv_lengths: [b] integers, number of real keys of each row.
      q_lengths: [b] integers, number of real queries in absolute indices; None: all are real.
    """

    kv_lengths: Any
    q_lengths: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "kv_lengths", check_integers("Lengths", "kv_lengths", self.kv_lengths, 1)
        )
        if self.q_lengths is not None:
            object.__setattr__(
                self, "q_lengths", check_integers("Lengths", "q_lengths", self.q_lengths, 1)
            )
            common_size("batch_size", (Prefix(self.kv_lengths), Prefix(self.q_lengths)))

    @property
    def batch_size(self) -> int | None:
        """Rows of the length arrays."""
        return size_along(0, self.kv_lengths, self.q_lengths)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """Both indices are before the end of row b."""
        visible = k < of_row(self.kv_lengths, k, b)
        return visible if self.q_lengths is None else visible & (q < of_row(self.q_lengths, q, b))

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        end = of_row(self.kv_lengths, k0, b)
        empty, full = k0 >= end, k1 <= end
        if self.q_lengths is not None:
            end = of_row(self.q_lengths, q0, b)
            empty, full = empty | (q0 >= end), full & (q1 <= end)
        return to_class(xp, empty, full)


@mask_node("query_ids", "key_ids", "q_start")
class Segments(Mask):
    """Packed documents are kept apart.

        visible iff query_ids[b, q - q_start] = key_ids[b, k] >= 0

    A negative id marks padding: it attends to nothing and nothing attends to it, not even other
    padding. Tile classes come from the smallest and largest id of each block: exact in what they
    promise, and tight when ids are sorted along a row.

    Args:
      query_ids: [b, t] integers.
      key_ids: [b, s] integers; None: the keys are the queries.
      q_start: absolute index of the first query id, an integer or an integer array () or [b]: the
        `q_offset` of the attention call when `query_ids` covers only the new tokens.
    """

    query_ids: Any
    key_ids: Any = None
    q_start: Any = 0

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "query_ids", check_integers("Segments", "query_ids", self.query_ids, 2))
        if self.key_ids is not None:
            set_field(self, "key_ids", check_integers("Segments", "key_ids", self.key_ids, 2))
        if not isinstance(self.q_start, int):
            set_field(self, "q_start", check_integers("Segments", "q_start", self.q_start, 0, 1))
        rows = {
            len(ids) for ids in (self.query_ids, self.key_ids) if ids is not None and len(ids) > 1
        }
        if len(rows) > 1:
            raise ValueError(
                "Segments: query_ids and key_ids must have the same batch size, got shapes "
                f"{self.query_ids.shape} and {self.key_ids.shape}."
            )

    @property
    def batch_size(self) -> int | None:
        """Rows of the id arrays."""
        return size_along(0, self.query_ids, self.key_ids, self.q_start)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """Same document, and not padding."""
        keys = self.query_ids if self.key_ids is None else self.key_ids
        of_q = look_up(self.query_ids, b, q - of_row(self.q_start, q, b))
        return (of_q == look_up(keys, b, k)) & (of_q >= 0)

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        keys = self.query_ids if self.key_ids is None else self.key_ids
        start = of_row(self.q_start, q0, b)
        q_low, q_first, q_high = _id_range(xp, self.query_ids, b, q0 - start, q1 - start)
        k_low, k_first, k_high = _id_range(xp, keys, b, k0, k1)
        empty = (q_high < 0) | (k_high < 0) | (q_high < k_first) | (k_high < q_first)
        full = (q_low == q_high) & (k_low == k_high) & (q_low == k_low) & (q_low >= 0)
        return to_class(xp, empty, full)


def _id_range(xp: Any, ids: Any, b: Any, i0: Any, i1: Any) -> tuple[Any, Any, Any]:
    """Smallest id, smallest id that is not padding, and largest id of each interval [i0, i1)."""
    real = xp.where(ids < 0, xp.full_like(ids, np.iinfo(np.int32).max), ids)
    return (
        range_minimum(xp, ids, b, i0, i1),
        range_minimum(xp, real, b, i0, i1),
        -range_minimum(xp, -ids, b, i0, i1),
    )


def range_minimum(xp: Any, values: Any, b: Any, i0: Any, i1: Any) -> Any:
    """min(values[b, i0:i1]) for arrays of intervals, from minima over runs of 2^j elements.

    An interval is covered by two runs, so two look-ups answer it. Only the run lengths that occur
    are kept when the intervals have values now (the usual case, also where `values` is traced).
    """
    length = values.shape[1]
    i0, i1 = xp.clip(i0, 0, length - 1), xp.clip(i1, 1, length)
    i0 = xp.minimum(i0, i1 - 1)
    traced = isinstance(i0, Tracer) or isinstance(i1, Tracer)
    widest = length if traced else int(np.max(np.asarray(i1) - np.asarray(i0), initial=1))
    levels = widest.bit_length()
    exponent = sum((i1 - i0 >= 2**j).astype(np.int32) for j in range(1, levels)) + 0 * i0
    wanted = range(levels) if traced else np.unique(np.asarray(exponent)).tolist()
    tables, run = [], values
    for j in range(levels):
        if j in wanted:
            tables.append(run)
        if j + 1 < levels:
            far = xp.concatenate([run[:, 2**j :], run[:, -1:].repeat(2**j, axis=1)], axis=1)
            run = xp.minimum(run, far[:, :length])
    table = xp.stack(tables, axis=1)  # [b, levels, length]; run j at i covers i .. i + 2^j - 1
    slot = exponent if traced else np.searchsorted(wanted, np.asarray(exponent))
    size = sum((exponent == j).astype(np.int32) * 2**j for j in wanted)
    return xp.minimum(look_up(table, b, slot, i0), look_up(table, b, slot, i1 - size))
