"""Multi-DConv-head attention against labmlai's implementation, in three ways to share kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.softmax.mdha import MDHA
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Output and gradient of sum(out * cot) by the input; arrays are [tokens, batch, width]."""
    cases = sorted(name[:-4] for name in data if name == "out" or name.endswith("/out"))
    for case in cases:
        prefix = f"{case}/" if case else ""
        part = {n: n for n in data if "/" not in n}  # what all cases share
        part |= {n.removeprefix(prefix): n for n in data if n.startswith(prefix)}
        x = data[part["x"]]
        wide = x.dtype == np.float64
        with jax.enable_x64(wide):
            weights = {n: data[key] for n, key in part.items() if n.endswith(("weight", "bias"))}
            x = jnp.asarray(x).swapaxes(0, 1)
            module = _module(weights, int(data[part["heads"]]), case, x)
            module.causal = bool(data[part["causal"]]) if "causal" in part else True
            run = nnx.jit(lambda module, x: jax.vjp(module, x))
            out, pull = run(module, x)
            rtol, grad_rtol = (1e-8, 1e-8) if wide else (1e-5, 2e-4)
            yield Compare(f"{prefix}out", out.swapaxes(0, 1), data[part["out"]], rtol)
            if "grad_x" in part:
                grad = pull(jnp.asarray(data[part["cot"]]).swapaxes(0, 1))[0].swapaxes(0, 1)
                yield Compare(f"{prefix}grad_x", grad, data[part["grad_x"]], grad_rtol)


def _module(weights: Mapping[str, np.ndarray], heads: int, case: str, x: jax.Array) -> MDHA:
    features = weights["query.0.linear.weight"].shape[0]
    width = weights["query.1.conv.weight"].shape[-1]
    module = MDHA(
        heads, x.shape[-1], features, weights["output.weight"].shape[0], width=width,
        sharing=_sharing(case, weights), use_bias="output.bias" in weights,
        conv_bias="query.1.conv.bias" in weights, param_dtype=x.dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip
    given: dict[str, Any] = {"out.kernel": weights["output.weight"].T}
    if "output.bias" in weights:
        given["out.bias"] = weights["output.bias"]
    for name in ("query", "key", "value"):
        given[f"{name}.kernel"] = weights[f"{name}.0.linear.weight"].T
        if f"{name}.0.linear.bias" in weights:
            given[f"{name}.bias"] = weights[f"{name}.0.linear.bias"]
        given[f"convolutions.{name}"] = weights[f"{name}.1.conv.weight"][:, 0].T
        if f"{name}.1.conv.bias" in weights:
            given[f"convolutions.{name}_bias"] = weights[f"{name}.1.conv.bias"]
    assign(module, given)
    return module


def _sharing(case: str, weights: Mapping[str, np.ndarray]) -> Any:
    """The name of the case, or what the number of kernels says."""
    kernels, features = weights["query.1.conv.weight"].shape[0], weights["output.weight"].shape[1]
    if case in ("per_dim", "shared", "per_head"):
        return case
    return {1: "shared", features: "per_head"}.get(kernels, "per_dim")
