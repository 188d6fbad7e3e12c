"""PINE: attention to a prompt's documents that does not depend on their order.

    prompt = prefix [P] + documents 1..K of n_1, ..., n_K tokens [T] + suffix and what is generated

    share(q, b) = (1/n_b) Σ_{k in b} softmax_k(q · k / sqrt(d))       k in the documents but q's own
    importance(a, b) = Σ_{q in a} share(q, b), and infinite for a = b;   a query after the documents
                       ranks them by its own share(q, b)
    shift(a, b) = tokens of all documents that a ranks before b
    position of a key of b as a query of a sees it = P + T - n_b + (place in b) - shift(a, b)

Queries, keys and shares are taken before rotation, and all of it by head. A document sees the
prefix, itself causally, and all other documents completely: itself last, the most important one
just before itself, and so on. Tokens after the documents see them in the same way, and prefix and
suffix causally at their usual positions. What the suffix says is then the same for any order of
the documents, and a document's states move with it. Exact ties are broken by the given order.

Rotary scores depend on differences of positions only, so shifting the keys of b by s is rotating
the query by s more. Here one pass per document rotates the queries for it, attends to the tiles of
its keys, and the passes are merged by their log-sum-exp. The official code makes a rotated copy of
all keys for every query; it takes one prompt at a time.

Reference: Wang et al., "Eliminating Position Bias of Language Models: A Mechanistic Approach",
2024, arXiv:2407.01100; official code wzq016/PINE.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from attnjax.attention import attention
from attnjax.cache import DenseCache
from attnjax.cache.base import cache_bytes
from attnjax.checks import check_qkv
from attnjax.masks import Causal, Lengths, Mask, Segments
from attnjax.masks.keys import key_set
from attnjax.masks.multihop import Documents, between_documents, join_masks
from attnjax.merge import merge_attention
from attnjax.mixer import HEAD_SITES, Call, SequenceMixer
from attnjax.positions import apply_rope, rope_frequencies
from attnjax.spec import Mechanism


def pine_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    documents: Documents,
    *,
    rope_base: float = 10000.0,
    q_offset: int | Int[Array, " b"] = 0,
    lengths: Int[Array, " b"] | None = None,
    mask: Any = None,
    **options: Any,
) -> Float[Array, "b t h e"]:
    """Attention whose documents are placed by importance, not by order; see the module.

    Args:
      query, key, value: shapes as annotated, NOT rotated; h a multiple of g. Keys start at index 0.
      documents: where the documents are. Rows with documents of length 0 alone are causal.
      rope_base: base of rotary positions.
      q_offset: index of the first query, an integer or [b]: the number of tokens in a cache.
      lengths: [b] real keys of each row; None is all. Documents lie within them.
      mask: a further mask, of `attnjax.masks` or booleans.
      **options: of `attnjax.attention`.

    Returns:
      Output in the dtype of `query`. The order has no gradient.

    Memory: O(t + s) block-sparse, and O(t h n) for the shifts.

    Raises:
      ValueError: on shapes that do not fit together.

    Reference: arXiv:2407.01100, section 3.
    """
    check_qkv("pine_attention", query, key, value)
    b, t, h, d = query.shape
    s = key.shape[1]
    if documents.lengths.shape[0] not in (1, b):
        raise ValueError(
            f"pine_attention: documents of {documents.lengths.shape[0]} rows do not fit query "
            f"{query.shape}; make them with batch={b}."
        )
    inv_freq, _ = rope_frequencies(d, rope_base)
    keys = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None], (b, s))
    queries = _query_index(b, t, q_offset)
    ids = documents.ids(keys)
    place = documents.positions(queries)[:, None, :]  # [b, 1, t]
    shift = document_shifts(query, key, documents, q_offset=q_offset).transpose(3, 0, 2, 1)
    rotated = apply_rope(key, documents.positions(keys), inv_freq)
    layout = Causal() | between_documents(ids)
    if lengths is not None:
        layout = layout & Lengths(lengths)

    def see(part: Mask, more: jax.Array) -> tuple[jax.Array, jax.Array]:
        return attention(
            apply_rope(query, place + more, inv_freq), rotated, value, q_offset=q_offset,
            mask=join_masks(layout & part, mask, t, s, q_offset), return_residual=True, **options,
        )  # fmt: skip

    def step(carry: Any, inputs: Any) -> tuple[Any, None]:
        number, more = inputs
        return merge_attention([carry, see(key_set(ids == number), more)]), None

    text = see(key_set(ids < 0), jnp.zeros_like(place))
    numbers = jnp.arange(documents.lengths.shape[1], dtype=jnp.int32)
    (z, _), _ = lax.scan(step, text, (numbers, shift))
    return z


def document_shifts(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    documents: Documents,
    *,
    q_offset: int | Int[Array, " b"] = 0,
) -> Int[Array, "b t h n"]:
    """How many tokens a query places between each document and the end of all of them.

        shift(q, b) = Σ n_c over the documents c that are ranked before b

    Args:
      query, key: shapes as annotated, not rotated.
      documents: where the documents are.
      q_offset: index of the first query.

    Returns:
      int32 [b, t, h, n]; meaningless for queries of the prefix, which see no document.
    """
    importance = document_importance(query, key, documents, q_offset=q_offset)
    order = jnp.argsort(-importance, axis=-1, stable=True)
    lengths = jnp.broadcast_to(documents.lengths[:, None, None], importance.shape)
    ranked = jnp.take_along_axis(lengths, order, -1)
    before = jnp.cumsum(ranked, -1, dtype=jnp.int32) - ranked
    return jnp.take_along_axis(before, jnp.argsort(order, axis=-1), -1).astype(jnp.int32)


def document_importance(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    documents: Documents,
    *,
    q_offset: int | Int[Array, " b"] = 0,
) -> Float[Array, "b t h n"]:
    """How important each document is to each query, without positions.

    Args:
      query, key: shapes as annotated, not rotated. Queries of one document share their importance,
        so a document comes in one call.
      documents: where the documents are.
      q_offset: index of the first query.

    Returns:
      importance(q's document, b) for queries in a document, infinite for their own; share(q, b) for
      the others. float32, or float64 for float64 inputs; no gradient.

    Memory: O(t n): the shares are attention to one-hot values, softmax weights are never stored.
    """
    query, key = lax.stop_gradient((query, key))
    b, t = query.shape[:2]
    s, g = key.shape[1:3]
    n = documents.lengths.shape[1]
    wide = jnp.float64 if query.dtype == jnp.float64 else jnp.float32
    keys = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32)[None], (b, s))
    ids = documents.ids(keys)
    each = 1.0 / jnp.maximum(documents.lengths, 1).astype(wide)  # [b, n]
    members = jax.nn.one_hot(ids, n, dtype=wide) * each[:, None]  # [b, s, n]
    mask = key_set(ids >= 0) & ~Segments(ids)
    share = attention(
        query.astype(wide), key.astype(wide),
        jnp.broadcast_to(members[:, :, None], (b, s, g, n)), mask=mask, q_offset=q_offset,
    )  # fmt: skip
    own = jax.nn.one_hot(documents.ids(_query_index(b, t, q_offset)), n, dtype=wide)  # [b, t, n]
    total = jnp.einsum("btn,bthm->bnhm", own, share)
    shared = jnp.einsum("btn,bnhm->bthm", own, total)
    inside = own.sum(-1)[..., None, None] > 0
    share = jnp.where(inside, shared, share)
    return jnp.where(own[:, :, None] > 0, jnp.full_like(share, jnp.inf), share)


@dataclasses.dataclass(frozen=True)
class PineCache:
    """Keys before rotation, values, and where the documents are.

    Attributes:
      tokens: keys and values.
      documents: of each row; lengths of 0 where there are none.
    """

    tokens: DenseCache
    documents: Documents

    @property
    def length(self) -> jax.Array:
        """[b] tokens stored so far."""
        return self.tokens.length

    @property
    def max_length(self) -> int:
        """Tokens it can hold."""
        return self.tokens.max_length

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)


jax.tree_util.register_dataclass(PineCache, data_fields=["tokens", "documents"], meta_fields=[])


class PineAttention(SequenceMixer):
    """Multi-head `pine_attention`; causal rotary attention in calls without documents.

    Its parameters are those of `MultiHeadAttention`: PINE is applied to a trained model.

    A call takes `documents` (`attnjax.masks.multihop.Documents`), where they are; None is none, or
    those that the cache remembers. With a cache, the first call brings prefix and documents at
    once. Documents go without `positions` and `segment_ids`, and a cache without `positions`: both
    have positions of their own.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      rope_base: base of rotary positions. Llama 2: 10000, Llama 3: 500000.
      max_documents: most documents per row that a cache remembers; a decoding step makes one pass
        for each. 0 decodes without documents.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: without `rope_base`, or for max_documents < 0.
    """

    sites = HEAD_SITES
    grouped = masked = rotary = True
    drops = False
    further = ("documents",)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        rope_base: float | None = 10000.0,
        max_documents: int = 8,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        options["rope_base"] = rope_base
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        if rope_base is None:
            raise ValueError("PineAttention: rope_base=None; documents are placed by rotation.")
        if max_documents < 0:
            raise ValueError(f"PineAttention: max_documents must be at least 0: {max_documents}.")
        self.max_documents = max_documents
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> PineCache:
        """An empty cache; see `SequenceMixer.init_cache`."""
        tokens = super().init_cache(batch, max_length, dtype)
        none = Documents.create(0, jnp.zeros((self.max_documents,), jnp.int32), batch)
        return PineCache(tokens, none)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        documents = self._documents(call)
        q, k, v = self.heads(call, self.query(call.x), self.key(call.x), self.value(call.x))
        base = self.rope_base
        assert base is not None
        lengths, before = None, call.cache
        if before is not None:
            tokens = before.tokens.append(k, v, call.valid)
            call.cache = PineCache(tokens, before.documents if documents is None else documents)
            k, v = (a.astype(q.dtype) for a in (tokens.key, tokens.value))
            lengths = tokens.length
        elif call.valid is not None:
            lengths = call.count.astype(jnp.int32)
        mask, kept = call.mask, call.tap.edits.key_mask
        if kept is not None:
            mask = join_masks(key_set(kept), mask, q.shape[1], k.shape[1], call.start)
        if documents is not None:
            return pine_attention(
                q, k, v, documents, rope_base=base, q_offset=call.start, lengths=lengths, mask=mask
            )
        if before is None:
            q, k = self.rotate(call, q, k)
        else:
            inv_freq, _ = rope_frequencies(self.head_dim, base)
            q = apply_rope(q, call.positions, inv_freq)
            k = apply_rope(k, jnp.arange(k.shape[1], dtype=jnp.int32), inv_freq)
        return attention(
            q, k, v, mask=mask, is_causal=True, segment_ids=call.segment_ids, q_offset=call.start
        )

    def _documents(self, call: Call) -> Documents | None:
        """The documents of a call, checked; with a cache those that it is to remember."""
        name, documents = type(self).__name__, call.further["documents"]
        if call.cache is not None:
            if call.placed:
                raise NotImplementedError(
                    f"{name}: positions with a cache are not supported; it counts its tokens "
                    "itself, to rotate its keys anew in every call."
                )
            documents = self._remembered(call.cache, documents)
        if documents is None or documents.lengths.shape[1] == 0:
            return None
        given = {"positions": call.placed, "segment_ids": call.segment_ids is not None}
        for label, there in given.items():
            if there:
                raise NotImplementedError(
                    f"{name}: {label} with documents is not supported; give one prompt per row, "
                    "whose documents have positions of their own."
                )
        self._check_documents(call, documents)
        return documents

    def _remembered(self, cache: PineCache, documents: Documents | None) -> Documents:
        """The documents of a call with a cache, as many as the cache has room for."""
        room = cache.documents.lengths.shape[1]
        if documents is None:
            return cache.documents
        n = documents.lengths.shape[1]
        if n > room:
            raise ValueError(
                f"{type(self).__name__}: {n} documents do not fit a cache made for {room}; set "
                f"max_documents={n} when the module is made."
            )
        return Documents(documents.prefix, jnp.pad(documents.lengths, ((0, 0), (0, room - n))))

    def _check_documents(self, call: Call, documents: Documents) -> None:
        """Documents fit the batch and, where the numbers are known, come in the first call."""
        name, b = type(self).__name__, call.x.shape[0]
        if documents.lengths.shape[0] != b or documents.prefix.shape != (b,):
            raise ValueError(
                f"{name}: documents of {documents.lengths.shape[0]} rows do not fit an input with "
                f"{b}; make them with Documents.create(prefix, lengths, batch={b})."
            )
        if any(
            isinstance(x, Tracer) for x in (call.start, call.count, *jax.tree.leaves(documents))
        ):
            return
        start = jnp.asarray(call.start, jnp.int32)
        end = start + call.count.astype(jnp.int32)
        some = documents.lengths.sum(1) > 0
        cut = some & ((start > 0) & (start < documents.stop) | (end < documents.stop))
        if bool(cut.any()):
            raise ValueError(
                f"{name}: the documents end at {documents.stop.tolist()} tokens, but the call "
                f"brings those from {start.tolist()} to {end.tolist()}; the first "
                "call must bring prefix and documents at once."
            )


def _query_index(b: int, t: int, q_offset: Any) -> Int[Array, "b t"]:
    """Absolute indices of the queries of each row."""
    offset = jnp.asarray(q_offset, jnp.int32).reshape(-1, 1)
    return jnp.broadcast_to(offset + jnp.arange(t, dtype=jnp.int32)[None], (b, t))


def _example() -> tuple[PineAttention, jax.Array]:
    module = PineAttention(4, 16, num_kv_heads=2, max_documents=2, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


def _picture() -> dict[str, Any]:
    """Positions of keys as the first head's queries see them; -1 where they see nothing."""
    documents = Documents.create(3, [4, 2, 5])
    q, k = jax.random.normal(jax.random.key(3), (2, 1, 18, 1, 8))
    index = jnp.arange(18, dtype=jnp.int32)[None]
    ids, base = documents.ids(index)[0], documents.positions(index)[0]
    shift = document_shifts(q, k, documents)[0, :, 0]  # [t, n]
    seen = base[None] - jnp.where(ids[None] < 0, 0, shift[:, jnp.maximum(ids, 0)])
    visible = (Causal() | between_documents(ids[None])).dense(18)[0, 0]
    return {"position of key k for query q": jnp.where(visible, seen, -1).astype(jnp.float32)}


SPEC = Mechanism(
    id="pine",
    title="Eliminating Position Bias of Language Models: A Mechanistic Approach",
    arxiv="2407.01100",
    year=2024,
    code="wzq016/PINE",
    function=pine_attention,
    module=PineAttention,
    causal=True,
    bidirectional=False,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2 + T K) for K documents",
    reduces_to={"no documents": "multi_head_attention", "one document": "multi_head_attention"},
    golden=("pine",),
    picture=_picture,
    example=_example,
)
