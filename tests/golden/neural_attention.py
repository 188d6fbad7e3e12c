"""Neural attention against awayfromzel/neural-attention-research."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.softmax.neural_attention import NeuralAttention
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Output and the gradient of sum(out * ct) by the input, all pairs at once and in tiles."""
    wide = data["x"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        x = jnp.asarray(data["x"])
        heads = int(data["heads"])
        hidden = sum(name.startswith("linear") and name.endswith("weight") for name in data) - 1
        weights = parameters(data, heads)
        causal = bool(data["causal"]) if "causal" in data else True
        for label, chunk_size in (("", None), ("tiled_", 4)):
            module = NeuralAttention(
                heads, x.shape[-1], weights["query.kernel"].shape[1],
                weights["out.kernel"].shape[1], projection_dim=int(data["projection_dim"]),
                hidden_layers=hidden, causal=causal, chunk_size=chunk_size, param_dtype=x.dtype,
                rngs=nnx.Rngs(0),
            )  # fmt: skip
            assign(module, weights)
            out, pull = jax.vjp(module, x)
            yield Compare(f"{label}out", out, data["out"], rtol)
            if "dx" in data:
                yield Compare(f"{label}dx", pull(jnp.asarray(data["ct"]))[0], data["dx"], rtol)


def parameters(data: Mapping[str, np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """The official parameters by our names; features of to_qkv count (width, role, head)."""
    qkv = data["to_qkv.weight"]
    qkv = qkv.reshape(-1, 3, heads, qkv.shape[1]).transpose(1, 3, 2, 0)  # [3, m, h, d]
    found = {
        f"{role}.kernel": kernel.reshape(qkv.shape[1], -1)
        for role, kernel in zip(("query", "key", "value"), qkv, strict=True)
    }
    names = {"W_out": "out", "q_proj": "query_down", "k_proj": "key_down"}
    names |= {f"linear{i + 1}": f"network.{i}" for i in range(9) if f"linear{i + 1}.weight" in data}
    for theirs, ours in names.items():
        found[f"{ours}.kernel"] = data[f"{theirs}.weight"].T
        if f"{theirs}.bias" in data:
            found[f"{ours}.bias"] = data[f"{theirs}.bias"]
    return found
