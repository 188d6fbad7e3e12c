"""Operands of the XLA body in blocks, spread over lanes that one step works on side by side.

XLA for CPUs runs independent products of one tile at the same time on several cores, but not the
iterations of a loop. A step therefore takes one tile of each lane; lanes split the heads (or the
batch rows), so they write to separate arrays and never wait for each other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import tilemath
from pallas_kernels.flash.blocks import Tiling
from pallas_kernels.flash.spec import FlashSpec

Operands = dict[str, Any]


class Member(NamedTuple):
    """One (batch row, head): its indices, and its places in its lane's arrays."""

    b: Any
    h: Any
    place: Any
    kv_place: Any


class Layout(NamedTuple):
    """How b batch rows and h heads (g kv heads) are spread over lanes.

    `axis` is 1 when lanes split heads, 0 when they split batch rows. A lone member, as under vmap,
    has its indices in `only`.
    """

    b: int
    h: int
    g: int
    lanes: int
    axis: int
    only: tuple[Any, Any] | None = None

    @property
    def steps(self) -> int:
        """Members of each lane."""
        return self.b * self.h // self.lanes

    def member(self, lane: int, step: Any) -> Member:
        """The member that a lane works on in a step."""
        if self.only is not None:
            return Member(*self.only, jnp.int32(0), jnp.int32(0))
        h, g = (n // self.lanes if self.axis == 1 else n for n in (self.h, self.g))
        row, head = lax.div(step, jnp.int32(h)), lax.rem(step, jnp.int32(h))
        kv_place = row * jnp.int32(g) + lax.div(head, jnp.int32(h // g))
        if self.axis == 1:
            return Member(row, head + jnp.int32(lane * h), step, kv_place)
        return Member(row + jnp.int32(lane * (self.b // self.lanes)), head, step, kv_place)

    def split(self, x: jax.Array) -> list[jax.Array]:
        """[b, h, blocks, block, d] -> for every lane [members, blocks, block, d]."""
        shape = list(x.shape)
        shape[self.axis : self.axis + 1] = [self.lanes, shape[self.axis] // self.lanes]
        x = jnp.moveaxis(x.reshape(shape), self.axis, 0)
        return [x[lane].reshape(-1, *x.shape[3:]) for lane in range(self.lanes)]

    def join(self, lanes: list[jax.Array], heads: int) -> jax.Array:
        """The inverse of `split`, for `heads` heads (h or g)."""
        sizes = [self.b, heads]
        sizes[self.axis] //= self.lanes
        parts = [x.reshape(*sizes, *x.shape[1:]) for x in lanes]
        return jnp.concatenate(parts, axis=self.axis)


def choose_layout(b: int, h: int, g: int, list_rows: int, list_heads: int, most: int) -> Layout:
    """The layout with the most lanes whose members share their block list and no kv head.

    Args:
      b, h, g: batch rows, heads, kv heads.
      list_rows, list_heads: batch rows and heads that the block lists tell apart, 1 or b and 1 or
        h.
      most: most lanes.
    """
    for lanes in range(most, 1, -1):
        if list_heads == 1 and g % lanes == 0:
            return Layout(b, h, g, lanes, 1)
        if list_heads == 1 and list_rows == 1 and b % lanes == 0:
            return Layout(b, h, g, lanes, 0)
    return Layout(b, h, g, 1, 1)


class Cut(NamedTuple):
    """Operands as the tile loops read them.

    q is a list over lanes of [members, blocks, block, d], k and v of [members, s padded, d]; before
    they are spread over lanes they are one array each, with [b, h] in place of members. starts
    [nb, nh, nq, width] lists the first keys of FULL blocks and then of PARTIAL ones; full and total
    [nb, nh, nq] count them. `rest` holds "mask_array", "bias", "sinks", "seed", "q_offset",
    "mask_reads" and "score_reads".
    """

    q: Any
    k: Any
    v: Any
    starts: jax.Array
    full: jax.Array
    total: jax.Array
    rest: Operands


def blocks(x: jax.Array, block: int, fill: float = 0.0) -> jax.Array:
    """[b, t, h, d] -> [b, h, blocks, block, d], `fill` behind the end."""
    b, t, h, d = x.shape
    n = -(-t // block)
    pads = ((0, 0), (0, n * block - t), (0, 0), (0, 0))
    x = jnp.pad(x, pads, constant_values=np.asarray(fill, x.dtype))
    return x.transpose(0, 2, 1, 3).reshape(b, h, n, block, d)


def unblocks(x: jax.Array, t: int) -> jax.Array:
    """The inverse of `blocks` and of `flat_blocks`."""
    b, h, *_, d = x.shape
    return x.reshape(b, h, -1, d)[:, :, :t].transpose(0, 2, 1, 3)


def merged_lists(tiling: Tiling, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(starts, full, total) of `Cut` from a block list; of a band, one masked entry per row.

    Args:
      tiling: lists and band.
      width: largest number of listed blocks in a row.
    """
    lists, band = jax.tree.map(jnp.asarray, tiling.lists), tiling.band
    if band is not None:
        band = jnp.asarray(band)
        return band[..., None], jnp.zeros_like(band), jnp.ones_like(band)
    place = jnp.arange(width, dtype=jnp.int32).reshape(1, 1, 1, -1)
    full, partial = lists.full_count[..., None], lists.partial_count[..., None]
    at_full = jnp.minimum(place, lists.full_cols.shape[-1] - 1)
    at_partial = jnp.clip(place - full, 0, lists.partial_cols.shape[-1] - 1)
    shape = (*full.shape[:-1], width)
    cols = jnp.where(
        place < full,
        jnp.take_along_axis(lists.full_cols, jnp.broadcast_to(at_full, shape), axis=-1),
        jnp.take_along_axis(lists.partial_cols, at_partial, axis=-1),
    )
    return cols * tiling.block_kv, full[..., 0], (full + partial)[..., 0]


def flat_blocks(x: jax.Array, block: int) -> jax.Array:
    """[b, t, h, d] -> [b, h, t padded to whole blocks, d]."""
    b, _, h, d = x.shape
    return blocks(x, block).reshape(b, h, -1, d)


def prescaled(query: jax.Array, scale: float) -> jax.Array:
    """Queries times the scale where they have full precision: t d products instead of t s."""
    if query.dtype != tilemath.accumulator_dtype(query.dtype):
        return query
    return query * jnp.asarray(scale, query.dtype)


def padded_rest(operands: Operands, spec: FlashSpec, block_q: int, block_kv: int) -> Operands:
    """What is not cut into blocks; arrays over queries and keys are padded to whole blocks."""
    rest = {name: operands[name] for name in ("sinks", "seed", "q_offset")}
    for name in ("bias", "mask_array"):
        x = operands[name]
        if x is not None:
            sizes = zip(x.shape[2:], (block_q, block_kv), strict=True)
            pads = [(0, -n % block if n > 1 else 0) for n, block in sizes]
            x = jnp.pad(x, ((0, 0), (0, 0), *pads))
        rest[name] = x
    more_q = -operands["query"].shape[1] % block_q
    more_kv = -operands["key"].shape[1] % block_kv
    pads = {"query": (0, more_q), "key": (0, more_kv), "offset": (more_kv, more_q)}
    programs = {"mask_reads": spec.predicate, "score_reads": spec.score_mod}
    for name, program in programs.items():
        kinds = () if program is None else program.kinds
        rest[name] = [
            jnp.pad(x, ((0, 0), (0, 0), pads[kind])) if kind in pads else x
            for kind, x in zip(kinds, operands[name], strict=True)
        ]
    return rest


def unpad_read(x: Any, like: Any) -> Any:
    """A padded read's gradient cut back to the read; `like` gives kind and sizes.

    Args:
      x: gradient of what `padded_rest` made.
      like: (kind, read, padding of keys), the padding for "offset" reads alone.
    """
    kind, read, before = like
    if kind not in ("query", "key", "offset"):
        return x
    start = before if kind == "offset" else 0
    return x[..., start : start + read.shape[-1]]
