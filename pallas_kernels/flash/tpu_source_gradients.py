"""Gradients of what the scores look up: sums of a tile over keys, queries, diagonals or everything.

The kernel for dq adds them up in vector memory, in a fixed order: by query over a row of tiles, the
others over all tiles of a (batch row, head). What rows or heads share is summed outside.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.tpu_plan import LANES, Array, Grid, Place, Plan, float32, lane_sums
from pallas_kernels.flash.tpu_sources import Source, window

SUBLANES = 8


def diagonal_sums(tile: Array) -> Array:
    """Sums over i of tile[i, x - rows + i], [1, rows + lanes]: the transpose of `toeplitz`.

    Rows are added in pairs, halves first: log2(rows) shifts of a shrinking array.
    """
    rows, lanes = tile.shape
    total = jnp.concatenate([jnp.zeros((rows, rows), tile.dtype), tile], axis=1)
    while total.shape[0] > 1:
        half = total.shape[0] // 2
        shifted = pltpu.roll(total[half:], rows + lanes - half, 1)
        total = total[:half] + shifted
    return total


def outputs(sources: list[Source], grid: Grid) -> dict[str, Any]:
    """Dictionary name -> (shape, block) of the sums for graded sources, per (batch row, head)."""
    p, found = grid.plan, {}
    for source in sources:
        if source.graded and source.kind != "tile":
            last: tuple[int, ...] = {
                "scalar": (SUBLANES, LANES),
                "query": (1, p.t_pad),
                "key": (1, p.s_pad),
                "offset": (1, p.t_pad + p.s_pad),
            }[source.kind]
            if source.kind == "query":
                block = grid.block((1, 1, 1, p.block_q), lambda at: (at.b, at.h, 0, at.q_block))
            else:
                block = grid.block((1, 1, *last), lambda at: (at.b, at.h, 0, 0))
            found[source.name] = float32((p.b, p.h, *last)), block
    return found


def scratch(sources: list[Source], plan: Plan) -> dict[str, Any]:
    """Buffers for the sums of sources by query."""
    return {
        f"d_{source.name}": pltpu.VMEM((plan.block_q, LANES), jnp.float32)
        for source in sources
        if source.graded and source.kind == "query"
    }


def clear(sources: list[Source], place: Place, outs: Any, buffers: Any) -> None:
    """Zeroes sums where they begin."""
    begins = pl.program_id(2) == 0
    for source in sources:
        if source.graded and source.kind == "query":

            @pl.when(place.opens)
            def _(ref: Any = buffers[f"d_{source.name}"]) -> None:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

        elif source.graded and source.kind != "tile":

            @pl.when(begins)
            def _(ref: Any = outs[source.name]) -> None:
                ref[...] = jnp.zeros(ref.shape, ref.dtype)


def add(
    source: Source, plan: Plan, place: Place, outs: Any, buffers: Any, part: tuple[int, int],
    tile: Array,
) -> None:  # fmt: skip
    """Adds a tile [queries, keys] of cotangents of a source's values."""
    r, c = part
    if source.kind == "query":
        buffers[f"d_{source.name}"][r : r + plan.sub_q, :] += lane_sums(tile)
        return
    ref = outs[source.name]
    if source.kind == "scalar":
        ref[0, 0] += lane_sums(_sublane_sums(tile))
    elif source.kind == "key":
        at = pl.multiple_of(place.k_block * plan.block_kv, LANES) + c
        ref[0, 0, :, pl.ds(at, plan.sub_kv)] += jnp.sum(tile, axis=0, keepdims=True)
    else:
        at = window(plan, place, part)
        ref[0, 0, :, pl.ds(at, plan.sub_q + plan.sub_kv)] += diagonal_sums(tile)


def write(sources: list[Source], place: Place, outs: Any, buffers: Any) -> None:
    """Writes the sums by query at the end of a row of tiles."""
    for source in sources:
        if source.graded and source.kind == "query":

            @pl.when(place.closes)
            def _(name: str = source.name) -> None:
                sums = jnp.sum(buffers[f"d_{name}"][...].T, axis=0, keepdims=True)
                outs[name][0, 0] = sums


def finish(source: Source, plan: Plan, sums: Array) -> Array:
    """Gradient in the shape of the source's array, from the kernel's sums."""
    if source.kind == "scalar":
        total = sums.sum((2, 3))
    elif source.kind == "query":
        total = sums[:, :, 0, : plan.t]
    elif source.kind == "key":
        total = sums[:, :, 0, : plan.s]
    else:
        first = plan.t_pad - plan.t + 1
        total = sums[:, :, 0, first : first + plan.t + plan.s - 1][..., ::-1]
    shared = tuple(i for i, own in enumerate(source.apart) if not own)
    return total.sum(shared, keepdims=True) if shared else total


def _sublane_sums(x: Array) -> Array:
    """[m, n] to [8, n]: sums of sublanes a multiple of 8 apart."""
    total = x[:SUBLANES]
    for i in range(SUBLANES, x.shape[0], SUBLANES):
        total = total + x[i : i + SUBLANES]
    return total
