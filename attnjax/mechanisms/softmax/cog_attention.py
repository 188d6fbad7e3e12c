"""Cog attention: softmax of the scores' magnitudes, with the scores' signs on the weights.

    s_tj = q_t · k_j / sqrt(d),   w_tj = sign(s_tj) e^|s_tj| / Σ_j' e^|s_tj'|,   o_t = Σ_j w_tj v_j

Magnitudes of a row sum to 1; a weight may be negative, so one head can add what some tokens say and
subtract what others do. The derivative of sign is taken as 0. Cogformer rotates queries and keys by
interleaved pairs and keeps softmax in its first and last layers: as the mixers of a language model,
"softmax, cog_attention*n, softmax".

Reference: Lv et al., "More Expressive Attention with Negative Weights", 2024, arXiv:2411.07176;
official code trestad/CogAttn.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnjax.checks import check_qkv
from attnjax.dense import qk_scores, softmax_weights, weighted_values
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism


def cog_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    *,
    mask: Bool[Array, "#b #h #t #s"] | None = None,
    scale: float | None = None,
) -> Float[Array, "b t h e"]:
    """Attention with signed weights: sign(s) softmax(|s|).

        o_t = Σ_j sign(s_tj) softmax_j(|s_tj|) v_j,   s = scale q · k

    Args:
      query, key, value: shapes as annotated; h a multiple of g.
      mask: True = attend; None attends everywhere. A row without keys gives 0.
      scale: None is d^-0.5.

    Returns:
      Output in the dtype of `query`.

    Memory: O(t s) per head.

    Raises:
      ValueError: on shapes that do not fit together.

    Example: >>> cog_attention(q, k, v, mask=attnjax.masks.Causal().dense(q.shape[1])).shape
    """
    check_qkv("cog_attention", query, key, value)
    weights = cog_weights(qk_scores(query, key, scale), mask)
    return weighted_values(weights, value).astype(query.dtype)


def cog_weights(
    scores: Float[Array, "b h t s"], mask: Bool[Array, "#b #h #t #s"] | None = None
) -> Float[Array, "b h t s"]:
    """Signed weights sign(s) softmax(|s|) of scores; masked ones are 0."""
    weights, _ = softmax_weights(jnp.abs(scores), mask)
    return jnp.sign(scores) * weights


class CogAttention(SequenceMixer):
    """Multi-head `cog_attention` with rotary positions on interleaved pairs.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      **options: of `SequenceMixer`. Paper: rope_base=10000, no biases.
    """

    sites = SCORE_SITES
    directions = ("causal", "bidirectional")
    grouped = masked = rotary = True
    rope_layout = "interleaved"

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

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Rotated keys, and values."""
        return dict.fromkeys(("key", "value"), (self.num_kv_heads, self.head_dim))

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        q, k = self.rotate(call, q, k)
        stored = call.store(key=k, value=v)
        scores = self.edit_scores(call, qk_scores(q, stored["key"]))
        weights = cog_weights(scores, call.keep(stored["key"].shape[1]))
        weights = self.edit_weights(call, weights)
        return weighted_values(weights, stored["value"]).astype(q.dtype)


def _example() -> tuple[CogAttention, jax.Array]:
    module = CogAttention(2, 16, rope_base=1e4, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="cog_attention",
    title="More Expressive Attention with Negative Weights",
    arxiv="2411.07176",
    year=2024,
    code="trestad/CogAttn",
    function=cog_attention,
    module=CogAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="einsum",
    cost="O(T^2)",
    reduces_to={"all scores >= 0": "multi_head_attention"},
    golden=("cog_attention",),
    example=_example,
)
