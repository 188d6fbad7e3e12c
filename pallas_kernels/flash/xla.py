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
from jax import lax

from pallas_kernels import tilemath
from pallas_kernels.flash import lanes, tiles
from pallas_kernels.flash.lanes import Cut, Layout, Operands
from pallas_kernels.flash.spec import FlashSpec


def forward(operands: Operands, spec: FlashSpec, num_devices: int) -> tuple[jax.Array, jax.Array]:
    """Output [b, t, h, e] and natural-log lse [b, t, h]."""
    b, t, h, _ = operands["query"].shape
    g = operands["value"].shape[2]
    cut, _, sizes = _cut(operands, spec)
    if num_devices == 1:
        layout = lanes.choose_layout(b, h, g, *sizes, spec.lanes)
        o, lse = _forward_lanes(_split(cut, layout), layout, spec, operands["value"].shape[1])
        o, lse = layout.join(o, h), layout.join(lse, h)
    else:

        def one(cut: Cut, extra: Any, layout: Layout) -> Any:
            o, lse = _forward_lanes(cut, layout, spec, operands["value"].shape[1])
            return o[0][0], lse[0][0]

        o, lse = _vectorized(one, cut, (), b, h, g)
    return lanes.unblocks(o, t).astype(operands["query"].dtype), lanes.unblocks(lse, t)[..., 0]


