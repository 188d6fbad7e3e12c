"""What one call of the Hopper kernels looks like: padded sizes, tile sizes, lists, lookups."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.blocklist import BlockList
from pallas_kernels.flash.mosaic_gpu_device import ROWS
from pallas_kernels.flash.mosaic_gpu_ring import Place, Ring, Walk
from pallas_kernels.flash.mosaic_gpu_scores import Scores

SHARED_MEMORY = 220 * 1024
"""Bytes of a block's 227 KiB that buffers may take; the rest is for barriers and reductions."""

PRODUCER_REGISTERS, CONSUMER_REGISTERS = 40, 232
"""Registers per thread of the producer and of each of two consumers.

A block of three warpgroups starts with 168 registers per thread, since 3 * 168 * 128 is the most
multiple-of-8 share of 65536. A consumer that asks for more waits until there are enough in the
block's own share, so the three must not add up to more than 3 * 168 = 504: 40 + 2 * 232 = 504.
"""


class Tiling(NamedTuple):
    """Tile sizes: rows of a block of the grid (64 per consumer), columns of a step, ring slots."""

    consumers: int
    columns: int
    stages: int

    @property
    def rows(self) -> int:
        """Rows of a block of the grid."""
        return self.consumers * ROWS


@dataclasses.dataclass(frozen=True)
class Call:
    """Static facts of a call that all its kernels share; sizes are the padded ones.

    Attributes:
      b, t, s, h, g, d, e: sizes; t and s are multiples of the tiles, d and e of 64.
      dtype: of queries, keys and values.
      scores: see `Scores`.
      sinks: whether there are sinks.
      lists_per_row, lists_per_head: whether the lists differ between batch rows and heads.
      any_full, any_partial: whether the lists may hold such tiles.
      offsets: None where q_offset is known, else the number of them, 1 or b.
    """

    b: int
    t: int
    s: int
    h: int
    g: int
    d: int
    e: int
    dtype: Any
    scores: Scores
    sinks: bool
    lists_per_row: bool
    lists_per_head: bool
    any_full: bool
    any_partial: bool
    offsets: int | None

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.h // self.g

    def place(self, hw: Any, tiling: Tiling) -> Place:
        """The place of a block of the grid with queries as rows."""
        h = hw.index("head")
        g = lax.div(h, jnp.int32(self.group))
        # last blocks first: under a causal mask they have the longest lists
        block = jnp.int32(self.t // tiling.rows - 1) - hw.index("block")
        return Place(hw.index("batch"), h, g, block * jnp.int32(tiling.rows), jnp.int32(0))

    def walk(self, refs: Any, place: Place, tiling: Tiling, first_head: Any, heads: int) -> Walk:
        """The list of a block of the grid."""
        return Walk(
            refs["counts"],
            refs["columns"],
            place.b if self.lists_per_row else jnp.int32(0),
            lax.div(place.row, jnp.int32(tiling.rows)),
            first_head,
            heads,
            self.lists_per_head,
            tiling.columns,
            self.any_full,
            self.any_partial,
        )

    def offset(self, hw: Any, refs: Any, place: Place) -> Any:
        """Absolute index of query 0."""
        if self.offsets is None:
            return jnp.int32(self.scores.spec.q_offset)
        return hw.scalar(refs["q_offset"], (place.b if self.offsets > 1 else jnp.int32(0),))

    def vectors(
        self, hw: Any, refs: Any, ring: Ring, step: Any, group: Any, resident: str | None
    ) -> dict[str, jax.Array]:
        """The lookups' vectors of a step; those of kind `resident` are not in the ring."""
        found = {}
        for x in self.scores.lookups:
            if x.kind not in ("query", "key"):
                continue
            axis = 0 if (x.kind == "key") == self.scores.transposed else 1
            if x.kind == resident:
                found[x.name] = hw.vector(refs[x.name + "_tile"].at[group], axis)
            else:
                found[x.name] = hw.vector(ring.tile(x.name, step, group), axis)
        return found

    def share_registers(self, hw: Any, tiling: Tiling, *, consumer: bool) -> None:
        """Moves registers from the producer to the consumers.

        With one consumer there is nothing to move: both may have 255 to begin with.
        """
        if tiling.consumers == 1:
            return
        if consumer:
            hw.registers(CONSUMER_REGISTERS, "increase")
        else:
            hw.registers(PRODUCER_REGISTERS, "decrease")


def merge_lists(lists: BlockList) -> tuple[jax.Array, jax.Array]:
    """(counts [nb, nh, rows, 2], columns [nb, nh, rows, width]): FULL entries, then PARTIAL ones.

    counts holds the number of FULL entries and of all entries; what is behind them is not read.
    """
    xp: Any = np if lists.is_static else jnp
    full, partial = lists.full_count[..., None], lists.partial_count[..., None]
    width = lists.full_cols.shape[-1] + lists.partial_cols.shape[-1]
    if xp is np:
        width = max(1, int((full + partial).max(initial=0)))
    else:  # a column is in one of the two lists at most
        width = min(width, lists.num_q_blocks if lists.transposed else lists.num_kv_blocks)
    at = xp.arange(width, dtype=xp.int32).reshape(1, 1, 1, -1)
    at_full = xp.minimum(at, lists.full_cols.shape[-1] - 1)
    at_partial = xp.clip(at - full, 0, lists.partial_cols.shape[-1] - 1)
    shape = (*full.shape[:-1], width)
    columns = xp.where(
        at < full,
        xp.take_along_axis(lists.full_cols, xp.broadcast_to(at_full, shape), axis=-1),
        xp.take_along_axis(lists.partial_cols, at_partial, axis=-1),
    )
    counts = xp.concatenate([full, full + partial], axis=-1)
    return jnp.asarray(counts, jnp.int32), jnp.asarray(columns, jnp.int32)


def choose_tiling(
    per_row: int, per_column: int, columns: int, *, most_consumers: int = 2, most_stages: int = 4
) -> Tiling | None:
    """The most consumers, then the deepest ring, that shared memory has room for; None if none.

    Args:
      per_row: bytes that a block of the grid keeps per row.
      per_column: bytes per column of one ring slot.
      columns: of a step.
      most_consumers: 1 or 2.
      most_stages: at least 2.
    """
    for consumers in range(most_consumers, 0, -1):
        for stages in range(most_stages, 1, -1):
            size = consumers * ROWS * per_row + stages * columns * per_column
            if size <= SHARED_MEMORY:
                return Tiling(consumers, columns, stages)
    return None
