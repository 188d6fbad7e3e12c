"""Attention with one of its principles taken away, at the same number of parameters.

    standard       softmax attention
    mlp            no token mixing: FC_down(silu(FC_gate x) ⊙ FC_up x)
    approximate    no softmax: weights f(s) / Σ f(s), f(s) = 1 + s + s²/2, s = q · k / sqrt(d)
    nonapprox      no pairs: e_j = silu(q_j) · k_j / sqrt(d) of one position,
                   o_t = Σ_{j <= t} exp(e_j) v_j / Σ_{j <= t} exp(e_j), a running mean
    rnd_emb_qk     no input: queries and keys from fixed random embeddings through the same layers
    fixed_seq_qk   ... from one fixed sequence of tokens through the same layers
    static_emb_qk  no context: queries and keys from the token embeddings, in every layer

Values come from the layer's input always; everything is causal; queries and keys are rotated. The
paper's configurations are patterns of a language model: uniform is one of these in every layer,
hybrid every other one, "deconstructing_attention(variant=nonapprox), softmax", and skip a standard
model without its odd layers (`without_layers`). The paper finds uniform `mlp` and `nonapprox` near
chance, and hybrid ones close to standard.

The last three take queries and keys from a second stream: `qk_input` in the call, or with
`first_row=True` the first row of the batch, whose tokens then are the fixed sequence and run
through the same layers (`random_stream` puts random embeddings there).

Reference: Xue et al., "Deconstructing Attention: Investigating Design Principles for Effective
Language Modeling", 2025, arXiv:2510.11602; no official code. Linear-time form of `approximate`:
fastmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnjax.attention import attention
from attnjax.cache import StateCache
from attnjax.checks import check_qkv, check_segments
from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from attnjax.taps import Edits, Patch
from pallas_kernels import tilemath

STREAMS = ("rnd_emb_qk", "fixed_seq_qk", "static_emb_qk")
VARIANTS = ("standard", "mlp", "approximate", "nonapprox", *STREAMS)
LOW = -1e30
"""Stands for log 0: far below any logit, and finite."""

State = tuple[jax.Array, jax.Array]
"""ln Σ exp(e_j) so far [b, h], and the mean so far [b, h, e]."""


def nonapprox_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h e"],
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    state: State | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """A running mean of the values, weighted by exp of a logit of each position alone.

        e_j = scale silu(q_j) · k_j,   o_t = Σ_{j <= t} exp(e_j) v_j / Σ_{j <= t} exp(e_j)

    Args:
      query, key, value: shapes as annotated.
      scale: None is d^-0.5.
      segment_ids: the mean starts anew where the id changes.
      valid: False marks padding, which has no weight.
      state: of earlier tokens, as returned; None is none.
      return_state: also return the state after the last token.
      chunk_size: of the linear recurrence, see `linear_attention`.

    Returns:
      Output in the dtype of `value`; with `return_state` also the state, float32 or wider.

    Cost: O(t e) per head. Memory: O(t e).

    Raises:
      ValueError: on shapes that do not fit together.

    Example: >>> nonapprox_attention(q, k, v).shape
    """
    logits = position_logits(query, key, scale)
    check_qkv("nonapprox_attention", logits[..., None], logits[..., None], value)
    b, _, h = logits.shape
    if segment_ids is not None:
        check_segments("nonapprox_attention", segment_ids, b, logits.shape[1])
    if valid is not None:
        logits = jnp.where(valid[..., None], logits, jnp.full_like(logits, LOW))
    before = jnp.full((b, h), LOW, logits.dtype) if state is None else state[0]
    total = _running_lse(logits, before.astype(logits.dtype)[:, None], segment_ids)
    # o_t = exp(L_{t-1} - L_t) o_{t-1} + exp(e_t - L_t) v_t, where nothing grows
    last = jnp.concatenate([before.astype(logits.dtype)[:, None], total[:, :-1]], axis=1)
    decay = jnp.where(last > LOW / 2, jnp.minimum(last - total, 0), jnp.zeros_like(last))
    if segment_ids is not None:
        # the state is cleared there anyway, and the old total says nothing about the new one
        decay = jnp.where(_starts(segment_ids)[..., None], jnp.zeros_like(decay), decay)
    weight = jnp.where(logits > LOW / 2, jnp.exp(logits - total), jnp.zeros_like(logits))
    mean = None if state is None else state[1].astype(logits.dtype)[:, :, None]
    out, mean = linear_attention(
        jnp.ones_like(weight)[..., None], weight[..., None], value.astype(weight.dtype),
        decay=decay, initial_state=mean, segment_ids=segment_ids, scale=1.0, return_state=True,
        chunk_size=chunk_size,
    )  # fmt: skip
    out = out.astype(value.dtype)
    return (out, (total[:, -1], mean[:, :, 0])) if return_state else out


def position_logits(
    query: Float[Array, "b t h d"], key: Float[Array, "b t h d"], scale: float | None = None
) -> Float[Array, "b t h"]:
    """Logits e_j = scale silu(q_j) · k_j of every position, in float32 or wider."""
    if query.shape != key.shape:
        raise ValueError(
            "nonapprox_attention: query and key of one position are multiplied, so they must have "
            f"the same shape, got {query.shape} and {key.shape}."
        )
    dtype = tilemath.accumulator_dtype(query.dtype)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return (jax.nn.silu(query.astype(dtype)) * key.astype(dtype)).sum(-1) * factor


def _running_lse(logits: jax.Array, before: jax.Array, segment_ids: Any) -> jax.Array:
    """Running ln Σ exp(e_j) [b, t, h] within each document; `before` goes to the first one."""
    start = jnp.logaddexp(before, logits[:, :1])
    values = jnp.concatenate([start, logits[:, 1:]], axis=1)
    first = jnp.zeros(values.shape[:2], bool) if segment_ids is None else _starts(segment_ids)
    first = jnp.broadcast_to(first[..., None], values.shape)

    def join(a: Any, b: Any) -> Any:
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.logaddexp(a[1], b[1]))

    return lax.associative_scan(join, (first, values), axis=1)[1]


def _starts(segment_ids: jax.Array) -> jax.Array:
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def taylor_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    **options: Any,
) -> Float[Array, "b t h e"]:
    """Attention with exp replaced by its second-order expansion: weights f(s) / Σ f(s).

        f(s) = 1 + s + s²/2 >= 1/2,   s = q · k / sqrt(d)

    Args:
      query, key, value: shapes as annotated.
      options: of `attnjax.attention`, such as mask or is_causal.

    Memory: O(t s) per head. Example: >>> taylor_attention(q, k, v, is_causal=True).shape
    """
    return attention(query, key, value, normalizer=taylor_weights, **options)


def taylor_weights(scores: jax.Array, keep: jax.Array | None = None) -> jax.Array:
    """Weights f(s) / Σ f(s) over the last axis; scores of -inf count as masked."""
    seen = ~jnp.isneginf(scores)
    seen = seen if keep is None else seen & keep
    s = jnp.where(seen, scores, jnp.zeros_like(scores))
    f = jnp.where(seen, 1 + s + s * s / 2, jnp.zeros_like(s))
    total = f.sum(-1, keepdims=True)
    return f / jnp.where(total == 0, jnp.ones_like(total), total)


def random_stream(
    key: Any, batch: int, length: int, width: int, num_layers: int, *, sigma: float = 1.0
) -> Edits:
    """Edits of a language model that turn its first row into fixed random embeddings.

    Args:
      key: of the noise, the same in all calls.
      batch, length, width: of the residual stream, the fixed row counted.
      num_layers: of the model.
      sigma: standard deviation of N(0, sigma² 1).
    """
    noise = sigma * jax.random.normal(key, (1, 1, length, width))
    value = jnp.pad(noise, ((0, num_layers - 1), (0, 0), (0, 0), (0, 0)))
    first = jnp.zeros((num_layers, batch, 1, 1), bool).at[0, 0].set(True)
    return Edits(patch={"resid_pre": Patch(value, first)})


def without_layers(layers: Sequence[int], num_layers: int) -> Edits:
    """Edits of a language model that delete layers: they add nothing to the residual stream.

    Args:
      layers: indices from 0. Paper: every other one, from the first.
      num_layers: of the model.

    Raises:
      ValueError: for a layer that the model does not have.
    """
    if not all(0 <= layer < num_layers for layer in layers):
        raise ValueError(
            f"without_layers: layers={list(layers)} of {num_layers}; they count from 0."
        )
    gone = jnp.asarray([i in layers for i in range(num_layers)]).reshape(-1, 1, 1, 1)
    nothing = Patch(jnp.zeros(gone.shape), gone)
    return Edits(patch={"attn_out": nothing, "mlp_out": nothing})


def weight_indicators(
    weights: Float[Array, "b h t t"], offsets: Sequence[int] = (1,)
) -> dict[str, Array]:
    """What the paper measures of causal weights A.

    Args:
      weights: A.
      offsets: the N of "local".

    Returns:
      "entropy" [b, h], mean over rows of -Σ_j A ln A; "concentration" [b, h], Frobenius norm;
      "sink" [b, h], mean of A[:, 0]; "local" [offsets, b, h], mean over i >= N of A[i, i - N];
      "head_diversity" [b], 2 / (t (t + 1)) Σ of the standard deviation over heads (population).
    """
    t = weights.shape[-1]
    log = jnp.log(jnp.where(weights > 0, weights, jnp.ones_like(weights)))
    local = [jnp.diagonal(weights, -n, -2, -1).mean(-1) for n in offsets]
    return {
        "entropy": -(weights * log).sum(-1).mean(-1),
        "concentration": jnp.sqrt((weights * weights).sum((-2, -1))),
        "sink": weights[..., 0].mean(-1),
        "local": jnp.stack(local),
        "head_diversity": jnp.tril(weights.std(1)).sum((-2, -1)) * (2 / (t * (t + 1))),
    }


class DeconstructingAttention(SequenceMixer):
    """One variant as the mixer of a layer.

    A call takes `qk_input`, what queries and keys are made of in the variants with a second stream:
    [1, t, m], the fixed stream at this layer, or [b, t, m], token embeddings (`static_emb_qk`).
    With a cache, that of the new tokens.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      variant: see above. Its cache: of `nonapprox` a mean per head, of `mlp` nothing, else keys and
        values.
      first_row: of `rnd_emb_qk` and `fixed_seq_qk`, take queries and keys from the first row of
        the batch where the call has no `qk_input`. Not with a cache.
      **options: of `SequenceMixer`. Paper: rope_base set, no biases.

    With `mlp`, the hidden width is that of equal parameters, rounded to a multiple of the heads:
    4/3 qkv_features where all widths are equal; `rope_base` has nothing to turn. With `nonapprox`,
    masks, dropout, edits and captures of scores or weights take the quadratic form, and none of
    them goes with a cache.

    Raises:
      ValueError: for another variant, or first_row where it has no meaning.
      NotImplementedError: for dropout with `mlp`.
    """

    sites = SCORE_SITES
    masked = rotary = True
    further = ("qk_input",)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        variant: str = "nonapprox",
        first_row: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        name = type(self).__name__
        if variant not in VARIANTS:
            raise ValueError(f"{name}: variant={variant!r} is none of {', '.join(VARIANTS)}.")
        if first_row and variant not in STREAMS[:2]:
            raise ValueError(
                f"{name}: first_row=True needs variant='rnd_emb_qk' or 'fixed_seq_qk', where all "
                f"rows share one stream; got variant={variant!r}."
            )
        if variant == "mlp" and self.dropout_rate:
            raise NotImplementedError(
                f"{name}: dropout_rate={self.dropout_rate} is not supported by variant='mlp', "
                "which has no weights to drop; use 0."
            )
        self.variant, self.first_row = variant, first_row
        heads = (num_heads, self.head_dim)
        if variant == "mlp":
            self.sites = ("z", "head_out", "attn_out")  # pyright: ignore[reportAttributeAccessIssue]
            self.masked = False  # pyright: ignore[reportAttributeAccessIssue]
            size = 3 * in_features + self.out_features
            width = round(size * self.head_dim / (2 * in_features + self.out_features))
            self.gate = self.projection((num_heads, width), rngs=rngs)
            self.up = self.projection((num_heads, width), rngs=rngs)
            self.out = self.output_projection(width, rngs=rngs)
            return
        self.query, self.key, self.value = (self.projection(heads, rngs=rngs) for _ in range(3))
        self.out = self.output_projection(rngs=rngs)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """A mean per head (`nonapprox`), only the length (`mlp`), or keys and values.

        Args:
          batch: rows.
          max_length: tokens per row; unused by the first two.
          dtype: of keys and values; means are float32 or wider.
        """
        if self.variant not in ("mlp", "nonapprox"):
            return super().init_cache(batch, max_length, dtype)
        self._require_decoding()
        given = dtype or self.dtype or self.param_dtype
        wide = tilemath.accumulator_dtype(jnp.dtype(given))
        shapes = {"log_total": (self.num_heads,), "mean": (self.num_heads, self.head_dim)}
        cache = StateCache.create(batch, {} if self.variant == "mlp" else shapes, wide)
        if self.variant == "nonapprox":
            cache.state["log_total"] = cache.state["log_total"] + jnp.asarray(LOW, wide)
        return cache

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        source = self._source(call)
        if self.variant == "mlp":
            if call.cache is not None:
                call.cache = call.cache.next(call.count)
            return jax.nn.silu(self.gate(call.x)) * self.up(call.x)
        q, k, v = self.heads(call, self.query(source), self.key(source), self.value(call.x))
        q, k = self.rotate(call, q, k)
        if self.variant == "nonapprox":
            return self._nonapprox(call, q, k, v)
        options = {"normalizer": taylor_weights} if self.variant == "approximate" else {}
        return self.attend(call, q, k, v, **options)[0]

    def _source(self, call: Call) -> jax.Array:
        """What queries and keys are made of, [b, t, m].

        Raises:
          ValueError: when a variant with a second stream has none, or another variant gets one.
        """
        name, x, qk_input = type(self).__name__, call.x, call.further["qk_input"]
        if self.variant not in STREAMS:
            if qk_input is not None:
                raise ValueError(
                    f"{name}: qk_input is for {', '.join(STREAMS)}, got variant={self.variant!r}."
                )
            return x
        if qk_input is None and self.first_row:
            if call.cache is not None:
                raise NotImplementedError(
                    f"{name}: first_row=True with a cache is not supported, since rows of a cache "
                    "may differ in length; pass qk_input, the fixed stream at the new tokens."
                )
            qk_input = x[:1]
        if qk_input is None:
            raise ValueError(
                f"{name}: variant={self.variant!r} needs qk_input in the call, the stream that "
                "queries and keys are made of, or first_row=True when the module is made."
            )
        rows = (len(x),) if self.variant == "static_emb_qk" else (1, len(x))
        if qk_input.shape[1:] != x.shape[1:] or len(qk_input) not in rows:
            raise ValueError(
                f"{name}: qk_input must have shape [{' or '.join(map(str, rows))}, "
                f"{x.shape[1]}, {x.shape[2]}], got {qk_input.shape}."
            )
        return jnp.broadcast_to(qk_input, x.shape).astype(x.dtype)

    def _nonapprox(self, call: Call, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        unseen = call.mask is None and call.tap.edits.key_mask is None
        if unseen and not call.wants_scores:
            state = None if call.cache is None else call.cache.state
            out, (total, mean) = nonapprox_attention(
                q, k, v, segment_ids=call.segment_ids, valid=call.valid, return_state=True,
                state=None if state is None else (state["log_total"], state["mean"]),
            )  # fmt: skip
            if call.cache is not None:
                call.cache = call.cache.next(call.count, log_total=total, mean=mean)
            return out
        if call.cache is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: variant='nonapprox' keeps a mean, not its weights, so "
                "masks, dropout, edits and captures of scores or weights with a cache are not "
                "supported; use them on whole sequences."
            )
        # softmax attention with keys of width 1 and the query 1
        logits = position_logits(q, k)[..., None]
        z, _ = self.attend(call, jnp.ones_like(logits), logits, v.astype(logits.dtype), scale=1.0)
        return z.astype(v.dtype)


def _example() -> tuple[DeconstructingAttention, jax.Array]:
    module = DeconstructingAttention(2, 16, rope_base=1e4, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="deconstructing_attention",
    title="Deconstructing Attention: Investigating Design Principles for Effective Language "
    "Modeling",
    arxiv="2510.11602",
    year=2025,
    function=nonapprox_attention,
    module=DeconstructingAttention,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    kernel="linear",
    cost="O(T) for nonapprox and mlp, O(T^2) for the others",
    reduces_to={
        "variant=standard": "multi_head_attention",
        "variant=approximate": "fast_fastmax with p=2",
        "variant=nonapprox, q = 0": "the running mean of the values",
    },
    golden=("deconstructing",),
    reading="There is no official code. Ours: rotary positions in nonapprox turn query and key "
    "before silu; the standard deviation over heads is that of the population; the second stream "
    "is the first row of the batch or an argument of the call.",
    example=_example,
)
