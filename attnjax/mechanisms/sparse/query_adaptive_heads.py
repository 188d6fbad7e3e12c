"""QAdA: each head decides for each query whether far keys matter, from their first two moments.

    I = the first n and the last w keys up to the query,  R = the N keys between them
    log Σ_{j∈R} e^{s_j}  ≈  log N + q·μ / √d + qᵀ Σ q / (2 d),     μ, Σ: mean and covariance of R
    local  iff  Σ_{j∈I} e^{s_j} / (Σ_{j∈I} e^{s_j} + e^{estimate}) >= τ

A local query attends to I alone, any other to all keys. The estimate is exact for Gaussian keys
without end, and for keys that are all alike. "oracle" decides by the true sum instead.

The paper takes the moments of a whole prompt, or of another one. Here they are those of the keys
that each query has behind its window, so that the choice is causal and a decoder makes it too: both
are one state of linear attention that reads every key w tokens late, q·Σ(q·k) k = Σ(q·k)². Keys are
measured from one of their own, since the difference of two large moments would lose the variance.
`criterion="stored"` takes moments that were measured before, by `calibrate`.

Reference: Donhauser et al., "Unveiling Simplicities of Attention: Adaptive Long-Context Head
Identification", 2025, arXiv:2502.09647. No official code.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnjax.attention import attention
from attnjax.cache import DenseCache
from attnjax.cache.base import cache_bytes, new_positions
from attnjax.checks import check_qkv, check_segments
from attnjax.documents import document_starts
from attnjax.masks import Causal, Mask, Sink, Window, document_sinks, query_set
from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels.tilemath import accumulator_dtype

CRITERIA = ("running", "stored", "oracle")


class KeyMoments(NamedTuple):
    """First two moments of a set of keys.

    Attributes:
      mean: [b or 1, g, d].
      covariance: [b or 1, g, d, d], of the population.
    """

    mean: jax.Array
    covariance: jax.Array


def key_moments(key: Float[Array, "b s g d"], keep: Bool[Array, "b s"] | None = None) -> KeyMoments:
    """Mean and covariance of the keys of each row and head.

    Args:
      key: as they enter the scores, rotated.
      keep: the keys to count; None is all. A row without keys gives zeros.

    Returns:
      float32 moments (float64 for float64 keys).
    """
    dtype = accumulator_dtype(key.dtype)
    keep = jnp.ones(key.shape[:2], bool) if keep is None else keep
    weight = keep.astype(dtype) / jnp.maximum(keep.sum(1, keepdims=True), 1).astype(dtype)
    key = key.astype(dtype)
    mean = jnp.einsum("bs,bsgd->bgd", weight, key)
    centered = key - mean[:, None]
    return KeyMoments(mean, jnp.einsum("bs,bsgd,bsge->bgde", weight, centered, centered))


def gaussian_log_mass(
    query: Float[Array, "b t h d"],
    moments: KeyMoments,
    count: Int[Array, "b t"] | int,
    scale: float | None = None,
) -> Float[Array, "b t h"]:
    """Estimate of log Σ e^{scale q·k} over `count` keys: log N + mean + variance / 2 of scores.

    Args:
      query: shapes as annotated; h a multiple of the heads of the moments.
      moments: of the keys, from `key_moments`.
      count: N; 0 gives -inf.
      scale: None is d^-0.5.
    """
    b, t, h, d = query.shape
    g = moments.mean.shape[1]
    dtype = accumulator_dtype(query.dtype)
    q = query.astype(dtype).reshape(b, t, g, h // g, d) * (d**-0.5 if scale is None else scale)
    mean, covariance = (jnp.broadcast_to(m.astype(dtype), (b, *m.shape[1:])) for m in moments)
    linear = jnp.einsum("btgrd,bgd->btgr", q, mean)
    square = jnp.einsum("btgrd,bgde,btgre->btgr", q, covariance, q)
    count = jnp.broadcast_to(jnp.asarray(count), (b, t)).astype(dtype)
    return jnp.log(count)[..., None] + (linear + square / 2).reshape(b, t, h)


def running_log_mass(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    *,
    sinks: int,
    local: int,
    start: Int[Array, " b"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    state: Float[Array, "b g d _"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "b t h"], Float[Array, "b g d _"]]:
    """`gaussian_log_mass` of the keys that each query has between its sinks and its window.

    Args:
      query: the new queries.
      key: all keys so far, at their indices; with `start` None those of the queries.
      sinks, local: n and w, in tokens; w counts the query's own.
      start: index of the first query of each row; None is 0.
      valid: real queries, which come first; None is all.
      segment_ids: packed documents, each with sinks of its own.
      state: what an earlier call returned, [b, g, d, d + 1] in float32 or wider; None is nothing.
      scale: None is d^-0.5.

    Returns:
      The estimates, -inf where no key is left, and the state after the last real query.

    Cost: O(t d²).
    """
    b, t, h, d = query.shape
    g = key.shape[2]
    dtype = accumulator_dtype(query.dtype)
    begin = jnp.zeros((b,), jnp.int32) if start is None else start
    at = new_positions(begin, t)
    first = jnp.zeros_like(at)
    if segment_ids is not None:
        first = document_starts(segment_ids)
    first = first + sinks

    def keys_at(index: jax.Array) -> jax.Array:
        index = jnp.clip(index, 0, key.shape[1] - 1)[:, :, None, None]
        return jnp.take_along_axis(key, index, axis=1).astype(dtype)

    left = at - local  # the key that leaves the window with this query
    seen = left >= first if valid is None else (left >= first) & valid
    origin = keys_at(first)  # the first key that leaves a document's window
    leaving = jnp.where(seen[..., None, None], keys_at(left) - origin, 0)
    ones = jnp.broadcast_to(seen[..., None, None], (b, t, g, 1)).astype(dtype)
    q = query.astype(dtype) * (d**-0.5 if scale is None else scale)

    def by_head(x: jax.Array, axis: int) -> jax.Array:
        return jnp.repeat(x, h // g, axis=axis)

    sums, state = linear_attention(
        q, by_head(leaving, 2), by_head(jnp.concatenate([leaving, ones], 3), 2), scale=1.0,
        initial_state=None if state is None else by_head(state.astype(dtype), 1),
        segment_ids=segment_ids, return_state=True,
    )  # fmt: skip
    count = jnp.maximum(left - first + 1, 0)[..., None].astype(dtype)  # [b, t, 1]
    some = jnp.maximum(count, 1)
    mean = sums[..., d] / some
    variance = (q * sums[..., :d]).sum(-1) / some - mean**2
    mean = mean + (q * by_head(origin, 2)).sum(-1)
    return jnp.log(count) + mean + jnp.maximum(variance, 0) / 2, state[:, :: h // g]


def is_local(
    log_local: Float[Array, "..."], log_rest: Float[Array, "..."], tau: float
) -> Bool[Array, "..."]:
    """Whether the share of the local keys in the softmax is at least τ.

    Args:
      log_local, log_rest: log Σ e^s over the local keys and over the rest, true or estimated.
      tau: τ; above 1 no query is local, at 0 or below all are.
    """
    return local_share(log_local, log_rest) >= tau


def local_share(
    log_local: Float[Array, "..."], log_rest: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Share of the local keys: e^a / (e^a + e^r), from the difference of the logarithms."""
    return jax.nn.sigmoid(log_local - log_rest)


