"""Dynamic mask attention against Doge (huggingface/transformers) and SmallDoges/flash-dmattn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.masks import Causal
from attnjax.mechanisms.sparse.dynamic_mask_attention import (
    DynamicMaskAttention,
    dynamic_mask,
    dynamic_mask_attention,
    value_bias,
)
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Both bias forms, masks, and gradients of sum(out * cot) in the exp form."""
    wide = data["x"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    # the official module computes its norms and its softmax in float32
    loose = 5e-6 if wide else 1e-5
    window = int(data["window_size"])
    with jax.enable_x64(wide):
        x, cot = jnp.asarray(data["x"]), jnp.asarray(data["cot"])
        module = DynamicMaskAttention(
            int(data["num_heads"]), x.shape[-1], data["q_proj.weight"].shape[0],
            num_kv_heads=int(data["num_kv_heads"]), window=window, bias_form="exp", rope_base=1e4,
            param_dtype=x.dtype, rngs=nnx.Rngs(0),
        )  # fmt: skip
        names = {"query": "q", "key": "k", "value": "v", "out": "o", "delta": "dt"}
        assign(module, {f"{ours}.kernel": data[f"{n}_proj.weight"].T for ours, n in names.items()})
        assign(
            module,
            {
                "query_norm.scale": data["q_norm.weight"],
                "key_norm.scale": data["k_norm.weight"],
                "decay": data["A"],
            },
        )
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        def forward(params: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, captured = nnx.merge(graph, params, rest)(x, capture=("weights",))
            return out, captured["weights"]

        out, pull, weights = jax.vjp(jax.jit(forward), params, x, has_aux=True)
        grads, gx = pull(cot)
        yield Compare("out_exp", out, data["out_exp"], loose)
        yield Compare("weights_exp", weights, data["weights_exp"], loose)
        yield Compare("gx_exp", gx, data["gx_exp"], loose if wide else 2e-4)
        yield Compare("gA_exp", grads["decay"][...], data["gA_exp"], loose if wide else 2e-4)
        g_delta = grads["delta"]["kernel"][...].T
        yield Compare("g_dt_proj_exp", g_delta, data["g_dt_proj_exp"], loose if wide else 2e-4)

        q, k, v = (jnp.asarray(data[name]).transpose(0, 2, 1, 3) for name in "qkv")
        kernel, decay = jnp.asarray(data["dt_proj.weight"].T), jnp.asarray(data["A"])
        bias = value_bias(v, kernel, decay)
        yield Compare("bias_linear", bias.transpose(0, 2, 1), data["bias_linear"], rtol)
        heads = dynamic_mask_attention(q, k, v, bias, window=window)
        yield Compare("heads_out_linear", heads, data["heads_out_linear"], rtol)
        b, t, g = bias.shape
        causal = Causal().dense(t)
        for name in (n for n in ("mask_topk", "mask_relu") if n in data):
            mask = dynamic_mask(bias, window=window, select=name.removeprefix("mask_"))
            yield Compare(name, mask.dense(t, batch=b, num_heads=g) & causal, data[name], 0)
        for name in data:
            size = name.removeprefix("mask_topk_block")
            if size.isdigit():
                mask = dynamic_mask(bias, window=window, block_size=int(size))
                yield Compare(name, mask.dense(t, batch=b, num_heads=g), data[name], 0)
