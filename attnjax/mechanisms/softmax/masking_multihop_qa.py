"""Prefix masks for multi-hop questions: the prompt's documents see each other in both directions.

    token q sees key k  iff  k <= q  or  k < n,      n tokens of context

A causal decoder reads the facts of a multi-hop question in one order only. With this mask the first
n tokens (at inference the whole prompt, in fine-tuning the context) attend in both directions, and
what is generated stays causal; nothing else of the model changes. Fine-tuning with it is what helps
in the paper. Its tools are here too: orders of the documents that hold the facts, and the choice of
the order at which the answer's first token attends most to a single document.

Reference: Huang et al., "Masking in Multi-hop QA: An Analysis of How Language Models Perform with
Context Permutation", 2025, arXiv:2505.11754; official code hwy9855/MultiHopQA-Reasoning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from attnjax.attention import attention
from attnjax.masks import Causal, Mask
from attnjax.masks.multihop import prefix_lm
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism


def prefix_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    *,
    prefix: int | Int[Array, " b"],
    **options: Any,
) -> Any:
    """Causal softmax attention whose first tokens see each other in both directions.

        o_q = Σ_k softmax_k(q · k / sqrt(d)) v_k   over  k <= q or k < prefix

    Args:
      query, key, value: shapes as annotated; h a multiple of g.
      prefix: n in tokens, for all rows or by row; 0 is causal attention.
      **options: of `attnjax.attention`.

    Returns:
      As `attnjax.attention`: the output in the dtype of `query`.

    Memory: O(t + s), block-sparse.
    Reference: arXiv:2505.11754.
    """
    return attention(query, key, value, mask=prefix_lm(prefix), **options)


def arrange_documents(
    gold: Sequence[int],
    others: Sequence[int],
    *,
    order: str = "forward",
    distance: int = 0,
    first: int = 0,
) -> list[int]:
    """An order of documents that places those with the facts.

    Args:
      gold: the documents with the facts, in the order of the reasoning.
      others: documents without facts, which fill the places between and around them.
      order: "forward", as reasoned, or "backward".
      distance: other documents between two neighboring ones with facts; 0 puts them side by side.
      first: other documents before the first one with facts.

    Returns:
      All documents in order.

    Raises:
      ValueError: for an unknown order, or where there are too few other documents.
    """
    if order not in ("forward", "backward"):
        raise ValueError(f"arrange_documents: order={order!r} is none of 'forward', 'backward'.")
    if distance < 0 or first < 0:
        raise ValueError(
            f"arrange_documents: distance={distance} and first={first} must be at least 0."
        )
    need = first + distance * max(len(gold) - 1, 0)
    if need > len(others):
        raise ValueError(
            f"arrange_documents: first={first} and distance={distance} between {len(gold)} "
            f"documents need {need} others, got {len(others)}; add others or lower distance."
        )
    rest = list(others)
    placed, rest = rest[:first], rest[first:]
    for i, document in enumerate(gold if order == "forward" else reversed(gold)):
        if i:
            placed, rest = placed + rest[:distance], rest[distance:]
        placed.append(document)
    return placed + rest


def peak_document_attention(
    weights: Float[Array, "*n s"], document_ids: Int[Array, " s"], num_documents: int
) -> Float[Array, ""]:
    """How much one token attends to the document that it attends to most.

        peak = max_D  mean over heads and layers of  Σ_{k in D} w_k

    Args:
      weights: attention weights of the answer's first token; leading axes (layers, heads) are
        averaged.
      document_ids: document of each key, from 0; negative is in none.
      num_documents: how many documents there are.

    Returns:
      A number between 0 and 1. The paper takes the answer of the order with the highest one, as in
      `answers[jnp.argmax(peaks)]`.
    """
    one_hot = jax.nn.one_hot(document_ids, num_documents, dtype=weights.dtype)
    return (weights.reshape(-1, weights.shape[-1]) @ one_hot).mean(0).max()


class PromptAttention(SequenceMixer):
    """Rotary softmax attention that is causal but for what a layout adds inside a prompt.

    A subclass writes `mix`: it calls `see` with its layout, and names in `further` what that needs.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      **options: of `SequenceMixer`.
    """

    sites = SCORE_SITES
    grouped = masked = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)

    def see(self, call: Call, layout: Mask | None) -> jax.Array:
        """Z [b, t, h, d] over the keys of a layout that takes the place of causality.

        Args:
          call: the call; `call.positions` are those of the rotation.
          layout: which keys each query sees, or None for causal attention.
        """
        q, k, v = self.heads(call, self.query(call.x), self.key(call.x), self.value(call.x))
        q, k = self.rotate(call, q, k)
        if layout is None:
            return self.attend(call, q, k, v)[0]
        name = type(self).__name__
        if call.segment_ids is not None:
            raise NotImplementedError(
                f"{name}: segment_ids with a prompt layout are not supported; give one prompt per "
                "row."
            )
        # the call hides slots that are not written yet, and padding, where causality does not
        inner = dataclasses.replace(call, causal=False)
        z, _ = self.attend(inner, q, k, v, layout=layout)
        call.cache = inner.cache
        return z

    def in_one_piece(self, call: Call, what: str, first: Any, stop: Any) -> None:
        """Checks, where the numbers are known, that a call brings all or none of a span.

        Args:
          call: the call.
          what: name of the span for the message.
          first, stop: integers or [b], the span's ends as indices of tokens.

        Raises:
          ValueError: when the span is cut by the call's ends.
        """
        numbers = (call.start, call.count, first, stop)
        if any(isinstance(x, Tracer) for x in numbers):
            return
        start, count, first, stop = (jnp.asarray(x, jnp.int32) for x in numbers)
        end = start + count
        touched = (first < end) & (stop > start) & (stop > first)
        if bool((touched & ((first < start) | (stop > end))).any()):
            raise ValueError(
                f"{type(self).__name__}: {what} must come in one call, since its tokens see later "
                f"ones: it spans the tokens {first.tolist()} to {stop.tolist()}, the call those "
                f"from {start.tolist()} to {end.tolist()}."
            )


class PrefixAttention(PromptAttention):
    """Multi-head `prefix_attention`: a decoder whose context is read in both directions.

    A call takes `prefix_lengths` [b], how many tokens are seen in both directions; None is the
    module's `prefix`. With a cache, the whole prefix comes in one call, and later calls need not
    name it.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      prefix: tokens at the start of every row that see each other in both directions, for calls
        that do not say; 0 is causal attention. Paper, fine-tuning: the context.
      bidirectional_prompt: whether a call with an empty cache takes all its tokens for such a
        prefix. Paper, inference: True.
      **options: of `SequenceMixer`.
    """

    further = ("prefix_lengths",)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        prefix: int = 0,
        bidirectional_prompt: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        if prefix < 0:
            raise ValueError(f"PrefixAttention: prefix must be at least 0 tokens, got {prefix}.")
        self.prefix, self.bidirectional_prompt = prefix, bidirectional_prompt

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        return self.see(call, self._layout(call, call.further["prefix_lengths"]))

    def _layout(self, call: Call, lengths: Any) -> Mask | None:
        """The mask of the call, None where it is causal."""
        if lengths is None and self.bidirectional_prompt and call.cache is not None:
            lengths = jnp.where(
                jnp.asarray(call.start) == 0, call.count, jnp.zeros_like(call.count)
            )
        elif lengths is None:
            if not self.prefix:
                return None
            lengths = jnp.full((call.x.shape[0],), self.prefix, jnp.int32)
        elif lengths.shape != call.x.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}: prefix_lengths must have shape [batch] = "
                f"{call.x.shape[:1]}, got {lengths.shape}."
            )
        if call.cache is not None:
            self.in_one_piece(call, "the prefix", jnp.zeros_like(lengths), lengths)
            if call.x.shape[1] == 1:
                return None  # one new token sees the same with and without a prefix
        return prefix_lm(lengths)


def _example() -> tuple[PrefixAttention, jax.Array]:
    module = PrefixAttention(2, 16, rope_base=1e4, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


def _picture() -> dict[str, Any]:
    masks = {"causal": Causal(), "prefix of 9 tokens": prefix_lm(9)}
    return {title: mask.dense(16)[0, 0].astype(jnp.float32) for title, mask in masks.items()}


SPEC = Mechanism(
    id="masking_multihop_qa",
    title="Masking in Multi-hop QA: An Analysis of How Language Models Perform with Context "
    "Permutation",
    arxiv="2505.11754",
    year=2025,
    code="hwy9855/MultiHopQA-Reasoning",
    function=prefix_attention,
    module=PrefixAttention,
    causal=True,
    bidirectional=False,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2)",
    reduces_to={"prefix=0": "multi_head_attention"},
    reading="How the attention of heads and layers is joined into a document's peak: their mean, "
    "summed over the document's tokens.",
    picture=_picture,
    example=_example,
)
