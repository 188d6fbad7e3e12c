"""Block lists of a call, from its static or its traced mask."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.blocklist import BlockList, block_list, block_list_from_map
from pallas_kernels.flash.spec import FlashSpec
from pallas_kernels.maskprogram import PARTIAL


def make_lists(operands: dict[str, Any], spec: FlashSpec, block_q: int, block_kv: int) -> BlockList:
    """The tiles to visit, [nb, nh, rows]: NumPy where mask and offset are static, else traced.

    An array mask may hide anything, so with one all tiles are PARTIAL.

    Args:
      operands, spec: of the call.
      block_q, block_kv: tile sizes in tokens.
    """
    b, t, h, _ = operands["query"].shape
    s = operands["key"].shape[1]
    static = spec.mask is not None and spec.q_offset is not None

    def lists(mask: Any, offset: Any, batch: int) -> BlockList:
        return block_list(
            mask, t, s, block_q=block_q, block_kv=block_kv, q_offset=offset, num_heads=h,
            batch=batch,
        )  # fmt: skip

    if static:
        found = lists(spec.mask, spec.q_offset, b)
    else:
        mask = operands["mask"] if spec.mask is None else spec.mask
        offset = operands["q_offset"] if spec.q_offset is None else spec.q_offset
        found = _folded(lists, mask, offset, b, spec.folds)
    if operands["mask_array"] is None:
        return found
    cap = (np if found.is_static else jnp).minimum(found.class_map(), PARTIAL)
    return block_list_from_map(cap, t, s, block_q=block_q, block_kv=block_kv)


def _folded(lists: Any, mask: Any, offset: Any, b: int, folds: int) -> BlockList:
    """Lists of `folds` stacked masks, their rows side by side."""
    if isinstance(offset, jax.Array) and offset.shape == (1,):
        offset = offset[0]
    if not folds:
        return lists(mask, offset, b)
    each = b // folds
    if isinstance(offset, jax.Array) and offset.ndim == 1:
        offset = offset.reshape(folds, each)
        found = jax.vmap(lambda m, o: lists(m, o, each))(mask, offset)
    else:
        found = jax.vmap(lambda m: lists(m, offset, each))(mask)

    def join(x: jax.Array) -> jax.Array:  # [folds, nb, ...] -> [folds * each, ...]
        x = jnp.broadcast_to(x, (folds, each, *x.shape[2:]))
        return x.reshape(folds * each, *x.shape[2:])

    return jax.tree.map(join, found)
