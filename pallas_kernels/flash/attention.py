"""`flash_attention`: the differentiable entry to every body of block-sparse attention.

The derivative is our own: it keeps q, k, v, o and lse, and recomputes the scores tile by tile, so
no t x s array exists in either direction.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tilemath, tune
from pallas_kernels.blocklist import BlockList
from pallas_kernels.dispatch import Kernel, Operation, Target, check_implementation, lazy_body
from pallas_kernels.flash import xla
from pallas_kernels.flash.lists import make_lists
from pallas_kernels.flash.spec import FlashConfig, FlashSpec
from pallas_kernels.maskprogram import MaskProgram
from pallas_kernels.modtrace import evaluate_reads, trace_predicate, trace_score_mod

Inputs = dict[str, Any]


def flash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: MaskProgram,
    mask_array: jax.Array | None = None,
    bias: jax.Array | None = None,
    score_mod: Any = None,
    sinks: jax.Array | None = None,
    scale: float,
    softcap: float | None = None,
    q_offset: Any = 0,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    precision: Any = None,
    config: FlashConfig | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the listed tiles of a mask.

        s = scale q·k (+ bias), softcap, score_mod;  o = Σ_k softmax_k(s) v over the visible k
        lse = ln Σ_k e^s

    Args:
      query, key, value: [b, t, h, d], [b, s, g, d], [b, s, g, e], h a multiple of g.
      mask: mask program; tiles it calls EMPTY are never visited.
      mask_array: booleans [b|1, h|1, t|1, s|1] on top of it, True = attend.
      bias: [b|1, h|1, t|1, s|1], added to the scores; has a gradient.
      score_mod: `(score, b, h, q, k) -> score` on scalars, applied to every pair; arrays it closes
        over get gradients.
      sinks: [h] logits of one more key with value 0; has a gradient.
      scale: factor of q·k.
      softcap: c in c tanh(s / c).
      q_offset: absolute index of the first query, an integer or an array () or [b].
      dropout_rate, dropout_seed: probability of dropping a weight, and [2] uint32 to derive it
        from.
      precision: of the matrix products.
      config: tile sizes and other choices of the body; None leaves them to it.
      implementation: see `pallas_kernels.dispatch`.

    Returns:
      o [b, t, h, e] in the query's dtype, and lse [b, t, h] in float32 (float64 for float64), -inf
      where a row sees nothing. Both have gradients.

    Memory: O(t + s) beyond the inputs.
    """
    inputs, others, spec = prepare(
        query, key, value, mask=mask, mask_array=mask_array, bias=bias, score_mod=score_mod,
        sinks=sinks, scale=scale, softcap=softcap, q_offset=q_offset, dropout_rate=dropout_rate,
        dropout_seed=dropout_seed, precision=precision, config=config,
        implementation=implementation,
    )  # fmt: skip
    return _flash(inputs, others, spec)


def prepare(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: MaskProgram,
    scale: float,
    mask_array: jax.Array | None = None,
    bias: jax.Array | None = None,
    score_mod: Any = None,
    sinks: jax.Array | None = None,
    softcap: float | None = None,
    q_offset: Any = 0,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    precision: Any = None,
    config: FlashConfig | None = None,
    implementation: str | None = None,
) -> tuple[Inputs, Inputs, FlashSpec]:
    """(differentiable operands, other operands, static description) of a call."""
    check_implementation("flash_attention", implementation)
    b, t, h, _ = query.shape
    sizes = {"batch": b, "heads": h, "q_len": t, "kv_len": key.shape[1]}
    fixed = int(q_offset) if isinstance(q_offset, (int, np.integer)) else None
    offset = jnp.asarray(q_offset, jnp.int32).reshape(-1)
    known = not any(isinstance(x, jax.Array) for x in jax.tree.leaves(mask))
    predicate, mask_reads = None, []
    if not mask.shows_everything:
        predicate, tables = trace_predicate(mask)
        mask_reads = evaluate_reads(predicate, tables, q_offset=offset, **sizes)
    program, score_reads = None, []
    if score_mod is not None:
        program, tables = trace_score_mod(score_mod, tilemath.accumulator_dtype(query.dtype))
        score_reads = evaluate_reads(program, tables, q_offset=offset, **sizes)
    spec = FlashSpec(
        scale=float(scale),
        softcap=None if softcap is None else float(softcap),
        dropout_rate=float(dropout_rate),
        precision=precision,
        mask=mask if known else None,
        q_offset=fixed,
        predicate=predicate,
        score_mod=program,
        config=config or FlashConfig(),
        implementation=implementation,
    )
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "sinks": sinks,
        "score_reads": score_reads,
    }
    others = {
        "mask": None if known else mask,
        "mask_array": mask_array,
        "seed": dropout_seed,
        "q_offset": offset,
        "mask_reads": mask_reads,
    }
    return inputs, jax.tree.map(jnp.asarray, others), spec


