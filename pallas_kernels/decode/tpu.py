"""Decode attention on TPUs: all heads of a block of tokens in one step.

A cache [b, s, g, d] keeps the heads of a token together. The kernel reads it as [b, s g, d],
without a copy: a flat list of keys in which key c of a block belongs to head c mod g. All h t
queries of a row are multiplied with all of them, and the scores of foreign heads are hidden. The
products are g times as many as needed, but each key passes the matrix unit once either way, and
the step still ends before the next block has arrived from memory (up to a few hundred queries).

Grid: (rows b, parts n, blocks of the longest part), the last one as long as the lengths ask for.
Blocks beyond a row's own range repeat its last block, which is not fetched again, and do nothing.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode import rows
from pallas_kernels.decode.pages import block_address
from pallas_kernels.decode.spec import DecodeSpec, Sizes, config_of, sizes_of
from pallas_kernels.dispatch import Target, Unsupported

MOST_QUERIES = 1024
"""Queries of a row (h t): their scores against one block must fit the vector memory."""

HIDDEN = -(2.0**126)
"""Bias of a hidden key: finite, and exact in bfloat16. No other is below a quarter of it."""

LANES = 128
"""Entries of a vector register's row: masks are cut into blocks of a multiple of it."""

MOST_SCORE_BYTES = 1 << 22
"""Scores of one step, float32: several copies of them have to fit the vector memory."""

FIRST, COUNT, WHOLE_FROM, WHOLE_TO = range(4)
"""Columns of the plan that is prefetched: a part's blocks, and those that need no mask."""


def forward(operands: dict[str, Any], spec: DecodeSpec, target: Target) -> Any:
    """(o [b, t, h, e], lse [b, t, h]); see the module.

    Raises:
      Unsupported: for float64, and for more queries or pages than the kernel handles.
    """
    sizes = sizes_of(operands)
    _check(operands, sizes)
    config = config_of("tpu", operands, spec, target)
    block = min(config.block_kv, sizes.s)
    if block < sizes.s and block * sizes.g % 16:
        raise Unsupported(
            f"decode on TPU: blocks or pages of {block} tokens with {sizes.g} key/value heads are "
            "no multiple of 16 rows; use larger ones or the XLA body."
        )
    has_terms = operands["bias"] is not None or operands["mask"] is not None
    if has_terms and block < LANES <= sizes.s and sizes.page is None:
        block = LANES
    if 4 * sizes.h * sizes.t * block * sizes.g > MOST_SCORE_BYTES:
        raise Unsupported(
            f"decode on TPU: {sizes.t} queries of {sizes.h} heads against {block} tokens of "
            f"{sizes.g} key/value heads need more vector memory than there is; pass fewer queries "
            "at a time, or use attention."
        )
    if has_terms and block < sizes.s and block % LANES:
        raise Unsupported(
            f"decode on TPU: mask and bias need blocks or pages of a multiple of {LANES} tokens, "
            f"got {block}; use such a size or the XLA body."
        )
    starts, ends = (operands[n].reshape(sizes.b, -1) for n in ("starts", "ends"))
    first, count, whole = rows.block_plan(starts, ends, block, config.num_splits)
    whole = jnp.broadcast_to(whole[:, None], (*first.shape, 2))
    if has_terms:
        whole = jnp.zeros_like(whole)  # every block needs its mask
    plan = jnp.concatenate([first[..., None], count[..., None], whole], axis=-1)
    plan = plan.reshape(-1, 4)  # one row for each (b, n)
    acc, top, total = _call(operands, sizes, spec, block, plan, count.max(), target.interpret)

    def by_head(x: jax.Array) -> jax.Array:  # [b, n, h t, ...] to [b, g, n, rows, ...]
        return x.reshape(*x.shape[:2], sizes.g, sizes.rows, *x.shape[3:]).swapaxes(1, 2)

    acc, top, total = by_head(acc), by_head(top[..., 0]), by_head(total[..., 0])
    return rows.merge_splits(acc, top, total, operands["sinks"], operands["query"])


def _check(operands: dict[str, Any], sizes: Sizes) -> None:
    if operands["query"].dtype == jnp.float64:
        raise Unsupported("decode on TPU: float64 has no kernel; use float32 or the XLA body.")
    if sizes.h * sizes.t > MOST_QUERIES:
        raise Unsupported(
            f"decode on TPU: {sizes.t} queries of {sizes.h} heads are more than {MOST_QUERIES} "
            "rows; pass fewer queries at a time, or use attention."
        )


