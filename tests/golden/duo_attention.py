"""DuoAttention against mit-han-lab/duo-attention: training of gates, and deployment in chunks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.sparse.duo_attention import DuoAttention, streaming_mask
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Both streams with gradients of sum(out_stream * cot); chunks with the caches they leave."""
    wide = data["x_full"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    sinks, recent = int(data["sink"]), int(data["recent"])
    mask = data["streaming_mask"]
    yield Compare("streaming_mask", streaming_mask(sinks, recent).dense(len(mask))[0, 0], mask, 0)
    with jax.enable_x64(wide):
        x_full, x_stream, x = (jnp.asarray(data[n]) for n in ("x_full", "x_stream", "deploy_x"))
        module = DuoAttention(
            int(data["num_heads"]), x_full.shape[-1], data["q_proj.weight"].shape[0],
            num_kv_heads=int(data["num_kv_heads"]), sinks=sinks, recent=recent,
            chunk_rule="released", rope_base=1e4, param_dtype=x_full.dtype, rngs=nnx.Rngs(0),
        )  # fmt: skip
        names = {"query": "q", "key": "k", "value": "v", "out": "o"}
        assign(module, {f"{ours}.kernel": data[f"{n}_proj.weight"].T for ours, n in names.items()})
        assign(module, {"gate": data["alpha"]})
        graph, params, rest = nnx.split(module, nnx.Param, ...)

        def forward(params: nnx.State, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out_full, out_stream = nnx.merge(graph, params, rest).streams(x_full, x)
            return out_stream, out_full

        out, pull, out_full = jax.vjp(jax.jit(forward), params, x_stream, has_aux=True)
        grads, g_x = pull(jnp.asarray(data["cot"]))
        yield Compare("out_full", out_full, data["out_full"], rtol)
        yield Compare("out_stream", out, data["out_stream"], rtol)
        yield Compare("g_x_stream", g_x, data["g_x_stream"], rtol if wide else 2e-4)
        yield Compare("g_alpha", grads["gate"][...], data["g_alpha"], rtol if wide else 2e-4)

        deployed = module.deploy(data["deploy_full_heads"] > 0.5)
        cache = deployed.init_cache(*x.shape[:2])
        step = jax.jit(lambda x, cache: deployed(x, cache=cache))
        outs, start = [], 0
        for size in data["chunks"]:
            y, cache = step(x[:, start : start + int(size)], cache)
            outs.append(y)
            start += int(size)
        yield Compare("deploy_out", jnp.concatenate(outs, axis=1), data["deploy_out"], rtol)
        for name, part in (("cache_full_kv", cache.full), ("cache_stream_kv", cache.stream)):
            if part is None or name not in data:
                data.get(name)  # of no head: nothing to compare
                continue
            want = data[name]
            kv = jnp.concatenate([part.key, part.value]).swapaxes(1, 2)  # [2 b, g, slots, d]
            if part is cache.stream:  # in the order of the tokens, empty slots last
                order = jnp.argsort(jnp.where(part.positions[0] < 0, start, part.positions[0]))
                kv = kv[:, :, order]
            yield Compare(name, kv[:, :, : want.shape[2]], want, rtol)
