"""Sizes of the TPU kernels, and the arrays that they read."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Target, Unsupported
from pallas_kernels.linear import layout
from pallas_kernels.linear.spec import LinearSpec, Operands, default_chunk

LANES = 128
"""Width of a register, and of a block of tokens in the arrays of factors."""
MOST_HEADS = {2: 4, 4: 2}
"""Bytes of a number -> heads of one grid step: more spill registers, fewer leave units idle."""
VMEM_BYTES = 10 << 20
"""What the blocks of several heads may take in one grid step."""
VMEM_LIMIT = 15 << 20
"""What one head may take; the smallest limit of a kernel is 16 MiB."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and options of one call.

    Attributes:
      chunk: c, tokens of a chunk.
      count: n, chunks.
      heads: heads of one grid step; their chains of products overlap.
      width: of a tile of v.
      scale: factor on the output.
      dtype, wide: types of products and of states.
      decay: None, "head" or "token".
      runs: whether there are segments.
      full: k, the tile of v and chunks are one register wide, as spread factors are.
      interpret: as of `pallas_call`.
    """

    chunk: int
    count: int
    heads: int
    width: int
    scale: float
    dtype: Any
    wide: Any
    decay: str | None
    runs: bool
    full: bool
    interpret: Any


def make_plan(operands: Operands, spec: LinearSpec, target: Target, *, backward: bool) -> Plan:
    """Sizes of a call.

    Raises:
      Unsupported: on options that the kernels lack, and states too wide for VMEM.
    """
    dtype = layout.check_supported("tpu", operands, target, (jnp.bfloat16, jnp.float32))
    _, t, h, k = operands.query.shape
    v = operands.value.shape[-1]
    size = spec.chunk_size or default_chunk("tpu", dtype)
    size = min(-(-size // LANES), 4, -(-t // LANES)) * LANES
    decay = operands.decay
    width = v if k * v <= 256 * 256 or v % LANES else LANES * max(1, 256 * 256 // (k * LANES))
    while v % width:
        width -= LANES
    kind = None if decay is None else "head" if decay.ndim == 1 else "token"
    wide = operands.dtype
    bytes_per_head = _step_bytes(size, k, width, jnp.dtype(dtype).itemsize, wide.itemsize)
    if bytes_per_head[backward] > VMEM_LIMIT:
        raise Unsupported(
            f"linear attention: the tpu kernel has no room for a state of {k} x {v}; use values "
            "whose width is a multiple of 128, or implementation='xla'."
        )
    most = MOST_HEADS.get(jnp.dtype(dtype).itemsize, 1)
    most = max(1, min(most, VMEM_BYTES // bytes_per_head[backward]))
    return Plan(
        chunk=size,
        count=-(-t // size),
        heads=max(n for n in range(1, most + 1) if h % n == 0),
        width=width,
        scale=spec.scale,
        dtype=dtype,
        wide=wide,
        decay=kind,
        runs=operands.runs is not None,
        full=k == width == size == LANES,
        interpret=target.interpret,
    )


def _step_bytes(c: int, k: int, v: int, item: int, wide: int) -> tuple[int, int]:
    """VMEM of one head in one grid step, forward and backward; blocks are there twice."""
    k, v = (-(-n // LANES) * LANES for n in (k, v))
    forward = 2 * (c * (2 * k + 2 * v) * item + 2 * k * v * wide) + 3 * c * c * wide
    backward = 2 * (c * (4 * k + 3 * v) * item + k * v * (item + 2 * wide)) + 6 * c * c * wide
    return forward, backward


def by_head(x: jax.Array, plan: Plan) -> jax.Array:
    """[b, t, h, x] as [b, h, n * c, x] in the type of products."""
    return jnp.swapaxes(layout.pad_tokens(x, plan.chunk), 1, 2).astype(plan.dtype)


def by_token(x: jax.Array, operands: Operands) -> jax.Array:
    """[b, h, n * c, x] as [b, t, h, x]."""
    return jnp.swapaxes(x[:, :, : operands.query.shape[1]], 1, 2)


def read_arrays(operands: Operands, plan: Plan) -> dict[str, jax.Array]:
    """What the kernels read, by name; see `_block`."""
    arrays = {
        "query": by_head(operands.query, plan),
        "key": by_head(operands.key, plan),
        "value": by_head(operands.value, plan),
        "pair": layout.head_pairs(operands, plan.chunk, plan.scale),
    }
    factors = layout.token_factors(operands, plan.chunk, plan.scale)
    if factors is not None and plan.decay == "head" and not plan.runs and plan.full:
        arrays |= _constant_factors(factors)
    elif factors is not None:
        arrays["factors"] = _grouped_factors(factors, plan)
    if operands.initial_state is not None:
        arrays["initial"] = operands.initial_state.astype(plan.wide)
    return {name: x for name, x in arrays.items() if x is not None}


def factor_rows(plan: Plan) -> tuple[int, ...]:
    """Which rows of `layout.token_factors` the kernels read."""
    return (
        (layout.ROW, layout.COL, layout.WHOLE)
        + (decay_rows(plan) if plan.decay == "token" else ())
        + ((layout.RUN,) if plan.runs else ())
    )


def _grouped_factors(factors: jax.Array, plan: Plan) -> jax.Array:
    """[b or 1, groups or 1, n, rows, c]: all rows of the heads of a grid step, in whole tiles."""
    if plan.decay == "token" and plan.dtype == jnp.bfloat16:  # 16 bits need no second part
        whole = factors[..., layout.COARSE, :] + factors[..., layout.FINE, :]
        factors = factors.at[..., layout.COARSE, :].set(whole)
    x = factors[..., jnp.asarray(factor_rows(plan)), :]
    b, h, n, rows, c = x.shape
    heads = plan.heads if h > 1 else 1
    x = x.reshape(b, h // heads, heads, n, rows, c).swapaxes(2, 3)
    x = x.reshape(b, h // heads, n, heads * rows, c)
    return jnp.pad(x, ((0, 0),) * 3 + ((0, -x.shape[3] % 8), (0, 0)))


def _constant_factors(factors: jax.Array) -> dict[str, jax.Array]:
    """Factors that are the same in all chunks but the last, which may be shorter.

    "row" and "col" [2, h, c, LANES] and "whole" [2, h, 8, LANES]: any chunk, and the last one.
    """
    ends = jnp.stack([factors[0, :, 0], factors[0, :, -1]])  # [2, h, ROWS, c]
    shape = (*ends.shape[:2], ends.shape[-1], LANES)
    row, col = (jnp.broadcast_to(ends[:, :, n, :, None], shape) for n in (layout.ROW, layout.COL))
    whole = jnp.broadcast_to(ends[:, :, layout.WHOLE, None, :LANES], (*ends.shape[:2], 8, LANES))
    return {"row": row, "col": col, "whole": whole}


def decay_rows(plan: Plan) -> tuple[int, ...]:
    """Parts of the cumulative decay: 16 bits need no second one."""
    return (layout.COARSE,) if plan.dtype == jnp.bfloat16 else (layout.COARSE, layout.FINE)