def _call(
    operands: dict[str, Any],
    sizes: Sizes,
    spec: DecodeSpec,
    block: int,
    plan: jax.Array,
    steps: jax.Array,
    interpret: bool,
) -> Any:
    """Partial softmaxes: acc [b, n, h t, e], m and l [b, n, h t, 1]."""
    b, d, e, g = sizes.b, sizes.d, sizes.e, sizes.g
    queries, columns = sizes.h * sizes.t, block * g
    parts = plan.shape[0] // b
    table = operands["page_table"]
    per_page = (sizes.page or block) // block
    prefetched = [plan] if table is None else [plan, table]

    def current(b: Any, n: Any, i: Any, plan: Any) -> Any:
        at = b * parts + n
        return plan[at, FIRST] + jnp.minimum(i, jnp.maximum(plan[at, COUNT] - 1, 0))

    def keys(b: Any, n: Any, i: Any, plan: Any, *table: Any) -> Any:
        at, i = block_address(b, current(b, n, i, plan), table[0] if table else None, per_page)
        return at, i, 0

    def row(b: Any, n: Any, i: Any, *_: Any) -> Any:
        return b, 0, 0

    def result(b: Any, n: Any, i: Any, *_: Any) -> Any:
        return b, n, 0, 0

    inputs = [
        operands["query"].transpose(0, 2, 1, 3).reshape(b, queries, d),
        operands["starts"].reshape(b, queries, 1),
        operands["ends"].reshape(b, queries, 1),
        np.stack([np.arange(columns) % g, np.arange(columns) // g]).astype(np.int32),
        *(operands[n].reshape(operands[n].shape[0], -1, operands[n].shape[3])
          for n in ("key", "value")),
    ]  # fmt: skip
    in_specs = [
        pl.BlockSpec((None, queries, d), row),
        pl.BlockSpec((None, queries, 1), row),
        pl.BlockSpec((None, queries, 1), row),
        pl.BlockSpec((2, columns), lambda *_: (0, 0)),
        pl.BlockSpec((None, columns, d), keys),
        pl.BlockSpec((None, columns, e), keys),
    ]
    terms = _terms(operands, sizes, block)
    if terms is not None:
        shared = terms.shape[0] == 1

        def term(b: Any, n: Any, i: Any, plan: Any, *_: Any) -> Any:
            return 0 if shared else b, 0, current(b, n, i, plan)

        matrix = _spread_matrix(block, g)
        inputs += [terms, matrix]
        in_specs.append(pl.BlockSpec((None, terms.shape[1], block), term))
        in_specs.append(pl.BlockSpec(matrix.shape, lambda *_: (0, 0)))
    kernel = functools.partial(
        _kernel, sizes=sizes, spec=spec, block=block, parts=parts, paged=table is not None,
        has_terms=terms is not None,
    )  # fmt: skip
    widths = (e, 1, 1)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetched),
            grid=(b, parts, jnp.maximum(steps, 1)),
            in_specs=in_specs,
            out_specs=[pl.BlockSpec((None, None, queries, w), result) for w in widths],
        ),
        out_shape=[jax.ShapeDtypeStruct((b, parts, queries, w), jnp.float32) for w in widths],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(sizes),
        interpret=interpret,
        name="decode_attention",
    )(*prefetched, *inputs)


def _terms(operands: dict[str, Any], sizes: Sizes, block: int) -> jax.Array | None:
    """Bias and mask by token, [b|1, h t|1, s] up to the end of the last block; or None.

    Infinities do not survive the product that spreads them over the flat keys, so a hidden key has
    the score HIDDEN instead. A mask alone is exact in bfloat16.
    """
    terms = rows.score_terms(operands, jnp.float32)
    if terms is None:
        return None
    if terms.shape[1:3] != (1, 1):
        terms = jnp.broadcast_to(terms, (terms.shape[0], sizes.g, *terms.shape[2:]))
        terms = terms.reshape(terms.shape[0], sizes.h * sizes.t, -1)
    terms = terms.reshape(terms.shape[0], -1, sizes.s)
    terms = jnp.where(jnp.isneginf(terms), HIDDEN, jnp.maximum(terms, HIDDEN / 4))
    if operands["bias"] is None:
        terms = terms.astype(jnp.bfloat16)
    return jnp.pad(terms, ((0, 0), (0, 0), (0, -sizes.s % block)))


