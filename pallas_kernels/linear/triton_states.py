"""Triton kernels that walk over the chunks: the states, and their gradients.

One program walks along one batch row and head with one tile of the state.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.linear import chunk as tile
from pallas_kernels.linear.triton_tiles import (
    Factors,
    Plan,
    Refs,
    load_state,
    load_tokens,
    split,
    store_state,
)


def forward(plan: Plan, refs: Refs, states: Any, last: Any) -> None:
    """The state before every chunk, and the last one: S <- whole * S + sum_j col_j k_j v_j^T."""
    place = _place(plan)
    b, h, k_at, v_at = place

    def step(n: Any, state: Any) -> Any:
        n = lax.convert_element_type(n, jnp.int32)
        store_state(plan, states, (b, h, n), k_at, v_at, state)
        f = Factors(plan, refs, b, h, n)
        k = load_tokens(plan, refs["key"], b, h, n, k_at, plan.k_tile)
        v = load_tokens(plan, refs["value"], b, h, n, v_at, plan.v_tile)
        return tile.write_state(f.whole, state, None, k, tile.weigh(f.col, v).astype(v.dtype))

    state = lax.fori_loop(np.int32(0), np.int32(plan.count), step, _start(plan, refs, "initial"))
    store_state(plan, last, (b, h), k_at, v_at, state)


def backward(plan: Plan, refs: Refs, d_states: Any, first: Any) -> None:
    """Gradients of the state after every chunk, and of the first state.

    dS <- whole * dS + sum_i row_i q_i do_i^T, from the last chunk to the first.
    """
    b, h, k_at, v_at = _place(plan)

    def step(i: Any, d_state: Any) -> Any:
        n = np.int32(plan.count - 1) - lax.convert_element_type(i, jnp.int32)
        store_state(plan, d_states, (b, h, n), k_at, v_at, d_state)
        f = Factors(plan, refs, b, h, n)
        q = load_tokens(plan, refs["query"], b, h, n, k_at, plan.k_tile)
        do = load_tokens(plan, refs["d_out"], b, h, n, v_at, plan.v_tile)
        return tile.write_state(f.whole, d_state, None, q, tile.weigh(f.row, do).astype(do.dtype))

    start = _start(plan, refs, "d_state")
    d_state = lax.fori_loop(np.int32(0), np.int32(plan.count), step, start)
    store_state(plan, first, (b, h), k_at, v_at, d_state)


def _place(plan: Plan) -> tuple[Any, Any, Any, Any]:
    """Batch row, head, and where the tile of the state begins."""
    b, h, i, j = split(pl.program_id(0), plan.heads, plan.k_tiles, plan.v_tiles)
    return b, h, i * np.int32(plan.k_tile), j * np.int32(plan.v_tile)


def _start(plan: Plan, refs: Refs, name: str) -> Any:
    if name not in refs:
        return jnp.zeros((plan.k_tile, plan.v_tile), plan.wide)
    b, h, k_at, v_at = _place(plan)
    return load_state(plan, refs[name], (b, h), k_at, v_at)
