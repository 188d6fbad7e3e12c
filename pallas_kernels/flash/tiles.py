"""Reading, masking and scoring one tile in the XLA body.

In the forward direction a tile of scores is [queries, keys]; the backward direction holds it
transposed, [keys, queries], so that the gradients of keys and values are plain products
(`transposed=True`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tilemath
from pallas_kernels.flash.blocks import Steps
from pallas_kernels.flash.lanes import Cut, Member
from pallas_kernels.modtrace import TileProgram, pair_values


def read(x: jax.Array, start: tuple[Any, ...], sizes: tuple[int, ...]) -> jax.Array:
    """`lax.dynamic_slice` with indices of any integer type."""
    return lax.dynamic_slice(x, [jnp.asarray(n, jnp.int32) for n in start], sizes)


def write(x: jax.Array, update: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    """`lax.dynamic_update_slice` with indices of any integer type."""
    return lax.dynamic_update_slice(x, update, [jnp.asarray(n, jnp.int32) for n in start])


def block_at(x: jax.Array, place: Any, i: Any) -> jax.Array:
    """Block i of a member: [block, d] of [members, blocks, block, d]."""
    return read(x, (place, i, 0, 0), (1, 1, *x.shape[2:]))[0, 0]


def keys_at(x: jax.Array, place: Any, start: Any, span: int) -> jax.Array:
    """Keys start .. start + span - 1 of a member: [span, d] of [members, s, d]."""
    return read(x, (place, start, 0), (1, span, x.shape[2]))[0]


def add_keys(x: jax.Array, place: Any, start: Any, update: jax.Array) -> jax.Array:
    """Adds [span, d] where `keys_at` read."""
    old = keys_at(x, place, start, update.shape[0])
    return write(x, (old + update)[None], (place, start, 0))


def walk(
    cut: Cut,
    steps: Steps,
    member: Member,
    i: Any,
    step: Callable[[Any, Any, bool], Any],
    carry: Any,
) -> Any:
    """`carry = step(carry, start, masked)` over the first keys of the listed blocks of row i.

    The FULL blocks come first, with masked=False; then the PARTIAL ones.
    """
    rows, heads = cut.total.shape[:2]
    at = (member.b if rows > 1 else 0, member.h if heads > 1 else 0, i)
    starts, full, total = cut.starts[at], cut.full[at], cut.total[at]
    first = jnp.int32(0)
    if steps.any_full:
        carry = lax.fori_loop(first, full, lambda j, c: step(c, starts[j], False), carry)
        first = full
    if steps.any_partial:
        carry = lax.fori_loop(first, total, lambda j, c: step(c, starts[j], True), carry)
    return carry


def indices(
    cut: Cut, steps: Steps, member: Member, i: Any, start: Any, transposed: bool
) -> tuple[jax.Array, jax.Array]:
    """Absolute indices of queries and keys, [m, 1] and [1, n], or [1, m] and [n, 1] transposed."""
    offset = cut.rest["q_offset"]
    offset = offset[member.b] if offset.shape[0] > 1 else offset[0]
    q = jnp.arange(steps.block_q, dtype=jnp.int32) + (i * steps.block_q + offset)
    k = jnp.arange(steps.span, dtype=jnp.int32) + start
    if transposed:
        return q.reshape(1, -1), k.reshape(-1, 1)
    return q.reshape(-1, 1), k.reshape(1, -1)


def visible(
    cut: Cut, steps: Steps, member: Member, i: Any, start: Any, kv_len: int, transposed: bool
) -> jax.Array:
    """Booleans of a tile that needs its mask."""
    q, k = indices(cut, steps, member, i, start, transposed)
    keep = k < kv_len
    program = steps.spec.predicate
    if program is not None:
        values = read_values(
            program, cut.rest["mask_reads"], cut, steps, member, i, start, transposed
        )
        keep = keep & program(None, member.b, member.h, q, k, values)
    if cut.rest["mask_array"] is not None:
        keep = keep & _array_tile(cut.rest["mask_array"], steps, member, i, start, transposed)
    return keep


def mask_is_shared(cut: Cut, steps: Steps) -> bool:
    """Whether one mask tile serves every lane of a step."""
    program, array = steps.spec.predicate, cut.rest["mask_array"]
    programs = program is None or not program.varies
    arrays = array is None or array.shape[:2] == (1, 1)
    return programs and arrays and cut.rest["q_offset"].shape[0] == 1


def read_values(
    program: TileProgram,
    reads: list[Any],
    cut: Cut,
    steps: Steps,
    member: Member,
    i: Any,
    start: Any,
    transposed: bool,
) -> list[jax.Array]:
    """What the tile program looks up, for one tile: shapes as the tile program wants them."""
    values = []
    for read, array in zip(program.reads, reads, strict=True):
        if read.kind == "pair":
            q, k = indices(cut, steps, member, i, start, transposed)
            values.append(pair_values(read, array, member.b, member.h, q, k))
            continue
        place, size = _read_place(read.kind, array, cut, steps, member, i, start)
        if read.kind == "scalar":
            values.append(array[place[:2]])
            continue
        vector = lax.dynamic_slice(array, _int32(place), (1, 1, size)).reshape(-1)
        if read.kind == "offset":
            tile = toeplitz(vector, steps.block_q, steps.span)
            values.append(tile.T if transposed else tile)
        else:
            upright = (read.kind == "query") != transposed
            values.append(vector.reshape(-1, 1) if upright else vector.reshape(1, -1))
    return values


def add_read_grads(
    totals: list[Any],
    tiles: list[Any],
    program: TileProgram,
    reads: list[Any],
    cut: Cut,
    steps: Steps,
    member: Member,
    i: Any,
    start: Any,
    transposed: bool,
) -> list[Any]:
    """Adds the gradients of one tile's looked-up values, [m, n] each, to those of the arrays."""
    out = []
    for read, array, total, tile in zip(program.reads, reads, totals, tiles, strict=True):
        if tile is None:
            out.append(total)
            continue
        if read.kind == "pair":
            out.append(
                _add_pair(total, tile, read, array, cut, steps, member, i, start, transposed)
            )
            continue
        tile = (tile.T if transposed else tile).astype(total.dtype)
        place, size = _read_place(read.kind, array, cut, steps, member, i, start)
        sums = {
            "scalar": lambda x: x.sum().reshape(1, 1),
            "query": lambda x: x.sum(1).reshape(1, 1, -1),
            "key": lambda x: x.sum(0).reshape(1, 1, -1),
            "offset": lambda x: diagonal_sums(x).reshape(1, 1, -1),
        }[read.kind](tile)
        place = place[: total.ndim]
        old = lax.dynamic_slice(total, _int32(place), sums.shape)
        out.append(write(total, old + sums, place))
    return out


