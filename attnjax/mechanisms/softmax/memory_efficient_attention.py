"""Exact attention in O(1) memory per query, by accumulating over chunks of keys.

    m' = max(m, s),  n ← n e^{m-m'} + e^{s-m'},  a ← a e^{m-m'} + v e^{s-m'},  o = a / n

Reference: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021, arXiv:2112.05682.
The paper checkpoints every chunk and lets the backward pass recompute it; here the chunk walk has
its own derivative that does the same. Differs from the published listing: lengths need not be
multiples of the chunks, and a row whose keys are all masked gives 0 instead of a uniform average.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from attnjax.attention import attention
from attnjax.masks import Causal
from attnjax.spec import Mechanism
from pallas_kernels.maskprogram import MaskProgram


def memory_efficient_attention(
    query: Float[Array, "*b t h d"],
    key: Float[Array, "*b s g d"],
    value: Float[Array, "*b s g e"],
    bias: Float[Array, "..."] | None = None,
    mask: MaskProgram | Bool[Array, "..."] | np.ndarray | None = None,
    *,
    causal: bool = False,
    query_chunk: int = 1024,
    key_chunk: int = 4096,
    scale: float | None = None,
    return_residual: bool = False,
    precision: Any = None,
) -> Any:
    """Softmax attention over chunks of queries and keys; equal to dense attention for any chunks.

    Args:
      query, key, value: shapes as annotated, h a multiple of g.
      bias: broadcastable to [b, h, t, s], added to the scores before the mask.
      mask: a mask of `attnjax.masks`, or booleans broadcastable to [b, h, t, s], True = attend.
      causal: the last query sees all s keys, the one before it s - 1, and so on.
      query_chunk: queries of one chunk. Paper: 1024.
      key_chunk: keys of one chunk; s^0.5 needs the least memory. Paper: 4096.
      scale: factor of q·k; None is d^-0.5.
      return_residual: also return the natural-log lse [b, t, h].
      precision: of the matrix products.

    Returns:
      Output [b, t, h, e], or (output, lse).

    Memory: O(query_chunk * key_chunk) scores at a time, in both directions.

    Raises:
      ValueError: on a chunk below 1 token, or shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((1, 100, 2, 8))
      >>> memory_efficient_attention(x, x, x, query_chunk=32, key_chunk=16).shape
      (1, 100, 2, 8)
    """
    for name, size in (("query_chunk", query_chunk), ("key_chunk", key_chunk)):
        if size < 1:
            raise ValueError(f"memory_efficient_attention: {name}={size} must be at least 1 token.")
    t, s = query.shape[-3], key.shape[-3]
    if causal:
        aligned = Causal(s - t)
        if mask is None:
            mask = aligned
        elif isinstance(mask, MaskProgram):
            mask = mask & aligned
        else:
            mask = jnp.asarray(mask) & jnp.asarray(aligned.dense(t, s))
    chunks = min(query_chunk, t), min(key_chunk, s)
    return attention(
        query, key, value, bias, mask, scale=scale, return_residual=return_residual,
        precision=precision, block_sizes=chunks, implementation="block_sparse",
    )  # fmt: skip


def _example() -> tuple[Any, jax.Array]:
    x = 0.5 * jax.random.normal(jax.random.key(0), (2, 24, 1, 8))
    return lambda x: memory_efficient_attention(x, x, x, causal=True, query_chunk=8, key_chunk=8), x


SPEC = Mechanism(
    id="memory_efficient_attention",
    title="Self-attention Does Not Need O(n^2) Memory",
    arxiv="2112.05682",
    year=2021,
    kind="function",
    function=memory_efficient_attention,
    causal=True,
    bidirectional=True,
    golden=("mea_chunked",),
    kernel="flash",
    cost="O(T^2) time, O(T) memory",
    reduces_to={"any chunk sizes": "softmax"},
    example=_example,
)
