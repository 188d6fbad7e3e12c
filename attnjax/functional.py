"""Every function of the library by one name: `attnjax.functional.lightning_attention(...)`.

The functions of a mechanism are the public functions of its file below `attnjax/mechanisms/`;
`dir()` lists them all.
"""

from __future__ import annotations

import inspect
from typing import Any

from attnjax.attention import attention
from attnjax.decode import decode_attention
from attnjax.merge import merge_attention
from attnjax.spec import public_names

__all__ = ["attention", "decode_attention", "merge_attention"]


def __getattr__(name: str) -> Any:
    found = public_names(inspect.isfunction)
    if name not in found:
        raise AttributeError(f"attnjax.functional has no {name!r}; it has {', '.join(__dir__())}.")
    return found[name]


def __dir__() -> list[str]:
    return sorted({*__all__, *public_names(inspect.isfunction)})
