"""Transformer-XL's relative attention layer against kimiyoung/transformer-xl.

The official mask step goes through float32, hence the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.softmax.transformer_xl import TransformerXLAttention
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Output with residual and norm, and the gradient by the input, u and v."""
    wide = data["w"].dtype == np.float64
    rtol, grad_rtol = (1e-7, 1e-6) if wide else (1e-5, 2e-4)
    heads, head_dim = data["r_w_bias"].shape
    with jax.enable_x64(wide):
        x = jnp.asarray(data["w"]).swapaxes(0, 1)
        memory = jnp.asarray(data["mems"]).swapaxes(0, 1) if "mems" in data else None
        hidden = jnp.asarray(data["mask_true_is_hidden"])
        hidden = hidden[..., None] if hidden.ndim == 2 else hidden
        mask = ~jnp.moveaxis(hidden, -1, 0)[:, None]
        module = TransformerXLAttention(
            heads, x.shape[-1], heads * head_dim, param_dtype=x.dtype, rngs=nnx.Rngs(0),
            residual="pre" if "pre_lnorm" in data and data["pre_lnorm"] else "post",
        )  # fmt: skip
        q, k, v = np.split(data["qkv_net.weight"], 3)
        names = {
            "query.kernel": q.T, "key.kernel": k.T, "value.kernel": v.T,
            "relative.kernel": data["r_net.weight"].T, "out.kernel": data["o_net.weight"].T,
            "content_bias": data["r_w_bias"], "position_bias": data["r_r_bias"],
            "norm.scale": data["layer_norm.weight"], "norm.bias": data["layer_norm.bias"],
        }  # fmt: skip
        assign(module, names)
        encodings = jnp.asarray(data["r"])[:, 0]
        graph, state = nnx.split(module)

        @jax.jit
        def run(state, x, cot):
            def forward(state, x):
                layer = nnx.merge(graph, state)
                return layer.segment(x, memory, encodings=encodings, mask=mask)[0]

            out, pull = jax.vjp(forward, state, x)
            return out, pull(cot)

        cot = data["cot"] if "cot" in data else np.zeros_like(data["w"])
        out, (grads, grad_x) = run(state, x, jnp.asarray(cot).swapaxes(0, 1))
        yield Compare("out", out.swapaxes(0, 1), data["out"], rtol)
        if "grad_w" in data:
            yield Compare("grad_w", grad_x.swapaxes(0, 1), data["grad_w"], grad_rtol)
        for name, key in (("content_bias", "r_w_bias"), ("position_bias", "r_r_bias")):
            if f"grad_{key}" in data:
                label = f"grad_{key}"
                yield Compare(label, grads[name].get_value(), data[label], grad_rtol)
