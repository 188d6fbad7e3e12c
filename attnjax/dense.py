"""Dense softmax attention: the definition, and the path that shows and edits scores and weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tilemath


def dense_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    keep: jax.Array | None,
    bias: jax.Array | None,
    score_mod: Callable[..., jax.Array] | None,
    sinks: jax.Array | None,
    scale: float,
    softcap: float | None,
    normalizer: Callable[[jax.Array, jax.Array | None], jax.Array] | None,
    q_offset: jax.Array,
    dropout_rate: float,
    dropout_seed: jax.Array | None,
    weight_edit: Callable[[jax.Array], jax.Array] | None,
    precision: Any,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Attention by the formula, with t x s scores in memory.

    Args:
      query, key, value: [b, t, h, d], [b, s, g, d], [b, s, g, e].
      keep: booleans [b|1, h|1, t|1, s|1], True = attend.
      bias: [b|1, h|1, t|1, s|1].
      score_mod: `(score [b, h, t, s], b [b,1,1,1], h [1,h,1,1], q [b|1,1,t,1], k [1,1,1,s])`.
      normalizer: `(masked scores, keep) -> weights` instead of softmax.
      q_offset: [1] or [b], absolute index of the first query.
      sinks, scale, softcap, dropout_rate, dropout_seed, weight_edit, precision: as `attention`.

    Returns:
      output [b, t, h, e], lse [b, t, h], and {"scores", "weights"} [b, h, t, s].
    """
    b, t, h, _ = query.shape
    s = value.shape[1]
    dtype = tilemath.accumulator_dtype(query.dtype)
    scores = qk_scores(query, key, scale, precision)
    rows = lax.broadcasted_iota(jnp.int32, (b, 1, 1, 1), 0)
    heads = lax.broadcasted_iota(jnp.int32, (1, h, 1, 1), 1)
    q_index = lax.broadcasted_iota(jnp.int32, (1, 1, t, 1), 2) + q_offset.reshape(-1, 1, 1, 1)
    k_index = lax.broadcasted_iota(jnp.int32, (1, 1, 1, s), 3)
    if bias is not None:
        scores = scores + bias.astype(dtype)
    if softcap is not None:
        cap = jnp.asarray(softcap, dtype)
        scores = cap * jnp.tanh(scores / cap)
    if score_mod is not None:
        scores = score_mod(scores, rows, heads, q_index, k_index).astype(dtype)
    if keep is not None:
        scores = jnp.where(keep, scores, jnp.full_like(scores, -jnp.inf))
    weights, lse = softmax_weights(scores, sinks=sinks)
    if normalizer is not None:
        weights = normalizer(scores, keep)
    if weight_edit is not None:
        weights = weight_edit(weights)
    dropped = weights
    if dropout_rate > 0:
        assert dropout_seed is not None  # checked by the caller
        factors = tilemath.dropout_factors(
            dropout_seed, rows, heads, q_index, k_index, dropout_rate
        )
        dropped = weights * factors.astype(dtype)
    out = weighted_values(dropped, value, precision).astype(query.dtype)
    return out, lse.transpose(0, 2, 1), {"scores": scores, "weights": weights}


def qk_scores(
    query: jax.Array, key: jax.Array, scale: float | None = None, precision: Any = None
) -> jax.Array:
    """All scaled products q · k: [b, h, t, s] in float32 (float64 for float64).

    Args:
      query: [b, t, h, d].
      key: [b, s, g, d]; query head i reads key head i // (h / g).
      scale: None is d^-0.5.
      precision: as in `jax.lax.dot_general`.
    """
    b, t, h, d = query.shape
    s, g = key.shape[1:3]
    dtype = tilemath.accumulator_dtype(query.dtype)
    grouped = query.reshape(b, t, g, h // g, d)
    scores = jnp.einsum(
        "btgrd,bsgd->bgrts", grouped, key, precision=precision, preferred_element_type=dtype
    )
    return scores.reshape(b, h, t, s) * jnp.asarray(d**-0.5 if scale is None else scale, dtype)


def weighted_values(weights: jax.Array, value: jax.Array, precision: Any = None) -> jax.Array:
    """Values summed with weights [b, h, t, s]: [b, t, h, e] of value [b, s, g, e].

    The result has the dtype of the weights.
    """
    b, h, t, s = weights.shape
    g, e = value.shape[2:]
    out = jnp.einsum(
        "bgrts,bsge->btgre",
        weights.reshape(b, g, h // g, t, s),
        value.astype(weights.dtype),
        precision=precision,
        preferred_element_type=weights.dtype,
    )
    return out.reshape(b, t, h, e)


def softmax_weights(
    scores: jax.Array, keep: jax.Array | None = None, sinks: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Softmax over the last axis that allows rows without keys, which give 0 and -inf.

    Args:
      scores: [b, h, t, s], float32 or wider.
      keep: booleans of the rank of `scores`, True = attend.
      sinks: [h] logits of an extra key without value.

    Returns:
      Weights [b, h, t, s] and their natural log-sum-exp [b, h, t].
    """
    if keep is not None:
        scores = jnp.where(keep, scores, jnp.full_like(scores, -jnp.inf))
    dtype = scores.dtype
    top = scores.max(-1, keepdims=True, initial=-jnp.inf)
    if sinks is not None:
        logit = sinks.astype(dtype).reshape(1, -1, 1, 1)
        top = jnp.maximum(top, logit)
    top = lax.stop_gradient(top)
    top = jnp.where(jnp.isneginf(top), jnp.zeros_like(top), top)
    p = jnp.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(logit - top)
    empty = total == 0
    safe = jnp.where(empty, jnp.ones_like(total), total)
    lse = jnp.where(empty, jnp.full_like(total, -jnp.inf), top + jnp.log(safe))
    return p / safe, lse[..., 0]
