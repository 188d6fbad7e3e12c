"""Learned extra key and value per head (sink="kv_bias") against locuslab/massive-activations'
GPT-2 attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Output, and gradients of sum(out * cot) by the input and by the extra key and value."""
    for prefix in sorted({key.rpartition("/")[0] for key in data}):
        yield from _case(data, f"{prefix}/" if prefix else "")


def _case(data: Mapping[str, np.ndarray], at: str) -> Iterable[Compare]:
    """One sub-case."""
    heads, x = int(data[f"{at}n_head"]), data[f"{at}x"]
    width, merged = x.shape[-1], data[f"{at}c_proj.weight"].shape[1]
    wide = x.dtype == np.float64
    rtol = 1e-9 if wide else 1e-5
    with jax.enable_x64(wide):
        module = MultiHeadAttention(
            heads, width, merged, causal=True, sink="kv_bias", param_dtype=x.dtype,
            use_bias=f"{at}c_attn.bias" in data, rngs=nnx.Rngs(0),
        )  # fmt: skip
        # rows of the fused weight are outputs in the order query, key, value, by head
        parameters = {"out.kernel": data[f"{at}c_proj.weight"].T}
        for kind, array in (("kernel", "weight"), ("bias", "bias")):
            if f"{at}c_attn.{array}" in data:
                rows = np.split(data[f"{at}c_attn.{array}"], 3)
                for name, part in zip(("query", "key", "value"), rows, strict=True):
                    parameters[f"{name}.{kind}"] = part.T
        if f"{at}c_proj.bias" in data:
            parameters["out.bias"] = data[f"{at}c_proj.bias"]
        assign(module, parameters)
        graph, rest = nnx.split(module)

        def forward(x: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            state = nnx.clone(rest)
            nnx.replace_by_pure_dict(
                state, {"key_bias": key[0, :, 0], "value_bias": value[0, :, 0]}
            )
            return nnx.merge(graph, state)(x)

        given = [jnp.asarray(data[f"{at}{name}"]) for name in ("x", "k_bias", "v_bias")]
        out, pull = jax.vjp(jax.jit(forward), *given)
        yield Compare(f"{at}out", out, data[f"{at}out"], rtol)
        if f"{at}cot" in data:
            grads = pull(jnp.asarray(data[f"{at}cot"]))
            for name, grad in zip(("gx", "g_k_bias", "g_v_bias"), grads, strict=True):
                if f"{at}{name}" in data:
                    yield Compare(f"{at}{name}", grad, data[f"{at}{name}"], rtol)
