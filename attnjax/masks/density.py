"""How much of the score matrix a mask shows, counted without building it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_kernels.blocklist import block_list
from pallas_kernels.maskprogram import FULL, PARTIAL, MaskProgram

_LEAF = 16  # tokens: tiles of this size are counted element by element
_BATCH = 4096  # tiles counted at a time, which bounds memory


def density(
    mask: MaskProgram, T: int, S: int | None = None, block: int | tuple[int, int] | None = None
) -> float:
    """Fraction of visible pairs, or of visited tiles when a tile size is given.

    The exact count descends a tree of tiles: a FULL tile counts as a whole, a PARTIAL one is split
    in four. For a band that is O(T) work.

    Args:
      mask: a static mask.
      T: number of queries. S: number of keys, T when None.
      block: None, or a tile size in tokens, or (queries, keys).

    Raises:
      ValueError: when the mask holds traced arrays, which have no values to count.
    """
    S = T if S is None else S
    if not mask.is_static:
        raise ValueError(f"density: {mask!r} holds traced arrays; call it outside of jax.jit.")
    if block is not None:
        block_q, block_kv = (block, block) if isinstance(block, int) else block
        stats = block_list(mask, T, S, block_q=block_q, block_kv=block_kv).stats()
        return float(stats["density"])
    rows, heads = mask.batch_size or 1, mask.num_heads or 1
    return _count(mask, T, S, rows, heads) / (rows * heads * T * S)


def _count(mask: MaskProgram, T: int, S: int, rows: int, heads: int) -> int:
    size = 1 << (max(T, S) - 1).bit_length()
    b, h = (x.ravel() for x in np.indices((rows, heads)))
    q, k = np.zeros_like(b), np.zeros_like(b)
    total = 0
    while True:
        q1, k1 = np.minimum(q + size, T), np.minimum(k + size, S)
        classes = np.broadcast_to(mask.classify(q, q1, k, k1, b=b, h=h), q.shape)
        full, split = classes == FULL, classes == PARTIAL
        total += int(((q1 - q) * (k1 - k))[full].sum())
        b, h, q, k = b[split], h[split], q[split], k[split]
        if size <= _LEAF:
            break
        size //= 2
        dq, dk = np.array([0, 0, size, size]), np.array([0, size, 0, size])
        q, k = (q[:, None] + dq).ravel(), (k[:, None] + dk).ravel()
        b, h = b.repeat(4), h.repeat(4)
        inside = (q < T) & (k < S)
        b, h, q, k = b[inside], h[inside], q[inside], k[inside]
    for start in range(0, len(b), _BATCH):
        part = slice(start, start + _BATCH)
        total += _count_elements(mask, tuple(x[part, None, None] for x in (b, h, q, k)), size, T, S)
    return total


def _count_elements(mask: MaskProgram, corners: tuple[Any, ...], size: int, T: int, S: int) -> int:
    b, h, q, k = corners
    q, k = q + np.arange(size)[:, None], k + np.arange(size)
    inside = (q < T) & (k < S)
    return int(np.count_nonzero(np.asarray(mask.predicate(b, h, q, k)) & inside))
