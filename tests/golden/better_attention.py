"""Optimized, Efficient and Super attention against an independent implementation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.softmax.optimised_efficient_super_attention import (
    OptimisedEfficientSuperAttention,
)
from tests.golden.compare import Compare, assign

FORMS = {"optimised": "optimized", "efficient": "efficient", "super": "super"}


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Output and the gradient of sum(out * ct) by the input, of every form in the file."""
    wide = data["x"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        x = jnp.asarray(data["x"])
        heads = int(data["heads"])
        names = {"Wq": "query.kernel", "Wk": "key.kernel", "Wo": "out.kernel", "Wa": "alignment"}
        for case in sorted(set(data)):
            theirs, _, direction = case.rpartition("_")
            if theirs not in FORMS:
                continue
            form = FORMS[theirs]
            parts = {"optimized": ("Wq", "Wk", "Wo"), "efficient": ("Wq", "Wo")}
            parts = parts.get(form, ("Wq", "Wo", "Wa"))
            module = OptimisedEfficientSuperAttention(
                heads if form == "optimized" else 1, x.shape[-1], data["Wq"].shape[1],
                data["Wo"].shape[1], form=form, causal=direction == "causal",
                max_length=len(data["Wa"]) if form == "super" else None, param_dtype=x.dtype,
                rngs=nnx.Rngs(0),
            )  # fmt: skip
            assign(module, {names[part]: data[part] for part in parts})
            out, pull = jax.vjp(jax.jit(module), x)
            yield Compare(case, out, data[case], rtol)
            if f"d{case}" in data:
                dx = pull(jnp.asarray(data["ct"]))[0]
                yield Compare(f"d{case}", dx, data[f"d{case}"], rtol)