def query_adaptive_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t g d"],
    value: Float[Array, "b t g e"],
    *,
    sinks: int = 16,
    local: int = 1024,
    tau: float = 0.9,
    criterion: str = "running",
    moments: KeyMoments | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
    return_local: bool = False,
) -> Any:
    """Causal attention in which each head sees far keys only for the queries that need them.

    Args:
      query, key, value: shapes as annotated; h a multiple of g.
      sinks, local: n and w, in tokens; w counts the query itself.
      tau: τ, share of the local keys from which a query is local.
      criterion: "running", "stored" (needs `moments`) or "oracle", see the module's text.
      moments: of far keys, from `key_moments`, for "stored".
      segment_ids: packed documents.
      scale: None is d^-0.5.
      implementation: as in `attnjax.attention`.
      return_local: also return which queries are local, [b, t, h]; its mean over texts tells which
        heads are local as a whole.

    Returns:
      Output in the dtype of `query`. Gradients are those of masked softmax attention.

    Cost: O(t (w + d + (1 - ρ) t)) d with ρ the share of tiles whose queries are all local.

    Raises:
      ValueError: on shapes that do not fit, local < 1, sinks < 0, or an unknown criterion.
    """
    name = "query_adaptive_attention"
    check_qkv(name, query, key, value)
    _check_options(name, sinks, local, criterion)
    if (criterion == "stored") != (moments is not None):
        raise ValueError(f"{name}: moments and criterion='stored' need each other.")
    if segment_ids is not None:
        check_segments(name, segment_ids, query.shape[0], query.shape[1])
    near, _ = _local_queries(
        query, key, sinks=sinks, local=local, tau=tau, criterion=criterion, moments=moments,
        segment_ids=segment_ids, scale=scale, implementation=implementation,
    )  # fmt: skip
    layout = _local_mask(sinks, local, segment_ids) | query_set(~near)
    out = attention(
        query, key, value, mask=Causal() & layout, segment_ids=segment_ids, scale=scale,
        implementation=implementation,
    )  # fmt: skip
    return (out, near) if return_local else out


