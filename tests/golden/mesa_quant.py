"""Running 8-bit ranges of activations, their codes and what the codes stand for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.softmax.mesa import QuantStats, mesa_dequantize, mesa_quantize
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Training steps x0, x1, ...: ranges after each, and its codes with nearest rounding."""
    wide = data["x0"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        first = jnp.asarray(data["x0"])
        axis = 1 if first.ndim == 4 else -1  # heads of [b, h, t, d], channels of [b, t, c]
        decay = float(data["ema_decay"]) if "ema_decay" in data else 0.9
        stats = QuantStats.empty(len(data["alpha0"]), first.dtype)
        for step in range(sum(name[:1] == "x" and name[1:].isdigit() for name in data)):
            x = jnp.asarray(data[f"x{step}"])
            stats = stats.update(x, axis, decay)
            yield Compare(f"alpha{step}", stats.range, data[f"alpha{step}"], rtol)
            yield Compare(f"beta{step}", stats.shift, data[f"beta{step}"], rtol)
            codes = mesa_quantize(x, stats, axis=axis)
            place = axis % x.ndim
            split = (*x.shape[:place], len(stats.range), -1, *x.shape[place + 1 :])
            groups = jnp.moveaxis(codes.reshape(split), place, 0).reshape(len(stats.range), -1)
            yield Compare(f"codes{step}", groups, data[f"codes{step}"], rtol)
            values = mesa_dequantize(codes, stats, axis=axis, dtype=x.dtype)
            yield Compare(f"deq_nearest{step}", values, data[f"deq_nearest{step}"], rtol)
