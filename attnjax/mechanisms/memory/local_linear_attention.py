"""Local linear attention: a ridge regression around every query, weighted by its softmax weights.

Softmax attention is a locally constant fit of the values (Nadaraya-Watson), linear attention a
global linear one. Here every query q fits f(x) = b + W(x - q) to the visible pairs (k_j, v_j) with
weights w_j, and answers f(q) = b. With z_j = k_j - q and h = sqrt(d):

    w_j = e^(q·k_j / h),   ω = Σ w_j,   μ = Σ w_j z_j,   Σ = Σ w_j z_j z_jᵀ + λ I,   ρ = Σ⁻¹ μ
    o = Σ_j s_j v_j,       s_j = w_j (1 - z_j·ρ) / Σ_i w_i (1 - z_i·ρ)

The weights s of a row sum to 1 and may be negative. The result depends on (w, λ) up to a common
factor only, so what λ means has to be said: `ridge_mode`.

Blocks of queries pass over blocks of keys, as in flash attention: once for the maximum, ω and μ,
once per iteration of conjugate gradients (Σ is applied, never formed), once for the output. The
backward pass recomputes the weights and solves once more, with the same Σ (implicit
differentiation). Nothing of size t x s or d x d is kept.

Reference: Zuo et al., "Local Linear Attention: An Optimal Interpolation of Linear and Softmax
Attention for Test-Time Regression", 2025, arXiv:2510.01450 (ICLR 2026); the official repository
Yifei-Zuo/Flash-LLA holds no code yet.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from attnjax.checks import check_qkv
from attnjax.dense import qk_scores, weighted_values
from attnjax.layers import RMSNorm
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels import tilemath
from pallas_kernels.maskprogram import EMPTY, MaskProgram

RIDGE_MODES = ("max", "raw", "softmax")
SOLVERS = ("cg", "direct")

FEW_QUERIES = 8
"""Up to so many queries, as in decoding, forming Σ is cheaper than many passes over the keys."""

# 16-bit products make conjugate gradients diverge.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def local_linear_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    *,
    mask: MaskProgram | Bool[Array, "#b #h #t #s"] | None = None,
    ridge: Float[Array, " h"] | float = 1.0,
    ridge_mode: str = "max",
    bandwidth: float | None = None,
    solver: str | None = None,
    iterations: int | None = None,
    tolerance: float | None = None,
    floor: float = 0.0,
    q_offset: Any = 0,
    block_sizes: tuple[int, int] = (128, 256),
) -> Float[Array, "b t h e"]:
    """Attention by a local linear fit; the formula is above.

    Args:
      query, key, value: shapes as annotated; h a multiple of g.
      mask: a mask of `attnjax.masks`, or booleans, True = attend; None attends everywhere. Key
        tiles that a mask program hides are not visited. A row without keys gives 0.
      ridge: λ >= 0, for all heads or by head; it has a gradient. Small ones cost digits: with
        queries and keys of length sqrt(8), float32 keeps 6 at λ = 1 and 4 at λ = 0.1.
      ridge_mode: what λ is added to: "max", w = e^(score - row maximum), the maximum being a
        constant; "raw", w = e^score; "softmax", w normalized to sum 1.
      bandwidth: h; None is sqrt(d).
      solver: "cg"; "direct" forms Σ and factors it, which costs O(block d²) memory per query; None
        is "direct" for up to 8 queries.
      iterations: upper bound for "cg"; None is 2 d, and at most 64 unless float64.
      tolerance: "cg" stops at residuals of this size relative to μ; None is 1e-7, or 1e-14 for
        float64.
      floor: the denominator is at least floor · ω; 0 is no bound. It guards against queries far
        outside of their keys, whose weights explode.
      q_offset: absolute index of the first query, an integer or an integer array () or [b].
      block_sizes: (queries, keys) of a tile, in tokens.

    Returns:
      Output in the dtype of `query`; everything inside is float32 (float64 for float64).

    Cost: O(t s d) per iteration. Memory: O((t + s) d).

    Raises:
      ValueError: on shapes that do not fit, or an option out of range.

    Example: >>> local_linear_attention(q, k, v, mask=attnjax.masks.Causal()).shape
    """
    name = "local_linear_attention"
    check_qkv(name, query, key, value)
    b, t, h, d = query.shape
    s, g, e = value.shape[1:]
    _check_mode(name, ridge, ridge_mode)
    _check_solver(name, solver, iterations, floor)
    if min(block_sizes) < 1 or (bandwidth is not None and bandwidth <= 0):
        raise ValueError(
            f"{name}: block_sizes and bandwidth must be positive, got {block_sizes} and "
            f"{bandwidth}."
        )
    dtype = tilemath.accumulator_dtype(query.dtype)
    wide = dtype == jnp.float64
    options = _Options(
        mode=ridge_mode,
        factor=1 / (d**0.5 if bandwidth is None else bandwidth),
        solver=solver or ("direct" if t <= FEW_QUERIES else "cg"),
        iterations=(2 * d if wide else min(2 * d, 64)) if iterations is None else iterations,
        tolerance=(1e-14 if wide else 1e-7) if tolerance is None else tolerance,
        floor=floor,
        block_q=min(block_sizes[0], t),
        block_k=min(block_sizes[1], s),
        length=s,
    )
    offset = jnp.asarray(q_offset, jnp.int32).reshape(-1)
    program, keep = (mask, None) if isinstance(mask, MaskProgram) else (None, mask)
    if keep is not None:
        keep = keep.reshape((1,) * (4 - keep.ndim) + keep.shape)
    rows, columns = -t % options.block_q, -s % options.block_k
    pads = lambda n: ((0, 0), (0, n), (0, 0), (0, 0))  # noqa: E731
    q = jnp.pad(query.astype(dtype), pads(rows)).reshape(b, -1, options.block_q, g, h // g, d)
    k, v = (jnp.pad(x.astype(dtype), pads(columns)).swapaxes(1, 2) for x in (key, value))
    lam = jnp.broadcast_to(jnp.asarray(ridge, dtype), (h,)).reshape(g, h // g)
    out: Any = _fit(options, q.transpose(1, 0, 3, 4, 2, 5), k, v, lam, (program, keep, offset))
    out = out.transpose(1, 0, 4, 2, 3, 5).reshape(b, t + rows, h, e)[:, :t]
    return out.astype(query.dtype)


def local_linear_weights(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    scores: Float[Array, "b h t s"],
    *,
    mask: Bool[Array, "#b #h #t #s"] | None = None,
    ridge: Float[Array, " h"] | float = 1.0,
    ridge_mode: str = "max",
    floor: float = 0.0,
) -> tuple[Float[Array, "b h t s"], Float[Array, "b h t d"]]:
    """The weights s of all pairs, and ρ: the definition, with t x s x d numbers in memory.

    Args:
      query, key: shapes as annotated.
      scores: logarithms of w, as from `attnjax.dense.qk_scores`.
      mask, ridge, ridge_mode, floor: as for `local_linear_attention`. Where the floor binds, a row
        does not sum to 1.
    """
    _check_mode("local_linear_weights", ridge, ridge_mode)
    b, h, t, s = scores.shape
    d, dtype = query.shape[3], scores.dtype
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.full_like(scores, -jnp.inf))
    top = lax.stop_gradient(scores.max(-1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(jnp.isneginf(top), jnp.zeros_like(top), top)
    w = jnp.exp(scores - top)
    total = w.sum(-1)
    lam = jnp.broadcast_to(jnp.asarray(ridge, dtype), (h,)).reshape(1, h, 1)
    lam = _row_ridge(ridge_mode, lam, top[..., 0], total)
    keys = jnp.repeat(key.astype(dtype), h // key.shape[2], axis=2).swapaxes(1, 2)
    z = keys[:, :, None] - query.astype(dtype).swapaxes(1, 2)[:, :, :, None]  # [b, h, t, s, d]
    mu = _einsum("bhts,bhtsd->bhtd", w, z)
    sigma = _einsum("bhts,bhtsd,bhtse->bhtde", w, z, z)
    sigma = sigma + lam[..., None, None] * jnp.eye(d, dtype=dtype)[None, None, None]
    rho = _factor_and_solve(sigma, mu)
    weights = w * (1 - _einsum("bhtsd,bhtd->bhts", z, rho))
    return weights / _denominator(floor, weights.sum(-1), total)[..., None], rho


def _check_mode(name: str, ridge: Any, mode: str) -> None:
    if mode not in RIDGE_MODES:
        raise ValueError(f"{name}: ridge_mode must be one of {RIDGE_MODES}, got {mode!r}.")
    if isinstance(ridge, int | float) and ridge < 0:
        raise ValueError(f"{name}: ridge must be at least 0, got {ridge}.")


def _check_solver(name: str, solver: str | None, iterations: int | None, floor: float) -> None:
    if solver not in (None, *SOLVERS):
        raise ValueError(f"{name}: solver must be one of {SOLVERS} or None, got {solver!r}.")
    if (iterations is not None and iterations < 1) or not 0 <= floor <= 1:
        raise ValueError(
            f"{name}: iterations={iterations} must be at least 1, or None, and floor={floor} in "
            "[0, 1]."
        )


def _row_ridge(mode: str, lam: jax.Array, top: jax.Array, total: jax.Array) -> jax.Array:
    """λ as it stands beside weights e^(score - top): [..., t]; 1 for rows without keys."""
    if mode == "raw":
        lam = lam * jnp.exp(jnp.clip(-top, -80.0, 80.0))
    elif mode == "softmax":
        lam = lam * total
    return jnp.where(total > 0, jnp.broadcast_to(lam, total.shape), jnp.ones_like(total))


def _factor_and_solve(sigma: jax.Array, x: jax.Array) -> jax.Array:
    factor = jnp.linalg.cholesky(sigma)
    solve = functools.partial(lax.linalg.triangular_solve, factor, left_side=True, lower=True)
    return solve(solve(x[..., None]), transpose_a=True)[..., 0]


# --------------------------------------------------------------- blockwise, matrix-free
# Shapes inside: queries [g, r, t] with r = h / g, tiles [b, g, r, t, s].


@dataclasses.dataclass(frozen=True)
class _Options:
    mode: str
    factor: float
    solver: str
    iterations: int
    tolerance: float
    floor: float
    block_q: int
    block_k: int
    length: int


class _Tile(NamedTuple):
    scores: jax.Array  # [b, g, r, t, s], -inf where hidden
    key: jax.Array  # [b, g, s, d]
    value: jax.Array  # [b, g, s, e]
    start: jax.Array  # index of the first key


class _Rows(NamedTuple):
    """What the forward pass finds of each query: [b, g, r, t], and ρ [b, g, r, t, d]."""

    top: jax.Array
    total: jax.Array
    ridge: jax.Array
    rho: jax.Array
    norm: jax.Array


def _pairs(x: jax.Array, keys: jax.Array) -> jax.Array:
    return _einsum("bgrtd,bgsd->bgrts", x, keys)


def _sums(c: jax.Array, keys: jax.Array) -> jax.Array:
    return _einsum("bgrts,bgsd->bgrtd", c, keys)


def _spread(c: jax.Array, x: jax.Array) -> jax.Array:
    return _einsum("bgrts,bgrtd->bgsd", c, x)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return (x * y).sum(-1)


def _sweep(options: _Options, q: Any, k: Any, v: Any, masks: Any, block: Any) -> Callable[..., Any]:
    """A fold over the key tiles that a block of queries sees: `sweep(body, carry)`."""
    program, keep, offset = masks
    b, g, r, t, _ = q.shape
    first = block * t
    count = k.shape[2] // options.block_k

    def tile(j: Any) -> _Tile:
        start = j * options.block_k
        keys, values = (lax.dynamic_slice_in_dim(x, start, options.block_k, 2) for x in (k, v))
        scores = _pairs(q, keys) * options.factor
        k_index = start + lax.broadcasted_iota(jnp.int32, (1, 1, 1, options.block_k), 3)
        visible = k_index < options.length
        if program is not None:
            q_index = first + lax.broadcasted_iota(jnp.int32, (1, 1, t, 1), 2)
            rows = lax.broadcasted_iota(jnp.int32, (b, 1, 1, 1), 0)
            heads = lax.broadcasted_iota(jnp.int32, (1, g * r, 1, 1), 1)
            index = q_index + offset.reshape(-1, 1, 1, 1)
            visible = visible & jnp.asarray(program.predicate(rows, heads, index, k_index))
        if keep is not None:
            visible = visible & _cut(_cut(keep, first, t, 2), start, options.block_k, 3)
        visible = visible.reshape((1,) * (4 - visible.ndim) + visible.shape)
        groups = (g, r) if visible.shape[1] == g * r else (1, 1)
        visible = visible.reshape(visible.shape[0], *groups, *visible.shape[2:])
        scores = jnp.where(visible, scores, jnp.full_like(scores, -jnp.inf))
        return _Tile(scores, keys, values, start)

    def seen(j: Any) -> Any:
        if program is None:
            return True
        start = j * options.block_k
        classes = program.classify(
            first + offset.min(), first + t + offset.max(), start, start + options.block_k
        )
        return jnp.asarray(classes != EMPTY).reshape(())

    def sweep(body: Callable[[Any, _Tile], Any], carry: Any) -> Any:
        if count == 1:
            return body(carry, tile(jnp.int32(0)))

        def step(j: Any, carry: Any) -> Any:
            return lax.cond(seen(j), lambda c: body(c, tile(j)), lambda c: c, carry)

        return lax.fori_loop(jnp.int32(0), jnp.int32(count), step, carry)

    return sweep


def _cut(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    """A tile of a mask along one axis, which may have size 1; False beyond its end."""
    if x.shape[axis] == 1:
        return x
    pads = [(0, -x.shape[axis] % size if i == axis else 0) for i in range(4)]
    return lax.dynamic_slice_in_dim(jnp.pad(x, pads), start, size, axis)


def _solver(options: _Options, sweep: Any, q: Any, top: Any, lam: Any) -> Callable[..., jax.Array]:
    """The map x -> Σ⁻¹ x for all queries of a block."""
    if options.solver == "direct":
        width = q.shape[-1]

        def add(sigma: jax.Array, tile: _Tile) -> jax.Array:
            z = tile.key[:, :, None, None] - q[..., None, :]  # [b, g, r, t, s, d]
            w = jnp.exp(tile.scores - top[..., None])
            return sigma + _einsum("bgrts,bgrtsd,bgrtse->bgrtde", w, z, z)

        eye = jnp.eye(width, dtype=q.dtype)[None, None, None, None]
        sigma = sweep(add, lam[..., None, None] * eye)
        return lambda x: _factor_and_solve(sigma, x)

    def apply(p: jax.Array) -> jax.Array:
        def add(carry: Any, tile: _Tile) -> Any:
            w = jnp.exp(tile.scores - top[..., None])
            c = w * (_pairs(p, tile.key) - _dot(q, p)[..., None])
            return carry[0] + _sums(c, tile.key), carry[1] + c.sum(-1)

        moved, total = sweep(add, (jnp.zeros_like(p), jnp.zeros_like(lam)))
        return moved - q * total[..., None] + lam[..., None] * p

    def solve(x: jax.Array) -> jax.Array:
        goal = options.tolerance**2 * _dot(x, x)

        def go_on(state: Any) -> Any:
            step, (_, _, _, size) = state
            return (step < options.iterations) & (size > goal).any()

        def iterate(state: Any) -> Any:
            step, (y, residual, p, size) = state
            image = apply(p)
            curve = _dot(p, image)
            live = (size > goal) & (curve > 0)  # the others are solved, and stay as they are
            one = jnp.ones_like(size)
            rate = jnp.where(live, size / jnp.where(live, curve, one), jnp.zeros_like(size))
            y = y + rate[..., None] * p
            residual = residual - rate[..., None] * image
            new = jnp.where(live, _dot(residual, residual), size)
            turn = jnp.where(live, new / jnp.where(live, size, one), jnp.zeros_like(size))
            p = jnp.where(live[..., None], residual + turn[..., None] * p, p)
            return step + 1, (y, residual, p, new)

        start = (jnp.zeros_like(x), x, x, _dot(x, x))
        return lax.while_loop(go_on, iterate, (0, start))[1][0]

    return solve


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fit(options: _Options, q: Any, k: Any, v: Any, lam: Any, masks: Any) -> jax.Array:
    """Outputs [n, b, g, r, t, e] of n blocks of queries q [n, b, g, r, t, d]."""
    return _fit_fwd(options, q, k, v, lam, masks)[0]


def _fit_fwd(options: _Options, q: Any, k: Any, v: Any, lam: Any, masks: Any) -> Any:
    def block(index_and_q: Any) -> tuple[jax.Array, _Rows]:
        index, q = index_and_q
        sweep = _sweep(options, q, k, v, masks, index)
        zeros = jnp.zeros(q.shape[:-1], q.dtype)

        def statistics(carry: Any, tile: _Tile) -> Any:
            top, total, mean = carry
            new = jnp.maximum(top, tile.scores.max(-1))
            safe = jnp.where(jnp.isneginf(new), jnp.zeros_like(new), new)
            old = jnp.exp(top - safe)
            w = jnp.exp(tile.scores - safe[..., None])
            mean = mean * old[..., None] + _sums(w, tile.key)
            return new, total * old + w.sum(-1), mean

        start = (jnp.full_like(zeros, -jnp.inf), zeros, jnp.zeros_like(q))
        top, total, mean = sweep(statistics, start)
        top = jnp.where(jnp.isneginf(top), zeros, top)
        ridge = _row_ridge(options.mode, lam[None, :, :, None], top, total)
        rho = _solver(options, sweep, q, top, ridge)(mean - total[..., None] * q)

        def output(carry: Any, tile: _Tile) -> Any:
            u = 1 - (_pairs(rho, tile.key) - _dot(q, rho)[..., None])
            c = jnp.exp(tile.scores - top[..., None]) * u
            return carry[0] + _sums(c, tile.value), carry[1] + c.sum(-1)

        # Σ w (1 - z·ρ) is ω - μ·ρ; summed like this the weights sum to 1 for any error of ρ
        shape = (*q.shape[:-1], v.shape[-1])
        number, norm = sweep(output, (jnp.zeros(shape, q.dtype), zeros))
        safe = _denominator(options.floor, norm, total)
        return number / safe[..., None], _Rows(top, total, ridge, rho, norm)

    out, rows = lax.map(block, (jnp.arange(q.shape[0], dtype=jnp.int32), q))
    return out, (q, k, v, lam, masks, out, rows)


def _denominator(floor: float, norm: jax.Array, total: jax.Array) -> jax.Array:
    norm = jnp.where(norm < floor * total, floor * total, norm)
    return jnp.where(norm == 0, jnp.ones_like(norm), norm)


def _fit_bwd(options: _Options, saved: Any, d_out: Any) -> Any:
    q, k, v, lam, masks, out, rows = saved

    def block(carry: Any, given: Any) -> Any:
        dk, dv, d_lam = carry
        index, q, out, d_out, row = given
        top, total, ridge, rho, norm = row
        sweep = _sweep(options, q, k, v, masks, index)
        safe = _denominator(options.floor, norm, total)
        bounded = norm < options.floor * total
        inner = _dot(d_out, out)
        # the denominator's share of the gradient: through every weight, or where it stands at its
        # bound through ω alone
        through = jnp.where(bounded, jnp.zeros_like(inner), inner)
        to_total = jnp.where(bounded, -inner * options.floor / safe, jnp.zeros_like(inner))

        def slopes(tile: _Tile) -> tuple[jax.Array, jax.Array]:
            w = jnp.exp(tile.scores - top[..., None])
            return w, (_pairs(d_out, tile.value) - through[..., None]) / safe[..., None]

        def to_rho(carry: Any, tile: _Tile) -> Any:
            w, a = slopes(tile)
            return carry[0] + _sums(w * a, tile.key), carry[1] + (w * a).sum(-1)

        moved, sums = sweep(to_rho, (jnp.zeros_like(q), jnp.zeros_like(top)))
        y = _solver(options, sweep, q, top, ridge)(q * sums[..., None] - moved)
        d_ridge = -_dot(y, rho)
        if options.mode == "softmax":
            to_total = to_total + d_ridge * lam[None, :, :, None]

        def gradients(carry: Any, tile: _Tile) -> Any:
            dk, dv, dq, sum_rho, sum_y = carry
            w, a = slopes(tile)
            u = 1 - (_pairs(rho, tile.key) - _dot(q, rho)[..., None])
            zy = _pairs(y, tile.key) - _dot(q, y)[..., None]
            ds = w * ((a + zy) * u + to_total[..., None]) * options.factor
            by_rho, by_y = -w * (a + zy), w * u  # dz = by_rho ρ + by_y y
            dk_tile = _spread(by_rho, rho) + _spread(by_y, y) + _spread(ds, q)
            dv_tile = _spread(w * u / safe[..., None], d_out)
            dq = dq + _sums(ds, tile.key)
            dk, dv = _add(dk, dk_tile, tile.start), _add(dv, dv_tile, tile.start)
            return dk, dv, dq, sum_rho + by_rho.sum(-1), sum_y + by_y.sum(-1)

        zero = jnp.zeros_like(top)
        start = (dk, dv, jnp.zeros_like(q), zero, zero)
        dk, dv, dq, sum_rho, sum_y = sweep(gradients, start)
        dq = dq - sum_rho[..., None] * rho - sum_y[..., None] * y
        factor = _row_ridge(options.mode, jnp.ones_like(lam)[None, :, :, None], top, total)
        d_ridge = jnp.where(total > 0, d_ridge * factor, jnp.zeros_like(d_ridge))
        return (dk, dv, d_lam + d_ridge.sum((0, 3))), dq

    start = (jnp.zeros_like(k), jnp.zeros_like(v), jnp.zeros_like(lam))
    blocks = (jnp.arange(q.shape[0], dtype=jnp.int32), q, out, d_out, rows)
    (dk, dv, d_lam), dq = lax.scan(block, start, blocks)
    return dq, dk, dv, d_lam, None


def _add(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    old = lax.dynamic_slice_in_dim(whole, start, part.shape[2], 2)
    return lax.dynamic_update_slice_in_dim(whole, old + part, start, 2)


_fit.defvjp(_fit_fwd, _fit_bwd)


class LocalLinearAttention(SequenceMixer):
    """Multi-head `local_linear_attention`.

    Scores and weights can be captured and edited; that, and dropout, take the definition with its
    t x s x d numbers.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      ridge: λ, or where it starts.
      learn_ridge: whether every head learns its λ, the softplus of a parameter.
      ridge_mode, solver, iterations, floor: as for `local_linear_attention`.
      qk_norm: RMS norm of queries and keys: w is then a Gaussian kernel of q - k.
      rngs: stream `params`.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: on a ridge that is not positive, an unknown ridge_mode or solver, iterations < 1
        or a floor outside of [0, 1].
    """

    sites = SCORE_SITES
    directions = ("causal", "bidirectional")
    grouped = masked = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        ridge: float = 1.0,
        learn_ridge: bool = True,
        ridge_mode: str = "max",
        solver: str | None = None,
        iterations: int | None = None,
        floor: float = 0.0,
        qk_norm: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        if ridge <= 0:
            raise ValueError(f"LocalLinearAttention: ridge must be positive, got {ridge}.")
        _check_mode("LocalLinearAttention", ridge, ridge_mode)
        _check_solver("LocalLinearAttention", solver, iterations, floor)
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)
        self.query_norm = self.key_norm = nnx.data(None)
        if qk_norm:
            norm = functools.partial(
                RMSNorm, self.head_dim, axis="head_dim", param_dtype=self.param_dtype
            )
            self.query_norm, self.key_norm = norm(), norm()
        self.ridge, self.ridge_mode, self.log_ridge = ridge, ridge_mode, nnx.data(None)
        self.solver, self.iterations, self.floor = solver, iterations, floor
        if learn_ridge:
            start = jnp.full((num_heads,), ridge, jnp.float32)
            self.log_ridge = self.parameter(jnp.log(jnp.expm1(start)), ("heads",))

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Normalized and rotated keys, and values."""
        return dict.fromkeys(("key", "value"), (self.num_kv_heads, self.head_dim))

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = self.rotate(call, q, k)
        stored = call.store(key=k, value=v)
        k, v = stored["key"], stored["value"]
        dtype = tilemath.accumulator_dtype(q.dtype)
        ridge: Any = self.ridge
        if self.log_ridge is not None:
            ridge = jax.nn.softplus(self.log_ridge[...].astype(dtype))
        if call.wants_scores:
            scores = self.edit_scores(call, qk_scores(q, k))
            weights, _ = local_linear_weights(
                q, k, scores, mask=call.keep(k.shape[1]), ridge=ridge, ridge_mode=self.ridge_mode,
                floor=self.floor,
            )  # fmt: skip
            return weighted_values(self.edit_weights(call, weights), v).astype(q.dtype)
        return local_linear_attention(
            q, k, v, mask=call.visible(k.shape[1]), ridge=ridge, ridge_mode=self.ridge_mode,
            solver=self.solver, iterations=self.iterations, floor=self.floor, q_offset=call.start,
        )  # fmt: skip


def _example() -> tuple[LocalLinearAttention, jax.Array]:
    module = LocalLinearAttention(2, 16, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 11, 16))


SPEC = Mechanism(
    id="local_linear_attention",
    title="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention "
    "for Test-Time Regression",
    arxiv="2510.01450",
    year=2025,
    code="Yifei-Zuo/Flash-LLA",
    function=local_linear_attention,
    module=LocalLinearAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="einsum",
    cost="O(I T^2), I iterations of conjugate gradients; memory O(T)",
    reduces_to={"ridge -> infinity": "multi_head_attention"},
    golden=("lla",),
    reading="Value of the ridge and what it is relative to (ridge_mode), and the norm of queries "
    "and keys in the module: the official repository holds no code yet.",
    example=_example,
)
