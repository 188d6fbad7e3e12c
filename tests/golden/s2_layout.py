"""Layouts of linxihui/dkernel's get_sparse_attn_mask, and attention under the first of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import attention
from attnjax.masks import BlockPattern, Causal
from attnjax.mechanisms.sparse.s2_attention import (
    block_csr,
    is_cache_efficient,
    local_stride_layout,
)
from tests.golden.compare import Compare

NAMES = {
    "num_heads": "num_heads",
    "seqlen": "length",
    "num_kv_heads": "num_kv_heads",
    "block_size": "block",
    "local_blocks": "local_blocks",
    "vert_stride": "stride",
    "num_dense_heads": "dense_heads",
    "head_sliding_step": "step",
    "head_sliding_steps": "step",
    "head_sliding_offset": "offset",
    "homo_head": "homo",
    "causal": "causal",
    "past_len": "past_length",
    "q_start_position": "q_start",
    "kv_start_position": "kv_start",
    "vert_position_type": "relative",
}
DEFAULTS = {"block": 64, "local_blocks": 4, "stride": 4}
"""The official function's own defaults, where its arguments leave something out."""

ZERO = ("past_length", "q_start", "kv_start", "offset", "dense_heads")


def options_of(text: str) -> dict:
    """Arguments of the official function under the names of this library."""
    given = {NAMES[name]: value for name, value in json.loads(text).items()}
    given = {k: 0 if k in ZERO and v is None else v for k, v in given.items()}
    if isinstance(given.get("relative"), str):
        given["relative"] = given["relative"] == "relative"
    if isinstance(given.get("local_blocks"), list):
        given["local_blocks"] = tuple(given["local_blocks"])
    return DEFAULTS | given


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Every layout and its compressed rows; then output, lse and gradients under layout 0."""
    for key in sorted(k for k in data if k.rpartition("/")[2].startswith("cfg")):
        case, _, name = key.rpartition("/")
        case = f"{case}/" if case else ""
        i = name.removeprefix("cfg")
        options = options_of(str(data[key]))
        layout = local_stride_layout(**options)
        want = data[f"{case}block_mask{i}"]
        yield Compare(f"{case}block_mask{i}", layout.astype(want.dtype), want, 0.0)
        rows, columns = block_csr(layout)
        for part, got in (("crow", rows), ("col", columns)):
            if f"{case}{part}{i}" in data:
                yield Compare(f"{case}{part}{i}", got, data[f"{case}{part}{i}"], 0.0)
        if f"{case}kv_efficient{i}" in data:
            want = data[f"{case}kv_efficient{i}"]
            got = np.asarray(is_cache_efficient(layout)).reshape(want.shape)
            yield Compare(f"{case}kv_efficient{i}", got, want.astype(bool), 0.0)
        if i == "0" and f"{case}q" in data:
            yield from check_attention(data, case, layout, options)


def check_attention(
    data: Mapping[str, np.ndarray], case: str, layout: np.ndarray, options: dict
) -> Iterable[Compare]:
    """Arrays of shape [b, h, t, d]; block sparse, and dense."""
    wide = data[f"{case}q"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    mask = BlockPattern(layout, options["block"])
    mask = mask & Causal() if options.get("causal", True) else mask
    with jax.enable_x64(wide):
        q, k, v = (jnp.asarray(data[f"{case}{name}"]).swapaxes(1, 2) for name in "qkv")
        for path in ("block_sparse", "dense"):

            def forward(q, k, v, path=path):
                return attention(q, k, v, mask=mask, implementation=path, return_residual=True)

            (out, lse), pull = jax.vjp(jax.jit(forward), q, k, v)
            if f"{case}out" in data:
                yield Compare(f"{case}out", out.swapaxes(1, 2), data[f"{case}out"], rtol)
            if f"{case}lse" in data:
                yield Compare(f"{case}lse", lse.swapaxes(1, 2), data[f"{case}lse"], rtol)
            if f"{case}cot" in data:
                cot = jnp.asarray(data[f"{case}cot"]).swapaxes(1, 2)
                for name, got in zip("qkv", pull((cot, jnp.zeros_like(lse))), strict=True):
                    want = data[f"{case}g{name}"]
                    loose = rtol if wide else 2e-4
                    yield Compare(f"{case}g{name}", got.swapaxes(1, 2), want, loose)