@dataclasses.dataclass(frozen=True)
class MomentCache:
    """All tokens, and the moments of those that left the window.

    Attributes:
      tokens: keys and values.
      state: [b, g, d, d + 1], as `running_log_mass` returns it.

    Memory: O(max_length + d²). Shardable by row and key/value head.
    """

    tokens: DenseCache
    state: jax.Array

    @property
    def length(self) -> jax.Array:
        """[b] int32, tokens stored so far."""
        return self.tokens.length

    @property
    def bytes(self) -> int:
        """Size of all arrays, in bytes."""
        return cache_bytes(self)


jax.tree_util.register_dataclass(MomentCache, data_fields=["tokens", "state"], meta_fields=[])


class Statistic(nnx.Variable):
    """What was measured and is not trained."""


class QueryAdaptiveAttention(SequenceMixer):
    """Multi-head `query_adaptive_attention` with rotary positions.

    The parameters are those of `MultiHeadAttention`: `nnx.update` takes them over from it.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      sinks, local, tau: see `query_adaptive_attention`.
      criterion: "running", "stored" (after `calibrate`) or "oracle".
      **options: of `SequenceMixer`.

    Raises:
      ValueError: on local < 1, sinks < 0, or an unknown criterion.
    """

    sites = SCORE_SITES
    directions = ("causal",)
    grouped = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        sinks: int = 16,
        local: int = 1024,
        tau: float = 0.9,
        criterion: str = "running",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        _check_options("QueryAdaptiveAttention", sinks, local, criterion)
        self.sinks, self.local, self.tau, self.criterion = sinks, local, tau, criterion
        g, d = self.num_kv_heads, self.head_dim
        self.query = self.projection((num_heads, d), rngs=rngs)
        self.key = self.projection((g, d), rngs=rngs)
        self.value = self.projection((g, d), rngs=rngs)
        self.out = self.output_projection(rngs=rngs)
        self.mean = self.covariance = nnx.data(None)
        if criterion == "stored":
            dtype = accumulator_dtype(self.param_dtype)
            self.mean = Statistic(jnp.zeros((1, g, d), dtype))
            self.covariance = Statistic(jnp.zeros((1, g, d, d), dtype))

    def calibrate(self, x: Float[Array, "b t m"]) -> None:
        """Measures the moments for "stored" on texts, in place: all but sinks and last window.

        Args:
          x: inputs of this layer, longer than sinks + local.

        Raises:
          ValueError: for shorter texts, or another criterion.
        """
        b, t = x.shape[:2]
        if self.criterion != "stored" or t <= self.sinks + self.local:
            raise ValueError(
                f"QueryAdaptiveAttention: calibrate needs criterion='stored' and more than "
                f"sinks + local = {self.sinks + self.local} tokens, got criterion="
                f"{self.criterion!r} and {t} tokens."
            )
        _, key, _ = self._project(self.begin(x))
        far = key[:, self.sinks : t - self.local].reshape(1, -1, *key.shape[2:])
        moments = key_moments(far)
        self.mean[...], self.covariance[...] = moments.mean, moments.covariance

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        q, k, v = self._project(call)
        cache: MomentCache | None = call.cache
        keys, start, state = k, None, None
        if cache is not None:
            keys = cache.tokens.append(k, v, call.valid).key.astype(k.dtype)
            start, state = cache.length, cache.state
        moments = None
        if self.criterion == "stored":
            moments = KeyMoments(self.mean[...], self.covariance[...])
        near, state = _local_queries(
            q, keys, sinks=self.sinks, local=self.local, tau=self.tau, criterion=self.criterion,
            moments=moments, start=start, valid=call.valid, segment_ids=call.segment_ids,
            state=state,
        )  # fmt: skip
        layout = _local_mask(self.sinks, self.local, call.segment_ids)
        layout = layout | query_set(~near, 0 if start is None else start)
        if cache is None:
            return self.attend(call, q, k, v, layout=layout)[0]
        inner = dataclasses.replace(call, cache=cache.tokens)
        z, _ = self.attend(inner, q, k, v, layout=layout)
        call.cache = MomentCache(inner.cache, cache.state if state is None else state)
        return z

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> MomentCache:
        """An empty cache for `max_length` tokens in each of `batch` rows; see `SequenceMixer`."""
        tokens = super().init_cache(batch, max_length, dtype)
        g, d = self.num_kv_heads, self.head_dim
        dtype = accumulator_dtype(tokens.key.dtype)
        return MomentCache(tokens, jnp.zeros((batch, g, d, d + 1), dtype))

    def _project(self, call: Call) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        return *self.rotate(call, q, k), v


