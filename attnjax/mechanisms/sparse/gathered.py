"""Attention to keys collected for each query: what mechanisms that choose single keys share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.attention import attention
from attnjax.checks import check_qkv

GATHERED_KEYS = 1 << 16
"""Keys that are gathered at a time: bounds the memory of long prompts."""


def in_parts(fn: Callable[..., jax.Array], size: int, *arrays: jax.Array) -> jax.Array:
    """`fn(*arrays)`, computed for `size` places along axis 1 at a time.

    Args:
      fn: takes parts of the arrays, gives [b, part, ...]; places must not depend on each other.
      size: places per part. The last part is filled up with zeros, which are cut off again.
      arrays: [b, t, ...], all of the same b and t.

    Memory: one part's; the gradient computes each part again instead of keeping what it made.
    """
    b, t = arrays[0].shape[:2]
    if size >= t:
        return fn(*arrays)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -t % size)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(b, -1, size, *x.shape[2:]).swapaxes(0, 1)

    def part(xs: tuple[jax.Array, ...]) -> jax.Array:
        return fn(*xs)

    out = jax.lax.map(jax.checkpoint(part), tuple(split(x) for x in arrays))
    return out.swapaxes(0, 1).reshape(b, -1, *out.shape[3:])[:, :t]


def gathered_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    index: Int[Array, "b q r"],
    *,
    block_q: int = 1,
    at: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t h e"]:
    """Exact causal attention of blocks of queries to the keys listed for each block.

    Args:
      query, key, value: h a multiple of g.
      index: keys of each block of `block_q` queries; s marks an empty place, no key twice.
      block_q: queries per block, q = ⌈t / block_q⌉.
      at: index of each query among the keys; None is 0, 1, ...

    Returns:
      Output in the dtype of `query`.

    Memory: O(r) gathered keys per block, 2^16 at a time.

    Raises:
      ValueError: on shapes that do not fit.
    """
    name = "gathered_attention"
    check_qkv(name, query, key, value)
    b, t, h, d = query.shape
    blocks, r = index.shape[1:]
    if blocks != -(-t // block_q) or index.shape[0] != b:
        raise ValueError(
            f"{name}: index must have the shape [batch, blocks, keys] with {b} rows and "
            f"{-(-t // block_q)} blocks of block_q={block_q} queries, got {index.shape}."
        )
    if at is None:
        at = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    fill = blocks * block_q - t
    query = jnp.pad(query, ((0, 0), (0, fill), (0, 0), (0, 0)))
    query = query.reshape(b, blocks, block_q, h, d)
    at = jnp.pad(at, ((0, 0), (0, fill))).reshape(b, blocks, block_q)
    rows = jnp.arange(b, dtype=jnp.int32)[:, None, None]
    s = key.shape[1]

    def some(q: Any, index: Any, at: Any) -> jax.Array:
        found = jnp.minimum(index, s - 1)
        k, v = (a[rows, found].reshape(-1, r, *a.shape[2:]) for a in (key, value))
        seen = (index[:, :, None] <= at[..., None]) & (index < s)[:, :, None]
        out = attention(
            q.reshape(-1, block_q, h, d), k.astype(q.dtype), v.astype(q.dtype),
            mask=seen.reshape(-1, 1, block_q, r),
        )  # fmt: skip
        return out.reshape(*q.shape[:4], -1)

    out = in_parts(some, max(1, GATHERED_KEYS // r), query, index, at)
    return out.reshape(b, blocks * block_q, h, -1)[:, :t]
