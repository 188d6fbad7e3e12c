"""Gradients of one chunk of a linear recurrence; the same for every body. Letters as in `chunk`."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear.chunk import (
    Chunk,
    Decays,
    product,
    read_state,
    scores,
    times,
    write_state,
)


class ChunkGrads(NamedTuple):
    """Gradients of one chunk.

    Attributes:
      q, k: [..., c, k]; v: [..., c, v].
      state: of the state before the chunk, [..., k, v].
      q_state, k_state: the parts of `q` and `k` that come through the states.
      pairs: A_ij dA_ij, what every pair contributes to the gradient of b_i - b_j: [..., c, c].
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    state: jax.Array
    q_state: jax.Array
    k_state: jax.Array
    pairs: jax.Array


def chunk_grads(
    state: jax.Array, x: Chunk, d: Decays, d_out: jax.Array, d_state: jax.Array
) -> ChunkGrads:
    """Gradients of `forward_chunk` (without its bonus) and `next_state`.

    Args:
      state: S before the chunk, [..., k, v].
      x, d: the chunk and its decays.
      d_out: gradient of the output, [..., c, v].
      d_state: gradient of the state after the chunk, [..., k, v].
    """
    dtype = d_out.dtype
    d_scores = product("...iv,...jv->...ij", d_out, x.v)
    a, dq, dk = _score_grads(x.q, x.k, d, d_scores)
    q_state = times(d.row, product("...iv,...kv->...ik", d_out, state, dtype))
    k_state = times(d.col, product("...jv,...kv->...jk", x.v, d_state, dtype))
    dv = product("...ij,...iv->...jv", a, d_out, dtype)
    dv = dv + read_state(d.col, x.k, d_state, by_channel=d.b is not None)
    before = write_state(d.whole, d_state, d.row, x.q, d_out)
    return ChunkGrads(dq + q_state, dk + k_state, dv, before, q_state, k_state, a * d_scores)


def decay_grad(
    x: Chunk, g: ChunkGrads, state: jax.Array, whole: jax.Array, d_state: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the cumulative decays receive, by channel.

    With dq and dk that leave out the diagonal,

        db_i = q_i dq_i - k_i dk_i        db_c += sum_v S_next dS,  S_next the state after the chunk

    Returns:
      q dq and k dk, [..., c, k], and the term at the end of the chunk, [..., 1, k].
    """
    kept = jnp.sum(times(whole, state) * d_state, axis=-1)[..., None, :]
    return x.q * g.q, x.k * g.k, kept + jnp.sum(x.k * g.k_state, axis=-2, keepdims=True)


def _score_grads(
    q: jax.Array, k: jax.Array, d: Decays, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scores A, and from their gradient [..., c, c] those of q and k.

    dq_i = sum_j dA_ij exp(b_i - b_j) k_j and dk_j = sum_i dA_ij exp(b_i - b_j) q_i.
    """
    if d.b is not None:
        a, pull = jax.vjp(lambda q, k: scores(q, k, d), q, k)
        return a, *pull(grad)
    p = times(grad, d.pair)
    dq = product("...ij,...jx->...ix", p, k, k.dtype)
    return scores(q, k, d), dq, product("...ij,...ix->...jx", p, q, q.dtype)
