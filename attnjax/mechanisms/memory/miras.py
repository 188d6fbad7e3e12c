"""Miras: sequence mixers whose state is a small network, trained on the tokens as they come.

Each head owns a memory M(W, ·). Token t takes one step on an inner loss that asks M to answer k_t
with v_t, some of the old W is forgotten, and the output is read with the query:

    G_t = ∇_W ℓ(M(W, k_t), v_t),   A_t = α_t A_{t-1} - η_t G_t,   W_t = R(A_t),   o_t = M(W_t, q_t)

    name     inner loss ℓ ("attentional bias")                  retention R
    Moneta   Σ |M(k) - v|^p, p = 3                              A / ||A||_q^(q-2), q = 4, by matrix
    Yaad     ½ |M(k) - v|² up to a distance δ_t, then δ_t |.|₁  A
    Memora   ½ |M(k) - v|²                                      c softmax(A): A is log W

M is a matrix, M(x) = W x, or an MLP, M(x) = x + LN(W1 gelu(W2 x)). For training, tokens come in
chunks and all gradients of a chunk are taken at the weights W before it: a chunk then costs a few
matrix products. Chunk size 1 is the recurrence above; other sizes are other mechanisms, so decoding
keeps the weights before the chunk beside those of the moment.

Inside a chunk reads are exact (a scan over its tokens) for nonlinear R. Where R is linear - Yaad,
and Moneta with `norm="chunk"`, which keeps the norm of the chunk's start - reads are products too:
A_t x = β_t A x - Σ_i (β_t / β_i) η_i g_i (x_i·x), with G_i = g_i x_iᵀ and β = Π α.

Reference: Behrouz et al., "It's All Connected: A Journey Through Test-Time Memorization,
Attentional Bias, Retention, and Online Optimization", 2025, arXiv:2504.13173 (ICLR 2026); no
official code. The Huber loss has three readings there; Yaad's rule is the default.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnjax.cache.linear_state import state_dtype
from attnjax.checks import check_qkv, check_segments
from attnjax.documents import document_starts
from attnjax.mechanisms.linear.linear_mixer import LinearMixer, unit_norm
from attnjax.mixer import Call
from attnjax.spec import Mechanism

LOSSES = ("lp", "l2", "huber", "huber_norm", "huber_coordinate", "value_shift")
RETENTIONS = ("decay", "q_norm", "entropy")
MEMORIES = {"matrix": ("matrix",), "mlp": ("down", "up")}

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class MirasRule:
    """How a memory learns and forgets.

    Attributes:
      loss: of r = M(k) - v: "lp" Σ|r|^p; "l2" ½|r|²; "huber" ½|r|² where |r| <= δ, else δ |r|₁
        (Yaad); "huber_norm", whose gradient beyond δ is δ r / |r|; "huber_coordinate", clipped by
        coordinate; "value_shift", gradient r + δ r / |r|.
      retention: "decay", "q_norm" or "entropy".
      p: exponent of "lp". Paper: 3.
      q: of the norm of "q_norm"; 2 is "decay". Paper: 4.
      total: c, the sum of the entries for "entropy"; None is the number of rows, or 1 by row.
      by_row: for "entropy": a softmax for every row instead of one for the whole matrix.
      smooth: sign(x) as tanh(10 x) and |x| as sqrt(x² + 1e-6) in the inner gradients, so that the
        outer gradient sees them.
      norm: for "q_norm": "token" or "chunk", as above.
    """

    loss: str = "l2"
    retention: str = "decay"
    p: float = 3.0
    q: float = 4.0
    total: float | None = None
    by_row: bool = False
    smooth: bool = True
    norm: str = "token"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("loss", self.loss, LOSSES),
            ("retention", self.retention, RETENTIONS),
            ("norm", self.norm, ("token", "chunk")),
        ):
            if value not in known:
                raise ValueError(f"MirasRule: {name} must be one of {known}, got {value!r}.")
        if self.p < 1 or self.q < 2:
            raise ValueError(f"MirasRule: needs p >= 1 and q >= 2, got p={self.p}, q={self.q}.")

    @property
    def needs_threshold(self) -> bool:
        """Whether the loss has a δ."""
        return self.loss.startswith("huber") or self.loss == "value_shift"

    @property
    def linear(self) -> bool:
        """Whether reads inside a chunk are linear in A."""
        return self.retention == "decay" or (self.retention == "q_norm" and self.norm == "chunk")


MONETA = MirasRule(loss="lp", retention="q_norm")
YAAD = MirasRule(loss="huber", retention="decay")
MEMORA = MirasRule(loss="l2", retention="entropy")
RULES = {"moneta": MONETA, "yaad": YAAD, "memora": MEMORA}


class MirasState(NamedTuple):
    """The memories after some tokens.

    Attributes:
      raw: name -> A [b, h, rows, columns].
      start: the same before the chunk of the last token, where gradients are taken.
      seen: [b] tokens so far.
    """

    raw: dict[str, jax.Array]
    start: dict[str, jax.Array]
    seen: jax.Array


def miras(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h d"],
    initial: Mapping[str, Float[Array, "h r c"]],
    *,
    alpha: Float[Array, "b t h"] | Float[Array, "b t h d"],
    eta: Float[Array, "b t h"] | Float[Array, "b t h d"],
    delta: Float[Array, "b t h"] | None = None,
    rule: MirasRule = MONETA,
    chunk_size: int = 16,
    segment_ids: Int[Array, "b t"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    state: MirasState | None = None,
    return_state: bool = False,
) -> Any:
    """Reads of a memory that learns the tokens; the formulas are above.

    Args:
      query, key, value: shapes as annotated. Keys should have length 1, or the steps diverge.
      initial: A_0: {"matrix": [h, d, d]}, or {"up": [h, n, d], "down": [h, d, n]} for the MLP with
        n hidden units, a multiple of d for gates by channel. For "entropy" it is log W_0, up to a
        constant.
      alpha: share that is kept, in (0, 1], by head or by output channel of the matrices (hidden
        units take the gate of their index modulo d).
      eta: step size, at least 0, likewise.
      delta: δ, positive, for the losses that have one; None is infinity.
      rule: loss and retention.
      chunk_size: tokens whose gradients share one point. Paper: 16 and 64.
      segment_ids: a new segment starts from `initial`, and a chunk with it. Runs token by token,
        as the chunks of a row then begin anywhere; not with `state`.
      valid: True for real tokens, which come first; others change nothing.
      state: memories to go on from, at any place inside a chunk, another one in every row. Runs
        token by token where there are fewer tokens than a chunk has.
      return_state: also return the memories.

    Returns:
      Output in the dtype of `value`, and the `MirasState` where asked for. Everything inside is
      float32 (float64 for float64).

    Cost: O(t) times the size of the memory; chunks are recomputed in the backward pass.

    Raises:
      ValueError: on shapes that do not fit together, a chunk size below 1, or segment_ids together
        with a state.

    Example: >>> miras(q, k, v, {"matrix": w0}, alpha=keep, eta=step, rule=YAAD).shape
    """
    name = "miras"
    _check(name, query, key, value, initial, chunk_size)
    b, t, h, d = query.shape
    dtype = state_dtype(query.dtype)
    if "up" in initial and initial["up"].shape[1] % d and 4 in (alpha.ndim, eta.ndim):
        raise ValueError(
            f"{name}: gates by channel need hidden units in a multiple of d={d}, got initial['up'] "
            f"of shape {initial['up'].shape}; pass gates by head, [b, t, h]."
        )
    kept, step = (_gate(name, n, x, query, dtype) for n, x in (("alpha", alpha), ("eta", eta)))
    far = jnp.full((b, t, h), jnp.inf, dtype) if delta is None else delta.astype(dtype)
    if far.shape != (b, t, h):
        raise ValueError(f"{name}: delta must have shape {(b, t, h)}, got {far.shape}.")
    real = jnp.ones((b, t), bool) if valid is None else valid
    start = {n: jnp.broadcast_to(x.astype(dtype)[None], (b, *x.shape)) for n, x in initial.items()}
    seen = jnp.zeros((b,), jnp.int32) if state is None else state.seen
    held: Any = (start, start)
    if state is not None:
        fresh = (seen == 0)[:, None, None, None]
        held = _choose(fresh, held, (state.raw, state.start))
    q, k, v = (x.astype(dtype) for x in (query, key, value))
    tokens = _Tokens(q, k, v, kept, step, far)
    flags: tuple[Any, ...] = (real, seen % chunk_size)
    # fewer tokens than a chunk that go on from a state are not worth the room before and behind
    if segment_ids is None and (state is None or t >= max(chunk_size, 2)):
        size = min(chunk_size, t) if state is None else chunk_size
        run: Any = functools.partial(_chunked, rule, size, state is not None)
    else:
        place = seen[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        if segment_ids is not None:
            check_segments(name, segment_ids, b, t)
            if state is not None:
                raise ValueError(f"{name}: segment_ids with a state are not supported; pass one.")
            place = jnp.arange(t, dtype=jnp.int32)[None] - document_starts(segment_ids)
        run, held = functools.partial(_recurrent, rule, min(chunk_size, t)), (*held, start)
        flags = (real, place == 0, place % chunk_size == 0)
    over_heads = jax.vmap(run, in_axes=(0, 1, None), out_axes=(1, 0))  # tokens [t, h, ...]
    out, held = jax.vmap(over_heads)(held, tokens, flags)
    out = out.astype(value.dtype)
    if not return_state:
        return out
    count = real.sum(1).astype(jnp.int32)
    return out, MirasState(held[0], held[1], seen + count)


def memory_weights(raw: Mapping[str, jax.Array], rule: MirasRule) -> dict[str, jax.Array]:
    """W of A: name -> [..., rows, columns], as in `MirasState.raw`."""
    return {name: _scale(rule, matrix) * _shape(rule, matrix) for name, matrix in raw.items()}


class _Tokens(NamedTuple):
    """All [t, ...] of one head; the gates [t, 1] or [t, d]."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    alpha: jax.Array
    eta: jax.Array
    delta: jax.Array


