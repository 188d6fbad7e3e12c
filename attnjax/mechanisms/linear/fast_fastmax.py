"""FAST: attention with a polynomial instead of the exponential, which factors into moments.

    A_ij = f(x_ij) / Σ_j f(x_ij),   x_ij = scale q̂_i · k̂_j,   f(x) = Σ_{l <= p} x^l / l!,   p = 1, 2
    o_i = (a0 z0 + a1 q̂·Z1 + a2 (q̂⊗q̂)·Z2) / (same with v = 1),   z0 = Σ v, Z1 = Σ k̂ v, Z2 = Σ k̂⊗k̂ v

No product of all queries and keys is made: O(T K^(p+1)) instead of O(T² K). Inside a chunk f is
taken of the scores themselves, earlier tokens come in through their moments, of which only the
K (K + 1) / 2 different second ones are kept. For p = 2, f(x) = ((1 + x)² + 1) / 2 is positive; for
p = 1 it is only where x > -1, which normalized queries and keys guarantee.

Reference: Gerami et al., "FAST: Factorizable Attention for Speeding up Transformers", 2024,
arXiv:2402.07901; code armingerami/fastmax. Three normalizations: the paper's, by each token's own
mean and deviation, which causal use needs (the default); the code's, by the longest token of the
sequence, which lets causal outputs depend on later tokens; none. The CUDA gradient leaves out the
derivative of the normalization, this one does not.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnjax.cache import StateCache
from attnjax.cache.linear_state import state_dtype
from attnjax.checks import check_qkv, check_segments
from attnjax.mechanisms.linear.linear_attention import runs as runs_of
from attnjax.mixer import Call, SequenceMixer
from attnjax.spec import Mechanism

NORMALIZATIONS = ("paper", "max", "none")


def fastmax(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    *,
    order: int = 2,
    causal: bool = False,
    normalize: str = "paper",
    center: bool = True,
    scale: float | None = None,
    coefficients: Sequence[float] | None = None,
    segment_ids: Int[Array, "b s"] | None = None,
    key_mask: Bool[Array, "b s"] | None = None,
    initial_state: Float[Array, "b g f e1"] | None = None,
    return_state: bool = False,
    dropout_rate: float = 0.0,
    dropout_rng: Any = None,
    chunk_size: int | None = None,
) -> Any:
    """Attention with weights f(x) = a0 + a1 x (+ a2 x²) of normalized queries and keys.

        o_i = Σ_j f(x_ij) v_j / Σ_j f(x_ij),   x_ij = scale q̂_i · k̂_j

    Args:
      query, key, value: shapes as annotated; h a multiple of g. Causal: s = t.
      order: p, 1 or 2.
      causal: sums over j <= i.
      normalize: "paper": every token loses its mean over the channels and is divided by its
        deviation; "max": divided by the longest token of the sequence and head, also when causal;
        "none".
      center: whether "max" first takes each token's mean away, as older code does.
      scale: None is 1 for "max" and d^-0.5 otherwise.
      coefficients: a0, ..., ap; None is 1/l!.
      segment_ids: packed documents, which end where the id changes and do not see each other; s =
        t.
      key_mask: False marks keys that nobody sees.
      initial_state: moments of earlier tokens, causal only; see Returns.
      return_state: also return the moments of all tokens so far, causal only.
      dropout_rate: of the channels of q̂ and k̂, order 1 only, as in the code; needs `dropout_rng`.
      dropout_rng: key.
      chunk_size: tokens per chunk; None is 128 for order 1 and 256 for order 2.

    Returns:
      Output [b, t, h, e] in the dtype of `value`; a query whose weights sum to 0 gets 0. With
      return_state also the moments [b, g, f, e + 1] with f = 1 + d (+ d (d + 1) / 2) features, the
      last column the sums of the weights, float32 or wider.

    Cost: O(t (c (d + e) + f e)), chunk c. Memory: O(t) + O(f e) per head; the causal backward pass
      saves its inputs only.

    Raises:
      ValueError: on shapes that do not fit together, an order, normalization or coefficients that
        do not exist, or a state without causal=True.
      NotImplementedError: for dropout with order 2.

    Example: >>> fastmax(query, key, value, causal=True).shape
    """
    _check(query, key, value, order, causal, normalize, coefficients, chunk_size, segment_ids)
    if not causal and (return_state or initial_state is not None):
        raise ValueError("fastmax: a state needs causal=True; without it give all keys at once.")
    taken = tuple((1.0, 1.0, 0.5)[: order + 1] if coefficients is None else coefficients)
    chunk = chunk_size or {1: 128, 2: 256}[order]
    dtype = jnp.result_type(*{state_dtype(x.dtype) for x in (query, key, value)})
    q, k, v = (x.astype(dtype) for x in (query, key, value))
    if key_mask is not None:
        # padding may hold anything, NaN too
        k, v = (jnp.where(key_mask[..., None, None], x, jnp.zeros_like(x)) for x in (k, v))
    q, k = _normalized(q, normalize, center), _normalized(k, normalize, center)
    if dropout_rate:
        q, k = _dropped(q, k, dropout_rate, dropout_rng, order)
    width = q.shape[-1]
    q = q * ((1.0 if normalize == "max" else width**-0.5) if scale is None else scale)
    ones = jnp.ones((*v.shape[:-1], 1), dtype)
    if key_mask is not None:
        ones = ones * key_mask[..., None, None].astype(dtype)
    w = jnp.concatenate([v, ones], axis=-1)
    b, t, h, _ = q.shape
    g = k.shape[2]
    q = q.reshape(b, t, g, h // g, width)
    runs = jnp.zeros((b, t), jnp.int32) if segment_ids is None else runs_of(segment_ids)
    empty = jnp.zeros((b, g, features(width, order), w.shape[-1]), dtype)
    state = empty if initial_state is None else initial_state.astype(dtype)
    run: Any = functools.partial(_causal, taken, chunk)
    if causal:
        sums, state = run(q, k, w, runs, state)
    elif segment_ids is None:
        sums = _everything(taken, chunk, q, k, w, empty)
    else:  # tokens before and at i, tokens at i and after, and i itself once too often
        back = [jnp.flip(x, 1) for x in (q, k, w, runs)]
        x = jnp.einsum("btgrd,btgd->btgr", q, k)
        sums = (
            run(q, k, w, runs, empty)[0]
            + jnp.flip(run(*back, empty)[0], 1)
            - _polynomial(taken, x)[..., None] * w[:, :, :, None]
        )
    total = sums[..., -1:]
    seen = total != 0
    out = jnp.where(seen, sums[..., :-1] / jnp.where(seen, total, 1), 0)
    out = out.reshape(b, t, h, v.shape[-1]).astype(value.dtype)
    return (out, state) if return_state else out


def features(width: int, order: int) -> int:
    """Moments of a head of d = `width` channels: 1 + d, and d (d + 1) / 2 more for order 2."""
    return 1 + width + (width * (width + 1) // 2 if order == 2 else 0)


def _check(
    query: Any, key: Any, value: Any, order: int, causal: bool, normalize: str,
    coefficients: Any, chunk_size: Any, segment_ids: Any,
) -> None:  # fmt: skip
    check_qkv("fastmax", query, key, value)
    if (causal or segment_ids is not None) and key.shape[1] != query.shape[1]:
        raise ValueError(
            f"fastmax: query and key must have the same length when causal or with segment_ids, "
            f"got {query.shape[1]} and {key.shape[1]} tokens."
        )
    _check_options("fastmax", order, normalize, coefficients, chunk_size)
    if segment_ids is not None:
        check_segments("fastmax", segment_ids, *query.shape[:2])


def _check_options(
    name: str, order: int, normalize: str, coefficients: Any, chunk_size: Any
) -> None:
    if order not in (1, 2) or normalize not in NORMALIZATIONS:
        raise ValueError(
            f"{name}: order={order} must be 1 or 2 and normalize={normalize!r} one of "
            f"{', '.join(NORMALIZATIONS)}."
        )
    if coefficients is not None and len(coefficients) != order + 1:
        raise ValueError(
            f"{name}: order={order} needs {order + 1} coefficients, got {coefficients}."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{name}: chunk_size={chunk_size} must be at least 1 token, or None.")


def _normalized(x: jax.Array, kind: str, center: bool) -> jax.Array:
    """Queries or keys [b, t, h, d] after the normalization `kind`."""
    if kind == "none":
        return x
    if kind == "paper" or center:
        x = x - x.mean(-1, keepdims=True)
    squares = jnp.square(x)
    if kind == "paper":
        return x * lax.rsqrt(squares.mean(-1, keepdims=True) + 1e-6)
    # the root of the maximum, as the root of every token's square is not differentiable at 0
    longest = squares.sum(-1, keepdims=True).max(1, keepdims=True)
    return x * lax.rsqrt(jnp.where(longest > 0, longest, 1))


def _dropped(
    q: jax.Array, k: jax.Array, rate: float, rng: Any, order: int
) -> tuple[jax.Array, jax.Array]:
    """Channels of queries and keys, each kept with probability 1 - rate."""
    if order != 1:
        raise NotImplementedError(
            f"fastmax: dropout_rate={rate} is supported with order=1 only, where it drops channels "
            "of queries and keys; pass dropout_rate=0."
        )
    if rng is None:
        raise ValueError("fastmax: dropout_rate needs dropout_rng=key.")

    def drop(x: jax.Array, key: Any) -> jax.Array:
        kept = jax.random.bernoulli(key, 1 - rate, x.shape)
        return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))

    first, second = jax.random.split(rng)
    return drop(q, first), drop(k, second)


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    """A0 + a1 x + a2 x², by Horner's rule."""
    y = jnp.full_like(x, coefficients[-1])
    for a in coefficients[-2::-1]:
        y = y * x + a
    return y


