"""Choice of tile sizes for the XLA body: a cost model over the tiles that a mask makes it visit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pallas_kernels.blocklist import BlockList
from pallas_kernels.flash.spec import FlashSpec

QUERY_BLOCKS = (128, 256, 512, 1024, 2048)
KEY_BLOCKS = (128, 256, 512)

STEP_COST = 12_000.0
"""Cost of one step (loop, copies, hand-over to threads) in scores, measured on 2 CPU cores."""

EDGE_COST = (16.0, 96.0)
"""A tile [m, n] costs m n (1 + EDGE_COST[0] / m + EDGE_COST[1] / n): narrow products are slow."""

MASK_COST = 0.15
"""Extra cost of a tile that needs its mask, relative to its scores."""

BAND_KEYS = 1024
"""Most keys that a row takes in one step."""

SEARCH_TILES = 1 << 16
"""Candidates with more tiles than this are not classified for the search."""


class Tiling(NamedTuple):
    """Tile sizes in tokens, the block list they give, and the band that may replace it.

    When the listed key blocks of every row are neighbors and few, as for a window, `band`
    [nb, nh, nq] holds the first key of each row, and one step takes all `span` keys from there.
    Otherwise `band` is None and `span` is block_kv.
    """

    block_q: int
    block_kv: int
    lists: BlockList
    span: int
    band: np.ndarray | None = None


class Steps(NamedTuple):
    """How the XLA body walks a call; `spec` is the call's own description.

    Attributes:
      block_q, block_kv: tile sizes of the block lists, in tokens.
      span: keys that one step takes, in tokens: block_kv, or the width of a band.
      any_full, any_partial: whether the lists may hold FULL and PARTIAL tiles.
      lanes: most tiles that one step works on side by side.
    """

    spec: FlashSpec
    block_q: int
    block_kv: int
    span: int
    any_full: bool
    any_partial: bool
    lanes: int


def choose_tiling(
    lists: Callable[[int, int], BlockList],
    q_len: int,
    kv_len: int,
    *,
    static: bool,
    copies: int = 1,
    block_sizes: tuple[int, int] | None = None,
) -> Tiling:
    """The tile sizes of least estimated cost, with their block list.

    Args:
      lists: `(block_q, block_kv) -> BlockList`.
      q_len, kv_len: in tokens.
      static: whether the lists have values now; otherwise the sizes are fixed, since nothing is
        known yet.
      copies: rows and heads that the lists tell apart.
      block_sizes: (block_q, block_kv) to use instead.
    """
    if block_sizes is not None:
        return Tiling(*block_sizes, lists(*block_sizes), block_sizes[1])
    sizes = [
        (bq, bk) for bq in _fitting(QUERY_BLOCKS, q_len) for bk in _fitting(KEY_BLOCKS, kv_len)
    ]
    if not static:
        bq, bk = min(sizes, key=lambda s: abs(s[0] - 256) + abs(s[1] - 256))
        return Tiling(bq, bk, lists(bq, bk), bk)
    # per-head and per-row masks multiply the tiles: search on coarse candidates only
    affordable = [s for s in sizes if _tiles(q_len, kv_len, s) * copies <= SEARCH_TILES]
    best, best_cost = None, float("inf")
    for bq, bk in affordable or sizes[-1:]:
        found = lists(bq, bk)
        full, partial = (int(np.sum(x)) for x in (found.full_count, found.partial_count))
        edges = 1 + EDGE_COST[0] / bq + EDGE_COST[1] / bk
        cost = (full + partial) * STEP_COST + (full + (1 + MASK_COST) * partial) * bq * bk * edges
        if cost < best_cost:
            best, best_cost = Tiling(bq, bk, found, bk), cost
        band, span = _band(found)
        if band is not None:
            edges = 1 + EDGE_COST[0] / bq + EDGE_COST[1] / span
            cost = band.size * (STEP_COST + (1 + MASK_COST) * bq * span * edges)
            if cost < best_cost:
                best, best_cost = Tiling(bq, bk, found, span, band), cost
    assert best is not None  # there is always one candidate
    return best


def _band(lists: BlockList) -> tuple[np.ndarray | None, int]:
    """(first key of every row, keys of a row) where the rows are bands, else (None, 0)."""
    counts = lists.full_count + lists.partial_count
    span = int(counts.max(initial=0)) * lists.block_kv
    if not 0 < span <= BAND_KEYS:
        return None, 0
    kinds = ((lists.full_count, lists.full_cols), (lists.partial_count, lists.partial_cols))
    first = np.full(counts.shape, lists.num_kv_blocks, np.int32)
    last = np.full(counts.shape, -1, np.int32)
    for count, cols in kinds:  # rows are sorted, and padded with their last entry
        some = count > 0
        first = np.where(some, np.minimum(first, cols[..., 0]), first)
        last = np.where(some, np.maximum(last, cols[..., -1]), last)
    if np.any((counts > 0) & (last - first + 1 != counts)):
        return None, 0
    end = lists.num_kv_blocks * lists.block_kv - span
    return np.minimum(first * lists.block_kv, end).astype(np.int32), span


def _fitting(blocks: tuple[int, ...], length: int) -> list[int]:
    """The sizes below the length, and the length itself (to a multiple of 8) when it is short."""
    whole = -(-length // 8) * 8
    return [b for b in blocks if b < whole] + ([whole] if whole <= blocks[-1] else [])


def _tiles(q_len: int, kv_len: int, size: tuple[int, int]) -> int:
    return -(-q_len // size[0]) * -(-kv_len // size[1])