def _local_mask(sinks: int, local: int, segment_ids: jax.Array | None) -> Mask:
    first = Sink(sinks) if segment_ids is None else document_sinks(segment_ids, sinks)
    return first | Window(local)


def _local_queries(
    query: jax.Array,
    key: jax.Array,
    *,
    sinks: int,
    local: int,
    tau: float,
    criterion: str,
    moments: KeyMoments | None,
    start: jax.Array | None = None,
    valid: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    state: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Bool[Array, "b t h"], jax.Array | None]:
    """Which queries are local, and the state of "running" for the tokens after them."""
    query, key = lax.stop_gradient((query, key))
    b, t = query.shape[:2]
    near = _local_mask(sinks, local, segment_ids)

    def log_mass(mask: Mask) -> jax.Array:
        # only the log-sum-exp is wanted: one channel stands for the values
        _, lse = attention(
            query, key, key[..., :1], mask=Causal() & mask, segment_ids=segment_ids, scale=scale,
            q_offset=0 if start is None else start, return_residual=True,
            implementation=implementation,
        )  # fmt: skip
        return lse

    if criterion == "oracle":
        log_rest = log_mass(~near)
    elif criterion == "stored":
        assert moments is not None  # checked by the callers
        at = new_positions(jnp.zeros((b,), jnp.int32) if start is None else start, t)
        if segment_ids is not None:
            at = at - document_starts(segment_ids)
        log_rest = gaussian_log_mass(query, moments, jnp.maximum(at - local - sinks + 1, 0), scale)
    else:
        log_rest, state = running_log_mass(
            query, key, sinks=sinks, local=local, start=start, valid=valid,
            segment_ids=segment_ids, state=state, scale=scale,
        )  # fmt: skip
    return is_local(log_mass(near), log_rest, tau), state


def _check_options(name: str, sinks: int, local: int, criterion: str) -> None:
    if local < 1 or sinks < 0:
        raise ValueError(
            f"{name}: needs local >= 1 (it counts the query itself) and sinks >= 0, got "
            f"local={local}, sinks={sinks}."
        )
    if criterion not in CRITERIA:
        raise ValueError(f"{name}: criterion={criterion!r} is none of {', '.join(CRITERIA)}.")


def _example() -> tuple[QueryAdaptiveAttention, jax.Array]:
    module = QueryAdaptiveAttention(
        4, 16, num_kv_heads=2, sinks=1, local=3, tau=0.5, rope_base=1e4, rngs=nnx.Rngs(0)
    )
    return module, jax.random.normal(jax.random.key(1), (2, 13, 16))


SPEC = Mechanism(
    id="query_adaptive_heads",
    title="Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification",
    arxiv="2502.09647",
    year=2025,
    function=query_adaptive_attention,
    module=QueryAdaptiveAttention,
    causal=True,
    bidirectional=False,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T w + T d + (1 - share of local queries) T^2)",
    reduces_to={"tau>1": "multi_head_attention", "tau<=0": "multi_head_attention(window, sinks)"},
    reading="There is no official code. That each query takes the moments of its own past "
    "(criterion='running') and the default sizes and threshold are this library's choice.",
    golden=("qada",),
    example=_example,
)
