"""Block lists as the TPU kernels walk them: one packed word per step of the grid.

A walk visits the listed tiles row by row. Every word holds a tile's row, column and class, and
whether it is the first or last of its row, so that the grid has no empty steps. A row without any
tile still has one step, of class EMPTY, which writes its results. Words are scalars in SMEM.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.maskprogram import EMPTY, FULL, PARTIAL

SMEM_BYTES = 768 << 10
"""Most bytes of a list; the scalar memory of every generation since v5e is 1 MiB."""

LAST, FIRST, CLASS_SHIFT, COLUMN_SHIFT = 1, 2, 2, 4


@dataclasses.dataclass(frozen=True)
class Walk:
    """The steps of a kernel, per batch row and head (or group of heads).

    Attributes:
      words: [nb * nl * capacity] int32; bits from the lowest: last, first, class (2), column,
        member, row. Steps after a row's own repeat the last tile as EMPTY: nothing is fetched.
      steps: length of the grid's axis, an integer or traced.
      capacity: words of each (batch row, head).
      nb, nl: 1 or the number of batch rows; 1 or the number of heads (or groups).
      columns, members: sizes of these fields.
      any_full, any_partial: whether such tiles may occur.
      overflow: traced, [nb] whether the list was longer than its capacity, or None.
    """

    words: Any
    steps: Any
    capacity: int
    nb: int
    nl: int
    columns: int
    members: int
    any_full: bool
    any_partial: bool
    overflow: Any = None

    def word(self, words: Any, b: Any, line: Any, step: Any) -> Any:
        """The word of a step, from the array in SMEM."""
        index = step
        if self.nb > 1:
            index = index + b * (self.nl * self.capacity)
        if self.nl > 1:
            index = index + line * self.capacity
        return words[index]

    def row(self, word: Any) -> Any:
        """Row of a word's tile."""
        shift = COLUMN_SHIFT + _bits(self.columns) + _bits(self.members)
        return lax.shift_right_logical(word, jnp.int32(shift))

    def column(self, word: Any) -> Any:
        """Column of a word's tile."""
        mask = (1 << _bits(self.columns)) - 1
        return lax.shift_right_logical(word, jnp.int32(COLUMN_SHIFT)) & jnp.int32(mask)

    def member(self, word: Any) -> Any:
        """Head of the group that a word belongs to."""
        shift, mask = COLUMN_SHIFT + _bits(self.columns), (1 << _bits(self.members)) - 1
        return lax.shift_right_logical(word, jnp.int32(shift)) & jnp.int32(mask)


def kind(word: Any) -> Any:
    """Class of a word's tile."""
    return lax.shift_right_logical(word, jnp.int32(CLASS_SHIFT)) & jnp.int32(3)


def is_first(word: Any) -> Any:
    """Whether a row of tiles begins."""
    return (word & jnp.int32(FIRST)) != 0


def is_last(word: Any) -> Any:
    """Whether a row of tiles ends."""
    return (word & jnp.int32(LAST)) != 0


def make_walk(classes: Any, *, members: int = 1, max_per_row: int | None = None) -> Walk:
    """The walk over a map of classes.

    Args:
      classes: [nb, nl, rows, columns * members], NumPy or traced; column c of member m at
        m * columns + c.
      members: heads of a group whose tiles share a row.
      max_per_row: a traced list has room for this many tiles per row on average; None: for all.

    Raises:
      Unsupported: when the list does not fit into scalar memory.
    """
    nb, nl, rows, width = classes.shape
    columns = width // members
    if COLUMN_SHIFT + _bits(columns) + _bits(members) + _bits(rows) > 31:
        raise Unsupported(
            f"flash: {rows} x {columns} tiles are more than the TPU kernel's lists can name; take "
            "larger tiles (config), or use implementation='xla'."
        )
    if isinstance(classes, jax.Array):
        capacity = rows * min(width, max_per_row or width)
        _check_size(nb * nl * capacity, nb * nl)
        words, count = _traced(classes, columns, members, capacity)
        overflow = None
        if capacity < rows * width:
            overflow = jnp.any(count > capacity, axis=1)
        steps = jnp.minimum(jnp.max(count), jnp.int32(capacity))
        any_full = any_partial = True
    else:
        words = _static(np.asarray(classes), columns, members)
        capacity = steps = words.shape[-1]
        _check_size(words.size, nb * nl)
        any_full, any_partial = (bool((classes == c).any()) for c in (FULL, PARTIAL))
        overflow = None
    return Walk(
        jnp.asarray(words).reshape(-1), steps, capacity, nb, nl, columns, members, any_full,
        any_partial, overflow,
    )  # fmt: skip


