"""The mathematics of one chunk of a linear recurrence; the same for every body.

Letters: r batch rows, h heads, c tokens of the chunk (i of a query, j of a key), k and v widths.
With the inclusive cumulative sum b_i of the log decays inside the chunk, only differences b_i - b_j
with i >= j and b_c - b_j are exponentiated: every exponent is <= 0, so nothing overflows however
strong the decay is, and exponents of pairs that must not be seen are masked before `exp`, so that
no gradient is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear.spec import SUB_CHUNK
from pallas_kernels.tilemath import accumulator_dtype


class Chunk(NamedTuple):
    """One chunk of the operands, heads before tokens, in the arithmetic type.

    Attributes:
      q, k: [r, h, c, k]; q carries the scale.
      v: [r, h, c, v].
      b: cumulative log decay in parts whose sum it is (see `split_cumulative`): [parts, h, c, 1],
        [parts, r, h, c, 1] or [parts, r, h, c, k]; None without decay.
      beta: [r, h, c, 1] or None.
      bonus: [h, 1, k] or None.
      runs: [r, c] segment numbers, or None.
      run_before: [r, 1] segment of the token before the chunk, or None.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    b: jax.Array | None
    beta: jax.Array | None
    bonus: jax.Array | None
    runs: jax.Array | None
    run_before: jax.Array | None


class Decays(NamedTuple):
    """Decay factors of one chunk; None stands for 1.

    Attributes:
      pair: [..., c, c] from key j to query i, 0 where j is not visible; with per-channel decay 0
        and 1 only.
      row: [..., c, 1 or k] from the state before the chunk to query i.
      col: [..., c, 1 or k] from key j to the end of the chunk.
      whole: [..., 1 or k, 1] from the state before the chunk to its end.
      b_row, b: cumulative log decays, in parts, of queries and of keys when the decay is per
        channel.
    """

    pair: jax.Array
    row: jax.Array | None
    col: jax.Array | None
    whole: jax.Array | None
    b_row: jax.Array | None = None
    b: jax.Array | None = None


def cumulative(g: jax.Array, *, reverse: bool = False) -> jax.Array:
    """Cumulative sum over the tokens of a chunk, [..., c, x]: a product with a triangle of ones."""
    ones = jnp.tri(g.shape[-2], dtype=g.dtype)
    return jnp.einsum(
        "ij,...jx->...ix", ones.T if reverse else ones, g, precision=lax.Precision.HIGHEST
    )


def split_cumulative(g: jax.Array) -> jax.Array:
    """Cumulative sum of log decays g [..., c, x] in two parts: [2, ..., c, x].

    The first part sums g rounded to multiples of 2^-12, without any error below 2^12 in float32;
    the second one the small rest. A difference of two rows, part by part, is then as exact as if
    only the decays between them had been summed, whatever happened earlier in the chunk.
    """
    coarse = lax.stop_gradient(jnp.round(g * 4096.0) / 4096.0)
    return jnp.stack([cumulative(coarse), cumulative(g - coarse)])


def total(parts: jax.Array) -> jax.Array:
    """The sum over the parts of a cumulative log decay, or of a difference of two."""
    return parts[0] if parts.shape[0] == 1 else parts[0] + parts[1]


def shift_down(b: jax.Array) -> jax.Array:
    """Row i becomes row i - 1 and the first one 0: the cumulative decay before a token."""
    return jnp.concatenate([jnp.zeros_like(b[..., :1, :]), b[..., :-1, :]], axis=-2)


