"""Token-aware phase attention against an independent implementation of the paper's equations."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.masks import Causal
from attnjax.mechanisms.softmax.tapa import amplitude_width, tapa_attention, tapa_scores
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Scores, causal and full outputs, and gradients of sum(out_causal * cot)."""
    wide = data["q"].dtype == np.float64
    rtol, grad_rtol = (1e-8, 1e-8) if wide else (1e-5, 2e-4)
    theta, alpha = float(data["theta"]), float(data["alpha"])
    with jax.enable_x64(wide):
        q, k, v = (jnp.asarray(data[name]).swapaxes(1, 2) for name in ("q", "k", "v"))
        if "amp_dim" in data:  # says how a theta that does not divide the width was rounded
            theta = int(data["amp_dim"]) / q.shape[-1]
            width = np.int64(amplitude_width(q.shape[-1], theta))
            yield Compare("amp_dim", width, np.int64(data["amp_dim"]), 0.0)
        t, s = q.shape[1], k.shape[1]
        if "score" in data:
            distance = (jnp.arange(t)[:, None] - jnp.arange(s)[None])[None]
            scores = jax.jit(functools.partial(tapa_scores, theta=theta, alpha=alpha))(
                q, k, distance
            )
            yield Compare("score", scores, data["score"], rtol)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool = True) -> jax.Array:
            mask = Causal().dense(t, s) if causal else None
            return tapa_attention(q, k, v, mask=mask, theta=theta, alpha=alpha).swapaxes(1, 2)

        if "out_full" in data:
            full = jax.jit(functools.partial(attend, causal=False))(q, k, v)
            yield Compare("out_full", full, data["out_full"], rtol)

        @jax.jit
        def run(cot: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
            out, pull = jax.vjp(attend, *arrays)
            return out, *pull(cot)

        cot = data["cot"] if "cot" in data else np.zeros_like(data["out_causal"])
        out, *grads = run(jnp.asarray(cot), q, k, v)
        yield Compare("out_causal", out, data["out_causal"], rtol)
        for name, grad in zip("qkv", grads, strict=True):
            if f"grad_{name}" in data:
                label = f"grad_{name}"
                yield Compare(label, grad.swapaxes(1, 2), data[label], grad_rtol)
