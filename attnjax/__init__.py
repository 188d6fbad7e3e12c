"""Every attention mechanism of the literature for JAX: call, train, cache, inspect and compare.

    import attnjax as aj
    out = aj.attention(q, k, v, mask=aj.masks.Causal() & (aj.masks.Window(1024) | aj.masks.Sink(4)))

`aj.functional` holds the functions, `aj.nn` the Flax NNX modules, `aj.mechanisms()` the table of
them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import attnjax.mechanisms  # first: importing the package later would rebind the name  # noqa: F401
from attnjax.attention import attention
from attnjax.decode import decode_attention
from attnjax.explain import Explanation, explain
from attnjax.merge import merge_attention
from attnjax.spec import Mechanism
from attnjax.taps import Edits, Patch

if TYPE_CHECKING:  # no checker sees that the package is callable and that submodules load late
    from attnjax import cache, functional, gallery, masks, models, nn, positions, tasks
    from attnjax.spec import mechanisms as mechanisms
else:
    from attnjax import mechanisms

__version__ = "0.1.0"
__all__ = [
    "Edits", "Explanation", "Mechanism", "Patch", "attention", "decode_attention", "explain",
    "mechanisms", "merge_attention", "cache", "functional", "gallery", "masks", "models", "nn",
    "positions", "tasks",
]  # fmt: skip

_SUBMODULES = ("cache", "functional", "gallery", "masks", "models", "nn", "positions", "tasks")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"attnjax.{name}")
    raise AttributeError(f"module 'attnjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
