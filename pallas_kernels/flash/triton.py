"""Block-sparse flash attention for NVIDIA GPUs from compute capability 8.0 on, in Pallas Triton.

Forward and backward bodies of `flash_attention`. One program owns a block of queries (or of keys,
for the gradients of keys and values) and walks its list of tiles: FULL ones without a mask, then
PARTIAL ones. Lists, masks and everything a score_mod looks up are operands in memory, so masks
computed under `jax.jit` cost no recompilation. Nothing is added atomically: results are the same
bit for bit in every run.

JAX 0.11 deprecates this backend; what depends on it is in `triton*.py` and `compat.py` alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import compat
from pallas_kernels.blocklist import BlockList
from pallas_kernels.dispatch import Target, Unsupported
from pallas_kernels.flash import triton_backward, triton_forward, triton_pairs
from pallas_kernels.flash.gpu_arch import require_capability
from pallas_kernels.flash.lists import make_lists
from pallas_kernels.flash.spec import FlashConfig, FlashSpec
from pallas_kernels.flash.triton_config import (
    KernelConfig,
    TritonConfig,
    configured,
    default_config,
    is_busy,
)
from pallas_kernels.flash.triton_tiles import Call

Operands = dict[str, Any]

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)

MAX_WIDTH = 256
"""Widest head: wider ones leave no room for two tiles in a multiprocessor's memory."""


def forward(operands: Operands, spec: FlashSpec, target: Target) -> tuple[jax.Array, jax.Array]:
    """Output [b, t, h, e] in the query's dtype and lse [b, t, h] float32, -inf for empty rows.

    Args:
      operands, spec, target: see `pallas_kernels.flash.attention`. `spec.config.options` may hold
        "num_warps" and "num_stages" for every kernel, and the same with "_dq", "_dkv" or "_pairs"
        at the end for one of them.

    Raises:
      Unsupported: naming what the kernel lacks.
    """
    config = _check(operands, spec, target).forward
    lists = make_lists(operands, spec, config.block_q, config.block_kv)
    call = _call(operands, spec, target, config, lists)
    x = _arrays(operands, spec, lists)
    o, lse = triton_forward.run(call, x, config.num_warps, config.num_stages)
    return o, lse.swapaxes(1, 2)


def backward(operands: Operands, spec: FlashSpec, target: Target) -> dict[str, Any]:
    """Gradients of query, key, value, of the bias if there is one, and of the score reads.

    Args:
      operands, spec, target: as for `forward`, with "d_out", "lse" and "delta" among the operands.

    Raises:
      Unsupported: naming what the kernel lacks.
    """
    configs = _check(operands, spec, target)

    def prepared(config: KernelConfig, transposed: bool) -> tuple[Call, Operands]:
        lists = make_lists(operands, spec, config.block_q, config.block_kv)
        lists = lists.transpose() if transposed else lists
        x = _arrays({**operands, "sinks": None}, spec, lists)
        x["d_out"] = operands["d_out"]
        x.update((n, operands[n].astype(jnp.float32).swapaxes(1, 2)) for n in ("lse", "delta"))
        return _call(operands, spec, target, config, lists), x

    call, x = prepared(configs.dq, False)
    dq, row_sums = triton_backward.run_queries(call, x, *configs.dq[2:])
    call, x = prepared(configs.dkv, True)
    dk, dv, column_sums = triton_backward.run_keys(call, x, *configs.dkv[2:])
    out: dict[str, Any] = {"query": dq, "key": dk, "value": dv}
    bias, axis = operands["bias"], triton_backward.bias_axis(operands["bias"])
    if axis == "rows":
        out["bias"] = _summed(row_sums.pop(0)[..., None], bias.shape).astype(bias.dtype)
    elif axis == "cols":
        out["bias"] = _summed(column_sums.pop(0)[:, :, None], bias.shape).astype(bias.dtype)
    out["score_reads"] = _read_gradients(call, operands["score_reads"], row_sums, column_sums)
    offsets = triton_backward.read_sums(call, ("offset",))
    if axis == "pairs" or offsets:
        lists = make_lists(operands, spec, configs.pairs.block_q, configs.pairs.block_kv)
        call = _call(operands, spec, target, configs.pairs, lists)
        classes = jnp.asarray(lists.class_map())
        # the map tells which tiles to visit; the lists themselves are not read
        x.update((n, None) for n in x if n.endswith(("_count", "_cols")))
        knobs = configs.pairs[2:]
        if axis == "pairs":
            out["bias"] = triton_pairs.bias_gradient(call, x, classes, *knobs).astype(bias.dtype)
        for read in offsets:
            out["score_reads"][read] = triton_pairs.offset_gradient(call, x, classes, read, *knobs)
    return out


def _read_gradients(call: Call, reads: Any, row_sums: Any, column_sums: Any) -> list[Any]:
    """Gradients [nb, nh, ...] of scalar, query and key reads; None for the others."""
    out: list[Any] = [None] * len(reads)
    places = triton_backward.read_sums(call, ("scalar", "query"))
    for place, total in zip(places, row_sums, strict=True):
        if reads[place].ndim == 2:
            total = total.sum(axis=2)
        out[place] = _summed(total, reads[place].shape)
    places = triton_backward.read_sums(call, ("key",))
    for place, total in zip(places, column_sums, strict=True):
        out[place] = _summed(total, reads[place].shape)
    return out


