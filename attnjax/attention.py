"""`attention`: one entry to softmax attention, with every stage open.

    scores → bias → softcap → score_mod → mask → normalizer → weights → sum over values

The dense path is the formula; the block-sparse path visits only the tiles that the mask leaves and
needs O(T) memory in both directions. `explain` says which of them a call takes, and why.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attnjax import checks
from attnjax.dense import dense_attention
from attnjax.masks import Causal, Full, Lengths, Mask, Segments, Window
from pallas_kernels import dispatch
from pallas_kernels.flash import FlashConfig, flash_attention
from pallas_kernels.maskprogram import MaskProgram

KERNELS = dispatch.IMPLEMENTATIONS
IMPLEMENTATIONS = ("dense", "block_sparse", *KERNELS)
CAPTURES = ("scores", "weights")
DENSE_SCORES = 1 << 16
"""Up to so many scores per head the dense path is chosen: it compiles faster and runs as fast."""

DENSE_QUERIES = 8
"""Up to so many queries the dense path is chosen at any key length: its scores are O(s)."""


class Call(NamedTuple):
    """A checked call: operands of both paths, and the path to take."""

    query: jax.Array
    key: jax.Array
    value: jax.Array
    mask: MaskProgram
    mask_array: jax.Array | None
    bias: jax.Array | None
    options: dict[str, Any]
    normalizer: Callable[..., Any] | None
    weight_edit: Callable[..., jax.Array] | None
    query_lengths: jax.Array | None
    implementation: str
    reason: str


def attention(
    query: Float[Array, "*b t h d"],
    key: Float[Array, "*b s g d"],
    value: Float[Array, "*b s g e"],
    bias: Float[Array, "..."] | None = None,
    mask: MaskProgram | Bool[Array, "..."] | np.ndarray | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int[Array, " b"] | None = None,
    key_value_seq_lengths: Int[Array, " b"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    score_mod: Callable[..., jax.Array] | None = None,
    sinks: Float[Array, " h"] | None = None,
    softcap: float | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    kv_segment_ids: Int[Array, "b s"] | None = None,
    normalizer: str | Callable[..., jax.Array] = "softmax",
    q_offset: Any = 0,
    dropout_rate: float = 0.0,
    dropout_rng: Any = None,
    weight_edit: Callable[[jax.Array], jax.Array] | None = None,
    capture: tuple[str, ...] = (),
    precision: Any = None,
    block_sizes: tuple[int, int] | None = None,
    config: FlashConfig | None = None,
) -> Any:
    """Softmax attention with open stages; names and meanings as `jax.nn.dot_product_attention`.

        s_tk = scale q_t·k_k + bias_tk;  s ← softcap(s);  s ← score_mod(s)
        w_t = softmax of s_t over the visible k
        o_t = Σ_k w_tk v_k;  lse_t = ln Σ_k e^{s_tk}

    Query head i reads key/value head i // (h / g). A row that may attend to nothing gives 0, an lse
    of -inf and zero gradients. The softmax runs in float32 (float64 for float64 inputs).

    Args:
      query, key, value: shapes as annotated, with one batch axis or none; h a multiple of g; s and
        e are free.
      bias: broadcastable to [b, h, t, s], added to the scores. It has a gradient.
      mask: a mask of `attnjax.masks`, or booleans broadcastable to [b, h, t, s], True = attend.
      scale: factor of q·k; None is d^-0.5.
      is_causal: query t sees keys up to its own index.
      query_seq_lengths, key_value_seq_lengths: [b] true lengths in tokens; what lies behind is
        padding, and padded queries give 0.
      local_window_size: tokens visible to the left and right of a query, an integer for both.
      implementation: None chooses; "dense"; "block_sparse" for the platform's kernel, or its XLA
        body where the kernel lacks an option; "pallas" for the kernel alone; "xla" for whichever
        XLA path fits; or a kernel by name, see `pallas_kernels.dispatch`.
      return_residual: also return lse.
      score_mod: `(score, b, h, q, k) -> score` on arrays that broadcast to the scores' shape; index
        arrays are absolute. Arrays it closes over get gradients.
      sinks: [h] logits of an extra key with value 0 (an entry in the denominator alone).
      softcap: c in c tanh(s / c).
      segment_ids: [b, t]; tokens attend within their segment only, negative ids are padding.
      kv_segment_ids: [b, s], when they differ from `segment_ids`.
      normalizer: "softmax"; "off_by_one" for e^s / (1 + Σ e^s); or a function (masked scores
        [b, h, t, s], keep or None) -> weights, which needs the dense path.
      q_offset: absolute index of the first query, an integer or an integer array () or [b]: the
        number of tokens already in a cache. Keys are at 0 .. s-1.
      dropout_rate, dropout_rng: probability of dropping a weight, and the key to draw from.
      weight_edit: function weights [b, h, t, s] -> weights; needs the dense path.
      capture: any of "scores", "weights"; needs the dense path.
      precision: of the matrix products.
      block_sizes: (queries, keys) of a tile, in tokens; None chooses by cost.
      config: all choices of tiles, `pallas_kernels.flash.FlashConfig`, in place of `block_sizes`.

    Returns:
      Output [b, t, h, e] in the query's dtype; (output, lse [b, t, h]) with `return_residual`; and
      last a dict of [b, h, t, s] arrays when `capture` names any.

    Raises:
      ValueError: on shapes that do not fit, a window or scale out of range, an unknown option.
      TypeError: on integer inputs or a mask that is not boolean.
      NotImplementedError: when the forced implementation lacks an option.

    Memory: block_sparse O(t + s), dense O(t s) per head.
    """
    unbatched = query.ndim == 3
    call = prepare_call(
        query, key, value, bias, mask, scale=scale, is_causal=is_causal,
        query_seq_lengths=query_seq_lengths, key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size, implementation=implementation, score_mod=score_mod,
        sinks=sinks, softcap=softcap, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids,
        normalizer=normalizer, q_offset=q_offset, dropout_rate=dropout_rate,
        dropout_rng=dropout_rng, weight_edit=weight_edit, capture=capture, precision=precision,
        block_sizes=block_sizes, config=config,
    )  # fmt: skip
    captured: dict[str, jax.Array] = {}
    if call.implementation == "dense":
        out, lse, captured = _run_dense(call)
    else:
        out, lse = flash_attention(
            call.query, call.key, call.value, mask=call.mask, mask_array=call.mask_array,
            bias=call.bias, **call.options,
        )  # fmt: skip
    if call.query_lengths is not None:
        real = jnp.arange(out.shape[1])[None, :, None] < call.query_lengths[:, None, None]
        out = jnp.where(real[..., None], out, jnp.zeros_like(out))
        lse = jnp.where(real, lse, jnp.full_like(lse, -jnp.inf))
    outputs: tuple[Any, ...] = (out, lse) if return_residual else (out,)
    if capture:
        outputs += ({name: captured[name] for name in capture},)
    if unbatched:
        outputs = jax.tree.map(lambda x: x[0], outputs)
    return outputs[0] if len(outputs) == 1 else outputs


def _run_dense(call: Call) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    b, t, h, _ = call.query.shape
    s = call.key.shape[1]
    options = dict(call.options)
    offset = jnp.asarray(options.pop("q_offset"), jnp.int32).reshape(-1)
    keep = None
    if not isinstance(call.mask, Full):

        def axis(size: int, at: int) -> jax.Array:
            shape = tuple(size if i == at else 1 for i in range(4))
            return jax.lax.broadcasted_iota(jnp.int32, shape, at)

        q = axis(t, 2) + offset.reshape(-1, 1, 1, 1)
        keep = jnp.asarray(call.mask.predicate(axis(b, 0), axis(h, 1), q, axis(s, 3)))
        keep = keep.reshape((1,) * (4 - keep.ndim) + keep.shape)
    if call.mask_array is not None:
        keep = call.mask_array if keep is None else keep & call.mask_array
    return dense_attention(
        call.query, call.key, call.value, keep=keep, bias=call.bias, normalizer=call.normalizer,
        q_offset=offset, weight_edit=call.weight_edit, **options,
    )  # fmt: skip


def prepare_call(
    query: Any, key: Any, value: Any, bias: Any, mask: Any, *, scale: Any = None,
    is_causal: bool = False, query_seq_lengths: Any = None, key_value_seq_lengths: Any = None,
    local_window_size: Any = None, implementation: str | None = None, score_mod: Any = None,
    sinks: Any = None, softcap: Any = None, segment_ids: Any = None, kv_segment_ids: Any = None,
    normalizer: Any = "softmax", q_offset: Any = 0, dropout_rate: float = 0.0,
    dropout_rng: Any = None, weight_edit: Any = None, capture: tuple[str, ...] = (),
    precision: Any = None, block_sizes: Any = None, config: FlashConfig | None = None,
) -> Call:  # fmt: skip
    """Checks every argument and decides the path."""
    if query.ndim == 3 and key.ndim == 3 and value.ndim == 3:
        query, key, value = query[None], key[None], value[None]
    checks.check_qkv("attention", query, key, value)
    b, t, h, d = query.shape
    s = key.shape[1]
    if t == 0 or s == 0:
        raise ValueError(
            f"attention: query and key need at least one token, got {query.shape} and {key.shape}."
        )
    full_shape = (b, h, t, s)
    for name in capture:
        if name not in CAPTURES:
            raise ValueError(f"attention: capture={name!r} is unknown; it may name {CAPTURES}.")
    _check_ranges(scale, softcap, dropout_rate, dropout_rng, implementation, block_sizes)
    program: MaskProgram = Full()
    mask_array = None
    if isinstance(mask, MaskProgram):
        program = mask
        for label, has, want in (
            ("num_heads", mask.num_heads, h),
            ("batch_size", mask.batch_size, b),
        ):
            if has is not None and has != want:
                raise ValueError(
                    f"attention: mask is made for {label}={has}, but query {query.shape} has "
                    f"{want}."
                )
    elif mask is not None:
        mask_array = _broadcastable("mask", jnp.asarray(mask), full_shape)
        if mask_array.dtype != jnp.bool_:
            raise TypeError(
                f"attention: mask must be boolean, True = attend, got {mask_array.dtype} of shape "
                f"{mask_array.shape}; pass additive masks as bias, or convert with "
                "mask.astype(bool)."
            )
    if bias is not None:
        bias = _broadcastable("bias", jnp.asarray(bias), full_shape)
    if is_causal:
        program = _both(program, Causal())
    if local_window_size is not None:
        sides = (
            (local_window_size,) * 2
            if isinstance(local_window_size, int)
            else tuple(local_window_size)
        )
        if len(sides) != 2 or min(sides) < 0:
            raise ValueError(
                f"attention: local_window_size={local_window_size} must be one or two numbers of "
                "tokens >= 0: how far a query sees to its left and right beside itself."
            )
        program = _both(program, Window(sides[0] + 1, sides[1]))
    if key_value_seq_lengths is not None:
        program = _both(
            program, Lengths(_lengths("key_value_seq_lengths", key_value_seq_lengths, b))
        )
    if query_seq_lengths is not None:
        query_seq_lengths = _lengths("query_seq_lengths", query_seq_lengths, b)
    static_offset = isinstance(q_offset, (int, np.integer))
    if not static_offset:
        q_offset = jnp.asarray(q_offset)
        if not jnp.issubdtype(q_offset.dtype, jnp.integer) or q_offset.shape not in ((), (b,)):
            raise ValueError(
                "attention: q_offset must be an integer or an integer array of shape () or "
                f"({b},), got {q_offset.dtype} of shape {q_offset.shape}."
            )
    program = _with_segments(
        program, segment_ids, kv_segment_ids, b, t, s, q_offset if static_offset else None
    )
    if sinks is not None and sinks.shape != (h,):
        raise ValueError(f"attention: sinks must have shape [heads] = ({h},), got {sinks.shape}.")
    if normalizer == "off_by_one":
        if sinks is not None:
            raise ValueError(
                "attention: normalizer='off_by_one' is sinks=zeros; pass one of the two."
            )
        sinks = jnp.zeros((h,), jnp.float32)
    elif isinstance(normalizer, str) and normalizer != "softmax":
        raise ValueError(
            f"attention: normalizer={normalizer!r} is unknown; use 'softmax', 'off_by_one' or a "
            "function."
        )
    needs = {
        "capture": bool(capture),
        "weight_edit": weight_edit is not None,
        "normalizer": callable(normalizer),
    }
    choice, reason = _choose(implementation, t, s, needs)
    options = {
        "score_mod": score_mod,
        "sinks": sinks,
        "scale": 1.0 / math.sqrt(d) if scale is None else float(scale),
        "softcap": softcap,
        "q_offset": int(q_offset) if static_offset else q_offset,
        "dropout_rate": float(dropout_rate),
        "dropout_seed": jax.random.bits(dropout_rng, (2,), jnp.uint32)
        if dropout_rate > 0
        else None,
        "precision": precision,
    }
    if choice != "dense":
        options["config"] = config
        if block_sizes is not None:
            options["config"] = FlashConfig(int(block_sizes[0]), int(block_sizes[1]))
        options["implementation"] = implementation if implementation in KERNELS else None
    return Call(
        query, key, value, program, mask_array, bias, options,
        normalizer if callable(normalizer) else None, weight_edit, query_seq_lengths, choice,
        reason,
    )  # fmt: skip


def _choose(implementation: str | None, t: int, s: int, needs: dict[str, bool]) -> tuple[str, str]:
    """(path, reason)."""
    dense_only = [name for name, needed in needs.items() if needed]
    if implementation not in (None, "dense", "xla"):
        if dense_only:
            raise NotImplementedError(
                f"attention: implementation={implementation!r} has no weights for "
                f"{', '.join(dense_only)}; use implementation='dense', or None to let it be chosen."
            )
        return "block_sparse", f"asked for by implementation={implementation!r}."
    if implementation == "dense":
        return "dense", "asked for by implementation='dense'."
    if dense_only:
        return (
            "dense",
            f"{', '.join(dense_only)} needs the weights of every pair ({t} x {s} per head).",
        )
    if t <= DENSE_QUERIES:
        return "dense", f"{t} queries need only {t} x {s} scores per head."
    if t * s <= DENSE_SCORES:
        return "dense", f"{t} x {s} scores per head are fewer than {DENSE_SCORES + 1}."
    return "block_sparse", f"{t} x {s} scores per head are never stored."


def _both(program: MaskProgram, other: Mask) -> MaskProgram:
    return other if isinstance(program, Full) else program & other


def _with_segments(
    program: MaskProgram,
    segment_ids: Any,
    kv_segment_ids: Any,
    b: int,
    t: int,
    s: int,
    offset: Any,
) -> MaskProgram:
    if segment_ids is None and kv_segment_ids is None:
        return program
    if segment_ids is None:
        raise ValueError(
            "attention: kv_segment_ids needs segment_ids, the segments of the queries."
        )
    segment_ids = jnp.asarray(segment_ids)
    checks.check_segments("attention", segment_ids, b, t)
    if kv_segment_ids is None:
        if t != s:
            raise ValueError(
                f"attention: segment_ids {segment_ids.shape} name the queries only; with {s} keys "
                f"pass kv_segment_ids of shape ({b}, {s}) too."
            )
    else:
        kv_segment_ids = jnp.asarray(kv_segment_ids)
        checks.check_segments("attention", kv_segment_ids, b, s, "kv_segment_ids")
    if offset != 0:
        raise NotImplementedError(
            "attention: segment_ids are indexed from query 0 and cannot be combined with q_offset; "
            "pass mask=(segment_ids[:, None, :, None] == kv_segment_ids[:, None, None, :]) instead."
        )
    return _both(program, Segments(segment_ids, kv_segment_ids))


def _broadcastable(name: str, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    full = (1,) * (4 - x.ndim) + x.shape
    if len(full) != 4 or any(n not in (1, m) for n, m in zip(full, shape, strict=True)):
        raise ValueError(
            f"attention: {name} must be broadcastable to [batch, heads, queries, keys] = {shape}, "
            f"got {x.shape}."
        )
    return x.reshape(full)


def _lengths(name: str, x: Any, b: int) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape != (b,) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"attention: {name} must be integers of shape ({b},), got {x.dtype} of shape {x.shape}."
        )
    return x


def _check_ranges(
    scale: Any,
    softcap: Any,
    dropout_rate: float,
    dropout_rng: Any,
    implementation: Any,
    block_sizes: Any,
) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"attention: implementation={implementation!r} is unknown; use None or one of "
            f"{IMPLEMENTATIONS}."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap={softcap} must be positive, or None for no cap.")
    if not 0.0 <= dropout_rate < 1.0:
        raise ValueError(f"attention: dropout_rate={dropout_rate} must be in [0, 1).")
    if dropout_rate > 0 and dropout_rng is None:
        raise ValueError("attention: dropout_rate > 0 needs dropout_rng=jax.random.key(...).")
    if block_sizes is not None and (len(block_sizes) != 2 or min(block_sizes) < 1):
        raise ValueError(
            f"attention: block_sizes={block_sizes} must be two positive numbers of tokens."
        )
