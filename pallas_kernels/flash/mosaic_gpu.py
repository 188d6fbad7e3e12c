"""Block-sparse attention for NVIDIA Hopper (H100, H200, GH200) in Mosaic GPU.

Warp-specialised: one warpgroup copies tiles with the tensor memory accelerator, the others multiply
them with `wgmma`. Where what is written:

    mosaic_gpu_device    the operations that kernels use
    mosaic_gpu_ring      copies, barriers, the walk over a block list, and why it is right
    mosaic_gpu_scores    scores of one tile and their derivative
    mosaic_gpu_forward   output and lse
    mosaic_gpu_backward  dq; dk and dv
    mosaic_gpu_plan      padded sizes, tile sizes, lists

Limits: float16 and bfloat16, head sizes up to 256, no table by relative offset. The bodies raise
`Unsupported` for the rest. A bias over queries and keys has a gradient of [b, h, t, s] in float32
before it is summed to the bias's shape.
"""

from __future__ import annotations

from typing import Any

import jax

from pallas_kernels.dispatch import Target, Unsupported
from pallas_kernels.flash.gpu_arch import require_capability
from pallas_kernels.flash.mosaic_gpu_backward import Backward
from pallas_kernels.flash.mosaic_gpu_device import ROWS, Hopper, Kernel
from pallas_kernels.flash.mosaic_gpu_forward import Forward
from pallas_kernels.flash.mosaic_gpu_operands import Prepared, collect, prepare, unpad
from pallas_kernels.flash.mosaic_gpu_plan import Tiling, choose_tiling
from pallas_kernels.flash.spec import FlashSpec

Operands = dict[str, Any]

LARGEST_HEAD = 256
"""Largest head size: a wgmma has at most 256 columns."""


