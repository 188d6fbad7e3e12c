"""What a mechanism declares about itself, and the table of all mechanisms.

Every file below `attnjax/mechanisms/` holds one mechanism and ends with `SPEC = Mechanism(...)`.
The table, the documentation pages and the common property tests are generated from these records,
so a new mechanism needs no other edit.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.resources
import json
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The record of one attention mechanism.

    Attributes:
      id: the catalogue's name of the mechanism, also the name of its file.
      title: title of the paper.
      arxiv: arXiv identifier, or "" where the work has none.
      year: year of publication.
      code: "owner/name" of the official repository, or "".
      kind: "module" (NNX module and function), "function", "layout" (which layer does what) or
        "model".
      function: the pure function, or None.
      module: the Flax NNX module class, or None.
      causal, bidirectional: which directions of attention it supports.
      nd: number of token axes it takes: 1 for sequences, 2 and 3 for images and video.
      cache: "dense", "ring", "state" or None when it cannot decode step by step.
      segment_ids: whether packed documents are kept apart.
      context_parallel: any of "all_gather", "ring", "ulysses", "halo", "state".
      kernel: "flash", "linear", "neighborhood" or "einsum": the primitive that does the work.
      cost: operations as a function of T tokens, as in "O(T w)".
      reduces_to: options -> id of the mechanism that these options give.
      picture: zero-argument callable returning `{title: array [t, s]}`, panels for the
        documentation beside (or, without `example`, instead of) what `example` gives.
      golden: names of the golden cases (`tests/golden`) that it must equal.
      reading: where the definition, or a part of it, is this library's reading of a paper without
        official code or full text: which part, in a sentence. "" where it is the authors'.
      example: zero-argument callable returning `(module, x)`: a small instance for the common
        property tests and the pictures of the documentation.
    """

    id: str
    title: str
    arxiv: str
    year: int
    code: str = ""
    kind: str = "module"
    function: Callable[..., Any] | None = None
    module: type | None = None
    causal: bool
    bidirectional: bool
    nd: int = 1
    cache: str | None = None
    segment_ids: bool = False
    context_parallel: frozenset[str] = frozenset()
    kernel: str
    cost: str
    reduces_to: Mapping[str, str] = dataclasses.field(default_factory=dict)
    picture: Callable[[], Mapping[str, Any]] | None = None
    golden: tuple[str, ...] = ()
    reading: str = ""
    example: Callable[[], tuple[Any, Any]] | None = None

    def require(self, **wanted: Any) -> None:
        """Raises NotImplementedError for an option that the mechanism does not support.

        Args:
          wanted: names of fields with the value a caller needs, for example `segment_ids=True`,
            `causal=True` or `context_parallel="ring"`.
        """
        for name, value in wanted.items():
            has = getattr(self, name)
            fine = value in has if isinstance(has, frozenset) else (not value or has == value)
            if not fine:
                shown = sorted(has) if isinstance(has, frozenset) else has
                raise NotImplementedError(
                    f"{self.id} does not support {name}={value!r}; it supports {name}={shown!r}."
                )


@functools.cache
def _modules() -> tuple[Any, ...]:
    """Every module below `attnjax.mechanisms` that holds a SPEC."""
    package = importlib.import_module("attnjax.mechanisms")
    names = (info.name for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."))
    return tuple(m for m in map(importlib.import_module, names) if hasattr(m, "SPEC"))


@functools.cache
def mechanisms() -> dict[str, Mechanism]:
    """The table of mechanisms, keyed by id and sorted: `{id: Mechanism}`.

    Raises:
      ValueError: when two files declare the same id.
    """
    table: dict[str, Mechanism] = {}
    for module in _modules():
        spec = module.SPEC
        if spec.id in table:
            raise ValueError(
                f"two mechanisms have the id {spec.id!r}; ids are file names and unique."
            )
        table[spec.id] = spec
    return dict(sorted(table.items()))


def golden_results() -> dict[str, Any]:
    """The recorded errors against official implementations, by golden case.

    `{case: {"worst": largest relative error, "tolerance", "arrays", "dtype"}}`, {} where none were
    recorded. `make golden` records them.
    """
    file = importlib.resources.files("attnjax") / "golden_results.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def public_names(wanted: Callable[[Any], bool]) -> dict[str, Any]:
    """Public objects that mechanism files define, or name in `__all__`, by name.

    Args:
      wanted: whether an object is of the kind that is looked for.
    """
    return {
        name: x
        for module in _modules()
        for name, x in vars(module).items()
        if not name.startswith("_")
        and wanted(x)
        and (x.__module__ == module.__name__ or name in getattr(module, "__all__", ()))
    }
