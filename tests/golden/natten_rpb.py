"""Relative position bias against the CPU kernels of SHI-Labs/NATTEN 0.17.1, in float32."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.masks import Neighborhood
from attnjax.mechanisms.spatial.fna import _dense, neighborhood_attention
from tests.golden.compare import Compare

RTOL = 1e-5
"""The case is float32."""


def check(data):
    for case in sorted({name.partition("/")[0] for name in data}):
        part = {name.partition("/")[2] for name in data if name.startswith(f"{case}/")}
        get = {name: data[f"{case}/{name}"] for name in part}
        window = {"kernel_size": tuple(get["ks"].tolist()), "dilation": tuple(get["di"].tolist())}
        q, k, v, table = (jnp.asarray(get[name]) for name in ("q", "k", "v", "rpb"))
        grads = {}
        for implementation in ("dense", "block_sparse"):

            def run(q, k, v, table, implementation=implementation, window=window):
                return neighborhood_attention(
                    q, k, v, rel_bias=table, implementation=implementation, **window
                )

            out, pull = jax.vjp(jax.jit(run), q, k, v, table)
            yield Compare(f"{case}/out {implementation}", out, get["out"], RTOL)
            grads[implementation] = pull(jnp.asarray(get["out"]))
        # no gradients are stored: both paths must agree on them
        for name, *pair in zip(("q", "k", "v", "rpb"), *grads.values(), strict=True):
            yield Compare(f"{case}/d{name}", *pair, RTOL)
        if "logits" in get:
            yield Compare(f"{case}/logits", _logits(q, k, v, table, window), get["logits"], RTOL)


def _logits(q, k, v, table, window):
    """Scores of the keys of each window in row-major order, [b, h, *shape, prod(kernel_size)]."""
    shape = q.shape[1:-2]
    *_, captured = _dense(
        q, k, v, rel_bias=table, capture=("scores",), return_residual=True, head_groups=None,
        additional_keys=None, additional_values=None, stride=1, is_causal=False, **window,
    )  # fmt: skip
    seen = np.asarray(Neighborhood(shape, **window).dense(math.prod(shape))[0, 0])
    scores = np.asarray(captured["scores"])
    inside = [scores[:, :, i, keys] for i, keys in enumerate(seen)]
    return np.stack(inside, axis=2).reshape(*scores.shape[:2], *shape, -1)
