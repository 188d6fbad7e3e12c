"""Learned extra key and value per head (sink="kv_bias") against locuslab/massive-activations'
GPT-2 attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from tests.golden.compare import Compare

RTOL = 1e-9
"""The case is float64."""


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Output, and gradients of sum(out * cot) by the input and by the extra key and value."""
    heads, x = int(data["n_head"]), data["x"]
    width = x.shape[-1]
    d = width // heads
    with jax.enable_x64(True):
        module = MultiHeadAttention(
            heads, width, causal=True, sink="kv_bias", param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        # rows of the fused weight are outputs in the order query, key, value, by head
        fused = np.split(data["c_attn.weight"], 3)
        shifts = np.split(data["c_attn.bias"], 3)
        for name, weight, shift in zip(("query", "key", "value"), fused, shifts, strict=True):
            projection = getattr(module, name)
            projection.kernel[...] = jnp.asarray(weight.T.reshape(width, heads, d))
            projection.bias[...] = jnp.asarray(shift.reshape(heads, d))
        module.out.kernel[...] = jnp.asarray(data["c_proj.weight"].T.reshape(heads, d, width))
        module.out.bias[...] = jnp.asarray(data["c_proj.bias"])
        graph, rest = nnx.split(module)

        def forward(x: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            state = nnx.clone(rest)
            nnx.replace_by_pure_dict(
                state, {"key_bias": key[0, :, 0], "value_bias": value[0, :, 0]}
            )
            return nnx.merge(graph, state)(x)

        given = [jnp.asarray(data[name]) for name in ("x", "k_bias", "v_bias")]
        out, pull = jax.vjp(forward, *given)
        yield Compare("out", out, data["out"], RTOL)
        if "cot" in data:
            grads = pull(jnp.asarray(data["cot"]))
            for name, grad in zip(("gx", "g_k_bias", "g_v_bias"), grads, strict=True):
                if name in data:
                    yield Compare(name, grad, data[name], RTOL)
