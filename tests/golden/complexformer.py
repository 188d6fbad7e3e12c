"""Adapted angles by head against an independent implementation of the reconstruction."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.softmax.complexformer import complexformer_attention
from tests.golden.compare import Compare

NAMES = ("q", "k", "v", "delta", "bias")


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Scores before the mask, the causal output, and the gradient by all five arrays."""
    wide = data["q"].dtype == np.float64
    rtol, grad_rtol = (1e-8, 1e-8) if wide else (1e-5, 2e-4)
    base = float(data["rope_base"]) if "rope_base" in data else 10000.0
    with jax.enable_x64(wide):
        given = [jnp.asarray(data[name]) for name in NAMES]
        given[:3] = [x.swapaxes(1, 2) for x in given[:3]]

        def attend(*arrays: jax.Array) -> jax.Array:
            out = complexformer_attention(*arrays, rope_base=base, is_causal=True)
            return out.swapaxes(1, 2)

        if "score" in data:
            show = functools.partial(complexformer_attention, rope_base=base, capture=("scores",))
            scores = jax.jit(show)(*given)[1]["scores"]
            yield Compare("score", scores, data["score"], rtol)

        @jax.jit
        def run(cot: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
            out, pull = jax.vjp(attend, *arrays)
            return out, *pull(cot)

        cot = jnp.asarray(data["cot"]) if "cot" in data else jnp.zeros_like(data["v"])
        out, *grads = run(cot, *given)
        yield Compare("out", out, data["out"], rtol)
        for name, grad in zip(NAMES, grads, strict=True):
            if f"grad_{name}" in data:
                grad = grad.swapaxes(1, 2) if grad.ndim == 4 else grad
                yield Compare(f"grad_{name}", grad, data[f"grad_{name}"], grad_rtol)
