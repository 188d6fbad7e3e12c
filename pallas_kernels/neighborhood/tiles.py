"""Tile shapes: which of them a neighborhood needs least of, and what a choice costs.

Everything is counted axis by axis: the key tiles that a query tile meets form a box, so numbers of
tiles are products of numbers per axis, and no list of tiles is made.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from pallas_kernels.neighborhood.layout import TokenLayout
from pallas_kernels.neighborhood.windows import Axis

TILE_TOKENS = 128
"""Tokens of the smallest tile: the least that keeps a matrix unit busy."""

BLOCK_TOKENS = 1024
"""Tokens up to which tiles are paired, so that kernels may take larger blocks."""

MASK_COST = 0.25
"""Extra cost of a tile that needs its mask, relative to its scores."""


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What a call visits. Shares are of all query-key pairs of the map.

    Attributes:
      ideal: share of the pairs that is visible: the least any kernel has to compute.
      visited: share that is computed, all pairs of every visited tile, padding included.
      full, partial: shares of the visited tiles that need no mask, and that need it.
      tiles: visited tiles, of one head and batch row.
      padding: share of padding among the slots of the queries.
    """

    ideal: float
    visited: float
    full: float
    partial: float
    tiles: int
    padding: float

    @property
    def overhead(self) -> float:
        """Computed pairs per visible pair; 1 is perfect."""
        return self.visited / self.ideal

    def __str__(self) -> str:
        return (
            f"{self.visited:.2%} of the pairs computed, {self.ideal:.2%} visible "
            f"({self.overhead:.2f}x); {self.full:.0%} of {self.tiles} tiles without a mask; "
            f"{self.padding:.0%} padding"
        )


def efficiency(axes: Sequence[Axis], q_tile: Sequence[int], kv_tile: Sequence[int]) -> Efficiency:
    """Counts the tiles of a choice; exact where the dilation divides every axis."""
    shape, dilation = tuple(a.length for a in axes), tuple(a.dilation for a in axes)
    layout = TokenLayout(shape, tuple(q_tile), dilation)
    counts = [_counts(axis, bq, bk) for axis, bq, bk in zip(axes, q_tile, kv_tile)]
    visited = layout.groups * math.prod(c[0] for c in counts)
    full = layout.groups * math.prod(c[1] for c in counts)
    pairs, tokens = math.prod(axis.pairs() for axis in axes), math.prod(shape)
    return Efficiency(
        ideal=pairs / tokens**2,
        visited=visited * math.prod(q_tile) * math.prod(kv_tile) / tokens**2,
        full=full / visited,
        partial=1 - full / visited,
        tiles=visited,
        padding=1 - tokens / layout.length,
    )


