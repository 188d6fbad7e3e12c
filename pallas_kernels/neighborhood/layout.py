"""Tile order: tokens of an N-D layout arranged so that every tile is one run of the sequence.

The dilation groups come first, then the tiles of a group, then the tokens of a tile, each in
row-major order. Tiles may be nested: with `splits`, two neighboring tiles make a tile of twice the
size, two of these the next, so that blocks of several sizes are boxes of the map. One reshape and
one transpose bring an array there and back; the groups are then folded into the batch, since tokens
of different groups never meet.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """An order of the tokens of a map.

    Attributes:
      shape: tokens along each axis.
      tile: tokens of a tile along each axis.
      dilation: dilation along each axis; tokens that are equal modulo it form a group.
      splits: axes along which tiles are paired, the innermost pair first.

    Axes are padded to whole tiles of every dilation group, so `length` may exceed the number of
    tokens.
    """

    shape: tuple[int, ...]
    tile: tuple[int, ...]
    dilation: tuple[int, ...]
    splits: tuple[int, ...] = ()

    @property
    def grid(self) -> tuple[int, ...]:
        """Tiles of a group along each axis."""
        parts = zip(self.shape, self.tile, self.dilation, self._pairs())
        return tuple(-(-n // (b * d * p)) * p for n, b, d, p in parts)

    @property
    def groups(self) -> int:
        """Number of dilation groups of all axes together."""
        return math.prod(self.dilation)

    @property
    def group_shape(self) -> tuple[int, ...]:
        """Slots of a group along each axis, padding included."""
        return tuple(g * b for g, b in zip(self.grid, self.tile))

    @property
    def group_length(self) -> int:
        """Slots of a group."""
        return math.prod(self.group_shape)

    @property
    def length(self) -> int:
        """Slots of all groups: length of an array in this order."""
        return self.groups * self.group_length

    def block(self, level: int) -> tuple[int, ...]:
        """Shape of the box that prod(tile) * 2^level consecutive slots are."""
        doubled = self.splits[:level]
        return tuple(b << doubled.count(axis) for axis, b in enumerate(self.tile))

    def coordinates(self) -> np.ndarray:
        """In-group index along each axis of every slot of a group, [axes, group_length] int32."""
        return _coordinates(dataclasses.replace(self, dilation=(1,) * len(self.tile)), self.grid)

    def group_coordinates(self) -> np.ndarray:
        """Group along each axis, for every group, [groups, axes] int32."""
        return np.indices(self.dilation, dtype=np.int32).reshape(len(self.dilation), -1).T

    def is_token(self) -> np.ndarray:
        """Which slots hold a token and not padding, [length] booleans."""
        at, groups = self.coordinates(), self.group_coordinates()
        position = at[None] * np.array(self.dilation)[:, None] + groups[:, :, None]
        return (position < np.array(self.shape)[:, None]).all(axis=1).reshape(-1)

    def _pairs(self) -> tuple[int, ...]:
        """Tiles along each axis that the outermost pairing joins."""
        return tuple(1 << self.splits.count(axis) for axis in range(len(self.tile)))


@functools.lru_cache(maxsize=64)
def _coordinates(layout: TokenLayout, grid: tuple[int, ...]) -> np.ndarray:
    sizes = [g * b for g, b in zip(grid, layout.tile)]
    split, order = _plan(layout, grid)
    at = np.indices(sizes, dtype=np.int32).reshape(len(sizes), *split)
    at = at.transpose(0, *(1 + i for i in order)).reshape(len(sizes), -1)
    at.flags.writeable = False
    return at


@functools.lru_cache(maxsize=64)
def _plan(layout: TokenLayout, grid: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How the axes are split, and the order of the parts: groups, tiles, pairs, tokens.

    Each axis is split into (outermost tiles, 2, 2, ..., tokens of a tile, groups).
    """
    split: list[int] = []
    outer, inner, groups = [], [], []
    pairs: list[list[int]] = []
    parts = zip(grid, layout.tile, layout.dilation, layout._pairs())
    for n, b, d, paired in parts:
        first, levels = len(split), paired.bit_length() - 1
        split += [n // paired, *[2] * levels, b, d]
        outer.append(first)
        pairs.append(list(range(first + 1, first + 1 + levels)))
        inner.append(first + 1 + levels)
        groups.append(first + 2 + levels)
    # from the outermost pair inwards; an axis hands out its most significant part first
    nested = [pairs[axis].pop(0) for axis in reversed(layout.splits)]
    return tuple(split), (*groups, *outer, *nested, *inner)


def permute_tokens(x: jax.Array, layout: TokenLayout) -> jax.Array:
    """[b, *layout.shape, *rest] -> [b, layout.length, *rest] in tile order, zeros in the padding.

    Raises:
      ValueError: when the token axes of x are not those of the layout.
    """
    rank = len(layout.shape)
    if x.shape[1 : 1 + rank] != layout.shape:
        raise ValueError(
            f"permute_tokens: x must have shape [batch, *{layout.shape}, ...], got {x.shape}."
        )
    b, rest = x.shape[0], x.shape[1 + rank :]
    padded = [g * d for g, d in zip(layout.group_shape, layout.dilation)]
    pads = [(0, p - n) for p, n in zip(padded, layout.shape)]
    if any(extra for _, extra in pads):
        x = jnp.pad(x, ((0, 0), *pads, *((0, 0) for _ in rest)))
    split, order = _plan(layout, layout.grid)
    x = x.reshape(b, *split, *rest)
    x = x.transpose(0, *(1 + i for i in order), *range(1 + len(split), x.ndim))
    return x.reshape(b, layout.length, *rest)


def unpermute_tokens(x: jax.Array, layout: TokenLayout) -> jax.Array:
    """The inverse of `permute_tokens`; what is in the padding is dropped.

    Raises:
      ValueError: when axis 1 of x has not the length of the layout.
    """
    if x.ndim < 2 or x.shape[1] != layout.length:
        raise ValueError(
            f"unpermute_tokens: x must have shape [batch, {layout.length}, ...], got {x.shape}."
        )
    b, rest = x.shape[0], x.shape[2:]
    split, order = _plan(layout, layout.grid)
    x = x.reshape(b, *(split[i] for i in order), *rest)
    back = [1 + order.index(i) for i in range(len(split))]
    x = x.transpose(0, *back, *range(1 + len(split), x.ndim))
    x = x.reshape(b, *(g * d for g, d in zip(layout.group_shape, layout.dilation)), *rest)
    return x[(slice(None), *(slice(n) for n in layout.shape))]
