"""Masks made of blocks, and of user functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from attnjax.masks.arguments import check_int, check_integers, show_value
from attnjax.masks.base import Mask
from pallas_kernels.maskprogram import (
    PARTIAL,
    floor_div,
    floor_mod,
    like,
    look_up,
    mask_node,
    to_class,
)


@mask_node("offset")
class Strided(Mask):
    """Causal attention to near blocks and to every n-th block: LongGen; S2 with offsets by head.

        visible iff k <= q and (I - J < local_blocks or J mod stride = offset_h),
        I = floor(q / block), J = floor(k / block)

    Args:
      block: tokens per block.
      stride: every how many blocks one stays visible; 1 is plain causal attention.
      local_blocks: number of blocks that are visible as a whole, counting the query's own; at least
        1.
      offset: residue of the visible blocks, taken modulo `stride`; 0 keeps the first block as a
        sink. An integer for all heads, or a sequence or array [h].

    Reference: Ge et al., "A Little Goes a Long Way", 2024, arXiv:2410.01485; Lin et al., "Efficient
    LLM Training and Serving with Heterogeneous Context Sharding among Attention Heads", 2024,
    arXiv:2407.17678: there head h has offset -(h * step + head_offset).
    """

    block: int
    stride: int
    local_blocks: int = 1
    offset: Any = 0

    def __post_init__(self) -> None:
        for name in ("block", "stride", "local_blocks"):
            check_int("Strided", name, getattr(self, name), 1)
        if isinstance(self.offset, jax.Array):
            offset: Any = check_integers("Strided", "offset", self.offset, 0, 1)
        elif np.ndim(self.offset) == 0:
            check_int("Strided", "offset", self.offset, -(2**31))
            offset = int(self.offset) % self.stride
        else:
            # numbers that are known now belong to the structure: lists stay static inside jit
            offset = check_integers("Strided", "offset", np.asarray(self.offset), 1)
            offset = tuple(int(i) % self.stride for i in offset)
        if np.ndim(offset) and np.shape(offset)[0] == 0:
            raise ValueError("Strided: offset must name at least one head, got an empty sequence.")
        object.__setattr__(self, "offset", offset)

    @property
    def num_heads(self) -> int | None:
        """Length of the offsets, None when one serves all heads."""
        return np.shape(self.offset)[0] if np.ndim(self.offset) else None

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """Causal, and in a local or a strided block."""
        i, j = floor_div(q, self.block), floor_div(k, self.block)
        strided = floor_mod(j - self._offset(h, j), self.stride) == 0
        return (k <= q) & ((i - j < self.local_blocks) | strided)

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        offset = self._offset(h, k0)
        first_i, last_i = floor_div(q0, self.block), floor_div(q1 - 1, self.block)
        first_j = floor_div(k0, self.block)
        # a key is local to some later query of the tile iff its block is near the first query's
        # block
        end = xp.minimum(k1, q1)
        local = xp.maximum(k0, (first_i - self.local_blocks + 1) * self.block) < end
        strided = (k0 < end) & (
            _residues(first_j, floor_div(end - 1, self.block), offset, self.stride) > 0
        )
        # blocks that are not local to the last query must all be strided ones
        last_far = xp.minimum(floor_div(k1 - 1, self.block), last_i - self.local_blocks)
        far = xp.maximum(last_far - first_j + 1, 0)
        full = (k1 - 1 <= q0) & (
            (far == 0) | (_residues(first_j, last_far, offset, self.stride) == far)
        )
        return to_class(xp, xp.logical_not(local | strided), full)

    def _offset(self, h: Any, index: Any) -> Any:
        """Offset of head h in the integer type of `index`."""
        if isinstance(self.offset, int):
            return self.offset
        if isinstance(self.offset, tuple):
            # a sum of comparisons needs no table in memory; h is a scalar inside kernels
            head = h if hasattr(h, "dtype") else np.int32(h)
            return sum(like(head == i, index) * n for i, n in enumerate(self.offset) if n)
        return like(look_up(self.offset, h) if self.offset.ndim else self.offset, index)


@mask_node("pattern")
class BlockPattern(Mask):
    """A boolean for each block of queries and keys.

        visible iff pattern[h, floor(q / block_q), floor(k / block_kv)]

    Nothing outside the pattern is visible. Tiles of any size are classified exactly.

    Args:
      pattern: booleans [nq, nk], [h or 1, nq, nk] or [b or 1, h or 1, nq, nk].
      block_q, block_kv: tokens per block; `block_kv` None means `block_q`.
    """

    pattern: Any
    block_q: int
    block_kv: Any = None

    def __post_init__(self) -> None:
        pattern = self.pattern if hasattr(self.pattern, "dtype") else np.asarray(self.pattern)
        if pattern.dtype != np.bool_:
            raise TypeError(
                f"BlockPattern: pattern must be boolean (True = attend), got {pattern.dtype} of "
                f"shape {pattern.shape}; compare it, for example pattern > 0."
            )
        if pattern.ndim not in (2, 3, 4) or 0 in pattern.shape:
            raise ValueError(
                "BlockPattern: pattern must have shape [nq, nk], [heads, nq, nk] or "
                f"[batch, heads, nq, nk] without empty axes, got {pattern.shape}."
            )
        object.__setattr__(
            self, "pattern", pattern.reshape((1,) * (4 - pattern.ndim) + pattern.shape)
        )
        check_int("BlockPattern", "block_q", self.block_q, 1)
        if self.block_kv is None:
            object.__setattr__(self, "block_kv", self.block_q)
        check_int("BlockPattern", "block_kv", self.block_kv, 1)

    @property
    def num_heads(self) -> int | None:
        """Heads of the pattern, None when one serves all."""
        return self.pattern.shape[1] if self.pattern.shape[1] > 1 else None

    @property
    def batch_size(self) -> int | None:
        """Rows of the pattern, None when one serves all."""
        return self.pattern.shape[0] if self.pattern.shape[0] > 1 else None

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The block's boolean; False outside the pattern."""
        *_, nq, nk = self.pattern.shape
        inside = (q >= 0) & (q < nq * self.block_q) & (k >= 0) & (k < nk * self.block_kv)
        return inside & look_up(
            self.pattern, b, h, floor_div(q, self.block_q), floor_div(k, self.block_kv)
        )

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        *_, nq, nk = self.pattern.shape
        count = xp.pad(self.pattern.astype(np.int32), ((0, 0), (0, 0), (1, 0), (1, 0)))
        # sums over all leading rectangles: any rectangle is four look-ups
        count = count.cumsum(-2, dtype=np.int32).cumsum(-1, dtype=np.int32)
        i0, i1 = floor_div(q0, self.block_q), floor_div(q1 - 1, self.block_q) + 1
        j0, j1 = floor_div(k0, self.block_kv), floor_div(k1 - 1, self.block_kv) + 1
        area = (i1 - i0) * (j1 - j0)
        inside = (
            look_up(count, b, h, i1, j1)
            - look_up(count, b, h, i0, j1)
            - look_up(count, b, h, i1, j0)
            + look_up(count, b, h, i0, j0)
        )
        return to_class(xp, inside == 0, inside == area)


