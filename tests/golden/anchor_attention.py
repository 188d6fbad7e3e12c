"""AnchorAttention against an independent NumPy implementation."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.attention import attention
from attnjax.mechanisms.sparse.anchor_attention import anchor_attention, coverage, find_anchors
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Anchors, stripes, both partitions, shares, and gradients of sum(out * cotangent)."""
    wide = data["q"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    options = {"block": int(data["block"]), "step": int(data["step"])}
    options["theta"] = float(data["theta"])
    with jax.enable_x64(wide):
        q, k, v, cot = (jnp.asarray(data[n]).swapaxes(1, 2) for n in ("q", "k", "v", "cotangent"))
        found = jax.jit(functools.partial(find_anchors, **options))(q, k)
        yield Compare("anchor", found.anchor, data["anchor"], rtol)
        # a file may leave out the blocks and groups that are not whole
        for name, got in (
            ("pooled_q", found.pooled_query),
            ("pooled_anchor", found.pooled_anchor),
            ("stripe_mask", found.stripes),
        ):
            yield Compare(name, got[:, :, : data[name].shape[2]], data[name], rtol)
        share, recall = coverage(q, k, found.mask())
        yield Compare("mask_density", share, data["mask_density"], rtol)
        yield Compare("recall", recall, data["recall"], rtol)

        def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return anchor_attention(q, k, v, return_residual=True, **options)

        out, pull, lse = jax.vjp(jax.jit(forward), q, k, v, has_aux=True)
        yield Compare("out", out.swapaxes(1, 2), data["out"], rtol)
        yield Compare("lse", lse.swapaxes(1, 2), data["lse"], rtol)
        for name, grad in zip("qkv", pull(cot), strict=True):
            want = data[f"grad_{name}"]
            yield Compare(f"grad_{name}", grad.swapaxes(1, 2), want, rtol if wide else 2e-4)
        for gather in (False, True):
            released = jax.jit(
                functools.partial(anchor_attention, partition="released", gather=gather, **options)
            )(q, k, v)
            yield Compare("out_released", released.swapaxes(1, 2), data["out_released"], rtol)
        masked = jax.jit(functools.partial(anchor_attention, gather=False, **options))(q, k, v)
        yield Compare("out masked", masked.swapaxes(1, 2), data["out"], rtol)
        dense = attention(q, k, v, is_causal=True)
        yield Compare("dense_out", dense.swapaxes(1, 2), data["dense_out"], rtol)
