"""Landmark attention: a landmark token ends each block, and its weight opens the block.

The softmax has groups. For query t, group 0 holds the tokens of its own block up to t and the
landmarks of all earlier blocks; group m holds the ordinary tokens of earlier block m. With
logits s_tj = q_t · k_j / sqrt(d), L_m the landmark that ends block m, and lse_m over its tokens:

    p_tj = softmax_0(s_t)_j                               j in the own block
    p_tj = softmax_0(s_t)_{L_m} softmax_m(s_t)_j          j in block m,     p_t,landmark = 0

which is one softmax over shifted logits, e_tj = s_tj + (s_t,L_m - lse_m): that is how it is
computed. A landmark never sees itself. Besides its embedding (one row of the vocabulary) nothing is
learned in addition. At inference each query reads only the `top_k` blocks whose landmarks score
highest (`LandmarkCache`): keys are stored without positions, and the chosen blocks are numbered
anew, so that positions never exceed top_k + 1 blocks beyond the local tokens.

Where codes differ: the language-model code rotates interleaved pairs (here the default), the LLaMA
code halves, `rope_layout="half"`. Ties between landmarks go to the older block. With fewer than
`top_k` blocks in the store all of them are fetched, as the LLaMA code does; the other raises.
Group dropout is not offered.

Reference: Mohtashami & Jaggi, "Landmark Attention: Random-Access Infinite Context Length for
Transformers", 2023, arXiv:2305.16300; official code epfml/landmark-attention.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.cache.base import cache_bytes, valid_count, write_rows
from attnjax.checks import check_qkv, check_segments
from attnjax.dense import qk_scores, softmax_weights, weighted_values
from attnjax.merge import merge_attention
from attnjax.mixer import HEAD_SITES, Call, SequenceMixer
from attnjax.positions import apply_rope, rope_frequencies
from attnjax.positions.rope import Layout
from attnjax.spec import Mechanism
from pallas_kernels.tilemath import accumulator_dtype

TILE_SCORES = 1 << 16
"""Scores per head that are kept at a time."""

SELECTIONS = ("per_token_and_head", "max_over_heads", "max_over_tokens")


def insert_landmarks(
    ids: Int[Array, "b t"], mem_freq: int, landmark_id: int, *, pending: int = 0
) -> Int[Array, "b n"]:
    """Token ids with a landmark behind every `mem_freq` ordinary ones.

    Args:
      ids: ordinary tokens.
      mem_freq: ordinary tokens per block. Paper: 50.
      landmark_id: the landmark's row of the vocabulary.
      pending: ordinary tokens of an unfinished block that came before.

    Returns:
      [b, t + (pending + t) // mem_freq]. A block that `ids` completes gets its landmark at once.

    Raises:
      ValueError: when mem_freq < 1 or pending is not in [0, mem_freq).
    """
    if mem_freq < 1 or not 0 <= pending < mem_freq:
        raise ValueError(
            f"insert_landmarks: needs mem_freq >= 1 and 0 <= pending < mem_freq, got "
            f"mem_freq={mem_freq}, pending={pending}."
        )
    parts, start = [], 0
    while start < ids.shape[1]:
        stop = start + mem_freq - (pending if start == 0 else 0)
        parts.append(ids[:, start:stop])
        if stop <= ids.shape[1]:
            parts.append(jnp.full((ids.shape[0], 1), landmark_id, ids.dtype))
        start = stop
    return jnp.concatenate(parts, axis=1) if parts else ids


def grouped_softmax(
    scores: Float[Array, "b h t s"],
    is_landmark: Bool[Array, "b s"],
    visible: Bool[Array, "#b #h t s"],
) -> Float[Array, "b h t s"]:
    """Weights of landmark attention: gated by landmarks for earlier blocks, 0 for landmarks.

    Args:
      scores: scaled logits, float32 or wider.
      is_landmark: which keys are landmarks; any number of ordinary keys may lie between them.
      visible: True where a query may see a key at all. Its own block is the one of the last key
        that it sees.

    Returns:
      Weights whose rows sum to 1; rows without a visible ordinary key give 0.

    Memory: O(t s) per head.

    Reference: arXiv:2305.16300, eq. 1-3.
    """
    b, h, t, s = scores.shape
    block = jnp.cumsum(is_landmark, axis=1, dtype=jnp.int32) - is_landmark.astype(jnp.int32)
    block = block[:, None, None, :]  # of key j: landmarks strictly before it
    own = jnp.max(jnp.where(visible, block, -1), axis=-1, keepdims=True) == block
    landmark = is_landmark[:, None, None, :]
    ordinary = jnp.where(visible & ~landmark, scores, -jnp.inf)
    mark = jnp.broadcast_to(visible & landmark, scores.shape)
    gates = jnp.where(mark, scores, jnp.zeros_like(scores))

    def by_block(tokens: jax.Array, gates: jax.Array, marks: jax.Array, index: jax.Array) -> Any:
        """Of the block of each key: lse_m, the landmark's logit [s, h t], whether it has one."""
        top = jax.lax.stop_gradient(jax.ops.segment_max(tokens, index, s)[index])
        top = jnp.where(jnp.isneginf(top), jnp.zeros_like(top), top)
        total = jax.ops.segment_sum(jnp.exp(tokens - top), index, s)[index]
        lse = top + jnp.log(jnp.where(total == 0, jnp.ones_like(total), total))
        # a block has one landmark at most, so that the sum is its logit
        return lse, *(jax.ops.segment_sum(a, index, s)[index] for a in (gates, marks))

    def rows(a: jax.Array) -> jax.Array:
        return a.transpose(0, 3, 1, 2).reshape(b, s, h * t)

    parts = jax.vmap(by_block)(
        rows(ordinary), rows(gates), rows(mark.astype(scores.dtype)), block.reshape(b, s)
    )
    lse, gate, opened = (a.reshape(b, s, h, t).transpose(0, 2, 3, 1) for a in parts)
    kept = visible & ~landmark & (own | (opened > 0))
    shift = jnp.where(own | ~kept, jnp.zeros_like(gate), gate - lse)
    weights, _ = softmax_weights(scores + shift, kept)
    return weights


def landmark_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    *,
    block: int | None = None,
    is_landmark: Bool[Array, "b s"] | None = None,
    segment_ids: Int[Array, "b s"] | None = None,
    q_offset: Int[Array, " b"] | int = 0,
    scale: float | None = None,
) -> Float[Array, "b t h e"]:
    """Causal landmark attention over landmarks at regular places, or anywhere.

    Args:
      query, key, value: shapes as annotated; h a multiple of g. Positions are applied before.
      block: tokens per block with its landmark, mem_freq + 1: token j is a landmark iff
        j mod block = block - 1. Tiles of one block each are scanned.
      is_landmark: landmarks at any places instead; a few queries at a time see all keys.
      segment_ids: documents packed in a row, which do not see each other; with `is_landmark`, and
        with all queries at once (s = t).
      q_offset: index of the first query among the keys, an integer or [b].
      scale: None is d^-0.5.

    Returns:
      Output in the dtype of `query`.

    Memory: O(t block) per head with `block`, O(s) with `is_landmark`; 65536 scores where that is
    more. Time: O(t s).

    Raises:
      ValueError: on shapes that do not fit, block < 2, not exactly one of block, is_landmark, or
        segment_ids without is_landmark.

    Example: >>> landmark_attention(q, k, v, block=51).shape == v.shape
    """
    check_qkv("landmark_attention", query, key, value)
    if (block is None) == (is_landmark is None):
        raise ValueError("landmark_attention: pass either block or is_landmark.")
    b, t = query.shape[:2]
    offset = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32).reshape(-1), (b,))
    at = offset[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
    if is_landmark is not None:
        return _scan_queries(query, key, value, at, is_landmark, segment_ids, scale)
    if segment_ids is not None:
        raise ValueError(
            "landmark_attention: segment_ids need is_landmark, where each document has its own "
            "landmarks, for example positions % block == block - 1."
        )
    assert block is not None
    if block < 2:
        raise ValueError(f"landmark_attention: block={block} must be at least 2: token, landmark.")
    return _scan_blocks(query, key, value, at, block, scale)


def _scan_queries(
    query: jax.Array, key: jax.Array, value: jax.Array, at: jax.Array, is_landmark: jax.Array,
    segment_ids: Any, scale: Any,
) -> jax.Array:  # fmt: skip
    """Queries at indices `at` [b, t], as many at a time as give `TILE_SCORES` scores."""
    b, t = query.shape[:2]
    s = key.shape[1]
    if segment_ids is not None:
        check_segments("landmark_attention", segment_ids, b, t)
    keys = jnp.arange(s, dtype=jnp.int32)

    def attend(query: jax.Array, at: jax.Array, ids: Any) -> jax.Array:
        visible = keys[None, None, :] <= at[:, :, None]
        if ids is not None:
            visible &= (ids[:, :, None] == segment_ids[:, None]) & (ids >= 0)[:, :, None]
        weights = grouped_softmax(qk_scores(query, key, scale), is_landmark, visible[:, None])
        return weighted_values(weights, value).astype(query.dtype)

    size = max(1, TILE_SCORES // s)
    if size >= t:
        return attend(query, at, segment_ids)
    n = -(-t // size)

    def split(a: jax.Array, fill: int) -> jax.Array:
        pad = [(0, 0)] * a.ndim
        pad[1] = (0, n * size - t)
        wide = jnp.pad(a, pad, constant_values=fill)
        return wide.reshape(b, n, size, *a.shape[2:]).swapaxes(0, 1)

    ids = None if segment_ids is None else split(segment_ids, -1)
    # keep no scores for the gradient: they are computed again
    step = jax.checkpoint(lambda part: attend(*part))
    out = jax.lax.map(step, (split(query, 0), split(at, -1), ids))
    return out.swapaxes(0, 1).reshape(b, n * size, *out.shape[3:])[:, :t]


def _scan_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, at: jax.Array, block: int, scale: Any
) -> jax.Array:
    """Online softmax over the blocks of keys; queries at indices `at` [b, t]."""
    b, t, h, _ = query.shape
    s, g, e = value.shape[1:]
    # few queries take many blocks at once: decoding is then one step
    width = min(-(-s // block), max(1, TILE_SCORES // (t * block)))
    n = -(-s // (block * width))
    dtype = accumulator_dtype(query.dtype)
    pad = ((0, 0), (0, n * width * block - s), (0, 0), (0, 0))
    tiles = [
        jnp.pad(a, pad).reshape(b, n, width * block, g, -1).swapaxes(0, 1).astype(query.dtype)
        for a in (key, value)
    ]

    def step(carry: Any, tile: Any) -> tuple[Any, None]:
        first, k, v = tile
        weights = _open(qk_scores(query, k, scale), at, first, block)
        return merge_attention([carry, _values(*weights, v)]), None

    empty = jnp.zeros((b, t, h, e), dtype), jnp.full((b, t, h), -jnp.inf, dtype)
    first = jnp.arange(n, dtype=jnp.int32) * (width * block)
    # keep no tile for the gradient: its scores are computed again
    (out, _), _ = jax.lax.scan(jax.checkpoint(step), empty, (first, *tiles))
    return out.astype(query.dtype)


def _open(scores: jax.Array, at: jax.Array, first: Any, block: int) -> tuple[jax.Array, jax.Array]:
    """Weights among whole blocks of keys, and their log-sum-exp [b, h, t].

    Args:
      scores: [b, h, t, s]; the first key has the index `first`, a multiple of `block`.
      at: [b, t] indices of the queries.
    """
    b, h, t, s = scores.shape
    tiles = scores.reshape(b, h, t, s // block, block)
    index = first // block + jnp.arange(s // block, dtype=jnp.int32)
    own = (at[:, :, None] // block == index[None, None])[:, None, ..., None]
    gate = tiles[..., -1:] - jax.nn.logsumexp(tiles[..., :-1], axis=-1, keepdims=True)
    tiles = tiles + jnp.where(own, jnp.zeros_like(gate), gate)
    place = jnp.arange(s, dtype=jnp.int32)[None, None]
    kept = (first + place <= at[:, :, None]) & (place % block < block - 1)
    return softmax_weights(tiles.reshape(b, h, t, s), kept[:, None])


def _values(weights: jax.Array, lse: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A part for `merge_attention`: the mean of values [b, s, g, e], and lse [b, t, h]."""
    return weighted_values(weights, value), lse.swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class LandmarkCache:
    """Complete blocks without positions, the unfinished block behind them, and how to search.

    Attributes:
      key, value: [b, n, c, g, d] of the last n complete blocks; block B stands at B mod n.
      tail_key, tail_value: [b, c, g, d], tokens behind the last complete block.
      length: [b] int32, tokens seen so far, landmarks counted.
      top_k: blocks that a query fetches. Static.
      select: who chooses: "per_token_and_head", "max_over_heads" (the heads of a token agree on the
        blocks of highest probability in any head) or "max_over_tokens" (the tokens of a call do).
        Static.
      renumber: number the fetched blocks anew (the paper); False keeps true positions. Static.

    Memory: O(n c). Shardable by b and g. A query attends to top_k c + c + (new tokens) keys.
    """

    key: jax.Array
    value: jax.Array
    tail_key: jax.Array
    tail_value: jax.Array
    length: jax.Array
    top_k: int
    select: str
    renumber: bool

    @classmethod
    def create(
        cls,
        batch: int,
        max_blocks: int,
        block: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        top_k: int,
        select: str = "per_token_and_head",
        renumber: bool = True,
        dtype: Any = jnp.float32,
    ) -> LandmarkCache:
        """An empty cache of `max_blocks` blocks; the oldest are dropped when it is full.

        Raises:
          ValueError: when top_k is not in [1, max_blocks], or `select` is unknown.
        """
        if not 1 <= top_k <= max_blocks:
            raise ValueError(
                f"LandmarkCache: top_k={top_k} must be in [1, max_blocks={max_blocks}]; make the "
                "store larger or fetch fewer blocks."
            )
        if select not in SELECTIONS:
            raise ValueError(f"LandmarkCache: select={select!r} is none of {SELECTIONS}.")
        store = jnp.zeros((batch, max_blocks, block, num_kv_heads, head_dim), dtype)
        tail, length = store[:, 0], jnp.zeros((batch,), jnp.int32)
        return cls(store, store, tail, tail, length, top_k, select, renumber)

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)

    @property
    def sizes(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """[b] each: blocks seen, blocks in the store, tokens of the unfinished block."""
        seen, tail = jnp.divmod(self.length, self.key.shape[2])
        return seen, jnp.minimum(seen, self.key.shape[1]), tail

    @property
    def start(self) -> jax.Array:
        """[b] position of the first token of the unfinished block."""
        seen, stored, _ = self.sizes
        if not self.renumber:
            return seen * self.key.shape[2]
        return jnp.minimum(seen, jnp.minimum(self.top_k, stored) + 1) * self.key.shape[2]

    def local(self, key: jax.Array, value: jax.Array, valid: Any) -> tuple[jax.Array, jax.Array]:
        """The unfinished block with the new tokens behind it, padded to whole blocks."""
        c, t = self.key.shape[2], key.shape[1]
        width = -(-t // c) * c
        where = self.sizes[2][:, None] + jnp.arange(t, dtype=jnp.int32)[None]

        def join(tail: jax.Array, new: jax.Array) -> jax.Array:
            wide = jnp.pad(tail, ((0, 0), (0, width), (0, 0), (0, 0))).astype(new.dtype)
            return write_rows(wide, where, new, valid)

        return join(self.tail_key, key), join(self.tail_value, value)

    def append(self, key: jax.Array, value: jax.Array, valid: Any = None) -> LandmarkCache:
        """Stores new tokens [b, t, g, d]; blocks that they complete enter the store."""
        b, n, c = self.key.shape[:3]
        count = valid_count(valid, jnp.zeros(key.shape[:2], jnp.int32))
        seen, _, tail = self.sizes
        full = (tail + count) // c
        blocks = [a.reshape(b, -1, c, *a.shape[2:]) for a in self.local(key, value, valid)]
        index = jnp.arange(blocks[0].shape[1], dtype=jnp.int32)[None]
        # of blocks that share a slot only the last may be written: a scatter has no order
        keep = (index < full[:, None]) & (index >= full[:, None] - n)
        slots = (seen[:, None] + index) % n

        def last(new: jax.Array, old: jax.Array) -> jax.Array:
            return jax.vmap(lambda a, i: a[i])(new, full).astype(old.dtype)

        return dataclasses.replace(
            self,
            key=write_rows(self.key, slots, blocks[0], keep),
            value=write_rows(self.value, slots, blocks[1], keep),
            tail_key=last(blocks[0], self.tail_key),
            tail_value=last(blocks[1], self.tail_value),
            length=self.length + count,
        )

    def by_age(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values of the stored blocks, oldest first."""
        seen, stored, _ = self.sizes
        n = self.key.shape[1]
        order = ((seen - stored)[:, None] + jnp.arange(n, dtype=jnp.int32)[None]) % n
        rows = jnp.arange(order.shape[0], dtype=jnp.int32)[:, None]
        return self.key[rows, order], self.value[rows, order]


jax.tree_util.register_dataclass(
    LandmarkCache,
    data_fields=["key", "value", "tail_key", "tail_value", "length"],
    meta_fields=["top_k", "select", "renumber"],
)


class LandmarkAttention(SequenceMixer):
    """Multi-head landmark attention; training, exact decoding, and decoding with retrieval.

    The input holds the landmark tokens: put them in the ids with `insert_landmarks`. Token j of a
    row is a landmark iff j mod block = block - 1, counted by `positions` where `segment_ids` pack
    several documents. Leave landmarks out of the loss. A call without a cache takes `is_landmark`
    [b, t], booleans, for landmarks at other places. Positions do not go with a `LandmarkCache`,
    which numbers tokens itself.

    `init_cache` gives the cache of exact decoding, which sees all blocks at true positions;
    `init_retrieval` the one that fetches `top_k` blocks per query.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      block: tokens per block with its landmark. Paper: 51 (mem_freq=50), LLaMA 64.
      rope_layout: "interleaved" as the language-model code, "half" as the LLaMA code.
      **options: of `SequenceMixer`. Paper: rope_base=10000.

    Raises:
      ValueError: when block < 2.
    """

    sites = HEAD_SITES
    grouped = rotary = True
    drops = False
    further = ("is_landmark",)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        block: int = 51,
        rope_layout: Layout = "interleaved",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        if block < 2:
            raise ValueError(f"LandmarkAttention: block={block} must be at least 2.")
        if rope_layout not in ("half", "interleaved"):
            raise ValueError(
                f"LandmarkAttention: rope_layout={rope_layout!r} must be 'half' or 'interleaved'."
            )
        self.block = block
        self.pairs: Layout = rope_layout
        groups = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(groups, rngs=rngs)
        self.value = self.projection(groups, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Rotated keys, and values."""
        return dict.fromkeys(("key", "value"), (self.num_kv_heads, self.head_dim))

    def init_retrieval(
        self, batch: int, max_blocks: int, top_k: int, *, dtype: Any = None, **options: Any
    ) -> LandmarkCache:
        """An empty cache for decoding with retrieval.

        Args:
          batch: rows.
          max_blocks: complete blocks that are kept.
          top_k: blocks that each query fetches.
          dtype: of keys and values; None is the module's dtype, or that of the parameters.
          options: select, renumber; see `LandmarkCache`.
        """
        self._require_decoding()
        sizes = (batch, max_blocks, self.block, self.num_kv_heads, self.head_dim)
        dtype = (self.dtype or self.param_dtype) if dtype is None else dtype
        return LandmarkCache.create(*sizes, top_k=top_k, dtype=dtype, **options)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x, is_landmark = call.x, self._marks(call)
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        if isinstance(call.cache, LandmarkCache):
            return self._retrieve(call, q, k, v)
        q, k = self._turn(q, call.positions), self._turn(k, call.positions)
        if call.cache is not None:
            stored = call.store(key=k, value=v)
            return landmark_attention(
                q, stored["key"], stored["value"], block=self.block, q_offset=call.start
            )
        if is_landmark is None and call.segment_ids is None:
            return landmark_attention(q, k, v, block=self.block)
        if is_landmark is None:
            is_landmark = call.positions % self.block == self.block - 1
        return landmark_attention(q, k, v, is_landmark=is_landmark, segment_ids=call.segment_ids)

    def _marks(self, call: Call) -> Any:
        """The `is_landmark` of a call, checked."""
        name, is_landmark = type(self).__name__, call.further["is_landmark"]
        if call.placed and isinstance(call.cache, LandmarkCache):
            raise NotImplementedError(
                f"{name}: positions with LandmarkCache are not supported; it numbers tokens itself."
            )
        if is_landmark is None:
            return None
        if call.cache is not None:
            raise NotImplementedError(
                f"{name}: is_landmark with a cache is not supported; every {self.block}th token of "
                "a cached row is a landmark."
            )
        if is_landmark.shape != call.x.shape[:2] or is_landmark.dtype != jnp.bool_:
            raise ValueError(
                f"{name}: is_landmark must be boolean of shape [batch, length] = "
                f"{call.x.shape[:2]}, got {is_landmark.dtype} {is_landmark.shape}."
            )
        return is_landmark

    def _turn(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotary embedding of x [b, t, h, d] at positions [b, t] or [b, h, t]."""
        if self.rope_base is None:
            return x
        inv_freq, _ = rope_frequencies(self.head_dim, self.rope_base, None, None)
        return apply_rope(x, positions, inv_freq, layout=self.pairs)

    def _retrieve(self, call: Call, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Attention to fetched blocks, the unfinished block and the new tokens."""
        cache: LandmarkCache = call.cache
        t = q.shape[1]
        start = cache.start
        # places among the local tokens: the unfinished block, then the new ones
        at = cache.sizes[2][:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        q = self._turn(q, start[:, None] + at)
        local_k, local_v = cache.local(k, v, call.valid)
        place = jnp.arange(local_k.shape[1], dtype=jnp.int32)
        local_k = self._turn(local_k, start[:, None] + place[None])
        local = _values(*_open(qk_scores(q, local_k), at, 0, self.block), local_v)
        z, _ = merge_attention([self._fetched(cache, q), local])
        call.cache = cache.append(k, v, call.valid)
        return z.astype(q.dtype)

    def _fetched(self, cache: LandmarkCache, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Output and lse over the best `top_k` stored blocks of each query [b, t, h, d]."""
        c, (b, t, h, d) = self.block, q.shape
        n, top_k = cache.key.shape[1], cache.top_k
        seen, stored, _ = cache.sizes
        age = jnp.arange(n, dtype=jnp.int32)
        near = (stored - jnp.minimum(top_k, stored))[:, None]
        # paper: the newest top_k blocks get slots 1, 2, ..., all older ones slot 0
        slot = jnp.maximum(age[None] - near + 1, 0)
        if not cache.renumber:
            slot = (seen - stored)[:, None] + age[None]
        keys, values = (a.astype(q.dtype) for a in cache.by_age())
        marks = self._turn(keys[:, :, -1], slot * c + c - 1)
        scores = qk_scores(q, marks)  # [b, h, t, n]
        there = (age[None] < stored[:, None])[:, None, None]
        chances, _ = softmax_weights(scores, there)
        if cache.select == "max_over_heads":
            chances = chances.max(1, keepdims=True)
        elif cache.select == "max_over_tokens":
            chances = chances.max(2, keepdims=True)
        chances = jnp.broadcast_to(jnp.where(there, chances, -1), scores.shape)
        _, best = jax.lax.top_k(chances, top_k)
        best = jnp.sort(best, axis=-1)  # oldest first; missing blocks come last
        rows = jnp.arange(b, dtype=jnp.int32).reshape(b, 1, 1, 1)
        chosen = slot[rows, best]  # [b, h, t, k]
        if cache.renumber:
            rank = jnp.arange(top_k, dtype=jnp.int32)[None, None, None]
            chosen = rank + (chosen > 0).astype(jnp.int32)
        kept = best < stored[:, None, None, None]
        group = (jnp.arange(h, dtype=jnp.int32) // (h // keys.shape[3])).reshape(1, h, 1, 1)
        fetched = keys.transpose(0, 1, 3, 2, 4)[rows, best, group]  # [b, h, t, k, c, d]
        where = chosen[..., None] * c + jnp.arange(c, dtype=jnp.int32)[(None,) * 4]
        fetched = fetched.transpose(0, 2, 3, 4, 1, 5).reshape(b, t * top_k * c, h, d)
        fetched = self._turn(fetched, where.reshape(b, h, t * top_k * c))
        fetched = fetched.reshape(b, t, top_k, c, h, d)
        dtype = accumulator_dtype(q.dtype)
        logits = jnp.einsum("bthd,btkchd->bhtkc", q, fetched, preferred_element_type=dtype)
        logits = logits * jnp.asarray(d**-0.5, dtype)
        inside = jax.nn.logsumexp(logits[..., :-1], axis=-1, keepdims=True)
        logits = logits + (logits[..., -1:] - inside)
        kept = kept[..., None] & (jnp.arange(c) < c - 1)[(None,) * 4]
        flat = (b, h, t, top_k * c)
        weights, lse = softmax_weights(logits.reshape(flat), kept.reshape(flat))
        picked = values.transpose(0, 1, 3, 2, 4)[rows, best, group]
        out = jnp.einsum(
            "bhtx,bhtxe->bthe", weights, picked.reshape(b, h, t, top_k * c, -1).astype(dtype)
        )
        return out.astype(dtype), lse.swapaxes(1, 2)


def _example() -> tuple[LandmarkAttention, jax.Array]:
    module = LandmarkAttention(
        4, 16, num_kv_heads=2, block=4, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(0)
    )
    return module, jax.random.normal(jax.random.key(1), (2, 11, 16))


def _picture() -> dict[str, jax.Array]:
    t, block = 24, 6
    scores = jax.random.normal(jax.random.key(2), (1, 1, t, t))
    index = jnp.arange(t)
    mark = (index % block == block - 1)[None]
    visible = (index[None, :] <= index[:, None])[None, None]
    return {"weights, a landmark every 6 tokens": grouped_softmax(scores, mark, visible)[0, 0]}


SPEC = Mechanism(
    id="landmark_attention",
    title="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    arxiv="2305.16300",
    year=2023,
    code="epfml/landmark-attention",
    function=landmark_attention,
    module=LandmarkAttention,
    causal=True,
    bidirectional=False,
    cache="dense",
    segment_ids=True,
    kernel="einsum",
    cost="O(T^2) in training, O(top_k block) per token with retrieval",
    reduces_to={"no landmarks (block > T)": "multi_head_attention"},
    picture=_picture,
    golden=("landmark", "landmark_cache"),
    example=_example,
)
