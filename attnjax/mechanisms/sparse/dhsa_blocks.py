"""The second revision of DHSA's code: blocks of fixed sizes, chosen by each head for itself.

See `attnjax.mechanisms.sparse.dhsa`.

Reference: Xiong et al., 2025, arXiv:2510.24606; official code xiongsiheng/DHSA (DHSA_patch.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from attnjax.checks import check_qkv
from attnjax.dense import qk_scores, softmax_weights
from pallas_kernels.tilemath import accumulator_dtype

KINDS = ("plain", "a_shape", "vertical_slash")


def dhsa_block_mask(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t g d"],
    *,
    block_q: int = 128,
    block_kv: int = 32,
    density: float = 0.125,
    kind: str = "plain",
    vertical: float = 0.5,
) -> Bool[Array, "b h q n"]:
    """Which blocks of keys each head reads, for `Causal() & BlockPattern(mask, 128, 32)`.

    A row of blocks reads r = max(1, ⌊density n⌋) of the n blocks of keys:

        "plain":           those of highest product of means, mean(q) · mean(k)
        "a_shape":         the first block and the row's last, then those of highest product
        "vertical_slash":  the first block and the row's last, then those that hold most of the
                           columns and diagonals that the last block of queries attends to most

    Rows with at most r causal blocks read all of them; with "vertical_slash" also the first rows,
    up to as many queries as r blocks hold keys, and the last row. The official "plain" lets blocks
    of the future take places and leaves them to the causal mask; here only causal blocks compete.

    Args:
      query, key: as the attention uses them; h a multiple of g.
      block_q, block_kv: tokens per block. Official code: 128, 32.
      density: share of the key blocks that a row reads. Official code: 0.125.
      kind: see above.
      vertical: share of the r block_kv lines that are columns; the others are diagonals.

    Returns:
      Booleans [b, h, ⌈t / block_q⌉, ⌈t / block_kv⌉]; none for blocks of the future.

    Memory: O(t² / (block_q block_kv)) per head, and O(block_q t) for "vertical_slash".

    Raises:
      ValueError: on shapes that do not fit, an unknown kind, sizes below 1 or shares out of range.
    """
    name = "dhsa_block_mask"
    check_qkv(name, query, key, key)
    query, key = jax.lax.stop_gradient((query, key))
    if key.shape[1] != query.shape[1]:
        raise ValueError(
            f"{name}: query and key must have the same length, got {query.shape} and {key.shape}."
        )
    if kind not in KINDS:
        raise ValueError(f"{name}: kind={kind!r} is none of {', '.join(KINDS)}.")
    if min(block_q, block_kv) < 1 or not 0 < density <= 1 or not 0 <= vertical <= 1:
        raise ValueError(
            f"{name}: needs block sizes of at least 1, 0 < density <= 1 and 0 <= vertical <= 1, "
            f"got block_q={block_q}, block_kv={block_kv}, density={density}, vertical={vertical}."
        )
    t = query.shape[1]
    rows, n = -(-t // block_q), -(-t // block_kv)
    most = max(1, int(density * n))
    row, column = jnp.arange(rows)[:, None], jnp.arange(n)[None]
    last = jnp.minimum((row + 1) * block_q, t) - 1
    causal = column <= last // block_kv
    dense = last // block_kv < most
    forced = jnp.zeros_like(causal)
    if kind == "vertical_slash":
        scores = _lines(query, key, row, column, block_q, block_kv, most, vertical)
        dense = dense | (row * block_q < most * block_kv) | (row == rows - 1)
    else:
        scores = qk_scores(_means(query, block_q), _means(key, block_kv), 1.0)
    if kind != "plain":
        forced = (column == 0) | (column == last // block_kv)
    scores = jnp.where(forced[None, None], jnp.inf, scores)
    scores = jnp.where(causal[None, None], scores, -jnp.inf)
    _, best = jax.lax.top_k(scores, most)
    chosen = jnp.put_along_axis(jnp.zeros(scores.shape, bool), best, True, axis=-1, inplace=False)
    return (chosen | forced[None, None] | dense[None, None]) & causal[None, None]


def _means(x: jax.Array, block: int) -> jax.Array:
    """Means over blocks [b, n, h, d]; the last block may be short."""
    b, t, *rest = x.shape
    n, dtype = -(-t // block), accumulator_dtype(x.dtype)
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, n * block - t), (0, 0), (0, 0)))
    count = jnp.minimum(t - jnp.arange(n) * block, block).astype(dtype)
    return x.reshape(b, n, block, *rest).sum(2) / count[None, :, None, None]


def _lines(
    query: jax.Array, key: jax.Array, row: jax.Array, column: jax.Array, block_q: int,
    block_kv: int, most: int, vertical: float,
) -> jax.Array:  # fmt: skip
    """Attention of the last block of queries on the strongest columns and diagonals, by block."""
    t = query.shape[1]
    last = min(block_q, t)
    at = jnp.arange(t)
    seen = at[None] <= at[t - last :, None]
    weights, _ = softmax_weights(qk_scores(query[:, t - last :], key), seen[None, None])
    # diagonal δ: the weights of queries t - last + i on keys t - last + i - δ
    place = at[t - last :, None] - at[None]
    diagonal = jnp.take_along_axis(weights, jnp.maximum(place, 0)[None, None], axis=-1)
    diagonal = jnp.where((place >= 0)[None, None], diagonal, 0)
    lines = min(t, most * block_kv)
    columns = int(lines * vertical)

    def strongest(total: jax.Array, count: int) -> jax.Array:
        """Running sums [b, h, t + 1] of the `count` largest entries, the others being 0."""
        value, where = jax.lax.top_k(total, count)
        kept = jnp.put_along_axis(jnp.zeros_like(total), where, value, axis=-1, inplace=False)
        return jnp.pad(jnp.cumsum(kept, axis=-1), ((0, 0), (0, 0), (1, 0)))

    def between(sums: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return sums[..., jnp.clip(high, 0, t)] - sums[..., jnp.clip(low, 0, t)]

    start, stop = column * block_kv, (column + 1) * block_kv
    held = between(strongest(weights.sum(-2), columns), start, stop)
    # diagonals that meet row and column: from the nearest pair of tokens to the farthest
    low, high = row * block_q - stop + 1, (row + 1) * block_q - start
    return held + between(strongest(diagonal.sum(-2), lines - columns), low, high)
