"""Forward kernel of the Triton back end: one program per batch row, head and block of queries."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from pallas_kernels import compat, tilemath
from pallas_kernels.flash import triton_scores
from pallas_kernels.flash import triton_tiles as tiles
from pallas_kernels.flash.triton_tiles import Call, Refs


def run(call: Call, x: Refs, num_warps: int, num_stages: int) -> Any:
    """Output [b, t, h, e] in the query's dtype and lse [b, h, t], float32, -inf for empty rows."""
    b = x["query"].shape[0]
    out = (
        jax.ShapeDtypeStruct((b, call.t, call.h, call.e), x["query"].dtype),
        jax.ShapeDtypeStruct((b, call.h, call.t), jnp.float32),
    )
    blocks = -(-call.t // call.block_q)

    def kernel(x: Refs, o_ref: Any, lse_ref: Any) -> None:
        _program(call, x, o_ref, lse_ref, blocks)

    return compat.triton_call(
        kernel, out, b * call.h * blocks, name="flash_forward",
        num_warps=num_warps, num_stages=num_stages, interpret=call.interpret,
    )(x)  # fmt: skip


def _program(call: Call, x: Refs, o_ref: Any, lse_ref: Any, blocks: int) -> None:
    rest, i = tiles.divmod_static(pl.program_id(0), blocks)
    i = np.int32(blocks - 1) - i  # causal rows are longest at the end: begin with those
    b, h = tiles.divmod_static(rest, call.h)
    g, _ = tiles.divmod_static(h, call.group)
    m, n = call.block_q, call.block_kv
    first = i * np.int32(m)
    q = tiles.load_rows(x["query"], b, h, first, m, call.padded_d, call.t % m != 0)
    fixed = tiles.locate(call, x, b, h, tiles.span(first, m, 0), None, None)

    def step(block: Any, carry: Any, masked: bool) -> Any:
        start = block * np.int32(n)
        ragged = masked and call.s % n != 0
        k = tiles.load_rows(x["key"], b, g, start, n, call.padded_d, ragged)
        raw = tilemath.dot(q, k, (1, 1), call.precision)
        tile = tiles.locate(call, x, b, h, fixed.rows, tiles.span(start, n, 1), fixed)
        scores, _ = triton_scores.score_stages(call, x, tile, raw)
        scores = triton_scores.hide(
            scores, triton_scores.visible(call, x, tile, masked, False), -math.inf
        )
        drop = triton_scores.dropout(call, x, tile)
        v = tiles.load_rows(x["value"], b, g, start, n, call.padded_e, ragged)
        return _update(call, x, carry, scores, v, drop, masked)

    maximum, total, acc = tiles.walk(call, x, b, h, i, step, _begin(call, x, h))
    empty = total == 0.0
    safe = jnp.where(empty, jnp.ones_like(total), total)
    lse = maximum * (1.0 / triton_scores.LOG2E) + jnp.log(safe)
    lse = jnp.where(empty, jnp.full_like(lse, -math.inf), lse)
    tiles.store_rows(o_ref, b, h, first, acc / safe[:, None])
    tiles.store_column(lse_ref, b, h, first, lse)


def _begin(call: Call, x: Refs, h: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(maximum, total, accumulator) before any key; a sink is one more key with value 0."""
    m = call.block_q
    acc = jnp.zeros((m, call.padded_e), jnp.float32)
    if x["sinks"] is None:
        return jnp.full((m,), -math.inf, jnp.float32), jnp.zeros((m,), jnp.float32), acc
    sink = x["sinks"][h].astype(jnp.float32) * triton_scores.LOG2E
    return jnp.full((m,), sink), jnp.ones((m,), jnp.float32), acc


def _update(
    call: Call, x: Refs, carry: Any, scores: jax.Array, v: jax.Array, drop: Any, masked: bool
) -> Any:
    """Online softmax in powers of two; the maximum is kept in the exponent's units."""
    old, total, acc = carry
    new = jnp.maximum(old, scores.max(axis=1) * triton_scores.exponent_factor(call, x))
    shift = new
    if masked:  # rows that have seen no key yet subtract 0, so that 2^-inf = 0 and not nan
        shift = jnp.where(new == -math.inf, jnp.zeros_like(new), new)
    p = triton_scores.exponentials(call, x, scores, shift[:, None])
    alpha = jnp.exp2(old - shift)
    weights = p if drop is None else p * drop
    pv = tilemath.dot(weights.astype(v.dtype), v, (1, 0), call.precision)
    return new, total * alpha + p.sum(axis=1), acc * alpha[:, None] + pv
