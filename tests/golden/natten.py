"""Neighborhood attention in 1, 2 and 3 dimensions against SHI-Labs/NATTEN, with gradients.

Each case runs through the kernel in float64 and float32, and forward through all pairs.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.masks import Neighborhood
from attnjax.mechanisms.spatial.fna import neighborhood_attention
from pallas_kernels.compat import enable_x64
from tests.golden.compare import Compare

RTOL = {"float64": 2e-7, "float32": 1e-5}
"""The stored results are float64 results rounded to float32, which costs 6e-8."""

RUNS = (("float64", "block_sparse"), ("float64", "dense"), ("float32", "block_sparse"))

RESULTS = {"query": "dq", "key": "dk", "value": "dv", "additional_keys": "dak",
           "additional_values": "dav"}  # fmt: skip
INPUTS = {"query": "q", "key": "k", "value": "v", "additional_keys": "ak",
          "additional_values": "av"}  # fmt: skip


def check(data):
    for case in sorted({name.partition("/")[0] for name in data}):
        part = {name.partition("/")[2] for name in data if name.startswith(f"{case}/")}
        get = {name: data[f"{case}/{name}"] for name in part}
        window = {
            argument: tuple(get[name].tolist()) if name in get else default
            for argument, name, default in (
                ("kernel_size", "ks", None), ("stride", "st", 1), ("dilation", "di", 1),
                ("is_causal", "causal", False),
            )
        }  # fmt: skip
        if "mask" in get:
            yield _mask(case, get, window)
        for dtype, implementation in RUNS:
            with enable_x64(dtype == "float64"):
                found = _run(get, window, dtype, implementation)
            for name, got in found.items():
                if name in get:
                    label = f"{case}/{name} {dtype} {implementation}"
                    yield Compare(label, got, get[name], RTOL[dtype])


def _run(get, window, dtype, implementation):
    given = {name: jnp.asarray(get[short], dtype) for name, short in INPUTS.items() if short in get}

    @jax.jit
    def run(given):
        return neighborhood_attention(
            **given, **window, return_residual=True, implementation=implementation
        )

    (out, lse), pull = jax.vjp(run, given)
    found = {"out": out, "lse": lse}
    if "cot" in get and implementation != "dense":
        (grads,) = pull((jnp.asarray(get["cot"], dtype), jnp.zeros_like(lse)))
        found |= {RESULTS[name]: grad for name, grad in grads.items()}
    return {name: np.asarray(x) for name, x in found.items()}


def _mask(case, get, window):
    """The mask of the tokens, stored as bits along the keys."""
    shape = get["q"].shape[1:-2]
    tokens = math.prod(shape)
    want = np.unpackbits(get["mask"], axis=-1, count=tokens).astype(bool)
    return Compare(f"{case}/mask", Neighborhood(shape, **window).dense(tokens)[0, 0], want, 0.0)
