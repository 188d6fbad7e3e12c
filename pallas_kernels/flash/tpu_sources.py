"""What the scores look up besides q, k and v: reads, bias and array masks.

    kind     array                      value in a tile          gradient
    scalar   [nb, nh]                   a number in SMEM         sum of the tile
    query    [nb, nh, t]                one number per query     sums over keys
    key      [nb, nh, s]                one number per key       sums over queries
    offset   [nb, nh, t + s - 1]        Toeplitz tile            sums over diagonals
    tile     [nb, nh, t, s]             as it is                 as it is (`tpu_bias`)

Vectors lie along the lanes in memory. One that runs along the sublanes of a tile is turned once per
row of tiles, into columns with equal lanes. A Toeplitz tile is one window of the vector, shifted by
one more lane in every sublane. Gradients are in `tpu_source_gradients`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash.tpu_plan import (
    LANES,
    Array,
    Grid,
    Place,
    Plan,
    columns,
    spread,
)


@dataclasses.dataclass(frozen=True)
class Source:
    """One array.

    Attributes:
      name: of its operands and buffers.
      kind: see the module.
      array: the operand; [nb, nh, ...].
      graded: whether its gradient is wanted.
    """

    name: str
    kind: str
    array: Array
    graded: bool

    @property
    def apart(self) -> tuple[bool, bool]:
        """Whether batch rows and heads have entries of their own."""
        return self.array.shape[0] > 1, self.array.shape[1] > 1

    def index(self, place: Place, *rest: Any) -> tuple[Any, ...]:
        """Index of a block, by batch row and head where they matter."""
        by_row, by_head = self.apart
        return (place.b if by_row else 0, place.h if by_head else 0, *rest)

    def is_column(self, plan: Plan) -> bool:
        """Whether it is a vector along the sublanes of a tile."""
        return self.kind == ("key" if plan.transposed else "query")


def as_source(name: str, array: Array, graded: bool) -> Source:
    """A broadcastable [b|1, h|1, t|1, s|1] array, by the axes it has."""
    _, _, t, s = array.shape
    if t == 1 and s == 1:
        kind, array = "scalar", array[:, :, 0, 0]
    elif s == 1:
        kind, array = "query", array[..., 0]
    elif t == 1:
        kind, array = "key", array[:, :, 0]
    else:
        return Source(name, "tile", array.astype(jnp.int8) if not graded else array, graded)
    return Source(name, kind, array.astype(jnp.float32 if graded else jnp.int32), graded)


def gather(operands: dict[str, Any], spec: Any) -> list[Source]:
    """All sources of a call, in a fixed order."""
    found = []
    if operands["mask_array"] is not None:
        found.append(as_source("mask_array", operands["mask_array"], False))
    if operands["bias"] is not None:
        found.append(as_source("bias", operands["bias"], True))
    programs = (("mask", spec.predicate), ("score", spec.score_mod))
    for what, program in programs:
        for i, kind in enumerate(program.kinds if program is not None else ()):
            array = operands[f"{what}_reads"][i]
            graded = what == "score" and program.is_float[i]
            dtype = jnp.float32 if jnp.issubdtype(array.dtype, jnp.floating) else jnp.int32
            found.append(Source(f"{what}{i}", kind, array.astype(dtype), graded))
    return found


def inputs(sources: list[Source], grid: Grid) -> dict[str, Any]:
    """Dictionary name -> (padded array, block) of every source."""
    plan, found = grid.plan, {}
    for source in sources:
        found[source.name] = _padded(source, plan), _block(source, grid)
    return found


def scratch(sources: list[Source], plan: Plan) -> dict[str, Any]:
    """Buffers for the columns of vectors along the sublanes."""
    rows = plan.block_kv if plan.transposed else plan.block_q
    return {
        source.name: pltpu.VMEM((rows, LANES), source.array.dtype)
        for source in sources
        if source.is_column(plan)
    }


def turn_columns(
    sources: list[Source], grid: Grid, place: Place, ins: dict[str, Any], buffers: dict[str, Any]
) -> None:
    """Fills the buffers of `scratch`, where a row of tiles begins or where the head changes."""
    once = [s for s in sources if s.is_column(grid.plan)]
    changing = [s for s in once if grid.plan.transposed and s.apart[1] and grid.plan.group > 1]

    def fill(source: Source) -> None:
        buffers[source.name][...] = columns(ins[source.name][0, 0])

    steady = [s for s in once if s not in changing]
    if steady:

        @pl.when(place.opens)
        def _() -> None:
            for source in steady:
                fill(source)

    for source in changing:
        fill(source)


def value(
    source: Source, plan: Plan, place: Place, ins: Any, buffers: Any, part: tuple[int, int]
) -> Array:
    """Value of a source for the part of a tile that starts at (query, key) = part.

    Returns:
      [], [1, lanes], [sublanes, lanes]: what broadcasts to the tile.
    """
    r, c = part
    ref = ins[source.name]
    if source.kind == "scalar":
        by_row, by_head = source.apart
        index = place.b * source.array.shape[1] if by_row else jnp.int32(0)
        return ref[index + place.h if by_head else index]
    rows, lanes = (plan.sub_kv, plan.sub_q) if plan.transposed else (plan.sub_q, plan.sub_kv)
    if source.kind == "tile":
        tile = ref[0, 0, r : r + plan.sub_q, c : c + plan.sub_kv]
        tile = tile.astype(jnp.float32 if source.graded else jnp.int32)
        return tile.T if plan.transposed else tile
    if source.kind == "offset":
        start = window(plan, place, part)
        row = ref[0, 0, :, pl.ds(start, rows + lanes)]
        return toeplitz(row, rows, lanes)
    first = r if source.kind == "query" else c
    if source.is_column(plan):
        return spread(buffers[source.name][first : first + rows, :], lanes)
    return ref[0, 0, :, first : first + lanes]


def toeplitz(row: Array, rows: int, lanes: int) -> Array:
    """T[i, j] = row[rows + j - i], from row [1, rows + lanes]."""
    full = jnp.broadcast_to(row, (rows, rows + lanes))
    return pltpu.roll(full, 0, 1, stride=1, stride_axis=0)[:, rows:]


def window(plan: Plan, place: Place, part: tuple[int, int]) -> Array:
    """Where the window of a Toeplitz tile begins in the padded vector; a multiple of 128."""
    r, c = part
    q0, k0 = place.q_block * plan.block_q + r, place.k_block * plan.block_kv + c
    if plan.transposed:
        return pl.multiple_of(plan.s_pad - plan.sub_kv + q0 - k0, LANES)
    return pl.multiple_of(plan.t_pad - plan.sub_q + k0 - q0, LANES)


def _padded(source: Source, plan: Plan) -> Array:
    """The operand: scalars flat; vectors as rows [nb, nh, 1, n]; zeros where there is no token."""
    x = source.array
    if source.kind == "scalar":
        return x.reshape(-1)
    t_more, s_more = plan.t_pad - plan.t, plan.s_pad - plan.s
    if source.kind == "tile":
        return jnp.pad(x, ((0, 0), (0, 0), (0, t_more), (0, s_more)))
    if source.kind == "offset":
        if plan.transposed:
            more = (s_more + 1, t_more)
        else:
            x, more = x[..., ::-1], (t_more + 1, s_more)
    else:
        more = (0, t_more if source.kind == "query" else s_more)
    return jnp.pad(x, ((0, 0), (0, 0), more))[:, :, None]


def _block(source: Source, grid: Grid) -> Any:
    p = grid.plan
    if source.kind == "scalar":
        return pl.BlockSpec(memory_space=pltpu.SMEM)
    if source.kind == "tile":
        shape = (1, 1, p.block_q, p.block_kv)
        return grid.block(shape, lambda at: source.index(at, at.q_block, at.k_block))
    if source.kind == "offset":
        return grid.block((1, 1, 1, p.t_pad + p.s_pad), lambda at: source.index(at, 0, 0))
    if source.kind == "query":
        return grid.block((1, 1, 1, p.block_q), lambda at: source.index(at, 0, at.q_block))
    return grid.block((1, 1, 1, p.block_kv), lambda at: source.index(at, 0, at.k_block))
