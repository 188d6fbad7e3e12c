"""What the Triton kernels read and write: tiles of operands by pointer, block lists, reads.

Kernels see every operand whole and load what they need. A tile of scores is [m, n] for m queries
and n keys; where keys are the outer loop it is held transposed, [n, m]. All functions take the
indices of a tile in a shape that broadcasts to it, so both forms share them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat

Refs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known when a kernel is traced.

    Attributes:
      spec: the call's FlashSpec.
      t, s, h, g, d, e: lengths, heads and widths of the operands.
      block_q, block_kv: tile sizes, powers of two.
      any_full, any_partial: whether the lists may hold such tiles.
      precision: of the matrix products.
      interpret: whether the kernel is interpreted.
    """

    spec: Any
    t: int
    s: int
    h: int
    g: int
    d: int
    e: int
    block_q: int
    block_kv: int
    any_full: bool
    any_partial: bool
    precision: Any
    interpret: bool = False

    @property
    def padded_d(self) -> int:
        """Width of queries and keys in registers."""
        return padded_width(self.d)

    @property
    def padded_e(self) -> int:
        """Width of values in registers."""
        return padded_width(self.e)

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.h // self.g


def padded_width(n: int) -> int:
    """The power of two, at least 16, that holds n columns: what matrix instructions take."""
    return max(16, 1 << (n - 1).bit_length())


class Tile(NamedTuple):
    """Where a tile lies.

    Attributes:
      b, h: batch row and query head.
      rows, cols: local indices of queries and keys, [m, 1] and [1, n], or transposed.
      q: absolute indices of the queries, in the shape of rows; keys are absolute already.
      values: of the score reads, None where they are read later.
      mask_values: of the mask reads, likewise.
    """

    b: Any
    h: Any
    rows: Any
    cols: Any
    q: Any
    values: tuple[Any, ...]
    mask_values: tuple[Any, ...]


def divmod_static(x: Any, n: int) -> tuple[Any, Any]:
    """(x // n, x % n) for x >= 0."""
    return lax.div(x, np.int32(n)), lax.rem(x, np.int32(n))


def lead(ref: Any, b: Any, h: Any) -> tuple[Any, Any]:
    """Indices into the two leading axes of an array whose axes may be shared (size 1)."""
    return (b if ref.shape[0] > 1 else 0), (h if ref.shape[1] > 1 else 0)


def span(start: Any, n: int, axis: int) -> jax.Array:
    """Indices start .. start + n - 1 along an axis of a 2-d tile."""
    shape = (n, 1) if axis == 0 else (1, n)
    return lax.broadcasted_iota(jnp.int32, shape, axis) + start


def take(ref: Any, index: tuple[Any, ...], mask: Any = None) -> jax.Array:
    """Elements at an index of scalars, slices or tiles; 0 where the mask is False."""
    if mask is None:
        return compat.triton().load(ref.at[index])
    other = False if ref.dtype == jnp.bool_ else 0 if ref.dtype == jnp.int32 else 0.0
    return compat.triton().load(ref.at[index], mask=mask, other=other)


def _bounds(start: Any, rows: int, limit: int | None, width: int, padded: int) -> Any:
    inside = None
    if limit is not None:
        inside = span(start, rows, 0) < limit
    if padded != width:
        columns = span(0, padded, 1) < width
        inside = columns if inside is None else inside & columns
    return None if inside is None else jnp.broadcast_to(inside, (rows, padded))


def load_rows(
    ref: Any, b: Any, head: Any, start: Any, rows: int, padded: int, ragged: bool
) -> jax.Array:
    """Rows start .. start + rows - 1 of [b, length, heads, width], as [rows, padded].

    Args:
      ref: the operand.
      b, head, start: scalars.
      rows, padded: size of the tile.
      ragged: whether the rows may reach beyond the length; those are 0, as are columns beyond the
        width.
    """
    _, length, _, width = ref.shape
    mask = _bounds(start, rows, length if ragged else None, width, padded)
    return take(ref, (b, pl.ds(start, rows), head, pl.ds(0, padded)), mask)


def store_rows(ref: Any, b: Any, head: Any, start: Any, tile: jax.Array) -> None:
    """Writes what of a tile lies inside [b, length, heads, width]."""
    rows, padded = tile.shape
    _, length, _, width = ref.shape
    mask = _bounds(start, rows, length if length % rows else None, width, padded)
    place = ref.at[b, pl.ds(start, rows), head, pl.ds(0, padded)]
    compat.triton().store(place, tile.astype(ref.dtype), mask=mask)