# ------------------------------------------------------------------ memory, loss and retention
# A head of one row of the batch: tokens [t, d], matrices [rows, columns].


def _predict(weights: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """M(x), x [..., d]."""
    if "matrix" in weights:
        return _einsum("rc,...c->...r", weights["matrix"], x)
    hidden = _gelu(_einsum("nd,...d->...n", weights["up"], x))
    return x + _layer_norm(_einsum("dn,...n->...d", weights["down"], hidden))


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def _layer_norm(x: jax.Array) -> jax.Array:
    centered = x - x.mean(-1, keepdims=True)
    return centered * lax.rsqrt((centered * centered).mean(-1, keepdims=True) + 1e-5)


def _factors(
    rule: MirasRule, weights: Mapping[str, jax.Array], k: Any, v: Any, delta: Any
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Every matrix's gradient for each token, g xᵀ: name -> (g [t, rows], x [t, columns])."""
    if "matrix" in weights:
        return {"matrix": (_slope(rule, _predict(weights, k) - v, delta), k)}
    hidden, through_gelu = jax.vjp(_gelu, _einsum("nd,td->tn", weights["up"], k))
    y, through_norm = jax.vjp(_layer_norm, _einsum("dn,tn->td", weights["down"], hidden))
    (g,) = through_norm(_slope(rule, k + y - v, delta))
    (g_up,) = through_gelu(_einsum("dn,td->tn", weights["down"], g))
    return {"down": (g, hidden), "up": (g_up, k)}


def _slope(rule: MirasRule, r: jax.Array, delta: jax.Array) -> jax.Array:
    """dℓ/dM of r = M(k) - v [t, d], with δ [t]."""
    if rule.loss == "l2":
        return r
    sign = jnp.tanh(10 * r) if rule.smooth else jnp.sign(r)
    if rule.loss == "lp":
        size = jnp.sqrt(r * r + 1e-6) if rule.smooth else jnp.abs(r)
        return rule.p * sign * size ** (rule.p - 1)
    delta = delta[:, None]
    if rule.loss == "huber_coordinate":
        return jnp.clip(r, -delta, delta)
    square = (r * r).sum(-1, keepdims=True)
    length = jnp.sqrt(jnp.where(square > 0, square, jnp.ones_like(square)))
    near = square <= delta * delta
    bound = jnp.where(near, jnp.ones_like(delta), delta)  # δ may be infinite where it is not used
    if rule.loss == "huber":
        return jnp.where(near, r, bound * sign)
    if rule.loss == "huber_norm":
        return jnp.where(near, r, bound * r / length)
    return r + delta * r / length


def _shape(rule: MirasRule, raw: jax.Array) -> jax.Array:
    """W but for the factor of `_scale`."""
    if rule.retention != "entropy":
        return raw
    total = rule.total
    if total is None:
        total = 1.0 if rule.by_row else float(raw.shape[-2])
    return total * jnp.exp(_log_normalized(rule, raw))


def _log_normalized(rule: MirasRule, raw: jax.Array) -> jax.Array:
    return raw - jax.nn.logsumexp(raw, axis=-1 if rule.by_row else (-2, -1), keepdims=True)


def _scale(rule: MirasRule, raw: jax.Array) -> jax.Array:
    """||A||_q^-(q-2) for "q_norm", else 1: [..., 1, 1]."""
    top = lax.stop_gradient(jnp.abs(raw).max((-2, -1), keepdims=True))
    if rule.retention != "q_norm":
        return jnp.ones_like(top)
    top = jnp.where(top > 0, top, jnp.ones_like(top))  # keeps the powers inside of float32
    total = (jnp.abs(raw / top) ** rule.q).sum((-2, -1), keepdims=True)
    total = jnp.where(total > 0, total, jnp.ones_like(total))  # A = 0 gives W = 0
    return (top * total ** (1 / rule.q)) ** (2 - rule.q)


def _rows(gate: jax.Array, rows: int) -> jax.Array:
    """A gate [..., 1] or [..., d] for a matrix of so many rows."""
    width = gate.shape[-1]
    return gate if width == 1 else jnp.tile(gate, (1,) * (gate.ndim - 1) + (rows // width,))


def _advance(rule: MirasRule, raw: Any, factors: Any, alpha: Any, eta: Any) -> dict[str, Any]:
    """A after one token, with its factors (g [rows], x [columns]) and gates [1] or [d]."""
    new = {}
    for name, (g, x) in factors.items():
        matrix, rows = raw[name], raw[name].shape[0]
        matrix = _rows(alpha, rows)[:, None] * matrix - (_rows(eta, rows) * g)[:, None] * x[None]
        new[name] = _log_normalized(rule, matrix) if rule.retention == "entropy" else matrix
    return new


# --------------------------------------------------------------------- over tokens and chunks


def _choose(flag: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda x, y: jnp.where(flag, x, y), new, old)


def _cut(x: jax.Array, size: int, behind: int = 0) -> jax.Array:
    """[t, ...] -> [chunks, size, ...], zeros at the end: at least `behind` of them."""
    pad = behind + -(x.shape[0] + behind) % size
    return jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, size, *x.shape[1:])


def _recurrent(rule: MirasRule, size: int, held: Any, tokens: _Tokens, flags: Any) -> Any:
    """Token by token: the definition. Flags [t]: real, starts a segment, starts a chunk."""
    *memories, initial = held

    def step(held: Any, given: Any) -> Any:
        (raw, start), (token, (real, first, refresh)) = held, given
        raw = _choose(first, initial, raw)
        start = _choose(refresh, raw, start)
        factors = _factors(
            rule, memory_weights(start, rule), token.key[None], token.value[None], token.delta[None]
        )
        factors = jax.tree.map(lambda x: x[0], factors)
        new = _advance(rule, raw, factors, token.alpha, token.eta)
        read = _predict(_read_weights(rule, new, start), token.query)
        return _choose(real, (new, start), held), read

    @jax.checkpoint
    def block(held: Any, given: Any) -> Any:
        return lax.scan(step, held, given)

    blocks = jax.tree.map(lambda x: _cut(x, size), (tokens, flags))
    held, out = lax.scan(block, tuple(memories), blocks)
    return out.reshape(-1, out.shape[-1])[: len(tokens.query)], held


def _read_weights(rule: MirasRule, raw: Any, start: Any) -> dict[str, jax.Array]:
    """W for reading inside a chunk that began with A = start."""
    if rule.retention == "q_norm" and rule.norm == "chunk":
        return {name: _scale(rule, start[name]) * matrix for name, matrix in raw.items()}
    return memory_weights(raw, rule)


def _chunked(
    rule: MirasRule, size: int, goes_on: bool, held: Any, tokens: _Tokens, flags: Any
) -> Any:
    """Chunk by chunk. Flags: real [t], and the tokens of the first chunk that came before.

    Where it goes on, tokens move behind room for those before: chunks begin at multiples of `size`
    of the whole text.
    """
    real, before = flags
    t = tokens.query.shape[0]

    def cut(x: jax.Array) -> jax.Array:
        x = _cut(x, size, size - 1 if goes_on else 0)
        return jnp.roll(x.reshape(-1, *x.shape[2:]), before, 0).reshape(x.shape) if goes_on else x

    def chunk(held: Any, given: Any) -> Any:
        tokens, real, fresh = given
        some = real.any()
        raw, start = held
        start = _choose(fresh & some, raw, start)
        real = real[:, None]
        tokens = tokens._replace(  # padding keeps everything and learns nothing
            alpha=jnp.where(real, tokens.alpha, jnp.ones_like(tokens.alpha)),
            eta=jnp.where(real, tokens.eta, jnp.zeros_like(tokens.eta)),
        )
        weights = memory_weights(start, rule)
        factors = _factors(rule, weights, tokens.key, tokens.value, tokens.delta)
        inside = _linear_chunk if rule.linear else _exact_chunk
        new, out = inside(rule, raw, start, factors, tokens)
        return (_choose(some, new, raw), start), out

    chunks, real = jax.tree.map(cut, tokens), cut(real)
    fresh = (jnp.arange(len(real)) > 0) | (before == 0)
    held, out = lax.scan(jax.checkpoint(chunk), held, (chunks, real, fresh))
    out = out.reshape(-1, out.shape[-1])
    return (jnp.roll(out, -before, 0) if goes_on else out)[:t], held


def _exact_chunk(rule: MirasRule, raw: Any, start: Any, factors: Any, tokens: _Tokens) -> Any:
    """A token after another, as R is not linear; gradients are those at `start`."""

    def step(raw: Any, given: Any) -> Any:
        query, alpha, eta, factors = given
        raw = _advance(rule, raw, factors, alpha, eta)
        return raw, _predict(_read_weights(rule, raw, start), query)

    return lax.scan(step, raw, (tokens.query, tokens.alpha, tokens.eta, factors))


def _linear_chunk(rule: MirasRule, raw: Any, start: Any, factors: Any, tokens: _Tokens) -> Any:
    """All tokens at once from A = raw on; `start` gives the factor of reading."""
    tiny = jnp.finfo(tokens.alpha.dtype).tiny
    log_kept = jnp.cumsum(jnp.log(jnp.maximum(tokens.alpha, tiny)), axis=0)
    size = log_kept.shape[0]
    past = jnp.tril(jnp.ones((size, size), bool))[:, :, None]

    def apply(name: str, x: jax.Array) -> jax.Array:
        """Σ_c A_t[r, c] x[t, c] for every token, and the factor of reading."""
        g, keys = factors[name]
        kept = _rows(log_kept, g.shape[1])
        gap = jnp.where(past, kept[:, None] - kept[None], jnp.full_like(kept[:, None], -jnp.inf))
        written = _rows(tokens.eta, g.shape[1]) * g
        scores = _einsum("tc,ic->ti", x, keys)
        if gap.shape[2] == 1:
            new = _einsum("ti,ir->tr", scores * jnp.exp(gap[..., 0]), written)
        else:
            new = _einsum("ti,tir,ir->tr", scores, jnp.exp(gap), written)
        y = jnp.exp(kept) * _einsum("rc,tc->tr", raw[name], x) - new
        return y * _scale(rule, start[name]) if rule.retention == "q_norm" else y

    if "matrix" in raw:
        out = apply("matrix", tokens.query)
    else:
        hidden = _gelu(apply("up", tokens.query))
        out = tokens.query + _layer_norm(apply("down", hidden))
    new = {}
    for name, (g, keys) in factors.items():
        kept = _rows(log_kept, g.shape[1])
        written = jnp.exp(kept[-1:] - kept) * _rows(tokens.eta, g.shape[1]) * g
        new[name] = jnp.exp(kept[-1])[:, None] * raw[name] - _einsum("ir,ic->rc", written, keys)
    return new, out


def _gate(name: str, label: str, x: jax.Array, query: jax.Array, dtype: Any) -> jax.Array:
    if x.shape not in (query.shape[:3], query.shape):
        raise ValueError(
            f"{name}: {label} must have shape {query.shape[:3]} or {query.shape}, got {x.shape}."
        )
    return (x if x.ndim == 4 else x[..., None]).astype(dtype)


def _check(name: str, q: Any, k: Any, v: Any, initial: Any, chunk_size: int) -> None:
    check_qkv(name, q, k, v)
    if not q.shape == k.shape == v.shape:
        raise ValueError(
            f"{name}: query, key and value must have one shape, got {q.shape}, {k.shape}, "
            f"{v.shape}."
        )
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size must be at least 1, got {chunk_size}.")
    if tuple(sorted(initial)) not in MEMORIES.values():
        raise ValueError(
            f"{name}: initial must hold 'matrix', or 'up' and 'down'; got {sorted(initial)}."
        )
    h, d = q.shape[2:]
    n = initial["up"].shape[1] if "up" in initial else d
    shapes = {"matrix": (h, d, d), "up": (h, n, d), "down": (h, d, n)}
    for label, x in initial.items():
        if x.shape != shapes[label]:
            raise ValueError(
                f"{name}: initial[{label!r}] must have shape {shapes[label]}, got {x.shape}."
            )


class Miras(LinearMixer):
    """A Miras layer: projections, short convolutions, rotary positions, unit keys, memory, gate.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      variant: "moneta", "yaad" or "memora".
      memory: "mlp" or "matrix", one for each head. Paper: "mlp".
      expansion: hidden units of the MLP over its width. Paper: 4.
      chunk_size: as for `miras`; sizes are different mechanisms. Paper: 16 and 64.
      gate_rank: width of the map from the input to gates by channel, paper 32 and 64; None gives
        one gate per head.
      conv_size: taps of the convolutions on queries, keys and values, in tokens; None is none.
        Paper: 4.
      p, q, norm: as in `MirasRule`.
      rngs: stream `params`.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: on an unknown variant or memory, or a size below 1.
      NotImplementedError: for dropout, and for keys and values of other widths.
    """

    rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        variant: str = "moneta",
        memory: str = "mlp",
        expansion: int = 4,
        chunk_size: int = 16,
        gate_rank: int | None = 32,
        conv_size: int | None = 4,
        p: float = 3.0,
        q: float = 4.0,
        norm: str = "token",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, chunk_size=chunk_size, rngs=rngs,
            **options,
        )  # fmt: skip
        if not self.key_dim == self.value_dim == self.head_dim:
            raise NotImplementedError(
                "Miras: key_factor and value_factor are not supported, a memory answers keys with "
                "values of the same width; change qkv_features."
            )
        for label, given, known in (("variant", variant, RULES), ("memory", memory, MEMORIES)):
            if given not in known:
                raise ValueError(f"Miras: {label} must be one of {tuple(known)}, got {given!r}.")
        for label, size in (("expansion", expansion), ("gate_rank", gate_rank)):
            if size is not None and size < 1:
                raise ValueError(f"Miras: {label} must be at least 1, got {size}.")
        self.chunk_size: int = chunk_size
        self.rule = dataclasses.replace(RULES[variant], p=p, q=q, norm=norm)
        by_head = (num_heads, self.head_dim)
        self.query, self.key, self.value = (self.projection(by_head, rngs=rngs) for _ in range(3))
        self.convolutions(conv_size, activation="identity", value_activation="identity", rngs=rngs)
        self.gate_in = nnx.data(None)
        if gate_rank is None:
            self.gates = self.projection((2, num_heads), (None, "heads"), rngs=rngs)
        else:
            self.gate_in = self.projection(gate_rank, rngs=rngs)
            self.gates = self.projection(
                (2, *by_head), (None, "heads", "head_dim"), inputs=gate_rank, in_axis="mlp",
                rngs=rngs,
            )  # fmt: skip
        self.threshold = nnx.data(None)
        if self.rule.needs_threshold:
            self.threshold = self.projection(num_heads, ("heads",), rngs=rngs)
        d, hidden = self.head_dim, expansion * self.head_dim
        sizes = {"matrix": (d, d), "up": (hidden, d), "down": (d, hidden)}
        self.matrices = tuple((name, sizes[name]) for name in MEMORIES[memory])
        self.initial = nnx.data({})
        for name, size in self.matrices:
            matrix = jax.random.normal(rngs.params(), (num_heads, *size))
            if self.rule.retention != "entropy":
                matrix = matrix * size[1] ** -0.5
            self.initial[name] = self.parameter(matrix, ("heads", None, None))
        self.output_layers(gate=True, rngs=rngs)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one row's memories, of the moment and before its chunk, and convolutions."""
        shapes = super().state_shapes()
        del shapes["state"]
        for name, (rows, columns) in self.matrices:
            shape = (self.num_heads, rows, columns)
            shapes |= {name: shape, f"start_{name}": shape}
        return shapes

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x, cache = call.x, call.cache
        states: dict[str, jax.Array] = {}
        parts = (self.convolved(call, part, states) for part in ("query", "key", "value"))
        q, k, v = self.heads(call, *parts)
        q, k = (unit_norm(y, 1e-12) for y in self.rotate(call, q, k))
        dtype = state_dtype(x.dtype)
        gates = self.gates(x if self.gate_in is None else self.gate_in(x)).astype(dtype)
        initial = {name: matrix[...].astype(dtype) for name, matrix in self.initial.items()}
        delta = None
        if self.threshold is not None:
            delta = jax.nn.softplus(self.threshold(x).astype(dtype))
        state = None
        if cache is not None:
            raw, start = ({n: cache.state[at + n] for n in initial} for at in ("", "start_"))
            state = MirasState(raw, start, cache.length)
        # at the start some 5 % are forgotten per token, and steps of 0.3 are safe for unit keys
        z = miras(
            q, k, v, initial, alpha=jax.nn.sigmoid(gates[:, :, 0] + 3),
            eta=jax.nn.softplus(gates[:, :, 1] - 1), delta=delta, rule=self.rule,
            chunk_size=self.chunk_size, segment_ids=call.segment_ids, valid=call.valid,
            state=state, return_state=cache is not None,
        )  # fmt: skip
        if cache is not None:
            z, new = z
            states |= new.raw | {f"start_{name}": matrix for name, matrix in new.start.items()}
            call.cache = cache.next(call.count, **states)
        return self.gated(call, z)


def _example() -> tuple[Miras, jax.Array]:
    module = Miras(2, 8, chunk_size=4, gate_rank=4, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 10, 8))


SPEC = Mechanism(
    id="miras",
    title="It's All Connected: A Journey Through Test-Time Memorization, Attentional Bias, "
    "Retention, and Online Optimization",
    arxiv="2504.13173",
    year=2025,
    function=miras,
    module=Miras,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    kernel="einsum",
    cost="O(T P), P parameters of the memory",
    reduces_to={
        "rule=MirasRule('l2'), matrix, alpha=1, chunk_size=1": "deltanet",
    },
    golden=("miras",),
    reading="Reads inside a chunk of a nonlinear retention, gates by channel on the hidden layer, "
    "the constant c, and starting values: there is no official code.",
    example=_example,
)
