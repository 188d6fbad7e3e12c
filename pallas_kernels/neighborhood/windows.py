"""The window of every query along one axis, and what the arguments of a call must satisfy.

Positions i of an axis of L tokens split into dilation groups g = i mod d, with in-group index
p = ⌊i / d⌋ and n = ⌊L / d⌋ + [g < L mod d] members. Within its group a query p sees the keys

    plain    a .. a + w - 1,  a = clip(l - ⌊w / 2⌋, 0, n - w),  l = min(⌊p / s⌋ s + ⌊s / 2⌋, n - 1)
    causal   max(l - w + 1, 0) .. p,                            l = min(⌊p / s⌋ s + s - 1, n - 1)

so a plain window is shifted at the borders and never cut, and an even one has one key more on the
left. On several axes the windows form a box.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of the layout.

    Attributes:
      length: L, in tokens. window: w, in keys. stride: s, queries that share a window.
      dilation: d. causal: whether a query sees only keys up to itself.
    """

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    @property
    def longest(self) -> int:
        """Members of the largest dilation group, ceil(L / d)."""
        return -(-self.length // self.dilation)

    @property
    def is_even(self) -> bool:
        """Whether all dilation groups have the same number of members."""
        return self.length % self.dilation == 0

    @property
    def is_full(self) -> bool:
        """Whether every query sees its whole dilation group."""
        return not self.causal and self.window * self.dilation == self.length

    def group_length(self, group: int) -> int:
        """Members n of a dilation group."""
        return self.length // self.dilation + (group < self.length % self.dilation)

    def bounds(self, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """First and last visible key of each query of a group, in-group indices [n] int32."""
        n, w, s = self.group_length(group), self.window, self.stride
        p = np.arange(n, dtype=np.int32)
        if self.causal:
            leader = np.minimum(p // s * s + s - 1, n - 1)
            return np.maximum(leader - w + 1, 0), p
        leader = np.minimum(p // s * s + s // 2, n - 1)
        first = np.clip(leader - w // 2, 0, n - w)
        return first, first + np.int32(w - 1)

    def pairs(self) -> int:
        """Visible (query, key) pairs of the whole axis."""
        total = 0
        for group in {0, self.dilation - 1}:  # only two sizes of groups occur
            first, last = self.bounds(group)
            alike = [g for g in range(self.dilation) if self.group_length(g) == len(first)]
            total += len(alike) * int((last - first + 1).sum())
            if self.is_even:
                break
        return total


def make_axes(
    shape: Sequence[int], kernel_size: Any, stride: Any, dilation: Any, is_causal: Any
) -> tuple[Axis, ...]:
    """Checked axes; each argument is one value for all axes or a sequence with one per axis.

    Raises:
      ValueError: when a window does not fit its axis, or a stride its window.
      TypeError: for sizes that are not integers, flags that are not booleans.
    """
    rank = len(shape)
    if not 1 <= rank <= 3:
        raise ValueError(
            f"neighborhood_attention: between 1 and 3 token axes are supported, got {rank}."
        )
    windows = per_axis("kernel_size", kernel_size, rank)
    strides = per_axis("stride", stride, rank)
    dilations = per_axis("dilation", dilation, rank)
    causal = per_axis("is_causal", is_causal, rank, kind=bool)
    axes = []
    for i, (n, w, s, d, c) in enumerate(zip(shape, windows, strides, dilations, causal)):
        if w * d > n:
            raise ValueError(
                f"neighborhood_attention: kernel_size={w} with dilation={d} spans {w * d} tokens, "
                f"but axis {i} has {n}; take a smaller window or dilation, pad the map, or use the "
                "module with auto_pad=True."
            )
        if s > w:
            raise ValueError(
                f"neighborhood_attention: stride={s} on axis {i} exceeds kernel_size={w}; queries "
                "would not see themselves. Use stride <= kernel_size; equal is blocked attention."
            )
        axes.append(Axis(int(n), w, s, d, c))
    return tuple(axes)


def per_axis(name: str, value: Any, rank: int, kind: type = int) -> tuple[Any, ...]:
    """One value per axis, from one for all or a sequence."""
    values = tuple(value) if np.ndim(value) else (value,) * rank
    if len(values) != rank:
        raise ValueError(
            f"neighborhood_attention: {name}={value!r} has {len(values)} entries for {rank} token "
            "axes; give one for all, or one per axis."
        )
    if kind is bool:
        if not all(isinstance(x, bool | np.bool_) for x in values):
            raise TypeError(f"neighborhood_attention: {name} must be boolean, got {value!r}.")
        return tuple(map(bool, values))
    if not all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in values):
        raise TypeError(f"neighborhood_attention: {name} must be integers, got {value!r}.")
    if min(values) < 1:
        raise ValueError(f"neighborhood_attention: {name}={value!r} must be at least 1.")
    return tuple(map(int, values))
