"""DuoAttention: a gate for each key/value head tells whether it must see the whole text.

    stream:  j <= i and (j < n or i - j < w)                      n sinks, w recent tokens
    training:    z = α full(q, k, v) + (1 - α) stream(q, k, v),   α = clip(gate, 0, 1)
    deployment:  heads with a large gate see everything; the others keep n + w tokens in the cache

Only the gates are trained, on texts with passkeys to find: the last hidden states must stay those
of the dense model (`duo_loss`) while an L1 penalty pulls the gates down. There the official code
runs two streams through the model: "full" is taken, without gradient, from the dense stream, so
that gradients reach a gate through full - stream and the layers before it through the streaming
part alone. `DuoAttention.streams` does that. A plain call has one stream and mixes both parts of
it, as the paper's formula reads. A gate outside [0, 1] gets no gradient from the task: call
`project` after each update.

Deployment: the official code lets a streaming head see all the tokens of a chunk, and in each step
the token before its window too, so that its output depends on how the text was cut. Here the mask
of training holds for chunks of any size; `chunk_rule="released"` is the official behavior.

Reference: Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and
Streaming Heads", 2024, arXiv:2410.10819; official code mit-han-lab/duo-attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.attention import attention
from attnjax.cache import DenseCache, RingCache
from attnjax.cache.base import cache_bytes
from attnjax.checks import check_qkv
from attnjax.masks import Causal, Mask, Sink, Window, per_head
from attnjax.masks.keys import document_sinks, key_set
from attnjax.mixer import HEAD_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels.tilemath import accumulator_dtype

CHUNK_RULES = ("exact", "released")
SOURCES = ("full_stream", "mixed_stream")


def duo_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t g d"],
    value: Float[Array, "b t g e"],
    gates: Float[Array, " g"],
    *,
    sinks: int = 64,
    recent: int = 256,
    segment_ids: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t h e"]:
    """Gated mix of full and streaming causal attention: α full + (1 - α) stream.

    Args:
      query, key, value: shapes as annotated; h a multiple of g.
      gates: one for each key/value head; clipped to [0, 1].
      sinks: n, first tokens that stay visible; 0 is none. Paper: 128 in training, 64 deployed.
      recent: w, tokens seen to the left, the query itself counted. Paper: 256.
      segment_ids: packed documents, each with sinks of its own.
      scale: None is d^-0.5.
      implementation: as in `attnjax.attention`.

    Returns:
      Output in the dtype of `query`.

    Raises:
      ValueError: on shapes that do not fit, recent < 1 or sinks < 0.
    """
    name = "duo_attention"
    check_qkv(name, query, key, value)
    _check_sizes(name, sinks, recent)
    if gates.shape != key.shape[2:3]:
        raise ValueError(
            f"{name}: gates must have the shape [key/value heads] = {key.shape[2:3]}, got "
            f"{gates.shape}."
        )
    options: dict[str, Any] = dict(
        segment_ids=segment_ids, scale=scale, implementation=implementation
    )
    near = streaming_mask(sinks, recent, segment_ids)
    full = attention(query, key, value, mask=Causal(), **options)
    stream = attention(query, key, value, mask=near, **options)
    return _mix(gates, full, stream)


def streaming_mask(sinks: int, recent: int, segment_ids: Int[Array, "b t"] | None = None) -> Mask:
    """Causal, and one of the first `sinks` tokens (of each document) or of the last `recent`."""
    first = Sink(sinks) if segment_ids is None else document_sinks(segment_ids, sinks)
    return Causal() & (first | Window(recent))


def clip_gates(gates: jax.Array) -> jax.Array:
    """clip(gates, 0, 1) with the gradient 1 inside, bounds included, and 0 outside."""
    inside = (gates >= 0) & (gates <= 1)
    return jnp.where(inside, gates, jnp.where(gates > 1, jnp.ones_like(gates), 0))


def duo_loss(
    hidden_full: Float[Array, "b t m"],
    hidden_mixed: Float[Array, "b t m"],
    labeled: Bool[Array, "b t"],
    gates: Float[Array, "..."],
    penalty: float = 0.05,
) -> Float[Array, ""]:
    """What the gates are trained with: distance of hidden states plus an L1 penalty.

        mean over labeled tokens of mean_m (full - mixed)²  +  penalty · mean |gate|

    Args:
      hidden_full: last hidden states, after the final norm, of the dense stream.
      hidden_mixed: those of the gated stream.
      labeled: True for the tokens that count: questions and answers in the official code, the
        answers alone in the paper.
      gates: of all layers and key/value heads.
      penalty: factor of the mean gate. Paper: 0.05.

    Returns:
      A float32 scalar (float64 for float64 inputs).
    """
    dtype = accumulator_dtype(hidden_mixed.dtype)
    error = (hidden_full.astype(dtype) - hidden_mixed.astype(dtype)) ** 2
    counted = labeled.astype(dtype)
    distance = (error.mean(-1) * counted).sum() / jnp.maximum(counted.sum(), 1)
    return distance + penalty * jnp.abs(gates.astype(dtype)).mean()


def duo_schedule(steps: int = 2000, peak: float = 0.02) -> Callable[[Any], jax.Array]:
    """Learning rate of the gates: up over the first fifth, flat, down over the last fifth.

    Args:
      steps: of the whole training. Paper: 2000, AdamW without weight decay.
      peak: highest rate; a tenth of it is the lowest. Paper: 0.02.

    Returns:
      A function of the step, for optax.
    """
    ramp = max(1, steps // 5)

    def rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        share = jnp.minimum((step + 1) / ramp, (steps - step) / ramp)
        return peak * jnp.clip(share, 0.1, 1.0)

    return rate


def binarize(
    gates: Any, *, sparsity: float | None = None, threshold: float | None = None, seed: int = 0
) -> np.ndarray:
    """Which key/value heads see the whole text.

    Args:
      gates: of any shape, as [layers, g]; clipped to [0, 1].
      sparsity: share of streaming heads over all gates; gates from the quantile `sparsity` on are
        full. Paper: 0.5 with grouped heads, 0.75 without.
      threshold: gates from here on are full, instead of `sparsity`.
      seed: of the noise below 1e-6 that breaks ties.

    Returns:
      Booleans in the shape of `gates`, True for full attention.

    Raises:
      ValueError: unless exactly one of sparsity (in [0, 1]) and threshold is given.
    """
    if (sparsity is None) == (threshold is None):
        raise ValueError(
            f"binarize: pass either sparsity or threshold, got sparsity={sparsity} and "
            f"threshold={threshold}."
        )
    values = np.clip(np.asarray(gates, np.float64), 0, 1)
    if sparsity is None:
        assert threshold is not None  # one of the two is given
        return values >= threshold
    if not 0 <= sparsity <= 1:
        raise ValueError(f"binarize: sparsity must be in [0, 1], got {sparsity}.")
    if sparsity == 1:
        return np.zeros(values.shape, bool)
    values = values + np.random.default_rng(seed).uniform(0, 1e-6, values.shape)
    return values >= np.quantile(values, sparsity)


@dataclasses.dataclass(frozen=True)
class DuoCache:
    """All tokens for full heads; sinks and recent tokens for streaming heads.

    Attributes:
      full: of the full key/value heads, or None where there are none.
      stream: of the streaming key/value heads, or None where there are none.

    Memory: O(g_full max_length + g_stream (n + w)). Shardable by row.
    """

    full: DenseCache | None
    stream: RingCache | None

    @property
    def length(self) -> jax.Array:
        """[b] int32, tokens seen so far."""
        part = self.stream if self.full is None else self.full
        assert part is not None  # a module has at least one head
        return part.length

    @property
    def bytes(self) -> int:
        """Size of all arrays, in bytes."""
        return cache_bytes(self)


jax.tree_util.register_dataclass(DuoCache, data_fields=["full", "stream"], meta_fields=[])


class DuoAttention(SequenceMixer):
    """Multi-head attention with learned gates, or with full and streaming heads.

    The other parameters are those of `MultiHeadAttention`: `nnx.update` takes them over from it.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      sinks: n. Paper: 128 while gates are trained, 64 deployed.
      recent: w. Paper: 256.
      full_heads: a boolean for each key/value head, True for full attention, from `binarize`; None
        is the gated form, with a parameter `gate` [g] that starts at 1.
      gate_penalty: factor of mean |gate| at the site "aux_loss". Paper: 0.05 over all layers, so
        0.05 / layers each; 0 is none.
      chunk_rule: "exact", or "released" for what streaming heads see in the official code, with a
        cache, see the module's text.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: on sinks < 0, recent < 1, the wrong number of heads, or an unknown rule.
    """

    sites = (*HEAD_SITES, "aux_loss")
    directions = ("causal",)
    grouped = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        sinks: int = 64,
        recent: int = 256,
        full_heads: Sequence[bool] | np.ndarray | None = None,
        gate_penalty: float = 0.0,
        chunk_rule: str = "exact",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        _check_sizes("DuoAttention", sinks, recent)
        if chunk_rule not in CHUNK_RULES:
            raise ValueError(
                f"DuoAttention: chunk_rule={chunk_rule!r} is none of {', '.join(CHUNK_RULES)}."
            )
        self.sinks, self.recent, self.gate_penalty = sinks, recent, gate_penalty
        self.chunk_rule = chunk_rule
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)
        self.full_heads = None if full_heads is None else self._heads(full_heads)
        self.gate = nnx.data(None)
        if full_heads is None:
            self.gate = self.parameter(jnp.ones((self.num_kv_heads,)), ("heads",))

    def deploy(self, full_heads: Sequence[bool] | np.ndarray) -> DuoAttention:
        """A copy with full and streaming heads instead of gates.

        Args:
          full_heads: a boolean for each key/value head, True for full attention.
        """
        module = nnx.clone(self)
        module.full_heads, module.gate = self._heads(full_heads), nnx.data(None)
        return module

    def project(self) -> None:
        """Puts the gates back into [0, 1], in place."""
        if self.gate is not None:
            self.gate[...] = jnp.clip(self.gate[...], 0, 1)

    def streams(
        self,
        x_full: Float[Array, "b t m"],
        x_mixed: Float[Array, "b t m"],
        *,
        full_from: str = "full_stream",
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """One layer of the training of gates, on the dense and on the gated stream.

        Args:
          x_full: input of the layer in the dense stream.
          x_mixed: input of the layer in the gated stream.
          full_from: where the gated stream's full part comes from: "full_stream", without gradient
            (the official code), or "mixed_stream".
          positions, segment_ids: as in a call.

        Returns:
          Outputs of both streams [b, t, out_features].

        Raises:
          ValueError: on an unknown `full_from`, or where there are no gates.
        """
        if full_from not in SOURCES:
            raise ValueError(f"DuoAttention: full_from={full_from!r} is none of {SOURCES}.")
        if self.gate is None:
            raise ValueError("DuoAttention: streams needs gates; make it with full_heads=None.")
        options: dict[str, Any] = dict(positions=positions, segment_ids=segment_ids)
        calls = [self.begin(x, **options) for x in (x_full, x_mixed)]
        near = streaming_mask(self.sinks, self.recent, segment_ids)
        qkv = self._project(calls[0])
        full, _ = self.attend(calls[0], *qkv)
        y_full = self.finish(calls[0], full)
        qkv = self._project(calls[1])
        if full_from == "full_stream":
            full = jax.lax.stop_gradient(full)
        else:
            full, _ = self.attend(calls[1], *qkv)
        stream, _ = self.attend(calls[1], *qkv, layout=near)
        return y_full, self.finish(calls[1], _mix(self.gate[...], full, stream))

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        q, k, v = self._project(call)
        near = streaming_mask(self.sinks, self.recent, call.segment_ids)
        if self.full_heads is not None:
            if call.cache is not None:
                return self._step(call, q, k, v)
            groups = self.num_heads // self.num_kv_heads
            masks = [Causal() if full else near for full in self.full_heads]
            layout = per_head([mask for mask in masks for _ in range(groups)])
            return self.attend(call, q, k, v, layout=layout)[0]
        gates = self.gate[...]
        call.tap("aux_loss", self.gate_penalty * jnp.abs(gates.astype(jnp.float32)).mean())
        stream, _ = self.attend(dataclasses.replace(call), q, k, v, layout=near)
        full, _ = self.attend(call, q, k, v)
        return _mix(gates, full, stream)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> DenseCache | DuoCache:
        """An empty cache: dense with gates, by head where heads are full or streaming.

        Args:
          batch: rows.
          max_length: tokens per row, prompt and continuation together.
          dtype: of keys and values; None is the module's dtype, or that of the parameters.
        """
        dtype = (self.dtype or self.param_dtype) if dtype is None else dtype
        if self.full_heads is None:
            return super().init_cache(batch, max_length, dtype)
        full, stream = sum(self.full_heads), self.num_kv_heads - sum(self.full_heads)
        d = self.head_dim
        return DuoCache(
            DenseCache.create(batch, max_length, full, d, dtype=dtype) if full else None,
            RingCache.create(batch, self.recent, stream, d, dtype=dtype, sinks=self.sinks)
            if stream
            else None,
        )

    def _project(self, call: Call) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        return *self.rotate(call, q, k), v

    def _step(self, call: Call, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """New tokens by kind of head, and the cache of the next call."""
        if call.dropout_key is not None:
            raise NotImplementedError(
                "DuoAttention: dropout with a cache is not supported; pass deterministic=True."
            )
        cache: DuoCache = call.cache
        groups = self.num_heads // self.num_kv_heads
        heads = np.arange(self.num_heads).reshape(self.num_kv_heads, groups)
        is_full = np.asarray(self.full_heads)
        parts, places, full, stream = [], [], cache.full, cache.stream
        for wanted in (True, False):
            mine = np.flatnonzero(is_full == wanted)
            if not mine.size:
                continue
            places.append(heads[mine].ravel())
            part = q[:, :, places[-1]], k[:, :, mine], v[:, :, mine]
            if wanted:
                (z, _), full = full.attend(*part, valid=call.valid)
            elif self.chunk_rule == "exact":
                (z, _), stream = stream.attend(*part, valid=call.valid)
            else:
                z, stream = _whole_chunk(stream, *part, call.valid)
            parts.append(z)
        call.cache = DuoCache(full, stream)
        return jnp.concatenate(parts, axis=2)[:, :, np.argsort(np.concatenate(places))]

    def _heads(self, full_heads: Sequence[bool] | np.ndarray) -> tuple[bool, ...]:
        heads = tuple(bool(full) for full in full_heads)
        if len(heads) != self.num_kv_heads:
            raise ValueError(
                f"DuoAttention: full_heads must have one boolean for each of the "
                f"{self.num_kv_heads} key/value heads, got {len(heads)}."
            )
        return heads


def _whole_chunk(
    cache: Any, query: jax.Array, key: jax.Array, value: jax.Array, valid: Any
) -> tuple[jax.Array, RingCache]:
    """All that is in the cache, and the whole chunk up to each token."""
    slots, t = cache.key.shape[1], key.shape[1]
    keys = jnp.concatenate([cache.key.astype(key.dtype), key], axis=1)
    values = jnp.concatenate([cache.value.astype(value.dtype), value], axis=1)
    filled = jnp.pad(cache.positions >= 0, ((0, 0), (0, t)), constant_values=True)
    z = attention(query, keys, values, mask=Causal(slots) & key_set(filled))
    return z, cache.append(key, value, valid)


def _mix(gates: jax.Array, full: jax.Array, stream: jax.Array) -> jax.Array:
    """α full + (1 - α) stream of [b, t, h, e], with gates [g]."""
    dtype = accumulator_dtype(full.dtype)
    alpha = jnp.repeat(clip_gates(gates).astype(dtype), full.shape[2] // gates.shape[0])
    alpha = alpha[None, None, :, None]
    mixed = alpha * full.astype(dtype) + (1 - alpha) * stream.astype(dtype)
    return mixed.astype(full.dtype)


def _check_sizes(name: str, sinks: int, recent: int) -> None:
    if recent < 1 or sinks < 0:
        raise ValueError(
            f"{name}: needs recent >= 1 (it counts the query itself) and sinks >= 0, got "
            f"recent={recent}, sinks={sinks}."
        )


def _example() -> tuple[DuoAttention, jax.Array]:
    module = DuoAttention(4, 16, num_kv_heads=2, sinks=2, recent=4, rope_base=1e4, rngs=nnx.Rngs(0))
    module.gate[...] = jnp.array([0.8, 0.1])
    return module, jax.random.normal(jax.random.key(1), (2, 13, 16))


def _picture() -> dict[str, jax.Array]:
    full, near = Causal().dense(24)[0, 0], streaming_mask(3, 6).dense(24)[0, 0]
    return {"full head": full, "streaming head": near}


SPEC = Mechanism(
    id="duo_attention",
    title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    arxiv="2410.10819",
    year=2024,
    code="mit-han-lab/duo-attention",
    function=duo_attention,
    module=DuoAttention,
    causal=True,
    bidirectional=False,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2) in full heads, O(T (n + w)) in streaming heads",
    reduces_to={
        "gate=1": "multi_head_attention",
        "gate=0": "multi_head_attention(window=recent, sinks=sinks)",
    },
    golden=("duo_attention",),
    picture=_picture,
    example=_example,
)
