"""Reading, masking and scoring one tile in the XLA body.

In the forward direction a tile of scores is [queries, keys]; the backward direction holds it
transposed, [keys, queries], so that the gradients of keys and values are plain products
(`transposed=True`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import tilemath
from pallas_kernels.flash.lanes import Cut, Member
from pallas_kernels.flash.spec import FlashSpec


def read(x: jax.Array, start: tuple[Any, ...], sizes: tuple[int, ...]) -> jax.Array:
    """`lax.dynamic_slice` with indices of any integer type."""
    return lax.dynamic_slice(x, [jnp.asarray(n, jnp.int32) for n in start], sizes)


def write(x: jax.Array, update: jax.Array, start: tuple[Any, ...]) -> jax.Array:
    """`lax.dynamic_update_slice` with indices of any integer type."""
    return lax.dynamic_update_slice(x, update, [jnp.asarray(n, jnp.int32) for n in start])


def block_at(x: jax.Array, place: Any, i: Any) -> jax.Array:
    """Block i of a member: [block, d] of [members, blocks, block, d]."""
    return read(x, (place, i, 0, 0), (1, 1, *x.shape[2:]))[0, 0]


def keys_at(x: jax.Array, place: Any, start: Any, span: int) -> jax.Array:
    """Keys start .. start + span - 1 of a member: [span, d] of [members, s, d]."""
    return read(x, (place, start, 0), (1, span, x.shape[2]))[0]


def add_keys(x: jax.Array, place: Any, start: Any, update: jax.Array) -> jax.Array:
    """Adds [span, d] where `keys_at` read."""
    old = keys_at(x, place, start, update.shape[0])
    return write(x, (old + update)[None], (place, start, 0))


def walk(
    cut: Cut,
    spec: FlashSpec,
    member: Member,
    i: Any,
    step: Callable[[Any, Any, bool], Any],
    carry: Any,
) -> Any:
    """`carry = step(carry, start, masked)` over the first keys of the listed blocks of row i.

    The FULL blocks come first, with masked=False; then the PARTIAL ones.
    """
    rows, heads = cut.total.shape[:2]
    at = (member.b if rows > 1 else 0, member.h if heads > 1 else 0, i)
    starts, full, total = cut.starts[at], cut.full[at], cut.total[at]
    first = jnp.int32(0)
    if spec.any_full:
        carry = lax.fori_loop(first, full, lambda j, c: step(c, starts[j], False), carry)
        first = full
    if spec.any_partial:
        carry = lax.fori_loop(first, total, lambda j, c: step(c, starts[j], True), carry)
    return carry


def indices(
    cut: Cut, spec: FlashSpec, member: Member, i: Any, start: Any, transposed: bool
) -> tuple[jax.Array, jax.Array]:
    """Absolute indices of queries and keys, [m, 1] and [1, n], or [1, m] and [n, 1] transposed."""
    offset = cut.rest["q_offset"]
    offset = offset[member.b] if offset.shape[0] > 1 else offset[0]
    q = jnp.arange(spec.block_q, dtype=jnp.int32) + (i * spec.block_q + offset)
    k = jnp.arange(spec.span, dtype=jnp.int32) + start
    if transposed:
        return q.reshape(1, -1), k.reshape(-1, 1)
    return q.reshape(-1, 1), k.reshape(1, -1)


def visible(
    cut: Cut, spec: FlashSpec, member: Member, i: Any, start: Any, kv_len: int, transposed: bool
) -> jax.Array:
    """Booleans of a tile that needs its mask."""
    q, k = indices(cut, spec, member, i, start, transposed)
    keep = k < kv_len
    if cut.rest["mask"] is not None:
        keep = keep & cut.rest["mask"].predicate(member.b, member.h, q, k)
    if cut.rest["mask_array"] is not None:
        keep = keep & _array_tile(cut.rest["mask_array"], spec, member, i, start, transposed)
    return keep


def mask_is_shared(cut: Cut) -> bool:
    """Whether one mask tile serves every lane of a step."""
    mask, array = cut.rest["mask"], cut.rest["mask_array"]
    programs = mask is None or (mask.num_heads is None and mask.batch_size is None)
    arrays = array is None or array.shape[:2] == (1, 1)
    return programs and arrays and cut.rest["q_offset"].shape[0] == 1


def raw_scores(spec: FlashSpec, q: jax.Array, k: jax.Array, transposed: bool) -> jax.Array:
    """Products scale q·k; the scale is in q already where q has full precision."""
    pair = (k, q) if transposed else (q, k)
    scores = tilemath.dot(*pair, (1, 1), spec.precision)
    return scores if q.dtype == scores.dtype else scores * jnp.asarray(spec.scale, scores.dtype)


def bias_tile(
    cut: Cut, spec: FlashSpec, member: Member, i: Any, start: Any, transposed: bool
) -> jax.Array | None:
    """The part of the bias that a tile needs, with axes of size 1 where it broadcasts."""
    bias = cut.rest["bias"]
    return None if bias is None else _array_tile(bias, spec, member, i, start, transposed)


def score_stages(
    cut: Cut, spec: FlashSpec, member: Member, i: Any, start: Any, transposed: bool
) -> Callable[[jax.Array, Any, Any], jax.Array]:
    """`(raw scores, bias tile, mod_consts) -> scores`: what lies between product and mask."""
    q, k = indices(cut, spec, member, i, start, transposed)

    def apply(scores: jax.Array, bias: Any, consts: Any) -> jax.Array:
        if bias is not None:
            scores = scores + bias.astype(scores.dtype)
        if spec.softcap is not None:
            cap = jnp.asarray(spec.softcap, scores.dtype)
            scores = cap * jnp.tanh(scores / cap)
        if spec.score_mod is not None:
            program = spec.score_mod[1 if transposed else 0]
            scores = program(consts, scores, member.b, member.h, q, k).astype(scores.dtype)
        return scores

    return apply


def hide(scores: jax.Array, keep: jax.Array | None) -> jax.Array:
    """-inf where a key is hidden."""
    return scores if keep is None else jnp.where(keep, scores, jnp.full_like(scores, -jnp.inf))


def dropout(
    cut: Cut, spec: FlashSpec, member: Member, i: Any, start: Any, transposed: bool
) -> jax.Array | None:
    """Dropout factors of a tile, or None without dropout."""
    if spec.dropout_rate == 0.0:
        return None
    q, k = indices(cut, spec, member, i, start, transposed)
    seed = cut.rest["seed"]
    factors = tilemath.dropout_factors(seed, member.b, member.h, q, k, spec.dropout_rate)
    return factors.astype(tilemath.accumulator_dtype(cut.q[0].dtype))


def _array_tile(
    x: jax.Array, spec: FlashSpec, member: Member, i: Any, start: Any, transposed: bool
) -> jax.Array:
    """The tile of a padded [b|1, h|1, t|1, s|1] array that a step needs."""
    place, sizes = _tile_place(x, spec, member, i, start)
    tile = read(x, place, sizes)[0, 0]
    return tile.T if transposed else tile


def add_array_tile(
    total: jax.Array,
    tile: jax.Array,
    spec: FlashSpec,
    member: Member,
    i: Any,
    start: Any,
    transposed: bool,
) -> jax.Array:
    """Adds a tile's gradient where `_array_tile` read it."""
    tile = (tile.T if transposed else tile).astype(total.dtype)
    place, sizes = _tile_place(total, spec, member, i, start)
    return write(total, read(total, place, sizes) + tile[None, None], place)


def _tile_place(
    x: jax.Array, spec: FlashSpec, member: Member, i: Any, start: Any
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """(start, sizes) of a tile in a [b|1, h|1, t|1, s|1] array."""
    b, h = (n if size > 1 else 0 for n, size in zip(member[:2], x.shape[:2], strict=True))
    row, rows = (i * spec.block_q, spec.block_q) if x.shape[2] > 1 else (0, 1)
    column, columns = (start, spec.span) if x.shape[3] > 1 else (0, 1)
    return (b, h, row, column), (1, 1, rows, columns)
