"""`decode_attention`: one or a few queries per row over a long cache."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tilemath
from pallas_kernels.decode import xla
from pallas_kernels.decode.spec import DecodeConfig, DecodeSpec
from pallas_kernels.dispatch import Kernel, Operation, check_implementation, lazy_body


def decode_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    lengths: Any = None,
    starts: Any = None,
    causal: bool = True,
    q_positions: jax.Array | None = None,
    window: int | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    page_table: jax.Array | None = None,
    precision: Any = None,
    num_splits: int | None = None,
    return_residual: bool = False,
    implementation: str | None = None,
    config: DecodeConfig | None = None,
) -> Any:
    """Softmax attention of t queries per row, each over one range of the row's keys.

        p_j = q_positions[b, j], or lengths - t + j
        query j sees starts <= k < lengths, k <= p_j (causal), k > p_j - window, and the mask
        o_j = Σ_k softmax_k(softcap(scale q_j·k_k + bias_jk)) v_k,  lse_j = ln Σ_k e^{s_jk}

    Blocks of keys that no query sees are neither read nor computed on a TPU or GPU. The keys are
    cut into parts that run side by side, and the parts' softmaxes are merged exactly.

    Args:
      query: [b, t, h, d].
      key, value: [b, s, g, d], [b, s, g, e], h a multiple of g; or with `page_table` a pool of
        pages, [pages, c, g, d] and [pages, c, g, e]. They are taken to the query's dtype block by
        block, so a narrower cache is never copied.
      lengths: valid keys, integers of shape (), [b], [b, g] or [b, h]; None is all. What lies
        behind them may hold anything.
      starts: first valid key, likewise; None is 0.
      causal: whether the queries are the last t tokens (or at `q_positions`), each seeing keys up
        to itself. No difference for one query without `q_positions`.
      q_positions: [b, t] integers, index of each query among the keys.
      window: keys that a query sees to its left, itself included; needs causal.
      mask: booleans [b|1, h|1, s] or [b|1, h|1, t|1, s], True = attend.
      bias: as the mask, added to the scores.
      sinks: [h] logits of one more key with value 0.
      scale: None is d^-0.5.
      softcap: c in c tanh(s / c).
      page_table: [b, n] integers, the pages of each row in order; s = n c.
      precision: of the matrix products.
      num_splits: parts that the keys of a row are cut into; None chooses.
      return_residual: also return lse.
      implementation: None for the platform's; or the name of a body.
      config: other sizes of the kernels.

    Returns:
      o [b, t, h, e] in the query's dtype, and lse [b, t, h] in float32 (float64 for float64) with
      `return_residual`. A query that sees nothing gives 0 and -inf. Both have gradients with
      respect to query, key, value, bias and sinks, computed in plain JAX.

    Raises:
      ValueError: on lengths, masks or tables of a shape that does not fit, or a window without
        causal.

    Memory: O(s) per row for the scores in plain JAX; the kernels keep O(num_splits) outputs.
    """
    check_implementation("decode_attention", implementation)
    b, t, h, d = query.shape
    g = key.shape[2]
    s = key.shape[1] * (1 if page_table is None else page_table.shape[1])
    if window is not None and not causal:
        raise ValueError("decode_attention: window needs causal=True.")
    end = _per_query("lengths", s if lengths is None else lengths, b, g, h)
    start = _per_query("starts", 0 if starts is None else starts, b, g, h)
    position = end - t + jnp.arange(t, dtype=jnp.int32)[None, None]
    if q_positions is not None:
        position = jnp.asarray(q_positions).astype(jnp.int32)[:, None]
    if causal:
        end = jnp.minimum(end, position + 1)
    if window is not None:
        start = jnp.maximum(start, position + 1 - window)
    config = config or DecodeConfig()
    if num_splits is not None:
        config = DecodeConfig(config.block_kv, num_splits, config.num_warps, config.num_stages)
    spec = DecodeSpec(
        scale=1.0 / math.sqrt(d) if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        precision=precision,
        config=config,
        implementation=implementation,
    )
    inputs = {
        "query": query,
        "key": key,
        "value": value,
        "bias": _four_axes("bias", bias, (b, h, t, s)),
        "sinks": sinks,
    }
    start, end = jnp.broadcast_arrays(jnp.clip(start, 0, s), jnp.clip(end, 0, s))
    some = start < end
    others = {
        # an empty range lies behind and before all others: it widens no union of ranges
        "starts": jnp.broadcast_to(jnp.where(some, start, s), (b, h, t)),
        "ends": jnp.broadcast_to(jnp.where(some, end, 0), (b, h, t)),
        "mask": _four_axes("mask", mask, (b, h, t, s)),
        "page_table": None if page_table is None else page_table.astype(jnp.int32),
    }
    outputs: Any = _decode(inputs, others, spec)
    return outputs if return_residual else outputs[0]


def _per_query(name: str, x: Any, b: int, g: int, h: int) -> jax.Array:
    """Integers (), [b], [b, g] or [b, h] as [b|1, h|1, 1]."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.shape not in ((), (b,), (b, g), (b, h)):
        raise ValueError(
            f"decode_attention: {name} must be integers of shape (), ({b},), ({b}, {g}) or "
            f"({b}, {h}), got {x.dtype} of shape {x.shape}."
        )
    x = x.astype(jnp.int32)
    if x.ndim < 2:
        return x.reshape(-1, 1, 1)
    return jnp.repeat(x, h // x.shape[1], axis=1)[..., None]


def _four_axes(name: str, x: jax.Array | None, shape: tuple[int, ...]) -> jax.Array | None:
    """[b|1, h|1, s] or [b|1, h|1, t|1, s] with all four axes."""
    if x is None:
        return None
    full = x[:, :, None] if x.ndim == 3 else x
    ok = full.ndim == 4 and all(n in (1, m) for n, m in zip(full.shape, shape, strict=True))
    if not ok or full.shape[3] != shape[3]:
        raise ValueError(
            f"decode_attention: {name} must have shape [b|1, h|1, s] or [b|1, h|1, t|1, s] with "
            f"b, h, t, s = {shape}, got {x.shape}."
        )
    return full


def _shapes(operands: dict[str, Any], spec: DecodeSpec) -> Any:
    query, value = operands["query"], operands["value"]
    return (
        jax.ShapeDtypeStruct((*query.shape[:3], value.shape[3]), query.dtype),
        jax.ShapeDtypeStruct(query.shape[:3], tilemath.accumulator_dtype(query.dtype)),
    )


def _fold(operands: dict[str, Any], dims: dict[str, Any], spec: DecodeSpec) -> Any:
    """Makes the axis of `jax.vmap` part of the rows; None where that would copy the cache."""
    count = next(operands[n].shape[d] for n, d in dims.items() if d is not None and d >= 0)
    paged = operands["page_table"] is not None
    if (dims["sinks"] or -1) >= 0 or not paged and min(dims["key"], dims["value"]) < 0:
        return None
    shared = ("sinks", "key", "value") if paged else ("sinks",)
    if paged and max(dims["key"], dims["value"]) >= 0:
        return None

    def rows(name: str) -> Any:
        x, dim = operands[name], dims[name]
        if x is None or name in shared:
            return x
        if dim < 0:
            x, dim = jnp.broadcast_to(x, (count, *x.shape)), 0
        x = jnp.moveaxis(x, dim, 0)
        if x.shape[1] == 1:  # a bias of all rows
            x = jnp.broadcast_to(x, (count, operands_rows, *x.shape[2:]))
        return x.reshape(-1, *x.shape[2:])

    query, dim = operands["query"], dims["query"]
    operands_rows = query.shape[1 if dim == 0 else 0]
    folded = {name: rows(name) for name in operands}

    def unfold(results: Any) -> Any:
        return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), results)

    return folded, spec, unfold


_forward = Operation(
    "decode_attention",
    xla.forward,
    _shapes,
    kernels={
        "tpu": Kernel(
            "tpu", lazy_body("pallas_kernels.decode.tpu", "forward"), interpreted_by="interpret"
        ),
        "triton": Kernel(
            "cuda",
            lazy_body("pallas_kernels.decode.triton", "forward"),
            interpreted_by="interpret_triton",
        ),
    },
    fold=_fold,
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _decode(inputs: Any, others: Any, spec: DecodeSpec) -> Any:
    return _forward({**inputs, **others}, spec)


def _decode_fwd(inputs: Any, others: Any, spec: DecodeSpec) -> Any:
    return _decode(inputs, others, spec), (inputs, others)


def _decode_bwd(spec: DecodeSpec, saved: Any, cotangents: Any) -> Any:
    inputs, others = saved
    return xla.gradients(inputs, others, spec, cotangents), None


_decode.defvjp(_decode_fwd, _decode_bwd)
