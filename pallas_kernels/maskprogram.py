"""What a kernel needs to know about a mask: a predicate on indices and a classifier of tiles.

A mask program is a small immutable tree that never holds a t x s array. It answers two questions:

    predicate(b, h, q, k)          is key k visible to query q (row b of the batch, head h)?
    classify(q0, q1, k0, k1)       is the tile [q0, q1) x [k0, k1) empty, full, or neither?

The predicate is traced into kernels. The classifier decides before a kernel runs which tiles it
visits (`pallas_kernels.blocklist`). The mask classes themselves are in `attnjax.masks`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

EMPTY, PARTIAL, FULL = 0, 1, 2
"""Classes of a tile; their order makes `both`, `either` and `negate` arithmetic."""

Index = Any
"""An integer, a NumPy or a JAX array of integers, traced or not."""


_Class = TypeVar("_Class")


class MaskProgram:
    """Base class of masks: a JAX pytree with arrays as leaves and everything else in its structure.

    `jax.tree.structure(mask)` is therefore the hashable identity of the mask's code, and array
    values may change under `jax.jit` without recompiling. Subclasses are declared with `mask_node`
    and implement `predicate` and `_classify`.
    """

    __array_ufunc__ = None  # lets `array & mask` reach the mask, which then explains itself

    @property
    def num_heads(self) -> int | None:
        """Number of heads the mask tells apart, or None when it is the same for every head."""
        return None

    @property
    def batch_size(self) -> int | None:
        """Number of batch rows the mask tells apart, or None when it is the same for every row."""
        return None

    @property
    def shows_everything(self) -> bool:
        """Whether the mask is known to hide nothing, so that it need not be evaluated."""
        return False

    @property
    def is_static(self) -> bool:
        """Whether every array of the mask has a value now, so that NumPy can classify tiles."""
        return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self))

    def predicate(self, b: Index, h: Index, q: Index, k: Index) -> Any:
        """Which pairs are visible: True where query q of row b and head h may attend to key k.

        Args:
          b, h, q, k: integers or integer arrays (NumPy, JAX, or traced inside a kernel),
            broadcastable.

        Returns:
          Booleans, broadcastable to the common shape of the arguments.
        """
        raise NotImplementedError(f"{type(self).__name__} must define predicate(b, h, q, k).")

    def classify(
        self, q0: Index, q1: Index, k0: Index, k1: Index, *, b: Index = None, h: Index = None
    ) -> Any:
        """Class of each tile [q0, q1) x [k0, k1): EMPTY, PARTIAL or FULL.

        EMPTY and FULL are promises; PARTIAL claims nothing. A tile without elements is EMPTY.

        Args:
          q0, q1, k0, k1: half-open index intervals; arrays of any broadcastable shapes.
          b, h: rows and heads, broadcastable with the intervals. None asks about all of them at
            once.

        Returns:
          int8 of the common shape: NumPy where everything has a value, else a traced JAX array.
        """
        given = [x for x in (q0, q1, k0, k1, b, h) if x is not None]
        static = self.is_static and not any(isinstance(x, Tracer) for x in given)
        xp = np if static else jnp
        rank = max(np.ndim(x) for x in given)
        # two leading axes hold the rows and heads that were not named
        b4 = _spread(xp, b, self.batch_size, rank + 2, axis=0)
        h4 = _spread(xp, h, self.num_heads, rank + 2, axis=1)
        q0, q1, k0, k1 = (_with_rank(xp, x, rank + 2) for x in (q0, q1, k0, k1))
        # NumPy leaves: an operation on a concrete JAX array would be traced inside jit
        mask = jax.tree.map(np.asarray, self) if static else self
        classes = mask._classify(xp, b4, h4, q0, q1, k0, k1) * _int8(xp, (q0 < q1) & (k0 < k1))
        return _agreement(xp, classes, axis=(0, 1))

    def _classify(
        self, xp: Any, b: Index, h: Index, q0: Index, q1: Index, k0: Index, k1: Index
    ) -> Any:
        """`classify` for arrays of `xp` (numpy or jax.numpy), all of one rank, no tile empty."""
        raise NotImplementedError(
            f"{type(self).__name__} must define _classify(xp, b, h, q0, q1, k0, k1)."
        )

    def __eq__(self, other: object) -> bool:
        """Equal masks have equal structures and array values (or the very same tracers)."""
        if type(self) is not type(other):
            return NotImplemented
        mine, theirs = jax.tree.flatten(self), jax.tree.flatten(other)
        return mine[1] == theirs[1] and all(map(_same, mine[0], theirs[0]))

    def __hash__(self) -> int:
        """Hash of the structure; array values do not enter, only equality looks at them."""
        return hash(jax.tree.structure(self))


@dataclass_transform(frozen_default=True, eq_default=False)
def mask_node(*arrays: str) -> Callable[[type[_Class]], type[_Class]]:
    """Class decorator: makes a frozen dataclass whose fields named in `arrays` are pytree children.

    Such a field may also hold a Python integer or a tuple of integers; it is then part of the
    static structure. Checks of arguments belong into `__post_init__`; they do not run when JAX
    rebuilds a mask.
    """

    def declare(cls: type[_Class]) -> type[_Class]:
        cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        names = tuple(field.name for field in dataclasses.fields(cast(Any, cls)))

        def children(mask: Any) -> tuple[str, ...]:
            # remembered when a mask is rebuilt: JAX also builds masks whose leaves are placeholders
            known = mask.__dict__.get("_children")
            return known or tuple(n for n in arrays if not _is_static_value(getattr(mask, n)))

        def flatten_with_keys(mask: Any):
            leaves = children(mask)
            static = tuple((n, getattr(mask, n)) for n in names if n not in leaves)
            keyed = [(jax.tree_util.GetAttrKey(n), getattr(mask, n)) for n in leaves]
            return keyed, (leaves, static)

        def flatten(mask: Any):
            keyed, static = flatten_with_keys(mask)
            return [value for _, value in keyed], static

        def unflatten(structure: Any, values: Any):
            mask = object.__new__(cls)
            leaves, static = structure
            mask.__dict__.update(static, _children=leaves)
            mask.__dict__.update(zip(leaves, values, strict=True))
            return mask

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
        return cls

    return declare


def both(*classes: Any) -> Any:
    """Class of a conjunction: EMPTY if any part is, FULL if all are. The minimum."""
    return functools.reduce(lambda x, y: _module(x, y).minimum(x, y), classes)


def either(*classes: Any) -> Any:
    """Class of a disjunction: FULL if any part is, EMPTY if all are. The maximum."""
    return functools.reduce(lambda x, y: _module(x, y).maximum(x, y), classes)


def negate(classes: Any) -> Any:
    """Class of a negation: EMPTY and FULL change places."""
    return FULL - classes


def to_class(xp: Any, empty: Any, full: Any) -> Any:
    """Classes from two facts about each tile. A tile must not be both."""
    return _int8(xp, full) + _int8(xp, xp.logical_not(empty))


def logical_not(x: Any) -> Any:
    """Elementwise not that also accepts Python booleans."""
    return _module(x).logical_not(x)


def floor_div(x: Index, n: int) -> Any:
    """Quotient floor(x / n) for a static n >= 1, also for x < 0, fit for every kernel language.

    Python's `//` on a traced integer asks for the default device's generation and fails when a TPU
    kernel is compiled on another host; shifts and `lax.div` do not.
    """
    if not isinstance(x, jax.Array):
        return x // n
    if n & (n - 1) == 0:
        return lax.shift_right_arithmetic(x, lax.full_like(x, n.bit_length() - 1))
    d = lax.full_like(x, n)
    return lax.div(x, d) - (lax.rem(x, d) < 0).astype(x.dtype)


def floor_mod(x: Index, n: int) -> Any:
    """Remainder x - n floor(x / n), in 0 .. n-1: see `floor_div`."""
    if not isinstance(x, jax.Array):
        return x % n
    if n & (n - 1) == 0:
        return x & lax.full_like(x, n - 1)
    r = lax.rem(x, lax.full_like(x, n))
    return r + (r < 0).astype(x.dtype) * lax.full_like(x, n)


def look_up(table: Any, *index: Index) -> Any:
    """Entries table[index], indices clipped; an axis of size 1 is shared by all indices."""
    used = [0 if n == 1 else i for i, n in zip(index, table.shape, strict=True)]
    xp = _module(table, *used)
    clipped = tuple(xp.clip(i, 0, n - 1) for i, n in zip(used, table.shape, strict=True))
    return xp.asarray(table)[clipped]


def like(x: Any, index: Index) -> Any:
    """Casts x to the integer type of an index array, so that they compare without promotion."""
    return x.astype(index.dtype) if hasattr(index, "dtype") else x


def _module(*values: Any) -> Any:
    return jnp if any(isinstance(x, jax.Array) for x in values) else np


def _int8(xp: Any, x: Any) -> Any:
    return xp.asarray(x).astype(xp.int8)


def _with_rank(xp: Any, x: Index, rank: int) -> Any:
    x = xp.asarray(x, xp.int32 if xp is jnp else None)
    return x.reshape((1,) * (rank - x.ndim) + x.shape)


def _spread(xp: Any, index: Index, size: int | None, rank: int, axis: int) -> Any:
    """An index as it was given, or all indices along an axis of their own."""
    if index is not None:
        return _with_rank(xp, index, rank)
    return xp.arange(size or 1, dtype=xp.int32).reshape(
        (1,) * axis + (-1,) + (1,) * (rank - axis - 1)
    )


def _agreement(xp: Any, classes: Any, axis: tuple[int, ...]) -> Any:
    """The common class along some axes, PARTIAL where they differ."""
    if all(classes.shape[i] == 1 for i in axis):
        return classes.reshape(classes.shape[len(axis) :])
    low, high = classes.min(axis=axis), classes.max(axis=axis)
    return xp.where(low == high, low, xp.full_like(low, PARTIAL))


def _is_static_value(x: Any) -> bool:
    return isinstance(x, int | np.integer) or (
        isinstance(x, tuple) and all(isinstance(i, int | np.integer) for i in x)
    )


def _same(x: Any, y: Any) -> bool:
    if x is y:
        return True
    if isinstance(x, Tracer) or isinstance(y, Tracer):
        return False
    return np.shape(x) == np.shape(y) and bool(np.array_equal(x, y))
