"""Modular duplex attention (MODA): every pair of modalities has a softmax of its own.

    o_t = Σ_c a_c(t) Σ_{j: modality c} softmax_{j: modality c}(q_t · k_j / sqrt(d)) v_j
    a_c(t) = softmax_c(mix[modality of t, c])       over the modalities that t sees at all

In one joint softmax the many tokens of one modality, or the large scores of text, starve the other.
Here text and vision each get their share, and each pair of modalities its own mask: causal, full or
none. Keys and values that cross from one modality to another are aligned first, by the Gram matrix
of the tokens of the modality that looks at them:

    x_j  ->  x_j G_a,     G_a = (1/N_a) Σ_{i: modality a} x̂_i x̂_iᵀ,    x̂ = x / |x|

A causal module takes the tokens up to j for G_a (linear attention of x to x̂), and leaves x_j as it
is where there is none of modality a yet.

Reference: Zhang et al., "MODA: MOdular Duplex Attention for Multimodal Perception, Cognition, and
Emotion Understanding", 2025, arXiv:2507.04635. This is a reading of its abstract, without official
code: alignment by basis vectors of the modality spaces (normalized Gram matrices), and masks and
scores that are corrected by modality.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from attnjax.attention import attention
from attnjax.cache import TokenCache
from attnjax.cache.base import cache_bytes, new_positions
from attnjax.cache.linear_state import state_dtype
from attnjax.checks import check_segments
from attnjax.dense import softmax_weights
from attnjax.masks import Causal, Full, Lengths, Mask, Segments
from attnjax.masks.keys import key_set
from attnjax.masks.multihop import join_masks
from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.merge import merge_attention
from attnjax.mixer import HEAD_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism

Patterns = Sequence[Sequence[str]]

PATTERNS: Patterns = (("causal", "causal"), ("causal", "full"))
"""Text (0) is causal; vision (1) sees itself in both directions and is causal towards text."""


def modular_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s *a g d"],
    value: Float[Array, "b s *a g e"],
    modality_ids: Int[Array, "b s"],
    *,
    mix: Float[Array, "h n n"] | None = None,
    mode: str = "modular",
    patterns: Patterns = PATTERNS,
    q_offset: int | Int[Array, " b"] = 0,
    lengths: Int[Array, " b"] | None = None,
    mask: Any = None,
    **options: Any,
) -> Float[Array, "b t h e"]:
    """Attention with one softmax for each modality of keys.

    Args:
      query: [b, t, h, d].
      key, value: [b, s, g, d] and [b, s, g, e]; or [b, s, n, g, d], with an axis over the modality
        of the query that looks at them. h is a multiple of g.
      modality_ids: modality of every key, 0 .. n-1; queries are the tokens from `q_offset` on.
      mix: logits [h, query's modality, key's modality] of the shares; None is equal shares.
      mode: "modular", or "joint" for one softmax over all modalities.
      patterns: [n][n] words: how queries of a modality (row) see keys of another (column):
        "causal", "full" (later ones too) or "none".
      q_offset: index of the first query, an integer or [b].
      lengths: [b] real keys of each row; None is all.
      mask: a further mask, of `attnjax.masks` or booleans.
      **options: of `attnjax.attention`.

    Returns:
      Output in the dtype of `query`; 0 for a query that sees nothing.

    Memory: O(t + s) for each modality, block-sparse.
    Cost: n passes of attention over the tiles that their masks leave; n² with aligned keys.

    Raises:
      ValueError: on an unknown mode or word, or shapes that do not fit together.

    Reference: arXiv:2507.04635, our reading.
    """
    n = _check_patterns("modular_attention", patterns)
    if mode not in ("modular", "joint"):
        raise ValueError(f"modular_attention: mode={mode!r} is none of 'modular', 'joint'.")
    if key.ndim == 5 and key.shape[2] != n:
        raise ValueError(
            f"modular_attention: key {key.shape} has {key.shape[2]} modalities, patterns have {n}."
        )
    b, t = query.shape[:2]
    s = key.shape[1]
    parts = []
    for c in range(n):
        found = []
        for a in range(n) if key.ndim == 5 else (None,):
            layout = _layout(modality_ids, patterns, a, c)
            if lengths is not None:
                layout = layout & Lengths(lengths)
            k, v = (key, value) if a is None else (key[:, :, a], value[:, :, a])
            visible = join_masks(layout, mask, t, s, q_offset)
            found.append(
                attention(
                    query, k, v, mask=visible, q_offset=q_offset, return_residual=True, **options
                )
            )
        # queries of other modalities saw nothing, so merging only picks the right one
        parts.append(found[0] if len(found) == 1 else merge_attention(found))
    if mode == "joint":
        return merge_attention(parts)[0]
    z = jnp.stack([z for z, _ in parts], -2)  # [b, t, h, n, e]
    seen = jnp.stack([lse for _, lse in parts], -1) > -jnp.inf  # [b, t, h, n]
    dtype = parts[0][1].dtype
    logits = jnp.zeros(seen.shape, dtype)
    if mix is not None:
        first = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (b,))
        own = jnp.take_along_axis(modality_ids, jnp.minimum(new_positions(first, t), s - 1), 1)
        logits = mix.astype(dtype).swapaxes(0, 1)[own]
    share, _ = softmax_weights(logits, seen)
    return (share[..., None] * z.astype(dtype)).sum(-2).astype(query.dtype)


def gram_align(
    x: Float[Array, "b t m"],
    modality_ids: Int[Array, "b t"],
    num_modalities: int,
    *,
    causal: bool = True,
    normalization: str = "l2",
    state: tuple[jax.Array, jax.Array] | None = None,
    valid: Bool[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t n m"], tuple[jax.Array, jax.Array]]:
    """Tokens mapped into the space of every modality by that modality's Gram matrix.

        x_ja = x_j G_a for tokens of other modalities, x_jj = x_j for their own

    Args:
      x: tokens.
      modality_ids: of the tokens, 0 .. n-1.
      num_modalities: n.
      causal: G_a of the tokens up to j, instead of all.
      normalization: "l2", G_a = mean of x̂ x̂ᵀ; or "softmax", the rows of X_aᵀ X_a / N_a through a
        softmax, which needs causal=False.
      state: what the last call returned, to go on from there; None starts anew.
      valid: True for real tokens; None is all.

    Returns:
      [b, t, n, m] in the dtype of x, and the state: sums [b, n, m, m] and counts [b, n].

    Cost: O(T m²) for each modality.

    Raises:
      ValueError: for an unknown normalization.
      NotImplementedError: for normalization="softmax" with causal=True.
    """
    if normalization not in ("l2", "softmax"):
        raise ValueError(f"gram_align: normalization={normalization!r} is none of 'l2', 'softmax'.")
    if normalization == "softmax" and causal:
        raise NotImplementedError(
            "gram_align: normalization='softmax' needs all tokens; use causal=False or 'l2'."
        )
    b, t, m = x.shape
    n, dtype = num_modalities, state_dtype(x.dtype)
    wide = x.astype(dtype)
    member = jax.nn.one_hot(modality_ids, n, dtype=dtype)  # [b, t, n]
    if valid is not None:
        member = member * valid[..., None].astype(dtype)
    if state is None:
        state = jnp.zeros((b, n, m, m), dtype), jnp.zeros((b, n), dtype)
    unit = wide
    if normalization == "l2":
        unit = wide * jax.lax.rsqrt((wide * wide).sum(-1, keepdims=True) + 1e-12)
    basis = unit[:, :, None] * member[..., None]  # [b, t, n, m]
    if causal:
        # modalities are heads: x_j Σ_i x̂_i x̂_iᵀ is linear attention of x to x̂
        queries = jnp.broadcast_to(wide[:, :, None], basis.shape)
        mapped, sums = linear_attention(
            queries, basis, basis, scale=1.0, initial_state=state[0].astype(dtype),
            return_state=True,
        )  # fmt: skip
        count = state[1].astype(dtype)[:, None] + jnp.cumsum(member, 1)  # [b, t, n]
        total = state[1].astype(dtype) + member.sum(1)
        mapped = mapped.astype(dtype) / jnp.maximum(count, 1)[..., None]
    else:
        sums = state[0].astype(dtype) + jnp.einsum("btnm,btnr->bnmr", basis, basis)
        total = state[1].astype(dtype) + member.sum(1)
        gram = sums / jnp.maximum(total, 1)[..., None, None]
        if normalization == "softmax":
            gram = jax.nn.softmax(gram, axis=-1)
        mapped = jnp.einsum("btm,bnmr->btnr", wide, gram)
        count = jnp.broadcast_to(total[:, None], (b, t, n))
    own = jax.nn.one_hot(modality_ids, n, dtype=jnp.bool_)
    keep = (own | (count == 0))[..., None]
    aligned = jnp.where(keep, jnp.broadcast_to(wide[:, :, None], mapped.shape), mapped)
    return aligned.astype(x.dtype), (sums.astype(dtype), total)


@dataclasses.dataclass(frozen=True)
class ModaCache:
    """Keys, values and modalities of all tokens, and the running Gram matrices.

    Attributes:
      tokens: names "key", "value" and "modality".
      gram: sums [b, n, m, m] of a module that aligns, else [b, n, 0, 0].
      count: [b, n] tokens of each modality.
    """

    tokens: TokenCache
    gram: jax.Array
    count: jax.Array

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


jax.tree_util.register_dataclass(ModaCache, data_fields=["tokens", "gram", "count"], meta_fields=[])


class ModularDuplexAttention(SequenceMixer):
    """Multi-head `modular_attention` with `gram_align` on what crosses between modalities.

    Without modality ids all tokens are of modality 0: causal rotary attention (with the default
    patterns).

    A call takes `modality_ids` [b, t] of its tokens, integers 0 .. n-1; None is 0, text. They go
    without `segment_ids`.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      mode: "modular", or "joint" for one softmax over all modalities.
      align: "l2" (causal), "softmax" (with causal=False) or "none", see `gram_align`.
      patterns: [n][n] words "causal", "full", "none", see `modular_attention`; None is text and
        vision, `PATTERNS`, when causal, and all full otherwise. With a cache, tokens that see
        later ones come in one call with them.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: for an unknown mode, alignment or word, or (causal=False) words that differ.
    """

    sites = HEAD_SITES
    directions = ("causal", "bidirectional")
    grouped = masked = rotary = True
    drops = False
    further = ("modality_ids",)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        mode: str = "modular",
        align: str = "l2",
        patterns: Patterns | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        name = type(self).__name__
        for label, word, known in (
            ("mode", mode, ("modular", "joint")),
            ("align", align, ("l2", "softmax", "none")),
        ):
            if word not in known:
                raise ValueError(f"{name}: {label}={word!r} is none of {', '.join(known)}.")
        if align == "softmax" and self.causal:
            raise NotImplementedError(
                f"{name}: align='softmax' needs all tokens; use align='l2' or causal=False."
            )
        if patterns is None:
            patterns = PATTERNS if self.causal else (("full", "full"), ("full", "full"))
        n = _check_patterns(name, patterns)
        self.mode, self.align = mode, align
        self.patterns = tuple(tuple(row) for row in patterns)
        if not self.causal and any("causal" in row for row in self.patterns):
            raise ValueError(f"{name}: causal=False takes the words 'full' and 'none' only.")
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)
        self.mix_logits = self.parameter(jnp.zeros((num_heads, n, n)), ("heads", None, None))

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> ModaCache:
        """An empty cache; see `SequenceMixer.init_cache`."""
        self._require_decoding()
        dtype = (self.dtype or self.param_dtype) if dtype is None else dtype
        n = len(self.patterns)
        shape = (self.num_kv_heads, self.head_dim)
        shape = shape if self.align == "none" else (n, *shape)
        shapes = {"key": shape, "value": shape, "modality": ()}
        kinds = {"key": dtype, "value": dtype, "modality": jnp.int32}
        tokens = TokenCache.create(batch, max_length, shapes, kinds)
        width = 0 if self.align == "none" else self.in_features
        wide = state_dtype(jnp.dtype(dtype))
        gram = jnp.zeros((batch, n, width, width), wide)
        return ModaCache(tokens, gram, jnp.zeros((batch, n), wide))

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x, cache, modality_ids = call.x, call.cache, call.further["modality_ids"]
        name, n = type(self).__name__, len(self.patterns)
        if modality_ids is not None:
            check_segments(name, modality_ids, x.shape[0], x.shape[1], "modality_ids")
            if not isinstance(modality_ids, Tracer):
                low, high = int(modality_ids.min()), int(modality_ids.max())
                if low < 0 or high >= n:
                    raise ValueError(
                        f"{name}: modality_ids must be in 0 .. {n - 1}, as many as patterns has "
                        f"rows, got {low} .. {high}."
                    )
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        alone = modality_ids is None and cache is None
        if alone and self.patterns[0][0] == ("causal" if self.causal else "full"):
            q, k = self.rotate(call, q, k)
            return self.attend(call, q, k, v)[0]
        if call.segment_ids is not None:
            raise NotImplementedError(
                f"{name}: segment_ids with modality_ids, or with patterns[0][0]="
                f"{self.patterns[0][0]!r} and causal={self.causal}, are not supported; give one "
                "document per row."
            )
        ids = jnp.zeros(x.shape[:2], jnp.int32) if modality_ids is None else modality_ids
        ids = ids.astype(jnp.int32)
        state = None
        if self.align != "none":
            aligned, state = gram_align(
                x, ids, n, causal=self.causal, normalization=self.align, valid=call.valid,
                state=None if cache is None else (cache.gram, cache.count),
            )  # fmt: skip
            own = jax.nn.one_hot(ids, n, dtype=jnp.bool_)[..., None, None]
            # edits of keys and values of the token itself hold for its own modality
            k = jnp.where(own, k[:, :, None], self.key(aligned).astype(k.dtype))
            v = jnp.where(own, v[:, :, None], self.value(aligned).astype(v.dtype))
        flat = k.reshape(*k.shape[:2], -1, k.shape[-1])
        q, flat = self.rotate(call, q, flat)
        k, lengths = flat.reshape(k.shape), None
        if cache is not None:
            tokens = cache.tokens.append(dict(key=k, value=v, modality=ids), call.valid)
            k, v = (tokens.tokens[name].astype(q.dtype) for name in ("key", "value"))
            ids, lengths = tokens.tokens["modality"], tokens.length
            gram, count = (cache.gram, cache.count) if state is None else state
            call.cache = ModaCache(
                tokens, gram.astype(cache.gram.dtype), count.astype(cache.count.dtype)
            )
        elif call.valid is not None:
            lengths = call.count.astype(jnp.int32)
        mask, kept = call.mask, call.tap.edits.key_mask
        if kept is not None:
            mask = join_masks(key_set(kept), mask, q.shape[1], k.shape[1], call.start)
        return modular_attention(
            q, k, v, ids, mix=self.mix_logits[...], mode=self.mode, patterns=self.patterns,
            q_offset=call.start, lengths=lengths, mask=mask,
        )  # fmt: skip


def _layout(ids: jax.Array, patterns: Patterns, a: int | None, c: int) -> Mask:
    """Which keys of modality c the queries of modality a see; a None is all queries."""

    def only(modality: int) -> jax.Array:
        return jnp.where(ids == modality, jnp.zeros_like(ids), jnp.full_like(ids, -1))

    if a is not None:
        word = patterns[a][c]
        pair = Segments(only(a), only(c))
        return ~Full() if word == "none" else (pair & Causal() if word == "causal" else pair)
    layout: Mask = Causal()
    for row, words in enumerate(patterns):
        pair = Segments(only(row), only(c))
        if words[c] == "full":
            layout = layout | pair
        elif words[c] == "none":
            layout = layout & ~pair
    return layout & key_set(ids == c)


def _check_patterns(name: str, patterns: Patterns) -> int:
    """The number of modalities."""
    n = len(patterns)
    if n == 0 or any(len(row) != n for row in patterns):
        raise ValueError(f"{name}: patterns must have n rows of n words, got {patterns}.")
    for row in patterns:
        for word in row:
            if word not in ("causal", "full", "none"):
                raise ValueError(f"{name}: pattern {word!r} is none of 'causal', 'full', 'none'.")
    return n


def _example() -> tuple[ModularDuplexAttention, jax.Array]:
    module = ModularDuplexAttention(2, 16, rope_base=1e4, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


def _picture() -> dict[str, Any]:
    """Which keys the tokens of 3 text, 8 vision and 5 text tokens see, and with what share."""
    ids = jnp.array([[0] * 3 + [1] * 8 + [0] * 5])
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 16, 1, 8))
    value = jnp.eye(16)[None, :, None]
    return {
        mode: modular_attention(q, k, value, ids, mode=mode)[0, :, 0]
        for mode in ("modular", "joint")
    }


SPEC = Mechanism(
    id="moda",
    title="MODA: MOdular Duplex Attention for Multimodal Perception, Cognition, and Emotion "
    "Understanding",
    arxiv="2507.04635",
    year=2025,
    function=modular_attention,
    module=ModularDuplexAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2)",
    reduces_to={
        "one modality": "multi_head_attention",
        'mode="joint", align="none"': "multi_head_attention",
    },
    reading="All of it: the abstract names alignment by basis vectors and masks by modality, the "
    "equations are this library's.",
    picture=_picture,
    example=_example,
)
