"""Windows on maps of 1 to 3 token axes, as a mask on tokens in row-major order."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from attnjax.masks.arguments import check_int
from attnjax.masks.base import Mask
from pallas_kernels.maskprogram import PARTIAL, mask_node
from pallas_kernels.neighborhood import boxes
from pallas_kernels.neighborhood.boxes import Boxes, Word
from pallas_kernels.neighborhood.windows import Axis, make_axes


@mask_node()
class Neighborhood(Mask):
    """A box of keys around each query of a map, shifted at the borders and never cut.

        visible iff on every axis  q ≡ k (mod dilation)  and  first(q) <= ⌊k / dilation⌋ <= last(q)

    with the windows of `pallas_kernels.neighborhood.windows` (NATTEN's). Query and key i are token
    i of the map in row-major order. `attnjax.functional.neighborhood_attention` visits fewer tiles,
    since it reorders the tokens; use the mask to combine windows with others, or to see them.

    Args:
      shape: tokens along each of 1 to 3 axes.
      kernel_size: keys that a query sees along an axis; one value for all axes or one for each,
        like all that follows.
      stride: queries that share a window, at most kernel_size.
      dilation: distance between the keys of a window.
      is_causal: whether a query sees keys up to its own index only.
      additional: number of keys behind the map that every query sees.
    """

    shape: tuple[int, ...]
    kernel_size: Any
    stride: Any = 1
    dilation: Any = 1
    is_causal: Any = False
    additional: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        check_int("Neighborhood", "additional", self.additional, 0)
        axes = make_axes(self.shape, self.kernel_size, self.stride, self.dilation, self.is_causal)
        for name, field in (
            ("kernel_size", "window"),
            ("stride", "stride"),
            ("dilation", "dilation"),
            ("is_causal", "causal"),
        ):
            object.__setattr__(self, name, tuple(getattr(axis, field) for axis in axes))

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The key is inside the query's box."""
        return boxes.visible(self._tables()[1], 0, q, k)

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        if xp is not np:  # intervals that are not known yet
            return xp.full(np.broadcast_shapes(np.shape(q0), np.shape(k0)), PARTIAL, xp.int8)
        return boxes.classify(self._tables()[0], np.zeros((1,) * q0.ndim, int), q0, q1, k0, k1)

    def _tables(self) -> tuple[Boxes, list[Word]]:
        parts = zip(self.shape, self.kernel_size, self.stride, self.dilation, self.is_causal)
        return _tables(tuple(Axis(*part) for part in parts), self.additional)


@functools.lru_cache(maxsize=32)
def _tables(axes: tuple[Axis, ...], additional: int) -> tuple[Boxes, list[Word]]:
    """Boxes in row-major order: in-group index by axis, and the group where there are several."""
    at = np.indices([axis.length for axis in axes], dtype=np.int32).reshape(len(axes), -1)
    first, last, key = [], [], []
    for axis, i in zip(axes, at):
        group, p = i % axis.dilation, i // axis.dilation
        bounds = [axis.bounds(g) for g in range(axis.dilation)]
        starts = np.cumsum([0, *(len(low) for low, _ in bounds)])[group]
        lows, highs = (np.concatenate(x) for x in zip(*bounds))
        first.append(lows[starts + p])
        last.append(highs[starts + p])
        key.append(p)
        if axis.dilation > 1:
            for x in (first, last, key):
                x.append(group)
    low = high = np.stack(key)
    if additional:
        most = low.max(axis=1, keepdims=True)
        low = np.pad(low, ((0, 0), (0, additional)))
        high = np.concatenate([high, np.repeat(most, additional, axis=1)], axis=1)
    found = Boxes(np.stack(first)[:, None], np.stack(last)[:, None], low, high)
    assert low.shape[1] == math.prod(axis.length for axis in axes) + additional
    return found, boxes.pack(found)
