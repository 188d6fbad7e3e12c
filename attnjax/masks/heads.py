"""A different mask for each head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnjax.masks.base import Mask, common_size
from pallas_kernels.maskprogram import mask_node


@mask_node("masks")
class PerHead(Mask):
    """One mask for each query head; made by `per_head`."""

    masks: tuple[Mask, ...]
    of_head: tuple[int, ...]

    @property
    def num_heads(self) -> int:
        """Number of masks given."""
        return len(self.of_head)

    @property
    def batch_size(self) -> int | None:
        """Rows told apart by any head's mask."""
        return common_size("batch_size", self.masks)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The predicate of head h."""
        visible = q != q
        for index, mask in enumerate(self.masks):
            visible = visible | (self._uses(h, index) & mask.predicate(b, h, q, k))
        return visible

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        classes = xp.zeros((1,) * q0.ndim, xp.int8)
        for index, mask in enumerate(self.masks):
            mine = mask._classify(xp, b, h, q0, q1, k0, k1)
            classes = classes + mine * xp.asarray(self._uses(h, index)).astype(xp.int8)
        return classes

    def _uses(self, h: Any, index: int) -> Any:
        """Whether head h has the mask of this index, as few comparisons as runs of heads."""
        heads = np.flatnonzero(np.asarray(self.of_head) == index)
        uses = h != h
        for run in np.split(heads, np.flatnonzero(np.diff(heads) > 1) + 1):
            low, high = int(run[0]), int(run[-1])
            uses = uses | ((h == low) if low == high else (h >= low) & (h <= high))
        return uses

    def __repr__(self) -> str:
        """The call of `per_head`."""
        return f"per_head([{', '.join(repr(self.masks[i]) for i in self.of_head)}])"


def per_head(masks: Sequence[Mask]) -> Mask:
    """A different mask for each query head.

    Args:
      masks: one mask per head, in order; equal masks are stored and evaluated once.

    Raises:
      ValueError: for an empty sequence, or a member made for another number of heads.
      TypeError: for a member that is not a mask.

    Example:
      >>> per_head([Causal(), Window(4)]).num_heads
      2
    """
    masks = list(masks)
    if not masks:
        raise ValueError("per_head: needs one mask per head, got an empty sequence.")
    distinct, of_head = [], []
    for i, mask in enumerate(masks):
        if not isinstance(mask, Mask):
            raise TypeError(f"per_head: member {i} must be a mask, got {type(mask).__name__}.")
        if mask.num_heads not in (None, len(masks)):
            raise ValueError(
                f"per_head: {len(masks)} masks were given, but member {i}, {mask!r}, is made for "
                f"{mask.num_heads} heads."
            )
        if mask not in distinct:
            distinct.append(mask)
        of_head.append(distinct.index(mask))
    common_size("batch_size", tuple(distinct))
    return PerHead(tuple(distinct), tuple(of_head))