def load_column(ref: Any, b: Any, h: Any, start: Any, n: int, other: float = 0.0) -> jax.Array:
    """Entries start .. start + n - 1 of [b, h, length], [n]; `other` beyond the end."""
    length = ref.shape[2]
    place = ref.at[b, h, pl.ds(start, n)]
    if length % n == 0:
        return compat.triton().load(place)
    inside = lax.broadcasted_iota(jnp.int32, (n,), 0) + start < length
    return compat.triton().load(place, mask=inside, other=other)


def store_column(ref: Any, b: Any, h: Any, start: Any, column: jax.Array) -> None:
    """Writes what of [n] lies inside [b, h, length]."""
    (n,), length = column.shape, ref.shape[2]
    mask = None
    if length % n:
        mask = lax.broadcasted_iota(jnp.int32, (n,), 0) + start < length
    place = ref.at[b, h, pl.ds(start, n)]
    compat.triton().store(place, column.astype(ref.dtype), mask=mask)


def query_offset(call: Call, x: Refs, b: Any) -> Any:
    """Absolute index of the first query of a batch row."""
    if call.spec.q_offset is not None:
        return np.int32(call.spec.q_offset)
    ref = x["q_offset"]
    return ref[b if ref.shape[0] > 1 else 0]


def ragged_q(call: Call) -> bool:
    """Whether the last block of queries is not whole."""
    return call.t % call.block_q != 0


def ragged_kv(call: Call) -> bool:
    """Whether the last block of keys is not whole."""
    return call.s % call.block_kv != 0


def read_values(
    call: Call, program: Any, refs: Any, tile: Tile, kinds: tuple[str, ...]
) -> tuple[Any, ...]:
    """Values of the reads of the given kinds on a tile, None for the others."""

    def value(kind: str, ref: Any) -> Any:
        if kind not in kinds:
            return None
        at = lead(ref, tile.b, tile.h)
        if kind == "scalar":
            return ref[at]
        if kind == "query":
            return take(ref, (*at, tile.rows), tile.rows < call.t if ragged_q(call) else None)
        if kind == "key":
            return take(ref, (*at, tile.cols), tile.cols < call.s if ragged_kv(call) else None)
        entry = tile.rows - tile.cols + np.int32(call.s - 1)
        # beyond either end there is no entry, and the tile has no score there either
        inside = (entry >= 0) & (entry < ref.shape[2])
        return take(ref, (*at, entry), inside)

    if program is None:
        return ()
    return tuple(value(k, r) for k, r in zip(program.kinds, refs, strict=True))


def locate(call: Call, x: Refs, b: Any, h: Any, rows: Any, cols: Any, fixed: Tile | None) -> Tile:
    """The tile of given local indices, with its reads.

    Args:
      call, x: the call and its operands.
      b, h: batch row and head.
      rows, cols: local indices in tile form; None for the axis that the inner loop walks.
      fixed: the tile of the outer loop, whose reads are taken over.
    """
    q = None if rows is None else rows + query_offset(call, x, b)
    tile = Tile(b, h, rows, cols, q, (), ())
    if fixed is None:
        kinds = ("scalar",) + (("query",) if cols is None else ("key",))
    else:
        kinds = ("offset",) + (("key",) if fixed.cols is None else ("query",))

    def values(program: Any, refs: Any, old: tuple[Any, ...]) -> tuple[Any, ...]:
        new = read_values(call, program, refs, tile, kinds)
        if fixed is None:
            return new
        return tuple(a if a is not None else b for a, b in zip(old, new, strict=True))

    old = fixed or tile
    return tile._replace(
        values=values(call.spec.score_mod, x["score_reads"], old.values),
        mask_values=values(call.spec.predicate, x["mask_reads"], old.mask_values),
    )


def walk(
    call: Call,
    x: Refs,
    b: Any,
    h: Any,
    row: Any,
    step: Callable[[Any, Any, bool], Any],
    carry: Any,
) -> Any:
    """`carry = step(block, carry, masked)` over the blocks of a row: FULL ones, then PARTIAL."""
    for kind, present in (("full", call.any_full), ("partial", call.any_partial)):
        if not present:
            continue
        count, cols = x[f"{kind}_count"], x[f"{kind}_cols"]
        at = (*lead(count, b, h), row)
        masked = kind == "partial"

        def body(j: Any, carry: Any, cols: Any = cols, at: Any = at, masked: bool = masked) -> Any:
            return step(cols[(*at, j)], carry, masked)

        carry = lax.fori_loop(np.int32(0), count[at], body, carry)
    return carry
