"""Associations, recall at growing load, and classical experiments, against the definitions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.memory.pavlovian_conditioning import (
    PROTOCOLS,
    RULES,
    association_history,
    conditioning_protocol,
    pavlovian_conditioning,
    recall_quality,
)
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """The file holds one head: keys [n, d], values [n, e]."""
    for at in sorted({name.rpartition("/")[0] for name in data}):
        yield from _case(data, f"{at}/" if at else "")


def _case(data: Mapping[str, np.ndarray], at: str) -> Iterable[Compare]:
    wide = data[at + "keys"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        keys, values = (jnp.asarray(data[at + name]) for name in ("keys", "values"))
        state, recall = _store(keys, values)
        quality = recall_quality(keys, values, recall)
        found = {
            "state": state, "recall": recall, "interference_energy": quality["interference"],
            "expected_interference": quality["expected"],
        }  # fmt: skip
        eta, gamma = float(data[at + "eta"]), float(data[at + "gamma"])
        for rule in RULES:
            options = dict(rule=rule, eta=eta, gamma=gamma if rule == "decay" else 0.0)
            history = association_history(keys, values, **options)
            found[f"states_{rule}"] = history
            if f"{at}states_{rule}" in data:  # the chunked form ends in the same state
                last = _store(keys, values, **options)[0]
                yield Compare(f"last {rule}", last, data[f"{at}states_{rule}"][-1], rtol)
            for name in PROTOCOLS:
                full = f"{at}{name}_{rule}"
                if full in data:
                    phases = 2 if name in ("extinction", "blocking") else 1
                    curve = conditioning_protocol(name, len(data[full]) // phases, **options)
                    yield Compare(full, curve, data[full], rtol)
        if at + "load" in data:
            qualities, first = [], 0
            for n in (int(n) for n in data[at + "load"]):
                part = slice(first, first + n)
                k, v = (jnp.asarray(data[f"{at}load_{x}"][part]) for x in ("keys", "values"))
                qualities.append(recall_quality(k, v, _store(k, v)[1]))
                first += n
            for name in ("accuracy", "snr"):
                found[f"load_{name}"] = jnp.stack([quality[name] for quality in qualities])
        for name, got in found.items():
            if at + name in data:
                yield Compare(at + name, got, data[at + name], rtol)


def _store(keys: jax.Array, values: jax.Array, **options) -> tuple[jax.Array, jax.Array]:
    """S after all pairs, and what it recalls at each key."""
    k, v = (x[None, :, None] for x in (keys, values))
    _, state = pavlovian_conditioning(k, k, v, return_state=True, **options)
    return state[0, 0].T, keys @ state[0, 0]
