"""Gradient of a bias array: ds, tile by tile, summed over the rows and heads that share the bias.

The gradient is as large as the bias, so every tile is visited and the empty ones write zeros. The
rows and heads that share a tile follow one another, and their sum stays in vector memory.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import tpu_scores, tpu_sources
from pallas_kernels.flash.tpu_backward import gradients, saved_inputs
from pallas_kernels.flash.tpu_lists import FIRST, LAST, Walk, make_walk
from pallas_kernels.flash.tpu_plan import LANES, Array, Grid, Place, Plan, columns, spread
from pallas_kernels.flash.tpu_scores import Part
from pallas_kernels.maskprogram import EMPTY, FULL, PARTIAL


def bias_gradient(operands: dict[str, Any], plan: Plan, classes: Any, cost: Any) -> Array:
    """Gradient [b|1, h|1, t, s] of the bias.

    Args:
      operands, plan: as for `query_gradient`.
      classes: [nb, nh, query blocks, key blocks].
      cost: estimate for the compiler.
    """
    bias = operands["bias"]
    rows, heads = bias.shape[:2]
    shared = (1 if rows > 1 else plan.b, 1 if heads > 1 else plan.h)
    grid = Grid(plan, _every_tile(_merged(classes, shared)), shared)
    sources = tpu_scores.used_sources(operands, grid)
    inputs = saved_inputs(operands, grid) | tpu_scores.common_inputs(operands, sources, grid)
    tile = (1, 1, plan.block_q, plan.block_kv)
    one = next(s for s in sources if s.name == "bias")
    block = grid.block(tile, lambda at: one.index(at, at.q_block, at.k_block))
    shape = (*bias.shape[:2], plan.t_pad, plan.s_pad)
    outputs = {"bias": (jax.ShapeDtypeStruct(shape, bias.dtype), block)}
    scratch = tpu_sources.scratch(sources, plan) | {
        "sum": pltpu.VMEM(tile[2:], jnp.float32),
        "lse": pltpu.VMEM((plan.block_q, LANES), jnp.float32),
        "delta": pltpu.VMEM((plan.block_q, LANES), jnp.float32),
    }
    kernel = functools.partial(_kernel, grid=grid, sources=sources)
    out = grid.call(kernel, inputs, outputs, scratch, name="flash_dbias", cost_estimate=cost)
    return out["bias"][:, :, : plan.t, : plan.s]


def _kernel(
    place: Place, offsets: Any, ins: Any, outs: Any, buffers: Any, *, grid: Grid, sources: Any
) -> None:
    p = grid.plan

    @pl.when(place.opens)
    def _() -> None:
        buffers["sum"][...] = jnp.zeros(buffers["sum"].shape, jnp.float32)

    for name in ("lse", "delta"):  # of another row or head at every step
        buffers[name][...] = columns(ins[name][0, 0])
    for source in sources:
        if source.is_column(p):
            buffers[source.name][...] = columns(ins[source.name][0, 0])

    def tile(parts: list[Part], masked: bool) -> None:
        for part in parts:
            r, c = part.start
            rows = slice(r, r + p.sub_q)
            statistics = (spread(buffers[n][rows, :], p.sub_kv) for n in ("lse", "delta"))
            _, _, grads = gradients(part, masked, *statistics)
            buffers["sum"][rows, c : c + p.sub_kv] += grads["bias"]

    tpu_scores.over_parts(grid, sources, place, offsets, ins, buffers, tile)

    @pl.when(place.closes)
    def _() -> None:
        outs["bias"][0, 0] = buffers["sum"][...].astype(outs["bias"].dtype)


def _merged(classes: Any, shared: tuple[int, int]) -> Any:
    """Classes that hold for all rows and heads that share the bias: FULL only where all are."""
    xp: Any = jnp if isinstance(classes, jax.Array) else np
    for axis, count in enumerate(shared):
        if count > 1 and classes.shape[axis] > 1:
            low, high = (f(classes, axis=axis, keepdims=True) for f in (xp.min, xp.max))
            classes = xp.where(low == high, low, xp.full_like(low, PARTIAL))
    return classes


def _every_tile(classes: Any) -> Walk:
    """A walk in which every tile is a row of its own, so that each is written."""
    xp: Any = jnp if isinstance(classes, jax.Array) else np
    marked = make_walk(xp.where(classes == EMPTY, xp.full_like(classes, 3), classes))
    words = (marked.words | jnp.int32(FIRST | LAST)).astype(jnp.int32)
    static = not isinstance(classes, jax.Array)
    return Walk(
        words, marked.steps, marked.capacity, marked.nb, marked.nl, marked.columns,
        marked.members, not static or bool((classes == FULL).any()),
        not static or bool((classes == PARTIAL).any()),
    )  # fmt: skip
