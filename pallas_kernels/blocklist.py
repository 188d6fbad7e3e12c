"""Block lists: which tiles of a score matrix a kernel visits, and which of them need no mask.

A list holds, for every block of queries, the indices of its FULL key blocks (no mask needed) and of
its PARTIAL ones (the predicate decides inside). EMPTY blocks are in neither, so they cost nothing.
Static masks give NumPy lists in milliseconds even for a million tokens; masks that hold traced
arrays give traced lists of the same type.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from pallas_kernels.maskprogram import FULL, PARTIAL, MaskProgram


@dataclasses.dataclass(frozen=True)
class BlockList:
    """Tiles to visit, per batch row, head and row of blocks.

    A row is a block of queries and its entries are blocks of keys; after `transpose()` it is the
    other way round (`transposed=True`, all other static fields keep their meaning).

    Attributes:
      partial_count: [nb, nh, n] int32, number of PARTIAL blocks of each row.
      partial_cols: [nb, nh, n, wp] int32, their indices, increasing; the rest of a row repeats the
        last valid index (0 where there is none), so that a pipeline fetches nothing new. wp >= 1.
      full_count, full_cols: the same for FULL blocks.
      q_len, kv_len: lengths in tokens. block_q, block_kv: tile sizes in tokens.
      transposed: whether rows are key blocks.

    nb is 1 or the batch size, nh is 1 or the number of query heads.
    """

    partial_count: Any
    partial_cols: Any
    full_count: Any
    full_cols: Any
    q_len: int
    kv_len: int
    block_q: int
    block_kv: int
    transposed: bool = False

    @property
    def num_q_blocks(self) -> int:
        """ceil(q_len / block_q)."""
        return -(-self.q_len // self.block_q)

    @property
    def num_kv_blocks(self) -> int:
        """ceil(kv_len / block_kv)."""
        return -(-self.kv_len // self.block_kv)

    @property
    def is_static(self) -> bool:
        """Whether the lists have values now (no array is traced)."""
        return not any(isinstance(x, Tracer) for x in jax.tree.leaves(self))

    def class_map(self) -> Any:
        """Class of every tile, [nb, nh, rows, columns] int8: what the lists say, as a picture."""
        columns = self.num_q_blocks if self.transposed else self.num_kv_blocks
        xp: Any = np if self.is_static else jnp
        classes: Any = xp.zeros((*self.partial_count.shape, columns), xp.int8)
        for count, cols, kind in (
            (self.partial_count, self.partial_cols, PARTIAL),
            (self.full_count, self.full_cols, FULL),
        ):
            # padding repeats a valid index, so it writes what is there already
            value = xp.where(count > 0, xp.int8(kind), xp.int8(0))[..., None]
            value = xp.broadcast_to(value, cols.shape)
            if xp is np:
                grid = np.indices(cols.shape, sparse=True)[:-1]
                np.maximum.at(classes, (*grid, np.asarray(cols)), value)
            else:
                grid = jnp.indices(cols.shape, sparse=True)[:-1]
                classes = classes.at[(*grid, cols)].max(value)
        return classes

    def transpose(self) -> BlockList:
        """The same tiles listed by key block, for the gradients of keys and values."""
        return block_list_from_map(
            self.class_map().swapaxes(-1, -2),
            self.q_len,
            self.kv_len,
            block_q=self.block_q,
            block_kv=self.block_kv,
            transposed=not self.transposed,
        )

    def stats(self) -> dict[str, Any]:
        """Counts of tiles over all rows and heads that the list tells apart.

        Returns:
          visited, full, partial, total: numbers of tiles; density: visited / total. Python numbers
            where
          the lists are static, traced scalars otherwise.
        """
        total = int(np.prod(self.partial_count.shape)) * (
            self.num_q_blocks if self.transposed else self.num_kv_blocks
        )
        full, partial = self.full_count.sum(), self.partial_count.sum()
        if self.is_static:
            full, partial = int(full), int(partial)
        visited = full + partial
        return {
            "visited": visited,
            "full": full,
            "partial": partial,
            "total": total,
            "density": visited / max(total, 1),
        }


jax.tree_util.register_dataclass(
    BlockList,
    data_fields=["partial_count", "partial_cols", "full_count", "full_cols"],
    meta_fields=["q_len", "kv_len", "block_q", "block_kv", "transposed"],
)


def block_list(
    mask: MaskProgram,
    q_len: int,
    kv_len: int,
    *,
    block_q: int,
    block_kv: int,
    q_offset: Any = 0,
    num_heads: int | None = None,
    batch: int | None = None,
) -> BlockList:
    """Classifies every tile of a mask and lists the ones to visit.

    Tiles at the end are clipped to the real lengths before they are classified. A FULL tile whose
    key block reaches beyond `kv_len` becomes PARTIAL: the kernel then applies predicate & (k <
    kv_len).

    Args:
      mask: any mask program.
      q_len, kv_len: numbers of queries and keys, in tokens.
      block_q, block_kv: tile sizes, in tokens; they need not divide the lengths.
      q_offset: absolute index of the first query: an integer, or an array () or [b].
      num_heads, batch: sizes to check the mask against; None skips the check.

    Returns:
      Lists for [nb, nh, num_q_blocks] rows; NumPy when the mask and the offset are static.

    Raises:
      ValueError: on sizes below 1, or when the mask is for another number of heads or batch rows.

    Cost: O(number of tiles), no t x s array.
    """
    for name, size in (
        ("q_len", q_len),
        ("kv_len", kv_len),
        ("block_q", block_q),
        ("block_kv", block_kv),
    ):
        if size < 1:
            raise ValueError(f"block_list: {name} must be at least 1 token, got {name}={size}.")
    _check_size("num_heads", mask.num_heads, num_heads)
    _check_size("batch", mask.batch_size, batch)
    if np.ndim(q_offset) > 1:
        raise ValueError(
            "block_list: q_offset must be an integer or have shape () or [batch], got "
            f"{np.shape(q_offset)}."
        )
    if np.ndim(q_offset) == 1:
        _check_size("batch", np.shape(q_offset)[0], batch)
        _check_size("q_offset's batch", mask.batch_size, np.shape(q_offset)[0])

    rows = mask.batch_size or (np.shape(q_offset)[0] if np.ndim(q_offset) == 1 else 1)
    b = np.arange(rows).reshape(-1, 1, 1, 1)
    h = np.arange(mask.num_heads or 1).reshape(1, -1, 1, 1)
    q0, q1 = _edges(q_len, block_q, (1, 1, -1, 1))
    k0, k1 = _edges(kv_len, block_kv, (1, 1, 1, -1))
    traced = isinstance(q_offset, Tracer)
    offset = q_offset.astype(jnp.int32) if traced else np.asarray(q_offset)
    offset = offset.reshape(-1, 1, 1, 1)
    classes = mask.classify(q0 + offset, q1 + offset, k0, k1, b=b, h=h)
    if kv_len % block_kv:
        last = classes[..., -1:]
        if isinstance(classes, jax.Array):
            classes = classes.at[..., -1:].set(jnp.minimum(last, jnp.int8(PARTIAL)))
        else:
            classes[..., -1:] = np.minimum(last, PARTIAL)
    shape = (rows, mask.num_heads or 1, q0.size, k0.size)
    classes = (jnp if isinstance(classes, jax.Array) else np).broadcast_to(classes, shape)
    return block_list_from_map(classes, q_len, kv_len, block_q=block_q, block_kv=block_kv)


def block_list_from_map(
    class_map: Any,
    q_len: int,
    kv_len: int,
    *,
    block_q: int,
    block_kv: int,
    transposed: bool = False,
) -> BlockList:
    """Lists from a map of classes, as routed and learned patterns give it.

    Args:
      class_map: [nb, nh, rows, columns] of EMPTY, PARTIAL, FULL; NumPy, JAX or traced. Booleans
        mean EMPTY and PARTIAL. Rows are query blocks (key blocks if `transposed`).
      q_len, kv_len, block_q, block_kv: as for `block_list`; the map must have their number of
        blocks.
      transposed: whether the rows of the map are key blocks.

    Raises:
      ValueError: when the map's shape does not fit the lengths and tile sizes.
    """
    nq, nk = -(-q_len // block_q), -(-kv_len // block_kv)
    want = (nk, nq) if transposed else (nq, nk)
    if np.ndim(class_map) != 4 or tuple(class_map.shape[2:]) != want:
        raise ValueError(
            f"block_list_from_map: class_map must have shape [batch or 1, heads or 1, {want[0]}, "
            f"{want[1]}] for q_len={q_len}, kv_len={kv_len}, block_q={block_q}, "
            f"block_kv={block_kv}, got {np.shape(class_map)}."
        )
    if isinstance(class_map, Tracer):
        gather: Any = _gather_traced
    else:
        class_map, gather = np.asarray(class_map), _gather_static
    partial_count, partial_cols = gather(class_map == PARTIAL)
    full_count, full_cols = gather(class_map == FULL)
    return BlockList(
        partial_count,
        partial_cols,
        full_count,
        full_cols,
        q_len,
        kv_len,
        block_q,
        block_kv,
        transposed,
    )


def _gather_static(flags: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts [..., n] and column indices [..., n, w] of the True flags of each row."""
    *lead, columns = flags.shape
    flags = flags.reshape(-1, columns)
    count = np.count_nonzero(flags, axis=-1)
    row, col = np.nonzero(flags)
    width = max(1, int(count.max(initial=0)))
    ends = np.cumsum(count)
    last = np.zeros(len(flags), np.int32)
    some = count > 0
    last[some] = col[ends[some] - 1]
    cols = np.repeat(last[:, None], width, axis=1)
    cols[row, np.arange(len(col)) - (ends - count)[row]] = col
    return count.astype(np.int32).reshape(lead), cols.reshape(*lead, width)


def _gather_traced(flags: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `_gather_static`; the width is the number of columns, since counts are not known yet."""
    count = flags.sum(-1, dtype=jnp.int32)
    order = jnp.argsort(jnp.logical_not(flags), axis=-1, stable=True).astype(jnp.int32)
    place = jax.lax.broadcasted_iota(jnp.int32, order.shape, order.ndim - 1)
    last = jnp.maximum(count[..., None] - 1, 0)
    cols = jnp.take_along_axis(order, jnp.minimum(place, last), axis=-1)
    return count, cols * (count > 0).astype(jnp.int32)[..., None]


def _edges(length: int, block: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    start = np.arange(0, length, block, dtype=np.int32)
    return start.reshape(shape), np.minimum(start + block, length).reshape(shape)


def _check_size(name: str, has: int | None, wanted: int | None) -> None:
    if has is not None and wanted is not None and has != wanted:
        raise ValueError(
            f"block_list: the mask is made for {name}={has}, but {name}={wanted} was asked for."
        )