def _features(x: jax.Array, coefficients: tuple[float, ...] | None, order: int) -> jax.Array:
    """[1, x, x⊗x] over the last axis, so that queries' and keys' give f: [..., d] -> [..., f].

    Args:
      x: queries or keys.
      coefficients: for queries; None is for keys, which carry no factors.
      order: 1 or 2.
    """
    a = coefficients or (1.0,) * (order + 1)
    parts = [jnp.full_like(x[..., :1], a[0]), a[1] * x]
    if order == 2:
        left, right = np.triu_indices(x.shape[-1])
        products = x[..., left] * x[..., right]
        if coefficients:  # both of x_i x_j and x_j x_i
            twice = jnp.asarray(np.where(left == right, a[2], 2 * a[2]), x.dtype)
            products = products * twice.reshape((1,) * (x.ndim - 1) + twice.shape)
        parts.append(products)
    return jnp.concatenate(parts, axis=-1)


# --------------------------------------------------------------------------------- causal: chunks
# Shapes of one chunk: q [b, c, g, r, d], k [b, c, g, d], w [b, c, g, e + 1], runs [b, c], state
# [b, g, f, e + 1]; `before` [b] is the document of the token before the chunk.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _causal(
    a: tuple[float, ...], chunk: int, q: Any, k: Any, w: Any, runs: Any, state: Any
) -> tuple[jax.Array, jax.Array]:
    """Σ_{j <= i} f(q_i · k_j) w_j [b, t, g, r, e + 1] within documents, and the last moments."""
    cut = _chunks(chunk, q, k, w, runs)

    def body(carry: Any, xs: Any) -> Any:
        state, before = carry
        out = _inside(a, xs[0], xs[1], xs[2], xs[3]) + _from_before(a, xs[0], state, xs[3], before)
        return (_moved(a, xs[1], xs[2], xs[3], state, before), xs[3][:, -1]), out

    (state, _), out = lax.scan(body, (state, runs[:, 0]), cut)
    return _joined(out, q.shape[1]), state


