"""Adaptive filter attention against the formulas in complex arithmetic.

`out_` and `A_bias<b>_mult<m>_robust<r>` in the numbering of the official code; `cov` is V.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.dense import softmax_weights
from attnjax.masks import Causal
from attnjax.mechanisms.memory import adaptive_filter_attention as afa
from tests.golden.compare import Compare

NAME = re.compile(r"(out|A)_bias(\d)_mult(\d)_robust(\d)")


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """The file's layout is [b, h, t, d], complex; times are 0, 1, ... ."""
    for at in sorted({name.rpartition("/")[0] for name in data}):
        yield from _case(data, f"{at}/" if at else "")


def _case(data: Mapping[str, np.ndarray], at: str) -> Iterable[Compare]:
    wide = data[at + "Q"].dtype == np.complex128
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        q, k, v = (_pairs(data[at + name]) for name in ("Q", "K", "V"))
        names = ("mu", "omega", "sigma2", "eta2", "gamma2")
        dynamics = afa.Dynamics(*(jnp.asarray(data[at + name], q.dtype) for name in names))
        nu, tau = (jnp.asarray(data[at + name], q.dtype) for name in ("nu", "tau"))
        t, s = q.shape[1], k.shape[1]
        gap = jnp.abs(jnp.arange(t)[:, None] - jnp.arange(s)[None]).astype(q.dtype)
        if at + "cov" in data:
            variance = afa.propagated_variance(dynamics, gap[None])
            yield Compare("cov", variance, data[at + "cov"], rtol)
        cases = {m.groups()[1:] for m in (NAME.fullmatch(n[len(at) :]) for n in data) if m}
        for case in sorted(cases):
            bias, noise, robust = (int(number) for number in case)
            options = afa.FilterOptions(afa.BIASES[bias], afa.NOISES[noise], bool(robust))
            tag = f"bias{bias}_mult{noise}_robust{robust}"
            # the slow path shares the scores: one case shows that its parts join
            for form in ("dense", "block_sparse")[: 2 if case == max(cases) else 1]:
                out = afa.adaptive_filter_attention(
                    q, k, v, dynamics, threshold=nu, temperature=tau, mask=Causal(),
                    options=options, implementation=form,
                )  # fmt: skip
                if f"{at}out_{tag}" in data:
                    want = data[f"{at}out_{tag}"]
                    want = np.stack([want.real, want.imag])
                    yield Compare(f"{form} {tag}", _complex(out), want, rtol)
            if f"{at}A_{tag}" in data:
                times = jnp.broadcast_to(jnp.arange(t)[None], (q.shape[0], t))
                turned = (afa.turn(x, times, dynamics.frequency, -1) for x in (q, k))
                system = afa.System(dynamics, dynamics, nu, tau, options)
                scores = afa.filter_scores(system, *turned, times, times)
                weights, _ = softmax_weights(scores, Causal().dense(t, s))
                yield Compare(f"A {tag}", weights, data[f"{at}A_{tag}"], rtol)


def _pairs(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.concatenate([x.real, x.imag], -1)).swapaxes(1, 2)


def _complex(x: jax.Array) -> np.ndarray:
    real, imag = np.split(np.asarray(x.swapaxes(1, 2)), 2, axis=-1)
    return np.stack([real, imag])
