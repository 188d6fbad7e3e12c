"""Runs a body on a few batch rows at a time.

One scan step of the XLA body touches a chunk of every batch row. On a CPU the step should stay in
cache: with many rows it is faster to walk a few rows to the end before the next few. Groups are
neighboring rows, so that splitting and joining them moves nothing; a batch that is sharded over
devices is not grouped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear.spec import LinearSpec, Operands, pick_chunk

CACHE_ELEMENTS = 1 << 17
"""Elements of one chunk of the queries above which the rows are split (512 KiB in float32)."""


def rows_per_step(operands: Operands, spec: LinearSpec) -> int:
    """The number of batch rows, a divisor of b, whose chunk of queries fits into the cache."""
    b, _, h, k = operands.query.shape
    most = max(
        1, CACHE_ELEMENTS // (pick_chunk(operands, spec) * h * max(k, operands.value.shape[-1]))
    )
    return max(r for r in range(1, b + 1) if b % r == 0 and r <= most)


def forward_by_rows(
    body: Callable, operands: Operands, spec: LinearSpec
) -> tuple[jax.Array, jax.Array]:
    """`body(operands, spec)` over groups of batch rows."""
    rows = rows_per_step(operands, spec)
    if rows == operands.query.shape[0]:
        return body(operands, spec)
    out, state = _over_groups(lambda ops: body(ops, spec), operands, rows=rows)
    return _merge(out), _merge(state)


def backward_by_rows(
    body: Callable, operands: Operands, out_grad: jax.Array, state_grad: jax.Array, spec: LinearSpec
) -> Operands:
    """`body(operands, out_grad, state_grad, spec)` over groups of batch rows."""
    rows = rows_per_step(operands, spec)
    if rows == operands.query.shape[0]:
        return body(operands, out_grad, state_grad, spec)
    grads = _over_groups(lambda *a: body(*a, spec), operands, out_grad, state_grad, rows=rows)
    shared = _shared(operands)
    whole: dict[str, Any] = {
        name: x if x is None else (jnp.sum(x, axis=0) if name in shared else _merge(x))
        for name, x in grads._asdict().items()
    }
    return Operands(**whole)


def _shared(operands: Operands) -> tuple[str, ...]:
    """Names of the operands without a batch axis."""
    per_head = operands.decay is not None and operands.decay.ndim == 1
    return ("bonus", "decay") if per_head else ("bonus",)


def _over_groups(run: Callable, operands: Operands, *more: jax.Array, rows: int):
    """Results of `run` for every group of rows, with a leading axis over the groups."""
    groups = operands.query.shape[0] // rows
    shared = _shared(operands)

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(groups, rows, *x.shape[1:])

    whole = operands._asdict()
    grouped = {n: split(x) for n, x in whole.items() if x is not None and n not in shared}

    def one(part: tuple[dict[str, jax.Array], list[jax.Array]]):
        given: dict[str, Any] = whole | part[0]
        return run(Operands(**given), *part[1])

    return lax.map(one, (grouped, [split(x) for x in more]))


def _merge(x: jax.Array) -> jax.Array:
    """[groups, rows, ...] as [b, ...]."""
    return x.reshape(-1, *x.shape[2:])
