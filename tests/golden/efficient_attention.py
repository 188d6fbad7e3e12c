"""The official 2-D efficient attention module: [b, c, height, width], 1 x 1 convolutions."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.linear.efficient_attention import EfficientAttention
from pallas_kernels.compat import enable_x64
from tests.golden.compare import Compare


def check(data):
    with enable_x64(True):
        for prefix in sorted({key.rpartition("/")[0] for key in data}):
            yield from _module(data, f"{prefix}/" if prefix else "")


def _module(data, at: str) -> Iterator[Compare]:
    """One sub-case."""
    x = jnp.moveaxis(jnp.asarray(data[f"{at}x"]), 1, -1)
    weights = {
        name: data[f"{at}{name}.weight"] for name in ("queries", "keys", "values", "reprojection")
    }
    weights = {name: w.reshape(w.shape[:2]).T for name, w in weights.items()}  # [in, out]
    module = EfficientAttention(
        int(data[f"{at}heads"]), x.shape[-1], weights["keys"].shape[1],
        value_features=weights["values"].shape[1], use_bias=f"{at}keys.bias" in data,
        param_dtype=x.dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip
    parts = {"queries": module.query, "keys": module.key, "values": module.value}
    for name, part in (parts | {"reprojection": module.out}).items():
        part.kernel[...] = jnp.asarray(weights[name].reshape(part.kernel.shape), x.dtype)
        if part.bias is not None:
            part.bias[...] = jnp.asarray(data[f"{at}{name}.bias"].reshape(part.bias.shape), x.dtype)
    rtol = 1e-9 if x.dtype == np.float64 else 1e-5
    out, pull = jax.vjp(jax.jit(module), x)
    yield Compare(f"{at}out", jnp.moveaxis(out, -1, 1), data[f"{at}out"], rtol)
    if f"{at}ct" in data:
        (dx,) = pull(jnp.moveaxis(jnp.asarray(data[f"{at}ct"]), 1, -1))
        yield Compare(f"{at}dx", jnp.moveaxis(dx, -1, 1), data[f"{at}dx"], rtol)
