"""FAST's score function: outputs with and without normalization, gradients without."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.linear.fast_fastmax import fastmax
from tests.golden.compare import Compare

OUTPUT = re.compile(
    r"(?P<at>(?:.*/)?)o_(?P<case>p(?P<order>[12])_(?P<range>full|causal)_(?P<norm>norm|raw))"
)
"""Names of the outputs: the order, whether causal, and whether normalized."""


def check(data: Mapping[str, np.ndarray]) -> Iterator[Compare]:
    """Every output that the file holds; q, k, v are [b, h, t, d]."""
    for name in data:
        found = OUTPUT.fullmatch(name)
        if found:
            with jax.enable_x64(data[f"{found['at']}q"].dtype == np.float64):
                yield from _case(data, name, found)


def _case(data: Mapping[str, np.ndarray], name: str, found: re.Match[str]) -> Iterator[Compare]:
    at = found["at"]
    q, k, v = (jnp.moveaxis(jnp.asarray(data[at + x]), 1, 2) for x in "qkv")
    # linear weights of raw scores have denominators near 0
    loose = found["order"] == "1" and found["norm"] == "raw"
    wide = q.dtype == jnp.float64
    rtol = (1e-6 if loose else 1e-8) if wide else (1e-2 if loose else 1e-5)
    slack = rtol if wide or loose else 2e-4

    def call(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return fastmax(
            q, k, v, order=int(found["order"]), causal=found["range"] == "causal",
            normalize="max" if found["norm"] == "norm" else "none",
        )  # fmt: skip

    wanted = [letter for letter in "qkv" if f"{at}d{letter}_{found['case']}" in data]
    if not wanted:
        out = jax.jit(call)(q, k, v)
        yield Compare(name, jnp.moveaxis(out, 2, 1), data[name], rtol)
        return
    ct = jnp.moveaxis(jnp.asarray(data[f"{at}ct"]), 1, 2)

    @jax.jit
    def both(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        out, pull = jax.vjp(call, q, k, v)
        return out, dict(zip("qkv", pull(ct.astype(out.dtype)), strict=True))

    out, grads = both(q, k, v)
    yield Compare(name, jnp.moveaxis(out, 2, 1), data[name], rtol)
    for letter in wanted:
        other = f"{at}d{letter}_{found['case']}"
        yield Compare(other, jnp.moveaxis(grads[letter], 2, 1), data[other], slack)
