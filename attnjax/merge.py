"""Joining attention over disjoint sets of keys through their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_attention(
    parts: Sequence[tuple[Float[Array, "*b t h e"], Float[Array, "*b t h"]]],
) -> tuple[Float[Array, "*b t h e"], Float[Array, "*b t h"]]:
    """Attention over the union of key sets, from the attention over each of them.

        lse = ln Σ_i e^{lse_i},   o = Σ_i e^{lse_i - lse} o_i

    Args:
      parts: pairs (output, lse) as `attention(..., return_residual=True)` gives them, for the same
        queries and disjoint keys. An lse of -inf marks a row that saw nothing.

    Returns:
      (output, lse) of the union, in the output dtype of the first part; rows that see nothing in
      any part give 0 and -inf. Differentiable.

    Raises:
      ValueError: when no part is given or the shapes differ.
    """
    if not parts:
        raise ValueError("merge_attention: pass at least one (output, lse) pair.")
    for o, lse in parts:
        if o.shape != parts[0][0].shape or lse.shape != o.shape[:-1]:
            raise ValueError(
                "merge_attention: every part needs an output of one shape [b, t, h, e] and an lse "
                f"[b, t, h]; got {[(o.shape, lse.shape) for o, lse in parts]}."
            )
    lses = jnp.stack([lse for _, lse in parts])
    top = jax.lax.stop_gradient(lses.max(axis=0))
    top = jnp.where(jnp.isneginf(top), jnp.zeros_like(top), top)
    # an lse of -inf has no finite slope: keep it out of exp, so that its gradient is 0 and not nan
    gone = jnp.isneginf(lses)
    mass = jnp.where(gone, 0, jnp.exp(jnp.where(gone, 0, lses - top[None])))
    total = mass.sum(axis=0)
    empty = total == 0
    safe = jnp.where(empty, jnp.ones_like(total), total)
    out = sum(m[..., None] * o.astype(m.dtype) for m, (o, _) in zip(mass, parts, strict=True))
    lse = jnp.where(empty, jnp.full_like(total, -jnp.inf), top + jnp.log(safe))
    return (out / safe[..., None]).astype(parts[0][0].dtype), lse