def _spread_matrix(block: int, kv_heads: int) -> np.ndarray:
    """[c, c g] of zeros and ones that repeat each of c tokens once for every key/value head."""
    chunk = block if block % LANES else LANES
    owner = np.arange(chunk * kv_heads) // kv_heads
    return (owner == np.arange(chunk)[:, None]).astype(jnp.bfloat16)


def _spread(terms: jax.Array, matrix: jax.Array) -> jax.Array:
    """Terms of tokens [r, n] as those of flat keys [r, n g], exactly.

    The matrix unit does what a shuffle of lanes would take far longer for. A float32 is the sum of
    three bfloat16, each of which passes it unchanged.
    """
    parts, rest = [], terms
    for _ in range(1 if terms.dtype == jnp.bfloat16 else 3):
        parts.append(rest.astype(jnp.bfloat16))
        rest = rest - parts[-1].astype(rest.dtype)
    chunk = matrix.shape[0]
    flat = []
    for i in range(0, terms.shape[1], chunk):
        pieces = [_product(x[:, i : i + chunk], matrix, 0, lax.Precision.DEFAULT) for x in parts]
        flat.append(functools.reduce(operator.add, reversed(pieces)))
    return jnp.concatenate(flat, axis=1)


def _kernel(plan: Any, *refs: Any, sizes: Sizes, spec: DecodeSpec, block: int, parts: int,
            paged: bool, has_terms: bool) -> None:  # fmt: skip
    query, starts, ends, columns, key, value, *rest = refs[1:] if paged else refs
    terms = rest[:2] if has_terms else None
    acc, top, total = rest[-3:]
    at = pl.program_id(0) * parts + pl.program_id(1)
    step = pl.program_id(2)
    here = plan[at, FIRST] + step
    whole = (here >= plan[at, WHOLE_FROM]) & (here < plan[at, WHOLE_TO])
    live = step < plan[at, COUNT]

    @pl.when(step == 0)
    def _() -> None:
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, -jnp.inf)
        total[...] = jnp.zeros_like(total)

    def visit(masked: bool) -> None:
        precision = rows.product_precision(query.dtype, spec.precision)
        scores = _product(query[...], key[...].astype(query.dtype), 1, precision) * spec.scale
        keep = None
        if sizes.g > 1:  # the row's own head
            head = lax.div(lax.broadcasted_iota(jnp.int32, (query.shape[0], 1), 0), sizes.rows)
            keep = head == columns[0:1, :]
        if terms is not None:
            extra = _spread(terms[0][...], terms[1][...])
            scores = scores + extra
            keep = _both(keep, extra > HIDDEN / 2)
        if masked:
            index = here * block + columns[1:2, :]
            keep = _both(keep, (index >= starts[...]) & (index < ends[...]))
        scores = rows.capped(scores, spec.softcap)
        if keep is not None:
            scores = jnp.where(keep, scores, -jnp.inf)
        carry = (top[...], total[...], acc[...])
        top[...], total[...], out, p = rows.softmax_step(carry, scores)
        v = value[...].astype(query.dtype)
        if masked:
            v, bad = _finite(v)
            # what has a weight stays NaN or inf; what has none must not spoil its row
            spoilt = _product(p.astype(v.dtype), bad, 0, lax.Precision.DEFAULT) > 0
            out = jnp.where(spoilt, jnp.nan, out)
        acc[...] = out + _product(p.astype(v.dtype), v, 0, precision)

    pl.when(live & whole)(lambda: visit(False))
    pl.when(live & ~whole)(lambda: visit(True))


def _finite(v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values with zeros for NaN and inf, and 1 at those, in the values' dtype."""
    wide = v.astype(jnp.float32)
    fine = jnp.abs(wide) < jnp.inf
    bad = jnp.where(fine, 0.0, 1.0).astype(v.dtype)
    return jnp.where(fine, wide, 0.0).astype(v.dtype), bad


def _both(a: jax.Array | None, b: jax.Array) -> jax.Array:
    return b if a is None else a & b


def _product(a: jax.Array, b: jax.Array, axis: int, precision: Any) -> jax.Array:
    """A times B along axis 1 of `a` and `axis` of `b`, in float32."""
    return lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _cost(sizes: Sizes) -> pl.CostEstimate:
    """Of a full cache: every key is read once."""
    pairs = sizes.b * sizes.h * sizes.t * sizes.s
    return pl.CostEstimate(
        flops=2 * pairs * (sizes.d + sizes.e),
        transcendentals=pairs,
        bytes_accessed=sizes.b * sizes.s * sizes.g * (sizes.d + sizes.e) * sizes.itemsize,
    )
