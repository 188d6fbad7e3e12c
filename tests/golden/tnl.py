"""TransNormerLLM layers with the parameter names of the released model."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.layers import simple_rms_norm
from attnjax.mechanisms.linear.lightning_attention import lightning_slopes
from attnjax.mechanisms.linear.transnormer import TransNormerBlock
from pallas_kernels.compat import enable_x64
from tests.golden.compare import Compare


def check(data):
    with enable_x64(True):
        yield from _model(data)


def _model(data) -> Iterator[Compare]:
    x = jnp.asarray(data["x"])
    count, rtol = int(data["n_layers"]), 1e-9 if x.dtype == np.float64 else 1e-5
    layers = [_layer(data, i, count, x.dtype) for i in range(count)]
    ct = jnp.asarray(data["ct"])

    def loss(x):
        hidden = []
        for layer in layers:
            x = layer(x)
            hidden.append(x)
        out = simple_rms_norm(x)
        return jnp.vdot(out, ct), (out, hidden)

    (_, (out, hidden)), dx = jax.jit(jax.value_and_grad(loss, has_aux=True))(x)
    for i, h in enumerate(hidden):
        if f"hidden_{i}" in data:
            yield Compare(f"hidden_{i}", h, data[f"hidden_{i}"], rtol)
    yield Compare("out", out, data["out"], rtol)
    yield Compare("dx", dx, data["dx"], rtol)
    if "slopes" in data:
        yield Compare(
            "slopes", lightning_slopes(int(data["heads"])), data["slopes"].reshape(-1), rtol
        )


def _layer(data, i: int, count: int, dtype) -> TransNormerBlock:
    """Layer i with the file's weights, which are [out, in]; LRPE in the first layer only."""
    heads = int(data["heads"])
    mixer, mlp = f"layers.{i}.token_mixer", f"layers.{i}.channel_mixer"
    qkvu = data[f"{mixer}.qkvu_proj.weight"].T
    width, merged = qkvu.shape[0], qkvu.shape[1] // 4
    layer = TransNormerBlock(
        heads, width, data[f"{mlp}.l1.weight"].shape[0], qkv_features=merged, layer=i,
        num_layers=count, lrpe=i == 0 and "lrpe.theta" in data, param_dtype=dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip
    head_dim = merged // heads
    weights = [
        (layer.mixer.qkvu.kernel, qkvu.reshape(width, 4, heads, head_dim)),
        (
            layer.mixer.out.kernel,
            data[f"{mixer}.out_proj.weight"].T.reshape(heads, head_dim, width),
        ),
        (layer.gate.kernel, data[f"{mlp}.l1.weight"].T),
        (layer.up.kernel, data[f"{mlp}.l2.weight"].T),
        (layer.down.kernel, data[f"{mlp}.l3.weight"].T),
    ]
    if layer.mixer.lrpe is not None:
        weights.append((layer.mixer.lrpe.theta, data["lrpe.theta"].reshape(heads, head_dim)))
    for parameter, value in weights:
        parameter[...] = jnp.asarray(value, dtype)
    return layer
