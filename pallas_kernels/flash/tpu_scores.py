"""Scores of a part of a tile and their derivative, in the orientation of the kernel.

Logits are in base 2: z = log2(e) (softcap, score_mod of scale q·k + bias), so that exp2 needs no
factor of its own; without a score function that factor is part of the scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tilemath
from pallas_kernels.flash import tpu_lists, tpu_sources
from pallas_kernels.flash.tpu_plan import LOG2E, Array, Grid, Place, Plan
from pallas_kernels.flash.tpu_sources import Source
from pallas_kernels.maskprogram import FULL, PARTIAL

Pull = Callable[[Array], tuple[Array, dict[str, Array]]]
"""Cotangent of the natural logits -> (cotangent of scale q·k + bias, name -> of each read)."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a tile: scores [m, n] of `sub_q` queries and `sub_kv` keys, or transposed."""

    plan: Plan
    place: Place
    sources: list[Source]
    offset: Array
    ins: Any
    buffers: Any
    start: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the scores."""
        p = self.plan
        return (p.sub_kv, p.sub_q) if p.transposed else (p.sub_q, p.sub_kv)

    @property
    def queries(self) -> Array:
        """Absolute indices of the queries, [m, 1] or transposed."""
        p = self.plan
        shape, axis = ((1, p.sub_q), 1) if p.transposed else ((p.sub_q, 1), 0)
        first = self.offset + self.place.q_block * p.block_q + self.start[0]
        return first + lax.broadcasted_iota(jnp.int32, shape, axis)

    @property
    def keys(self) -> Array:
        """Absolute indices of the keys, [1, n] or transposed."""
        p = self.plan
        shape, axis = ((p.sub_kv, 1), 0) if p.transposed else ((1, p.sub_kv), 1)
        return (
            self.place.k_block * p.block_kv
            + self.start[1]
            + lax.broadcasted_iota(jnp.int32, shape, axis)
        )

    @property
    def indices(self) -> tuple[Array, Array, Array, Array]:
        """(b, h, q, k)."""
        return self.place.b, self.place.h, self.queries, self.keys

    def value(self, name: str) -> Array | None:
        """Value of a source, None where the call has no such source."""
        found = [s for s in self.sources if s.name == name]
        if not found:
            return None
        where = self.plan, self.place, self.ins, self.buffers, self.start
        return tpu_sources.value(found[0], *where)

    def values(self, what: str) -> list[Array]:
        """Values of a program's reads."""
        spec = self.plan.spec
        program = spec.predicate if what == "mask" else spec.score_mod
        found = (self.value(f"{what}{i}") for i in range(len(program.kinds) if program else 0))
        return [jnp.broadcast_to(v, self.shape) if v.ndim else v for v in found if v is not None]

    def visible(self) -> Array:
        """Which pairs are visible, in a PARTIAL tile."""
        p, spec = self.plan, self.plan.spec
        found: list[Array] = []
        if spec.predicate is not None:
            found.append(spec.predicate(None, *self.indices, self.values("mask")))
        mask_array = self.value("mask_array")
        if mask_array is not None:
            found.append(mask_array != 0)
        if p.s % p.block_kv:
            found.append(self.keys < p.s)
        seen = jnp.broadcast_to(found[0], self.shape) if found else jnp.ones(self.shape, jnp.bool_)
        for more in found[1:]:
            seen = seen & jnp.broadcast_to(more, self.shape)
        return seen

    def logits(self, raw: Array, masked: bool) -> tuple[Array, Pull]:
        """(base-2 logits, -inf where hidden; pullback) of the products q·k."""
        spec = self.plan.spec
        cap, mod = spec.softcap, spec.score_mod
        unit = 1.0 if mod is not None else LOG2E
        bias = self.value("bias")
        bends: Array | None = None
        if cap is None:
            z = raw * (spec.scale * unit)
            if bias is not None:
                z = z + bias * unit
        else:
            x = raw * (spec.scale / cap)
            if bias is not None:
                x = x + bias * (1.0 / cap)
            bends = jnp.tanh(x)
            z = bends * (cap * unit)
        given, values = z, self.values("score") if mod is not None else []
        if mod is not None:
            z = mod(given, *self.indices, values) * LOG2E
        seen = self.visible() if masked else None
        if seen is not None:
            z = jnp.where(seen, z, -jnp.inf)

        def pull(ct: Array) -> tuple[Array, dict[str, Array]]:
            grads = {}
            if mod is not None:
                ct, found = mod.grad(given, *self.indices, values, ct)
                if seen is not None:  # a derivative may be infinite where nothing is seen
                    ct = jnp.where(seen, ct, 0.0)
                for i, grad in enumerate(found):
                    if grad is not None:
                        grads[f"score{i}"] = grad if seen is None else jnp.where(seen, grad, 0.0)
            if bends is not None:
                ct = ct * (1.0 - bends * bends)
            if bias is not None:
                grads["bias"] = ct
            return ct, grads

        return z, pull

    def kept(self) -> Array | None:
        """Factors of dropout, or None."""
        rate = self.plan.spec.dropout_rate
        if not rate:
            return None
        seed: Any = [self.ins["seed"][i].astype(jnp.uint32) for i in range(2)]
        return tilemath.dropout_factors(seed, *self.indices, rate)


def used_sources(operands: dict[str, Any], grid: Grid) -> list[Source]:
    """The sources of a call, without those of the mask where no tile needs it."""
    sources = tpu_sources.gather(operands, grid.plan.spec)
    if grid.walk.any_partial:
        return sources
    return [s for s in sources if not s.name.startswith("mask")]


def common_inputs(operands: dict[str, Any], sources: list[Source], grid: Grid) -> dict[str, Any]:
    """Inputs that every kernel has: offsets of the rows, seed of dropout, sources."""
    offsets = operands["q_offset"].astype(jnp.int32)
    found: dict[str, Any] = {"offsets": (jnp.broadcast_to(offsets, (grid.plan.b,)), None)}
    if grid.plan.spec.dropout_rate:
        seed = lax.bitcast_convert_type(operands["seed"], jnp.int32)
        found["seed"] = seed, pl.BlockSpec(memory_space=pltpu.SMEM)
    return found | tpu_sources.inputs(sources, grid)


def over_parts(
    grid: Grid, sources: list[Source], place: Place, offsets: Any, ins: Any, buffers: Any, tile: Any
) -> None:
    """Runs `tile(parts, masked)` if the step has a tile, masked where it is PARTIAL."""
    walk = grid.walk
    parts = [
        Part(grid.plan, place, sources, offsets[place.b], ins, buffers, start)
        for start in grid.plan.parts
    ]
    kind = tpu_lists.kind(place.word)
    if walk.any_full:
        pl.when(kind == FULL)(lambda: tile(parts, False))
    if walk.any_partial:
        pl.when(kind == PARTIAL)(lambda: tile(parts, True))
