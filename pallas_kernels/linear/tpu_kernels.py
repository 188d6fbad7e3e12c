"""What the TPU kernels do with one chunk; see `tpu`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.linear import chunk as tile
from pallas_kernels.linear import gradients, layout
from pallas_kernels.linear.chunk import Chunk, Decays
from pallas_kernels.linear.tpu_plan import LANES, Plan, decay_rows, factor_rows


def forward_kernel(refs: dict[str, Any], plan: Plan) -> None:
    """One chunk: O = A V + row * Q S, then S <- whole * S + (K * col)^T V."""
    _start(refs["state"], refs.get("initial"))
    factors = _read_factors(refs)
    for i in range(plan.heads):
        d = _decays(refs, factors, i, plan)
        x = _chunk(refs, i)
        state = refs["state"][0, i]
        refs["out"][0, i] = tile.forward_chunk(state, x, d).astype(plan.dtype)
        refs["state"][0, i] = tile.next_state(state, x.k, x.v, d)


def states_kernel(refs: dict[str, Any], plan: Plan) -> None:
    """The state before the chunk, and the next one."""
    _start(refs["state"], refs.get("initial"))
    factors = _read_factors(refs)
    for i in range(plan.heads):
        state = refs["state"][0, i]
        refs["states"][0, i, 0] = state.astype(plan.dtype)
        _, col, whole = _by_row(refs, factors, None, i, plan)
        k, v = refs["key"][0, i], refs["value"][0, i]
        refs["state"][0, i] = tile.write_state(whole, state, col, k, v)


def backward_kernel(refs: dict[str, Any], plan: Plan) -> None:
    """Gradients of one chunk; chunks come last to first and `d_initial` carries dS."""
    _start(refs["d_initial"], refs["d_state"])
    factors = _read_factors(refs)
    for i in range(plan.heads):
        x, d = _chunk(refs, i), _decays(refs, factors, i, plan)
        state, d_state = refs["states"][0, i, 0], refs["d_initial"][0, i]
        g = gradients.chunk_grads(state, x, d, refs["d_out"][0, i], d_state)
        refs["d_query"][0, 0, i] = g.q.astype(refs["d_query"].dtype)
        refs["d_key"][0, 0, i] = g.k.astype(refs["d_key"].dtype)
        refs["d_value"][0, i] = g.v.astype(plan.dtype)
        refs["d_initial"][0, i] = g.state
        if plan.decay is not None and d.whole is not None:
            db = _decay_grad(x, g, state, d.whole, d_state)
            refs["d_cumulative"][0, 0, i, 0] = db


def _start(state: Any, initial: Any) -> None:
    """Sets the state at the first step of a walk."""

    @pl.when(pl.program_id(3) == 0)
    def _() -> None:
        state[...] = jnp.zeros(state.shape, state.dtype) if initial is None else initial[...]


def _read_factors(refs: dict[str, Any]) -> tuple[jax.Array, jax.Array] | None:
    """The factors of all heads of the step by rows and, turned once, by columns."""
    if "factors" not in refs:
        return None
    rows = refs["factors"][0, 0, 0]
    return rows, rows.T


def _factor(factors: Any, which: int, i: int, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """One factor of head i as a column [c, 1] and as a row [1, c]."""
    rows, columns = factors
    names = factor_rows(plan)
    head = i if plan.decay is not None else 0
    n = head * len(names) + names.index(which)
    return columns[:, n : n + 1], rows[n : n + 1]


def _by_row(
    refs: dict[str, Any], factors: Any, b: list[jax.Array] | None, i: int, plan: Plan
) -> tuple[jax.Array | None, jax.Array | None, jax.Array | None]:
    """`Decays.row`, `col` and `whole` of head i; the row holds the scale.

    Args:
      refs: references of the step.
      factors: see `_read_factors`.
      b: parts of the cumulative decay, spread over lanes.
      i: head of the step.
      plan: sizes.
    """
    if "col" in refs:
        row = refs["row"][0, i] if "row" in refs else None
        return row, refs["col"][0, i], refs["whole"][0, i, :1]
    if factors is None:
        scale = jnp.full((1, 1), plan.scale, plan.wide)
        return (None if plan.scale == 1.0 else scale), None, None
    whole = _factor(factors, layout.WHOLE, i, plan)[1][:, :LANES]
    if b is not None and not plan.runs and plan.full:
        end = [_factor(factors, n, i, plan)[1][:, -1:] for n in decay_rows(plan)]
        row = jnp.exp(_add(b)) * jnp.full((1, 1), plan.scale, plan.wide)
        return row, jnp.exp(_add([e - x for e, x in zip(end, b, strict=True)])), whole
    row, col = (_factor(factors, n, i, plan)[0] for n in (layout.ROW, layout.COL))
    return row, col, whole[:, :1]


def _decays(refs: dict[str, Any], factors: Any, i: int, plan: Plan) -> Decays:
    """The decays of head i; `pair` and `row` hold the scale."""
    shape = (plan.chunk, plan.chunk)
    query, key = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    visible = query >= key
    scale = jnp.full((1, 1), plan.scale, plan.wide)
    b = _spread_decay(factors, i, plan)
    if plan.runs:
        of_query, of_key = _factor(factors, layout.RUN, i, plan)
        visible &= of_query == of_key
    if b is not None:
        of_key = [_factor(factors, n, i, plan)[1] for n in decay_rows(plan)]
        exponent = _add([x - y for x, y in zip(b, of_key, strict=True)])
        pair = tile.pair_decay(exponent, visible, plan.wide) * scale
    else:
        pair = refs["pair"][i] if "pair" in refs else jnp.broadcast_to(scale, shape)
        if plan.decay is None or plan.runs:
            pair = jnp.where(visible, pair, jnp.zeros_like(pair))
    return Decays(pair, *_by_row(refs, factors, b, i, plan))


def _spread_decay(factors: Any, i: int, plan: Plan) -> list[jax.Array] | None:
    """Parts of the cumulative decay of every token, [c, c] where that is one register wide."""
    if plan.decay != "token":
        return None
    columns = [_factor(factors, n, i, plan)[0] for n in decay_rows(plan)]
    return [jnp.broadcast_to(x, (plan.chunk, LANES)) for x in columns] if plan.full else columns


def _add(parts: list[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _chunk(refs: dict[str, Any], i: int) -> Chunk:
    q, k, v = (refs[name][0, i] for name in ("query", "key", "value"))
    return Chunk(q=q, k=k, v=v, b=None, beta=None, bonus=None, runs=None, run_before=None)


def _decay_grad(
    x: Chunk, g: gradients.ChunkGrads, state: jax.Array, whole: jax.Array, d_state: jax.Array
) -> jax.Array:
    """Gradient of the cumulative decays of a chunk, [1, c], from that of every pair.

    With M_ij = A_ij dA_ij below the diagonal, and dq', dk' the parts that come through the states,

        db_i = sum_j M_ij - sum_j M_ji + q_i dq'_i - k_i dk'_i        db_c += sum S_next * dS

    The diagonal cancels, and is left out so that it takes nothing from the accuracy.
    """
    wide = d_state.dtype
    rows, columns = (lax.broadcasted_iota(jnp.int32, g.pairs.shape, axis) for axis in (0, 1))
    m = jnp.where(rows > columns, g.pairs, jnp.zeros_like(g.pairs))
    kept = x.k.astype(wide) * g.k_state
    through = x.q.astype(wide) * g.q_state - kept
    if m.shape == through.shape:
        by_row = jnp.sum(m + through, axis=1, keepdims=True)
    else:
        by_row = jnp.sum(m, axis=1, keepdims=True) + jnp.sum(through, axis=1, keepdims=True)
    spread = jnp.where(rows == columns, by_row, jnp.zeros_like(m)) - m  # [c, 1] as [1, c]
    end = _total(kept) + _total(tile.times(whole, state.astype(wide)) * d_state)
    last = lax.broadcasted_iota(jnp.int32, (1, m.shape[1]), 1) == m.shape[1] - 1
    db = jnp.sum(spread, axis=0, keepdims=True)
    return db + jnp.where(last, end, jnp.zeros_like(db))


def _total(x: jax.Array) -> jax.Array:
    """Sum of a matrix: [1, 1]."""
    return jnp.sum(jnp.sum(x, axis=0, keepdims=True), axis=1, keepdims=True)