class Explained(NamedTuple):
    """What runs: the body, why not the platform's kernel, and the forward pass's tiles."""

    body: str
    reason: str
    block_q: int
    block_kv: int
    lists: BlockList


def explain_flash(inputs: Inputs, others: Inputs, spec: FlashSpec, target: Target) -> Explained:
    """Which body a call prepared by `prepare` takes on a target, and why."""
    operands = {**inputs, **others}
    body, reason = _forward.why_not(operands, spec, target)
    if body == "xla":
        _, tiling, _ = xla.plan(operands, spec)
        return Explained(body, reason, tiling.block_q, tiling.block_kv, tiling.lists)
    spec = _tuned(body, operands, spec, target)
    module = importlib.import_module(f"pallas_kernels.flash.{body}")
    block_q, block_kv = module.forward_tiles(operands, spec, target)
    lists = make_lists(operands, spec, block_q, block_kv)
    return Explained(body, reason, block_q, block_kv, lists)


def _shapes_forward(operands: Any, spec: FlashSpec) -> Any:
    q, v = operands["query"], operands["value"]
    dtype = tilemath.accumulator_dtype(q.dtype)
    o = jax.ShapeDtypeStruct((*q.shape[:3], v.shape[3]), q.dtype)
    return o, jax.ShapeDtypeStruct(q.shape[:3], dtype)


def _shapes_backward(operands: Any, spec: FlashSpec) -> Any:
    dtype = tilemath.accumulator_dtype(operands["query"].dtype)

    def like(x: Any, to: Any = None) -> Any:
        return jax.ShapeDtypeStruct(x.shape, to or x.dtype)

    out = {name: like(operands[name]) for name in ("query", "key", "value")}
    if operands["bias"] is not None:
        out["bias"] = like(operands["bias"])
    programs = () if spec.score_mod is None else spec.score_mod.reads

    def floating(x: Any) -> Any:
        return like(x, dtype) if jnp.issubdtype(x.dtype, jnp.floating) else None

    out["score_reads"] = [
        jax.tree.map(floating, x) if read.is_float else None
        for read, x in zip(programs, operands["score_reads"], strict=True)
    ]
    return out


def _fold(operands: Any, dims: Any, spec: FlashSpec) -> Any:
    """Makes the axis that `jax.vmap` maps over part of the batch axis, where rows stay apart."""
    programs = [p for p in (spec.predicate, spec.score_mod) if p is not None]
    if spec.dropout_rate or any(p.uses_row or "pair" in p.kinds for p in programs):
        return None
    if spec.folds or (spec.mask is not None and spec.mask.batch_size is not None):
        return None
    if operands["sinks"] is not None and dims["sinks"] >= 0:
        return None
    pairs = zip(jax.tree.leaves(operands), jax.tree.leaves(dims), strict=True)
    n = next(x.shape[d] for x, d in pairs if d >= 0)
    at = dims["query"]
    b = operands["query"].shape[1 if at == 0 else 0]
    backward = "d_out" in operands

    def join(x: jax.Array, dim: int, apart: bool) -> jax.Array:
        """[n, rows, ...] or [rows, ...] with rows 1 or b, to [1 or n b, ...]."""
        if dim < 0 and x.shape[0] == 1 and b > 1 and not apart:
            return x
        x = x[None] if dim < 0 else jnp.moveaxis(x, dim, 0)
        x = jnp.broadcast_to(x, (n, b, *x.shape[2:]))
        return x.reshape(n * b, *x.shape[2:])

    def stack(x: jax.Array, dim: int) -> jax.Array:
        return jnp.broadcast_to(x, (n, *x.shape)) if dim < 0 else jnp.moveaxis(x, dim, 0)

    def rows(x: jax.Array, dim: int) -> int:
        return x.shape[1 if dim == 0 else 0]

    summed = ("bias", "score_reads") if backward else ()
    kept = ("sinks", "seed", "mask")
    folded = {
        name: value
        if name in kept
        else jax.tree.map(functools.partial(join, apart=name in summed), value, dims[name])
        for name, value in operands.items()
    }
    folded["mask"] = jax.tree.map(stack, operands["mask"], dims["mask"])

    def unfold(results: Any) -> Any:
        def apart(x: jax.Array) -> jax.Array:
            return x.reshape(n, b, *x.shape[1:])

        if not backward:
            return jax.tree.map(apart, results)
        out = {name: jax.tree.map(apart, x) for name, x in results.items()}
        for name in summed:  # rows that shared an operand share its gradient

            def shared(given: Any, dim: Any, grad: Any) -> Any:
                return grad if rows(given, dim) == b else grad.sum(1, keepdims=True)

            if name == "bias" and "bias" in out:
                out["bias"] = shared(operands["bias"], dims["bias"], out["bias"])
            if name == "score_reads":
                given = zip(operands[name], dims[name], out[name], strict=True)
                out[name] = [None if g is None else shared(x, d, g) for x, d, g in given]
        return out

    folds = n if operands["mask"] is not None else 0
    return folded, dataclasses.replace(spec, folds=folds), unfold


