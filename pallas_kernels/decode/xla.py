"""Decode attention in plain JAX: the reference of the kernels, and the body of their gradient."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tilemath
from pallas_kernels.decode import rows
from pallas_kernels.decode.pages import gather_pages
from pallas_kernels.decode.spec import DecodeSpec, sizes_of
from pallas_kernels.dispatch import Target

SPLIT_KEYS = 1024
"""Keys of one part, where nothing else is asked for."""


def forward(operands: dict[str, Any], spec: DecodeSpec, target: Target) -> Any:
    """(o [b, t, h, e], lse [b, t, h]); all parts at once.

    Args:
      operands: see `decode_attention`.
      spec: static description; `num_splits` is the most parts, as parts must be equal.
      target: on accelerators the weights take the values' type for their product.
    """
    return attend(operands, spec, narrow=target.platform in ("tpu", "cuda", "rocm"))


def attend(
    operands: dict[str, Any], spec: DecodeSpec, *, narrow: bool = False, clean_keys: bool = False
) -> Any:
    """As `forward`. With `clean_keys` hidden keys may hold NaN in the derivative as well."""
    query = operands["query"]
    sizes = sizes_of(operands)
    dtype = tilemath.accumulator_dtype(query.dtype)
    key, value = (gather_pages(operands[n], operands["page_table"]) for n in ("key", "value"))
    terms = rows.score_terms(operands, dtype)
    index = lax.broadcasted_iota(jnp.int32, (1, 1, 1, sizes.s), 3)
    first, end = (
        rows.pack_rows(operands[n], sizes.g)[..., None] for n in ("starts", "ends")
    )  # [b, g, rows, 1]
    keep = (index >= first) & (index < end)
    if terms is not None:
        keep = keep & ~jnp.isneginf(terms)
    # [b, s, g, 1]: a value that no query sees may be NaN, and 0 · NaN is NaN
    seen = keep.any(2).transpose(0, 2, 1)[..., None]
    value = jnp.where(seen, value, jnp.zeros_like(value))
    if clean_keys:
        key = jnp.where(seen, key, jnp.zeros_like(key))
    packed = rows.pack_rows(query.transpose(0, 2, 1, 3), sizes.g)
    scores = jnp.einsum(
        "bgrd,bsgd->bgrs", packed, key.astype(packed.dtype), precision=spec.precision,
        preferred_element_type=dtype,
    )  # fmt: skip
    scores = scores * jnp.asarray(spec.scale, dtype)
    if terms is not None:  # hidden keys get 0: -inf has no derivative
        scores = scores + jnp.where(jnp.isneginf(terms), jnp.zeros_like(terms), terms)
    scores = jnp.where(keep, rows.capped(scores, spec.softcap), jnp.asarray(-jnp.inf, dtype))
    parts = _parts(sizes.s, spec.config.num_splits)
    scores = scores.reshape(*scores.shape[:3], parts, -1)
    top = lax.stop_gradient(scores.max(-1))
    shift = jnp.where(jnp.isneginf(top), jnp.zeros_like(top), top)
    p = jnp.exp(scores - shift[..., None])
    value = value.astype(query.dtype if narrow else dtype)
    value = value.reshape(sizes.b, parts, -1, sizes.g, sizes.e)
    acc = jnp.einsum(
        "bgrnc,bncge->bgnre", p.astype(value.dtype), value, precision=spec.precision,
        preferred_element_type=dtype,
    )  # fmt: skip
    top, total = top.swapaxes(2, 3), p.sum(-1).swapaxes(2, 3)
    return rows.merge_splits(acc, top, total, operands["sinks"], query)


def _parts(length: int, asked: int | None) -> int:
    """The largest divisor of the length that is no more than the number of parts asked for."""
    most = max(1, length // SPLIT_KEYS) if asked is None else min(asked, length)
    return next(n for n in range(most, 0, -1) if length % n == 0)


def differentiable(inputs: dict[str, Any], others: dict[str, Any], spec: DecodeSpec) -> Any:
    """`attend` as a function of the operands that have gradients."""
    return attend({**inputs, **others}, spec, clean_keys=True)


def gradients(
    inputs: dict[str, jax.Array | None], others: dict[str, Any], spec: DecodeSpec, cotangents: Any
) -> dict[str, jax.Array | None]:
    """Gradients of the inputs, by differentiating `attend`; it is computed again."""
    _, pull = jax.vjp(lambda x: differentiable(x, others, spec), inputs)
    return pull(cotangents)[0]