def toeplitz(vector: jax.Array, rows: int, columns: int) -> jax.Array:
    """Tile [rows, columns] with entry (i, j) = vector[i - j + columns - 1]."""
    width = rows + columns
    line = jnp.concatenate([vector[::-1], jnp.zeros((1,), vector.dtype)])
    lines = jnp.broadcast_to(line, (rows, width)).reshape(-1)
    # rows one shorter than the line: each one starts one entry later than the one above it
    skewed = lines[: rows * (width - 1)].reshape(rows, width - 1)
    return skewed[:, rows - 1 : rows - 1 + columns]


def diagonal_sums(tile: jax.Array) -> jax.Array:
    """Sums over the diagonals of a tile: the transpose of `toeplitz`."""
    rows, columns = tile.shape
    width = rows + columns
    padded = jnp.pad(tile, ((0, 0), (rows - 1, 0))).reshape(-1)
    skewed = jnp.pad(padded, (0, rows)).reshape(rows, width)
    return skewed.sum(0)[:-1][::-1]


def _add_pair(
    totals: list[Any], tile: Any, read: Any, tables: Any, cut: Cut, steps: Steps, member: Member,
    i: Any, start: Any, transposed: bool,
) -> list[Any]:  # fmt: skip
    q, k = indices(cut, steps, member, i, start, transposed)
    floats = [x for x, total in zip(tables, totals, strict=True) if total is not None]

    def values(floats: list[Any]) -> jax.Array:
        found = iter(floats)
        whole = [x if t is None else next(found) for x, t in zip(tables, totals, strict=True)]
        return pair_values(read, whole, member.b, member.h, q, k)

    primal, pull = jax.vjp(values, floats)
    (grads,) = pull(tile.astype(primal.dtype))
    found = iter(grads)
    return [None if t is None else t + next(found).astype(t.dtype) for t in totals]


def _read_place(
    kind: str, array: Any, cut: Cut, steps: Steps, member: Member, i: Any, start: Any
) -> tuple[tuple[Any, ...], int]:
    """(start in the padded read array, number of entries along its last axis) of a tile."""
    b, h = (n if size > 1 else 0 for n, size in zip(member[:2], array.shape[:2], strict=True))
    if kind == "scalar":
        return (b, h), 1
    if kind == "query":
        return (b, h, i * steps.block_q), steps.block_q
    if kind == "key":
        return (b, h, start), steps.span
    padded_keys = cut.k[0].shape[1]
    first = i * steps.block_q - (start + steps.span - 1) + padded_keys - 1
    return (b, h, first), steps.block_q + steps.span - 1


def _int32(place: tuple[Any, ...]) -> list[jax.Array]:
    return [jnp.asarray(n, jnp.int32) for n in place]


