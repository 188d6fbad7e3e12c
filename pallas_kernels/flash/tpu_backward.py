"""Backward kernels: scores are computed again from lse, tile by tile.

    p = 2^(z - lse),  dp = do·v,  dz = p (dp - delta),  ds = dz through score function and softcap
    dq = scale Σ_k ds k,   dk = scale Σ_q ds q,   dv = Σ_q p do

The kernel for dq walks the forward's lists and also sums the gradients of looked-up values. The one
for dk and dv walks the transposed lists with scores [keys, queries], so that both products need no
transposition; the heads of a group follow one another inside a row of tiles, so that nothing is
summed in memory. Where the queries' gradients of a group fit into vector memory, that kernel sums
dq as well, and the first one is not run: 5 products a tile instead of 7.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import tpu_scores, tpu_source_gradients, tpu_sources
from pallas_kernels.flash.tpu_plan import (
    LANES,
    LOG2E,
    Array,
    Grid,
    Place,
    by_head,
    by_lane,
    by_token,
    columns,
    spread,
)
from pallas_kernels.flash.tpu_scores import Part

Operands = dict[str, Any]


def query_gradient(operands: Operands, grid: Grid, cost: Any) -> dict[str, Array]:
    """dq, and the gradients of graded sources except tiles, by name."""
    p = grid.plan
    sources = tpu_scores.used_sources(operands, grid)
    inputs = saved_inputs(operands, grid) | tpu_scores.common_inputs(operands, sources, grid)
    block = grid.block((1, 1, p.block_q, p.d), lambda at: (at.b, at.h, at.q_block, 0))
    outputs = {"q": (jax.ShapeDtypeStruct((p.b, p.h, p.t_pad, p.d), p.dtype), block)}
    outputs |= tpu_source_gradients.outputs(sources, grid)
    scratch = {
        "dq": pltpu.VMEM((p.block_q, p.d), jnp.float32),
        "lse": pltpu.VMEM((p.block_q, LANES), jnp.float32),
        "delta": pltpu.VMEM((p.block_q, LANES), jnp.float32),
    }
    scratch |= tpu_sources.scratch(sources, p) | tpu_source_gradients.scratch(sources, p)
    kernel = functools.partial(_query_kernel, grid=grid, sources=sources)
    out = grid.call(kernel, inputs, outputs, scratch, name="flash_dq", cost_estimate=cost)
    query = operands["query"]
    found = {"query": by_token(out["q"], p.t, query.shape[-1], query.dtype)}
    for source in sources:
        if source.name in out:
            found[source.name] = tpu_source_gradients.finish(source, p, out[source.name])
    return found


def _query_kernel(
    place: Place, offsets: Any, ins: Any, outs: Any, buffers: Any, *, grid: Grid, sources: Any
) -> None:
    p = grid.plan

    @pl.when(place.opens)
    def _() -> None:
        buffers["dq"][...] = jnp.zeros(buffers["dq"].shape, jnp.float32)
        for name in ("lse", "delta"):
            buffers[name][...] = columns(ins[name][0, 0])

    tpu_sources.turn_columns(sources, grid, place, ins, buffers)
    tpu_source_gradients.clear(sources, place, outs, buffers)

    def tile(parts: list[Part], masked: bool) -> None:
        for part in parts:
            rows = slice(part.start[0], part.start[0] + p.sub_q)
            statistics = (spread(buffers[n][rows, :], p.sub_kv) for n in ("lse", "delta"))
            _, ds, grads = gradients(part, masked, *statistics)
            added = p.dot(ds.astype(p.dtype), _keys(part), (1, 0))
            buffers["dq"][rows, :] = added + buffers["dq"][rows, :]
            for source in sources:
                if source.name in grads and source.kind != "tile":
                    tpu_source_gradients.add(
                        source, p, place, outs, buffers, part.start, grads[source.name]
                    )

    tpu_scores.over_parts(grid, sources, place, offsets, ins, buffers, tile)

    @pl.when(place.closes)
    def _() -> None:
        outs["q"][0, 0] = (buffers["dq"][...] * p.spec.scale).astype(p.dtype)

    tpu_source_gradients.write(sources, place, outs, buffers)


def key_gradients(operands: Operands, grid: Grid, cost: Any, with_query: bool) -> dict[str, Array]:
    """Gradients of key, value and, if wanted, query, of a plan with transposed scores."""
    p = grid.plan
    sources = tpu_scores.used_sources(operands, grid)
    inputs = saved_inputs(operands, grid) | tpu_scores.common_inputs(operands, sources, grid)
    outputs, scratch = {}, tpu_sources.scratch(sources, p)
    for name, width in (("k", p.d), ("v", p.e)):
        block = grid.block((1, 1, p.block_kv, width), lambda at: (at.b, at.g, at.k_block, 0))
        outputs[name] = jax.ShapeDtypeStruct((p.b, p.g, p.s_pad, width), p.dtype), block
        scratch[f"d{name}"] = pltpu.VMEM((p.block_kv, width), jnp.float32)
    if with_query:
        block = grid.block((1, p.group, p.t_pad, p.d), lambda at: (at.b, at.g, 0, 0))
        outputs["q"] = jax.ShapeDtypeStruct((p.b, p.h, p.t_pad, p.d), p.dtype), block
        scratch["dq"] = pltpu.VMEM((p.group, p.d, p.t_pad), jnp.float32)
    kernel = functools.partial(_key_kernel, grid=grid, sources=sources)
    name = "flash_dqkv" if with_query else "flash_dkv"
    out = grid.call(kernel, inputs, outputs, scratch, name=name, cost_estimate=cost)
    tokens = {"query": ("q", p.t), "key": ("k", p.s), "value": ("v", p.s)}
    return {
        name: by_token(out[short], n, operands[name].shape[-1], operands[name].dtype)
        for name, (short, n) in tokens.items()
        if short in out
    }


def _key_kernel(
    place: Place, offsets: Any, ins: Any, outs: Any, buffers: Any, *, grid: Grid, sources: Any
) -> None:
    p = grid.plan

    @pl.when(place.opens)
    def _() -> None:
        for name in ("dk", "dv"):
            buffers[name][...] = jnp.zeros(buffers[name].shape, jnp.float32)

    if "dq" in buffers:
        _clear_query(grid, buffers["dq"])
    tpu_sources.turn_columns(sources, grid, place, ins, buffers)

    def tile(parts: list[Part], masked: bool) -> None:
        for part in parts:
            r, c = part.start
            lanes, keys = slice(r, r + p.sub_q), slice(c, c + p.sub_kv)
            lse, delta = (ins[name][0, 0, :, lanes] for name in ("lse", "delta"))
            weights, ds, _ = gradients(part, masked, lse, delta)
            ds = ds.astype(p.dtype)
            do = ins["do"][0, 0, lanes]
            weights, q = weights.astype(p.dtype), ins["q"][0, 0, lanes]
            # product + sum, not sum + product: the compiler packs that better
            buffers["dv"][keys, :] = p.dot(weights, do, (1, 0)) + buffers["dv"][keys, :]
            buffers["dk"][keys, :] = p.dot(ds, q, (1, 0)) + buffers["dk"][keys, :]
            if "dq" in buffers:
                member = place.h - place.g * p.group
                at = pl.multiple_of(place.q_block * p.block_q, LANES) + r
                added = p.dot(_keys(part), ds, (0, 0))
                at = (member, slice(None), pl.ds(at, p.sub_q))
                buffers["dq"][at] = added + buffers["dq"][at]

    tpu_scores.over_parts(grid, sources, place, offsets, ins, buffers, tile)

    @pl.when(place.closes)
    def _() -> None:
        outs["k"][0, 0] = (buffers["dk"][...] * p.spec.scale).astype(p.dtype)
        outs["v"][0, 0] = buffers["dv"][...].astype(p.dtype)

    if "dq" in buffers:
        _write_query(grid, buffers["dq"], outs["q"])


def _clear_query(grid: Grid, total: Any) -> None:
    """Zeroes dq [group, d, t] at the first step of a group."""

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _() -> None:
        def clear(i: Any, _: None) -> None:
            at = pl.multiple_of(i * grid.plan.block_q, LANES)
            shape = (grid.plan.group, grid.plan.d, grid.plan.block_q)
            total[:, :, pl.ds(at, grid.plan.block_q)] = jnp.zeros(shape, jnp.float32)

        lax.fori_loop(0, grid.plan.t_pad // grid.plan.block_q, clear, None)


def _write_query(grid: Grid, total: Any, out: Any) -> None:
    """Writes dq of a group of heads at its last step."""
    p = grid.plan
    last = (pl.program_id(2) == pl.num_programs(2) - 1) & (pl.program_id(3) == grid.inner - 1)

    @pl.when(last)
    def _() -> None:
        def write(i: Any, _: None) -> None:
            at = pl.multiple_of(i * p.block_q, LANES)
            for member in range(p.group):
                block = total[member, :, pl.ds(at, p.block_q)].T * p.spec.scale
                out[0, member, pl.ds(at, p.block_q), :] = block.astype(out.dtype)

        lax.fori_loop(0, p.t_pad // p.block_q, write, None)


def gradients(
    part: Part, masked: bool, lse: Array, delta: Array
) -> tuple[Array, Array, dict[str, Array]]:
    """(weights with dropout, ds, name -> gradient of each read) of a part of a tile.

    Args:
      part: where it is, and its operands.
      masked: whether pairs may be hidden.
      lse, delta: statistics of the rows, broadcastable to the scores; lse in base 2.
    """
    p, (r, c) = part.plan, part.start
    queries, keys = slice(r, r + p.sub_q), slice(c, c + p.sub_kv)
    q, k = part.ins["q"][0, 0, queries], part.ins["k"][0, 0, keys]
    do, v = part.ins["do"][0, 0, queries], part.ins["v"][0, 0, keys]
    pairs = ((k, q), (v, do)) if p.transposed else ((q, k), (do, v))
    z, pull = part.logits(p.dot(*pairs[0], (1, 1)), masked)
    weights = jnp.exp2(z - lse)
    dp = p.dot(*pairs[1], (1, 1))
    kept = part.kept()
    dropped = weights
    if kept is not None:
        dropped, dp = weights * kept, dp * kept
    ds, grads = pull(weights * (dp - delta))
    return dropped, ds, grads


def _keys(part: Part) -> Array:
    return part.ins["k"][0, 0, part.start[1] : part.start[1] + part.plan.sub_kv]


def saved_inputs(operands: Operands, grid: Grid) -> dict[str, Any]:
    """q, k, v, do and the statistics, with blocks by query or key."""
    p = grid.plan

    def by_query(width: int) -> Any:
        return grid.block((1, 1, p.block_q, width), lambda at: (at.b, at.h, at.q_block, 0))

    def by_key(width: int) -> Any:
        return grid.block((1, 1, p.block_kv, width), lambda at: (at.b, at.g, at.k_block, 0))

    lane = grid.block((1, 1, 1, p.block_q), lambda at: (at.b, at.h, 0, at.q_block))
    lse = operands["lse"].astype(jnp.float32)
    empty = jnp.isneginf(lse)
    # rows that see nothing: z - inf = -inf, whatever z is
    base2 = jnp.where(empty, jnp.inf, lse * LOG2E)
    delta = jnp.where(empty, 0.0, operands["delta"].astype(jnp.float32))
    return {
        "q": (by_head(operands["query"], p.t_pad, p.d, p.dtype), by_query(p.d)),
        "do": (by_head(operands["d_out"], p.t_pad, p.e, p.dtype), by_query(p.e)),
        "k": (by_head(operands["key"], p.s_pad, p.d, p.dtype), by_key(p.d)),
        "v": (by_head(operands["value"], p.s_pad, p.e, p.dtype), by_key(p.e)),
        "lse": (by_lane(base2, p.t_pad, jnp.inf), lane),
        "delta": (by_lane(delta, p.t_pad, 0.0), lane),
    }
