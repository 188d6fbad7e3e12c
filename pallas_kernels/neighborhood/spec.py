"""A neighborhood as a value: windows, tile shapes, and what they cost."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from pallas_kernels.neighborhood import tiles
from pallas_kernels.neighborhood.layout import TokenLayout
from pallas_kernels.neighborhood.mask import NeighborhoodMask
from pallas_kernels.neighborhood.windows import Axis, make_axes, per_axis


@dataclasses.dataclass(frozen=True)
class NeighborhoodSpec:
    """Windows on a map of tokens, and the tiles in which a kernel works on them.

    Arguments are one value for all axes, or one per axis.

    Args:
      shape: tokens along each of 1 to 3 axes.
      kernel_size: keys that a query sees along an axis.
      stride: queries that share a window; 1 is a window of its own for each.
      dilation: distance between the keys of a window, in tokens.
      is_causal: whether queries see only keys up to their own index.
      q_tile, kv_tile: tile shapes that the kernel is to use; None orders the tokens so that blocks
        of 128, 256, 512 and 1024 tokens are boxes, and leaves the choice among these to it.
      alike: whether queries and keys must be in one order, as arrays that stay in it are.
      order: an order that the tokens are in already.

    Example:
      >>> NeighborhoodSpec((256, 256), 80, stride=16).efficiency().overhead
      1.0
    """

    shape: tuple[int, ...]
    kernel_size: Any
    stride: Any = 1
    dilation: Any = 1
    is_causal: Any = False
    q_tile: Any = None
    kv_tile: Any = None
    alike: bool = False
    order: TokenLayout | None = None
    fixed: bool = dataclasses.field(init=False, default=False)

    def __post_init__(self) -> None:
        shape = tuple(int(n) for n in self.shape)
        axes = make_axes(shape, self.kernel_size, self.stride, self.dilation, self.is_causal)
        values: dict[str, Any] = {
            "shape": shape,
            "kernel_size": tuple(a.window for a in axes),
            "stride": tuple(a.stride for a in axes),
            "dilation": tuple(a.dilation for a in axes),
            "is_causal": tuple(a.causal for a in axes),
        }
        given = {
            name: None if tile is None else per_axis(name, tile, len(shape))
            for name, tile in (("q_tile", self.q_tile), ("kv_tile", self.kv_tile))
        }
        if self.order is not None:
            self._check_order(self.order, values["shape"], values["dilation"])
            given = {"q_tile": self.order.tile, "kv_tile": self.order.tile}
        if self.alike:
            same = given["q_tile"] or given["kv_tile"]
            if None not in given.values() and given["q_tile"] != given["kv_tile"]:
                raise ValueError(
                    "neighborhood_attention: arrays that stay in tile order have one tile shape, "
                    f"got q_tile={self.q_tile} and kv_tile={self.kv_tile}."
                )
            given = {"q_tile": same, "kv_tile": same}
        q_tile, kv_tile = tiles.choose_tiles(axes, **given, alike=self.alike)
        fixed = self.order is None and any(tile is not None for tile in given.values())
        values |= {"q_tile": q_tile, "kv_tile": kv_tile, "fixed": fixed}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @functools.cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The windows by axis."""
        parts = zip(self.shape, self.kernel_size, self.stride, self.dilation, self.is_causal)
        return tuple(Axis(*part) for part in parts)

    @property
    def is_full(self) -> bool:
        """Whether every query sees all tokens of its dilation group."""
        return all(axis.is_full for axis in self.axes)

    @property
    def q_layout(self) -> TokenLayout:
        """Tile order of the queries, and of the output."""
        return self.order or self._layout(0, self.q_tile)

    @property
    def kv_layout(self) -> TokenLayout:
        """Tile order of keys and values."""
        return self.order or self._layout(1, self.kv_tile)

    def _layout(self, side: int, tile: tuple[int, ...]) -> TokenLayout:
        splits = ((), ())
        if not self.fixed:
            splits = tiles.choose_splits(self.axes, self.q_tile, self.kv_tile, self.alike)
        return TokenLayout(self.shape, tile, self.dilation, splits[side])

    @property
    def block_sizes(self) -> tuple[int, int]:
        """(queries, keys) of a smallest tile, in tokens."""
        return math.prod(self.q_tile), math.prod(self.kv_tile)

    @property
    def box_sizes(self) -> tuple[int, ...]:
        """Sizes of blocks, in tokens, that are boxes of queries and boxes of keys."""
        q, k = (set(_sizes(layout)) for layout in (self.q_layout, self.kv_layout))
        return tuple(sorted(q & k))

    def mask(self, batch: int = 1, additional: int = 0) -> NeighborhoodMask:
        """The mask in tile order.

        Args:
          batch: batch rows, groups not counted.
          additional: keys behind the last slot that every query sees.
        """
        q, k = self.q_layout, self.kv_layout
        return NeighborhoodMask(self.axes, q, k, additional, batch * q.groups)

    def efficiency(
        self, block_q: int | None = None, block_kv: int | None = None
    ) -> tiles.Efficiency:
        """Visible and computed pairs, tiles with and without a mask, padding; `print` it.

        Args:
          block_q, block_kv: tokens of the kernel's blocks, 2^n tiles; None is one tile.

        Raises:
          ValueError: for sizes that are not boxes of the tile order.
        """
        boxes = [
            _box(name, layout, size)
            for name, layout, size in (
                ("block_q", self.q_layout, block_q), ("block_kv", self.kv_layout, block_kv),
            )
        ]  # fmt: skip
        return tiles.efficiency(self.axes, boxes[0], boxes[1])

    def permute_bytes(
        self, heads: int, width: int, *, kv_heads: int | None = None, itemsize: int = 2
    ) -> int:
        """Bytes that one batch row's forward pass moves to reorder its tokens.

        Queries, keys, values and the output are each read once and written once, the padding of
        the tile order included; `pre_permuted` calls move nothing.

        Args:
          heads, kv_heads: of queries, and of keys and values; None is as many.
          width: of a head.
          itemsize: bytes of a number.
        """
        if self.order is not None:
            return 0
        tokens = math.prod(self.shape)
        of_q, of_kv = (tokens + layout.length for layout in (self.q_layout, self.kv_layout))
        kv_heads = heads if kv_heads is None else kv_heads
        return 2 * (of_q * heads + of_kv * kv_heads) * width * itemsize

    @staticmethod
    def _check_order(order: TokenLayout, shape: tuple[int, ...], dilation: tuple[int, ...]) -> None:
        if order.shape != shape or order.dilation != dilation:
            raise ValueError(
                f"neighborhood_attention: shape={shape} with dilation={dilation} needs another "
                f"tile order than the given one, of shape={order.shape} with "
                f"dilation={order.dilation}; unpermute the tokens and permute them with "
                "token_layout(shape, dilation=...)."
            )


def _sizes(layout: TokenLayout) -> list[int]:
    return [math.prod(layout.tile) << level for level in range(len(layout.splits) + 1)]


def _box(name: str, layout: TokenLayout, size: int | None) -> tuple[int, ...]:
    """Shape of the box that `size` consecutive slots are."""
    sizes = _sizes(layout)
    if size is not None and size not in sizes:
        raise ValueError(
            f"NeighborhoodSpec: {name}={size} is no box of this tile order; use one of {sizes}."
        )
    return layout.block(sizes.index(size or sizes[0]))