def _static(classes: np.ndarray, columns: int, members: int) -> np.ndarray:
    """Words [nb, nl, longest list]."""
    nb, nl, rows, _ = classes.shape
    listed = classes != EMPTY
    listed[..., 0] |= ~listed.any(-1)
    b, line, row, place = np.nonzero(listed)
    owner = b * nl + line
    index = owner * rows + row  # increasing
    first = np.diff(index, prepend=-1) != 0
    last = np.diff(index, append=-1) != 0
    words = _pack(np, classes[b, line, row, place].astype(np.int32), row, place, columns, members)
    count = np.bincount(owner, minlength=nb * nl)
    ends = np.cumsum(count)
    padding = words[ends - 1]  # no class, neither first nor last
    padding = padding - (padding & ((1 << COLUMN_SHIFT) - 1))
    out = np.repeat(padding[:, None], count.max(), axis=1)
    position = np.arange(len(words)) - (ends - count)[owner]
    out[owner, position] = words + first * FIRST + last * LAST
    return out.reshape(nb, nl, -1).astype(np.int32)


def _traced(classes: Any, columns: int, members: int, capacity: int) -> tuple[Any, Any]:
    """(words [nb, nl, capacity], count [nb, nl]) under jit."""
    nb, nl, rows, width = classes.shape
    classes = classes.astype(jnp.int32)
    place = lax.broadcasted_iota(jnp.int32, classes.shape, 3)
    row = lax.broadcasted_iota(jnp.int32, classes.shape, 2)
    empty = ~jnp.any(classes != EMPTY, axis=-1, keepdims=True)
    listed = (classes != EMPTY) | (empty & (place == 0))
    rank = jnp.cumsum(listed, axis=-1, dtype=jnp.int32)
    first, last = rank == 1, rank == rank[..., -1:]
    words = _pack(jnp, classes, row, place, columns, members)
    words = words + jnp.where(first, jnp.int32(FIRST), jnp.int32(0))
    words = words + jnp.where(last, jnp.int32(LAST), jnp.int32(0))
    words, flat = (x.reshape(nb, nl, rows * width) for x in (words, listed))
    count = flat.sum(-1, dtype=jnp.int32)
    order = jnp.argsort(~flat, axis=-1, stable=True)[..., :capacity]
    words = jnp.take_along_axis(words, order, axis=-1)
    final = jnp.clip(count[..., None] - 1, 0, capacity - 1)
    padding = jnp.take_along_axis(words, final, axis=-1) & jnp.int32(-(1 << COLUMN_SHIFT))
    step = lax.broadcasted_iota(jnp.int32, words.shape, 2)
    return jnp.where(step < count[..., None], words, padding), count


def _pack(xp: Any, classes: Any, row: Any, place: Any, columns: int, members: int) -> Any:
    wide = _bits(columns)
    if members == 1:
        column, member = place, xp.zeros_like(place)
    elif xp is np:
        member, column = place // columns, place % columns
    else:
        size = xp.full_like(place, columns)
        member, column = lax.div(place, size), lax.rem(place, size)
    shift = COLUMN_SHIFT + wide
    word = classes * (1 << CLASS_SHIFT) + column * (1 << COLUMN_SHIFT)
    return word + member * (1 << shift) + row * (1 << (shift + _bits(members)))


def _bits(size: int) -> int:
    return (size - 1).bit_length()


def _check_size(words: int, lists: int) -> None:
    if 4 * words > SMEM_BYTES:
        raise Unsupported(
            f"flash: the block lists of {lists} (batch row, head) pairs take {4 * words:,} bytes "
            f"of scalar memory, of {SMEM_BYTES:,}; take larger tiles (config.block_q, block_kv), "
            "config.max_blocks, a mask shared by rows or heads, or implementation='xla'."
        )
