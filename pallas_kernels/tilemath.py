"""The mathematics of one attention tile, shared by every body: scores, softmax update, gradients.

Shapes for m queries and n keys: q [m, d] (already scaled where the body does so), k [n, d],
v [n, e], scores [m, n]. Statistics and accumulators are float32, or float64 for float64 inputs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def accumulator_dtype(dtype: Any) -> Any:
    """float64 for float64 inputs, float32 for everything else."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], precision: Any = None) -> jax.Array:
    """Matrix product over axis contract[0] of `a` and contract[1] of `b`, accumulated wide.

    `a` and `b` may differ in type, as probabilities (float32) and values (bfloat16) do.
    """
    dtype = a.dtype if a.dtype == b.dtype else accumulator_dtype(a.dtype)
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=accumulator_dtype(dtype),
    )


def softcap(scores: jax.Array, cap: float) -> jax.Array:
    """Soft limit of scores: c tanh(s / c)."""
    c = jnp.asarray(cap, scores.dtype)
    return c * jnp.tanh(scores / c)


def softcap_slope(scores: jax.Array, cap: float) -> jax.Array:
    """Derivative of `softcap`: 1 - tanh(s / c)^2."""
    t = jnp.tanh(scores / jnp.asarray(cap, scores.dtype))
    return 1 - t * t


def softmax_init(
    rows: int, width: int, dtype: Any, sink: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Start of the online softmax: (m, l, acc) before any key.

    A sink is one more key with the given logit and a value of zero: m = sink, l = 1.
    """
    if sink is None:
        m = jnp.full((rows, 1), -jnp.inf, dtype)
        return m, jnp.zeros_like(m), jnp.zeros((rows, width), dtype)
    m = jnp.broadcast_to(sink.astype(dtype), (rows, 1))
    return m, jnp.ones_like(m), jnp.zeros((rows, width), dtype)


def softmax_update(
    carry: tuple[jax.Array, jax.Array, jax.Array],
    scores: jax.Array,
    v: jax.Array,
    keep: jax.Array | None,
    precision: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds one tile: m' = max(m, s), l' = l e^{m-m'} + Σ p, acc' = acc e^{m-m'} + p v.

    Args:
      carry: (m, l, acc), [m, 1], [m, 1], [m, e].
      scores: [m, n] with -inf where a key is hidden.
      v: [n, e].
      keep: dropout factors [m, n] for p in the product with v, or None.
      precision: of the product.
    """
    m, total, acc = carry
    m_new = jnp.maximum(m, scores.max(-1, keepdims=True))
    # rows that have seen no key yet: subtract 0, so that exp(-inf) = 0 instead of exp(nan)
    shift = jnp.where(m_new == -jnp.inf, jnp.zeros_like(m_new), m_new)
    p = jnp.exp(scores - shift)
    alpha = jnp.exp(m - shift)
    weights = p if keep is None else p * keep
    return (
        m_new,
        total * alpha + p.sum(-1, keepdims=True),
        acc * alpha + dot(weights, v, (1, 0), precision),
    )


def softmax_finish(
    carry: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """(output [m, e], lse [m, 1]); rows without any key give 0 and -inf."""
    m, total, acc = carry
    empty = total == 0
    safe = jnp.where(empty, jnp.ones_like(total), total)
    lse = jnp.where(empty, jnp.full_like(m, -jnp.inf), m + jnp.log(safe))
    return acc / safe, lse


def probabilities(scores: jax.Array, lse: jax.Array) -> jax.Array:
    """exp(s - lse), lse broadcast along the keys; rows without any key give 0."""
    return jnp.exp(scores - jnp.where(lse == -jnp.inf, jnp.full_like(lse, jnp.inf), lse))


def dropout_factors(
    seed: jax.Array, b: Any, h: Any, q: jax.Array, k: jax.Array, rate: float
) -> jax.Array:
    """Factors of dropout: 0 with probability `rate`, else 1 / (1 - rate).

    They are a hash of (seed, b, h, q, k), so that every path drops the same weights.

    Args:
      seed: [2] uint32.
      b, h: row and head; q, k: absolute indices, broadcastable integer arrays.
      rate: probability of dropping.

    Returns:
      float32 array of the common shape.
    """

    def u32(x: Any) -> jax.Array:
        return jnp.asarray(x).astype(jnp.uint32)

    def mix(x: jax.Array) -> jax.Array:  # finalizer of a 32-bit integer hash (murmur3)
        x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> jnp.uint32(16))

    row = mix(seed[0] ^ mix(u32(b) + jnp.uint32(0x9E3779B9)) ^ (u32(h) * jnp.uint32(0x27D4EB2F)))
    bits = mix(mix(u32(q) ^ row) + u32(k) * jnp.uint32(0x165667B1) + seed[1])
    kept = bits >= jnp.uint32(min(int(rate * 2**32), 2**32 - 1))
    return kept.astype(jnp.float32) / jnp.float32(1.0 - rate)
