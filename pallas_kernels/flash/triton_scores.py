"""Scores of one tile in the Triton kernels: stages, masks, exponentials and their gradients."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat, tilemath
from pallas_kernels.flash import triton_tiles as tiles
from pallas_kernels.flash.triton_tiles import Call, Refs, Tile

LOG2E = math.log2(math.e)


def visible(call: Call, x: Refs, tile: Tile, masked: bool, guard_rows: bool) -> jax.Array | None:
    """Booleans that broadcast to a tile, None where it needs no mask.

    Args:
      call, x, tile: the tile and its operands.
      masked: whether the tile is PARTIAL.
      guard_rows: whether rows beyond the last query must be hidden, as where rows are summed.
    """
    parts = []
    if masked:
        if tiles.ragged_kv(call):
            parts.append(tile.cols < call.s)
        if call.spec.predicate is not None:
            parts.append(
                call.spec.predicate(None, tile.b, tile.h, tile.q, tile.cols, tile.mask_values)
            )
        if x["mask_array"] is not None:
            parts.append(_array_tile(call, x["mask_array"], tile))
    if guard_rows and tiles.ragged_q(call) and call.spec.score_mod is not None:
        parts.append(tile.rows < call.t)
    keep = None
    for part in parts:
        keep = part if keep is None else keep & part
    return keep


def is_direct(call: Call, x: Refs) -> bool:
    """Whether nothing lies between q·k and the mask, so that the scale can join the exponential."""
    stages = (call.spec.softcap, call.spec.score_mod, x["bias"])
    return all(stage is None for stage in stages) and call.spec.scale > 0


def exponent_factor(call: Call, x: Refs) -> float:
    """Factor f > 0 of softmax weights 2^(f (scores - max))."""
    return call.spec.scale * LOG2E if is_direct(call, x) else LOG2E


def score_stages(call: Call, x: Refs, tile: Tile, raw: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(scores before the mask, scores before score_mod) of the products q·k.

    Scores are in units of `exponent_factor`: where `is_direct`, they are the products themselves.
    """
    spec = call.spec
    if is_direct(call, x):
        return raw, raw
    scores = raw * spec.scale
    if x["bias"] is not None:
        scores = scores + _array_tile(call, x["bias"], tile).astype(jnp.float32)
    if spec.softcap is not None:
        scores = spec.softcap * jnp.tanh(scores * (1.0 / spec.softcap))
    capped = scores
    if spec.score_mod is not None:
        scores = spec.score_mod(capped, tile.b, tile.h, tile.q, tile.cols, tile.values)
        scores = scores.astype(jnp.float32)
    return scores, capped


def exponentials(call: Call, x: Refs, scores: jax.Array, shift: jax.Array) -> jax.Array:
    """2^(f scores - shift), f the `exponent_factor`; shift broadcasts to the scores."""
    factor = exponent_factor(call, x)
    shift = jnp.broadcast_to(shift, scores.shape)
    if call.interpret:
        return jnp.exp2(scores * factor - shift)
    return jnp.exp2(compat.triton_fma(scores, jnp.full_like(scores, factor), -shift))


def score_gradient(
    call: Call, tile: Tile, capped: jax.Array, ds: jax.Array, keep: jax.Array | None
) -> tuple[jax.Array, list[Any]]:
    """Gradients of the score stages, from ds = dL/d scores.

    Returns:
      (dL/d (scale q·k + bias), [dL/d value of each score read or None]), 0 where hidden.
    """
    values: list[Any] = []
    spec = call.spec
    if spec.score_mod is not None:
        ds, values = spec.score_mod.grad(capped, tile.b, tile.h, tile.q, tile.cols, tile.values, ds)
        # a derivative may be infinite where the weight is 0
        ds = hide(ds.astype(jnp.float32), keep, 0.0)
        values = [None if v is None else hide(v.astype(jnp.float32), keep, 0.0) for v in values]
    if spec.softcap is not None:
        ratio = capped * (1.0 / spec.softcap)
        ds = ds * (1.0 - ratio * ratio)
    return ds, values


def hide(tile: jax.Array, keep: jax.Array | None, value: float) -> jax.Array:
    """`value` where a pair is hidden."""
    if keep is None:
        return tile
    return jnp.where(jnp.broadcast_to(keep, tile.shape), tile, jnp.full_like(tile, value))


def dropout(call: Call, x: Refs, tile: Tile) -> jax.Array | None:
    """Factors of dropout on a tile, None without dropout."""
    if call.spec.dropout_rate == 0.0:
        return None
    seed = [x["seed"][0], x["seed"][1]]
    return tilemath.dropout_factors(
        seed,  # pyright: ignore[reportArgumentType]
        tile.b, tile.h, tile.q, tile.cols, call.spec.dropout_rate,
    )  # fmt: skip


def _array_tile(call: Call, ref: Any, tile: Tile) -> jax.Array:
    """The part of a [b|1, h|1, t|1, s|1] array on a tile, with size 1 where it broadcasts."""
    row_axis, column_axis = ref.shape[2] > 1, ref.shape[3] > 1
    at = tiles.lead(ref, tile.b, tile.h)
    if not row_axis and not column_axis:
        return jnp.full((1, 1), ref[(*at, 0, 0)])
    mask = None
    for used, index, length, ragged in (
        (row_axis, tile.rows, call.t, tiles.ragged_q(call)),
        (column_axis, tile.cols, call.s, tiles.ragged_kv(call)),
    ):
        if used and ragged:
            inside = index < length
            mask = inside if mask is None else mask & inside
    index = (tile.rows if row_axis else 0, tile.cols if column_axis else 0)
    return tiles.take(ref, (*at, *index), mask)