@mask_node("operands")
class Predicate(Mask):
    """A mask given by a user's function on indices.

        visible iff fn(b, h, q, k, *operands)

    Tiles are PARTIAL unless `classifier` knows better, so a kernel visits all of them; combine with
    masks that have a formula to skip tiles, as in `Window(512) & Predicate(fn)`.

    Args:
      fn: function of integer arrays (traced, broadcastable) and of the operands, returning
        booleans. Its identity belongs to the mask's structure: pass the same function object to
        avoid recompiling.
      *operands: arrays the function needs; passing them here instead of closing over them lets
        their values change without recompiling.
      num_heads, batch_size: needed when the function depends on h or b.
      classifier: function (q0, q1, k0, k1) of arrays of interval ends, returning EMPTY, PARTIAL,
        FULL.
    """

    fn: Callable[..., Any]
    operands: tuple[Any, ...]
    heads: int | None
    rows: int | None
    classifier: Callable[..., Any] | None

    def __init__(
        self,
        fn: Callable[..., Any],
        *operands: Any,
        num_heads: int | None = None,
        batch_size: int | None = None,
        classifier: Callable[..., Any] | None = None,
    ):
        if not callable(fn):
            raise TypeError(
                f"Predicate: fn must be a function of (b, h, q, k), got {type(fn).__name__}."
            )
        for name, size in (("num_heads", num_heads), ("batch_size", batch_size)):
            if size is not None:
                check_int("Predicate", name, size, 1)
        arrays = tuple(x if hasattr(x, "dtype") else np.asarray(x) for x in operands)
        values = {"fn": fn, "operands": arrays, "heads": num_heads, "rows": batch_size}
        for name, value in (*values.items(), ("classifier", classifier)):
            object.__setattr__(self, name, value)

    @property
    def num_heads(self) -> int | None:
        """As given."""
        return self.heads

    @property
    def batch_size(self) -> int | None:
        """As given."""
        return self.rows

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The user's function."""
        visible = self.fn(b, h, q, k, *self.operands)
        if getattr(visible, "dtype", np.dtype(type(visible))) != np.bool_:
            raise TypeError(
                f"Predicate: {show_value(self.fn)} must return booleans, got "
                f"{getattr(visible, 'dtype', type(visible).__name__)}."
            )
        return visible

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        if self.classifier is not None:
            return xp.asarray(self.classifier(q0, q1, k0, k1)).astype(xp.int8)
        return xp.full(np.broadcast_shapes(q0.shape, k0.shape), PARTIAL, xp.int8)

    def __repr__(self) -> str:
        """The function's name and its operands."""
        return f"Predicate({', '.join(map(show_value, (self.fn, *self.operands)))})"


def _residues(first: Any, last: Any, offset: Any, stride: int) -> Any:
    """How many integers of first .. last leave the remainder `offset`."""
    return floor_div(last - offset, stride) - floor_div(first - 1 - offset, stride)