def _summed(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums x over the axes that have size 1 in a shape."""
    axes = tuple(i for i, (n, to) in enumerate(zip(x.shape, shape, strict=True)) if n != to)
    return x.sum(axis=axes, keepdims=True)


def forward_tiles(operands: Operands, spec: FlashSpec, target: Target) -> tuple[int, int]:
    """(block_q, block_kv) of the forward kernel, in tokens."""
    config = _check(operands, spec, target).forward
    return config.block_q, config.block_kv


def _check(operands: Operands, spec: FlashSpec, target: Target) -> TritonConfig:
    """The tile sizes of a call that the kernels can do.

    Raises:
      Unsupported: for everything else.
    """
    query, key, value = operands["query"], operands["key"], operands["value"]
    if not target.interpret:
        if target.platform != "cuda":
            raise Unsupported(
                f"flash_attention: the triton kernel runs on CUDA GPUs, not on {target.platform}; "
                "use implementation='xla'."
            )
        capability = require_capability(target, (8, 0), "flash_attention (triton)")
    else:
        capability = target.capability
    try:
        compat.triton()
    except ImportError as error:  # pragma: no cover
        raise Unsupported(
            "flash_attention: this version of JAX has no Pallas Triton backend; use "
            "implementation='mosaic_gpu' or 'xla'."
        ) from error
    if query.dtype not in DTYPES or not query.dtype == key.dtype == value.dtype:
        raise Unsupported(
            "flash_attention: the triton kernel takes query, key and value of one type among "
            f"bfloat16, float16 and float32, got {query.dtype}, {key.dtype}, {value.dtype}; cast "
            "them, or use implementation='xla'."
        )
    d, e = query.shape[3], value.shape[3]
    if max(d, e) > MAX_WIDTH:
        raise Unsupported(
            f"flash_attention: the triton kernel takes heads of at most {MAX_WIDTH} columns, got "
            f"{d} for keys and {e} for values; use implementation='xla'."
        )
    mask_array = operands["mask_array"]
    if mask_array is not None and mask_array.size >= 1 << 31:
        raise Unsupported(
            "flash_attention: the triton kernel indexes masks with 32 bits, and a mask of shape "
            f"{mask_array.shape} has more entries; use a mask program, or implementation='xla'."
        )
    for program in (spec.predicate, spec.score_mod):
        if program is not None:
            program.check("triton")
    precision = _precision(spec.precision, query.dtype, False)
    single = precision in (lax.Precision.DEFAULT, lax.DotAlgorithmPreset.TF32_TF32_F32)
    on_tensor_cores = query.dtype != jnp.float32 or single  # three products need small tiles too
    busy = is_busy(operands, spec)
    default = default_config(d, e, query.dtype, capability, on_tensor_cores, busy)
    return configured(default, spec.config, operands, spec, capability)


def _precision(precision: Any, dtype: Any, interpret: bool) -> Any:
    """What the matrix products of the kernel take.

    float32 operands are multiplied in float32 unless told otherwise: None and HIGHEST mean that,
    HIGH three products of TF32, DEFAULT one.
    """
    if dtype != jnp.float32:
        return None
    presets = lax.DotAlgorithmPreset
    if isinstance(precision, presets) and precision != presets.DEFAULT:
        known = (presets.TF32_TF32_F32, presets.TF32_TF32_F32_X3, presets.F32_F32_F32)
        if precision not in known:
            raise Unsupported(
                f"flash_attention: the triton kernel does not multiply float32 with {precision}; "
                "use a jax.lax.Precision, TF32_TF32_F32, TF32_TF32_F32_X3 or F32_F32_F32, or "
                "implementation='xla'."
            )
        return lax.Precision.HIGHEST if interpret else precision
    if isinstance(precision, tuple):
        precision = max(map(lax.Precision, precision), key=lambda p: p.value)
    precision = lax.Precision.HIGHEST if precision is None else lax.Precision(precision)
    if interpret or precision == lax.Precision.HIGHEST:
        return lax.Precision.HIGHEST
    return presets.TF32_TF32_F32_X3 if precision == lax.Precision.HIGH else precision


def _call(
    operands: Operands, spec: FlashSpec, target: Target, config: KernelConfig, lists: BlockList
) -> Call:
    query, key, value = operands["query"], operands["key"], operands["value"]
    # what the kernel never looks at would only make it compile again
    spec = dataclasses.replace(spec, mask=None, config=FlashConfig(), implementation=None, folds=0)
    present = {True: True, False: True}
    if lists.is_static:
        counts = {True: lists.full_count, False: lists.partial_count}
        present = {kind: bool(np.any(count)) for kind, count in counts.items()}
    return Call(
        spec=spec,
        t=query.shape[1],
        s=key.shape[1],
        h=query.shape[2],
        g=key.shape[2],
        d=query.shape[3],
        e=value.shape[3],
        block_q=config.block_q,
        block_kv=config.block_kv,
        any_full=present[True] and operands["mask_array"] is None,
        any_partial=present[False],
        precision=_precision(spec.precision, query.dtype, target.interpret),
        interpret=target.interpret,
    )


def _arrays(operands: Operands, spec: FlashSpec, lists: BlockList) -> Operands:
    """What a kernel may read, None where it has nothing to."""
    names = ("query", "key", "value", "bias", "mask_array", "sinks")
    x = {name: operands[name] for name in names}
    x["seed"] = operands["seed"] if spec.dropout_rate else None
    x["q_offset"] = operands["q_offset"] if spec.q_offset is None else None
    x["mask_reads"] = [] if spec.predicate is None else operands["mask_reads"]
    x["score_reads"] = [] if spec.score_mod is None else operands["score_reads"]
    for name in ("full_count", "full_cols", "partial_count", "partial_cols"):
        x[name] = jnp.asarray(getattr(lists, name), jnp.int32)
    return x
