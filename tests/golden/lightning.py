"""Lightning attention, with and without decay, against the official torch reference."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.linear.lightning_attention import lightning_attention
from pallas_kernels.compat import enable_x64
from tests.golden.compare import Compare


def check(data):
    with enable_x64(True):
        for prefix in sorted({k.rpartition("/")[0] for k in data}):
            at = f"{prefix}/" if prefix else ""
            for name in ("decay", "nodecay"):
                if f"{at}o_{name}" in data:
                    yield from _attention(data, at, name)


def _attention(data, at, name) -> Iterator[Compare]:
    """The file's layout is [b, h, t, d]."""
    q, k, v, do = (jnp.asarray(data[at + key]).swapaxes(1, 2) for key in ("q", "k", "v", "do"))
    slopes = jnp.asarray(data[f"{at}slopes"]).reshape(-1) if name == "decay" else None

    def loss(q, k, v):
        out, state = lightning_attention(q, k, v, slopes, return_state=True)
        return jnp.vdot(out, do), (out, state)

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    (_, (out, state)), grads = run(q, k, v)
    found = {"o": out} | dict(zip(("dq", "dk", "dv"), grads, strict=True))
    found = {key: x.swapaxes(1, 2) for key, x in found.items()} | {"state": state}
    for key, got in found.items():
        if f"{at}{key}_{name}" in data:
            want = data[f"{at}{key}_{name}"]
            rtol = 1e-9 if want.dtype == np.float64 else 1e-5
            yield Compare(f"{at}{key}_{name}", got, want, rtol)
