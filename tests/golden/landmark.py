"""Grouped softmax of epfml/landmark-attention: weights, output and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.dense import qk_scores
from attnjax.mechanisms.sparse.landmark_attention import grouped_softmax, landmark_attention
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Arrays of shape [b, h, t, d]; landmarks given as booleans, and by the size of the blocks."""
    for prefix in sorted({k.rpartition("/")[0] for k in data}):
        yield from check_case(data, f"{prefix}/" if prefix else "")


def check_case(data: Mapping[str, np.ndarray], case: str) -> Iterable[Compare]:
    """One sub-case."""
    wide = data[f"{case}q"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        q, k, v = (jnp.asarray(data[f"{case}{name}"]).swapaxes(1, 2) for name in "qkv")
        marks = jnp.asarray(data[f"{case}is_landmark"])
        t, s = q.shape[1], k.shape[1]
        block = int(data[f"{case}mem_freq"]) + 1
        regular = np.broadcast_to(np.arange(s) % block == block - 1, marks.shape)
        forms = {"is_landmark": marks}
        if np.array_equal(regular, data[f"{case}is_landmark"]):
            forms["block"] = block
        if f"{case}probs" in data:
            keys, queries = jnp.arange(s), jnp.arange(t) + (s - t)
            visible = (keys[None] <= queries[:, None])[None, None]
            got = grouped_softmax(qk_scores(q, k), marks, visible)
            yield Compare(f"{case}probs", got, data[f"{case}probs"], rtol)
        for name, value in forms.items():

            def forward(q, k, v, name=name, value=value, offset=s - t):
                return landmark_attention(q, k, v, **{name: value}, q_offset=offset)

            out, pull = jax.vjp(jax.jit(forward), q, k, v)
            yield Compare(f"{case}out", out.swapaxes(1, 2), data[f"{case}out"], rtol)
            if f"{case}cot" in data:
                grads = pull(jnp.asarray(data[f"{case}cot"]).swapaxes(1, 2))
                for letter, got in zip("qkv", grads, strict=True):
                    want = data[f"{case}g{letter}"]
                    loose = rtol if wide else 2e-4
                    yield Compare(f"{case}g{letter}", got.swapaxes(1, 2), want, loose)
