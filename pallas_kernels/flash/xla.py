"""Block-sparse attention in plain XLA: the body for CPUs, and the fallback everywhere else.

Forward: per block of queries an online softmax over the listed key blocks only. Backward: the same walk
once more, recomputing the scores of a tile from the saved lse and adding to dq, dk and dv, so memory is
O(T) and the order of every sum is fixed. Two forms of the same tile code:

- one device: a loop over (batch row, head, query block) keeps a tile in the processor's cache; a few
  heads run side by side in one step, because XLA for CPUs overlaps independent products of that size;
- several devices, or under vmap: batch and heads stay vectorized axes, so that a partitioner can shard
  them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tilemath
from pallas_kernels.flash.spec import FlashSpec

Operands = dict[str, Any]
UNROLL = 4
"""Heads that run side by side in one step on a CPU; measured on 2 cores, where 1 is 1.3x slower."""


class Member(NamedTuple):
    """One (batch row, head): its indices, and its places in the arrays below."""

    b: Any
    h: Any
    place: Any
    kv_place: Any


class Arrays(NamedTuple):
    """Operands cut into blocks; n (batch row, head) pairs, n' (batch row, kv head) pairs."""

    q: jax.Array  # [n, nq, bq, d], scaled
    k: jax.Array  # [n', nk, bk, d]
    v: jax.Array  # [n', nk, bk, e]
    cols: jax.Array  # [nb, nh, nq, width]: FULL blocks first, then PARTIAL ones
    full: jax.Array  # [nb, nh, nq]
    total: jax.Array  # [nb, nh, nq]
    rest: Operands  # mask, mask_array, bias, sinks, seed, q_offset, mod_consts


def forward(operands: Operands, spec: FlashSpec, num_devices: int) -> tuple[jax.Array, jax.Array]:
    """Output [b, t, h, e] and natural-log lse [b, t, h]."""
    query, value = operands["query"], operands["value"]
    b, t, h, _ = query.shape
    run = functools.partial(_forward_members, spec=spec, kv_len=value.shape[1])
    arrays = _cut(operands, spec)
    if num_devices == 1:
        o, lse = run(arrays, *_chunks(arrays, b, h, value.shape[2]))
    else:
        o, lse = _vectorized(run, arrays, b, h, value.shape[2], outputs="member")
    o = _join(o, b, h, t).astype(query.dtype)
    return o, _join(lse[..., None], b, h, t)[..., 0]


def backward(operands: Operands, spec: FlashSpec, num_devices: int) -> dict[str, jax.Array]:
    """Gradients for "query", "key", "value", and for "bias" and "mod_consts" where there are any.

    Operands are those of `forward` with "out" [b, t, h, e] cotangent "d_out", "lse" and "delta"
    [b, t, h] = rowsum(out * d_out) - d_lse.
    """
    query, key, value = operands["query"], operands["key"], operands["value"]
    b, t, h, _ = query.shape
    g = value.shape[2]
    arrays = _cut(operands, spec)
    extra = (
        _blocks(operands["d_out"], spec.block_q),
        _blocks(operands["lse"][..., None], spec.block_q),
        _blocks(operands["delta"][..., None], spec.block_q),
    )
    run = functools.partial(_backward_members, spec=spec, kv_len=value.shape[1])
    if num_devices == 1:
        grads = run(arrays, *_chunks(arrays, b, h, g), extra)
    else:
        grads = _vectorized(run, arrays, b, h, g, outputs="grads", extra=extra)
    dq, dk, dv, dbias, dconsts = grads
    out = {
        "query": (_join(dq, b, h, t) * jnp.asarray(spec.scale, dq.dtype)).astype(query.dtype),
        "key": _join(dk, b, g, key.shape[1]).astype(key.dtype),
        "value": _join(dv, b, g, key.shape[1]).astype(value.dtype),
    }
    if dbias is not None:
        bias = operands["bias"]
        out["bias"] = dbias[tuple(slice(n) for n in bias.shape)].astype(bias.dtype)
    out["mod_consts"] = dconsts
    return out