@functools.lru_cache(maxsize=256)
def choose_tiles(
    axes: tuple[Axis, ...],
    q_tile: tuple[int, ...] | None = None,
    kv_tile: tuple[int, ...] | None = None,
    alike: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tile shapes of least estimated cost.

        cost = Σ over visited tiles of  m n (1 + MASK_COST if it needs a mask)

    Args:
      axes: the windows.
      q_tile, kv_tile: a shape to keep instead of choosing it.
      alike: whether queries and keys must have the same tiles.

    Returns:
      (q_tile, kv_tile): powers of two along each axis, `TILE_TOKENS` together, or fewer where a
      dilation group has fewer.
    """
    q_tiles = [q_tile] if q_tile else _shapes(axes)
    kv_tiles = [kv_tile] if kv_tile else _shapes(axes)
    pairs = list(itertools.product(range(len(q_tiles)), range(len(kv_tiles))))
    if alike:
        pairs = [(i, j) for i, j in pairs if q_tiles[i] == kv_tiles[j]]
    chosen = np.array(pairs, np.int32)
    visited, full = np.ones(len(pairs)), np.ones(len(pairs))
    for a, axis in enumerate(axes):
        sizes_q, sizes_k = (sorted({t[a] for t in tiles}) for tiles in (q_tiles, kv_tiles))
        counts = np.array([[_counts(axis, bq, bk) for bk in sizes_k] for bq in sizes_q], float)
        at_q = np.array([sizes_q.index(t[a]) for t in q_tiles])[chosen[:, 0]]
        at_k = np.array([sizes_k.index(t[a]) for t in kv_tiles])[chosen[:, 1]]
        visited *= counts[at_q, at_k, 0]
        full *= counts[at_q, at_k, 1]
    tokens_q, tokens_k = (np.array([math.prod(t) for t in ts]) for ts in (q_tiles, kv_tiles))
    scores = tokens_q[chosen[:, 0]] * tokens_k[chosen[:, 1]]
    cost = (visited + MASK_COST * (visited - full)) * scores
    # ties: prefer the squarest pair, which has the shortest border
    spread = np.array([max(q_tiles[i]) + max(kv_tiles[j]) for i, j in pairs])
    best_q, best_k = chosen[np.lexsort((spread, cost))[0]]
    return q_tiles[best_q], kv_tiles[best_k]


def _shapes(axes: Sequence[Axis]) -> list[tuple[int, ...]]:
    """Candidate shapes: powers of two no longer than the (rounded) groups."""
    longest = [1 << (axis.longest - 1).bit_length() for axis in axes]
    sizes = [[1 << i for i in range(n.bit_length())] for n in longest]
    whole = math.prod(longest)
    wanted = min(TILE_TOKENS, whole)
    return [shape for shape in itertools.product(*sizes) if math.prod(shape) == wanted]


@functools.lru_cache(maxsize=256)
def choose_splits(
    axes: tuple[Axis, ...], q_tile: tuple[int, ...], kv_tile: tuple[int, ...], alike: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes along which tiles are paired, up to `BLOCK_TOKENS`; never where it would add padding.

    Each time those axes are taken with which query and key tiles of twice the size visit least.

    Args:
      axes: the windows.
      q_tile, kv_tile: the smallest tiles.
      alike: whether queries and keys must be in one order.

    Returns:
      `TokenLayout.splits` of the queries and of the keys.
    """
    found: tuple[list[int], list[int]] = ([], [])
    sides = (q_tile, kv_tile)
    while True:
        choices = [_doubled(axes, tile) for tile in sides]
        options = [
            (math.prod(_counts(axis, *pair)[0] for axis, *pair in zip(axes, q, k)), i, -j, q, k)
            for i, q in choices[0]
            for j, k in choices[1]
            if i == j or not alike
        ]
        _, i, j, *sides = min(options)
        if i < 0 and j > 0:  # neither can be doubled
            return tuple(found[0]), tuple(found[1])
        for splits, axis in zip(found, (i, -j)):
            if axis >= 0:
                splits.append(axis)


def _doubled(axes: Sequence[Axis], tile: tuple[int, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """[(axis, tile of twice the size)]; only (-1, tile) where there is none."""
    found = []
    for i, axis in enumerate(axes):
        tiles = -(-axis.longest // tile[i])
        if tiles % 2 == 0 and math.prod(tile) < BLOCK_TOKENS:
            found.append((i, tuple(b << (i == j) for j, b in enumerate(tile))))
    return found or [(-1, tile)]


@functools.lru_cache(maxsize=4096)
def _counts(axis: Axis, block_q: int, block_kv: int) -> tuple[int, int]:
    """(visited, full) pairs of a query tile and a key tile along one axis, of the longest group."""
    first, last = axis.bounds(0)
    starts = np.arange(0, len(first), block_q)
    low, lowest_end = (np.minimum.reduceat(x, starts) for x in (first, last))
    highest_start, high = (np.maximum.reduceat(x, starts) for x in (first, last))
    visited = high // block_kv - low // block_kv + 1
    full = (lowest_end + 1) // block_kv - -(-highest_start // block_kv)
    if len(first) % block_q:
        full[-1] = 0  # padding in the tile
    return int(visited.sum()), int(np.maximum(full, 0).sum())
