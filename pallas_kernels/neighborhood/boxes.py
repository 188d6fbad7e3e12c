"""Masks in which a query sees a box of keys: the predicate and the classifier both masks share.

Every key has a position on a few axes, every query an interval on each; a pair is visible when the
key is inside on all of them. The positions of all axes are packed into one integer, a guard bit
above each: then

    (key | guards) - first   keeps the guard of every axis on which first <= key,
    (last | guards) - key    keeps the guard of every axis on which key <= last,

so two subtractions, two ands and one comparison decide a pair, whatever the number of axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels.maskprogram import EMPTY, FULL, PARTIAL, look_up

WORD_BITS = 31
"""Bits of a packed word; the sign stays free."""


class Boxes(NamedTuple):
    """Intervals and positions on each axis a; groups r is 1 or the number of dilation groups.

    Attributes:
      first, last: [a, r, t] int32, visible positions of each query, both ends included; a query
        that sees nothing has last = -1 and first beyond every position.
      low, high: [a, s] int32, position of each key; a key that every query sees has the lowest and
        the highest position there is.
    """

    first: np.ndarray
    last: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Word(NamedTuple):
    """Packed axes: first, last [r, t], low, high [s].

    The guards are 0 for a single axis, and are part of `last` and `high` otherwise. `low` is None
    where a key's position is its index, `high` where it is low | guards.
    """

    first: np.ndarray
    last: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    guards: int


def pack(boxes: Boxes) -> list[Word]:
    """The axes in as few words as they need, usually one."""
    words, axes, used = [], [], 0
    for axis in range(len(boxes.first)):
        values = (boxes.first, boxes.last, boxes.high)
        highest = max(int(x[axis].max(initial=0)) for x in values)
        bits = highest.bit_length() + 1
        if used + bits > WORD_BITS and axes:
            words.append(_word(boxes, axes))
            axes, used = [], 0
        axes.append((axis, used, bits - 1))
        used += bits
    return [*words, _word(boxes, axes)]


def _word(boxes: Boxes, axes: Sequence[tuple[int, int, int]]) -> Word:
    """One word; each axis is (index, shift, bits without the guard)."""
    if len(axes) == 1:
        i = axes[0][0]
        low, high = boxes.low[i], boxes.high[i]
        alike = np.array_equal(low, high)
        plain = alike and np.array_equal(low, np.arange(len(low)))
        return Word(
            boxes.first[i], boxes.last[i], None if plain else low, None if alike else high, 0
        )
    guards = sum(1 << (shift + bits) for _, shift, bits in axes)

    def packed(values: np.ndarray) -> np.ndarray:
        parts = [np.maximum(values[i], 0) << np.int32(shift) for i, shift, _ in axes]
        return np.asarray(np.sum(parts, axis=0, dtype=np.int32))

    # a query that sees nothing fails by `first` alone, so its last = -1 may become 0
    guard = np.int32(guards)
    chosen = [axis for axis, *_ in axes]
    alike = np.array_equal(boxes.low[chosen], boxes.high[chosen])
    return Word(
        packed(boxes.first), packed(boxes.last) | guard,
        packed(boxes.low), None if alike else packed(boxes.high) | guard, guards,
    )  # fmt: skip


def visible(words: Sequence[Word], row: Any, q: Any, k: Any) -> Any:
    """Whether query q of group `row` sees key k; the look-ups depend on one of q and k alone."""
    seen = None
    for word in words:
        first, last = look_up(word.first, row, q), look_up(word.last, row, q)
        low = k if word.low is None else look_up(word.low, k)
        if word.guards:
            guards = np.int32(word.guards)
            high = low | guards if word.high is None else look_up(word.high, k)
            here = ((high - first) & (last - low) & guards) == guards
        else:
            high = low if word.high is None else look_up(word.high, k)
            here = (high >= first) & (low <= last)
        seen = here if seen is None else seen & here
    return seen


def classify(boxes: Boxes, row: np.ndarray, q0: Any, q1: Any, k0: Any, k1: Any) -> np.ndarray:
    """Class of tiles, exact where the queries and the keys of a tile form boxes.

    Args:
      boxes: the mask.
      row: group of the tile's queries, an array of the rank of the intervals.
      q0, q1, k0, k1: half-open intervals, NumPy arrays of one rank.

    Cost: O(t + s) and a few operations per tile; nothing of size t x s.
    """
    found: Any = None
    for axis in range(len(boxes.first)):
        # queries that see nothing make no tile full: their `first` is beyond every key
        queries = np.stack([*_range(boxes.first[axis], q0, q1), *_range(boxes.last[axis], q0, q1)])
        keys = np.stack(
            [*_range(boxes.low[axis][None], k0, k1), *_range(boxes.high[axis][None], k0, k1)]
        )
        here = _outer(queries, keys) if _is_outer(queries, keys) else _compare(queries, keys)
        found = here if found is None else np.minimum(found, here)
    if len(found) == 1:
        return found[0]
    return found[(row, *np.indices(found.shape[1:], sparse=True))]


def _compare(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Classes along one axis, from (min, max of first and last) and (min, max of low and high)."""
    first_min, first_max, last_min, last_max = queries
    low_min, low_max, high_min, high_max = keys
    empty = (high_max < first_min) | (low_min > last_max)
    full = (high_min >= first_max) & (low_max <= last_min)
    return np.where(empty, np.int8(EMPTY), np.where(full, np.int8(FULL), np.int8(PARTIAL)))


def _is_outer(queries: np.ndarray, keys: np.ndarray) -> bool:
    """Whether every query block meets every key block, as in a block list."""
    (_, _, *q), (_, _, *k) = queries.shape, keys.shape
    return len(q) > 1 and math.prod(q) == q[-2] and math.prod(k) == k[-1]


def _outer(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """`_compare` for all pairs; along one axis few blocks differ, so few pairs are compared."""
    groups, *shape = queries.shape[1:]
    kinds, at = np.unique(queries.reshape(4, -1), axis=1, return_inverse=True)
    key_kinds, key_at = np.unique(keys.reshape(4, -1), axis=1, return_inverse=True)
    table = _compare(kinds[:, :, None], key_kinds[:, None, :])
    found = table[:, key_at.reshape(-1)][at.reshape(-1)]
    return found.reshape(groups, *shape[:-1], keys.shape[-1])


def _range(values: np.ndarray, i0: np.ndarray, i1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Minimum and maximum of values[:, i0:i1] for arrays of intervals: two [r, *shape] arrays."""
    n = values.shape[1]
    i0, i1 = np.broadcast_arrays(i0, i1)
    shape = i0.shape
    start = np.clip(i0, 0, n - 1).reshape(-1)
    stop = np.clip(i1, start.reshape(shape) + 1, n).reshape(-1)
    # runs between consecutive entries; every other one is an interval, and a sentinel closes it
    edges = np.stack([start, stop], axis=1).reshape(-1)
    padded = np.concatenate([values, values[:, -1:]], axis=1)
    low, high = (f.reduceat(padded, edges, axis=1)[:, ::2] for f in (np.minimum, np.maximum))
    return low.reshape(-1, *shape), high.reshape(-1, *shape)
