"""The running mean and the Taylor form of deconstructed attention, causal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.softmax.deconstructing_attention import (
    nonapprox_attention,
    taylor_attention,
)
from tests.golden.compare import Compare

FORMS = {
    "nonapprox": nonapprox_attention,
    "taylor": lambda q, k, v: taylor_attention(q, k, v, is_causal=True),
}


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Output and the gradients of sum(out * ct) of every form in the file."""
    wide = data["q"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        # [b, h, t, d] there, [b, t, h, d] here
        q, k, v = (jnp.asarray(data[n]).swapaxes(1, 2) for n in "qkv")
        ct = jnp.asarray(data["ct"]).swapaxes(1, 2) if "ct" in data else jnp.zeros_like(v)
        for form, function in FORMS.items():
            if f"o_{form}" not in data:
                continue
            out, pull = jax.vjp(jax.jit(function), q, k, v)
            yield Compare(f"o_{form}", out.swapaxes(1, 2), data[f"o_{form}"], rtol)
            for name, grad in zip("qkv", pull(ct), strict=True):
                want = f"d{name}_{form}"
                if want in data:  # gradients pass through exponentials twice
                    yield Compare(want, grad.swapaxes(1, 2), data[want], rtol if wide else 2e-4)
