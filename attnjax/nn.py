"""Every Flax NNX module of the library by one name: `attnjax.nn.MultiHeadAttention(...)`.

The modules are the public `nnx.Module` classes of the files below `attnjax/mechanisms/`; `dir()`
lists them all.
"""

from __future__ import annotations

import inspect
from typing import Any

from flax import nnx

from attnjax.spec import public_names


def _is_module(x: Any) -> bool:
    return inspect.isclass(x) and issubclass(x, nnx.Module)


def __getattr__(name: str) -> Any:
    found = public_names(_is_module)
    if name not in found:
        raise AttributeError(f"attnjax.nn has no {name!r}; it has {', '.join(__dir__())}.")
    return found[name]


def __dir__() -> list[str]:
    return sorted(public_names(_is_module))
