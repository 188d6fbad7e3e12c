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
        yield from _module(data)


def _module(data) -> Iterator[Compare]:
    x, ct = (jnp.moveaxis(jnp.asarray(data[key]), 1, -1) for key in ("x", "ct"))
    heads = int(data["heads"])
    weights = {
        name: data[f"{name}.weight"] for name in ("queries", "keys", "values", "reprojection")
    }
    weights = {name: w.reshape(w.shape[:2]).T for name, w in weights.items()}  # [in, out]
    module = EfficientAttention(
        heads, x.shape[-1], weights["keys"].shape[1], value_features=weights["values"].shape[1],
        use_bias="keys.bias" in data, param_dtype=x.dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip
    parts = {"queries": module.query, "keys": module.key, "values": module.value}
    for name, part in (parts | {"reprojection": module.out}).items():
        part.kernel[...] = jnp.asarray(weights[name].reshape(part.kernel.shape), x.dtype)
        if part.bias is not None:
            part.bias[...] = jnp.asarray(data[f"{name}.bias"].reshape(part.bias.shape), x.dtype)

    def loss(x):
        out = module(x)
        return jnp.vdot(out, ct), out

    (_, out), dx = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    rtol = 1e-9 if x.dtype == np.float64 else 1e-5
    for name, got in (("out", out), ("dx", dx)):
        yield Compare(name, jnp.moveaxis(got, -1, 1), data[name], rtol)
