"""MHE-Add and MHE-Mul against an independent implementation of the paper's formulas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.softmax.mhe import MHEAttention
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Output and the gradient of sum(out * ct) by the input, of every form in the file."""
    wide = data["x"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        x = jnp.asarray(data["x"])
        _, heads, width = data["head_emb"].shape
        use_bias = any(f"b{part}" in data for part in "qkv")
        weights = {"out.kernel": data["Wo"], "head_embeddings": data["head_emb"]}
        for part, name in (("q", "query"), ("k", "key"), ("v", "value")):
            weights[f"{name}.kernel"] = data[f"W{part}"]
            if f"b{part}" in data:
                weights[f"{name}.bias"] = data[f"b{part}"]
        for case in sorted(name for name in data if name.startswith("o_")):
            _, combine, direction = case.split("_")
            module = MHEAttention(
                heads, x.shape[-1], heads * width, data["Wo"].shape[1], combine=combine,
                causal=direction == "causal", use_bias=use_bias, param_dtype=x.dtype,
                rngs=nnx.Rngs(0),
            )  # fmt: skip
            assign(module, weights)
            out, pull = jax.vjp(module, x)
            yield Compare(case, out, data[case], rtol)
            dx = f"dx_{combine}_{direction}"
            if dx in data:
                yield Compare(dx, pull(jnp.asarray(data["ct"]))[0], data[dx], rtol)
