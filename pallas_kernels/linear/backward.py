"""Gradients of the linear recurrence: a scan for the states, then a reverse scan over chunks.

With P = dO V^T on the visible pairs, A the decayed scores, S the state before a chunk, and dS the
gradient of the state after it, one chunk gives (decay factors row, col, whole as in `chunk.Decays`)

    dQ = P K + row * dO S^T        dK = P^T Q + col * V dS^T        dV = A^T dO + (K * col) dS
    dS <- whole * dS + (Q * row)^T dO

and, since every path through the cumulative decay b_i runs through q_i (+) or k_i (-) and every
term of the next state carries exp(b_c),

    db_i = q_i dq_i - k_i dk_i      db_c += sum_v S_next * dS      dg = reverse cumulative sum of db

inside the chunk. The diagonal cancels in db; it is left out of these sums and added to dQ and dK
afterwards, which keeps dg accurate when decays are strong. The delta rule is differentiated chunk
by chunk from the recomputed states.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear import chunk as tile
from pallas_kernels.linear import gradients
from pallas_kernels.linear.chunk import Chunk
from pallas_kernels.linear.spec import LinearSpec, Operands
from pallas_kernels.linear.xla import Chunks


def linear_bwd(
    operands: Operands, out_grad: jax.Array, state_grad: jax.Array, spec: LinearSpec
) -> Operands:
    """Gradients with respect to every operand; None for absent ones and `runs`.

    Args:
      operands: as given to the forward pass; nothing else is saved.
      out_grad: gradient of the output, [b, t, h, v].
      state_grad: gradient of the final state, [b, h, k, v].
      spec: the static options.
    """
    delta = operands.beta is not None
    chunks = Chunks(operands, spec, strict=not delta)
    out_grad = chunks.pad(out_grad)
    states = _chunk_states(chunks)

    def step(carry, xs):
        d_state, sums = carry
        n, state = xs
        grads = _delta_grads if delta else _chunk_grads
        d_state, parts, more = grads(chunks, n, state, d_state, chunks.take(out_grad, n))
        sums = {name: sums[name] + more[name] for name in sums}
        return (d_state, sums), {name: jnp.swapaxes(x, 1, 2) for name, x in parts.items()}

    sums = {}
    if chunks.per_head:
        sums["decay"] = jnp.zeros(operands.decay.shape, chunks.dtype)
    if operands.bonus is not None:
        sums["bonus"] = jnp.zeros(operands.bonus.shape, chunks.dtype)
    carry = (state_grad.astype(chunks.dtype), sums)
    (d_state, sums), parts = lax.scan(step, carry, (jnp.arange(chunks.count), states), reverse=True)

    grads = {name: chunks.join(x) for name, x in parts.items()} | sums
    for name in ("beta", "decay"):
        like = getattr(operands, name)
        if like is not None and like.ndim == 3:
            grads[name] = grads[name][..., 0]
    if operands.initial_state is not None:
        grads["initial_state"] = d_state
    return Operands(**grads)


def _chunk_states(chunks: Chunks) -> jax.Array:
    """The state before every chunk, [n, b, h, k, v]."""

    def step(state, n):
        x, d = chunks.load(n)
        after = (
            tile.delta_chunk(state, x, d)[0]
            if x.beta is not None
            else tile.next_state(state, x.k, x.v, d)
        )
        return after, state

    return lax.scan(step, chunks.initial_state(), jnp.arange(chunks.count))[1]


def _chunk_grads(
    chunks: Chunks,
    n: jax.Array,
    state: jax.Array,
    d_state: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """Gradient of the state before chunk n, gradients by token, and sums over tokens."""
    x, d = chunks.load(n)
    g = gradients.chunk_grads(state, x, d, d_out, d_state)
    dq, dk, dv = g.q, g.k, g.v

    parts, sums = {}, {}
    if x.b is not None and d.whole is not None:
        db = _decay_grad(x, *gradients.decay_grad(x, g, state, d.whole, d_state))
        if chunks.per_head:
            sums["decay"] = jnp.sum(db * chunks.elapsed(n)[None], axis=(0, 2, 3))
        else:
            parts["decay"] = tile.cumulative(db, reverse=True)

    weight = x.k if x.bonus is None else x.k * x.bonus[None]
    p = jnp.sum(d_out * x.v, axis=-1, keepdims=True)  # the diagonal of dO V^T
    if x.bonus is not None:
        sums["bonus"] = jnp.sum(p * x.q * x.k, axis=(0, 2))
    dv = dv + jnp.sum(x.q * weight, axis=-1, keepdims=True) * d_out
    dk = dk + p * (x.q if x.bonus is None else x.q * x.bonus[None])
    dq = dq + p * weight
    parts |= {"query": dq * jnp.asarray(chunks.scale, chunks.dtype), "key": dk, "value": dv}
    return g.state, parts, sums


def _decay_grad(x: Chunk, plus: jax.Array, minus: jax.Array, at_end: jax.Array) -> jax.Array:
    """Gradient of the cumulative decays of a chunk: [r, h, c, 1 or k]."""
    if x.b.shape[-1] == 1:
        plus, minus, at_end = (jnp.sum(y, axis=-1, keepdims=True) for y in (plus, minus, at_end))
    if x.bonus is not None:  # queries saw the decay up to the token before
        plus = jnp.concatenate([plus[..., 1:, :], jnp.zeros_like(plus[..., :1, :])], axis=-2)
    db = plus - minus
    return jnp.concatenate([db[..., :-1, :], db[..., -1:, :] + at_end], axis=-2)


def _delta_grads(
    chunks: Chunks,
    n: jax.Array,
    state: jax.Array,
    d_state: jax.Array,
    d_out: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """As `_chunk_grads`, by differentiating the chunk's forward computation."""
    x = chunks.chunk(n)
    names = {"query": x.q, "key": x.k, "value": x.v, "beta": x.beta}
    if x.b is not None:
        names["decay"] = x.b

    def run(state: jax.Array, parts: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        y = x._replace(
            q=parts["query"],
            k=parts["key"],
            v=parts["value"],
            beta=parts["beta"],
            b=parts.get("decay"),
        )
        return tile.delta_chunk(state, y, tile.decay_factors(y, strict=False, pair=chunks.pair))

    _, pull = jax.vjp(run, state, names)
    before, parts = pull((d_state, d_out))
    parts["query"] = parts["query"] * jnp.asarray(chunks.scale, chunks.dtype)
    if "decay" in parts:
        parts["decay"] = tile.cumulative(parts["decay"][0], reverse=True)
    return before, parts, {}
