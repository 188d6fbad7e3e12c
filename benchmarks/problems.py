"""The cases of `benchmarks.attention`: inputs, who sees whom, and what a candidate is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

WINDOW, SINKS = 256, 4
MAX_TEMPORARY_BYTES = 6e9
"""Dense candidates that need more are left out."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One case at one length: inputs [1, t, h, d] and ids of documents [1, t]."""

    case: str
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    cotangent: np.ndarray
    segment_ids: np.ndarray

    @property
    def length(self) -> int:
        """Tokens."""
        return self.query.shape[1]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A library's answer: `call()` computes and waits, `arrays()` gives NumPy results."""

    name: str
    call: Callable[[], Any]
    arrays: Callable[[], list[np.ndarray]]


def problem(case: str, length: int, heads: int, head_dim: int) -> Problem:
    """Random inputs with a fixed seed; documents are an eighth of the length on average."""
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, (1, length, heads, head_dim), np.float32)
    ends = np.sort(rng.choice(np.arange(1, length), size=7, replace=False))
    ids = np.searchsorted(ends, np.arange(length), side="right").astype(np.int32)[None]
    return Problem(case, draw(), draw(), draw(), draw(), ids)


def visible(case: str, q: Any, k: Any, segment_ids: Any) -> Any:
    """Whether query index q may attend to key index k; works on arrays of any library."""
    causal = q >= k
    if case == "causal":
        return causal
    if case == "window256":
        return causal & (q - k < WINDOW)
    if case == "window_sink":
        return causal & ((q - k < WINDOW) | (k < SINKS))
    if case == "documents":
        return causal & (segment_ids[q] == segment_ids[k])
    raise ValueError(f"unknown case {case!r}")