def decay_factors(x: Chunk, *, strict: bool, pair: jax.Array | None = None) -> Decays:
    """The decay factors of one chunk.

    Args:
      x: the chunk.
      strict: leave out the diagonal of `pair`.
      pair: the decays between the tokens of a chunk where they are the same for all chunks.
    """
    c, dtype = x.q.shape[-2], x.q.dtype
    per_channel = x.b is not None and x.b.shape[-1] > 1
    exclusive = x.bonus is not None
    visible = jnp.tri(c, k=-1 if strict else 0, dtype=bool)
    if x.runs is not None:
        same = x.runs[:, :, None] == x.runs[:, None, :]
        visible = (visible[None] & same)[:, None]  # [r, 1, c, c]

    b_row = None if x.b is None else (shift_down(x.b) if exclusive else x.b)
    if pair is None:
        exponent = None
        if x.b is not None and b_row is not None and not per_channel:
            exponent = total(b_row - jnp.swapaxes(x.b, -1, -2))
        pair = pair_decay(exponent, visible, dtype)
    elif x.runs is not None:
        pair = times(pair, visible.astype(dtype))

    row = col = whole = None
    if x.b is not None and b_row is not None:
        end = x.b[..., -1:, :]
        row, col = jnp.exp(total(b_row)), jnp.exp(total(end - x.b))
        whole = jnp.swapaxes(jnp.exp(total(end)), -1, -2)
    if x.runs is not None:
        last = x.runs[:, -1:]
        rows = (x.runs == x.run_before).astype(dtype)[
            :, None, :, None
        ]  # sees the state before the chunk
        cols = (x.runs == last).astype(dtype)[:, None, :, None]  # survives to its end
        keep = (x.run_before == last).astype(dtype)[:, None, None, :]
        row, col, whole = times(row, rows), times(col, cols), times(whole, keep)
    return Decays(pair, row, col, whole, *((b_row, x.b) if per_channel else (None, None)))


def pair_decay(exponent: jax.Array | None, visible: jax.Array, dtype: Any) -> jax.Array:
    """exp(b_i - b_j) where visible, else 0: [..., c, c].

    Args:
      exponent: b_i - b_j, [..., c, c]; None without decays, which gives the mask itself.
      visible: boolean, [..., c, c] of no more axes.
      dtype: of the mask itself.
    """
    if exponent is None:
        return visible.astype(dtype)
    mask = visible.reshape((1,) * (exponent.ndim - visible.ndim) + visible.shape)
    return jnp.exp(jnp.where(mask, exponent, -jnp.inf))


