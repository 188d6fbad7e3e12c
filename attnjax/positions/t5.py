"""T5's relative bias: a learned number for each head and each range of distances.

    bias[h, i, j] = table[bucket(j - i), h]

Short distances have buckets of their own, longer ones share logarithmic buckets. T5 does not scale
scores by 1/sqrt(d), and all its layers share one table.

Reference: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", 2019, arXiv:1910.10683.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnjax.positions.angles import AnyArray


def t5_relative_bucket(
    relative: Int[AnyArray, "..."],
    *,
    num_buckets: int = 32,
    max_distance: int = 128,
    bidirectional: bool = True,
) -> Int[Array, "..."]:
    """Bucket of each relative position, key - query.

    Args:
      relative: key position minus query position, in tokens.
      num_buckets: number of buckets; half of them for each sign when bidirectional. Paper: 32.
      max_distance: from here on all distances share the last bucket. Paper: 128.
      bidirectional: whether keys after the query have buckets; if not they share bucket 0.

    Returns:
      int32 in 0 .. num_buckets - 1.

    Raises:
      ValueError: when the buckets cannot be split as described.
    """
    side = num_buckets // 2 if bidirectional else num_buckets
    exact = side // 2
    if exact < 1 or max_distance <= exact or (bidirectional and num_buckets % 2):
        raise ValueError(
            "t5_relative_bucket: needs at least 2 buckets per direction, an even number when "
            f"bidirectional, and max_distance > {exact}; got num_buckets={num_buckets}, "
            f"max_distance={max_distance}, bidirectional={bidirectional}."
        )
    relative = jnp.asarray(relative).astype(jnp.int32)
    distance = jnp.abs(relative) if bidirectional else jnp.maximum(-relative, 0)
    table = jnp.asarray(_buckets_by_distance(side, exact, max_distance))
    bucket = table[jnp.minimum(distance, max_distance)]
    return bucket + side * (relative > 0).astype(jnp.int32) if bidirectional else bucket


def _buckets_by_distance(side: int, exact: int, max_distance: int) -> np.ndarray:
    # a table made by NumPy: a logarithm rounded elsewhere would move distances at a bucket's edge
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    span = np.float32(np.log(max_distance / exact))
    far = exact + (np.log(ratio) / span * np.float32(side - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, side - 1)).astype(np.int32)


default_embedding_init = nnx.initializers.normal(1.0)


class T5RelativeBias(nnx.Module):
    """The learned bias, to be passed to `attnjax.attention(bias=...)`.

    Args:
      num_heads: number of query heads.
      num_buckets, max_distance, bidirectional: see `t5_relative_bucket`.
      dtype: type of the bias; None: that of the parameters.
      param_dtype: type of the parameters.
      embedding_init: initializer of the table [num_buckets, h].
      rngs: random keys; uses `params`.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        num_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        embedding_init: Any = default_embedding_init,
        rngs: nnx.Rngs,
    ):
        self.options = (num_buckets, max_distance, bidirectional)
        self.dtype = dtype
        table = embedding_init(rngs.params(), (num_buckets, num_heads), param_dtype)
        self.embedding = nnx.Param(table, axes=(None, "heads"))

    def __call__(
        self, query_positions: Int[AnyArray, "..."], key_positions: Int[AnyArray, "..."]
    ) -> Float[Array, "b h t s"]:
        """Bias [b or 1, h, t, s] for positions [t] or [b, t] and [s] or [b, s], in tokens."""
        num_buckets, max_distance, bidirectional = self.options
        i, j = (
            jnp.asarray(p).reshape(-1, jnp.shape(p)[-1]) for p in (query_positions, key_positions)
        )
        buckets = t5_relative_bucket(
            j[:, None, :] - i[:, :, None],
            num_buckets=num_buckets,
            max_distance=max_distance,
            bidirectional=bidirectional,
        )
        table = self.embedding[...]
        return jnp.moveaxis(table.astype(self.dtype or table.dtype)[buckets], -1, 1)
