"""Angles of tokens at arbitrary positions: what all rotary encodings share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Num

AnyArray = Array | np.ndarray
"""What functions take: JAX arrays, traced or not, and NumPy arrays."""


def angles(
    name: str, positions: Num[AnyArray, "..."], frequencies: Any, x: Float[AnyArray, "b t h d"]
) -> Float[Array, "#b t #h c"]:
    """The angles position * frequency of every token, head and plane.

    Args:
      name: the caller, for error messages.
      positions: [t], [b, t] or [b, h, t] (b and h may be 1), in tokens; integers or fractions.
      frequencies: [c] or [h, c], radians per token.
      x: the array to be rotated; its dtype decides the precision.

    Returns:
      [b or 1, t, h or 1, c] in float32, in float64 when x is float64.

    Raises:
      ValueError: when positions or frequencies do not fit x.
    """
    dtype = angle_dtype(x)
    frequencies = jnp.asarray(frequencies, dtype)
    if frequencies.ndim not in (1, 2) or (frequencies.ndim == 2 and len(frequencies) != x.shape[2]):
        raise ValueError(
            f"{name}: frequencies must have shape [planes] or [heads, planes], got "
            f"{frequencies.shape} for x of shape {x.shape}."
        )
    spread = token_positions(name, positions, x).astype(dtype)
    return spread * frequencies.reshape((1, 1, -1, frequencies.shape[-1]))


def token_positions(
    name: str, positions: Num[AnyArray, "..."], x: Float[AnyArray, "b t h d"]
) -> Num[Array, "#b t #h 1"]:
    """Positions [t], [b, t] or [b, h, t] laid out as [b or 1, t, h or 1, 1].

    Raises:
      ValueError: on another rank, or sizes that differ from those of x.
    """
    if x.ndim != 4:
        raise ValueError(
            f"{name}: x must have rank 4, [batch, length, heads, width], got shape {x.shape}."
        )
    b, t, h, _ = x.shape
    positions = jnp.asarray(positions)
    shape = positions.shape
    fits = {
        1: shape == (t,),
        2: len(shape) == 2 and shape[0] in (1, b) and shape[1] == t,
        3: len(shape) == 3 and shape[0] in (1, b) and shape[1] in (1, h) and shape[2] == t,
    }
    if not fits.get(len(shape), False):
        raise ValueError(
            f"{name}: positions must have shape [length]={(t,)}, [batch, length]={(b, t)} or "
            f"[batch, heads, length]={(b, h, t)}, got {shape} for x of shape {x.shape}."
        )
    if len(shape) == 3:
        return positions.swapaxes(1, 2)[..., None]
    return positions.reshape((-1, t, 1, 1))


def angle_dtype(x: Any) -> Any:
    """float64 for float64 inputs, float32 for all others: half precision cannot count tokens."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def inverse_powers(base: float, width: int) -> np.ndarray:
    """Frequencies base^(-2c / width) for c = 0 .. width/2 - 1, float64."""
    return 1.0 / base ** (np.arange(0, width, 2) / width)


def module_of(*values: Any) -> Any:
    """jax.numpy when any value is traced, else numpy."""
    return jnp if any(isinstance(v, Tracer) for v in values) else np
