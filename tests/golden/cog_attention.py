"""Signed softmax attention against trestad/CogAttn's attention module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.softmax.cog_attention import CogAttention
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Output, signed weights, and the gradient of sum(out * ct) by the input."""
    wide = data["x"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        x, mask = jnp.asarray(data["x"]), jnp.asarray(data["mask"], bool)
        heads, width = int(data["heads"]), data["qw"].shape[1]
        module = CogAttention(
            heads, x.shape[-1], width, data["ow"].shape[1], causal=False, rope_base=1e4,
            num_kv_heads=heads * data["kw"].shape[1] // width, param_dtype=x.dtype,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        names = {"query": "qw", "key": "kw", "value": "vw", "out": "ow"}
        assign(module, {f"{part}.kernel": data[name] for part, name in names.items()})

        def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, captured = module(x, mask=mask, capture=("weights",))
            return out, captured["weights"]

        out, pull, weights = jax.vjp(jax.jit(forward), x, has_aux=True)
        yield Compare("out", out, data["out"], rtol)
        if "attn" in data:
            yield Compare("attn", weights, data["attn"], rtol)
        if "dx" in data:
            yield Compare("dx", pull(jnp.asarray(data["ct"]))[0], data["dx"], rtol)
