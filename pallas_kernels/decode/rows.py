"""Queries in the rows of a tile, the blocks that they see, and the merge of split results.

The (h / g) t queries that read one key/value head are the rows of one tile: row i t + j is query j
of the group's head i. Every row sees one range of keys, [start, end), and a mask inside of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tilemath


def pack_rows(x: jax.Array, kv_heads: int) -> jax.Array:
    """[b, h, t, ...] to [b, g, rows, ...]."""
    b, h, t = x.shape[:3]
    return x.reshape(b, kv_heads, h // kv_heads * t, *x.shape[3:])


def score_terms(operands: dict[str, Any], dtype: Any) -> jax.Array | None:
    """Bias and mask in one array [b|1, g|1, rows|1, s]: -inf where a key is hidden; or None."""
    bias, mask = operands["bias"], operands["mask"]
    if bias is None and mask is None:
        return None
    _, t, h, _ = operands["query"].shape
    g = operands["key"].shape[2]
    terms = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
    if mask is not None:
        terms = jnp.where(mask, terms, jnp.asarray(-jnp.inf, dtype))
    if terms.shape[1] == 1 and terms.shape[2] == 1:
        return terms
    terms = jnp.broadcast_to(terms, (terms.shape[0], h, t, terms.shape[3]))
    return pack_rows(terms, g)


def block_plan(
    starts: jax.Array, ends: jax.Array, block: int, num_splits: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which blocks each split of each row reads.

    The blocks that any of the last axis' queries sees are cut into `num_splits` equal parts, so
    that a short row in a long cache keeps every part busy.

    Args:
      starts, ends: [..., n] int32; query i sees keys start_i <= k < end_i. One that sees nothing
        has its start behind, and its end before, those of all others.
      block: keys per block.
      num_splits: parts.

    Returns:
      first and count [..., num_splits], the blocks of each part; and whole [..., 2], the blocks
      from whole[0] and before whole[1] that every query sees completely.
    """
    highest = ends.max(-1)
    low = jnp.minimum(starts.min(-1), highest) // block
    high = -(-highest // block)
    each = -(-(high - low) // num_splits)
    index = lax.broadcasted_iota(jnp.int32, (*low.shape, num_splits), low.ndim)
    first = low[..., None] + index * each[..., None]
    count = jnp.clip(high[..., None] - first, 0, each[..., None])
    # an empty part points at a block that exists
    first = jnp.minimum(first, jnp.maximum(high - 1, 0)[..., None])
    whole = jnp.stack([-(-starts.max(-1) // block), ends.min(-1) // block], axis=-1)
    return first, count, whole


def merge_splits(
    acc: jax.Array, top: jax.Array, total: jax.Array, sinks: jax.Array | None, like: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Joins the partial softmaxes of n disjoint sets of keys, exactly.

        M = max_i m_i;  L = Σ_i l_i e^{m_i - M};  o = Σ_i acc_i e^{m_i - M} / L;  lse = M + ln L

    The maxima are merged and not the parts' lse: an lse of 10^4 has lost the digits that its
    weight needs.

    Args:
      acc: [b, g, n, rows, e], Σ p v of each part, not normalized.
      top: [b, g, n, rows], m_i, -inf for a part without keys.
      total: [b, g, n, rows], l_i = Σ p.
      sinks: [h] logits of one more key with value 0, or None.
      like: the query [b, t, h, d].

    Returns:
      o [b, t, h, e] in the query's dtype, lse [b, t, h]; rows without keys give 0 and -inf.
    """
    b, t, h, _ = like.shape
    g, e = acc.shape[1], acc.shape[4]
    top = lax.stop_gradient(top)
    best = top.max(2)
    if sinks is not None:
        logits = sinks.astype(best.dtype).reshape(1, g, h // g, 1)
        logits = jnp.broadcast_to(logits, (1, g, h // g, t)).reshape(1, g, -1)
        best = jnp.maximum(best, lax.stop_gradient(logits))
    safe = jnp.where(jnp.isneginf(best), jnp.zeros_like(best), best)
    weight = jnp.exp(top - safe[:, :, None])
    out = (acc * weight[..., None]).sum(2)
    mass = (total * weight).sum(2)
    if sinks is not None:
        mass = mass + jnp.exp(logits - safe)
    empty = mass == 0
    mass = jnp.where(empty, jnp.ones_like(mass), mass)
    lse = jnp.where(empty, jnp.full_like(mass, -jnp.inf), safe + jnp.log(mass))
    out = (out / mass[..., None]).reshape(b, h, t, e)
    return out.transpose(0, 2, 1, 3).astype(like.dtype), lse.reshape(b, h, t).transpose(0, 2, 1)


def softmax_step(
    carry: tuple[jax.Array, jax.Array, jax.Array], scores: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The part of an online softmax that needs no values.

    Args:
      carry: (m [r, 1], l [r, 1], acc [r, e]) so far.
      scores: [r, n], -inf where a key is hidden.

    Returns:
      (m, l, acc) with acc rescaled to the new maximum, and p [r, n] to be multiplied with the
      values and added to it.
    """
    m, total, acc = carry
    m_new = jnp.maximum(m, scores.max(-1, keepdims=True))
    shift = jnp.where(m_new == -jnp.inf, jnp.zeros_like(m_new), m_new)
    p = jnp.exp(scores - shift)
    alpha = jnp.exp(m - shift)
    return m_new, total * alpha + p.sum(-1, keepdims=True), acc * alpha, p


def capped(scores: jax.Array, cap: float | None) -> jax.Array:
    """Scores with a soft cap, c tanh(s / c), or the scores where there is no cap."""
    return scores if cap is None else tilemath.softcap(scores, cap)


def product_precision(dtype: Any, precision: Any) -> Any:
    """What the caller asked for; full float32 products otherwise, on devices that would round."""
    if precision is None and dtype == jnp.float32:
        return lax.Precision.HIGHEST
    return precision
