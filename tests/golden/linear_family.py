"""The chunked linear recurrence against the naive recurrences of flash-linear-attention."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.linear.linear_attention import linear_attention
from pallas_kernels.compat import enable_x64
from tests.golden.compare import Compare

OPTIONS = {
    "scalar": {"g": "decay"},
    "vector": {"gk": "decay"},
    "gdelta": {"g": "decay", "beta": "beta"},
    "delta": {"beta": "beta"},
}
"""Name of a recurrence -> the file's keys that it uses, and the argument each of them is."""


def check(data):
    with enable_x64(True):
        for prefix in sorted({k.rpartition("/")[0] for k in data}):
            at = f"{prefix}/" if prefix else ""
            for name in OPTIONS:
                if f"{at}o_{name}" in data:
                    yield from _recurrence(data, at, name)


def _recurrence(data, at, name) -> Iterator[Compare]:
    arguments = {"q": "query", "k": "key", "v": "value"} | OPTIONS[name]
    if f"{at}h0" in data:
        arguments["h0"] = "initial_state"
    scale = float(data[f"{at}scale"]) if f"{at}scale" in data else None
    inputs = {key: jnp.asarray(data[at + key]) for key in arguments}
    do = jnp.asarray(data[f"{at}do"])

    def loss(inputs):
        named = {arguments[key]: x for key, x in inputs.items()}
        out, state = linear_attention(**named, scale=scale, return_state=True)
        return jnp.vdot(out, do), (out, state)

    (_, (out, state)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(inputs)
    found = {"o": out, "hT": state} | {f"d{key}": x for key, x in grads.items()}
    for key, got in found.items():
        if f"{at}{key}_{name}" in data:
            want = data[f"{at}{key}_{name}"]
            rtol = 1e-9 if want.dtype == np.float64 else 1e-5
            yield Compare(f"{at}{key}_{name}", got, want, rtol)
