"""Backward kernels of the Triton back end: gradients of queries, then of keys and values.

    p = e^{s - lse},  ds = p (do·v - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T do

Each program owns what it writes, so results do not change from run to run. Sums over keys (of row
vectors that the scores looked up, and of a bias without key axis) leave the first kernel as [b, h,
t], sums over queries the second as [b, h, s]; XLA reduces them further.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, tilemath
from pallas_kernels.flash import triton_scores
from pallas_kernels.flash import triton_tiles as tiles
from pallas_kernels.flash.triton_tiles import Call, Refs, Tile


def read_sums(call: Call, kinds: tuple[str, ...]) -> list[int]:
    """Places of the float score reads of the given kinds."""
    program = call.spec.score_mod
    if program is None:
        return []
    pairs = enumerate(zip(program.kinds, program.is_float, strict=True))
    return [i for i, (kind, floating) in pairs if floating and kind in kinds]


def bias_axis(bias: Any) -> str | None:
    """Where the gradient of a bias is summed: "rows" [t], "cols" [s], or "pairs" [t, s]."""
    if bias is None:
        return None
    return "rows" if bias.shape[3] == 1 else "cols" if bias.shape[2] == 1 else "pairs"


def run_queries(call: Call, x: Refs, num_warps: int, num_stages: int) -> Any:
    """(dq, [sums over keys [b, h, t]]): of the bias if it has no key axis, then of the reads."""
    b = x["query"].shape[0]
    reads = read_sums(call, ("scalar", "query"))
    sums = len(reads) + (bias_axis(x["bias"]) == "rows")
    out = (
        jax.ShapeDtypeStruct(x["query"].shape, x["query"].dtype),
        [jax.ShapeDtypeStruct((b, call.h, call.t), jnp.float32)] * sums,
    )
    blocks = -(-call.t // call.block_q)

    def kernel(x: Refs, dq_ref: Any, sum_refs: Any) -> None:
        _queries(call, x, dq_ref, sum_refs, reads, blocks)

    return compat.triton_call(
        kernel, out, b * call.h * blocks, name="flash_dq",
        num_warps=num_warps, num_stages=num_stages, interpret=call.interpret,
    )(x)  # fmt: skip


def run_keys(call: Call, x: Refs, num_warps: int, num_stages: int) -> Any:
    """(dk, dv, [sums over queries [b, h, s]]): of a bias without query axis, then of the reads.

    The lists are transposed: rows are blocks of keys.
    """
    b = x["query"].shape[0]
    reads = read_sums(call, ("key",))
    sums = len(reads) + (bias_axis(x["bias"]) == "cols")
    out = (
        jax.ShapeDtypeStruct(x["key"].shape, x["key"].dtype),
        jax.ShapeDtypeStruct(x["value"].shape, x["value"].dtype),
        [jax.ShapeDtypeStruct((b, call.h, call.s), jnp.float32)] * sums,
    )
    blocks = -(-call.s // call.block_kv)

    def kernel(x: Refs, dk_ref: Any, dv_ref: Any, sum_refs: Any) -> None:
        _keys(call, x, dk_ref, dv_ref, sum_refs, reads, blocks)

    return compat.triton_call(
        kernel, out, b * call.g * blocks, name="flash_dkv",
        num_warps=num_warps, num_stages=num_stages, interpret=call.interpret,
    )(x)  # fmt: skip


def tile_gradients(
    call: Call,
    x: Refs,
    tile: Tile,
    raw: jax.Array,
    dp: jax.Array,
    statistics: tuple[jax.Array, jax.Array],
    masked: bool,
    guard_rows: bool,
) -> tuple[jax.Array, jax.Array, list[Any]]:
    """Gradients of one tile.

    Args:
      call, x, tile: the tile and its operands.
      raw, dp: products q·k and do·v.
      statistics: (lse in powers of two, delta), in the shape of tile.rows.
      masked: whether the tile is PARTIAL.
      guard_rows: whether rows beyond the last query must not count.

    Returns:
      (weights p, dropped out; dL/d (scale q·k + bias); [dL/d value of each score read or None]).
    """
    lse, delta = statistics
    keep = triton_scores.visible(call, x, tile, masked, guard_rows)
    scores, capped = triton_scores.score_stages(call, x, tile, raw)
    p = triton_scores.exponentials(call, x, triton_scores.hide(scores, keep, -math.inf), lse)
    drop = triton_scores.dropout(call, x, tile)
    weights = p if drop is None else p * drop
    ds = weights * dp - p * delta if drop is not None else p * (dp - delta)
    ds, values = triton_scores.score_gradient(call, tile, capped, ds, keep)
    return weights, ds, values


def statistics(x: Refs, b: Any, h: Any, start: Any, n: int, axis: int) -> tuple[Any, Any]:
    """(lse in powers of two, delta) of n queries as a tile; lse is +inf for rows without keys."""
    lse = tiles.load_column(x["lse"], b, h, start, n, math.inf) * triton_scores.LOG2E
    lse = jnp.where(lse == -math.inf, jnp.full_like(lse, math.inf), lse)
    delta = tiles.load_column(x["delta"], b, h, start, n)
    return jnp.expand_dims(lse, axis), jnp.expand_dims(delta, axis)


def _queries(
    call: Call, x: Refs, dq_ref: Any, sum_refs: Any, reads: list[int], blocks: int
) -> None:
    rest, i = tiles.divmod_static(pl.program_id(0), blocks)
    i = np.int32(blocks - 1) - i  # causal rows are longest at the end: begin with those
    b, h = tiles.divmod_static(rest, call.h)
    g, _ = tiles.divmod_static(h, call.group)
    m, n = call.block_q, call.block_kv
    first, ragged_q = i * np.int32(m), call.t % m != 0
    q = tiles.load_rows(x["query"], b, h, first, m, call.padded_d, ragged_q)
    do = tiles.load_rows(x["d_out"], b, h, first, m, call.padded_e, ragged_q)
    fixed = tiles.locate(call, x, b, h, tiles.span(first, m, 0), None, None)
    stats = statistics(x, b, h, first, m, 1)
    with_bias = bias_axis(x["bias"]) == "rows"

    def step(block: Any, carry: Any, masked: bool) -> Any:
        dq, sums = carry
        start, ragged = block * np.int32(n), masked and call.s % n != 0
        k = tiles.load_rows(x["key"], b, g, start, n, call.padded_d, ragged)
        raw = tilemath.dot(q, k, (1, 1), call.precision)
        v = tiles.load_rows(x["value"], b, g, start, n, call.padded_e, ragged)
        dp = tilemath.dot(do, v, (1, 1), call.precision)
        tile = tiles.locate(call, x, b, h, fixed.rows, tiles.span(start, n, 1), fixed)
        _, ds, values = tile_gradients(call, x, tile, raw, dp, stats, masked, False)
        parts = ([ds] if with_bias else []) + [values[r] for r in reads]
        sums = [old + part.sum(axis=1) for old, part in zip(sums, parts, strict=True)]
        return dq + tilemath.dot(ds.astype(k.dtype), k, (1, 0), call.precision), sums

    begin = (
        jnp.zeros((m, call.padded_d), jnp.float32),
        [jnp.zeros((m,), jnp.float32) for _ in sum_refs],
    )
    dq, sums = tiles.walk(call, x, b, h, i, step, begin)
    tiles.store_rows(dq_ref, b, h, first, dq * call.spec.scale)
    for ref, total in zip(sum_refs, sums, strict=True):
        tiles.store_column(ref, b, h, first, total)


def _keys(
    call: Call, x: Refs, dk_ref: Any, dv_ref: Any, sum_refs: Any, reads: list[int], blocks: int
) -> None:
    rest, j = tiles.divmod_static(pl.program_id(0), blocks)
    b, g = tiles.divmod_static(rest, call.g)
    m, n = call.block_q, call.block_kv
    first, ragged_kv, ragged_q = j * np.int32(n), call.s % n != 0, call.t % m != 0
    k = tiles.load_rows(x["key"], b, g, first, n, call.padded_d, ragged_kv)
    v = tiles.load_rows(x["value"], b, g, first, n, call.padded_e, ragged_kv)
    with_bias = bias_axis(x["bias"]) == "cols"

    def head(r: Any, carry: Any) -> Any:
        h = g * np.int32(call.group) + r
        fixed = tiles.locate(call, x, b, h, None, tiles.span(first, n, 0), None)

        def step(block: Any, carry: Any, masked: bool) -> Any:
            dk, dv, sums = carry
            start = block * np.int32(m)
            q = tiles.load_rows(x["query"], b, h, start, m, call.padded_d, ragged_q)
            raw = tilemath.dot(k, q, (1, 1), call.precision)
            do = tiles.load_rows(x["d_out"], b, h, start, m, call.padded_e, ragged_q)
            dp = tilemath.dot(v, do, (1, 1), call.precision)
            stats = statistics(x, b, h, start, m, 0)
            tile = tiles.locate(call, x, b, h, tiles.span(start, m, 1), fixed.cols, fixed)
            p, ds, values = tile_gradients(call, x, tile, raw, dp, stats, masked, True)
            parts = ([ds] if with_bias else []) + [values[r] for r in reads]
            sums = [old + part.sum(axis=1) for old, part in zip(sums, parts, strict=True)]
            dv = dv + tilemath.dot(p.astype(do.dtype), do, (1, 0), call.precision)
            return dk + tilemath.dot(ds.astype(q.dtype), q, (1, 0), call.precision), dv, sums

        empty = [jnp.zeros((n,), jnp.float32) for _ in sum_refs]
        dk, dv, sums = tiles.walk(call, x, b, h, j, step, (*carry, empty))
        for ref, total in zip(sum_refs, sums, strict=True):
            tiles.store_column(ref, b, h, first, total)
        return dk, dv

    begin = (
        jnp.zeros((n, call.padded_d), jnp.float32),
        jnp.zeros((n, call.padded_e), jnp.float32),
    )
    if call.group == 1:
        dk, dv = head(np.int32(0), begin)
    else:
        dk, dv = lax.fori_loop(np.int32(0), np.int32(call.group), head, begin)
    tiles.store_rows(dk_ref, b, g, first, dk * call.spec.scale)
    tiles.store_rows(dv_ref, b, g, first, dv)
