"""Chunked attention with bias and mask, and a causal case with large scores."""

import jax
import jax.numpy as jnp

from attnjax.mechanisms.softmax.memory_efficient_attention import memory_efficient_attention
from pallas_kernels.compat import enable_x64
from tests.golden.compare import Compare

OVERFLOW_FACTOR = 40.0
"""The case `out_causal_big` multiplies the queries by this."""


def check(data):
    with enable_x64(True):
        chunks = {"query_chunk": int(data["query_chunk"]), "key_chunk": int(data["key_chunk"])}
        q, k, v = (jnp.asarray(data[name]) for name in "qkv")
        bias = jnp.asarray(data["bias"]) if "bias" in data else None
        mask = jnp.asarray(data["mask"]) if "mask" in data else None

        def plain(q, k, v):
            return memory_efficient_attention(q, k, v, bias, mask, **chunks)

        out, pull = jax.vjp(jax.jit(plain), q, k, v)
        yield Compare("out", out, data["out"], 1e-9)
        if "cot" in data:
            for name, got in zip("qkv", pull(jnp.asarray(data["cot"])), strict=True):
                if f"g{name}" in data:
                    yield Compare(f"g{name}", got, data[f"g{name}"], 1e-9)
        if "out_causal_big" in data:
            big, lse = memory_efficient_attention(
                OVERFLOW_FACTOR * q, k, v, causal=True, return_residual=True, **chunks
            )
            yield Compare("out_causal_big", big, data["out_causal_big"], 1e-9)
            yield Compare("lse_causal_big", lse.transpose(0, 2, 1), data["lse_causal_big"], 1e-9)
