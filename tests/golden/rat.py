"""RAT layers against CLAIRE-Labo/RAT: whole sequences, and single tokens after a prefill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.cache import StateCache
from attnjax.layers import RMSNorm
from attnjax.mechanisms.memory.rat import RATAttention
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Outputs, gradients of sum(out * cot), and the cache after the last step."""
    for at in sorted({name.rpartition("/")[0] for name in data}):
        yield from _case(data, f"{at}/" if at else "")


def _case(data: Mapping[str, np.ndarray], at: str) -> Iterable[Compare]:
    wide = data[at + "x"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    h, chunk, groups = (int(data[at + name]) for name in ("num_head", "chunk_size", "ngroups"))
    n, (_, t, m) = len(data[at + "gate_bias"]), data[at + "x"].shape
    d = n // h
    # rows of the input projection, in the official order
    names = {"gate": n, "value": n, "forget": n, "query": groups * d, "key": groups * d}
    ends = np.cumsum([*names.values()])
    with jax.enable_x64(wide):
        x = jnp.asarray(data[at + "x"])
        module = RATAttention(
            h, m, n, data[at + "out_proj.weight"].shape[0], chunk_size=chunk, groups=groups,
            param_dtype=x.dtype, rngs=nnx.Rngs(0),
        )  # fmt: skip
        rows = np.split(data[at + "in_proj.weight"], ends[:-1])
        weights = {f"{name}.kernel": row.T for name, row in zip(names, rows)}
        weights |= {"out.kernel": data[at + "out_proj.weight"].T}
        weights |= {"gate_bias": data[at + "gate_bias"]}
        assign(module, weights)
        norm = RMSNorm(m, epsilon=1e-6, param_dtype=x.dtype)
        norm.scale[...] = jnp.asarray(data[at + "input_norm.weight"])
        graph, params = nnx.split(module)

        def layer(params: nnx.State, x: jax.Array) -> jax.Array:
            return x + nnx.merge(graph, params)(norm(x))

        out, pull = jax.vjp(jax.jit(layer), params, x)
        yield Compare(at + "out", out, data[at + "out"], rtol)
        if at + "cot" in data:
            grads, dx = pull(jnp.asarray(data[at + "cot"]))
            kernels = [grads[name].kernel[...].reshape(m, -1).T for name in names]
            found = {
                "gx": dx, "g_in_proj": jnp.concatenate(kernels),
                "g_gate_bias": grads["gate_bias"][...].reshape(-1),
            }  # fmt: skip
            for name, got in found.items():
                if at + name in data:
                    yield Compare(at + name, got, data[at + name], rtol)
        if at + "step_out" not in data:
            return

        first = int(data[at + "prefill_len"])
        cache = module.init_cache(x.shape[0], t)
        if first:
            _, cache = module(norm(x[:, :first]), cache=cache)

        def step(cache: StateCache, token: jax.Array) -> tuple[StateCache, jax.Array]:
            y, cache = nnx.merge(graph, params)(norm(token[:, None]), cache=cache)
            return cache, token + y[:, 0]

        cache, steps = jax.lax.scan(step, cache, x[:, first:].swapaxes(0, 1))
        found = {"step_out": steps.swapaxes(0, 1)}
        for letter, name in (("k", "key"), ("v", "value")):
            found[f"cache_{letter}"] = cache.state[name].swapaxes(1, 2)
            found[f"last_{letter}"] = cache.state[f"last_{name}"].reshape(-1, 1, n)
        for name, got in found.items():
            if at + name in data:
                want = data[at + name]
                # the official cache may have room for more chunks than the text has
                want = want[:, :, : got.shape[2]] if name.startswith("cache") else want
                yield Compare(at + name, got, want, rtol)
