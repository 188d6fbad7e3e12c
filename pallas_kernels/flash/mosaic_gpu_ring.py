"""How the Hopper kernels move tiles: streams, rings of buffers, and the walk over a block list.

One warpgroup, the producer, walks the block list of its row of blocks and starts the copies of
every listed tile; the others, the consumers, walk the same list and compute. Between them is a
ring of `stages` slots, with two barriers per slot and group of streams:

    full     arrivals: one per copy into the slot. Opens when the tile is there.
    empty    arrivals: one per consumer. Opens when nobody reads the tile any more.

Why this neither deadlocks nor overwrites a tile in use. Step n of the walk (n = 0, 1, ... over all
heads and entries, the same numbers in every warpgroup, because all derive them from the same list)
uses slot n % stages for the (n // stages)-th time.

 - The producer fills the slot for step n only after its wait for `empty`, once per step from step
   `stages` on. Its i-th wait (i = 0, 1, ...) for a slot is for the i-th phase, which opens when
   every consumer released the slot's i-th use. So nothing is overwritten that is still read.
 - A consumer waits for `full` exactly once per step and only then reads. A barrier knows the parity
   of its phase alone, so a phase must not be overtaken: the (i+1)-th phase of `full` can only open
   after the producer saw the i-th phase of `empty`, which needs this consumer's release of use i,
   which comes after its own wait for phase i. Likewise phase i+1 of `empty` needs use i+1, which
   the producer starts after its wait for phase i. (Nobody waits for the last phases of `empty`.)
 - The first wait of the chain always ends: the producer waits for nothing in its first `stages`
   steps. Every later wait is for an event of an earlier step, so there is no cycle.
 - Every copy that was started is awaited by all consumers, since they walk the same list to its
   end; no copy is under way when the block ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.flash.mosaic_gpu_device import Barriers, Shared


class Place(NamedTuple):
    """Which tile: batch row, query head, key head, and its first row and column (local indices).

    Rows are what one block of the grid keeps, columns what it walks over: queries and keys in the
    forward pass and for dq, keys and queries for dk and dv.
    """

    b: Any
    h: Any
    g: Any
    row: Any
    column: Any


@dataclasses.dataclass(frozen=True)
class Stream:
    """One array's part of every tile.

    Attributes:
      name: of the input; its buffer is called `name + "_tile"`.
      axis: "row" or "column": which of the tile's sides it belongs to.
      length: entries of that side in one copy. Rows come in one copy per consumer.
      width: None for vectors [nb, nh, n]; else the last size of matrices [b, n, heads, width].
      head: "h" or "g": the head that the array is indexed by.
      dtype: of the array.
      per_row, per_head: whether a vector's nb and nh are larger than 1.
    """

    name: str
    axis: str
    length: int
    dtype: Any
    width: int | None = None
    head: str = "h"
    per_row: bool = True
    per_head: bool = True

    def copies(self, consumers: int) -> int:
        """Copies per tile."""
        return consumers if self.axis == "row" else 1

    def buffer(self, consumers: int, stages: int = 1) -> Shared:
        """Its shared-memory buffer."""
        shape = (stages * self.copies(consumers), self.length)
        if self.width is None:
            return Shared(shape, self.dtype)
        return Shared((*shape, self.width), self.dtype, tiled=True)

    def part(self, place: Place, copy: int) -> tuple[Any, ...]:
        """Index of one copy's source."""
        start = place.column if self.axis == "column" else place.row + jnp.int32(copy * self.length)
        side = pl.ds(start, self.length)
        head = place.h if self.head == "h" else place.g
        if self.width is not None:
            return (place.b, side, head)
        zero = jnp.int32(0)
        return (place.b if self.per_row else zero, head if self.per_head else zero, side)


Groups = Mapping[str, tuple[Stream, ...]]


def ring_scratch(groups: Groups, stages: int, consumers: int) -> dict[str, Shared | Barriers]:
    """Buffers and barriers of a ring."""
    scratch: dict[str, Shared | Barriers] = {}
    for group, streams in groups.items():
        for stream in streams:
            scratch[stream.name + "_tile"] = stream.buffer(consumers, stages)
        copies = sum(stream.copies(consumers) for stream in streams)
        scratch[group + "_full"] = Barriers(stages, copies)
        scratch[group + "_empty"] = Barriers(stages, consumers)
    return scratch


def resident_scratch(streams: tuple[Stream, ...], consumers: int) -> dict[str, Shared | Barriers]:
    """Buffers of what is fetched once, and the barrier that says it is there."""
    scratch: dict[str, Shared | Barriers] = {
        stream.name + "_tile": stream.buffer(consumers) for stream in streams
    }
    scratch["resident"] = Barriers(1, sum(stream.copies(consumers) for stream in streams))
    return scratch


