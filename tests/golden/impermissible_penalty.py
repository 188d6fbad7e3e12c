"""Penalties on attention to marked tokens against danishpruthi/deceptive-attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.softmax.deceptive_attention import impermissible_penalty
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Penalty per example on head 0, its mean and max forms, and their gradients."""
    wide = data["attn"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        weights, marked = jnp.asarray(data["attn"]), jnp.asarray(data["impermissible"], bool)
        coefficient = float(data["coef"])

        def penalty(weights: jax.Array, reduction: str) -> jax.Array:
            return impermissible_penalty(
                weights, marked, coefficient=coefficient, reduction=reduction
            )

        if "loss_single_head0" in data:
            got = penalty(weights[:, 0], "none")
            yield Compare("loss_single_head0", got, data["loss_single_head0"], rtol)
        for form in ("mean", "max"):
            if f"loss_{form}" not in data:
                continue
            loss, grad = jax.value_and_grad(penalty)(weights, form)
            yield Compare(f"loss_{form}", loss, data[f"loss_{form}"], rtol)
            if f"grad_{form}" in data:
                yield Compare(f"grad_{form}", grad, data[f"grad_{form}"], rtol)
