"""Gradients that live on pairs (query, key): of a bias with both axes, and of offset tables.

Many rows and heads may share such an array. Each program therefore owns one tile of the gradient,
recomputes the scores of every row and head that shares it, and writes the sum once: no atomics.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, tilemath
from pallas_kernels.flash import triton_tiles as tiles
from pallas_kernels.flash.triton_backward import statistics, tile_gradients
from pallas_kernels.flash.triton_tiles import Call, Refs

CHUNK_BYTES = 1 << 28
"""Most bytes of pair gradients that exist at a time while an offset table's are summed."""


def bias_gradient(call: Call, x: Refs, classes: Any, num_warps: int, num_stages: int) -> jax.Array:
    """Gradient of a bias [b|1, h|1, t, s], float32.

    Args:
      call, x: the call and its operands.
      classes: [nb, nh, nq, nk] int8, 0 where a tile is empty.
      num_warps, num_stages: of the kernel.
    """
    return _pairs(call, x, classes, None, x["bias"].shape[:2], None, num_warps, num_stages)


def offset_gradient(
    call: Call, x: Refs, classes: Any, read: int, num_warps: int, num_stages: int
) -> jax.Array:
    """Gradient of score read `read`, an offset table [b|1, h|1, t + s - 1], float32.

    The gradients of pairs are made for a chunk of query blocks at a time and summed along their
    diagonals.
    """
    shared = x["score_reads"][read].shape[:2]
    m, blocks = call.block_q, -(-call.t // call.block_q)
    row_bytes = 4 * shared[0] * shared[1] * call.s * m
    chunk = max(1, min(blocks, CHUNK_BYTES // row_bytes))
    steps = -(-blocks // chunk)
    rows = chunk * m

    def add(total: jax.Array, step: Any) -> tuple[jax.Array, None]:
        part = (jnp.reshape(step * chunk, (1,)), chunk)
        ds = _pairs(call, x, classes, read, shared, part, num_warps, num_stages)
        diagonals = _diagonal_sums(ds)
        start = (0, 0, step * rows)
        old = lax.dynamic_slice(total, start, diagonals.shape)
        return lax.dynamic_update_slice(total, old + diagonals, start), None

    total = jnp.zeros((*shared, steps * rows + call.s - 1), jnp.float32)
    if steps == 1:
        total, _ = add(total, np.int32(0))
    else:
        total, _ = lax.scan(add, total, jnp.arange(steps, dtype=jnp.int32))
    return total[..., : call.t + call.s - 1]


def _diagonal_sums(x: jax.Array) -> jax.Array:
    """Sums of [b, h, rows, s] over row - column = const, [b, h, rows + s - 1], from 1 - s on."""
    b, h, rows, s = x.shape
    # one zero column more than the result has shifts every row by one against the row before
    skewed = jnp.pad(x[..., ::-1], ((0, 0), (0, 0), (0, 0), (0, rows))).reshape(b, h, -1)
    return skewed[..., : rows * (s + rows - 1)].reshape(b, h, rows, -1).sum(axis=2)


def _pairs(
    call: Call,
    x: Refs,
    classes: Any,
    read: int | None,
    shared: tuple[int, int],
    part: tuple[Any, int] | None,
    num_warps: int,
    num_stages: int,
) -> jax.Array:
    """Pair gradients [b|1, h|1, rows, s]: of the scores before softcap (read None), or of a read.

    Args:
      call, x, classes: as above.
      read: place of the score read, or None.
      shared: the two leading sizes; an axis of size 1 is summed over.
      part: ([1] first query block, number of query blocks), None for all of them.
      num_warps, num_stages: of the kernel.
    """
    first, count = part or (None, -(-call.t // call.block_q))
    rows = call.t if part is None else count * call.block_q
    out = jax.ShapeDtypeStruct((*shared, rows, call.s), jnp.float32)
    columns = -(-call.s // call.block_kv)

    def kernel(x: Refs, classes: Any, first: Any, out_ref: Any) -> None:
        _program(call, x, classes, first, read, out_ref, (count, columns))

    return compat.triton_call(
        kernel, out, shared[0] * shared[1] * count * columns, name="flash_pairs",
        num_warps=num_warps, num_stages=num_stages, interpret=call.interpret,
    )(x, classes, first)  # fmt: skip


def _program(
    call: Call, x: Refs, classes: Any, first: Any, read: int | None, out_ref: Any, grid: Any
) -> None:
    rest, j = tiles.divmod_static(pl.program_id(0), grid[1])
    rest, local = tiles.divmod_static(rest, grid[0])
    i = local if first is None else local + first[0]
    row, head = tiles.divmod_static(rest, out_ref.shape[1])
    m, n = call.block_q, call.block_kv
    b_sum = x["query"].shape[0] if out_ref.shape[0] == 1 else 1
    h_sum = call.h if out_ref.shape[1] == 1 else 1

    def member(r: Any, total: jax.Array) -> jax.Array:
        db, dh = tiles.divmod_static(r, h_sum)
        b, h = row + db, head + dh
        inside = i < np.int32(classes.shape[2])
        block = jnp.minimum(i, np.int32(classes.shape[2] - 1))
        listed = (classes[(*tiles.lead(classes, b, h), block, j)] > 0) & inside
        return lax.cond(
            listed, lambda total: total + _tile(call, x, b, h, i, j, read), lambda t: t, total
        )

    total = lax.fori_loop(
        np.int32(0), np.int32(b_sum * h_sum), member, jnp.zeros((m, n), jnp.float32)
    )
    rows, cols = tiles.span(local * np.int32(m), m, 0), tiles.span(j * np.int32(n), n, 1)
    mask = jnp.broadcast_to((rows < out_ref.shape[2]) & (cols < call.s), (m, n))
    place = out_ref.at[row, head, pl.ds(local * np.int32(m), m), pl.ds(j * np.int32(n), n)]
    compat.triton().store(place, total, mask=mask)


def _tile(call: Call, x: Refs, b: Any, h: Any, i: Any, j: Any, read: int | None) -> jax.Array:
    """Gradient of one tile of one row and head; 0 beyond the last query and key."""
    m, n = call.block_q, call.block_kv
    g, _ = tiles.divmod_static(h, call.group)
    top, left = i * np.int32(m), j * np.int32(n)
    ragged_q, ragged_kv = call.t % m != 0, call.s % n != 0
    q = tiles.load_rows(x["query"], b, h, top, m, call.padded_d, ragged_q)
    k = tiles.load_rows(x["key"], b, g, left, n, call.padded_d, ragged_kv)
    do = tiles.load_rows(x["d_out"], b, h, top, m, call.padded_e, ragged_q)
    v = tiles.load_rows(x["value"], b, g, left, n, call.padded_e, ragged_kv)
    raw = tilemath.dot(q, k, (1, 1), call.precision)
    dp = tilemath.dot(do, v, (1, 1), call.precision)
    rows, cols = tiles.span(top, m, 0), tiles.span(left, n, 1)
    fixed = tiles.locate(call, x, b, h, rows, None, None)
    tile = tiles.locate(call, x, b, h, rows, cols, fixed)
    stats = statistics(x, b, h, top, m, 1)
    _, ds, values = tile_gradients(call, x, tile, raw, dp, stats, True, True)
    return ds if read is None else values[read]
