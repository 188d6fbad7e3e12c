"""Sizes, loads and stores of the Triton kernels of the linear recurrence."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.linear import chunk as tile
from pallas_kernels.linear import layout

Refs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes and options of one call.

    Attributes:
      batch, length, heads, key_width, value_width: b, t, h, k, v.
      chunk: c, tokens of a chunk, a power of two.
      k_tile, v_tile: tile of the state, powers of two.
      scale: factor on the output.
      dtype, wide: types of products and of states.
      decay, runs: whether there are decays, and segments.
      interpret: run step by step on any platform.
    """

    batch: int
    length: int
    heads: int
    key_width: int
    value_width: int
    chunk: int
    k_tile: int
    v_tile: int
    scale: float
    dtype: Any
    wide: Any
    decay: bool
    runs: bool
    interpret: bool

    @property
    def count(self) -> int:
        """The number of chunks."""
        return -(-self.length // self.chunk)

    @property
    def k_tiles(self) -> int:
        """The number of tiles of k."""
        return -(-self.key_width // self.k_tile)

    @property
    def v_tiles(self) -> int:
        """The number of tiles of v."""
        return -(-self.value_width // self.v_tile)

    @property
    def state_results(self) -> list[jax.ShapeDtypeStruct]:
        """States of all chunks [b, h, n, k, v] for products, and one state [b, h, k, v]."""
        one = (self.batch, self.heads, self.key_width, self.value_width)
        each = (*one[:2], self.count, *one[2:])
        return [jax.ShapeDtypeStruct(each, self.dtype), jax.ShapeDtypeStruct(one, self.wide)]

    def launch(self, kernel: str) -> tuple[int, int, int]:
        """Programs, warps of a program and depth of its pipelines."""
        rows = self.batch * self.heads
        if kernel in ("linear_states", "linear_state_gradients"):
            return rows * self.k_tiles * self.v_tiles, 4, 3
        tiles = self.k_tiles if kernel == "linear_key_gradients" else self.v_tiles
        return rows * self.count * tiles, 4, 2


def padded_width(n: int) -> int:
    """The power of two, at least 16, that holds n columns: what matrix instructions take."""
    return max(16, 1 << (n - 1).bit_length())


def split(x: Any, *sizes: int) -> list[Any]:
    """The digits of x >= 0 whose last ones run below `sizes`; the first one is what is left."""
    digits = []
    for n in reversed(sizes):
        digits.append(lax.rem(x, np.int32(n)))
        x = lax.div(x, np.int32(n))
    return [x, *reversed(digits)]


def load_tokens(plan: Plan, ref: Any, b: Any, h: Any, n: Any, at: int | Any, width: int) -> Any:
    """Chunk n of [b, t, h, x], columns `at` to `at + width`: [c, width], 0 outside the array."""
    place = ref.at[b, pl.ds(n * np.int32(plan.chunk), plan.chunk), h, pl.ds(at, width)]
    mask = _inside(plan, ref.shape[1], n, ref.shape[3], at, width)
    return compat.triton().load(place, mask=mask, other=None if mask is None else 0.0)


def store_tokens(plan: Plan, ref: Any, b: Any, h: Any, n: Any, at: Any, x: jax.Array) -> None:
    """Writes what of [c, width] lies inside [b, t, h, x]."""
    width = x.shape[1]
    place = ref.at[b, pl.ds(n * np.int32(plan.chunk), plan.chunk), h, pl.ds(at, width)]
    mask = _inside(plan, ref.shape[1], n, ref.shape[3], at, width)
    compat.triton().store(place, x.astype(ref.dtype), mask=mask)


def load_state(plan: Plan, ref: Any, lead: tuple[Any, ...], k_at: Any, v_at: Any) -> Any:
    """A tile of [..., k, v] at `lead`, 0 outside the array."""
    place = ref.at[*lead, pl.ds(k_at, plan.k_tile), pl.ds(v_at, plan.v_tile)]
    mask = _state_mask(plan, k_at, v_at)
    return compat.triton().load(place, mask=mask, other=None if mask is None else 0.0)


def store_state(
    plan: Plan, ref: Any, lead: tuple[Any, ...], k_at: Any, v_at: Any, x: jax.Array
) -> None:
    """Writes what of a tile lies inside [..., k, v]."""
    place = ref.at[*lead, pl.ds(k_at, plan.k_tile), pl.ds(v_at, plan.v_tile)]
    compat.triton().store(place, x.astype(ref.dtype), mask=_state_mask(plan, k_at, v_at))


def _span(start: Any, n: int, axis: int) -> jax.Array:
    shape = (n, 1) if axis == 0 else (1, n)
    return lax.broadcasted_iota(jnp.int32, shape, axis) + start


def _inside(plan: Plan, length: int, n: Any, columns: int, at: Any, width: int) -> Any:
    """Which entries of [c, width] lie inside [length, columns]; None when all must."""
    shape, mask = (plan.chunk, width), None
    if length % plan.chunk:
        mask = _span(n * np.int32(plan.chunk), plan.chunk, 0) < length
    if columns % width:
        inside = _span(at, width, 1) < columns
        mask = inside if mask is None else mask & inside
    return None if mask is None else jnp.broadcast_to(mask, shape)


def _state_mask(plan: Plan, k_at: Any, v_at: Any) -> Any:
    mask = None
    if plan.key_width % plan.k_tile:
        mask = _span(k_at, plan.k_tile, 0) < plan.key_width
    if plan.value_width % plan.v_tile:
        inside = _span(v_at, plan.v_tile, 1) < plan.value_width
        mask = inside if mask is None else mask & inside
    return None if mask is None else jnp.broadcast_to(mask, (plan.k_tile, plan.v_tile))


class Factors:
    """The decay factors of one chunk, read when they are needed.

    Args:
      plan: sizes.
      refs: references by name.
      b, h, n: batch row, head and chunk.
    """

    def __init__(self, plan: Plan, refs: Refs, b: Any, h: Any, n: Any):
        self.plan, self.ref = plan, refs.get("factors")
        self.b, self.h, self.n = b, h, n

    def _read(self, row: int) -> jax.Array:
        return self.ref[*self._lead(), row, :]

    def _lead(self) -> tuple[Any, Any, Any]:
        """Indices of the axes of rows and heads, which may be shared, and of chunks."""
        b = self.b if self.ref.shape[0] > 1 else 0
        return b, self.h if self.ref.shape[1] > 1 else 0, self.n

    @property
    def row(self) -> Any:
        """`scale` times the decay from the state before the chunk: [c, 1], or None for 1."""
        if self.ref is not None:
            return self._read(layout.ROW)[:, None]
        scale = self.plan.scale
        return None if scale == 1.0 else jnp.full((1, 1), scale, self.plan.wide)

    @property
    def col(self) -> Any:
        """The decay to the end of the chunk: [c, 1], or None for 1."""
        return None if self.ref is None else self._read(layout.COL)[:, None]

    @property
    def whole(self) -> Any:
        """The decay over the chunk: [1, 1], or None for 1."""
        if self.ref is None:
            return None
        return jnp.full((1, 1), self.ref[*self._lead(), layout.WHOLE, 0])

    @property
    def pair(self) -> jax.Array:
        """`scale` times the decay from key to query, 0 where the key comes later: [c, c]."""
        c = self.plan.chunk
        visible = _span(0, c, 0) >= _span(0, c, 1)
        if self.plan.runs:
            run = self._read(layout.RUN)
            visible &= run[:, None] == run[None, :]
        exponent = None
        if self.plan.decay:
            parts = [self._read(n) for n in (layout.COARSE, layout.FINE)]
            differences = [x[:, None] - x[None, :] for x in parts]
            exponent = differences[0] + differences[1]
        return tile.pair_decay(exponent, visible, self.plan.wide) * jnp.asarray(
            self.plan.scale, self.plan.wide
        )
