"""Relative attention with learned tables against labmlai's implementation.

Row n of a table slice belongs to the offset key - query = slice_start_offset + n.
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
    """Output without residual, and the gradient of sum(out * cot) by the input."""
    wide = data["x"].dtype == np.float64
    rtol, grad_rtol = (1e-8, 1e-8) if wide else (1e-5, 2e-4)
    heads = int(data["heads"])
    causal = bool(data["causal"]) if "causal" in data else True
    with jax.enable_x64(wide):
        x = jnp.asarray(data["x"]).swapaxes(0, 1)
        memory = jnp.asarray(data["mem"]).swapaxes(0, 1) if "mem" in data else None
        rows, start = data["key_pos_embeddings_slice"], int(data["slice_start_offset"])
        keys = x.shape[1] + (0 if memory is None else memory.shape[1])
        distance = max(keys, -start, start + len(rows))
        features = data["query.linear.weight"].shape[0]
        module = TransformerXLAttention(
            heads, x.shape[-1], features, data["output.weight"].shape[0], encoding="learned",
            max_distance=distance, causal=causal, use_bias=True, param_dtype=x.dtype,
            rngs=nnx.Rngs(0),
        )  # fmt: skip

        def placed(slice_: np.ndarray) -> np.ndarray:
            table = np.zeros((2 * distance, *slice_.shape[1:]), slice_.dtype)
            table[distance + start : distance + start + len(slice_)] = slice_
            return table

        names = {
            "query.kernel": data["query.linear.weight"].T,
            "key.kernel": data["key.linear.weight"].T,
            "value.kernel": data["value.linear.weight"].T, "out.kernel": data["output.weight"].T,
            "content_bias": data["query_pos_bias"], "table": placed(rows),
            "table_bias": placed(data["key_pos_bias_slice"]),
        }  # fmt: skip
        for name, key in (("value.bias", "value.linear.bias"), ("out.bias", "output.bias")):
            if key in data:  # they start at 0
                names[name] = data[key]
        assign(module, names)
        graph, state = nnx.split(module)

        @jax.jit
        def run(x, cot):
            def forward(x):
                return nnx.merge(graph, state).segment(x, memory)[0]

            out, pull = jax.vjp(forward, x)
            return out, pull(cot)[0]

        cot = data["cot"] if "cot" in data else np.zeros_like(data["out"])
        out, grad = run(x, jnp.asarray(cot).swapaxes(0, 1))
        yield Compare("out", out.swapaxes(0, 1), data["out"], rtol)
        if "grad_x" in data:
            yield Compare("grad_x", grad.swapaxes(0, 1), data["grad_x"], grad_rtol)