# ---- cutting into blocks -------------------------------------------------------------------------


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """[b, t, h, d] -> [b * h, blocks, block, d], zeros behind the end."""
    b, t, h, d = x.shape
    n = -(-t // block)
    x = jnp.pad(x, ((0, 0), (0, n * block - t), (0, 0), (0, 0)))
    return x.transpose(0, 2, 1, 3).reshape(b * h, n, block, d)


def _join(x: jax.Array, b: int, h: int, t: int) -> jax.Array:
    """The inverse of `_blocks`."""
    return x.reshape(b, h, -1, x.shape[-1])[:, :, :t].transpose(0, 2, 1, 3)


def _pad_array(x: jax.Array | None, block_q: int, block_kv: int) -> jax.Array | None:
    """Pads the token axes of a [b|1, h|1, t|1, s|1] array to whole blocks."""
    if x is None:
        return None
    pads = [(0, -n % block if n > 1 else 0) for n, block in zip(x.shape[2:], (block_q, block_kv), strict=True)]
    return jnp.pad(x, ((0, 0), (0, 0), *pads))


def _cut(operands: Operands, spec: FlashSpec) -> Arrays:
    lists = operands["lists"]
    query = operands["query"]
    dtype = tilemath.accumulator_dtype(query.dtype)
    # scaling q costs t d instead of t s products; in low precision the scores are scaled instead
    prescaled = query * jnp.asarray(spec.scale, dtype) if query.dtype == dtype else query
    width = -(-spec.max_blocks // spec.group) * spec.group
    place = jnp.arange(width, dtype=jnp.int32).reshape(1, 1, 1, -1)
    full, partial = jnp.asarray(lists.full_count), jnp.asarray(lists.partial_count)
    behind = jnp.clip(place - full[..., None], 0, lists.partial_cols.shape[-1] - 1)
    cols = jnp.where(
        place < full[..., None],
        jnp.take_along_axis(
            jnp.asarray(lists.full_cols), jnp.minimum(place, lists.full_cols.shape[-1] - 1), axis=-1
        ),
        jnp.take_along_axis(jnp.asarray(lists.partial_cols), behind, axis=-1),
    )
    rest = {name: operands[name] for name in ("mask", "sinks", "seed", "q_offset", "mod_consts")}
    rest["bias"] = _pad_array(operands["bias"], spec.block_q, spec.block_kv)
    rest["mask_array"] = _pad_array(operands["mask_array"], spec.block_q, spec.block_kv)
    return Arrays(
        _blocks(prescaled, spec.block_q),
        _blocks(operands["key"], spec.block_kv),
        _blocks(operands["value"], spec.block_kv),
        cols,
        full,
        full + partial,
        rest,
    )


# ---- members: which (batch row, head) a step works on -----------------------------------------------


def _chunks(arrays: Arrays, b: int, h: int, g: int) -> tuple[int, Callable[[Any], list[Member]]]:
    """Number of steps over members and the members of each, UNROLL at most that share a list."""
    nb, nh = arrays.total.shape[:2]
    shared = (h if nh == 1 else 1) * (b if nb == 1 and nh == 1 else 1)
    unroll = max(u for u in range(1, UNROLL + 1) if shared % u == 0)
    ratio = h // g

    def members(chunk: Any) -> list[Member]:
        out = []
        for i in range(unroll):
            place = chunk * unroll + i
            row, head = lax.div(place, jnp.int32(h)), lax.rem(place, jnp.int32(h))
            out.append(Member(row, head, place, row * g + lax.div(head, jnp.int32(ratio))))
        return out

    return b * h // unroll, members


def _vectorized(
    run: Callable[..., Any], arrays: Arrays, b: int, h: int, g: int, *, outputs: str, extra: Any = ()
) -> Any:
    """Runs one member with vmap over batch and heads, each its own axis."""
    nb, nh = arrays.total.shape[:2]
    ratio = h // g

    def split(x: jax.Array, heads: int) -> jax.Array:
        return x.reshape(b, heads, 1, *x.shape[1:])

    q, extra = split(arrays.q, h), tuple(split(x, h) for x in extra)
    k, v = (jnp.repeat(split(x, g), ratio, axis=1) for x in (arrays.k, arrays.v))
    list_axis = (0 if nb > 1 else None, 0 if nh > 1 else None)

    def one(q: Any, k: Any, v: Any, lists: Any, extra: Any, row: Any, head: Any) -> Any:
        local = Arrays(q, k, v, *(x.reshape(1, 1, *x.shape[-n:]) for x, n in zip(lists, (2, 1, 1), strict=True)), arrays.rest)
        zero = jnp.int32(0)
        only = [Member(row, head, zero, zero)]
        return run(local, 1, lambda _: only, *([extra] if extra else []))

    lists = (arrays.cols, arrays.full, arrays.total)
    lists = tuple(x if nb > 1 else x[0] for x in lists)
    lists = tuple(x if nh > 1 else x[(slice(None),) * (nb > 1) + (0,)] for x in lists)
    over_heads = jax.vmap(one, in_axes=(0, 0, 0, list_axis[1], 0, None, 0))
    over_batch = jax.vmap(over_heads, in_axes=(0, 0, 0, list_axis[0], 0, 0, None))
    out = over_batch(
        q, k, v, lists, extra, jnp.arange(b, dtype=jnp.int32), jnp.arange(h, dtype=jnp.int32)
    )
    if outputs == "member":
        return jax.tree.map(lambda x: x.reshape(b * h, *x.shape[3:]), out)
    dq, dk, dv, dbias, dconsts = out
    dk, dv = (x.reshape(b, g, ratio, *x.shape[3:]).sum(2) for x in (dk, dv))
    dbias, dconsts = jax.tree.map(lambda x: x.sum((0, 1)), (dbias, dconsts))
    return dq, dk, dv, dbias, dconsts


def _slice(x: jax.Array, start: tuple[Any, ...], sizes: tuple[int, ...]) -> jax.Array:
    return lax.dynamic_slice(x, [jnp.asarray(n, jnp.int32) for n in start], sizes)


def _update(x: jax.Array, update: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    return lax.dynamic_update_slice(x, update, [jnp.asarray(n, jnp.int32) for n in start])


# ---- the walk over tiles ------------------------------------------------------------------------------


def _row(arrays: Arrays, member: Member, i: Any) -> tuple[Any, Any, Any]:
    """(cols [width], number of FULL blocks, number of blocks) of query block i."""
    nb, nh = arrays.total.shape[:2]
    b, h = (member.b if nb > 1 else 0), (member.h if nh > 1 else 0)
    return arrays.cols[b, h, i], arrays.full[b, h, i], arrays.total[b, h, i]


def _walk(
    arrays: Arrays,
    spec: FlashSpec,
    member: Member,
    i: Any,
    step: Callable[[Any, Any, Any, Any], Any],
    carry: Any,
) -> Any:
    """`carry = step(carry, cols [group], masked, live [group])` over the listed key blocks of row i.

    The leading groups that hold FULL blocks alone skip the mask; `live` marks entries that are not
    padding of the list.
    """
    cols, full, total = _row(arrays, member, i)
    size = spec.group

    def at(j: Any) -> tuple[Any, Any]:
        entries = j * size + jnp.arange(size, dtype=jnp.int32)
        return lax.dynamic_slice_in_dim(cols, j * size, size), entries < total

    free = lax.div(full, jnp.int32(size))
    if spec.any_full:
        carry = lax.fori_loop(jnp.int32(0), free, lambda j, c: step(c, at(j)[0], False, None), carry)
    if spec.any_partial or size > 1:
        count = lax.div(total + jnp.int32(size - 1), jnp.int32(size))
        start = free if spec.any_full else jnp.zeros_like(free)
        carry = lax.fori_loop(start, count, lambda j, c: step(c, at(j)[0], True, at(j)[1]), carry)
    return carry


def _take(x: jax.Array, place: Any, cols: Any, group: int) -> jax.Array:
    """Blocks `cols` of member `place`, one below the other: [group * block, width]."""
    tiles = [
        _slice(x, (place, cols[c], 0, 0), (1, 1, *x.shape[2:]))[0, 0] for c in range(group)
    ]
    return tiles[0] if group == 1 else jnp.concatenate(tiles, axis=0)


def _indices(arrays: Arrays, spec: FlashSpec, member: Member, i: Any, cols: Any) -> tuple[Any, Any]:
    """Absolute indices of the queries [bq, 1] and keys [1, group * bk] of a step."""
    offset = arrays.rest["q_offset"]
    offset = offset[member.b] if offset.shape[0] > 1 else offset[0]
    q = lax.broadcasted_iota(jnp.int32, (spec.block_q, 1), 0) + (i * spec.block_q + offset)
    k = lax.broadcasted_iota(jnp.int32, (spec.group, spec.block_kv), 1)
    k = k + (cols * spec.block_kv).reshape(-1, 1)
    return q, k.reshape(1, -1)


def _array_tile(x: jax.Array, spec: FlashSpec, member: Member, i: Any, cols: Any) -> jax.Array:
    """The tile of a padded [b|1, h|1, t|1, s|1] array that a step needs, [bq|1, group * bk|1]."""
    b, h = (n if size > 1 else 0 for n, size in zip(member[:2], x.shape[:2], strict=True))
    rows = spec.block_q if x.shape[2] > 1 else 1
    r = i * spec.block_q if x.shape[2] > 1 else 0
    if x.shape[3] == 1:
        return _slice(x, (b, h, r, 0), (1, 1, rows, 1))[0, 0]
    tiles = [
        _slice(x, (b, h, r, cols[c] * spec.block_kv), (1, 1, rows, spec.block_kv))[0, 0]
        for c in range(spec.group)
    ]
    return jnp.concatenate(tiles, axis=1)


def _transform(
    spec: FlashSpec, member: Member, q: Any, k: Any
) -> Callable[[jax.Array, Any, Any], jax.Array] | None:
    """`(raw scores, bias tile, mod_consts) -> scores` before the mask, or None where it is identity."""

    def apply(scores: jax.Array, bias: Any, consts: Any) -> jax.Array:
        if bias is not None:
            scores = scores + bias.astype(scores.dtype)
        if spec.softcap is not None:
            cap = jnp.asarray(spec.softcap, scores.dtype)
            scores = cap * jnp.tanh(scores / cap)
        if spec.score_mod is not None:
            scores = spec.score_mod(consts, scores, member.b, member.h, q, k).astype(scores.dtype)
        return scores

    return apply


def _raw_scores(spec: FlashSpec, q: jax.Array, k: jax.Array) -> jax.Array:
    scores = tilemath.dot(q, k, (1, 1), spec.precision)
    if q.dtype != scores.dtype:
        scores = scores * jnp.asarray(spec.scale, scores.dtype)
    return scores


def _visible(
    arrays: Arrays, spec: FlashSpec, member: Member, i: Any, cols: Any, live: Any, q: Any, k: Any, kv_len: int
) -> jax.Array:
    """Booleans [bq, group * bk] of a step that needs its mask."""
    keep = k < kv_len
    if spec.group > 1:
        keep = keep & jnp.repeat(live, spec.block_kv).reshape(1, -1)
    if arrays.rest["mask"] is not None:
        keep = keep & arrays.rest["mask"].predicate(member.b, member.h, q, k)
    if arrays.rest["mask_array"] is not None:
        keep = keep & _array_tile(arrays.rest["mask_array"], spec, member, i, cols)
    return keep


def _scores(
    arrays: Arrays, spec: FlashSpec, member: Member, i: Any, cols: Any, keep: Any, raw: jax.Array, q: Any, k: Any
) -> tuple[jax.Array, Any]:
    """Masked scores of a step, and the bias tile they used."""
    bias = arrays.rest["bias"]
    bias = None if bias is None else _array_tile(bias, spec, member, i, cols)
    scores = _transform(spec, member, q, k)(raw, bias, arrays.rest["mod_consts"])
    if keep is not None:
        scores = jnp.where(keep, scores, jnp.full_like(scores, -jnp.inf))
    return scores, bias


def _forward_members(
    arrays: Arrays, chunks: int, members: Callable[[Any], list[Member]], *, spec: FlashSpec, kv_len: int
) -> tuple[jax.Array, jax.Array]:
    n, nq, bq, _ = arrays.q.shape
    width = arrays.v.shape[-1]
    dtype = tilemath.accumulator_dtype(arrays.q.dtype)

    def block(step: Any, out: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chunk, i = lax.div(step, jnp.int32(nq)), lax.rem(step, jnp.int32(nq))
        group = members(chunk)
        queries = [_slice(arrays.q, (m.place, i, 0, 0), (1, 1, *arrays.q.shape[2:]))[0, 0] for m in group]

        def tile(carry: list[Any], cols: Any, masked: bool, live: Any) -> list[Any]:
            # members share their list, so one mask serves all that it does not tell apart
            keep, updated = None, []
            for m, q, c in zip(group, queries, carry, strict=True):
                qi, ki = _indices(arrays, spec, m, i, cols)
                if masked and (keep is None or not _mask_is_shared(arrays)):
                    keep = _visible(arrays, spec, m, i, cols, live, qi, ki, kv_len)
                raw = _raw_scores(spec, q, _take(arrays.k, m.kv_place, cols, spec.group))
                scores, _ = _scores(arrays, spec, m, i, cols, keep, raw, qi, ki)
                drop = _dropout(arrays, spec, m, qi, ki)
                v = _take(arrays.v, m.kv_place, cols, spec.group)
                updated.append(tilemath.softmax_update(c, scores, v, drop, spec.precision))
            return updated

        sinks = arrays.rest["sinks"]
        start = [
            tilemath.softmax_init(bq, width, dtype, None if sinks is None else sinks[m.h]) for m in group
        ]
        o, lse = out
        for m, carry in zip(group, _walk(arrays, spec, group[0], i, tile, start), strict=True):
            block_o, block_lse = tilemath.softmax_finish(carry)
            o = _update(o, block_o[None, None], (m.place, i, 0, 0))
            lse = _update(lse, block_lse[None, None], (m.place, i, 0))
        return o, lse

    out = jnp.zeros((n, nq, bq, width), dtype), jnp.zeros((n, nq, bq), dtype)
    return lax.fori_loop(jnp.int32(0), jnp.int32(chunks * nq), block, out)


def _mask_is_shared(arrays: Arrays) -> bool:
    """Whether one mask tile serves every member of a step."""
    mask, array = arrays.rest["mask"], arrays.rest["mask_array"]
    heads = (mask is None or mask.num_heads is None) and (array is None or array.shape[1] == 1)
    rows = (mask is None or mask.batch_size is None) and (array is None or array.shape[0] == 1)
    return heads and rows and arrays.rest["q_offset"].shape[0] == 1


def _dropout(arrays: Arrays, spec: FlashSpec, member: Member, q: Any, k: Any) -> jax.Array | None:
    if spec.dropout_rate == 0.0:
        return None
    factors = tilemath.dropout_factors(
        arrays.rest["seed"], member.b, member.h, q, k, spec.dropout_rate
    )
    return factors.astype(tilemath.accumulator_dtype(arrays.q.dtype))


def _backward_members(
    arrays: Arrays,
    chunks: int,
    members: Callable[[Any], list[Member]],
    extra: tuple[jax.Array, jax.Array, jax.Array],
    *,
    spec: FlashSpec,
    kv_len: int,
) -> tuple[Any, ...]:
    nq = arrays.q.shape[1]
    dtype = tilemath.accumulator_dtype(arrays.q.dtype)
    consts = arrays.rest["mod_consts"]
    floats = [jnp.issubdtype(c.dtype, jnp.floating) for c in consts]
    plain = spec.softcap is None and spec.score_mod is None and arrays.rest["bias"] is None

    def pick(x: jax.Array, m: Member, i: Any) -> jax.Array:
        return _slice(x, (m.place, i, 0, 0), (1, 1, *x.shape[2:]))[0, 0]

    def add(x: jax.Array, m: Member, cols: Any, update: jax.Array) -> jax.Array:
        for c in range(spec.group):
            at = (m.kv_place, cols[c], 0, 0)
            piece = update[c * spec.block_kv : (c + 1) * spec.block_kv]
            old = _slice(x, at, (1, 1, *x.shape[2:]))
            x = _update(x, old + piece[None, None], at)
        return x

    def block(step: Any, out: tuple[Any, ...]) -> tuple[Any, ...]:
        chunk, i = lax.div(step, jnp.int32(nq)), lax.rem(step, jnp.int32(nq))
        group = members(chunk)
        queries = [pick(arrays.q, m, i) for m in group]
        saved = [tuple(pick(x, m, i) for x in extra) for m in group]

        def tile(carry: Any, cols: Any, masked: bool, live: Any) -> Any:
            dqs, dk, dv, dbias, dconsts = carry
            keep, new = None, []
            for m, q, (do, lse, delta), dq in zip(group, queries, saved, dqs, strict=True):
                qi, ki = _indices(arrays, spec, m, i, cols)
                if masked and (keep is None or not _mask_is_shared(arrays)):
                    keep = _visible(arrays, spec, m, i, cols, live, qi, ki, kv_len)
                k = _take(arrays.k, m.kv_place, cols, spec.group)
                v = _take(arrays.v, m.kv_place, cols, spec.group)
                raw = _raw_scores(spec, q, k)
                scores, bias = _scores(arrays, spec, m, i, cols, keep, raw, qi, ki)
                p = tilemath.probabilities(scores, lse)
                dp = tilemath.dot(do, v, (1, 1), spec.precision)
                drop = _dropout(arrays, spec, m, qi, ki)
                weights = p if drop is None else p * drop
                dp = dp if drop is None else dp * drop
                ds = p * (dp - delta)
                if not plain:
                    apply = _transform(spec, m, qi, ki)
                    varied = [c for c, f in zip(consts, floats, strict=True) if f]

                    def at_scores(raw: Any, bias: Any, varied: Any, apply: Any = apply) -> jax.Array:
                        source = iter(varied)
                        return apply(raw, bias, [next(source) if f else c for c, f in zip(consts, floats, strict=True)])

                    _, pull = jax.vjp(at_scores, raw, bias, varied)
                    ds, d_tile, d_varied = pull(ds)
                    if bias is not None:
                        dbias = _add_array(dbias, d_tile, spec, m, i, cols)
                    dconsts = [a + d.astype(a.dtype) for a, d in zip(dconsts, d_varied, strict=True)]
                new.append(dq + tilemath.dot(ds, k, (1, 0), spec.precision))
                dk_tile = tilemath.dot(ds, q, (0, 0), spec.precision)
                if q.dtype != dtype:  # q was not scaled beforehand
                    dk_tile = dk_tile * jnp.asarray(spec.scale, dtype)
                dk = add(dk, m, cols, dk_tile)
                dv = add(dv, m, cols, tilemath.dot(weights, do, (0, 0), spec.precision))
            return new, dk, dv, dbias, dconsts

        dq_all, *sums = out
        start = ([jnp.zeros(q.shape, dtype) for q in queries], *sums)
        dqs, *sums = _walk(arrays, spec, group[0], i, tile, start)
        for m, dq in zip(group, dqs, strict=True):
            dq_all = _update(dq_all, dq[None, None], (m.place, i, 0, 0))
        return (dq_all, *sums)

    bias = arrays.rest["bias"]
    out = (
        jnp.zeros(arrays.q.shape, dtype),
        jnp.zeros(arrays.k.shape, dtype),
        jnp.zeros(arrays.v.shape, dtype),
        None if bias is None else jnp.zeros(bias.shape, dtype),
        [jnp.zeros(c.shape, dtype) for c, f in zip(consts, floats, strict=True) if f],
    )
    return lax.fori_loop(jnp.int32(0), jnp.int32(chunks * nq), block, out)


def _add_array(
    total: jax.Array, tile: jax.Array, spec: FlashSpec, member: Member, i: Any, cols: Any
) -> jax.Array:
    """Adds the gradient of one step's bias tile where `_array_tile` read it."""
    b, h = (n if size > 1 else 0 for n, size in zip(member[:2], total.shape[:2], strict=True))
    r = i * spec.block_q if total.shape[2] > 1 else 0
    tile = tile.astype(total.dtype)
    pieces = [(0, tile)]
    if total.shape[3] > 1:
        pieces = [
            (cols[c] * spec.block_kv, tile[:, c * spec.block_kv : (c + 1) * spec.block_kv])
            for c in range(spec.group)
        ]
    for column, piece in pieces:
        old = _slice(total, (b, h, r, column), (1, 1, *piece.shape))
        total = _update(total, old + piece[None, None], (b, h, r, column))
    return total