def raw_scores(steps: Steps, q: jax.Array, k: jax.Array, transposed: bool) -> jax.Array:
    """Products scale q·k; the scale is in q already where q has full precision."""
    pair = (k, q) if transposed else (q, k)
    scores = tilemath.dot(*pair, (1, 1), steps.spec.precision)
    return (
        scores if q.dtype == scores.dtype else scores * jnp.asarray(steps.spec.scale, scores.dtype)
    )


def bias_tile(
    cut: Cut, steps: Steps, member: Member, i: Any, start: Any, transposed: bool
) -> jax.Array | None:
    """The part of the bias that a tile needs, with axes of size 1 where it broadcasts."""
    bias = cut.rest["bias"]
    return None if bias is None else _array_tile(bias, steps, member, i, start, transposed)


class Scores:
    """What lies between the product q·k and the mask, for one tile."""

    def __init__(
        self, cut: Cut, steps: Steps, member: Member, i: Any, start: Any, transposed: bool
    ):
        self.spec, self.member = steps.spec, member
        self.bias = bias_tile(cut, steps, member, i, start, transposed)
        self.q, self.k = indices(cut, steps, member, i, start, transposed)
        self.values: list[Any] = []
        if self.spec.score_mod is not None:
            self.values = read_values(
                self.spec.score_mod, cut.rest["score_reads"], cut, steps, member, i, start,
                transposed,
            )  # fmt: skip

    def __call__(self, raw: jax.Array) -> jax.Array:
        """The scores of raw products."""
        scores = self._capped(raw)
        if self.spec.score_mod is not None:
            at = (self.member.b, self.member.h, self.q, self.k)
            scores = self.spec.score_mod(scores, *at, self.values).astype(raw.dtype)
        return jnp.broadcast_to(scores, raw.shape)

    def grad(self, raw: jax.Array, d_scores: jax.Array) -> tuple[jax.Array, list[Any]]:
        """(gradient of the raw products and of the bias tile, gradients of the values)."""
        d_values: list[Any] = []
        if self.spec.score_mod is not None:
            at = (self.member.b, self.member.h, self.q, self.k)
            d_scores, d_values = self.spec.score_mod.grad(
                self._capped(raw), *at, self.values, d_scores
            )
        if self.spec.softcap is not None:
            d_scores = d_scores * tilemath.softcap_slope(self._biased(raw), self.spec.softcap)
        return d_scores, d_values

    def _biased(self, raw: jax.Array) -> jax.Array:
        return raw if self.bias is None else raw + self.bias.astype(raw.dtype)

    def _capped(self, raw: jax.Array) -> jax.Array:
        biased = self._biased(raw)
        return biased if self.spec.softcap is None else tilemath.softcap(biased, self.spec.softcap)


def hide(scores: jax.Array, keep: jax.Array | None) -> jax.Array:
    """-inf where a key is hidden."""
    return scores if keep is None else jnp.where(keep, scores, jnp.full_like(scores, -jnp.inf))


def dropout(
    cut: Cut, steps: Steps, member: Member, i: Any, start: Any, transposed: bool
) -> jax.Array | None:
    """Dropout factors of a tile, or None without dropout."""
    if steps.spec.dropout_rate == 0.0:
        return None
    q, k = indices(cut, steps, member, i, start, transposed)
    seed = cut.rest["seed"]
    factors = tilemath.dropout_factors(seed, member.b, member.h, q, k, steps.spec.dropout_rate)
    return factors.astype(tilemath.accumulator_dtype(cut.q[0].dtype))


def _array_tile(
    x: jax.Array, steps: Steps, member: Member, i: Any, start: Any, transposed: bool
) -> jax.Array:
    """The tile of a padded [b|1, h|1, t|1, s|1] array that a step needs."""
    place, sizes = _tile_place(x, steps, member, i, start)
    tile = read(x, place, sizes)[0, 0]
    return tile.T if transposed else tile


def add_bias_grad(
    total: jax.Array,
    tile: jax.Array,
    steps: Steps,
    member: Member,
    i: Any,
    start: Any,
    transposed: bool,
) -> jax.Array:
    """Adds a tile's gradient, summed over axes of size 1, where `_array_tile` read it."""
    tile = (tile.T if transposed else tile).astype(total.dtype)
    place, sizes = _tile_place(total, steps, member, i, start)
    for axis in (0, 1):
        if sizes[axis + 2] == 1:
            tile = tile.sum(axis, keepdims=True)
    return write(total, read(total, place, sizes) + tile[None, None], place)


def _tile_place(
    x: jax.Array, steps: Steps, member: Member, i: Any, start: Any
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """(start, sizes) of a tile in a [b|1, h|1, t|1, s|1] array."""
    b, h = (n if size > 1 else 0 for n, size in zip(member[:2], x.shape[:2], strict=True))
    row, rows = (i * steps.block_q, steps.block_q) if x.shape[2] > 1 else (0, 1)
    column, columns = (start, steps.span) if x.shape[3] > 1 else (0, 1)
    return (b, h, row, column), (1, 1, rows, columns)
