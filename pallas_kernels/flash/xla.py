"""Block-sparse attention in plain XLA: the body for CPUs, and the fallback everywhere else.

Forward: per block of queries an online softmax over the listed key blocks only. Backward: the same
walk once more, recomputing the scores of a tile from the saved lse and adding to dq, dk and dv, so
memory is O(T) and the order of every sum is fixed. The same tile code runs in two forms:

- one device: a loop over batch rows, heads and query blocks keeps a tile in the processor's cache,
  a few lanes side by side (`lanes.py`);
- several devices, or under vmap: batch and heads are vectorized axes, which a partitioner can
  shard.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import tilemath
from pallas_kernels.dispatch import Target
from pallas_kernels.flash import lanes, tiles
from pallas_kernels.flash.blocks import Steps, Tiling, choose_tiling
from pallas_kernels.flash.lanes import Cut, Layout, Operands
from pallas_kernels.flash.lists import make_lists
from pallas_kernels.flash.spec import FlashSpec

LANES = 4
"""Tiles that one step works on side by side, on CPUs of a few cores."""

LANE_SCORES = 1 << 23
"""Calls with fewer scores than this take one lane: they compile faster and are fast already."""

LANE_TILE = 1 << 18
"""Tiles with more scores than this keep every core busy by themselves, and take one lane."""


def forward(operands: Operands, spec: FlashSpec, target: Target) -> tuple[jax.Array, jax.Array]:
    """Output [b, t, h, e] and natural-log lse [b, t, h]."""
    b, t, h, _ = operands["query"].shape
    g = operands["value"].shape[2]
    steps, tiling, width = plan(operands, spec)
    cut, _, sizes = _cut(operands, steps, tiling, width)
    if target.num_devices == 1:
        layout = lanes.choose_layout(b, h, g, *sizes, steps.lanes)
        o, lse = _forward_lanes(_split(cut, layout), layout, steps, operands["value"].shape[1])
        o, lse = layout.join(o, h), layout.join(lse, h)
    else:

        def one(cut: Cut, extra: Any, layout: Layout) -> Any:
            o, lse = _forward_lanes(cut, layout, steps, operands["value"].shape[1])
            return o[0][0], lse[0][0]

        o, lse = _vectorized(one, cut, (), b, h, g)
    return lanes.unblocks(o, t).astype(operands["query"].dtype), lanes.unblocks(lse, t)[..., 0]


def backward(operands: Operands, spec: FlashSpec, target: Target) -> dict[str, Any]:
    """Gradients for "query", "key", "value" and "score_reads", and "bias" where there is one.

    Operands are those of `forward` with the cotangent "d_out" [b, t, h, e], "lse" and "delta"
    [b, t, h] = rowsum(out * d_out) - d_lse.
    """
    query, key, value = operands["query"], operands["key"], operands["value"]
    b, t, h, _ = query.shape
    s, g = value.shape[1:3]
    steps, tiling, width = plan(operands, spec)
    cut, extra, sizes = _cut(operands, steps, tiling, width)
    if target.num_devices == 1:
        layout = lanes.choose_layout(b, h, g, *sizes, steps.lanes)
        split_extra = [layout.split(x) for x in extra]
        dq, dk, dv, dbias, dreads = _backward_lanes(
            _split(cut, layout), split_extra, layout, steps, s
        )
        dq, dk, dv = layout.join(dq, h), layout.join(dk, g), layout.join(dv, g)
    else:

        def one(cut: Cut, extra: Any, layout: Layout) -> Any:
            dq, dk, dv, *sums = _backward_lanes(cut, extra, layout, steps, s)
            return dq[0][0], dk[0][0], dv[0][0], *sums

        dq, dk, dv, *sums = _vectorized(one, cut, extra, b, h, g)
        dk, dv = (x.reshape(b, g, h // g, *x.shape[2:]).sum(2) for x in (dk, dv))
        dbias, dreads = jax.tree.map(lambda x: x.sum((0, 1)), tuple(sums))
    dq = lanes.unblocks(dq, t) * jnp.asarray(spec.scale, dq.dtype)
    out: dict[str, Any] = {
        "query": dq.astype(query.dtype),
        "key": lanes.unblocks(dk, s).astype(key.dtype),
        "value": lanes.unblocks(dv, s).astype(value.dtype),
        "score_reads": _unpadded(dreads, operands, spec, cut.k.shape[2] - s),
    }
    if dbias is not None:
        bias = operands["bias"]
        out["bias"] = dbias[tuple(slice(n) for n in bias.shape)].astype(bias.dtype)
    return out


def plan(operands: Operands, spec: FlashSpec) -> tuple[Steps, Tiling, int]:
    """Tile sizes and block lists of a call, and the largest number of listed blocks in a row."""
    b, t, h, _ = operands["query"].shape
    s = operands["key"].shape[1]
    config = spec.config
    given = (config.block_q or config.block_kv, config.block_kv or config.block_q)
    mask = spec.mask
    tiling = choose_tiling(
        lambda bq, bk: make_lists(operands, spec, bq, bk),
        t,
        s,
        static=mask is not None and spec.q_offset is not None,
        copies=1 if mask is None else (mask.num_heads or 1) * (mask.batch_size or 1),
        block_sizes=None if given[0] is None or given[1] is None else (given[0], given[1]),
    )
    full = partial = None
    width = tiling.lists.num_kv_blocks
    if tiling.lists.is_static:
        full, partial = (
            np.asarray(getattr(tiling.lists, f"{x}_count")) for x in ("full", "partial")
        )
        width = max(1, int((full + partial).max(initial=0)))
    band = tiling.band is not None
    tile = tiling.block_q * tiling.span
    many = b * h * t * width * tiling.block_kv >= LANE_SCORES and tile <= LANE_TILE
    steps = Steps(
        spec,
        tiling.block_q,
        tiling.block_kv,
        tiling.span,
        any_full=not band and (full is None or bool(full.any())),
        any_partial=band or partial is None or bool(partial.any()),
        lanes=LANES if many else 1,
    )
    return steps, tiling, width


def _cut(
    operands: Operands, steps: Steps, tiling: Tiling, width: int
) -> tuple[Any, tuple[jax.Array, ...], tuple[int, int]]:
    """Operands in blocks [b, h, blocks, block, d], the backward's extra ones, and (nb, nh)."""
    starts, full, total = lanes.merged_lists(tiling, width)
    spec, block_q, block_kv = steps.spec, steps.block_q, steps.block_kv
    cut = Cut(
        lanes.blocks(lanes.prescaled(operands["query"], spec.scale), block_q),
        lanes.flat_blocks(operands["key"], block_kv),
        lanes.flat_blocks(operands["value"], block_kv),
        starts,
        full,
        total,
        lanes.padded_rest(operands, spec, block_q, block_kv),
    )
    extra = ()
    if "d_out" in operands:
        # an lse of +inf gives the rows behind the end no probability, whatever their scores are
        lse = lanes.blocks(operands["lse"][..., None], block_q, fill=np.inf)
        others = (operands["d_out"], operands["delta"][..., None])
        d_out, delta = (lanes.blocks(x, block_q) for x in others)
        extra = (d_out, lse, delta)
    return cut, extra, (total.shape[0], total.shape[1])


