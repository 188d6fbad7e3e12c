"""What a golden adapter gives to the harness, and what it reads from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Compare(NamedTuple):
    """One array: |got - want| <= rtol * max|want|, and equal where `want` is not finite."""

    name: str
    got: Any
    want: Any
    rtol: float

    def error(self) -> float:
        """Largest difference relative to the largest finite |want|; inf where they do not match."""
        got, want = np.asarray(self.got), np.asarray(self.want)
        if got.shape != want.shape:
            return float("inf")
        if want.dtype == bool or np.issubdtype(want.dtype, np.integer):
            return 0.0 if np.array_equal(got, want) else float("inf")
        finite = np.isfinite(want)
        if not np.array_equal(got[~finite], want[~finite], equal_nan=True):
            return float("inf")
        difference = np.abs(got[finite].astype(np.float64) - want[finite].astype(np.float64))
        scale = np.abs(want[finite]).max(initial=0.0)
        worst = float(difference.max(initial=0.0))
        return worst / scale if scale > 0 else worst


class GoldenFile(Mapping[str, np.ndarray]):
    """The arrays of one file; remembers which of them were read."""

    def __init__(self, path: Any):
        with np.load(path) as file:
            self._arrays = {name: file[name] for name in file.files}
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        array = self._arrays[name]
        self.read.add(name)
        return array

    def __contains__(self, name: object) -> bool:
        return name in self._arrays

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def unread(self) -> list[str]:
        """Names that nobody asked for."""
        return sorted(set(self._arrays) - self.read)


def assign(module: Any, parameters: Mapping[str, Any]) -> None:
    """Sets parameters of a module, named by their paths as in "query.kernel".

    An array may have any shape with the right number of elements in the right order; it takes the
    parameter's dtype.
    """
    for path, value in parameters.items():
        *owners, name = path.split(".")
        owner = module
        for part in owners:
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        parameter = getattr(owner, name)
        old = parameter[...]
        parameter[...] = jnp.asarray(np.asarray(value).reshape(old.shape), old.dtype)
