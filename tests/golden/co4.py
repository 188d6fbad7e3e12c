"""Co4's modulated attention for vision against ARIA-Funded-TREND/HMS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.softmax.co4 import Co4, gather, modulate, transfer_function
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Modulated streams, picked rows, output, gradient by the input, and the transfer function."""
    wide = data["x"].dtype == np.float64
    rtol, grad_rtol = (1e-8, 1e-8) if wide else (1e-5, 2e-4)
    top_k = int(data["top_k"])
    latents = int(data["num_latents"]) if "num_latents" in data else 1
    heads = int(data["num_heads"]) if "num_heads" in data else 1
    with jax.enable_x64(wide):
        x = jnp.asarray(data["x"])
        bias = "qkv.bias" in data
        module = Co4(
            heads, x.shape[-1], data["qkv.weight"].shape[0] // 3, data["out"].shape[-1],
            num_latents=latents, top_k=top_k, use_bias=bias, param_dtype=x.dtype,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        names = ("query", "key", "value")
        parts = np.split(data["qkv.weight"], 3)
        assign(module, {f"{n}.kernel": p.T for n, p in zip(names, parts, strict=True)})
        if bias:
            parts = np.split(data["qkv.bias"], 3)
            assign(module, {f"{n}.bias": p for n, p in zip(names, parts, strict=True)})
        graph, state = nnx.split(module)

        @jax.jit
        def run(x, cot):
            layer = nnx.merge(graph, state)
            out, pull = jax.vjp(layer, x)
            q, k, v = (getattr(layer, n)(x).reshape(*x.shape[:2], -1) for n in names)
            streams = modulate(q, k, v, num_latents=latents)
            picked = gather(streams, top_k, "topk", "channel", None, latents)
            return out, pull(cot)[0], streams, picked[:2]

        cot = data["cot"] if "cot" in data else np.zeros_like(data["out"])
        out, grad, streams, (rows, index) = run(x, jnp.asarray(cot))
        for name, row in zip("qkv", rows, strict=True):
            label = f"{name}_mod_topk"
            if label in data:
                yield Compare(label, row, data[label], rtol)
        if "v_topk_index" in data:
            yield Compare("v_topk_index", index, data["v_topk_index"], 0.0)
        if "v_mod_full" in data:
            yield Compare("v_mod_full", streams[2], data["v_mod_full"], rtol)
        yield Compare("out", out, data["out"], rtol)
        if "grad_x" in data:
            yield Compare("grad_x", grad, data["grad_x"], grad_rtol)
        if "transfer_relu6" in data:
            got = transfer_function(
                jnp.asarray(data["transfer_R"]), jnp.asarray(data["transfer_C"])
            )
            yield Compare("transfer_relu6", got, data["transfer_relu6"], rtol)
