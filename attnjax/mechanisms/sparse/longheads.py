"""LongHeads: every head picks the chunks it reads, at positions the model was trained on.

A pretrained rotary decoder reads texts longer than its training length without training. Tokens
come in chunks of w; a query reads K of them, chosen by head: the first, its own, the one before,
and the K - 3 others whose chunk keys c_J fit best (the largest q_t · c_J, q_t not rotated). The
chosen chunks are numbered anew, so that no distance exceeds K w:

    chunk J of rank r:  key j gets position r w + (j mod w),  query t gets (K - 1) w + (t mod w)
    O = softmax(q k^T / sqrt(d)) v inside chunk J, not causal, at positions 0 .. w-1
    c_J = Σ_j a_j k_j,   a = softmax_j(mean_rows(O) · k_j / sqrt(d))

A query with at most K chunks up to its own reads all of them at their true positions: ordinary
attention. Keys are rotated by their place in the chunk once, and a query by (its rank - r) w + (t
mod w) for each chunk, which gives the same scores as rotating every key for every query.

Where the code differs: its two prefill paths leave out the query's own key beyond the trained
length, its decoding does not; here a query always sees itself (`official_prefill_cut=True` gives
the prefill's form). Its `begin_selective_length` is `attended` here, which is its default too.

Reference: Lu et al., "LongHeads: Multi-Head Attention is Secretly a Long Context Processor", 2024,
arXiv:2402.10685; official code LuLuLuyi/LongHeads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.attention import attention
from attnjax.cache.base import cache_bytes, check_room, valid_count, write_rows
from attnjax.checks import check_qkv
from attnjax.dense import softmax_weights
from attnjax.mechanisms.sparse.gathered import in_parts
from attnjax.mixer import HEAD_SITES, Call, SequenceMixer
from attnjax.positions import apply_rope, rope_frequencies
from attnjax.spec import Mechanism
from pallas_kernels.tilemath import accumulator_dtype

GATHERED_KEYS = 1 << 14
"""Keys that are gathered at a time, per head: bounds the memory of long prompts."""


def longheads_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t g d"],
    value: Float[Array, "b t g d"],
    *,
    chunk: int = 256,
    attended: int = 4096,
    rope_base: float | None = 1e4,
    official_prefill_cut: bool = False,
) -> Float[Array, "b t h d"]:
    """Causal attention of each head to the chunks it picks.

    Args:
      query, key, value: before rotation; h a multiple of g, values as wide as keys.
      chunk: w in tokens. Paper: 256.
      attended: K w, tokens that a query may read: the trained length, at least 3 chunks. Paper:
        4096.
      rope_base: of the rotary positions (halves); None is no rotation.
      official_prefill_cut: leave out the query's own key in texts beyond `attended`, as the
        official prefill does.

    Returns:
      Output in the dtype of `query`.

    Memory: O(t K w) keys are gathered, 2^14 per head at a time. Time: O(t (t / w + K w)) per head.

    Raises:
      ValueError: on shapes that do not fit, or attended not a multiple of chunk and >= 3 chunks.

    Example: >>> longheads_attention(q, k, v, chunk=256, attended=4096).shape == q.shape
    """
    check_qkv("longheads_attention", query, key, value)
    chosen = _chunks("longheads_attention", chunk, attended)
    b, t = query.shape[:2]
    at = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    inside = _turn(query, at % chunk, rope_base)
    key = _turn(key, at % chunk, rope_base)
    pad = ((0, 0), (0, -t % chunk), (0, 0), (0, 0))
    tiles = (jnp.pad(a, pad).reshape(b, -1, chunk, *a.shape[2:]) for a in (inside, key, value))
    inside, key, value = tiles
    keys = chunk_keys(inside, key, value)
    return _attend(query, key, value, keys, at, chosen, rope_base, official_prefill_cut)


def chunk_keys(
    query: Float[Array, "b n w h d"],
    key: Float[Array, "b n w g d"],
    value: Float[Array, "b n w g d"],
) -> Float[Array, "b n h d"]:
    """The key c_J of each whole chunk, by query head.

    Args:
      query, key: rotated by their place in the chunk.
      value: as wide as the keys.
    """
    b, n, w, h, d = query.shape
    q, k, v = (a.reshape(b * n, w, *a.shape[3:]) for a in (query, key, value))
    summary = attention(q, k, v).mean(1, keepdims=True)
    return attention(summary, k, k).reshape(b, n, h, d)


def select_chunks(
    query: Float[Array, "b t h d"],
    keys: Float[Array, "b n h d"],
    at: Int[Array, "b t"],
    chosen: int,
    chunk: int,
) -> tuple[Int[Array, "b h t r"], Bool[Array, "b h t r"]]:
    """The chunks that each head of each query reads, in order.

    Args:
      query: not rotated.
      keys: chunk keys; those of the query's own chunk, the one before and later ones are not used.
      at: index of each query in the text.
      chosen: K.
      chunk: w.

    Returns:
      Indices of chunks, oldest first, and which of them are there (at first there are fewer than
      K). Scores tie in favor of the older chunk.
    """
    dtype = accumulator_dtype(query.dtype)
    scores = jnp.einsum("bthd,bnhd->bhtn", query, keys, preferred_element_type=dtype)
    own = (at // chunk)[:, None, :, None]
    index = jnp.arange(keys.shape[1], dtype=jnp.int32)[None, None, None]
    always = (index == 0) | (index == own) | (index == own - 1)
    scores = jnp.where(always, jnp.inf, jnp.where(index < own, scores, -jnp.inf))
    best, where = jax.lax.top_k(scores, min(chosen, keys.shape[1]))
    there = ~jnp.isneginf(best)
    where = jnp.sort(jnp.where(there, where, keys.shape[1]), axis=-1)
    there = where < keys.shape[1]
    return jnp.where(there, where, 0), there


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, keys: jax.Array, at: jax.Array,
    chosen: int, rope_base: float | None, cut: bool = False,
) -> jax.Array:  # fmt: skip
    """Attention of queries [b, t, h, d], not rotated, at indices `at` to chunks [b, n, w, g, .]."""

    def some(query: jax.Array, at: jax.Array) -> jax.Array:
        return _attend_some(query, at, key, value, keys, chosen, rope_base, cut)

    read = min(chosen, key.shape[1]) * key.shape[2]
    return in_parts(some, max(1, GATHERED_KEYS // read), query, at)


def _attend_some(
    query: jax.Array, at: jax.Array, key: jax.Array, value: jax.Array, keys: jax.Array,
    chosen: int, rope_base: float | None, cut: bool,
) -> jax.Array:  # fmt: skip
    b, t, h, d = query.shape
    w, g = key.shape[2:4]
    where, there = select_chunks(query, keys, at, chosen, w)  # [b, h, t, r]
    ranks = where.shape[-1]
    own, place = at // w, at % w
    rank = jnp.arange(ranks, dtype=jnp.int32)
    behind = jnp.minimum(own, chosen - 1)[..., None] - rank[None, None]
    turned = jnp.broadcast_to(query[:, :, None], (b, t, ranks, h, d)).reshape(b, -1, h, d)
    turned = _turn(turned, (behind * w + place[..., None]).reshape(b, -1), rope_base)
    rows = jnp.arange(b, dtype=jnp.int32).reshape(b, 1, 1, 1)
    group = (jnp.arange(h, dtype=jnp.int32) // (h // g)).reshape(1, h, 1, 1)
    picked = [a.swapaxes(2, 3)[rows, where, group] for a in (key, value)]  # [b, h, t, r, w, d]
    dtype = accumulator_dtype(query.dtype)
    scores = jnp.einsum(
        "btrhd,bhtrwd->bhtrw", turned.reshape(b, t, ranks, h, d), picked[0],
        preferred_element_type=dtype,
    )  # fmt: skip
    limit = place - ((own >= chosen).astype(jnp.int32) if cut else 0)
    seen = jnp.arange(w, dtype=jnp.int32)[None, None] <= limit[..., None]  # in the own chunk
    earlier = where < own[:, None, :, None]
    kept = there[..., None] & (earlier[..., None] | seen[:, None, :, None])
    flat = (b, h, t, ranks * w)
    scores = scores * jnp.asarray(d**-0.5, dtype)
    weights, _ = softmax_weights(scores.reshape(flat), kept.reshape(flat))
    weights = weights.reshape(scores.shape)
    out = jnp.einsum("bhtrw,bhtrwd->bthd", weights, picked[1].astype(dtype))
    return out.astype(query.dtype)


def _turn(x: jax.Array, positions: jax.Array, base: float | None) -> jax.Array:
    if base is None:
        return x
    inv_freq, _ = rope_frequencies(x.shape[-1], base, None, None)
    return apply_rope(x, positions, inv_freq)


@dataclasses.dataclass(frozen=True)
class LongHeadsCache:
    """All keys and values, a key for each whole chunk, and the queries of the unfinished chunk.

    Attributes:
      key, value: [b, n, w, g, d]; token j stands at [j // w, j mod w], its key rotated by j mod w.
      chunk_key: [b, n, h, d], of whole chunks; 0 for the others.
      query: [b, w, h, d], rotated by their place in the chunk; they make the next chunk key.
      length: [b] int32, tokens seen so far.

    Memory: O(max_length). Shardable by b, g and h.
    """

    key: jax.Array
    value: jax.Array
    chunk_key: jax.Array
    query: jax.Array
    length: jax.Array

    @classmethod
    def create(
        cls, batch: int, max_length: int, heads: int, kv_heads: int, head_dim: int, chunk: int,
        dtype: Any = jnp.float32,
    ) -> LongHeadsCache:  # fmt: skip
        """An empty cache for `max_length` tokens."""
        n = -(-max_length // chunk)
        store = jnp.zeros((batch, n, chunk, kv_heads, head_dim), dtype)
        query = jnp.zeros((batch, chunk, heads, head_dim), dtype)
        keys = jnp.zeros((batch, n, heads, head_dim), dtype)
        return cls(store, store, keys, query, jnp.zeros((batch,), jnp.int32))

    @property
    def max_length(self) -> int:
        """Tokens it can hold."""
        return self.key.shape[1] * self.key.shape[2]

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)

    def append(
        self, query: jax.Array, key: jax.Array, value: jax.Array, valid: Any = None
    ) -> LongHeadsCache:
        """Stores new tokens [b, t, ., d], rotated by their place in the chunk.

        Raises:
          ValueError: (outside of jit) when the cache is full.
        """
        b, n, w = self.key.shape[:3]
        t = query.shape[1]
        at = self.length[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        count = valid_count(valid, at)
        check_room("LongHeadsCache", self.length, count, self.max_length)
        length = self.length + count

        def store(old: jax.Array, new: jax.Array) -> jax.Array:
            flat = old.reshape(b, n * w, *old.shape[3:])
            return write_rows(flat, at, new, valid).reshape(old.shape)

        keys, values = store(self.key, key), store(self.value, value)
        first, more = self.length // w, -(-t // w)  # `more` chunks at most are completed
        wide = jnp.pad(self.query, ((0, 0), (0, more * w), (0, 0), (0, 0)))
        wide = write_rows(wide, at - (first * w)[:, None], query, valid)
        wide = wide.reshape(b, more + 1, *self.query.shape[1:])
        index = first[:, None] + jnp.arange(more, dtype=jnp.int32)[None]
        done = (index + 1) * w <= length[:, None]
        rows = jnp.arange(b, dtype=jnp.int32)[:, None]

        def summarize(chunk_key: jax.Array) -> jax.Array:
            found = jnp.minimum(index, n - 1)
            new = chunk_keys(wide[:, :more], keys[rows, found], values[rows, found])
            return write_rows(chunk_key, index, new, done)

        # most single tokens complete no chunk
        chunk_key = jax.lax.cond(done.any(), summarize, lambda old: old, self.chunk_key)
        running = wide[rows[:, 0], length // w - first]
        return LongHeadsCache(keys, values, chunk_key, running, length)


jax.tree_util.register_dataclass(
    LongHeadsCache, data_fields=["key", "value", "chunk_key", "query", "length"], meta_fields=[]
)


class LongHeadsAttention(SequenceMixer):
    """Multi-head `longheads_attention`, with the parameters of any rotary attention.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      chunk: w in tokens. Paper: 256.
      attended: K w, tokens that a query may read, at least 3 chunks: the trained length. Paper:
        4096.
      **options: of `SequenceMixer`, except dropout_rate. Paper: rope_base=10000.

    Raises:
      ValueError: when `attended` is not a multiple of `chunk`, or less than 3 chunks.
      NotImplementedError: for dropout of the weights.
    """

    sites = HEAD_SITES
    grouped = rotary = True
    packed = drops = False

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        chunk: int = 256,
        attended: int = 4096,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        self.chosen = _chunks("LongHeadsAttention", chunk, attended)
        self.chunk, self.attended = chunk, attended
        groups = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(groups, rngs=rngs)
        self.value = self.projection(groups, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> LongHeadsCache:
        """An empty cache.

        Args:
          batch: rows.
          max_length: tokens per row, prompt and continuation together.
          dtype: of what is stored; None is the module's dtype, or that of the parameters.
        """
        self._require_decoding()
        sizes = (self.num_heads, self.num_kv_heads, self.head_dim, self.chunk)
        dtype = (self.dtype or self.param_dtype) if dtype is None else dtype
        return LongHeadsCache.create(batch, max_length, *sizes, dtype=dtype)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x, w = call.x, self.chunk
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        if call.cache is None and x.shape[1] <= self.attended:
            q, k = self.rotate(call, q, k)
            return self.attend(call, q, k, v)[0]
        if call.cache is None:
            return longheads_attention(
                q, k, v, chunk=w, attended=self.attended, rope_base=self.rope_base
            )
        at = call.positions
        inside, k = (_turn(a, at % w, self.rope_base) for a in (q, k))
        call.cache = call.cache.append(inside, k, v, call.valid)
        stored = (call.cache.key, call.cache.value, call.cache.chunk_key)
        key, value, keys = (a.astype(q.dtype) for a in stored)
        return _attend(q, key, value, keys, at, self.chosen, self.rope_base)

    def _check(
        self, mask: Any, positions: Any, segment_ids: Any, cache: Any, b: int, t: int
    ) -> None:
        super()._check(mask, positions, segment_ids, cache, b, t)
        if positions is not None:
            raise NotImplementedError(
                "LongHeadsAttention: positions are not supported, it numbers the tokens of each "
                "row from 0 and renumbers the chunks that it reads; leave positions=None."
            )


def _chunks(name: str, chunk: int, attended: int) -> int:
    """K."""
    if chunk < 1 or attended % chunk or attended // chunk < 3:
        raise ValueError(
            f"{name}: attended={attended} must be a multiple of chunk={chunk}, and at least 3 "
            "chunks: the first, the query's own and the one before."
        )
    return attended // chunk


def _example() -> tuple[LongHeadsAttention, jax.Array]:
    module = LongHeadsAttention(
        4, 16, num_kv_heads=2, chunk=2, attended=8, rope_base=1e4, rngs=nnx.Rngs(0)
    )
    return module, jax.random.normal(jax.random.key(1), (2, 17, 16))


def _picture() -> dict[str, jax.Array]:
    """Chunks read by two heads, with queries and chunk keys drawn at random."""
    t, w = 32, 2
    query = jax.random.normal(jax.random.key(0), (1, t, 2, 8))
    keys = jax.random.normal(jax.random.key(1), (1, t // w, 2, 8))
    at = jnp.arange(t, dtype=jnp.int32)[None]
    where, there = select_chunks(query, keys, at, 5, w)
    index = jnp.arange(t, dtype=jnp.int32)
    read = ((where[..., None] == (index // w)[(None,) * 4]) & there[..., None]).any(-2)[0]
    seen = read & (index[None] <= index[:, None])[None]
    return {f"head {h}": a.astype(jnp.float32) for h, a in enumerate(seen)}


SPEC = Mechanism(
    id="longheads",
    title="LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
    arxiv="2402.10685",
    year=2024,
    code="LuLuLuyi/LongHeads",
    function=longheads_attention,
    module=LongHeadsAttention,
    causal=True,
    bidirectional=False,
    cache="dense",
    segment_ids=False,
    kernel="einsum",
    cost="O(T (T / w + K w))",
    reduces_to={"attended >= T": "multi_head_attention"},
    picture=_picture,
    example=_example,
)
