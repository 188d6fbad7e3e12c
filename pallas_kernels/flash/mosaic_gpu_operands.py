"""Operands of the Hopper kernels: padded arrays, block lists, looked-up arrays; and gradients back.

Queries and keys are padded with zeros to whole tiles, heads to multiples of 64 columns. A padded
key is hidden by its tile being PARTIAL; the results of a padded query are cut off, and in the
backward pass its lse of +inf makes its probabilities 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blocklist import BlockList, block_list_from_map
from pallas_kernels.flash.lists import make_lists
from pallas_kernels.flash.mosaic_gpu_plan import Call, Tiling, merge_lists
from pallas_kernels.flash.mosaic_gpu_scores import LOG2E, Lookup, Scores
from pallas_kernels.flash.spec import FlashSpec
from pallas_kernels.maskprogram import PARTIAL

Operands = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A call and its arrays by the names that the kernels use."""

    call: Call
    tiling: Tiling
    arrays: dict[str, jax.Array]


def prepare(operands: Operands, spec: FlashSpec, tiling: Tiling, *, transposed: bool) -> Prepared:
    """Pads the operands for a tiling and makes its lists.

    Args:
      operands, spec: of the call.
      tiling: its rows are queries, or keys if `transposed`.
      transposed: for dk and dv.
    """
    query, key, value = (operands[n] for n in ("query", "key", "value"))
    (b, q_len, h, d), (_, kv_len, g, _), e = query.shape, key.shape, value.shape[-1]
    block_q, block_kv = tiling.rows, tiling.columns
    if transposed:
        block_q, block_kv = block_kv, block_q
    t, s = -(-q_len // block_q) * block_q, -(-kv_len // block_kv) * block_kv
    d, e = -(-d // 64) * 64, -(-e // 64) * 64

    lists = make_lists(operands, spec, block_q, block_kv)
    if transposed:
        lists = _transposed(lists)
    counts, columns = merge_lists(lists)
    lookups, arrays = _lookups(operands, spec, t, s, transposed)
    scores = Scores(
        spec, lookups, q_len, kv_len, bound_rows=transposed and t != q_len,
        bound_keys=s != kv_len, transposed=transposed,
    )  # fmt: skip
    offsets = None if spec.q_offset is not None else operands["q_offset"].shape[0]
    call = Call(
        b, t, s, h, g, d, e, query.dtype, scores,
        sinks=operands["sinks"] is not None,
        lists_per_row=counts.shape[0] > 1, lists_per_head=counts.shape[1] > 1,
        any_full=not _empty(lists.full_count), any_partial=not _empty(lists.partial_count),
        offsets=offsets,
    )  # fmt: skip
    arrays |= {"counts": counts, "columns": columns}
    arrays |= {"query": _pad(query, t, d), "key": _pad(key, s, d), "value": _pad(value, s, e)}
    if "d_out" in operands:
        lse = operands["lse"].astype(jnp.float32)
        infinite = jnp.full_like(lse, jnp.inf)
        arrays["lse"] = _by_head(jnp.where(lse == -jnp.inf, infinite, lse * LOG2E), t, jnp.inf)
        arrays["delta"] = _by_head(operands["delta"].astype(jnp.float32), t, 0.0)
        arrays["d_out"] = _pad(operands["d_out"].astype(query.dtype), t, e)
    elif call.sinks:
        arrays["sinks"] = operands["sinks"].astype(jnp.float32)
    if spec.dropout_rate:
        arrays["seed"] = operands["seed"]
    if offsets is not None:
        arrays["q_offset"] = operands["q_offset"].astype(jnp.int32)
    return Prepared(call, tiling, arrays)


def unpad(x: jax.Array, like: jax.Array) -> jax.Array:
    """The part of a padded gradient that belongs to an operand."""
    return x[:, : like.shape[1], :, : like.shape[3]].astype(like.dtype)


def collect(
    found: dict[str, jax.Array], operands: Operands, spec: FlashSpec, queries: Prepared
) -> dict[str, Any]:
    """Gradients of "bias" and "score_reads" from the kernels' row sums [b, h, t or s].

    Args:
      found: results of the kernels.
      operands, spec: of the call.
      queries: what the kernel of dq was given.
    """
    scores = queries.call.scores

    def gradient(name: str, shape: tuple[int, ...]) -> jax.Array:
        x = next(x for x in scores.lookups if x.name == name)
        axes = tuple(i for i, n in enumerate((x.per_row, x.per_head)) if not n)
        if x.kind == "pair":
            tiles = _visited(found["d_" + name], queries)
            return tiles[:, :, : shape[2], : shape[3]].sum(axis=axes, keepdims=True)
        sums = found["d_" + name][:, :, : scores.kv_len if x.kind == "key" else scores.q_len]
        if x.kind == "scalar":
            sums = sums.sum(axis=2)
        return sums.sum(axis=axes, keepdims=True).reshape(shape)

    reads: list[Any] = [
        gradient(f"score_read{i}", x.shape) if is_float else None
        for i, (x, is_float) in enumerate(
            zip(
                operands["score_reads"],
                spec.score_mod.is_float if spec.score_mod is not None else (),
                strict=True,
            )
        )
    ]
    out: dict[str, Any] = {"score_reads": reads}
    bias = operands["bias"]
    if bias is not None:
        out["bias"] = gradient("bias", bias.shape).astype(bias.dtype)
    return out


def _visited(x: jax.Array, queries: Prepared) -> jax.Array:
    """An array [b, h, t, s] that was written tile by tile, with 0 in the tiles that were not."""
    counts, columns = queries.arrays["counts"], queries.arrays["columns"]
    rows, width = queries.tiling.rows, queries.tiling.columns
    place = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 3)
    listed = place < counts[..., 1:]
    blocks = jnp.arange(x.shape[3] // width, dtype=jnp.int32)
    # [nb, nh, rows, listed, 1] against the blocks: which of them some entry names
    named = (columns[..., None] == blocks.reshape(1, 1, 1, 1, -1)) & listed[..., None]
    seen = named.any(axis=3)[:, :, :, None, :, None]
    tiles = x.reshape(*x.shape[:2], -1, rows, x.shape[3] // width, width)
    return jnp.where(seen, tiles, jnp.zeros_like(tiles)).reshape(x.shape)


def _transposed(lists: BlockList) -> BlockList:
    """Lists by key block. Tiles with padded queries become PARTIAL: their scores may be NaN."""
    if lists.q_len % lists.block_q == 0:
        return lists.transpose()
    classes = lists.class_map().swapaxes(-1, -2)
    xp: Any = np if lists.is_static else jnp
    cap = xp.full((classes.shape[-1],), 127, xp.int8)
    last = xp.arange(classes.shape[-1]) == classes.shape[-1] - 1
    cap = xp.where(last, xp.int8(PARTIAL), cap)
    return block_list_from_map(
        xp.minimum(classes, cap.reshape(1, 1, 1, -1)), lists.q_len, lists.kv_len,
        block_q=lists.block_q, block_kv=lists.block_kv, transposed=True,
    )  # fmt: skip


def _empty(count: Any) -> bool:
    """Whether it is known that there is no tile."""
    return isinstance(count, np.ndarray) and not count.any()


def _pad(x: jax.Array, length: int, width: int) -> jax.Array:
    """[b, n, h, w] -> [b, length, h, width], zeros behind the ends."""
    return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, width - x.shape[3])))


