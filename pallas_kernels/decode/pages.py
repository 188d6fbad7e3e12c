"""Where a block of keys lies: one place for contiguous and paged caches.

A contiguous cache is key [b, s, g, d]: block i of row b is its tokens i c to (i + 1) c. A paged
cache is a pool key [pages, p c, g, d] shared by all rows, and a table [b, n] of page numbers: block
i of row b is part i mod p of page table[b, i div p]. Every body asks `block_address` and knows
nothing else of the layout.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def block_address(row: Any, block: Any, table: Any, per_page: int) -> tuple[Any, Any]:
    """(first index into the cache, block along its second axis) of a block of keys.

    Args:
      row: batch row.
      block: number of the block within the row.
      table: [b, n] page numbers, an array or a reference to one; None for a contiguous cache.
      per_page: blocks in a page, p.
    """
    if table is None:
        return row, block
    if per_page == 1:
        return table[row, block], 0
    return table[row, lax.div(block, per_page)], lax.rem(block, per_page)


def gather_pages(cache: jax.Array, table: jax.Array | None) -> jax.Array:
    """The rows' keys [b, n c, g, d] of a pool of pages; a contiguous cache as it is."""
    if table is None:
        return cache
    found = jnp.take(cache, table, axis=0, mode="clip")
    return found.reshape(table.shape[0], -1, *cache.shape[2:])
