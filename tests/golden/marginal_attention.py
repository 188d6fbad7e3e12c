"""Posteriors, readouts and evidence under several priors and potentials; repeated readouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.softmax.marginal_attention import (
    connection_posterior,
    marginal_attention,
    mean_field_steps,
    slot_steps,
)
from attnjax.positions.alibi import alibi_bias
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Everything that the file holds; there [b, t, d] without heads, here one head."""
    wide = data["q"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        q, k, v = (jnp.asarray(data[name])[:, :, None] for name in "qkv")
        for case in sorted(name[5:] for name in data if name.startswith("post_")):
            options = model(case, data, q.shape[1], k.shape[1], q.dtype)
            weights, log_marginal, entropy = connection_posterior(q, k, **options)
            soft = marginal_attention(q, k, v, **options)
            chosen = marginal_attention(q, k, v, mode="map", **options)
            found = {
                "post": weights[:, 0],
                "entropy": entropy[:, :, 0],
                "log_marginal": log_marginal[:, :, 0],
                "soft": soft.output[:, :, 0],
                "map": chosen.output[:, :, 0],
            }
            for name, got in found.items():
                if f"{name}_{case}" in data:
                    yield Compare(f"{name}_{case}", got, data[f"{name}_{case}"], rtol)
            if f"log_marginal_{case}" in data:
                want = data[f"log_marginal_{case}"]
                yield Compare(f"evidence_{case}", soft.log_marginal[:, :, 0], want, rtol)
        for name, steps in (("iterative_states", mean_field_steps), ("slot_states", slot_steps)):
            if name in data:
                states = steps(q, k, len(data[name]))
                yield Compare(name, states[:, :, :, 0], data[name], rtol)


def model(case: str, data: Mapping[str, np.ndarray], t: int, s: int, dtype: Any) -> dict[str, Any]:
    """Prior and potential of a case."""

    def pairs(array: np.ndarray) -> jax.Array:
        lead = array.shape[:-2] or (1,)  # [t, s] or [b, t, s]
        return jnp.asarray(array).reshape(*lead, 1, t, s)

    if case == "learned":
        return {"log_prior": pairs(data["log_prior"])}
    if case == "alibi":
        slopes = jnp.asarray(data["alibi_slope"], dtype).reshape(1)
        places = jnp.arange(t, dtype=jnp.int32), jnp.arange(s, dtype=jnp.int32)
        return {"log_prior": alibi_bias(slopes, *places, symmetric=True, dtype=dtype)}
    if case == "graph":
        return {"mask": pairs(data["adjacency"])}
    if case == "gauss":
        return {"likelihood": "gaussian", "sigma": float(data["sigma"])}
    if case == "uniform":
        return {}
    raise ValueError(f"marginal_attention: the file has an unknown case {case!r}.")
