"""Needles in real text: keys hidden in the Python standard library's own source, in bytes.

The text needs no download: every Python carries it.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import sysconfig
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.tasks.base import Task, check_positive, unasked


@functools.cache
def stdlib_text(size: int = 1 << 20) -> np.ndarray:
    """The first `size` bytes of the standard library's modules, in order of their names: uint8.

    Raises:
      RuntimeError: when this Python comes without its sources.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    parts, total = [], 0
    for path in sorted(folder.glob("*.py")):
        parts.append(path.read_bytes())
        total += len(parts[-1])
        if total >= size:
            return np.frombuffer(b"".join(parts)[:size], np.uint8)
    raise RuntimeError(f"{folder} holds {total} bytes of sources, {size} are needed.")


@dataclasses.dataclass(frozen=True)
class MultiKeyNeedle(Task):
    """Several named keys hidden in a text; the last line asks for one of them.

        ... # key 17 is 40932 ...  # key 83 is 11560 ...  # key 17 is

    RULER's multi-key needle (Hsieh et al., 2024, arXiv:2404.06654) on source code, in bytes.

    Attributes:
      text: t, tokens (bytes) of an example.
      needles: keys hidden; the one that is asked is among them.
      digits: of a value; each is scored.
      depth: where in the text the needle that is asked lies, 0 start to 1 end; None: anywhere.
    """

    text: int = 256
    needles: int = 4
    digits: int = 5
    depth: float | None = None

    def __post_init__(self) -> None:
        check_positive(self, "needles", "digits")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"{type(self).__name__}: depth must be in [0, 1], got {self.depth}.")
        if self._slots < self.needles:
            raise ValueError(
                f"{type(self).__name__}: text={self.text} holds {max(self._slots, 0)} needles, not "
                f"{self.needles}; use text >= {self._slot * (self.needles + 1) + self.digits}."
            )

    @property
    def length(self) -> int:
        """The bytes of the text."""
        return self.text

    @property
    def vocab_size(self) -> int:
        """Bytes."""
        return 256

    @property
    def chance(self) -> float:
        """One digit of ten."""
        return 0.1

    @property
    def _prefix(self) -> bytes:
        return b"\n# key 00 is "

    @property
    def _slot(self) -> int:
        return len(self._prefix) + self.digits + 1

    @property
    def _slots(self) -> int:
        return (self.text - len(self._prefix) - self.digits + 1) // self._slot

    def longer(self, factor: int) -> Self:
        """`factor` times as much text around as many needles."""
        return dataclasses.replace(self, text=self.text * factor)

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs and targets [t]; the digits after the question are scored."""
        for_text, for_names, for_values, for_places, for_asked = jax.random.split(key, 5)
        corpus = jnp.asarray(stdlib_text())
        start = jax.random.randint(for_text, (), 0, corpus.size - self.text, jnp.int32)
        text = jax.lax.dynamic_slice(corpus, (start,), (self.text,)).astype(jnp.int32)
        n, slot, head = self.needles, self._slot, len(self._prefix)
        names = jax.random.permutation(for_names, 100)[:n].astype(jnp.int32)
        values = ord("0") + jax.random.randint(for_values, (n, self.digits), 0, 10, jnp.int32)
        places = jax.random.permutation(for_places, self._slots)[:n].astype(jnp.int32)
        asked = jax.random.randint(for_asked, (), 0, n, jnp.int32)
        if self.depth is not None:
            wanted = jnp.int32(round(self.depth * (self._slots - 1)))
            places = jnp.where(places == wanted, places[asked], places).at[asked].set(wanted)
        prefix = np.frombuffer(self._prefix, np.uint8).astype(np.int32)
        named = self._named(prefix, names)
        lines = jnp.concatenate([named, values, jnp.full((n, 1), ord("\n"), jnp.int32)], axis=1)
        where = places[:, None] * slot + jnp.arange(slot, dtype=jnp.int32)[None]
        text = text.at[where].set(lines)
        end = self.text - head - self.digits + 1
        tail = jnp.concatenate([named[asked], values[asked, :-1]])
        text = text.at[end:].set(tail)
        return text, unasked(self.text).at[-self.digits :].set(values[asked])

    def _named(self, prefix: np.ndarray, names: jax.Array) -> jax.Array:
        """The needles' first words [n, head], with the two digits of each name."""
        lines = jnp.broadcast_to(jnp.asarray(prefix)[None], (names.size, prefix.size))
        at = self._prefix.index(b"00")
        lines = lines.at[:, at].set(ord("0") + names // 10)
        return lines.at[:, at + 1].set(ord("0") + names % 10)


@dataclasses.dataclass(frozen=True)
class Passkey(MultiKeyNeedle):
    """One pass key hidden in a text; the last line asks for it.

        ... # the pass key is 40932 ...  # the pass key is

    Mohtashami and Jaggi, "Landmark Attention", 2023, arXiv:2305.16300, on source code, in bytes.

    Attributes:
      text, digits, depth: as in `MultiKeyNeedle`.
      needles: 1.
    """

    needles: int = 1

    def __post_init__(self) -> None:
        if self.needles != 1:
            raise ValueError(f"Passkey: needles={self.needles}; use MultiKeyNeedle for several.")
        super().__post_init__()

    @property
    def _prefix(self) -> bytes:
        return b"\n# the pass key is "

    def _named(self, prefix: np.ndarray, names: jax.Array) -> jax.Array:
        del names
        return jnp.asarray(prefix)[None]
