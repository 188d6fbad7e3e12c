"""Mixture-of-head attention against the attention class of SkyworkAI/MoH's DiT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.gates.moh import MoHAttention
from tests.golden.compare import Compare, assign

ROUTERS = {"wg": "route", "wg_0": "balance", "wg_1": "share"}


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Output, balance loss, and gradients of sum(out * cot) and of the loss alone."""
    wide = data["x"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    h, d = int(data["num_heads"]), int(data["head_dim"])
    n, m = h * d, data["x"].shape[-1]
    with jax.enable_x64(wide):
        x, cot = jnp.asarray(data["x"]), jnp.asarray(data["cot"])
        module = MoHAttention(
            h, m, n, data["proj.weight"].shape[0], causal=False, use_bias=True,
            num_shared=int(data["shared_head"]), top_k=int(data["routed_head"]) or None,
            qk_norm=bool(data["qk_norm"]), aux_coefficient=1.0, param_dtype=x.dtype,
            rngs=nnx.Rngs(0),
        )  # fmt: skip
        weights = {"out.kernel": data["proj.weight"].T}
        for i, name in enumerate(("query", "key", "value")):
            weights[f"{name}.kernel"] = data["qkv.weight"][i * n : (i + 1) * n].T
            if "qkv.bias" in data:
                weights[f"{name}.bias"] = data["qkv.bias"][i * n : (i + 1) * n]
        if "proj.bias" in data:
            weights["out.bias"] = data["proj.bias"]
        weights |= {
            f"{ours}.kernel": data[f"{name}.weight"].T
            for name, ours in ROUTERS.items()
            if f"{name}.weight" in data
        }
        for name, ours in (("q_norm", "query_ln"), ("k_norm", "key_ln")):
            if f"{name}.weight" in data:
                weights[f"{ours}.scale"] = data[f"{name}.weight"]
            if f"{name}.bias" in data:
                weights[f"{ours}.bias"] = data[f"{name}.bias"]
        assign(module, weights)
        graph, params = nnx.split(module)

        def forward(params: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out, captured = nnx.merge(graph, params)(x, capture=("aux_loss",))
            return out, captured["aux_loss"]

        (out, loss), pull = jax.vjp(jax.jit(forward), params, x)
        yield Compare("out", out, data["out"], rtol)
        grads, dx = pull((cot, jnp.zeros_like(loss)))
        yield Compare("gx", dx, data["gx"], rtol)
        of_loss, _ = pull((jnp.zeros_like(out), jnp.ones_like(loss)))
        for name, ours in ROUTERS.items():
            if f"g_{name}" in data:
                yield Compare(f"g_{name}", grads[ours].kernel[...].T, data[f"g_{name}"], rtol)
        # the official mean of the mask is float32
        if "l_aux" in data:
            yield Compare("l_aux", loss, data["l_aux"], max(rtol, 1e-6))
        if "g_wg_of_l_aux" in data:
            got = of_loss["route"].kernel[...].T
            yield Compare("g_wg_of_l_aux", got, data["g_wg_of_l_aux"], max(rtol, 1e-6))