def fetch_resident(
    hw: Any, refs: Any, streams: tuple[Stream, ...], place: Place, consumers: int
) -> None:
    """The producer's part for what is fetched once; consumers wait for refs["resident"]."""
    for stream in streams:
        for copy in range(stream.copies(consumers)):
            source = refs[stream.name].at[stream.part(place, copy)]
            hw.fetch(source, refs[stream.name + "_tile"].at[copy], refs["resident"].at[0])


@dataclasses.dataclass(frozen=True)
class Ring:
    """The ring of one kernel, as its producer and its consumers use it."""

    hw: Any
    refs: Any
    groups: Groups
    stages: int
    consumers: int

    def slot(self, step: Any) -> Any:
        """Slot of a step."""
        return lax.rem(step, jnp.int32(self.stages))

    def produce(self, step: Any, place: Place) -> None:
        """Fetches the tile of a step as soon as its slot is free."""
        hw, refs, slot = self.hw, self.refs, self.slot(step)
        for group, streams in self.groups.items():
            empty, full = refs[group + "_empty"], refs[group + "_full"]
            # the first use of a slot has no earlier reader to wait for
            hw.when(step >= jnp.int32(self.stages), lambda empty=empty: hw.wait(empty.at[slot]))
            for stream in streams:
                for copy in range(stream.copies(self.consumers)):
                    source = refs[stream.name].at[stream.part(place, copy)]
                    hw.fetch(source, self._buffer(stream, slot, copy), full.at[slot])

    def wait(self, group: str, step: Any) -> None:
        """A consumer's wait for the tile of a step: once per step and group."""
        self.hw.wait(self.refs[group + "_full"].at[self.slot(step)])

    def release(self, group: str, step: Any) -> None:
        """A consumer's word that it will not read the tile of a step again."""
        self.hw.arrive(self.refs[group + "_empty"].at[self.slot(step)])

    def tile(self, name: str, step: Any, warpgroup: Any) -> Any:
        """A stream's buffer for a step: the columns', or the warpgroup's own rows'."""
        stream = next(s for streams in self.groups.values() for s in streams if s.name == name)
        return self._buffer(stream, self.slot(step), warpgroup)

    def _buffer(self, stream: Stream, slot: Any, copy: Any) -> Any:
        buffer = self.refs[stream.name + "_tile"]
        copies = stream.copies(self.consumers)
        return buffer.at[slot if copies == 1 else slot * jnp.int32(copies) + copy]


class Walk(NamedTuple):
    """The list that a block of the grid walks: refs of counts and columns, and its row of them.

    Attributes:
      counts: [nb, nh, rows, 2] int32: number of FULL tiles, number of all tiles.
      columns: [nb, nh, rows, width] int32: column blocks, FULL ones first.
      b, row: of this block of the grid; b is 0 where the lists are shared by all batch rows.
      first_head, heads: the query heads to walk for; per_head: whether they have their own lists.
      block: entries of a column block.
      any_full, any_partial: False where no list has such tiles.
    """

    counts: Any
    columns: Any
    b: Any
    row: Any
    first_head: Any
    heads: int
    per_head: bool
    block: int
    any_full: bool
    any_partial: bool


def walk(
    hw: Any,
    lists: Walk,
    tile: Callable[[Any, Any, Any, bool, Any], Any],
    carry: Any,
    after_head: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """Visits every listed tile: head by head, FULL ones first, then PARTIAL ones.

    Args:
      hw: the operations.
      lists: see `Walk`.
      tile: `tile(step, head, first column, masked, carry) -> carry`.
      carry: what the tiles change; a pytree of arrays.
      after_head: `after_head(head, carry) -> carry`, after a head's last tile.
    """

    def one_head(i: Any, state: Any) -> Any:
        start, carry = state
        head = lists.first_head + i
        at = (lists.b, head if lists.per_head else jnp.int32(0), lists.row)
        full = hw.scalar(lists.counts, (*at, jnp.int32(0)))
        total = hw.scalar(lists.counts, (*at, jnp.int32(1)))

        def visit(masked: bool) -> Callable[[Any, Any], Any]:
            def body(j: Any, carry: Any) -> Any:
                column = hw.scalar(lists.columns, (*at, j)) * jnp.int32(lists.block)
                return tile(start + j, head, column, masked, carry)

            return body

        if lists.any_full:
            carry = hw.loop(jnp.int32(0), full, visit(False), carry)
        if lists.any_partial:
            carry = hw.loop(full, total, visit(True), carry)
        if after_head is not None:
            carry = after_head(head, carry)
        return start + total, carry

    state = (jnp.int32(0), carry)
    if lists.heads == 1:
        return one_head(jnp.int32(0), state)[1]
    return hw.loop(jnp.int32(0), jnp.int32(lists.heads), one_head, state)[1]
