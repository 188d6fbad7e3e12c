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
        x, ct, mask = (jnp.asarray(data[name]) for name in ("x", "ct", "mask"))
        module = CogAttention(
            int(data["heads"]), x.shape[-1], data["qw"].shape[1], causal=False, rope_base=1e4,
            param_dtype=x.dtype, rngs=nnx.Rngs(0),
        )  # fmt: skip
        names = {"query": "qw", "key": "kw", "value": "vw", "out": "ow"}
        assign(module, {f"{part}.kernel": data[name] for part, name in names.items()})

        def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, captured = module(x, mask=mask, capture=("weights",))
            return out, captured["weights"]

        out, pull, weights = jax.vjp(forward, x, has_aux=True)
        yield Compare("out", out, data["out"], rtol)
        yield Compare("attn", weights, data["attn"], rtol)
        yield Compare("dx", pull(ct)[0], data["dx"], rtol)
