"""Reading, masking and scoring one tile in the XLA body.

A step covers block_q queries and `group` listed key blocks. In the forward direction a tile of scores is
[queries, keys]; the backward direction holds it transposed, [keys, queries], so that the gradients of
keys and values are plain products (`transposed=True`).
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


def listed_blocks(x: jax.Array, place: Any, cols: Any, group: int) -> jax.Array:
    """Key blocks `cols` [group] of a member, one below the other: [group * block, d]."""
    found = [block_at(x, place, cols[c]) for c in range(group)]
    return found[0] if group == 1 else jnp.concatenate(found, axis=0)


def add_listed(
    x: jax.Array, place: Any, cols: Any, update: jax.Array, spec: FlashSpec
) -> jax.Array:
    """Adds [group * block, d] where `listed_blocks` read."""
    for c in range(spec.group):
        piece = update[c * spec.block_kv : (c + 1) * spec.block_kv]
        x = write(x, (block_at(x, place, cols[c]) + piece)[None, None], (place, cols[c], 0, 0))
    return x


def walk(
    cut: Cut,
    spec: FlashSpec,
    member: Member,
    i: Any,
    step: Callable[[Any, Any, Any], Any],
    carry: Any,
) -> Any:
    """`carry = step(carry, cols [group], live [group] or None)` over the listed key blocks of row i.

    Leading groups that hold FULL blocks alone get live=None: they need no mask. Elsewhere `live` marks
    the entries that are not padding of the list.
    """
    rows, heads = cut.total.shape[:2]
    at = (member.b if rows > 1 else 0, member.h if heads > 1 else 0, i)
    cols, full, total = cut.cols[at], cut.full[at], cut.total[at]
    size = jnp.int32(spec.group)

    def entries(j: Any) -> Any:
        return lax.dynamic_slice_in_dim(cols, j * size, spec.group)

    def masked(j: Any, carry: Any) -> Any:
        live = j * size + jnp.arange(spec.group, dtype=jnp.int32) < total
        return step(carry, entries(j), live)

    start = jnp.int32(0)
    if spec.any_full:
        free = lax.div(full, size)
        carry = lax.fori_loop(start, free, lambda j, c: step(c, entries(j), None), carry)
        start = free
    if spec.any_partial or spec.group > 1:
        carry = lax.fori_loop(start, lax.div(total + size - 1, size), masked, carry)
    return carry


def indices(
    cut: Cut, spec: FlashSpec, member: Member, i: Any, cols: Any, transposed: bool
) -> tuple[jax.Array, jax.Array]:
    """Absolute indices of queries and keys, [m, 1] and [1, n], or [1, m] and [n, 1] transposed."""
    offset = cut.rest["q_offset"]
    offset = offset[member.b] if offset.shape[0] > 1 else offset[0]
    q = jnp.arange(spec.block_q, dtype=jnp.int32) + (i * spec.block_q + offset)
    k = lax.broadcasted_iota(jnp.int32, (spec.group, spec.block_kv), 1)
    k = k + (cols * spec.block_kv).reshape(-1, 1)
    if transposed:
        return q.reshape(1, -1), k.reshape(-1, 1)
    return q.reshape(-1, 1), k.reshape(1, -1)


def visible(
    cut: Cut,
    spec: FlashSpec,
    member: Member,
    i: Any,
    cols: Any,
    live: Any,
    kv_len: int,
    transposed: bool,
) -> jax.Array:
    """Booleans of a tile that needs its mask."""
    q, k = indices(cut, spec, member, i, cols, transposed)
    keep = k < kv_len
    if spec.group > 1:
        keep = keep & jnp.repeat(live, spec.block_kv).reshape(keep.shape)
    if cut.rest["mask"] is not None:
        keep = keep & cut.rest["mask"].predicate(member.b, member.h, q, k)
    if cut.rest["mask_array"] is not None:
        keep = keep & _array_tile(cut.rest["mask_array"], spec, member, i, cols, transposed)
    return keep


def mask_is_shared(cut: Cut) -> bool:
    """Whether one mask tile serves every lane of a step."""
    mask, array = cut.rest["mask"], cut.rest["mask_array"]
    programs = mask is None or (mask.num_heads is None and mask.batch_size is None)
    arrays = array is None or array.shape[:2] == (1, 1)
    return programs and arrays and cut.rest["q_offset"].shape[0] == 1


def raw_scores(spec: FlashSpec, q: jax.Array, k: jax.Array, transposed: bool) -> jax.Array:
    """scale q·k; the scale is in q already where q has full precision."""
    pair = (k, q) if transposed else (q, k)
    scores = tilemath.dot(*pair, (1, 1), spec.precision)
    return scores if q.dtype == scores.dtype else scores * jnp.asarray(spec.scale, scores.dtype)


def bias_tile(
    cut: Cut, spec: FlashSpec, member: Member, i: Any, cols: Any, transposed: bool
) -> jax.Array | None:
    """The part of the bias that a tile needs, with axes of size 1 where it broadcasts."""
    bias = cut.rest["bias"]
    return None if bias is None else _array_tile(bias, spec, member, i, cols, transposed)


def score_stages(
    cut: Cut, spec: FlashSpec, member: Member, i: Any, cols: Any, transposed: bool
) -> Callable[[jax.Array, Any, Any], jax.Array]:
    """`(raw scores, bias tile, mod_consts) -> scores`: what lies between product and mask."""
    q, k = indices(cut, spec, member, i, cols, transposed)

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
    cut: Cut, spec: FlashSpec, member: Member, i: Any, cols: Any, transposed: bool
) -> jax.Array | None:
    """Dropout factors of a tile, or None without dropout."""
    if spec.dropout_rate == 0.0:
        return None
    q, k = indices(cut, spec, member, i, cols, transposed)
    seed = cut.rest["seed"]
    factors = tilemath.dropout_factors(seed, member.b, member.h, q, k, spec.dropout_rate)
    return factors.astype(tilemath.accumulator_dtype(cut.q[0].dtype))


def _array_tile(
    x: jax.Array, spec: FlashSpec, member: Member, i: Any, cols: Any, transposed: bool
) -> jax.Array:
    """The tile of a padded [b|1, h|1, t|1, s|1] array that a step needs."""
    starts, rows, width = _tile_places(x, spec, member, i, cols)
    tiles = [read(x, start, (1, 1, rows, width))[0, 0] for start in starts]
    tile = tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=1)
    return tile.T if transposed else tile


def add_array_tile(
    total: jax.Array,
    tile: jax.Array,
    spec: FlashSpec,
    member: Member,
    i: Any,
    cols: Any,
    transposed: bool,
) -> jax.Array:
    """Adds a tile's gradient where `_array_tile` read it."""
    tile = (tile.T if transposed else tile).astype(total.dtype)
    starts, _, width = _tile_places(total, spec, member, i, cols)
    for c, start in enumerate(starts):
        piece = tile[:, c * width : (c + 1) * width]
        total = write(total, read(total, start, (1, 1, *piece.shape)) + piece[None, None], start)
    return total


def _tile_places(
    x: jax.Array, spec: FlashSpec, member: Member, i: Any, cols: Any
) -> tuple[list[tuple[Any, ...]], int, int]:
    """(starts of the pieces, rows and width of each) of a tile in a [b|1, h|1, t|1, s|1] array."""
    b, h = (n if size > 1 else 0 for n, size in zip(member[:2], x.shape[:2], strict=True))
    row, rows = (i * spec.block_q, spec.block_q) if x.shape[2] > 1 else (0, 1)
    if x.shape[3] == 1:
        return [(b, h, row, 0)], rows, 1
    starts = [(b, h, row, cols[c] * spec.block_kv) for c in range(spec.group)]
    return starts, rows, spec.block_kv