@overload
def times(a: jax.Array, b: jax.Array | None) -> jax.Array: ...
@overload
def times(a: jax.Array | None, b: jax.Array) -> jax.Array: ...
@overload
def times(a: None, b: None) -> None: ...
def times(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """Product of two factors of which None means 1; leading axes are filled up."""
    if a is None or b is None:
        return a if b is None else b
    n = max(a.ndim, b.ndim)
    return a.reshape((1,) * (n - a.ndim) + a.shape) * b.reshape((1,) * (n - b.ndim) + b.shape)


def product(equation: str, a: jax.Array, b: jax.Array, dtype: Any = None) -> jax.Array:
    """Einsum of `a` and `b` rounded to `dtype` (None: that of `a`), summed in float32 or wider."""
    dtype = a.dtype if dtype is None else dtype
    return jnp.einsum(
        equation,
        a.astype(dtype),
        b.astype(dtype),
        preferred_element_type=accumulator_dtype(dtype),
    )


def weigh(factor: jax.Array | None, x: jax.Array) -> jax.Array:
    """The product factor * x in the type of the factor, which may be wider; None means 1."""
    return x if factor is None else times(factor, x.astype(factor.dtype))


def scores(q: jax.Array, k: jax.Array, d: Decays) -> jax.Array:
    """A_ij = sum_x q_ix k_jx exp(b_ix - b_jx), 0 where j is not visible to i: [..., c, c]."""
    if d.b is not None:
        return times(_channel_scores(q, k, d), d.pair)
    return times(product("...ix,...jx->...ij", q, k), d.pair)


def _channel_scores(q: jax.Array, k: jax.Array, d: Decays) -> jax.Array:
    """Scores under per-channel decay, tile by tile.

    Below the diagonal tiles the decay is factored at a reference row between key and query, so that
    both exponents are <= 0. Inside a diagonal tile there is no such row and the sum is taken
    elementwise.
    """
    *lead, c, width = q.shape
    s = min(SUB_CHUNK, c)
    q_t, k_t = (y.reshape(*lead, c // s, s, width) for y in (q, k))
    row_t, b_t = (y.reshape(-1, *lead, c // s, s, width) for y in (d.b_row, d.b))
    exponent = total(row_t[..., :, None, :] - b_t[..., None, :, :])
    # With an exclusive read the diagonal is not visible, and its exponent is -g_i > 0.
    lower = jnp.tri(s, k=0 if d.b_row is d.b else -1, dtype=bool)
    lower = lower.reshape((1,) * (exponent.ndim - 3) + (s, s, 1))
    weight = jnp.exp(jnp.where(lower, exponent, -jnp.inf))
    diagonal = jnp.sum(
        q_t[..., :, None, :] * k_t[..., None, :, :] * weight, axis=-1
    )  # [..., tiles, s, s]

    rows = []
    for i in range(c // s):
        at = i * s
        parts = [diagonal[..., i, :, :]]
        if i:
            reference = d.b[..., at - 1 : at, :]
            left = q[..., at : at + s, :] * jnp.exp(total(d.b_row[..., at : at + s, :] - reference))
            right = k[..., :at, :] * jnp.exp(total(reference - d.b[..., :at, :]))
            parts.insert(0, jnp.einsum("rhix,rhjx->rhij", left, right))
        if c - at - s:
            parts.append(jnp.zeros((*lead, s, c - at - s), q.dtype))
        rows.append(jnp.concatenate(parts, axis=-1))
    return jnp.concatenate(rows, axis=-2)


def read_state(
    factor: jax.Array | None, x: jax.Array, state: jax.Array, *, by_channel: bool
) -> jax.Array:
    """Reads factor_i sum_k x_ik S_kv: [..., c, v].

    A factor by token is applied to the product, which rounds nothing; one by channel cannot be.
    """
    if by_channel:
        return product("...ik,...kv->...iv", weigh(factor, x), state, x.dtype)
    return times(product("...ik,...kv->...iv", x, state), factor)


def write_state(
    whole: jax.Array | None, state: jax.Array, factor: jax.Array | None, k: jax.Array, v: jax.Array
) -> jax.Array:
    """The next state, whole * S + sum_j factor_j k_j v_j^T: [..., k, v]."""
    return times(whole, state) + product("...jk,...jv->...kv", weigh(factor, k), v, v.dtype)


def next_state(state: jax.Array, k: jax.Array, v: jax.Array, d: Decays) -> jax.Array:
    """The state after the chunk: [..., k, v]."""
    return write_state(d.whole, state, d.col, k, v)


def forward_chunk(state: jax.Array, x: Chunk, d: Decays) -> jax.Array:
    """Output [..., c, v] of one chunk, no delta rule. `d` is strict when there is a bonus."""
    out = product("...ij,...jv->...iv", scores(x.q, x.k, d), x.v, x.v.dtype)
    out = out + read_state(d.row, x.q, state, by_channel=d.b is not None)
    if x.bonus is not None:
        out = out + jnp.sum(x.q * x.k * x.bonus[None], axis=-1, keepdims=True) * x.v
    return out


def delta_chunk(state: jax.Array, x: Chunk, d: Decays) -> tuple[jax.Array, jax.Array]:
    """Next state and output [r, h, c, v] of one chunk of the delta rule.

    The tokens of the chunk write n_i = beta_i (v_i - S_i'^T k_i), with S_i' the state that token i
    finds. They solve a unit lower triangular system,

        (I + L) N = diag(beta) (V - (K * e^b) S)        L_ij = beta_i A_ij for i > j, else 0

    with A the decayed products of the keys.
    """
    c = x.q.shape[-2]
    below = jnp.tri(c, k=-1, dtype=x.q.dtype)
    lower = x.beta * times(scores(x.k, x.k, d), below)
    wanted = x.beta * (x.v - jnp.einsum("rhik,rhkv->rhiv", times(d.row, x.k), state))
    written = lax.linalg.triangular_solve(
        lower + jnp.eye(c, dtype=lower.dtype)[None, None],
        wanted,
        left_side=True,
        lower=True,
        unit_diagonal=True,
    )
    out = jnp.einsum("rhij,rhjv->rhiv", scores(x.q, x.k, d), written)
    out = out + jnp.einsum("rhik,rhkv->rhiv", times(d.row, x.q), state)
    return next_state(state, x.k, written, d), out