def _unpadded(dreads: list[Any], operands: Operands, spec: FlashSpec, before: int) -> list[Any]:
    kinds = () if spec.score_mod is None else spec.score_mod.kinds
    reads = zip(kinds, operands["score_reads"], strict=True)
    return [
        None if total is None else lanes.unpad_read(total, (kind, read, before))
        for (kind, read), total in zip(reads, dreads, strict=True)
    ]


def _split(cut: Cut, layout: Layout) -> Cut:
    return cut._replace(q=layout.split(cut.q), k=layout.split(cut.k), v=layout.split(cut.v))


def _vectorized(one: Any, cut: Any, extra: tuple[jax.Array, ...], b: int, h: int, g: int) -> Any:
    """`one(cut, extra, layout)` for every (batch row, head), vmapped over both axes."""
    rows, heads = cut.total.shape[:2]
    k, v = (jnp.repeat(x, h // g, axis=1) for x in (cut.k, cut.v))

    def alone(q: Any, k: Any, v: Any, lists: Any, extra: Any, row: Any, head: Any) -> Any:
        starts, full, total = (x.reshape(1, 1, *x.shape) for x in lists)
        local = Cut([q[None]], [k[None]], [v[None]], starts, full, total, cut.rest)
        layout = Layout(1, 1, 1, 1, 1, only=(row, head))
        return one(local, [[x[None]] for x in extra], layout)

    lists = (cut.starts, cut.full, cut.total)
    list_axes = (0 if rows > 1 else None, 0 if heads > 1 else None)
    if rows == 1:
        lists = tuple(x[0] for x in lists)
    if heads == 1:
        lists = tuple(x[(slice(None),) * (rows > 1) + (0,)] for x in lists)
    over_heads = jax.vmap(alone, in_axes=(0, 0, 0, list_axes[1], 0, None, 0))
    over_rows = jax.vmap(over_heads, in_axes=(0, 0, 0, list_axes[0], 0, 0, None))
    row, head = (jnp.arange(n, dtype=jnp.int32) for n in (b, h))
    return over_rows(cut.q, k, v, lists, extra, row, head)


def _forward_lanes(
    cut: Cut, layout: Layout, steps: Steps, kv_len: int
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Per lane: output [members, nq, bq, e] and lse [members, nq, bq, 1]."""
    _, nq, bq, _ = cut.q[0].shape
    width = cut.v[0].shape[-1]
    dtype = tilemath.accumulator_dtype(cut.q[0].dtype)
    shared = tiles.mask_is_shared(cut, steps)
    precision = steps.spec.precision

    def block(step: Any, outputs: Any) -> Any:
        step = step.astype(jnp.int32)  # int64 under x64 where the loop's length is static
        chunk, i = lax.div(step, jnp.int32(nq)), lax.rem(step, jnp.int32(nq))
        members = [layout.member(lane, chunk) for lane in range(layout.lanes)]
        queries = [tiles.block_at(q, m.place, i) for q, m in zip(cut.q, members, strict=True)]

        def tile(carry: Any, start: Any, masked: bool) -> Any:
            keep, updated = None, []
            for lane, (m, q) in enumerate(zip(members, queries, strict=True)):
                if masked and (keep is None or not shared):
                    keep = tiles.visible(cut, steps, m, i, start, kv_len, False)
                k = tiles.keys_at(cut.k[lane], m.kv_place, start, steps.span)
                v = tiles.keys_at(cut.v[lane], m.kv_place, start, steps.span)
                stages = tiles.Scores(cut, steps, m, i, start, False)
                scores = tiles.hide(stages(tiles.raw_scores(steps, q, k, False)), keep)
                drop = tiles.dropout(cut, steps, m, i, start, False)
                updated.append(tilemath.softmax_update(carry[lane], scores, v, drop, precision))
            return updated

        sinks = cut.rest["sinks"]
        begin = [
            tilemath.softmax_init(bq, width, dtype, None if sinks is None else sinks[m.h])
            for m in members
        ]
        finished = tiles.walk(cut, steps, members[0], i, tile, begin)
        out = []
        for (o, lse), m, carry in zip(outputs, members, finished, strict=True):
            results = tilemath.softmax_finish(carry)
            at = (m.place, i, 0, 0)
            out.append(
                tuple(
                    tiles.write(x, r[None, None], at)
                    for x, r in zip((o, lse), results, strict=True)
                )
            )
        return out

    empty = (
        jnp.zeros((layout.steps, nq, bq, width), dtype),
        jnp.zeros((layout.steps, nq, bq, 1), dtype),
    )
    out = lax.fori_loop(jnp.int32(0), jnp.int32(layout.steps * nq), block, [empty] * layout.lanes)
    return [o for o, _ in out], [lse for _, lse in out]


def _backward_lanes(
    cut: Cut, extra: Any, layout: Layout, steps: Steps, kv_len: int
) -> tuple[Any, ...]:
    """Per lane dq, dk, dv in blocks; then the sums dbias and dreads over all members.

    Scores are held transposed, [keys, queries]: dk = ds q and dv = p do are then plain products,
    and dq is gathered as its transpose.
    """
    nq = cut.q[0].shape[1]
    dtype = tilemath.accumulator_dtype(cut.q[0].dtype)
    spec, bias, reads = steps.spec, cut.rest["bias"], cut.rest["score_reads"]
    shared = tiles.mask_is_shared(cut, steps)
    precision = steps.spec.precision

    def block(step: Any, state: Any) -> Any:
        step = step.astype(jnp.int32)  # int64 under x64 where the loop's length is static
        chunk, i = lax.div(step, jnp.int32(nq)), lax.rem(step, jnp.int32(nq))
        members = [layout.member(lane, chunk) for lane in range(layout.lanes)]
        saved = []
        for lane, m in enumerate(members):
            q, do, lse, delta = (tiles.block_at(x[lane], m.place, i) for x in (cut.q, *extra))
            saved.append((q, do, lse.T, delta.T))

        def tile(carry: Any, start: Any, masked: bool) -> Any:
            per_lane, dbias, dreads = carry
            keep, updated = None, []
            for lane, (m, (q, do, lse, delta)) in enumerate(zip(members, saved, strict=True)):
                dq, dk, dv = per_lane[lane]
                if masked and (keep is None or not shared):
                    keep = tiles.visible(cut, steps, m, i, start, kv_len, True)
                k = tiles.keys_at(cut.k[lane], m.kv_place, start, steps.span)
                v = tiles.keys_at(cut.v[lane], m.kv_place, start, steps.span)
                stages = tiles.Scores(cut, steps, m, i, start, True)
                raw = tiles.raw_scores(steps, q, k, True)
                p = tilemath.probabilities(tiles.hide(stages(raw), keep), lse)
                dp = tilemath.dot(v, do, (1, 1), precision)
                weights = p
                drop = tiles.dropout(cut, steps, m, i, start, True)
                if drop is not None:
                    weights, dp = p * drop, dp * drop
                ds, d_values = stages.grad(raw, p * (dp - delta))
                if dbias is not None:
                    dbias = tiles.add_bias_grad(dbias, ds, steps, m, i, start, True)
                if spec.score_mod is not None:
                    dreads = tiles.add_read_grads(
                        dreads, d_values, spec.score_mod, reads, cut, steps, m, i, start, True
                    )
                dk_tile = tilemath.dot(ds, q, (1, 0), precision)
                if q.dtype != dtype:  # the scale is not in q
                    dk_tile = dk_tile * jnp.asarray(spec.scale, dtype)
                dv_tile = tilemath.dot(weights, do, (1, 0), precision)
                updated.append(
                    (
                        dq + tilemath.dot(k, ds, (0, 0), precision),
                        tiles.add_keys(dk, m.kv_place, start, dk_tile),
                        tiles.add_keys(dv, m.kv_place, start, dv_tile),
                    )
                )
            return updated, dbias, dreads

        gradients, dbias, dreads = state
        begin = [
            (jnp.zeros(q.T.shape, dtype), *g[1:])
            for (q, *_), g in zip(saved, gradients, strict=True)
        ]
        found, dbias, dreads = tiles.walk(cut, steps, members[0], i, tile, (begin, dbias, dreads))
        gradients = [
            (tiles.write(old[0], new[0].T[None, None], (m.place, i, 0, 0)), *new[1:])
            for m, old, new in zip(members, gradients, found, strict=True)
        ]
        return gradients, dbias, dreads

    empty = [
        tuple(jnp.zeros(x.shape, dtype) for x in arrays)
        for arrays in zip(cut.q, cut.k, cut.v, strict=True)
    ]
    dbias = None if bias is None else jnp.zeros(bias.shape, dtype)
    state = (empty, dbias, _zero_reads(spec, reads, dtype))
    count = jnp.int32(layout.steps * nq)
    gradients, dbias, dreads = lax.fori_loop(jnp.int32(0), count, block, state)
    dq, dk, dv = (list(x) for x in zip(*gradients, strict=True))
    return dq, dk, dv, dbias, dreads


def _zero_reads(spec: FlashSpec, reads: list[Any], dtype: Any) -> list[Any]:
    """Zeros for the gradient of every floating read, None for the others."""

    def zeros(x: jax.Array) -> jax.Array | None:
        return jnp.zeros(x.shape, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else None

    kinds = () if spec.score_mod is None else spec.score_mod.reads
    return [
        ([zeros(t) for t in x] if read.kind == "pair" else zeros(x)) if read.is_float else None
        for read, x in zip(kinds, reads, strict=True)
    ]
