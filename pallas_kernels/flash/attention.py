"""`flash_attention`: the differentiable entry to every body of block-sparse attention.

The derivative is our own: it keeps q, k, v, o and lse, and recomputes the scores tile by tile, so
no t x s array exists in either direction.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tilemath
from pallas_kernels.blocklist import BlockList, block_list_from_map
from pallas_kernels.dispatch import platform_primitive
from pallas_kernels.flash import xla
from pallas_kernels.flash.blocks import choose_tiling
from pallas_kernels.flash.score import trace_score_mod
from pallas_kernels.flash.spec import FlashSpec
from pallas_kernels.maskprogram import PARTIAL, MaskProgram

LANES = 4
"""Tiles that one step of the XLA body works on side by side, on CPUs of a few cores."""

LANE_SCORES = 1 << 23
"""Calls with fewer scores than this take one lane: they compile faster and are fast already."""

LANE_TILE = 1 << 18
"""Tiles with more scores than this keep every core busy by themselves, and take one lane."""


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
    block_sizes: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the listed tiles of a mask.

        s = scale q·k (+ bias), softcap, score_mod;  o = Σ_k softmax_k(s) v over the visible k
        lse = ln Σ_k e^s

    Args:
      query, key, value: [b, t, h, d], [b, s, g, d], [b, s, g, e], h a multiple of g.
      mask: mask program; tiles it calls EMPTY are never visited.
      mask_array: booleans [b|1, h|1, t|1, s|1] on top of it, True = attend.
      bias: [b|1, h|1, t|1, s|1], added to the scores; has a gradient.
      score_mod: `(score [m, n], b [], h [], q [m, 1], k [1, n]) -> score`; arrays it closes over
        get gradients.
      sinks: [h] logits of one more key with value 0; has a gradient.
      scale: factor of q·k.
      softcap: c in c tanh(s / c).
      q_offset: absolute index of the first query, an integer or an array () or [b].
      dropout_rate, dropout_seed: probability of dropping a weight, and [2] uint32 to derive it
        from.
      precision: of the matrix products.
      block_sizes: (block_q, block_kv) in tokens; None chooses by cost.

    Returns:
      o [b, t, h, e] in the query's dtype, and lse [b, t, h] in float32 (float64 for float64), -inf
      where a row sees nothing. Both have gradients.

    Memory: O(t + s) beyond the inputs.
    """
    b, t, h, _ = query.shape
    s = key.shape[1]
    if isinstance(q_offset, (int, np.integer)):
        q_offset = int(q_offset)
    tiling = choose_tiling(
        mask, t, s, q_offset=q_offset, num_heads=h, batch=b, block_sizes=block_sizes
    )
    lists, span = tiling.lists, tiling.span
    if mask_array is not None:
        lists = _all_partial(lists)
    full, partial = (
        np.asarray(x) if lists.is_static else None for x in (lists.full_count, lists.partial_count)
    )
    max_blocks = lists.num_kv_blocks
    if full is not None and partial is not None:
        max_blocks = max(1, int((full + partial).max(initial=0)))
    mod, consts = None, []
    if score_mod is not None:
        dtype = tilemath.accumulator_dtype(query.dtype)
        mod, consts = trace_score_mod(score_mod, tiling.block_q, span, dtype)
    spec = FlashSpec(
        scale=float(scale),
        softcap=None if softcap is None else float(softcap),
        score_mod=mod,
        dropout_rate=float(dropout_rate),
        precision=precision,
        block_q=tiling.block_q,
        block_kv=tiling.block_kv,
        span=span,
        any_full=tiling.band is None and (full is None or bool(full.any())),
        any_partial=tiling.band is not None or partial is None or bool(partial.any()),
        max_blocks=max_blocks,
        lanes=_lanes(b * h * t * max_blocks * tiling.block_kv, tiling.block_q * span),
    )
    floats = tuple(bool(jnp.issubdtype(c.dtype, jnp.floating)) for c in consts)
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "bias": bias,
        "sinks": sinks,
        "mod_floats": [c for c, f in zip(consts, floats, strict=True) if f],
    }
    others = {
        "lists": lists,
        "band": tiling.band,
        "mask": mask,
        "mask_array": mask_array,
        "seed": dropout_seed,
        "q_offset": jnp.asarray(q_offset, jnp.int32).reshape(-1),
        "mod_others": [c for c, f in zip(consts, floats, strict=True) if not f],
    }
    others = jax.tree.map(jnp.asarray, others)
    return _flash(inputs, others, (spec, floats))


def _lanes(scores: int, tile: int) -> int:
    return LANES if scores >= LANE_SCORES and tile <= LANE_TILE else 1


def _all_partial(lists: BlockList) -> BlockList:
    """The same tiles, all with a mask: an array mask may hide anything inside a FULL tile."""
    classes = lists.class_map()
    capped = (np if lists.is_static else jnp).minimum(classes, PARTIAL)
    return block_list_from_map(
        capped, lists.q_len, lists.kv_len, block_q=lists.block_q, block_kv=lists.block_kv
    )


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
    floats = [c for c in operands["mod_consts"] if jnp.issubdtype(c.dtype, jnp.floating)]
    out["mod_consts"] = [like(c, dtype) for c in floats]
    return out


_forward = platform_primitive("attn_fwd", {"default": xla.forward}, _shapes_forward)
_backward = platform_primitive("attn_bwd", {"default": xla.backward}, _shapes_backward)


def _operands(inputs: Any, others: Any, floats: tuple[bool, ...]) -> dict[str, Any]:
    sources = {True: iter(inputs["mod_floats"]), False: iter(others["mod_others"])}
    return {
        **{n: inputs[n] for n in ("query", "key", "value", "bias", "sinks")},
        **{n: others[n] for n in ("lists", "band", "mask", "mask_array", "seed", "q_offset")},
        "mod_consts": [next(sources[f]) for f in floats],
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _flash(inputs: Any, others: Any, static: Any) -> tuple[jax.Array, jax.Array]:
    spec, floats = static
    return _forward(_operands(inputs, others, floats), spec)


def _flash_fwd(inputs: Any, others: Any, static: Any) -> Any:
    results: Any = _flash(inputs, others, static)
    return results, (inputs, others, *results)


def _flash_bwd(static: Any, saved: Any, cotangents: Any) -> Any:
    spec, floats = static
    inputs, others, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.sum(out.astype(lse.dtype) * d_out.astype(lse.dtype), axis=-1) - d_lse
    operands = _operands(inputs, others, floats)
    grads = _backward(
        {**operands, "d_out": d_out.astype(out.dtype), "lse": lse, "delta": delta}, spec
    )
    consts = zip(grads["mod_consts"], inputs["mod_floats"], strict=True)
    result = {
        **{n: grads[n] for n in ("query", "key", "value")},
        "bias": grads.get("bias"),
        "sinks": None,
        "mod_floats": [g.astype(c.dtype) for g, c in consts],
    }
    if inputs["sinks"] is not None:
        sinks = inputs["sinks"]
        p = jnp.exp(sinks.astype(lse.dtype).reshape(1, 1, -1) - lse)
        result["sinks"] = -jnp.sum(p * delta, axis=(0, 1)).astype(sinks.dtype)
    return result, None


_flash.defvjp(_flash_fwd, _flash_bwd)
