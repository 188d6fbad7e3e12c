"""Masks given by a formula in the indices q and k: bands, sinks, chunks, groups, dilation."""

from __future__ import annotations

from typing import Any

from attnjax.masks.arguments import check_int
from attnjax.masks.base import Mask
from pallas_kernels.maskprogram import floor_div, floor_mod, mask_node, to_class


@mask_node()
class Full(Mask):
    """Every key is visible to every query."""

    @property
    def shows_everything(self) -> bool:
        """It hides nothing."""
        return True

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """True everywhere, in the shape of q."""
        return q == q

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        return to_class(xp, q0 != q0, q0 == q0)


@mask_node()
class Causal(Mask):
    """A query sees itself and what is before it.

        visible iff k <= q + offset

    Args:
      offset: tokens by which the diagonal is moved; 0 includes the query itself, -1 excludes it,
        and S - T aligns the last query with the last key when there are fewer queries than keys.
    """

    offset: int = 0

    def __post_init__(self) -> None:
        check_int("Causal", "offset", self.offset, -(2**31))

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The key is on or below the diagonal."""
        return k <= (q + self.offset if self.offset else q)

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        # the easiest pair is the last query with the first key, the hardest the first with the last
        return to_class(xp, k0 > q1 - 1 + self.offset, k1 - 1 <= q0 + self.offset)


@mask_node()
class Window(Mask):
    """A band around the diagonal: q - left + 1, ..., q + right.

        visible iff q - k < left and k - q <= right

    Args:
      left: tokens on the left, counting the query itself; at least 1.
      right: tokens on the right; 0 makes the window causal.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        for name, value, least, hint in (
            ("left", self.left, 1, "it counts the query itself, so 1 is the smallest window"),
            ("right", self.right, 0, "0 is a causal window"),
        ):
            check_int("Window", name, value, -(2**31))
            if value < least:
                raise ValueError(
                    f"Window: {name} must be at least {least} token(s), got {name}={value}; {hint}."
                )

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """-right <= q - k < left."""
        return (q - k < self.left) & (q - k >= -self.right)

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        near, far = (
            q0 - (k1 - 1),
            q1 - 1 - k0,
        )  # every difference q - k in between occurs in the tile
        return to_class(
            xp,
            (near >= self.left) | (far < -self.right),
            (far < self.left) & (near >= -self.right),
        )


@mask_node()
class Sink(Mask):
    """The first keys are visible to every query.

        visible iff k < n

    Args:
      n: number of tokens; 0 shows nothing. Paper value (streaming with attention sinks): 4.
    """

    n: int

    def __post_init__(self) -> None:
        check_int("Sink", "n", self.n, 0)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The key is one of the first n."""
        return k < self.n

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        return to_class(xp, k0 >= self.n, k1 <= self.n)


@mask_node()
class Chunked(Mask):
    """Queries see the keys of their own chunk, before and after themselves.

        visible iff floor(q / size) = floor(k / size)

    Args:
      size: tokens per chunk, at least 1. `Causal() & Chunked(size)` is chunked causal attention.
    """

    size: int

    def __post_init__(self) -> None:
        check_int("Chunked", "size", self.size, 1)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """Same chunk."""
        return floor_div(q, self.size) == floor_div(k, self.size)

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        q0, q1 = floor_div(q0, self.size), floor_div(q1 - 1, self.size)
        k0, k1 = floor_div(k0, self.size), floor_div(k1 - 1, self.size)
        return to_class(xp, (q1 < k0) | (k1 < q0), (q0 == k1) & (q1 == k0) & (q0 == q1))


@mask_node()
class EarlierChunks(Mask):
    """Key n stands for chunk n of the queries, which the queries of later chunks see.

        visible iff k < floor(q / size)

    Args:
      size: queries per chunk, at least 1.
    """

    size: int

    def __post_init__(self) -> None:
        check_int("EarlierChunks", "size", self.size, 1)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The query's chunk comes after the key's."""
        return k < floor_div(q, self.size)

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        first, last = floor_div(q0, self.size), floor_div(q1 - 1, self.size)
        return to_class(xp, k0 >= last, k1 - 1 < first)


@mask_node()
class SinceGroup(Mask):
    """A query sees its group, some keys before it, and everything later.

        visible iff k >= group * floor(q / group) - behind

    Args:
      group: queries per group, at least 1.
      behind: keys before the group, at least 0. `Causal() & SinceGroup(n)` is chunked causal
        attention.
    """

    group: int
    behind: int = 0

    def __post_init__(self) -> None:
        check_int("SinceGroup", "group", self.group, 1)
        check_int("SinceGroup", "behind", self.behind, 0)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The key is not before the first one that the group sees."""
        return k >= self._first(q)

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        return to_class(xp, k1 - 1 < self._first(q0), k0 >= self._first(q1 - 1))

    def _first(self, q: Any) -> Any:
        return floor_div(q, self.group) * self.group - self.behind


@mask_node()
class Dilated(Mask):
    """Every n-th key, counted from the query, in both directions.

        visible iff (q - k) mod dilation = 0

    Args:
      dilation: tokens between visible keys, at least 1; 1 shows everything.
        `Dilated(d) & Window(w * d)` is a causal window of w keys that are d tokens apart.
    """

    dilation: int

    def __post_init__(self) -> None:
        check_int("Dilated", "dilation", self.dilation, 1)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The distance is a multiple of the dilation."""
        return floor_mod(q - k, self.dilation) == 0

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        near, far = q0 - (k1 - 1), q1 - 1 - k0
        multiples = floor_div(far, self.dilation) - floor_div(near - 1, self.dilation)
        return to_class(xp, multiples == 0, multiples == far - near + 1)
