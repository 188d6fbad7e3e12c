"""Sizes and options of one TPU kernel call, its operands' layout, and where a step of it works."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import tpu_lists
from pallas_kernels.flash.spec import FlashSpec
from pallas_kernels.flash.tpu_lists import Walk

LANES = 128
LOG2E = 1.4426950408889634
LN2 = 0.6931471805599453
LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Start of the running maximum: finite, so that a hidden score gives exp2(-inf - LOWEST) = 0."""

Array = Any


@dataclasses.dataclass(frozen=True)
class Plan:
    """One kernel call.

    Attributes:
      b, t, h, s, g: batch rows, queries, query heads, keys, key heads.
      d, e: widths of a head, padded to lanes.
      block_q, block_kv: tile, in tokens. sub_q, sub_kv: parts of a tile that are computed at once.
      dtype: of the matrix products. precision: of the same.
      spec: the call's static description.
      transposed: scores are [keys, queries] and rows of the walk are key blocks.
      vmem: limit of vector memory, bytes.
      interpret: as of `pallas_call`.
    """

    b: int
    t: int
    h: int
    s: int
    g: int
    d: int
    e: int
    block_q: int
    block_kv: int
    sub_q: int
    sub_kv: int
    dtype: Any
    precision: Any
    spec: FlashSpec
    transposed: bool
    vmem: int
    interpret: Any

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.h // self.g

    @property
    def t_pad(self) -> int:
        """Queries, up to whole tiles."""
        return -(-self.t // self.block_q) * self.block_q

    @property
    def s_pad(self) -> int:
        """Keys, up to whole tiles."""
        return -(-self.s // self.block_kv) * self.block_kv

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(first query, first key) of each part of a tile."""
        queries = range(0, self.block_q, self.sub_q)
        keys = range(0, self.block_kv, self.sub_kv)
        if self.transposed:
            return [(r, c) for c in keys for r in queries]
        return [(r, c) for r in queries for c in keys]

    def dot(self, a: Array, b: Array, contract: tuple[int, int]) -> Array:
        """Product over axis contract[0] of a and contract[1] of b, summed in float32."""
        return lax.dot_general(
            a,
            b,
            (((contract[0],), (contract[1],)), ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )


class Place(NamedTuple):
    """Where a step of the grid works: indices of batch row, head, key head and blocks, its word."""

    b: Array
    h: Array
    g: Array
    q_block: Array
    k_block: Array
    word: Array
    opens: Array
    closes: Array


@dataclasses.dataclass(frozen=True)
class Grid:
    """Grid of a kernel: which place a step has. `shared` = (batch rows, heads) summed inside it.

    forward, dq     (b, h, steps)
    dkv             (b, g, steps, heads of a group), or members named by the walk
    bias            (rows of the bias, heads of the bias, steps, rows and heads that share them)
    """

    plan: Plan
    walk: Walk
    shared: tuple[int, int] | None = None

    @property
    def inner(self) -> int:
        """Length of the last axis."""
        if self.shared is not None:
            return self.shared[0] * self.shared[1]
        if self.plan.transposed and self.walk.nl == 1:
            return self.plan.group
        return 1

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of the grid."""
        p = self.plan
        if self.shared is not None:
            outer = (p.b // self.shared[0], p.h // self.shared[1])
        else:
            outer = (p.b, p.g if p.transposed else p.h)
        steps = self.walk.steps
        return (*outer, steps, self.inner)

    def place(self, ids: Any, words: Any) -> Place:
        """The place of a step, for the kernel and for the maps of its blocks."""
        p = self.plan
        b, line, step, inner = ids
        word = self.walk.word(words, b, line, step)
        row, column = self.walk.row(word), self.walk.column(word)
        opens, closes = tpu_lists.is_first(word), tpu_lists.is_last(word)
        if self.inner > 1:
            opens, closes = opens & (inner == 0), closes & (inner == self.inner - 1)
        if self.shared is not None:
            rows, heads = self.shared
            if rows > 1:
                b = lax.div(inner, jnp.int32(heads))
            if heads > 1:
                line = inner if rows == 1 else lax.rem(inner, jnp.int32(heads))
        if not p.transposed:
            g = lax.div(line, jnp.int32(p.group)) if p.group > 1 else line
            return Place(b, line, g, row, column, word, opens, closes)
        h = line
        if p.group > 1:
            member = inner if self.inner > 1 else self.walk.member(word)
            h = line * jnp.int32(p.group) + member
        return Place(b, h, line, column, row, word, opens, closes)

    def block(self, shape: tuple[int, ...], index: Any, **more: Any) -> pl.BlockSpec:
        """A block whose indices are `index(place)`."""

        def at(*args: Any) -> Any:
            return index(self.place(args[:4], args[4]))

        return pl.BlockSpec(shape, at, **more)

    def call(self, kernel: Any, inputs: dict, outputs: dict, scratch: dict, **more: Any) -> dict:
        """Runs `kernel(place, offsets, inputs, outputs, scratch)` on the grid.

        Args:
          kernel: the body; it receives dictionaries of references.
          inputs: name -> (array, block). Entry "offsets" is [b] int32 in scalar memory.
          outputs: name -> (shape and type, block).
          scratch: name -> buffer.
          more: name, cost_estimate.
        """
        arrays = {n: x for n, (x, _) in inputs.items() if n != "offsets"}
        specs = {n: s for n, (_, s) in inputs.items() if n != "offsets"}
        names = list(scratch)

        def body(words: Any, offsets: Any, ins: dict, outs: dict, *buffers: Any) -> None:
            ids = tuple(pl.program_id(i) for i in range(4))
            place = self.place(ids, words)
            kernel(place, offsets, ins, outs, dict(zip(names, buffers, strict=True)))

        grid_spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=self.shape,
            in_specs=[specs],
            out_specs={n: s for n, (_, s) in outputs.items()},
            scratch_shapes=list(scratch.values()),
        )
        params = pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=self.plan.vmem,
        )
        return pl.pallas_call(
            body,
            grid_spec=grid_spec,
            out_shape={n: x for n, (x, _) in outputs.items()},
            compiler_params=params,
            interpret=self.plan.interpret,
            **more,
        )(self.walk.words, inputs["offsets"][0], arrays)


def by_head(x: Array, tokens: int, width: int, dtype: Any) -> Array:
    """[b, t, h, d] as [b, h, t padded, d padded], zeros in the padding."""
    x = x.astype(dtype).swapaxes(1, 2)
    grow = ((0, 0), (0, 0), (0, tokens - x.shape[2]), (0, width - x.shape[3]))
    return jnp.pad(x, grow)


def by_token(x: Array, tokens: int, width: int, dtype: Any) -> Array:
    """The inverse of `by_head`."""
    return x[:, :, :tokens, :width].swapaxes(1, 2).astype(dtype)


def by_lane(x: Array, tokens: int, fill: float) -> Array:
    """Statistics [b, t, h] as rows [b, h, 1, t padded] float32."""
    x = x.astype(jnp.float32).swapaxes(1, 2)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, tokens - x.shape[2])), constant_values=fill)
    return x[:, :, None]


def columns(row: Array) -> Array:
    """A row [1, n] as columns [n, 128], every lane alike."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def spread(column: Array, width: int) -> Array:
    """Columns [m, 128] with equal lanes as [m, width]."""
    return jnp.concatenate([column] * (width // LANES), axis=1) if width > LANES else column


def lane_sums(x: Array) -> Array:
    """[m, n] to [m, 128]: sums of lanes a multiple of 128 apart."""
    parts = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A float32 result."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)
