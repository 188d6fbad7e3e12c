"""Block-sparse flash attention on TPUs (Mosaic): forward and backward.

Inside, arrays are [b, h, t, d], padded with zeros to whole tiles and lanes. Each kernel chooses its
own tile sizes. Options of `FlashConfig` that this body knows, as (name, value) pairs:

    "fused"      True or False: whether one kernel sums dq, dk and dv; None: where it can
    "largest_block"     largest side of a tile that may be chosen, in tokens
    "sub_q", "sub_kv"   sides of the part of a tile that is computed at once, in tokens
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.dispatch import Target, Unsupported
from pallas_kernels.flash import tpu_backward, tpu_bias, tpu_blocks, tpu_forward, tpu_sources
from pallas_kernels.flash.lists import make_lists
from pallas_kernels.flash.spec import FlashSpec
from pallas_kernels.flash.tpu_lists import Walk, make_walk
from pallas_kernels.flash.tpu_plan import LANES, Array, Grid, Plan

Operands = dict[str, Any]


def forward(operands: Operands, spec: FlashSpec, target: Target) -> tuple[Array, Array]:
    """(o [b, t, h, e] in the query's type, lse [b, t, h] float32, -inf for rows that see nothing).

    Raises:
      Unsupported: when the kernel lacks an option.
    """
    _check(operands, spec)
    plan = _plan(operands, spec, target, "forward")
    walk = make_walk(_classes(operands, plan), max_per_row=spec.config.max_blocks)
    grid = Grid(plan, walk)
    o, lse = tpu_forward.forward(operands, grid, _cost(grid, 2))
    return _spoil(o, walk), _spoil(lse, walk)


def backward(operands: Operands, spec: FlashSpec, target: Target) -> dict[str, Any]:
    """Gradients: query, key, value, bias where there is one, and the list score_reads.

    Raises:
      Unsupported: when the kernel lacks an option.
    """
    _check(operands, spec)
    sources = tpu_sources.gather(operands, spec)
    summed = [s for s in sources if s.graded and s.kind != "tile"]
    key_plan = _plan(operands, spec, target, "dkv")
    fused = not summed and _fuses(key_plan, sources)
    if fused:
        sub_q, sub_kv = _parts(spec, "dqkv", key_plan.block_q, key_plan.block_kv)
        key_plan = dataclasses.replace(key_plan, sub_q=sub_q, sub_kv=sub_kv)
    found: dict[str, Any] = {}
    query_plan = None
    if not fused or any(s.graded for s in sources):
        query_plan = _plan(operands, spec, target, "dq")
    most = spec.config.max_blocks
    if not fused and query_plan is not None:
        grid = Grid(query_plan, make_walk(_classes(operands, query_plan), max_per_row=most))
        found |= tpu_backward.query_gradient(operands, grid, _cost(grid, 3))
        found["query"] = _spoil(found["query"], grid.walk)
    classes, members = _by_key(_classes(operands, key_plan), key_plan)
    most = _most_queries(most, key_plan)
    grid = Grid(key_plan, make_walk(classes, members=members, max_per_row=most))
    found |= tpu_backward.key_gradients(operands, grid, _cost(grid, 5 if fused else 4), fused)
    for name in ("key", "value"):
        found[name] = _spoil(found[name], grid.walk)
    if any(s.name == "bias" and s.kind == "tile" for s in sources) and query_plan is not None:
        classes = _classes(operands, query_plan)
        found["bias"] = tpu_bias.bias_gradient(operands, query_plan, classes, None)
    return _results(operands, spec, found)


def forward_tiles(operands: Operands, spec: FlashSpec, target: Target) -> tuple[int, int]:
    """(block_q, block_kv) of the forward kernel, in tokens."""
    return tpu_blocks.choose_blocks(operands, spec, "forward", _dtype(operands))


def _results(operands: Operands, spec: FlashSpec, found: dict[str, Any]) -> dict[str, Any]:
    out = {name: found[name] for name in ("query", "key", "value")}
    bias = operands["bias"]
    if bias is not None:
        out["bias"] = found["bias"].reshape(bias.shape).astype(bias.dtype)
    reads = spec.score_mod.is_float if spec.score_mod is not None else ()
    out["score_reads"] = [found[f"score{i}"] if f else None for i, f in enumerate(reads)]
    return out


def _check(operands: Operands, spec: FlashSpec) -> None:
    for name in ("query", "key", "value"):
        dtype = operands[name].dtype
        if dtype not in (jnp.bfloat16, jnp.float32):
            raise Unsupported(
                f"flash: the tpu kernel takes bfloat16 and float32, got {name} in {dtype}; cast "
                "it, or use implementation='xla'."
            )
    for program in (spec.predicate, spec.score_mod):
        if program is not None:
            program.check("tpu")
    bias = operands["bias"]
    if bias is not None and bias.dtype not in (jnp.bfloat16, jnp.float32):
        raise Unsupported(
            f"flash: the tpu kernel takes a bias in bfloat16 or float32, got {bias.dtype}; cast "
            "it, or use implementation='xla'."
        )


def _plan(operands: Operands, spec: FlashSpec, target: Target, kernel: str) -> Plan:
    """Sizes of one of the kernels, within the target's vector memory."""
    q, k, v = (operands[n] for n in ("query", "key", "value"))
    dtype = _dtype(operands)
    block_q, block_kv = tpu_blocks.choose_blocks(operands, spec, kernel, dtype)
    d, e = (-(-n // LANES) * LANES for n in (q.shape[3], v.shape[3]))
    sub_q, sub_kv = _parts(spec, kernel, block_q, block_kv)
    limit = tpu_blocks.vmem_limit(target.kind)
    needed = tpu_blocks.tile_bytes(
        block_q, block_kv, sub_q * sub_kv, d, e, dtype.itemsize, tpu_sources.gather(operands, spec)
    )
    tpu_blocks.check_vmem(needed, limit, f"the {kernel} kernel with a tile {block_q} x {block_kv}")
    b, t, h, _ = q.shape
    return Plan(
        b=b, t=t, h=h, s=k.shape[1], g=k.shape[2], d=d, e=e, block_q=block_q, block_kv=block_kv,
        sub_q=sub_q, sub_kv=sub_kv, dtype=dtype, precision=_precision(spec, dtype), spec=spec,
        transposed=kernel == "dkv", vmem=limit, interpret=target.interpret,
    )  # fmt: skip


def _parts(spec: FlashSpec, kernel: str, block_q: int, block_kv: int) -> tuple[int, int]:
    sub_q, sub_kv = tpu_blocks.part_sizes(kernel, block_q, block_kv)
    return spec.config.option("sub_q") or sub_q, spec.config.option("sub_kv") or sub_kv


def _dtype(operands: Operands) -> Any:
    """Type of the products: float32 where the operands differ."""
    types = {operands[name].dtype for name in ("query", "key", "value")}
    return types.pop() if len(types) == 1 else jnp.dtype(jnp.float32)


def _precision(spec: FlashSpec, dtype: Any) -> Any:
    """float32 products are exact unless less is asked for; the compiler knows two precisions."""
    if dtype != jnp.float32:
        return None
    asked = spec.precision[0] if isinstance(spec.precision, tuple) else spec.precision
    if asked is not None and lax.Precision(asked) == lax.Precision.DEFAULT:
        return lax.Precision.DEFAULT
    return lax.Precision.HIGHEST


def _classes(operands: Operands, plan: Plan) -> Any:
    """Class of every tile, [nb, nh, query blocks, key blocks]."""
    return make_lists(operands, plan.spec, plan.block_q, plan.block_kv).class_map()


def _by_key(classes: Any, plan: Plan) -> tuple[Any, int]:
    """([nb, 1 or g, key blocks, members * query blocks], members) of a map by query block."""
    xp: Any = jnp if isinstance(classes, jax.Array) else np
    nb, nh, nq, nk = classes.shape
    if nh == 1:
        return classes.swapaxes(-1, -2), 1
    classes = classes.reshape(nb, plan.g, plan.group, nq, nk)
    return xp.moveaxis(classes, 4, 2).reshape(nb, plan.g, nk, plan.group * nq), plan.group


def _most_queries(most: int | None, plan: Plan) -> int | None:
    """Tiles per key block, on average, of a list that has `most` per query block."""
    if most is None:
        return None
    nq, nk = plan.t_pad // plan.block_q, plan.s_pad // plan.block_kv
    return -(-nq * min(most, nk) // nk) * plan.group


def _fuses(plan: Plan, sources: list[Any]) -> bool:
    """Whether one kernel sums dq too: its sums stay in vector memory for a group of heads."""
    asked = plan.spec.config.option("fused")
    if asked is False:
        return False
    size = plan.dtype.itemsize
    sums = plan.group * plan.t_pad * plan.d * (4 + 2 * size)
    part = plan.sub_q * plan.sub_kv
    tile = tpu_blocks.tile_bytes(
        plan.block_q, plan.block_kv, part, plan.d, plan.e, size, sources
    )  # fmt: skip
    fits = sums + tile <= plan.vmem
    if asked and not fits:
        tpu_blocks.check_vmem(sums + tile, plan.vmem, "the fused backward kernel")
    return fits


def _spoil(x: Array, walk: Walk) -> Array:
    """NaN where a traced list was longer than its room."""
    if walk.overflow is None:
        return x
    bad = walk.overflow.reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.where(bad, jnp.nan, x)


def _cost(grid: Grid, products: int) -> Any:
    """Operations and bytes, where the list is known."""
    p = grid.plan
    if not isinstance(grid.walk.steps, int):
        return None
    tile = p.block_q * p.block_kv
    steps = int(np.prod(grid.shape))
    width = p.d + p.e
    return pl.CostEstimate(
        flops=steps * tile * products * width,
        transcendentals=steps * tile,
        bytes_accessed=steps * (p.block_kv if not p.transposed else 2 * p.block_q)
        * width * p.dtype.itemsize,
    )  # fmt: skip