def _causal_forward(a: Any, chunk: int, *inputs: Any) -> Any:
    return _causal(a, chunk, *inputs), inputs


def _causal_backward(a: Any, chunk: int, saved: Any, cotangents: Any) -> Any:
    """The states are computed again going forward for dq; dk and dw need theirs from the end."""
    q, k, v, runs, first = saved
    dout, dlast = cotangents
    cut = _chunks(chunk, q, k, v, runs)
    dcut = _chunks(chunk, dout)[0]
    before = jnp.concatenate([runs[None, :, 0], cut[3][:-1, :, -1]])

    def forward(state: Any, xs: Any) -> Any:
        (qc, kc, wc, rc), dc, pc = xs

        def read(qc: jax.Array) -> jax.Array:
            return _inside(a, qc, kc, wc, rc) + _from_before(a, qc, state, rc, pc)

        return _moved(a, kc, wc, rc, state, pc), jax.vjp(read, qc)[1](dc)[0]

    def backward(dstate: Any, xs: Any) -> Any:
        (qc, kc, wc, rc), dc, pc = xs
        # linear in the state, so that its value does not matter here
        _, pull = jax.vjp(
            lambda kc, wc, state: (
                _inside(a, qc, kc, wc, rc) + _from_before(a, qc, state, rc, pc),
                _moved(a, kc, wc, rc, state, pc),
            ),
            kc, wc, jnp.zeros_like(first),
        )  # fmt: skip
        dk, dw, dstate = pull((dc, dstate))
        return dstate, (dk, dw)

    dq = lax.scan(forward, first, (cut, dcut, before))[1]
    dfirst, (dk, dw) = lax.scan(backward, dlast, (cut, dcut, before), reverse=True)
    t = q.shape[1]
    none = np.zeros(runs.shape, jax.dtypes.float0)
    return _joined(dq, t), _joined(dk, t), _joined(dw, t), none, dfirst


