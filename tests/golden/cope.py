"""Contextual positions against facebookresearch/RAM's self-attention, in four variants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.dense import qk_scores, softmax_weights
from attnjax.masks import Causal
from attnjax.mechanisms.softmax.cope import (
    cope_attention,
    cope_gates,
    count_from_right,
    interpolate,
    position_logits,
)
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Outputs, weights and gradients of sum(out * cot); heads stand along the batch axis."""
    wide = data["q"].dtype == np.float64
    rtol, grad_rtol = (1e-8, 1e-8) if wide else (1e-5, 2e-4)
    sizes = {"B": 0, "L": 1, "head_dim": 2}
    for name, axis in sizes.items():
        if name in data:
            yield Compare(name, np.int64(data["q"].shape[axis]), np.int64(data[name]), 0.0)
    if "npos" in data:
        yield Compare("npos", np.int64(data["pos_emb"].shape[-1]), np.int64(data["npos"]), 0.0)
    names = ("q", "k", "k_gate", "v", "pos_emb")
    with jax.enable_x64(wide):
        given = {name: jnp.asarray(data[name]) for name in names if name in data}
        given["pos_emb"] = given["pos_emb"][0]
        options: dict[str, dict[str, Any]] = {
            "default": {}, "nodiv": {"divide_positions": False}, "sepkey": {}, "valgate": {},
        }  # fmt: skip
        for case, option in options.items():
            if f"out_{case}" not in data:
                continue

            def forward(
                arrays: Mapping[str, jax.Array], case: str = case, option: Any = option
            ) -> jax.Array:
                gate = {"sepkey": "k_gate", "valgate": "v"}.get(case, "k")
                q, k, gate_key, v = (arrays[n][:, :, None] for n in ("q", "k", gate, "v"))
                table = arrays["pos_emb"]
                return cope_attention(q, k, v, table, gate_key=gate_key, **option)[:, :, 0]

            @jax.jit
            def run(arrays: Any, cot: jax.Array, forward: Any = forward) -> Any:
                out, pull = jax.vjp(forward, arrays)
                return out, pull(cot)[0]

            cot = jnp.asarray(data["cot"]) if "cot" in data else jnp.zeros_like(given["v"])
            out, grads = run(given, cot)
            yield Compare(f"out_{case}", out, data[f"out_{case}"], rtol)
            if f"attn_{case}" in data:
                weights = _weights(given, case, option)
                yield Compare(f"attn_{case}", weights, data[f"attn_{case}"], rtol)
            wanted = [n for n in names if f"grad_{n}_{case}" in data]
            grads["pos_emb"] = grads["pos_emb"][None]
            for name in wanted:
                label = f"grad_{name}_{case}"
                yield Compare(label, grads[name], data[label], grad_rtol)


def _weights(arrays: Mapping[str, jax.Array], case: str, option: Mapping[str, Any]) -> jax.Array:
    gate = {"sepkey": "k_gate", "valgate": "v"}.get(case, "k")
    q, k, gate_key = (arrays[n][:, :, None] for n in ("q", "k", gate))
    mask = Causal().dense(q.shape[1], k.shape[1])
    logits = position_logits(q, arrays["pos_emb"], option.get("divide_positions", True))
    positions = count_from_right(cope_gates(q, gate_key, mask))
    return softmax_weights(qk_scores(q, k) + interpolate(logits, positions), mask)[0][:, 0]
