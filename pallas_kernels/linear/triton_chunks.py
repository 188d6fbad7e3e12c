"""Triton kernels that take all chunks at once: outputs and gradients, given the states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.linear import chunk as tile
from pallas_kernels.linear.triton_tiles import (
    Factors,
    Plan,
    Refs,
    load_state,
    load_tokens,
    split,
    store_tokens,
)


def outputs(plan: Plan, refs: Refs, out: Any) -> None:
    """O = A V + row * Q S of one chunk and one tile of v."""
    b, h, n, j = split(pl.program_id(0), plan.heads, plan.count, plan.v_tiles)
    v_at = j * np.int32(plan.v_tile)
    f = Factors(plan, refs, b, h, n)

    def step(i: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        a, o = sums
        k_at = i * np.int32(plan.k_tile)
        q, k = (load_tokens(plan, refs[x], b, h, n, k_at, plan.k_tile) for x in ("query", "key"))
        state = load_state(plan, refs["states"], (b, h, n), k_at, v_at)
        return a + tile.product("ix,jx->ij", q, k), o + tile.product("ik,kv->iv", q, state)

    a, o = _walk(plan.k_tiles, step, (_zeros(plan, plan.chunk), _zeros(plan, plan.v_tile)))
    v = load_tokens(plan, refs["value"], b, h, n, v_at, plan.v_tile)
    o = tile.times(o, f.row) + tile.product("ij,jv->iv", a * f.pair, v, v.dtype)
    store_tokens(plan, out, b, h, n, v_at, o)


def value_gradients(plan: Plan, refs: Refs, d_value: Any) -> None:
    """Gradients of values, dV = A^T dO + col * K dS, of one chunk and one tile of v."""
    b, h, n, j = split(pl.program_id(0), plan.heads, plan.count, plan.v_tiles)
    v_at = j * np.int32(plan.v_tile)
    f = Factors(plan, refs, b, h, n)

    def step(i: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        a, dv = sums
        k_at = i * np.int32(plan.k_tile)
        q, k = (load_tokens(plan, refs[x], b, h, n, k_at, plan.k_tile) for x in ("query", "key"))
        d_state = load_state(plan, refs["d_states"], (b, h, n), k_at, v_at)
        return a + tile.product("ix,jx->ij", q, k), dv + tile.product("jk,kv->jv", k, d_state)

    a, dv = _walk(plan.k_tiles, step, (_zeros(plan, plan.chunk), _zeros(plan, plan.v_tile)))
    do = load_tokens(plan, refs["d_out"], b, h, n, v_at, plan.v_tile)
    dv = tile.times(dv, f.col) + tile.product("ij,iv->jv", a * f.pair, do, do.dtype)
    store_tokens(plan, d_value, b, h, n, v_at, dv)


def key_gradients(
    plan: Plan, refs: Refs, d_query: Any, d_key: Any, d_cumulative: Any = None
) -> None:
    """Gradients of queries, keys and decays of one chunk and one tile of k.

    With P = scale dO V^T exp(b_i - b_j), dQ = P K + row * dO S^T and dK = P^T Q + col * V dS^T.
    The gradient of the cumulative decays comes from dQ and dK without the diagonal of P, see
    `backward`.
    """
    b, h, n, i = split(pl.program_id(0), plan.heads, plan.count, plan.k_tiles)
    k_at = i * np.int32(plan.k_tile)
    f = Factors(plan, refs, b, h, n)

    def step(j: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        p, dq, dk, kept = sums
        v_at = j * np.int32(plan.v_tile)
        do, v = (load_tokens(plan, refs[x], b, h, n, v_at, plan.v_tile) for x in ("d_out", "value"))
        state, d_state = (
            load_state(plan, refs[x], (b, h, n), k_at, v_at) for x in ("states", "d_states")
        )
        if d_cumulative is not None:
            kept = kept + jnp.sum(state.astype(plan.wide) * d_state.astype(plan.wide))
        dq = dq + tile.product("iv,kv->ik", do, state)
        dk = dk + tile.product("jv,kv->jk", v, d_state)
        return p + tile.product("iv,jv->ij", do, v), dq, dk, kept

    keys = _zeros(plan, plan.k_tile)
    sums = _zeros(plan, plan.chunk), keys, keys, jnp.zeros((), plan.wide)
    p, dq, dk, kept = _walk(plan.v_tiles, step, sums)
    q, k = (load_tokens(plan, refs[x], b, h, n, k_at, plan.k_tile) for x in ("query", "key"))
    p, dq, dk = p * f.pair, tile.times(dq, f.row), tile.times(dk, f.col)
    wide_q, wide_k = q.astype(plan.wide), k.astype(plan.wide)
    diagonal = None
    if d_cumulative is not None:
        end = kept * jnp.sum(f.whole) + jnp.sum(wide_k * dk)
        p, diagonal = _take_diagonal(p)
    dq = dq + tile.product("ij,jk->ik", p, k, k.dtype)
    dk = dk + tile.product("ij,ik->jk", p, q, q.dtype)
    if d_cumulative is not None and diagonal is not None:
        db = jnp.sum(wide_q * dq - wide_k * dk, axis=1)
        last = lax.broadcasted_iota(jnp.int32, db.shape, 0) == plan.chunk - 1
        db = jnp.where(last, db + end, db)
        tokens = pl.ds(n * np.int32(plan.chunk), plan.chunk)
        compat.triton().store(d_cumulative.at[i, b, h, tokens], db)
        dq, dk = dq + diagonal * wide_k, dk + diagonal * wide_q
    store_tokens(plan, d_query, b, h, n, k_at, dq)
    store_tokens(plan, d_key, b, h, n, k_at, dk)


def _zeros(plan: Plan, columns: int) -> jax.Array:
    return jnp.zeros((plan.chunk, columns), plan.wide)


def _walk(tiles: int, step: Callable[..., Any], sums: tuple[jax.Array, ...]) -> Any:
    """Runs `step(i, sums)` over the tiles; a loop needs fewer registers than its copies."""

    def narrow(i: Any, sums: Any) -> Any:
        return step(lax.convert_element_type(i, jnp.int32), sums)

    return lax.fori_loop(np.int32(0), np.int32(tiles), narrow, sums)


def _take_diagonal(p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A square matrix without its diagonal, and the diagonal as a column."""
    rows, columns = (lax.broadcasted_iota(jnp.int32, p.shape, axis) for axis in (0, 1))
    zero = jnp.zeros_like(p)
    diagonal = jnp.sum(jnp.where(rows == columns, p, zero), axis=1, keepdims=True)
    return jnp.where(rows == columns, zero, p), diagonal
