"""Forward kernel: online softmax over the listed tiles, in base 2.

    m' = max(m, max_k z),  l' = l 2^(m - m') + Σ_k 2^(z - m'),  acc' = acc 2^(m - m') + 2^(z - m') v

Running maximum and sum are kept with 128 equal (m) or partial (l) lanes, so that a tile needs one
reduction across lanes, for m. The products q·k of the next part are issued before the softmax of
the current one, so that the matrix unit has work meanwhile.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import tpu_scores, tpu_sources
from pallas_kernels.flash.tpu_plan import (
    LANES,
    LN2,
    LOG2E,
    LOWEST,
    Array,
    Grid,
    Place,
    by_head,
    by_token,
    float32,
    lane_sums,
    spread,
)
from pallas_kernels.flash.tpu_scores import Part


def forward(operands: dict[str, Any], grid: Grid, cost: Any) -> tuple[Array, Array]:
    """(o [b, t, h, e], lse [b, t, h]) of a plan whose scores are not transposed."""
    p = grid.plan
    sources = tpu_scores.used_sources(operands, grid)
    q_block = grid.block((1, 1, p.block_q, p.d), lambda at: (at.b, at.h, at.q_block, 0))
    k_block = grid.block((1, 1, p.block_kv, p.d), lambda at: (at.b, at.g, at.k_block, 0))
    v_block = grid.block((1, 1, p.block_kv, p.e), lambda at: (at.b, at.g, at.k_block, 0))
    o_block = grid.block((1, 1, p.block_q, p.e), lambda at: (at.b, at.h, at.q_block, 0))
    lse_block = grid.block((1, 1, 1, p.block_q), lambda at: (at.b, at.h, 0, at.q_block))
    inputs = tpu_scores.common_inputs(operands, sources, grid) | {
        "q": (by_head(operands["query"], p.t_pad, p.d, p.dtype), q_block),
        "k": (by_head(operands["key"], p.s_pad, p.d, p.dtype), k_block),
        "v": (by_head(operands["value"], p.s_pad, p.e, p.dtype), v_block),
    }
    if operands["sinks"] is not None:
        sinks = operands["sinks"].astype(jnp.float32) * LOG2E
        inputs["sinks"] = sinks, pl.BlockSpec(memory_space=pltpu.SMEM)
    outputs = {
        "o": (jax.ShapeDtypeStruct((p.b, p.h, p.t_pad, p.e), p.dtype), o_block),
        "lse": (float32((p.b, p.h, 1, p.t_pad)), lse_block),
    }
    scratch = tpu_sources.scratch(sources, p) | {
        "m": pltpu.VMEM((p.block_q, LANES), jnp.float32),
        "l": pltpu.VMEM((p.block_q, LANES), jnp.float32),
        "acc": pltpu.VMEM((p.block_q, p.e), jnp.float32),
    }
    kernel = functools.partial(_kernel, grid=grid, sources=sources)
    out = grid.call(kernel, inputs, outputs, scratch, name="flash_forward", cost_estimate=cost)
    o = by_token(out["o"], p.t, operands["value"].shape[-1], operands["query"].dtype)
    return o, out["lse"][:, :, 0, : p.t].swapaxes(1, 2)


def _kernel(
    place: Place, offsets: Any, ins: Any, outs: Any, buffers: Any, *, grid: Grid, sources: Any
) -> None:
    plan = grid.plan

    @pl.when(place.opens)
    def _() -> None:
        _begin(place, ins, buffers)

    tpu_sources.turn_columns(sources, grid, place, ins, buffers)

    def tile(parts: list[Part], masked: bool) -> None:
        ahead = [_products(parts[0])]
        for i, part in enumerate(parts):
            if i + 1 < len(parts):
                ahead.append(_products(parts[i + 1]))
            z, _ = part.logits(ahead.pop(0), masked)
            _update(part, z)

    tpu_scores.over_parts(grid, sources, place, offsets, ins, buffers, tile)

    @pl.when(place.closes)
    def _() -> None:
        _finish(outs, buffers, plan.e)


def _begin(place: Place, ins: Any, buffers: Any) -> None:
    """A sink is one more key with value 0: m = sink, l = 1; l is spread over the lanes."""
    m, total = jnp.float32(LOWEST), jnp.float32(0.0)
    if "sinks" in ins:
        # on vectors: the scalar unit has no exp2
        sink = jnp.full(buffers["m"].shape, ins["sinks"][place.h], jnp.float32)
        start = jnp.maximum(sink, m)
        buffers["m"][...] = start
        buffers["l"][...] = jnp.exp2(sink - start) * (1.0 / LANES)
    else:
        buffers["m"][...] = jnp.full(buffers["m"].shape, m, jnp.float32)
        buffers["l"][...] = jnp.full(buffers["l"].shape, total, jnp.float32)
    buffers["acc"][...] = jnp.zeros(buffers["acc"].shape, jnp.float32)


def _products(part: Part) -> Array:
    """q·k of a part, [queries, keys]."""
    p, (r, c) = part.plan, part.start
    return p.dot(
        part.ins["q"][0, 0, r : r + p.sub_q], part.ins["k"][0, 0, c : c + p.sub_kv], (1, 1)
    )


def _update(part: Part, z: Array) -> None:
    p, (r, c), buffers = part.plan, part.start, part.buffers
    rows = slice(r, r + p.sub_q)
    m = buffers["m"][rows, :]
    m_new = jnp.maximum(m, jnp.max(z, axis=1, keepdims=True))
    weights = jnp.exp2(z - spread(m_new, p.sub_kv))
    decay = jnp.exp2(m - m_new)
    buffers["m"][rows, :] = m_new
    buffers["l"][rows, :] = buffers["l"][rows, :] * decay + lane_sums(weights)
    kept = part.kept()
    if kept is not None:
        weights = weights * kept
    v = part.ins["v"][0, 0, c : c + p.sub_kv]
    added = p.dot(weights.astype(p.dtype), v, (1, 0))
    buffers["acc"][rows, :] = added + buffers["acc"][rows, :] * spread(decay, p.e)


def _finish(outs: Any, buffers: Any, width: int) -> None:
    total = jnp.sum(buffers["l"][...], axis=1, keepdims=True)
    total = jnp.broadcast_to(total, buffers["l"].shape)
    empty = total == 0.0
    inverse = jnp.where(empty, 0.0, 1.0 / jnp.where(empty, 1.0, total))
    outs["o"][0, 0] = (buffers["acc"][...] * spread(inverse, width)).astype(outs["o"].dtype)
    lse = buffers["m"][...] * LN2 + jnp.log(jnp.where(empty, 1.0, total))
    lse = jnp.where(empty, -jnp.inf, lse)
    outs["lse"][0, 0] = lse.T[:1]
