"""TAPA: a content product times the cosine of a content-dependent phase that grows with distance.

    s_mn = q_A · k_A / sqrt(θ d)  ·  cos( 2π |m - n|^α  q_P · k_P / sqrt((1 - θ) d) )

Every head vector is split into an amplitude (the first θ d channels) and a phase (the rest). There
is no rotation, no table and no parameter beside the projections, so nothing changes for longer
contexts. |0|^α is 0: a token's score with itself is the plain product.

Reference: "Positional Encoding via Token-Aware Phase Attention", 2025, arXiv:2509.12635. No
official code was found; written from the paper's equations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.checks import check_qkv
from attnjax.dense import qk_scores, softmax_weights, weighted_values
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism

Phase = Callable[[jax.Array, jax.Array], jax.Array]


def tapa_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    *,
    positions: Int[Array, "#b t"] | None = None,
    key_positions: Int[Array, "#b s"] | None = None,
    mask: Bool[Array, "#b #h #t #s"] | None = None,
    theta: float = 0.5,
    alpha: float = 0.1,
    phase: Phase | None = None,
) -> Float[Array, "b t h e"]:
    """Token-aware phase attention.

        s_mn = q_A · k_A / sqrt(θ d) cos(2π |m - n|^α φ(q_P, k_P)),   o = softmax(s) v

    Args:
      query, key, value: shapes as annotated; h a multiple of g.
      positions, key_positions: in tokens; None counts from 0.
      mask: True = attend; None attends everywhere. A row without keys gives 0.
      theta: θ, share of the channels that are amplitude, in (0, 1]; 1 leaves no phase. Paper: 0.5.
      alpha: α, growth of the phase with distance, at least 0. Paper: 0.1.
      phase: φ, a function of query and key phases [b, t, h, p], [b, s, g, p] giving [b, h, t, s];
        None is the paper's scaled product.

    Returns:
      Output in the dtype of `query`; phases and softmax are float32 or wider.

    Memory: O(t s) per head.

    Raises:
      ValueError: on shapes that do not fit together, or theta or alpha out of range.

    Example: >>> tapa_attention(q, k, v, mask=attnjax.masks.Causal().dense(q.shape[1])).shape
    """
    check_qkv("tapa_attention", query, key, value)

    def counted(given: Any, x: jax.Array) -> jax.Array:
        return jnp.arange(x.shape[1], dtype=jnp.int32)[None] if given is None else given

    distance = counted(positions, query)[:, :, None] - counted(key_positions, key)[:, None]
    scores = tapa_scores(query, key, distance, theta=theta, alpha=alpha, phase=phase)
    return weighted_values(softmax_weights(scores, mask)[0], value).astype(query.dtype)


def tapa_scores(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    distance: Int[Array, "#b t s"],
    *,
    theta: float = 0.5,
    alpha: float = 0.1,
    phase: Phase | None = None,
) -> Float[Array, "b h t s"]:
    """Scores of queries and keys `distance` tokens apart, of either sign."""
    if alpha < 0:
        raise ValueError(f"tapa: alpha={alpha} must be at least 0.")
    split = amplitude_width(query.shape[-1], theta)
    scores = qk_scores(query[..., :split], key[..., :split])
    if split == query.shape[-1]:
        return scores
    angle = (phase or qk_scores)(query[..., split:], key[..., split:]).astype(scores.dtype)
    away = jnp.abs(distance)
    # the inner where keeps 0^α (1 at α = 0) out
    growth = jnp.maximum(away, 1).astype(scores.dtype) ** jnp.asarray(alpha, scores.dtype)
    growth = jnp.where(away == 0, jnp.zeros_like(growth), growth)[:, None]
    return scores * jnp.cos(jnp.asarray(2 * math.pi, scores.dtype) * growth * angle)


def amplitude_width(width: int, theta: float) -> int:
    """Channels of the amplitude: θ d, rounded.

    Raises:
      ValueError: when no channel is left, or theta is above 1.
    """
    split = round(theta * width)
    if not 1 <= split <= width:
        raise ValueError(
            f"tapa: theta={theta} of a head width of {width} leaves {split} amplitude channels; "
            f"theta must be in [{1 / width}, 1]."
        )
    return split


class TAPA(SequenceMixer):
    """Multi-head `tapa_attention`.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      theta, alpha: as in `tapa_attention`.
      rngs: stream `params`.
      **options: of `SequenceMixer`.
    """

    sites = SCORE_SITES
    directions = ("causal", "bidirectional")
    grouped = masked = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        theta: float = 0.5,
        alpha: float = 0.1,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        amplitude_width(self.head_dim, theta)
        if alpha < 0:
            raise ValueError(f"TAPA: alpha={alpha} must be at least 0.")
        self.theta, self.alpha = theta, alpha
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys, values and positions."""
        shared = dict.fromkeys(("key", "value"), (self.num_kv_heads, self.head_dim))
        return shared | {"position": ()}

    def token_dtypes(self, dtype: Any) -> dict[str, Any]:
        """Positions are integers, whatever the dtype."""
        return {"position": jnp.int32}

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        positions = call.positions.astype(jnp.int32)
        stored = call.store(key=k, value=v, position=positions)
        distance = positions[:, :, None] - stored["position"][:, None]
        scores = tapa_scores(q, stored["key"], distance, theta=self.theta, alpha=self.alpha)
        scores = self.edit_scores(call, scores)
        weights = softmax_weights(scores, call.keep(stored["key"].shape[1]))[0]
        return weighted_values(self.edit_weights(call, weights), stored["value"]).astype(q.dtype)


def _example() -> tuple[TAPA, jax.Array]:
    module = TAPA(2, 16, num_kv_heads=1, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 11, 16))


def _picture() -> dict[str, Any]:
    """The cosine alone, of one phase product, for two values of α."""
    t = 32
    one = jnp.ones((1, t, 1, 2))
    distance = (jnp.arange(t)[:, None] - jnp.arange(t)[None])[None]

    def cosine(alpha: float) -> jax.Array:
        scores = tapa_scores(one, one, distance, alpha=alpha, phase=lambda q, k: _constant(t))
        return scores[0, 0]

    return {"score, α = 0.1 (paper)": cosine(0.1), "score, α = 0.5": cosine(0.5)}


def _constant(t: int) -> jax.Array:
    return jnp.full((1, 1, t, t), 0.15)


SPEC = Mechanism(
    id="tapa",
    title="Positional Encoding via Token-Aware Phase Attention",
    arxiv="2509.12635",
    year=2025,
    function=tapa_attention,
    module=TAPA,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="einsum",
    cost="O(T^2)",
    reduces_to={"theta = 1": "multi_head_attention"},
    golden=("tapa",),
    reading="No official code was found; the equations are the paper's, with quadratic phase.",
    picture=_picture,
    example=_example,
)