_causal.defvjp(_causal_forward, _causal_backward)


def _inside(a: tuple[float, ...], q: Any, k: Any, w: Any, runs: Any) -> jax.Array:
    """What a chunk's queries read of the chunk itself."""
    f = _polynomial(a, jnp.einsum("bcgrd,bsgd->bgrcs", q, k))
    c = q.shape[1]
    seen = jnp.tril(jnp.ones((c, c), bool))[None] & (runs[:, :, None] == runs[:, None])
    f = jnp.where(seen[:, None, None], f, jnp.zeros_like(f))
    return jnp.einsum("bgrcs,bsge->bcgre", f, w)


def _from_before(a: tuple[float, ...], q: Any, state: Any, runs: Any, before: Any) -> jax.Array:
    """What a chunk's queries read of the moments of the document that goes on into it."""
    phi = _features(q, a, len(a) - 1)
    kept = (runs == before[:, None]).astype(q.dtype)
    return jnp.einsum("bcgrf,bgfe->bcgre", phi * kept[..., None, None, None], state)


def _moved(a: tuple[float, ...], k: Any, w: Any, runs: Any, state: Any, before: Any) -> jax.Array:
    """The moments after a chunk, of the document of its last token."""
    last = runs[:, -1]
    w = w * (runs == last[:, None]).astype(w.dtype)[..., None, None]
    state = state * (last == before).astype(w.dtype)[:, None, None, None]
    return state + jnp.einsum("bcgf,bcge->bgfe", _features(k, None, len(a) - 1), w)


def _chunks(chunk: int, *arrays: Any) -> tuple[jax.Array, ...]:
    """[b, t, ...] -> [n, b, c, ...]; zeros at the end, or the last document's id."""
    t = arrays[0].shape[1]
    c = max(1, min(chunk, t))
    more = -t % c

    def cut(x: jax.Array) -> jax.Array:
        mode = "edge" if jnp.issubdtype(x.dtype, jnp.integer) else "constant"
        x = jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)], mode=mode)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, c, *x.shape[2:]), 1, 0)

    return tuple(cut(x) for x in arrays)


