"""Packed rows: where the document of each token begins."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def document_starts(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Index of the first token of each token's document.

    Args:
      segment_ids: documents are runs of equal ids.

    Returns:
      int32; a token stands at `index - start` in its document.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, segment_ids.shape, 1)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jax.lax.cummax(jnp.where(begins, index, jnp.zeros_like(index)), axis=1)
