"""`decode_attention`: one or a few queries over a long cache, split over its keys.

`attention` computes the same; this entry says what a cache knows (how many keys are real) in a form
that lets a TPU or GPU read those keys alone, and takes paged caches.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from attnjax import checks
from attnjax.attention import DENSE_QUERIES
from attnjax.masks import And, Causal, Full, Mask, Window
from pallas_kernels import decode as kernels

DECODE_OPTIONS = frozenset({"scale", "softcap", "sinks", "precision", "implementation"})
"""Options of `attention` that `decode_attention` shares."""


def can_decode(query: jax.Array, mask: Any, options: Mapping[str, Any]) -> bool:
    """Whether a cache may answer these queries with `decode_attention` instead of `attention`."""
    few = query.shape[1] <= DENSE_QUERIES
    known = mask is None or isinstance(mask, Mask)
    return (
        few
        and known
        and DECODE_OPTIONS.issuperset(options)
        and options.get("implementation") not in ("dense", "block_sparse")
    )


def decode_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b_or_pages s g d"],
    value: Float[Array, "b_or_pages s g e"],
    *,
    lengths: Int[Array, "..."] | int | None = None,
    starts: Int[Array, "..."] | int | None = None,
    mask: Mask | Bool[Array, "..."] | np.ndarray | None = None,
    causal: bool = True,
    window: int | None = None,
    q_positions: Int[Array, "b t"] | None = None,
    bias: Float[Array, "..."] | None = None,
    sinks: Float[Array, " h"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    page_table: Int[Array, "b n"] | None = None,
    precision: Any = None,
    num_splits: int | None = None,
    return_residual: bool = False,
    implementation: str | None = None,
) -> Any:
    """Softmax attention of the last tokens of each row over the row's cache.

        p_j = q_positions[b, j], or lengths - t + j
        query j sees starts <= k < lengths, k <= p_j (causal), k > p_j - window, and the mask
        o_j = Σ_k softmax_k(softcap(scale q_j·k_k + bias_jk)) v_k,  lse_j = ln Σ_k e^{s_jk}

    Query head i reads key/value head i // (h / g). On a TPU and on GPUs from sm80 on, a kernel
    reads only the blocks of keys that some query sees, in parts that run side by side; the parts
    are merged exactly. Elsewhere the scores of all keys are computed.

    Args:
      query: [b, t, h, d], few tokens: t is 1, or the number of drafted tokens.
      key, value: [b, s, g, d] and [b, s, g, e], in the query's type or another; with `page_table`
        pools of pages [pages, c, g, d] and [pages, c, g, e] that the rows share.
      lengths: number of valid keys, the new tokens' own included: an integer, or integers of shape
        [b], [b, g] or [b, h]; None is all. Whatever lies behind them, NaN too, is not seen.
      starts: first valid key, likewise; None is 0.
      mask: a mask of `attnjax.masks` over absolute indices, or booleans [b|1, h|1, s] or
        [b|1, h|1, t|1, s], True = attend. Causal() and Window(...) cost nothing; other masks are
        evaluated for all keys.
      causal: whether query j sees keys up to its own position only. False for caches that are not
        in the order of the tokens.
      window: tokens seen to the left of a query, itself counted; needs causal.
      q_positions: [b, t], index of each query among the keys; None: the last t of the valid keys.
      bias: floats in the shapes of a boolean mask, added to the scores.
      sinks: [h] logits of an extra key with value 0.
      scale: factor of q·k; None is d^-0.5.
      softcap: c in c tanh(s / c); None is no cap.
      page_table: [b, n], the pages of each row in order, so that s = n c; entries behind the
        row's length are not read, but must be valid page numbers.
      precision: of the matrix products; float32 products are exact on every device by default.
      num_splits: parts that the keys are cut into; None chooses by device.
      return_residual: also return lse.
      implementation: None chooses by platform; "xla", "pallas", or the name of a kernel.

    Returns:
      Output [b, t, h, e] in the query's dtype; (output, lse [b, t, h]) with `return_residual`. A
      query that sees nothing gives 0 and an lse of -inf. Both have gradients with respect to
      query, key, value, bias and sinks, through plain JAX at its memory.

    Raises:
      ValueError: on shapes that do not fit, or a window or softcap out of range.
      TypeError: on integer inputs, or a mask that is not boolean.
      NotImplementedError: when the named implementation lacks an option.

    Memory: plain JAX keeps h t s scores per row; the kernels keep num_splits outputs.

    Example:
      >>> cache = jnp.zeros((2, 64, 2, 8))
      >>> decode_attention(jnp.ones((2, 1, 4, 8)), cache, cache, lengths=jnp.array([5, 9])).shape
      (2, 1, 4, 8)
    """
    _check(query, key, value, page_table, sinks, window, softcap, num_splits, causal)
    if isinstance(mask, Mask):
        mask, causal, window = _as_ranges(mask, causal, window)
    if isinstance(mask, Mask):
        b, t, h, _ = query.shape
        s = key.shape[1] * (1 if page_table is None else page_table.shape[1])
        mask = _evaluate(mask, (b, h, t, s), s if lengths is None else lengths, q_positions)
    elif mask is not None:
        mask = jnp.asarray(mask)
        if mask.dtype != jnp.bool_:
            raise TypeError(
                f"decode_attention: mask must be boolean, True = attend, got {mask.dtype} of shape "
                f"{mask.shape}; pass additive masks as bias, or convert with mask.astype(bool)."
            )
    return kernels.decode_attention(
        query, key, value, lengths=lengths, starts=starts, mask=mask, causal=causal, window=window,
        q_positions=q_positions, bias=bias, sinks=sinks, scale=scale, softcap=softcap,
        page_table=page_table, precision=precision, num_splits=num_splits,
        return_residual=return_residual, implementation=implementation,
    )  # fmt: skip


def _as_ranges(mask: Mask, causal: bool, window: int | None) -> tuple[Any, bool, int | None]:
    """What of a mask is a range of keys per query, and the rest of it or None."""
    rest: list[Mask] = []
    parts = mask.masks if isinstance(mask, And) else (mask,)
    causal = causal or any(isinstance(m, Causal) for m in parts)
    causal = causal or any(isinstance(m, Window) and m.right == 0 for m in parts)
    for part in parts:
        if isinstance(part, Window) and causal:
            window = part.left if window is None else min(window, part.left)
        elif not isinstance(part, Causal | Full):
            rest.append(part)
    return (functools.reduce(operator.and_, rest) if rest else None), causal, window


def _evaluate(
    mask: Mask, shape: tuple[int, ...], lengths: Any, q_positions: jax.Array | None
) -> jax.Array:
    """A mask as booleans [b|1, h|1, t|1, s]."""
    b, h, t, s = shape
    rows, heads, steps, keys = (
        jnp.arange(n, dtype=jnp.int32).reshape(tuple(n if i == axis else 1 for i in range(4)))
        for axis, n in enumerate(shape)
    )
    if q_positions is not None:
        at = jnp.asarray(q_positions).astype(jnp.int32)[:, None, :, None]
    else:
        lengths = jnp.asarray(lengths).astype(jnp.int32)
        if lengths.ndim == 2:
            lengths = jnp.repeat(lengths, h // lengths.shape[1], axis=1)
        at = lengths.reshape(*(lengths.shape or (1,)), *(1,) * (4 - max(lengths.ndim, 1)))
        at = at - t + steps
    keep = jnp.asarray(mask.predicate(rows, heads, at, keys))
    keep = keep.reshape((1,) * (4 - keep.ndim) + keep.shape)
    return jnp.broadcast_to(keep, (*keep.shape[:3], s))


def _check(
    query: Any,
    key: Any,
    value: Any,
    page_table: jax.Array | None,
    sinks: jax.Array | None,
    window: int | None,
    softcap: float | None,
    num_splits: int | None,
    causal: bool,
) -> None:
    """Refuses what does not fit together."""
    name = "decode_attention"
    if page_table is not None:
        if page_table.ndim != 2 or page_table.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name}: page_table must have shape [rows, pages of a row] with "
                f"{query.shape[0]} rows, got {page_table.shape}."
            )
        if not jnp.issubdtype(page_table.dtype, jnp.integer):
            raise TypeError(f"{name}: page_table must hold integers, got {page_table.dtype}.")
        if key.shape[0] != value.shape[0]:
            raise ValueError(
                f"{name}: key and value must have the same number of pages, got {key.shape} and "
                f"{value.shape}."
            )
        # what a row sees of the pool, for the checks below
        rows, pages = page_table.shape
        key, value = (
            jax.ShapeDtypeStruct((rows, pages * x.shape[1], *x.shape[2:]), x.dtype)
            if x.ndim == 4
            else x
            for x in (key, value)
        )
    checks.check_qkv(name, query, key, value)
    if query.shape[1] == 0 or key.shape[1] == 0:
        raise ValueError(
            f"{name}: query and key need at least one token, got {query.shape} and {key.shape}."
        )
    if sinks is not None and sinks.shape != (query.shape[2],):
        raise ValueError(
            f"{name}: sinks must have shape [heads] = ({query.shape[2]},), got {sinks.shape}."
        )
    if window is not None and (window < 1 or not causal):
        raise ValueError(
            f"{name}: window={window} needs causal=True and at least 1 token: it counts the query "
            "itself."
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{name}: softcap={softcap} must be positive, or None for no cap.")
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"{name}: num_splits={num_splits} must be at least 1, or None to choose.")