def forward(
    operands: Operands, spec: FlashSpec, target: Target, hw: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Output [b, t, h, e] and natural-log lse [b, t, h].

    Args:
      operands, spec, target: of the call.
      hw: the operations, `Hopper` unless a test replaces it.

    Raises:
      Unsupported: for a GPU other than Hopper, other types, larger heads, tables by q - k, and what
        `TileProgram.check` names.
    """
    _check(operands, spec, target)
    d, e = _head_sizes(operands)
    tiling = _forward_tiling(spec, d, e)
    inputs = prepare(operands, spec, tiling, transposed=False)
    out = _launch(hw, Forward(inputs.call, tiling).kernel(), inputs)
    b, t, h, _ = operands["query"].shape
    o = out["out"][:, :t, :, : operands["value"].shape[-1]]
    return o, out["lse"][:, :, :t].transpose(0, 2, 1)


def backward(operands: Operands, spec: FlashSpec, target: Target, hw: Any = None) -> dict[str, Any]:
    """Gradients "query", "key", "value", "bias" where there is one, and "score_reads".

    Operands are those of `forward` with "d_out" [b, t, h, e], "lse" and "delta" [b, t, h].

    Raises:
      Unsupported: as `forward`.
    """
    _check(operands, spec, target)
    d, e = _head_sizes(operands)
    queries = prepare(operands, spec, _query_tiling(spec, d, e), transposed=False)
    found = _launch(hw, Backward(queries.call, queries.tiling, ("dq",)).kernel(), queries)
    # dk and dv of 256 columns each are more registers than a warpgroup has
    kernels = (("dk", "dv"),) if d + e <= LARGEST_HEAD else (("dk",), ("dv",))
    keys = prepare(operands, spec, _key_tiling(spec, d, e, len(kernels) > 1), transposed=True)
    for wants in kernels:
        found |= _launch(hw, Backward(keys.call, keys.tiling, wants).kernel(), keys)
    grads: dict[str, Any] = {
        name: unpad(found["d" + letter], operands[name])
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v"))
    }
    return grads | collect(found, operands, spec, queries)


def forward_tiles(operands: Operands, spec: FlashSpec, target: Target) -> tuple[int, int]:
    """(block_q, block_kv) of the forward kernel, in tokens."""
    tiling = _forward_tiling(spec, *_head_sizes(operands))
    return tiling.rows, tiling.columns


def _launch(hw: Any, kernel: Kernel, inputs: Prepared) -> dict[str, jax.Array]:
    return (hw or Hopper()).launch(kernel, inputs.arrays)


def _check(operands: Operands, spec: FlashSpec, target: Target) -> None:
    """Raises `Unsupported` for what the kernels lack."""
    capability = require_capability(target, (9, 0), "mosaic_gpu")
    if capability[0] != 9:
        raise Unsupported(
            f"mosaic_gpu: its instructions are Hopper's (compute capability 9.0), but "
            f"{target.kind!r} has {capability[0]}.{capability[1]}; use implementation=None."
        )
    _check_types(operands)
    query, key, value = (operands[n] for n in ("query", "key", "value"))
    if max(query.shape[-1], value.shape[-1]) > LARGEST_HEAD:
        raise Unsupported(
            f"mosaic_gpu: head sizes go up to {LARGEST_HEAD}, got {query.shape[-1]} and "
            f"{value.shape[-1]}; use implementation='xla'."
        )
    if max(query.shape[0], query.shape[2]) >= 1 << 16:
        raise Unsupported(
            "mosaic_gpu: a grid has at most 65535 batch rows and as many heads, got "
            f"{query.shape[0]} and {query.shape[2]}; use implementation='xla'."
        )
    if 0 in (*query.shape, *key.shape, *value.shape):
        raise Unsupported("mosaic_gpu: an operand is empty; use implementation='xla'.")
    for what, program in (("mask", spec.predicate), ("score_mod", spec.score_mod)):
        if program is None:
            continue
        program.check("mosaic_gpu")
        if "offset" in program.kinds:
            raise Unsupported(
                f"mosaic_gpu: {what} looks something up by q - k; use implementation='triton' or "
                "'xla'."
            )


def _check_types(operands: Operands) -> None:
    types = {operands[n].dtype.name for n in ("query", "key", "value")}
    if len(types) > 1 or not types <= {"float16", "bfloat16"}:
        raise Unsupported(
            "mosaic_gpu: query, key and value must all be float16 or all be bfloat16, got "
            f"{', '.join(sorted(types))}; use implementation=None or 'triton'."
        )


def _head_sizes(operands: Operands) -> tuple[int, int]:
    """Sizes d and e, padded to multiples of 64."""
    d, e = (operands[n].shape[-1] for n in ("query", "value"))
    return -(-d // 64) * 64, -(-e // 64) * 64


def _forward_tiling(spec: FlashSpec, d: int, e: int) -> Tiling:
    config = spec.config
    columns = config.block_kv or (128 if d + e <= LARGEST_HEAD else 64)
    sizes = (2 * (d + (e if e != d else 0)), 2 * (d + e))
    return _tiling(spec, ("block_q", config.block_q), ("block_kv", columns), *sizes)


def _query_tiling(spec: FlashSpec, d: int, e: int) -> Tiling:
    config = spec.config
    columns, size = config.block_kv_dq or 64, 2 * (d + e)
    return _tiling(spec, ("block_q_dq", config.block_q_dq), ("block_kv_dq", columns), size, size)


def _key_tiling(spec: FlashSpec, d: int, e: int, apart: bool) -> Tiling:
    config = spec.config
    rows, columns = ("block_kv_dkv", config.block_kv_dkv), ("block_q_dkv", config.block_q_dkv or 64)
    per_row = 2 * (d + e + (e if apart and e != d else 0))
    return _tiling(spec, rows, columns, per_row, 2 * (d + e))


def _tiling(
    spec: FlashSpec, row: tuple[str, Any], column: tuple[str, int], per_row: int, per_column: int
) -> Tiling:
    """Tile sizes that fit shared memory, with as many rows as asked for.

    Args:
      spec: of the call; the option "num_stages" bounds the ring's slots, 2 to 4.
      row, column: (name of the setting, tokens), None for rows that are not asked for.
      per_row, per_column: bytes of a row of a block and of a column of a slot, in matrices.
    """
    (row_name, rows), (column_name, columns) = row, column
    if rows not in (None, ROWS, 2 * ROWS):
        raise Unsupported(f"mosaic_gpu: config.{row_name} must be 64 or 128, got {rows}.")
    if columns not in (64, 128, 192, 256):
        raise Unsupported(
            f"mosaic_gpu: config.{column_name} must be 64, 128, 192 or 256, got {columns}."
        )
    stages = spec.config.option("num_stages", 4)
    if stages not in (2, 3, 4):
        raise Unsupported(f"mosaic_gpu: option num_stages must be 2, 3 or 4, got {stages}.")
    # vectors: lse, delta, bias, a mask array and the reads; rows may have them in every slot
    programs = (p for p in (spec.predicate, spec.score_mod) if p is not None)
    vectors = 4 * (4 + sum(len(p.reads) for p in programs))
    tiling = choose_tiling(
        per_row + 2 * stages * vectors,
        per_column + vectors,
        columns,
        most_consumers=2 if rows is None else rows // ROWS,
        most_stages=stages,
    )
    if tiling is None or rows not in (None, tiling.rows):
        raise Unsupported(
            f"mosaic_gpu: tiles of {rows or ROWS} x {columns} ({row_name}, {column_name}) need "
            "more shared memory than there is; make them smaller in config."
        )
    return tiling
