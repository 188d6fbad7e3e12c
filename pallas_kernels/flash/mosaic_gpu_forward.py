"""The forward kernel for Hopper: output and lse of a block of queries.

A block of the grid keeps 64 queries per consumer and walks its list of key blocks. The producer
fetches keys and values; each consumer computes, for its 64 queries,

    s = q kᵀ,  m' = max(m, s),  p = 2^(s - m'),  a = 2^(m - m'),  l' = l a + Σ p,
    acc' = acc a + p v

with s in base 2. Keys are released before the softmax, values after the second product.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash.mosaic_gpu_device import GROUP, ROWS, Kernel, Shared
from pallas_kernels.flash.mosaic_gpu_plan import Call, Tiling
from pallas_kernels.flash.mosaic_gpu_ring import (
    Ring,
    Stream,
    fetch_resident,
    resident_scratch,
    ring_scratch,
    walk,
)
from pallas_kernels.flash.mosaic_gpu_scores import LOG2E, ScoreTile


@dataclasses.dataclass(frozen=True)
class Forward:
    """The kernel of one call."""

    call: Call
    tiling: Tiling

    def kernel(self) -> Kernel:
        """Shapes, buffers and grid."""
        call, n = self.call, self.tiling.consumers
        scratch = {
            **resident_scratch(self._resident(), n),
            **ring_scratch(self._groups(), self.tiling.stages, n),
            "lse_tile": Shared((n, ROWS), jnp.float32),
        }
        if call.e != call.d:
            scratch["out_tile"] = Shared((n, ROWS, call.e), call.dtype, tiled=True)
        return Kernel(
            self.body,
            outputs={
                "out": jax.ShapeDtypeStruct((call.b, call.t, call.h, call.e), call.dtype),
                "lse": jax.ShapeDtypeStruct((call.b, call.h, call.t), jnp.float32),
            },
            scratch=scratch,
            # blocks of one head run side by side and find its keys and values in the cache
            grid={"batch": call.b, "head": call.h, "block": call.t // self.tiling.rows},
            warpgroups=n + 1,
            approximate=call.scores.approximate,
            name="flash_forward",
        )

    def _resident(self) -> tuple[Stream, ...]:
        call = self.call
        query = Stream("query", "row", ROWS, call.dtype, call.d)
        return (query, *call.scores.streams("query", "row", ROWS))

    def _groups(self) -> dict[str, tuple[Stream, ...]]:
        call, length = self.call, self.tiling.columns
        key = Stream("key", "column", length, call.dtype, call.d, head="g")
        value = Stream("value", "column", length, call.dtype, call.e, head="g")
        reads = call.scores.streams("key", "column", length)
        return {"keys": (key, *reads), "values": (value,)}

    def body(self, hw: Any, refs: dict[str, Any]) -> None:
        """The program of every warpgroup."""
        call, n = self.call, self.tiling.consumers
        group, place = hw.index(GROUP), call.place(hw, self.tiling)
        ring = Ring(hw, refs, self._groups(), self.tiling.stages, n)
        lists = call.walk(refs, place, self.tiling, place.h, 1)

        def produce() -> None:
            call.share_registers(hw, self.tiling, consumer=False)
            fetch_resident(hw, refs, self._resident(), place, n)

            def fetch(step: Any, _: Any, column: Any, masked: bool, carry: Any) -> Any:
                ring.produce(step, place._replace(column=column))
                return carry

            walk(hw, lists, fetch, ())

        def consume() -> None:
            call.share_registers(hw, self.tiling, consumer=True)
            hw.wait(refs["resident"].at[0])
            tile = self._tile(hw, refs, ring, place, group)
            carry = walk(hw, lists, tile, self._start(hw, refs, place))
            self._finish(hw, refs, place, group, carry)

        hw.when(group == jnp.int32(n), produce)
        hw.when(group < jnp.int32(n), consume)

    def _start(self, hw: Any, refs: Mapping[str, Any], place: Any) -> Any:
        """(m, l, acc) before any key; a sink is one more key with a value of zero."""
        m, total = -math.inf, 0.0
        if self.call.sinks:
            m = hw.scalar(refs["sinks"], (place.h,)) * jnp.float32(LOG2E)
            total = 1.0
        shape = (ROWS, self.call.e)
        return hw.full((ROWS,), m), hw.full((ROWS,), total), hw.full(shape, 0.0)

    def _tile(self, hw: Any, refs: Any, ring: Ring, place: Any, group: Any) -> Any:
        call, shape = self.call, (ROWS, self.tiling.columns)
        row = place.row + group * jnp.int32(ROWS)
        offset = call.offset(hw, refs, place)

        def tile(step: Any, _: Any, column: Any, masked: bool, carry: Any) -> Any:
            m, total, acc = carry
            ring.wait("keys", step)
            query = refs["query_tile"].at[group]
            (raw,) = hw.products((query, ring.tile("key", step, group)))
            vectors = call.vectors(hw, refs, ring, step, group, resident="query")
            ring.release("keys", step)
            scores = ScoreTile(
                hw, call.scores, refs, place._replace(column=column), shape, row, offset, vectors,
                masked=masked,
            )  # fmt: skip
            s = scores.forward(raw)
            m_new = jnp.maximum(m, s.max(axis=1))
            # rows that have seen no key yet: subtract 0, so that 2^-inf = 0 instead of 2^nan
            shift = jnp.where(m_new == jnp.float32(-jnp.inf), jnp.float32(0), m_new)
            p = jnp.exp2(s - hw.spread(shift, shape, 0))
            alpha = jnp.exp2(m - shift)
            total = total * alpha + p.sum(axis=1)
            acc = acc * hw.spread(alpha, acc.shape, 0)
            factors = scores.dropout()
            weights = p if factors is None else p * factors
            ring.wait("values", step)
            acc = hw.add_product(acc, weights.astype(call.dtype), ring.tile("value", step, group))
            ring.release("values", step)
            return m_new, total, acc

        return tile

    def _finish(self, hw: Any, refs: Any, place: Any, group: Any, carry: Any) -> None:
        """Writes o = acc / l and lse = m ln 2 + log l; rows without any key give 0 and -inf."""
        call = self.call
        m, total, acc = carry
        none = total == jnp.float32(0)
        inverse = jnp.float32(1) / jnp.where(none, jnp.float32(1), total)
        # m = -inf where no key was seen, so the sum is -inf + log 0 = -inf there
        lse = m * jnp.float32(1 / LOG2E) + jnp.log(total)
        # this warpgroup alone reads its queries, and its products with them have ended
        out = refs["out_tile" if call.e != call.d else "query_tile"].at[group]
        hw.store(out, (acc * hw.spread(inverse, acc.shape, 0)).astype(call.dtype))
        hw.store(refs["lse_tile"].at[group], lse)
        hw.commit()
        side = pl.ds(place.row + group * jnp.int32(ROWS), ROWS)
        hw.send(out, refs["out"].at[place.b, side, place.h])
        hw.send(refs["lse_tile"].at[group], refs["lse"].at[place.b, place.h, side])
        hw.drain()