def _kernels(direction: str) -> dict[str, Kernel]:
    """Kernels of one direction; their modules are imported when they are lowered."""

    def body(module: str) -> Any:
        kernel = lazy_body(f"pallas_kernels.flash.{module}", direction)

        def run(operands: Any, spec: FlashSpec, target: Target) -> Any:
            return kernel(operands, _tuned(module, operands, spec, target), target)

        return run

    return {
        "tpu": Kernel("tpu", body("tpu"), interpreted_by="interpret"),
        "triton": Kernel("cuda", body("triton"), interpreted_by="interpret_triton"),
        "mosaic_gpu": Kernel("cuda", body("mosaic_gpu"), default=False),
    }


def _tuned(body: str, operands: Any, spec: FlashSpec, target: Target) -> FlashSpec:
    """The call with measured tile sizes where none were asked for."""
    query, key, value = (operands[name] for name in ("query", "key", "value"))
    config = tune.flash_config(body, target, query, key, value, spec.config)
    return dataclasses.replace(spec, config=config)


_forward = Operation("attn_fwd", xla.forward, _shapes_forward, _kernels("forward"), fold=_fold)
_backward = Operation("attn_bwd", xla.backward, _shapes_backward, _kernels("backward"), fold=_fold)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _flash(inputs: Inputs, others: Inputs, spec: FlashSpec) -> tuple[jax.Array, jax.Array]:
    return _forward({**inputs, **others}, spec)


def _flash_fwd(inputs: Inputs, others: Inputs, spec: FlashSpec) -> Any:
    results: Any = _flash(inputs, others, spec)
    return results, (inputs, others, *results)


def _flash_bwd(spec: FlashSpec, saved: Any, cotangents: Any) -> Any:
    inputs, others, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.sum(out.astype(lse.dtype) * d_out.astype(lse.dtype), axis=-1) - d_lse
    grads = _backward(
        {**inputs, **others, "d_out": d_out.astype(out.dtype), "lse": lse, "delta": delta}, spec
    )
    result = {
        **{n: grads[n] for n in ("query", "key", "value", "score_reads")},
        "bias": grads.get("bias"),
        "sinks": None,
    }
    if inputs["sinks"] is not None:
        sinks = inputs["sinks"]
        p = jnp.exp(sinks.astype(lse.dtype).reshape(1, 1, -1) - lse)
        result["sinks"] = -jnp.sum(p * delta, axis=(0, 1)).astype(sinks.dtype)
    result["score_reads"] = [
        _cotangents(g, x) for g, x in zip(grads["score_reads"], inputs["score_reads"], strict=True)
    ]
    return result, None


def _cotangents(grads: Any, reads: Any) -> Any:
    """Gradients in the types of the read arrays; integers have none."""
    if grads is None:
        return None
    if not isinstance(reads, list):
        return grads.astype(reads.dtype)
    return [None if g is None else g.astype(x.dtype) for g, x in zip(grads, reads, strict=True)]


_flash.defvjp(_flash_fwd, _flash_bwd)
