"""An extra key that every query sees: where attention can go when there is nothing to read.

    softmax([q · k' , q · K]) [v'; V]

is the merge of attention over the real keys with attention over one key, so it is exact for every
implementation of the first part. Reference: Sun et al., "Massive Activations in Large Language
Models", 2024, arXiv:2402.17762; Miller, "Attention Is Off By One", 2023 (`logits = 0`, no value).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def add_extra_key(
    out: Float[Array, "b t h e"],
    lse: Float[Array, "b t h"],
    logits: Float[Array, "b t h"],
    value: Float[Array, "h e"] | None,
) -> tuple[jax.Array, jax.Array]:
    """Joins attention over the real keys with one extra key of the given logits.

        w = e^logits / (e^lse + e^logits),   o' = (1 - w) o + w v'

    Args:
      out: attention over the real keys.
      lse: its natural log-sum-exp; -inf where a query saw no key.
      logits: score of the extra key, finite. It is never masked, so no row stays empty.
      value: v' by query head; None is 0.

    Returns:
      o' in the dtype of `out`, and the new log-sum-exp.
    """
    logits = logits.astype(lse.dtype)
    # sigmoid(logits - lse): exact 1 with zero gradient where lse is -inf
    weight = jax.nn.sigmoid(logits - jnp.where(jnp.isneginf(lse), jnp.full_like(lse, -1e30), lse))
    joined = out.astype(lse.dtype) * (1 - weight)[..., None]
    if value is not None:
        joined = joined + weight[..., None] * value[None, None].astype(lse.dtype)
    return joined.astype(out.dtype), jnp.logaddexp(lse, logits)