def _joined(x: jax.Array, t: int) -> jax.Array:
    """[n, b, c, ...] -> [b, t, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :t]


# ----------------------------------------------------------------------------------- all tokens


def _everything(a: tuple[float, ...], chunk: int, q: Any, k: Any, w: Any, empty: Any) -> jax.Array:
    """Σ_j f(q_i · k_j) w_j over all tokens."""
    order = len(a) - 1

    @jax.checkpoint
    def gather(state: Any, xs: Any) -> Any:
        return state + jnp.einsum("bcgf,bcge->bgfe", _features(xs[0], None, order), xs[1]), None

    @jax.checkpoint
    def read(q: jax.Array) -> jax.Array:
        return jnp.einsum("bcgrf,bgfe->bcgre", _features(q, a, order), state)

    state = lax.scan(gather, empty, _chunks(chunk, k, w))[0]
    return _joined(lax.map(read, _chunks(chunk, q)[0]), q.shape[1])


class FastAttention(SequenceMixer):
    """Multi-head `fastmax`; causal or not. It knows no positions.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      order: p, 1 or 2. Paper: both; 2 is the more accurate.
      normalize: "paper", "max" (not causal) or "none", see `fastmax`.
      scale: of the scores; None is 1 for "max" and head_dim^-0.5 otherwise.
      coefficients: a0, ..., ap; None is 1/l!.
      chunk_size: tokens per chunk; None is 128 for order 1 and 256 for order 2.
      rngs: stream `params`.
      **options: of `SequenceMixer`; num_kv_heads shares keys, values and moments; dropout_rate
        drops channels of queries and keys and needs order=1.

    Raises:
      ValueError: on an unknown order or normalization, or "max" with causal=True.
      NotImplementedError: for dropout_rate > 0 with order 2.
    """

    directions = ("causal", "bidirectional")
    grouped = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        order: int = 2,
        normalize: str = "paper",
        scale: float | None = None,
        coefficients: Sequence[float] | None = None,
        chunk_size: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        _check_options("FastAttention", order, normalize, coefficients, chunk_size)
        if self.causal and normalize == "max":
            raise ValueError(
                "FastAttention: normalize='max' divides by the longest token of the whole sequence,"
                " so causal=True would see later tokens; pass normalize='paper' or causal=False."
            )
        if self.dropout_rate and order != 1:
            raise NotImplementedError(
                f"FastAttention: dropout_rate={self.dropout_rate} is supported with order=1 only; "
                "pass dropout_rate=0."
            )
        self.order, self.normalize, self.scale = order, normalize, scale
        self.coefficients = None if coefficients is None else tuple(coefficients)
        self.chunk_size = chunk_size
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> StateCache:
        """Moments of no token, as large for any length.

        Args:
          batch: rows.
          max_length: unused.
          dtype: None is that of the parameters; the moments are float32, or float64 where it is.
        """
        del max_length
        self._require_decoding()
        kind = state_dtype(self.param_dtype if dtype is None else dtype)
        return StateCache.create(batch, {"moments": self._state_shape()}, kind)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        if call.valid is not None:
            q = jnp.where(call.valid[..., None, None], q, jnp.zeros_like(q))
        options: dict[str, Any] = dict(
            order=self.order, causal=call.causal, normalize=self.normalize, scale=self.scale,
            coefficients=self.coefficients, segment_ids=call.segment_ids, key_mask=call.valid,
            chunk_size=self.chunk_size,
        )  # fmt: skip
        if call.dropout_key is not None:
            options |= dict(dropout_rate=self.dropout_rate, dropout_rng=call.dropout_key)
        if call.cache is None:
            return fastmax(q, k, v, **options)
        old = call.cache.state["moments"]
        if old.shape[1:] != self._state_shape():
            raise ValueError(
                f"FastAttention: the cache holds moments of shape {old.shape[1:]}, needed is "
                f"{self._state_shape()}; make it with init_cache of the same module."
            )
        out, state = fastmax(q, k, v, initial_state=old, return_state=True, **options)
        call.cache = call.cache.next(call.count, moments=state)
        return out

    def _state_shape(self) -> tuple[int, ...]:
        return (self.num_kv_heads, features(self.head_dim, self.order), self.head_dim + 1)


def _example() -> tuple[FastAttention, jax.Array]:
    module = FastAttention(4, 16, num_kv_heads=2, chunk_size=4, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="fast_fastmax",
    title="FAST: Factorizable Attention for Speeding up Transformers",
    arxiv="2402.07901",
    year=2024,
    code="armingerami/fastmax",
    function=fastmax,
    module=FastAttention,
    causal=True,
    bidirectional=True,
    cache="state",
    segment_ids=True,
    kernel="einsum",
    cost="O(T (C (K + V) + K^p V)), chunk C, order p",
    reduces_to={
        "order=1, coefficients=(0, 1), without the denominator": "linear_attention",
        "order -> inf": "multi_head_attention",
    },
    golden=("fastmax",),
    example=_example,
)
