"""RAT layers against CLAIRE-Labo/RAT: whole sequences, and single tokens after a prefill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.layers import RMSNorm
from attnjax.mechanisms.memory.rat import RATAttention
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Outputs, gradients of sum(out * cot), and the cache after the last step."""
    wide = data["x"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    h, chunk, groups = (int(data[name]) for name in ("num_head", "chunk_size", "ngroups"))
    n, m = len(data["gate_bias"]), data["x"].shape[-1]
    d, t = n // h, data["x"].shape[1]
    # rows of the input projection, in the official order
    names = {"gate": n, "value": n, "forget": n, "query": groups * d, "key": groups * d}
    ends = np.cumsum([*names.values()])
    with jax.enable_x64(wide):
        x, cot = jnp.asarray(data["x"]), jnp.asarray(data["cot"])
        module = RATAttention(
            h, m, n, data["out_proj.weight"].shape[0], chunk_size=chunk, groups=groups,
            param_dtype=x.dtype, rngs=nnx.Rngs(0),
        )  # fmt: skip
        rows = np.split(data["in_proj.weight"], ends[:-1])
        weights = {f"{name}.kernel": row.T for name, row in zip(names, rows)}
        weights |= {"out.kernel": data["out_proj.weight"].T}
        assign(module, weights)
        module.gate_bias[...] = jnp.asarray(data["gate_bias"].reshape(h, d))
        norm = RMSNorm(m, epsilon=1e-6, param_dtype=x.dtype)
        norm.scale[...] = jnp.asarray(data["input_norm.weight"])
        graph, params = nnx.split(module)

        def layer(params: nnx.State, x: jax.Array) -> jax.Array:
            return x + nnx.merge(graph, params)(norm(x))

        out, pull = jax.vjp(jax.jit(layer), params, x)
        yield Compare("out", out, data["out"], rtol)
        grads, dx = pull(cot)
        yield Compare("gx", dx, data["gx"], rtol)
        got = jnp.concatenate([grads[name].kernel[...].reshape(m, -1).T for name in names])
        yield Compare("g_in_proj", got, data["g_in_proj"], rtol)
        got = grads["gate_bias"][...].reshape(-1)
        yield Compare("g_gate_bias", got, data["g_gate_bias"], rtol)

        first = int(data["prefill_len"])
        slots = data["cache_k"].shape[2]
        cache = module.init_cache(x.shape[0], max(t, slots * chunk))
        if first:
            _, cache = module(norm(x[:, :first]), cache=cache)

        def step(cache: nnx.State, token: jax.Array) -> tuple[nnx.State, jax.Array]:
            y, cache = nnx.merge(graph, params)(norm(token[:, None]), cache=cache)
            return cache, token + y[:, 0]

        cache, steps = jax.lax.scan(step, cache, x[:, first:].transpose(1, 0, 2))
        yield Compare("step_out", steps.transpose(1, 0, 2), data["step_out"], rtol)
        state = cache.state
        for name, ours in (("cache_k", "key"), ("cache_v", "value")):
            yield Compare(name, state[ours][:, :slots].transpose(0, 2, 1, 3), data[name], rtol)
        for name, ours in (("last_k", "last_key"), ("last_v", "last_value")):
            yield Compare(name, state[ours].reshape(-1, 1, n), data[name], rtol)
