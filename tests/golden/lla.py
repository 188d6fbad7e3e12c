"""Local linear attention against a direct solve of the weighted ridge regression.

`o_<causal|full>_<mode>` with the gradients of sum(o * ct), and for some modes ρ and the weights.
Both solvers are compared, and the definition that keeps all weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.dense import qk_scores, weighted_values
from attnjax.masks import Causal
from attnjax.mechanisms.memory.local_linear_attention import (
    local_linear_attention,
    local_linear_weights,
)
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """The file's layout is [b, h, t, d]."""
    for at in sorted({name.rpartition("/")[0] for name in data}):
        yield from _case(data, f"{at}/" if at else "")


def _case(data: Mapping[str, np.ndarray], at: str) -> Iterable[Compare]:
    wide = data[at + "q"].dtype == np.float64
    # float32 solutions, by either solver, are as exact as the condition of Σ lets them be
    rtol, rtol_grad = (1e-8, 1e-8) if wide else (2e-4, 1e-3)
    with jax.enable_x64(wide):
        q, k, v = (jnp.asarray(data[at + name]).swapaxes(1, 2) for name in ("q", "k", "v"))
        # without gradients in the file there may be nothing to pull back
        ct = jnp.zeros_like(q[..., :1] * v[:, :1, :1])
        if at + "ct" in data:
            ct = jnp.asarray(data[at + "ct"]).swapaxes(1, 2)
        ridge = jnp.asarray(data[at + "ridge"], q.dtype)
        found = [n[len(at) :] for n in data if n.startswith(at + "o_") and "/" not in n[len(at) :]]
        for case in (name[2:] for name in found):
            direction, mode = case.split("_", 1)
            mask = Causal() if direction == "causal" else None
            keep = None if mask is None else mask.dense(q.shape[1], k.shape[1])
            for solver in ("cg", "direct"):
                forward = functools.partial(
                    local_linear_attention, mask=mask, ridge=ridge, ridge_mode=mode, solver=solver,
                    block_sizes=(8, 4),
                )  # fmt: skip

                @jax.jit
                def run(q, k, v, ct, forward=forward):
                    out, pull = jax.vjp(forward, q, k, v)
                    return {"o": out} | dict(zip(("dq", "dk", "dv"), pull(ct), strict=True))

                got = run(q, k, v, ct)
                for name, array in got.items():
                    if f"{at}{name}_{case}" in data:
                        want = data[f"{at}{name}_{case}"]
                        bound = rtol if name == "o" else rtol_grad
                        yield Compare(f"{solver} {name}_{case}", array.swapaxes(1, 2), want, bound)
            weights, rho = local_linear_weights(
                q, k, qk_scores(q, k), mask=keep, ridge=ridge, ridge_mode=mode
            )
            out = weighted_values(weights, v).swapaxes(1, 2)
            yield Compare(f"weights times v, {case}", out, data[f"{at}o_{case}"], rtol)
            for name, array in {"rho": rho, "weights": weights}.items():
                if f"{at}{name}_{case}" in data:
                    yield Compare(f"{name}_{case}", array, data[f"{at}{name}_{case}"], rtol)
