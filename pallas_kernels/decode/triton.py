"""Decode attention on NVIDIA GPUs from sm80 on: the keys of a row split over multiprocessors.

One program for each (row b, key/value head g, tile of its queries, part n). It walks the blocks of
its part, reading nothing else, and writes an unnormalized partial softmax; XLA merges the parts.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.decode import rows
from pallas_kernels.decode.pages import block_address
from pallas_kernels.decode.spec import Chosen, DecodeSpec, Sizes, config_of, sizes_of
from pallas_kernels.dispatch import Target, Unsupported
from pallas_kernels.flash.gpu_arch import require_capability

MOST_WIDTH = 256
"""Widest head: a block of keys and the accumulator must fit registers and shared memory."""

TILE_ROWS = (16, 64)
"""Fewest rows that a matrix product takes, and most that one program holds."""


def forward(operands: dict[str, Any], spec: DecodeSpec, target: Target) -> Any:
    """(o [b, t, h, e], lse [b, t, h]); see the module.

    Raises:
      Unsupported: before sm80, for float64, for wide heads, for pages that are no power of two.
    """
    sizes = sizes_of(operands)
    if not target.interpret:
        require_capability(target, (8, 0), "decode with Triton")
    _check(operands, sizes)
    config = config_of("triton", operands, spec, target)
    block = config.block_kv
    if block < 16 or block & (block - 1):
        raise Unsupported(
            f"decode on GPU: blocks or pages of {block} tokens are no power of two from 16 on; use "
            "such a size or the XLA body."
        )
    packed = {n: rows.pack_rows(operands[n], sizes.g) for n in ("starts", "ends")}
    first, count, _ = rows.block_plan(packed["starts"], packed["ends"], block, config.num_splits)
    plan = jnp.stack([first, count], axis=-1)  # [b, g, n, 2]
    query = rows.pack_rows(operands["query"].transpose(0, 2, 1, 3), sizes.g)
    acc, top, total = _call(
        [query, operands["key"], operands["value"], packed["starts"], packed["ends"], plan],
        (operands["page_table"], rows.score_terms(operands, jnp.float32)),
        sizes, spec, config, target.interpret,
    )  # fmt: skip
    return rows.merge_splits(acc, top, total, operands["sinks"], operands["query"])


def _check(operands: dict[str, Any], sizes: Sizes) -> None:
    if operands["query"].dtype == jnp.float64:
        raise Unsupported("decode on GPU: float64 has no kernel; use float32 or the XLA body.")
    if max(sizes.d, sizes.e) > MOST_WIDTH:
        raise Unsupported(
            f"decode on GPU: heads of width {max(sizes.d, sizes.e)} are wider than {MOST_WIDTH}; "
            "use the XLA body."
        )


def _call(
    inputs: list[jax.Array],
    optional: tuple[jax.Array | None, jax.Array | None],
    sizes: Sizes,
    spec: DecodeSpec,
    config: Chosen,
    interpret: bool,
) -> Any:
    """Partial softmaxes: acc [b, g, n, rows, e], m and l [b, g, n, rows]."""
    tile = min(max(pl.next_power_of_2(sizes.rows), TILE_ROWS[0]), TILE_ROWS[1])
    parts = inputs[-1].shape[2]
    kernel = functools.partial(
        _kernel, sizes=sizes, spec=spec, block=config.block_kv, parts=parts, tile=tile,
        given=(optional[0] is not None, optional[1] is not None),
    )  # fmt: skip
    lead = (sizes.b, sizes.g, parts, sizes.rows)
    call = compat.triton_call(
        kernel,
        [jax.ShapeDtypeStruct(x, jnp.float32) for x in ((*lead, sizes.e), lead, lead)],
        parts * pl.cdiv(sizes.rows, tile) * sizes.g * sizes.b,
        name="decode_attention",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        interpret=interpret,
    )
    return call(*inputs, *(x for x in optional if x is not None))


def _kernel(*refs: Any, sizes: Sizes, spec: DecodeSpec, block: int, parts: int, tile: int,
            given: tuple[bool, bool]) -> None:  # fmt: skip
    plgpu = compat.triton()
    query, key, value, starts, ends, plan, *rest = refs
    table = rest[0] if given[0] else None
    terms = rest[-4] if given[1] else None
    acc_out, top_out, total_out = rest[-3:]
    b, head, row_tile, part = _program(sizes.g, pl.cdiv(sizes.rows, tile), parts)
    row = row_tile * tile + jnp.arange(tile, dtype=jnp.int32)
    real = row < sizes.rows
    q = _load(query, (b, head, row[:, None]), sizes.d, real)
    start = plgpu.load(starts.at[b, head, row], mask=real, other=sizes.s)
    end = plgpu.load(ends.at[b, head, row], mask=real, other=0)
    first, count = plan[b, head, part, 0], plan[b, head, part, 1]
    low, high = start.min(), end.max()
    column = jnp.arange(block, dtype=jnp.int32)
    precision = rows.product_precision(query.dtype, spec.precision)

    def visit(i: Any, carry: Any) -> Any:
        token = (first + i) * block + column
        at, inner = block_address(b, first + i, table, (sizes.page or block) // block)
        slot = (inner * block + column)[:, None]
        # what no query of the tile sees is not read: it may be NaN
        read = (token >= low) & (token < high)
        k = _load(key, (at, slot, head), sizes.d, read).astype(q.dtype)
        scores = _product(q, k, 1, precision) * spec.scale
        keep = (token[None, :] >= start[:, None]) & (token[None, :] < end[:, None])
        if terms is not None:
            extra = _terms(terms, b, head, (row, real), (token, read))
            scores = scores + extra
            keep = keep & (extra > -jnp.inf)
        scores = jnp.where(keep, rows.capped(scores, spec.softcap), -jnp.inf)
        top, total, out, p = rows.softmax_step(carry, scores)
        v = _load(value, (at, slot, head), sizes.e, read).astype(q.dtype)
        if terms is not None:
            seen = keep.astype(jnp.int32).max(0) > 0
            v = jnp.where(seen[:, None], v, jnp.zeros_like(v))
        return top, total, out + _product(p.astype(v.dtype), v, 0, precision)

    width = pl.next_power_of_2(sizes.e)
    none = jnp.full((tile, 1), -jnp.inf, jnp.float32)
    start_carry = (none, jnp.zeros((tile, 1), jnp.float32), jnp.zeros((tile, width), jnp.float32))
    *statistics, out = lax.fori_loop(0, count, visit, start_carry)
    lanes = jnp.arange(width, dtype=jnp.int32)[None, :]
    at = (b, head, part, row)
    real_lanes = real[:, None] & (lanes < sizes.e)
    plgpu.store(acc_out.at[(*at[:3], row[:, None], lanes)], out, mask=real_lanes)
    for ref, x in zip((top_out, total_out), statistics, strict=True):
        plgpu.store(ref.at[at], x.reshape(tile), mask=real)


def _program(*counts: int) -> tuple[Any, ...]:
    """Indices of this program along (b, *counts), the last running fastest."""
    rest, found = pl.program_id(0), []
    for count in reversed(counts):
        found.append(lax.rem(rest, jnp.int32(count)))
        rest = lax.div(rest, jnp.int32(count))
    return (rest, *reversed(found))


def _load(ref: Any, at: tuple[Any, ...], width: int, real: jax.Array) -> jax.Array:
    """[n, padded width] of ref[*at, :], 0 where `real` [n] is false and beyond the width."""
    lanes = jnp.arange(pl.next_power_of_2(width), dtype=jnp.int32)[None, :]
    mask = jnp.broadcast_to(real[:, None], (real.shape[0], lanes.shape[1]))
    if lanes.shape[1] > width:
        mask = mask & (lanes < width)
    return compat.triton().load(ref.at[(*at, lanes)], mask=mask, other=0.0)


def _terms(ref: Any, b: Any, head: Any, rows_: Any, tokens: Any) -> jax.Array:
    """Bias and mask of a tile, [rows, n] or [1, n]; `ref` is [b|1, g|1, rows|1, s].

    Rows and tokens are pairs (indices, which are real).
    """
    (row, real), (token, read) = rows_, tokens
    at = [i if n > 1 else 0 for i, n in zip((b, head), ref.shape, strict=False)]
    load = compat.triton().load
    if ref.shape[2] == 1:
        return load(ref.at[(*at, 0, token)], mask=read, other=0.0)[None, :]
    mask = real[:, None] & read[None, :]
    return load(ref.at[(*at, row[:, None], token[None, :])], mask=mask, other=0.0)


def _product(a: jax.Array, b: jax.Array, axis: int, precision: Any) -> jax.Array:
    """A times B along axis 1 of `a` and `axis` of `b`, in float32."""
    return lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