def backward(operands: Operands, spec: FlashSpec, num_devices: int) -> dict[str, Any]:
    """Gradients for "query", "key", "value" and "mod_consts", and for "bias" where there is one.

    Operands are those of `forward` with the cotangent "d_out" [b, t, h, e], "lse" and "delta"
    [b, t, h] = rowsum(out * d_out) - d_lse.
    """
    query, key, value = operands["query"], operands["key"], operands["value"]
    b, t, h, _ = query.shape
    s, g = value.shape[1:3]
    cut, extra, sizes = _cut(operands, spec)
    if num_devices == 1:
        layout = lanes.choose_layout(b, h, g, *sizes, spec.lanes)
        split_extra = [layout.split(x) for x in extra]
        dq, dk, dv, dbias, dconsts = _backward_lanes(
            _split(cut, layout), split_extra, layout, spec, s
        )
        dq, dk, dv = layout.join(dq, h), layout.join(dk, g), layout.join(dv, g)
    else:

        def one(cut: Cut, extra: Any, layout: Layout) -> Any:
            dq, dk, dv, *sums = _backward_lanes(cut, extra, layout, spec, s)
            return dq[0][0], dk[0][0], dv[0][0], *sums

        dq, dk, dv, *sums = _vectorized(one, cut, extra, b, h, g)
        dk, dv = (x.reshape(b, g, h // g, *x.shape[2:]).sum(2) for x in (dk, dv))
        dbias, dconsts = jax.tree.map(lambda x: x.sum((0, 1)), tuple(sums))
    dq = lanes.unblocks(dq, t) * jnp.asarray(spec.scale, dq.dtype)
    out: dict[str, Any] = {
        "query": dq.astype(query.dtype),
        "key": lanes.unblocks(dk, s).astype(key.dtype),
        "value": lanes.unblocks(dv, s).astype(value.dtype),
        "mod_consts": dconsts,
    }
    if dbias is not None:
        bias = operands["bias"]
        out["bias"] = dbias[tuple(slice(n) for n in bias.shape)].astype(bias.dtype)
    return out


def _cut(operands: Operands, spec: FlashSpec) -> tuple[Any, tuple[jax.Array, ...], tuple[int, int]]:
    """Operands in blocks [b, h, blocks, block, d], the backward's extra ones, and (nb, nh)."""
    starts, full, total = lanes.merged_lists(operands, spec)
    cut = Cut(
        lanes.blocks(lanes.prescaled(operands["query"], spec.scale), spec.block_q),
        lanes.flat_blocks(operands["key"], spec.block_kv),
        lanes.flat_blocks(operands["value"], spec.block_kv),
        starts,
        full,
        total,
        lanes.padded_rest(operands, spec),
    )
    extra = ()
    if "d_out" in operands:
        statistics = (operands["lse"][..., None], operands["delta"][..., None])
        extra = tuple(lanes.blocks(x, spec.block_q) for x in (operands["d_out"], *statistics))
    return cut, extra, (total.shape[0], total.shape[1])


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
    cut: Cut, layout: Layout, spec: FlashSpec, kv_len: int
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Per lane: output [members, nq, bq, e] and lse [members, nq, bq, 1]."""
    _, nq, bq, _ = cut.q[0].shape
    width = cut.v[0].shape[-1]
    dtype = tilemath.accumulator_dtype(cut.q[0].dtype)
    shared = tiles.mask_is_shared(cut)

    def block(step: Any, outputs: Any) -> Any:
        step = step.astype(jnp.int32)  # int64 under x64 where the loop's length is static
        chunk, i = lax.div(step, jnp.int32(nq)), lax.rem(step, jnp.int32(nq))
        members = [layout.member(lane, chunk) for lane in range(layout.lanes)]
        queries = [tiles.block_at(q, m.place, i) for q, m in zip(cut.q, members, strict=True)]

        def tile(carry: Any, start: Any, masked: bool) -> Any:
            keep, updated = None, []
            for lane, (m, q) in enumerate(zip(members, queries, strict=True)):
                if masked and (keep is None or not shared):
                    keep = tiles.visible(cut, spec, m, i, start, kv_len, False)
                k = tiles.keys_at(cut.k[lane], m.kv_place, start, spec.span)
                v = tiles.keys_at(cut.v[lane], m.kv_place, start, spec.span)
                stages = tiles.score_stages(cut, spec, m, i, start, False)
                bias = tiles.bias_tile(cut, spec, m, i, start, False)
                raw = tiles.raw_scores(spec, q, k, False)
                scores = tiles.hide(stages(raw, bias, cut.rest["mod_consts"]), keep)
                drop = tiles.dropout(cut, spec, m, i, start, False)
                updated.append(
                    tilemath.softmax_update(carry[lane], scores, v, drop, spec.precision)
                )
            return updated

        sinks = cut.rest["sinks"]
        begin = [
            tilemath.softmax_init(bq, width, dtype, None if sinks is None else sinks[m.h])
            for m in members
        ]
        finished = tiles.walk(cut, spec, members[0], i, tile, begin)
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
    cut: Cut, extra: Any, layout: Layout, spec: FlashSpec, kv_len: int
) -> tuple[Any, ...]:
    """Per lane dq, dk, dv in blocks; then the sums dbias and dconsts over all members.

    Scores are held transposed, [keys, queries]: dk = ds q and dv = p do are then plain products,
    and dq is gathered as its transpose.
    """
    nq = cut.q[0].shape[1]
    dtype = tilemath.accumulator_dtype(cut.q[0].dtype)
    consts = cut.rest["mod_consts"]
    is_float = [jnp.issubdtype(c.dtype, jnp.floating) for c in consts]
    plain = spec.softcap is None and spec.score_mod is None and cut.rest["bias"] is None
    shared = tiles.mask_is_shared(cut)

    def block(step: Any, state: Any) -> Any:
        step = step.astype(jnp.int32)  # int64 under x64 where the loop's length is static
        chunk, i = lax.div(step, jnp.int32(nq)), lax.rem(step, jnp.int32(nq))
        members = [layout.member(lane, chunk) for lane in range(layout.lanes)]
        saved = []
        for lane, m in enumerate(members):
            q, do, lse, delta = (tiles.block_at(x[lane], m.place, i) for x in (cut.q, *extra))
            saved.append((q, do, lse.T, delta.T))

        def tile(carry: Any, start: Any, masked: bool) -> Any:
            per_lane, dbias, dconsts = carry
            keep, updated = None, []
            for lane, (m, (q, do, lse, delta)) in enumerate(zip(members, saved, strict=True)):
                dq, dk, dv = per_lane[lane]
                if masked and (keep is None or not shared):
                    keep = tiles.visible(cut, spec, m, i, start, kv_len, True)
                k = tiles.keys_at(cut.k[lane], m.kv_place, start, spec.span)
                v = tiles.keys_at(cut.v[lane], m.kv_place, start, spec.span)
                stages = tiles.score_stages(cut, spec, m, i, start, True)
                bias = tiles.bias_tile(cut, spec, m, i, start, True)
                raw = tiles.raw_scores(spec, q, k, True)
                p = tilemath.probabilities(tiles.hide(stages(raw, bias, consts), keep), lse)
                dp = tilemath.dot(v, do, (1, 1), spec.precision)
                weights = p
                drop = tiles.dropout(cut, spec, m, i, start, True)
                if drop is not None:
                    weights, dp = p * drop, dp * drop
                ds = p * (dp - delta)
                if not plain:

                    def varied(raw: Any, bias: Any, floats: Any, stages: Any = stages) -> jax.Array:
                        found = iter(floats)
                        pairs = zip(consts, is_float, strict=True)
                        return stages(raw, bias, [next(found) if f else c for c, f in pairs])

                    floats = [c for c, f in zip(consts, is_float, strict=True) if f]
                    _, pull = jax.vjp(varied, raw, bias, floats)
                    ds, d_bias, d_floats = pull(ds)
                    if dbias is not None:
                        dbias = tiles.add_array_tile(dbias, d_bias, spec, m, i, start, True)
                    pairs = zip(dconsts, d_floats, strict=True)
                    dconsts = [total + d.astype(total.dtype) for total, d in pairs]
                dk_tile = tilemath.dot(ds, q, (1, 0), spec.precision)
                if q.dtype != dtype:  # the scale is not in q
                    dk_tile = dk_tile * jnp.asarray(spec.scale, dtype)
                dv_tile = tilemath.dot(weights, do, (1, 0), spec.precision)
                updated.append(
                    (
                        dq + tilemath.dot(k, ds, (0, 0), spec.precision),
                        tiles.add_keys(dk, m.kv_place, start, dk_tile),
                        tiles.add_keys(dv, m.kv_place, start, dv_tile),
                    )
                )
            return updated, dbias, dconsts

        gradients, dbias, dconsts = state
        begin = [
            (jnp.zeros(q.T.shape, dtype), *g[1:])
            for (q, *_), g in zip(saved, gradients, strict=True)
        ]
        found, dbias, dconsts = tiles.walk(cut, spec, members[0], i, tile, (begin, dbias, dconsts))
        gradients = [
            (tiles.write(old[0], new[0].T[None, None], (m.place, i, 0, 0)), *new[1:])
            for m, old, new in zip(members, gradients, found, strict=True)
        ]
        return gradients, dbias, dconsts

    bias = cut.rest["bias"]
    empty = [
        tuple(jnp.zeros(x.shape, dtype) for x in arrays)
        for arrays in zip(cut.q, cut.k, cut.v, strict=True)
    ]
    dconsts = [jnp.zeros(c.shape, dtype) for c, f in zip(consts, is_float, strict=True) if f]
    state = (empty, None if bias is None else jnp.zeros(bias.shape, dtype), dconsts)
    steps = jnp.int32(layout.steps * nq)
    gradients, dbias, dconsts = lax.fori_loop(jnp.int32(0), steps, block, state)
    dq, dk, dv = (list(x) for x in zip(*gradients, strict=True))
    return dq, dk, dv, dbias, dconsts
