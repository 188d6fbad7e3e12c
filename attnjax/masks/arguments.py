"""Checks of what masks are made from, values by row and head, and how arguments print."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.maskprogram import like, look_up


def check_int(mask: str, name: str, value: Any, least: int) -> None:
    """Checks a static integer argument.

    Raises:
      TypeError: when it is not an integer.
      ValueError: when it is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(
            f"{mask}: {name} must be an integer, got {value!r} of type {type(value).__name__}."
        )
    if value < least:
        raise ValueError(f"{mask}: {name} must be at least {least}, got {name}={value}.")


def check_integers(mask: str, name: str, value: Any, *ranks: int) -> Any:
    """An integer array of one of the given ranks as int32; nested lists become NumPy arrays.

    Raises:
      TypeError: when it does not hold integers.
      ValueError: on another rank.
    """
    value = value if hasattr(value, "dtype") else np.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(
            f"{mask}: {name} must hold integers, got {value.dtype} of shape {value.shape}; "
            "convert it with .astype(int)."
        )
    if value.ndim not in ranks:
        want = " or ".join(map(str, ranks))
        raise ValueError(f"{mask}: {name} must have rank {want}, got shape {value.shape}.")
    return value.astype(np.int32)


def size_along(axis: int, *values: Any) -> int | None:
    """The size along an axis of the first array that has more than one entry there, or None."""
    sizes = (np.shape(value)[axis] for value in values if np.ndim(value) > axis)
    return next((size for size in sizes if size > 1), None)


def of_row(values: Any, index: Any, b: Any, h: Any = None) -> Any:
    """values[b] or values[b, h] in the integer type of `index`; a number is returned as it is."""
    if isinstance(values, int | np.integer):
        return values
    return like(look_up(values, *(b, h)[: np.ndim(values)]) if np.ndim(values) else values, index)


def show_value(value: Any) -> str:
    """An argument as `repr` shows it: arrays by type and shape, functions by name."""
    if isinstance(value, tuple):
        return "(" + ", ".join(map(show_value, value)) + ("," if len(value) == 1 else "") + ")"
    if hasattr(value, "dtype") and hasattr(value, "shape") and np.ndim(value):
        return f"{value.dtype}{list(value.shape)}"
    return getattr(value, "__name__", repr(value))
