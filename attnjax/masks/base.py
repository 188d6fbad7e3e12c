"""The mask algebra: the base class of masks, and `&`, `|`, `~`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax.numpy as jnp
from jaxtyping import Array, Bool

from attnjax.masks.arguments import show_value
from pallas_kernels.maskprogram import MaskProgram, both, either, logical_not, mask_node, negate


class Mask(MaskProgram):
    """Base class of `attnjax.masks`: which keys each query may attend to.

    Masks combine with `&` (both allow), `|` (either allows) and `~` (reversed). They are small
    immutable pytrees; no t x s array is built unless `dense` is called.
    """

    def __and__(self, other: Any) -> Mask:
        """Visible where both masks allow it."""
        return And.of(self, _as_mask("&", other))

    def __or__(self, other: Any) -> Mask:
        """Visible where either mask allows it."""
        return Or.of(self, _as_mask("|", other))

    def __invert__(self) -> Mask:
        """Visible where this mask is not."""
        return Not(self)

    def __rand__(self, other: Any) -> Mask:
        """See `__and__`; reached only when the left operand is not a mask, which is an error."""
        return And.of(_as_mask("&", other), self)

    def __ror__(self, other: Any) -> Mask:
        """See `__or__`; reached only when the left operand is not a mask, which is an error."""
        return Or.of(_as_mask("|", other), self)

    def __bool__(self) -> bool:
        """Masks have no truth value, so that `and`, `or`, `not` fail loudly."""
        raise TypeError(
            "a mask has no truth value; combine masks with &, | and ~ instead of and, or, not."
        )

    def dense(
        self,
        T: int,
        S: int | None = None,
        *,
        batch: int | None = None,
        num_heads: int | None = None,
        q_offset: Any = 0,
    ) -> Bool[Array, "b h t s"]:
        """The whole mask as booleans, True = attend.

        Args:
          T: number of queries. S: number of keys, T when None.
          batch: number of rows to spell out; None: `batch_size`, or 1 when all rows are alike.
          num_heads: number of heads to spell out; None: `self.num_heads`, or 1 when all are alike.
          q_offset: absolute index of the first query, an integer or an array () or [b].

        Returns:
          [b or 1, h or 1, T, S]. Memory: all of it. Under `jax.jit` it is computed, not embedded.
        """
        S = T if S is None else S
        rows, heads = batch or self.batch_size or 1, num_heads or self.num_heads or 1
        for name, has, want in (
            ("batch", self.batch_size, rows),
            ("num_heads", self.num_heads, heads),
        ):
            if has is not None and has != want:
                raise ValueError(f"dense: {self!r} is made for {name}={has}, got {name}={want}.")
        offset = jnp.asarray(q_offset).astype(jnp.int32).reshape(-1, 1, 1, 1)
        b, h, q, k = (
            jnp.arange(n, dtype=jnp.int32).reshape(tuple(n if i == axis else 1 for i in range(4)))
            for axis, n in enumerate((max(rows, len(offset)), heads, T, S))
        )
        visible = self.predicate(b, h, q + offset, k)
        return jnp.broadcast_to(visible, (b.size, heads, T, S))

    def density(
        self, T: int, S: int | None = None, *, block: int | tuple[int, int] | None = None
    ) -> float:
        """Fraction of the t x s pairs that is visible, or of the tiles that a kernel visits.

        Args:
          T: number of queries. S: number of keys, T when None.
          block: None counts visible pairs exactly; a tile size, or (queries, keys), in tokens,
            counts visited tiles.

        Returns:
          A Python float between 0 and 1, averaged over the rows and heads that the mask tells
          apart.

        Memory and time: O(T) for bands, prefixes and documents; O(T S) for dilation and `Predicate`
        when `block` is None.
        """
        from attnjax.masks.density import density

        return density(self, T, S, block)

    def plot(self, T: int, S: int | None = None, ax: Any = None, *, block: Any = None) -> Any:
        """Draws the mask with matplotlib; see `attnjax.masks.plot.plot_mask`."""
        from attnjax.masks.plot import plot_mask

        return plot_mask(self, T, S, ax, block=block)

    def __repr__(self) -> str:
        """The expression that makes the mask; arrays show their type and shape."""
        shown: list[str] = []
        fields: Any = dataclasses.fields(cast(Any, self))
        for place, field in enumerate(fields):
            value = getattr(self, field.name)
            if field.default is not dataclasses.MISSING and value is field.default:
                continue
            text = show_value(value)
            # after an argument that was left out, the next ones need their names
            shown.append(f"{field.name}={text}" if len(shown) < place else text)
        return f"{type(self).__name__}({', '.join(shown)})"


class _Combination(Mask):
    """What `And` and `Or` share: operands that agree on heads and rows."""

    masks: tuple[Mask, ...]
    symbol = ""

    def __post_init__(self) -> None:
        common_size("num_heads", self.masks)
        common_size("batch_size", self.masks)

    @classmethod
    def of(cls, *masks: Mask) -> Mask:
        """The combination with nested combinations of the same kind flattened."""
        flat = [part for m in masks for part in (m.masks if type(m) is cls else (m,))]
        return cast(Any, cls)(tuple(flat))

    @property
    def num_heads(self) -> int | None:
        """Heads told apart by any operand."""
        return common_size("num_heads", self.masks)

    @property
    def batch_size(self) -> int | None:
        """Rows told apart by any operand."""
        return common_size("batch_size", self.masks)

    def __repr__(self) -> str:
        """Operands joined by the symbol, inner combinations in parentheses."""
        return f" {self.symbol} ".join(
            f"({m!r})" if isinstance(m, _Combination) else repr(m) for m in self.masks
        )


@mask_node("masks")
class And(_Combination):
    """Visible where all masks allow it; written `a & b`."""

    masks: tuple[Mask, ...]
    symbol = "&"

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """All predicates."""
        return functools.reduce(lambda x, y: x & y, (m.predicate(b, h, q, k) for m in self.masks))

    def _classify(self, *args: Any) -> Any:
        return both(*(m._classify(*args) for m in self.masks))


@mask_node("masks")
class Or(_Combination):
    """Visible where any mask allows it; written `a | b`."""

    masks: tuple[Mask, ...]
    symbol = "|"

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """Any predicate."""
        return functools.reduce(lambda x, y: x | y, (m.predicate(b, h, q, k) for m in self.masks))

    def _classify(self, *args: Any) -> Any:
        return either(*(m._classify(*args) for m in self.masks))


@mask_node("mask")
class Not(Mask):
    """Visible where the mask is not; written `~a`."""

    mask: Mask

    @property
    def num_heads(self) -> int | None:
        """Heads told apart by the operand."""
        return self.mask.num_heads

    @property
    def batch_size(self) -> int | None:
        """Rows told apart by the operand."""
        return self.mask.batch_size

    def __invert__(self) -> Mask:
        """Two negations cancel."""
        return self.mask

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The opposite predicate."""
        return logical_not(self.mask.predicate(b, h, q, k))

    def _classify(self, *args: Any) -> Any:
        return negate(self.mask._classify(*args))

    def __repr__(self) -> str:
        """The operand behind a tilde."""
        return f"~({self.mask!r})" if isinstance(self.mask, _Combination) else f"~{self.mask!r}"


def common_size(name: str, masks: tuple[Mask, ...]) -> int | None:
    """The one number of heads or rows that masks agree on, None when none of them cares.

    Raises:
      ValueError: when two masks differ.
    """
    sizes = {getattr(m, name): m for m in masks if getattr(m, name) is not None}
    if len(sizes) > 1:
        (n1, m1), (n2, m2) = list(sizes.items())[:2]
        raise ValueError(
            f"masks with different {name} cannot be combined: {m1!r} has {n1}, {m2!r} has {n2}; "
            "make both for the same number."
        )
    return next(iter(sizes), None)


def _as_mask(symbol: str, x: Any) -> Mask:
    if isinstance(x, Mask):
        return x
    what = f"an array of shape {x.shape}" if hasattr(x, "shape") else f"{type(x).__name__}"
    raise TypeError(
        f"a mask can be combined by {symbol} with another mask only, got {what}; "
        "wrap a boolean array in BlockPattern(array, 1, 1), a function in Predicate."
    )
