"""The neighborhood mask in tile order, as a mask program of the block-sparse kernels."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from pallas_kernels.maskprogram import PARTIAL, MaskProgram, floor_mod, mask_node
from pallas_kernels.neighborhood import boxes
from pallas_kernels.neighborhood.boxes import Boxes, Word
from pallas_kernels.neighborhood.layout import TokenLayout
from pallas_kernels.neighborhood.windows import Axis


@mask_node()
class NeighborhoodMask(MaskProgram):
    """Visible where a key is in the window of the query on every axis.

    Row b of the batch is dilation group b mod (number of groups). Indices are slots of a group in
    tile order; padding sees nothing and is not seen.

    Attributes:
      axes: the windows.
      q_layout, k_layout: order of the queries and of the keys.
      additional: number of keys behind the last slot that every query sees.
      rows: batch rows, groups included.
    """

    axes: tuple[Axis, ...]
    q_layout: TokenLayout
    k_layout: TokenLayout
    additional: int
    rows: int

    @property
    def batch_size(self) -> int | None:
        """None where all dilation groups are alike, since then all rows are."""
        return None if all(axis.is_even for axis in self.axes) else self.rows

    @property
    def shows_everything(self) -> bool:
        """Whether every slot is a token and every window a whole group."""
        whole = tuple(axis.longest for axis in self.axes)
        shapes = {whole, self.q_layout.group_shape, self.k_layout.group_shape}
        return len(shapes) == 1 and all(axis.is_full for axis in self.axes)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The key is inside the query's box."""
        return boxes.visible(self._tables()[1], self._group(b), q, k)

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        if xp is not np:  # intervals that are not known yet
            shape = np.broadcast_shapes(np.shape(b), np.shape(q0), np.shape(k0))
            return xp.full(shape, PARTIAL, xp.int8)
        return boxes.classify(self._tables()[0], self._group(b), q0, q1, k0, k1)

    def _group(self, b: Any) -> Any:
        return 0 if self.batch_size is None else floor_mod(b, self.q_layout.groups)

    def _tables(self) -> tuple[Boxes, list[Word]]:
        return _tables(self.axes, self.q_layout, self.k_layout, self.additional)


@functools.lru_cache(maxsize=32)
def _tables(
    axes: tuple[Axis, ...], q_layout: TokenLayout, k_layout: TokenLayout, additional: int
) -> tuple[Boxes, list[Word]]:
    """Boxes of all slots of a group (of every group where they differ), and the packed words."""
    at_q, at_k = q_layout.coordinates(), k_layout.coordinates()
    sizes = [max(pair) for pair in zip(q_layout.group_shape, k_layout.group_shape)]
    even = all(axis.is_even for axis in axes)
    groups = q_layout.group_coordinates()[:1] if even else q_layout.group_coordinates()
    first, last = (np.empty((len(axes), len(groups), at_q.shape[1]), np.int32) for _ in range(2))
    for row, group in enumerate(groups):
        real = np.ones(at_q.shape[1], bool)
        for i, axis in enumerate(axes):
            low, high = axis.bounds(int(group[i]))
            index = np.minimum(at_q[i], len(low) - 1)
            first[i, row], last[i, row] = low[index], high[index]
            real &= at_q[i] < len(low)
        first[:, row, ~real] = np.array(sizes, np.int32)[:, None]
        last[:, row, ~real] = -1
    low = high = at_k
    if additional:
        ends = np.array(sizes, np.int32)[:, None] - 1
        low = np.concatenate([at_k, np.zeros((len(axes), additional), np.int32)], axis=1)
        high = np.concatenate([at_k, np.broadcast_to(ends, (len(axes), additional))], axis=1)
    found = Boxes(first, last, low, high)
    return found, boxes.pack(found)
