"""Mixture-of-head attention with the norm router against SkyworkAI/MoH's LLaMA attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.gates.moh import MoHAttention
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Output, and the gradient of sum(out * cot) by the input."""
    wide = data["x"].dtype == np.float64
    rtol = 5e-6 if wide else 2e-5  # the official softmax is float32
    with jax.enable_x64(wide):
        x, cot = jnp.asarray(data["x"]), jnp.asarray(data["cot"])
        module = MoHAttention(
            int(data["num_heads"]), x.shape[-1], data["q_proj.weight"].shape[0],
            data["o_proj.weight"].shape[0], num_kv_heads=int(data["num_kv_heads"]),
            num_shared=int(data["shared_head"]), top_k=int(data["routed_head"]), router="norm",
            rope_base=1e4, param_dtype=x.dtype, rngs=nnx.Rngs(0),
        )  # fmt: skip
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
        assign(module, {f"{ours}.kernel": data[f"{name}.weight"].T for ours, name in names.items()})
        out, pull = jax.vjp(jax.jit(lambda x: module(x)), x)
        yield Compare("out", out, data["out"], rtol)
        yield Compare("gx", pull(cot)[0], data["gx"], rtol)
