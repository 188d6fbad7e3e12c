"""Chunked attention with bias and mask, and a causal case with large scores."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.softmax.memory_efficient_attention import memory_efficient_attention
from pallas_kernels.compat import enable_x64
from tests.golden.compare import Compare

OVERFLOW_FACTOR = 40.0
"""The case `out_causal_big` multiplies the queries by this."""


def check(data):
    with enable_x64(True):
        for prefix in sorted({key.rpartition("/")[0] for key in data}):
            yield from _case(data, f"{prefix}/" if prefix else "")


def _case(data, at: str) -> Iterator[Compare]:
    """One sub-case."""
    chunks = {
        "query_chunk": int(data[f"{at}query_chunk"]),
        "key_chunk": int(data[f"{at}key_chunk"]),
    }
    q, k, v = (jnp.asarray(data[at + name]) for name in "qkv")
    rtol = 1e-9 if q.dtype == np.float64 else 1e-5
    given = {name: jnp.asarray(data[at + name]) for name in ("bias", "mask") if at + name in data}

    def plain(q, k, v):
        return memory_efficient_attention(q, k, v, **given, **chunks)

    if f"{at}out" in data:
        out, pull = jax.vjp(jax.jit(plain), q, k, v)
        yield Compare(f"{at}out", out, data[f"{at}out"], rtol)
        if f"{at}cot" in data:
            for name, got in zip("qkv", pull(jnp.asarray(data[f"{at}cot"])), strict=True):
                if f"{at}g{name}" in data:
                    yield Compare(f"{at}g{name}", got, data[f"{at}g{name}"], rtol)
    if f"{at}out_causal_big" in data:
        big, lse = memory_efficient_attention(
            OVERFLOW_FACTOR * q, k, v, causal=True, return_residual=True, **chunks
        )
        found = {"out_causal_big": big, "lse_causal_big": lse.transpose(0, 2, 1)}
        for name, got in found.items():
            if at + name in data:
                yield Compare(at + name, got, data[at + name], rtol)
