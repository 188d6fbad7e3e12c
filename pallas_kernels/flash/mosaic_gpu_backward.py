"""The backward kernels for Hopper: dq of a block of queries; dk and dv of a block of keys.

Both compute the probabilities of a tile again from the saved lse:

    p = 2^(s - lse),  dp = dO vᵀ,  ds = p (dp - delta) and back through score_mod and softcap
    dq = scale Σ ds k              (rows are queries, columns keys)
    dk = scale Σ dsᵀ q, dv = Σ pᵀ dO    (rows are keys, columns queries: tiles are transposed)

so every product is one that wgmma has: its left side from the rows' tile or from registers. A
block of dk and dv walks over all query heads of its key head, so nothing is summed outside.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash.mosaic_gpu_device import GROUP, ROWS, Kernel, Shared
from pallas_kernels.flash.mosaic_gpu_plan import Call, Tiling
from pallas_kernels.flash.mosaic_gpu_ring import (
    Place,
    Ring,
    Stream,
    fetch_resident,
    resident_scratch,
    ring_scratch,
    walk,
)
from pallas_kernels.flash.mosaic_gpu_scores import ScoreTile, row_sums


@dataclasses.dataclass(frozen=True)
class Backward:
    """What the two kernels share; `wants` names the results: {"dq"}, or of {"dk", "dv"}."""

    call: Call
    tiling: Tiling
    wants: tuple[str, ...]

    @property
    def transposed(self) -> bool:
        """Whether rows are keys."""
        return "dq" not in self.wants

    @property
    def score_gradient(self) -> bool:
        """Whether ds is needed: for everything but dv."""
        return self.wants != ("dv",)

    def kernel(self) -> Kernel:
        """Shapes, buffers and grid."""
        call, n = self.call, self.tiling.consumers
        length, heads = (call.s, call.g) if self.transposed else (call.t, call.h)
        outputs = {
            name: jax.ShapeDtypeStruct(
                (call.b, length, heads, call.e if name == "dv" else call.d), call.dtype
            )
            for name in self.wants
        }
        scratch = {
            **resident_scratch(self._resident(), n),
            **ring_scratch(self._groups(), self.tiling.stages, n),
        }
        if not self.score_gradient and call.d != call.e:
            scratch["dv_tile"] = Shared((n, ROWS, call.e), call.dtype, tiled=True)
        for x in self._gradients():
            outputs["d_" + x.name] = jax.ShapeDtypeStruct((call.b, call.h, length), jnp.float32)
            scratch[f"d_{x.name}_tile"] = Shared((n, ROWS), jnp.float32)
        if self._writes_pairs:
            size = (call.b, call.h, call.t, call.s)
            outputs["d_bias"] = jax.ShapeDtypeStruct(size, jnp.float32)
        return Kernel(
            self.body,
            outputs=outputs,
            scratch=scratch,
            grid={"batch": call.b, "head": heads, "block": length // self.tiling.rows},
            warpgroups=n + 1,
            approximate=call.scores.approximate,
            name="flash_" + "_".join(self.wants),
        )

    @property
    def _writes_pairs(self) -> bool:
        return not self.transposed and self.call.scores.pair_gradient

    def _gradients(self) -> tuple[Any, ...]:
        if not self.score_gradient:
            return ()
        return self.call.scores.gradients("key" if self.transposed else "query")

    def _matrices(self, side: str, length: int) -> tuple[Stream, ...]:
        """Streams of the queries' side, or of the keys'."""
        call = self.call
        axis = "row" if (side == "key") == self.transposed else "column"
        if side == "key":
            value = Stream("value", axis, length, call.dtype, call.e, head="g")
            key = Stream("key", axis, length, call.dtype, call.d, head="g")
            # dv alone needs no product with the values
            return (key, value) if self.score_gradient else (key,)
        vectors = [Stream("lse", axis, length, jnp.float32)]
        if self.score_gradient:
            vectors.append(Stream("delta", axis, length, jnp.float32))
        return (
            Stream("query", axis, length, call.dtype, call.d),
            Stream("d_out", axis, length, call.dtype, call.e),
            *vectors,
        )

    def _resident(self) -> tuple[Stream, ...]:
        if self.transposed:
            return self._matrices("key", ROWS)
        return (
            *self._matrices("query", ROWS),
            *self.call.scores.streams("query", "row", ROWS),
        )

    def _groups(self) -> dict[str, tuple[Stream, ...]]:
        scores, length = self.call.scores, self.tiling.columns
        if not self.transposed:
            return {
                "all": (*self._matrices("key", length), *scores.streams("key", "column", length))
            }
        # the keys' lookups may differ between the heads of a group, so they come with every step
        return {
            "all": (
                *self._matrices("query", length),
                *scores.streams("query", "column", length),
                *scores.streams("key", "row", ROWS),
            )
        }

    def _place(self, hw: Any) -> Place:
        call = self.call
        if not self.transposed:
            return call.place(hw, self.tiling)
        g = hw.index("head")
        row = hw.index("block") * jnp.int32(self.tiling.rows)
        return Place(hw.index("batch"), g * jnp.int32(call.group), g, row, jnp.int32(0))

    def body(self, hw: Any, refs: dict[str, Any]) -> None:
        """The program of every warpgroup."""
        call, n = self.call, self.tiling.consumers
        group, place = hw.index(GROUP), self._place(hw)
        ring = Ring(hw, refs, self._groups(), self.tiling.stages, n)
        heads = call.group if self.transposed else 1
        lists = call.walk(refs, place, self.tiling, place.h, heads)

        def produce() -> None:
            call.share_registers(hw, self.tiling, consumer=False)
            fetch_resident(hw, refs, self._resident(), place, n)

            def fetch(step: Any, head: Any, column: Any, masked: bool, carry: Any) -> Any:
                ring.produce(step, place._replace(h=head, column=column))
                return carry

            walk(hw, lists, fetch, ())

        def consume() -> None:
            call.share_registers(hw, self.tiling, consumer=True)
            hw.wait(refs["resident"].at[0])
            totals = {
                name: hw.full((ROWS, call.e if name == "dv" else call.d), 0.0)
                for name in self.wants
            }
            start = (totals, self._no_sums(hw))
            tile = self._tile(hw, refs, ring, place, group)

            def after_head(head: Any, carry: Any) -> Any:
                self._send_sums(hw, refs, place._replace(h=head), group, carry[1])
                return carry[0], self._no_sums(hw)

            carry = walk(hw, lists, tile, start, after_head if self._gradients() else None)
            self._finish(hw, refs, place, group, carry[0])

        hw.when(group == jnp.int32(n), produce)
        hw.when(group < jnp.int32(n), consume)

    def _no_sums(self, hw: Any) -> dict[str, jax.Array]:
        return {x.name: hw.full((ROWS,), 0.0) for x in self._gradients()}

    def _tile(self, hw: Any, refs: Any, ring: Ring, place: Place, group: Any) -> Any:
        call, shape = self.call, (ROWS, self.tiling.columns)
        row = place.row + group * jnp.int32(ROWS)
        offset = call.offset(hw, refs, place)

        def tile(step: Any, head: Any, column: Any, masked: bool, carry: Any) -> Any:
            totals, sums = carry
            ring.wait("all", step)
            # both products at once where dp has registers to wait in; beside dk and dv it has not
            pairs = [self._pair(refs, ring, step, group, "query", "key")]
            if self.score_gradient:
                pairs.append(self._pair(refs, ring, step, group, "d_out", "value"))
            early = 1 if len(self.wants) > 1 else len(pairs)
            raw, *rest = hw.products(*pairs[:early])
            vectors = call.vectors(
                hw, refs, ring, step, group, resident=None if self.transposed else "query"
            )
            at = place._replace(h=head, column=column)
            scores = ScoreTile(
                hw, call.scores, refs, at, shape, row, offset, vectors, masked=masked
            )
            s = scores.forward(raw)
            p = jnp.exp2(s - self._statistic(hw, refs, ring, step, group, "lse", shape))
            factors = scores.dropout()
            totals = dict(totals)
            if "dv" in self.wants:
                weights = p if factors is None else p * factors
                d_out = ring.tile("d_out", step, group)
                totals["dv"] = hw.add_product(totals["dv"], weights.astype(call.dtype), d_out)
            if self.score_gradient:
                (dp,) = rest or hw.products(pairs[1])
                dp = dp if factors is None else dp * factors
                delta = self._statistic(hw, refs, ring, step, group, "delta", shape)
                ds, found = scores.backward(p * (dp - delta))
                if self._writes_pairs:
                    target = refs["d_bias"].at[(at.b, at.h, *scores.block)]
                    hw.write_block(target, found["bias"])
                sums = row_sums(sums, found)
                name, streamed = ("dk", "query") if self.transposed else ("dq", "key")
                if name in totals:
                    tile = ring.tile(streamed, step, group)
                    totals[name] = hw.add_product(totals[name], ds.astype(call.dtype), tile)
            # all products of this step have ended, and its vectors are in registers
            ring.release("all", step)
            return totals, sums

        return tile

    def _pair(
        self, refs: Any, ring: Ring, step: Any, group: Any, by_query: str, by_key: str
    ) -> tuple[Any, Any]:
        """(this warpgroup's rows, the step's columns) of a matrix by query and one by key."""
        row, column = (by_key, by_query) if self.transposed else (by_query, by_key)
        return refs[row + "_tile"].at[group], ring.tile(column, step, group)

    def _statistic(
        self, hw: Any, refs: Any, ring: Ring, step: Any, group: Any, name: str, shape: Any
    ) -> jax.Array:
        """The lse or delta of every query, spread over the tile."""
        if self.transposed:
            return hw.spread(hw.vector(ring.tile(name, step, group), 1), shape, 1)
        return hw.spread(hw.vector(refs[name + "_tile"].at[group], 0), shape, 0)

    def _side(self, place: Place, group: Any) -> Any:
        return pl.ds(place.row + group * jnp.int32(ROWS), ROWS)

    def _send_sums(
        self, hw: Any, refs: Any, place: Place, group: Any, sums: Mapping[str, jax.Array]
    ) -> None:
        """Writes the row sums of one head."""
        for name, total in sums.items():
            hw.store(refs[f"d_{name}_tile"].at[group], total)
        hw.commit()
        for name in sums:
            target = refs["d_" + name].at[place.b, place.h, self._side(place, group)]
            hw.send(refs[f"d_{name}_tile"].at[group], target)
        # the buffers are written again after the next head
        hw.drain()

    def _finish(
        self, hw: Any, refs: Any, place: Place, group: Any, totals: Mapping[str, jax.Array]
    ) -> None:
        """Writes the gradients through the buffers of what they are gradients of.

        This warpgroup alone reads its rows' buffers, and its products with them have ended.
        """
        scale = jnp.float32(self.call.scores.spec.scale)
        buffers = {"dq": "query_tile", "dk": "key_tile", "dv": "value_tile"}
        if not self.score_gradient:
            buffers["dv"] = "dv_tile" if self.call.d != self.call.e else "key_tile"
        for name, total in totals.items():
            total = total if name == "dv" else total * scale
            hw.store(refs[buffers[name]].at[group], total.astype(self.call.dtype))
        hw.commit()
        head = place.g if self.transposed else place.h
        for name in totals:
            target = refs[name].at[place.b, self._side(place, group), head]
            hw.send(refs[buffers[name]].at[group], target)
        hw.drain()