def _by_head(x: jax.Array, length: int, fill: float) -> jax.Array:
    """[b, t, h] -> [b, h, length]."""
    pads = ((0, 0), (0, 0), (0, length - x.shape[1]))
    return jnp.pad(x.transpose(0, 2, 1), pads, constant_values=fill)


def _lookups(
    operands: Operands, spec: FlashSpec, t: int, s: int, transposed: bool
) -> tuple[tuple[Lookup, ...], dict[str, jax.Array]]:
    """Everything that scores look up, with its arrays padded to whole tiles."""
    lookups: list[Lookup] = []
    arrays: dict[str, jax.Array] = {}

    def add(name: str, kind: str, x: jax.Array, gradient: bool) -> None:
        if kind in ("query", "key"):
            # the last entry goes on, so that functions see nothing that they cannot see otherwise
            length = {"query": t, "key": s}[kind]
            x = jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])), mode="edge")
        arrays[name] = x
        lookups.append(Lookup(name, kind, x.shape[0] > 1, x.shape[1] > 1, x.dtype, gradient))

    for prefix, program, values in (
        ("mask_read", spec.predicate, operands["mask_reads"]),
        ("score_read", spec.score_mod, operands["score_reads"]),
    ):
        if program is None:
            continue
        for i, (kind, is_float, x) in enumerate(
            zip(program.kinds, program.is_float, values, strict=True)
        ):
            add(f"{prefix}{i}", kind, x, is_float and prefix == "score_read")
    for name, dtype in (("bias", jnp.float32), ("mask_array", jnp.int32)):
        x = operands[name]
        if x is None:
            continue
        if x.shape[2] > 1 and x.shape[3] > 1:
            x = x.astype(jnp.int8) if name == "mask_array" else x
            x = jnp.pad(x, ((0, 0), (0, 0), (0, t - x.shape[2]), (0, s - x.shape[3])))
            add(name, "pair", x.swapaxes(2, 3) if transposed else x, name == "bias")
            continue
        kind = "query" if x.shape[2] > 1 else "key" if x.shape[3] > 1 else "scalar"
        shape = x.shape[:2] if kind == "scalar" else (*x.shape[:2], x.shape[2] * x.shape[3])
        add(name, kind, x.astype(dtype).reshape(shape), name == "bias")
    return tuple(lookups), arrays
