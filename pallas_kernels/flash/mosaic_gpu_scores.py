"""Scores of one tile inside the Hopper kernels: scale, bias, softcap, score_mod, mask; and back.

    s = scale q kᵀ + bias -> c tanh(s / c) -> score_mod -> -inf where hidden

Everything here is elementwise on tiles in registers. Kernels take the scores in base 2: the factor
log2(e) is folded into the scale where nothing stands between them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import tilemath
from pallas_kernels.flash.mosaic_gpu_ring import Place, Stream
from pallas_kernels.flash.spec import FlashSpec

LOG2E = math.log2(math.e)


class Lookup(NamedTuple):
    """An array that scores depend on: a program's read, a bias or a mask that is broadcast.

    Attributes:
      name: of the kernel's input.
      kind: "scalar" [nb, nh], "query" [nb, nh, t], "key" [nb, nh, s], or "pair" in the order of
        the tiles, [nb, nh, t, s] or [nb, nh, s, t].
      per_row, per_head: whether nb and nh are larger than 1.
      dtype: float32 or int32; of a pair, bias's own or int8.
      wants_gradient: whether the backward pass sums its gradient.
    """

    name: str
    kind: str
    per_row: bool
    per_head: bool
    dtype: Any
    wants_gradient: bool


@dataclasses.dataclass(frozen=True)
class Scores:
    """The static description of the scores of a call.

    Attributes:
      spec: of the call.
      lookups: all of them: mask reads "mask_read0", ..., score reads "score_read0", ..., "bias" and
        "mask_array", those that there are.
      q_len, kv_len: real lengths in tokens.
      bound_rows, bound_keys: whether PARTIAL tiles may reach beyond q_len (where that matters) and
        kv_len.
      transposed: whether tiles are [keys, queries].
    """

    spec: FlashSpec
    lookups: tuple[Lookup, ...]
    q_len: int
    kv_len: int
    bound_rows: bool
    bound_keys: bool
    transposed: bool

    @property
    def plain(self) -> bool:
        """Whether the scores are scale q kᵀ."""
        return self.spec.softcap is None and self.spec.score_mod is None and not self.has("bias")

    @property
    def approximate(self) -> bool:
        """Whether fast functions may serve: the kernels' own exp2 alone is then affected."""
        programs = [p for p in (self.spec.predicate, self.spec.score_mod) if p is not None]
        floating = any(
            jnp.issubdtype(v.aval.dtype, jnp.floating)
            for p in programs
            for eqn in p.core.eqns
            for v in eqn.outvars
        )
        return self.spec.softcap is None and not floating

    def has(self, name: str) -> bool:
        """Whether there is a lookup of this name."""
        return any(x.name == name for x in self.lookups)

    def gradients(self, axis: str) -> tuple[Lookup, ...]:
        """Lookups whose gradient is a sum over each row of tiles.

        With queries as rows ("query") also those of kind "scalar"; with keys as rows ("key") the
        keys' alone. Pairs are no sums.
        """
        kinds = ("key",) if axis == "key" else ("scalar", "query")
        return tuple(x for x in self.lookups if x.wants_gradient and x.kind in kinds)

    @property
    def pair_gradient(self) -> bool:
        """Whether the bias is a pair, whose gradient is written tile by tile."""
        return any(x.name == "bias" and x.kind == "pair" for x in self.lookups)

    def streams(self, kind: str, axis: str, length: int) -> tuple[Stream, ...]:
        """Streams of the lookups of a kind, for the side of the tile that they belong to."""
        return tuple(
            Stream(x.name, axis, length, x.dtype, per_row=x.per_row, per_head=x.per_head)
            for x in self.lookups
            if x.kind == kind
        )


class ScoreTile:
    """The scores of one tile, forward and back.

    Args:
      hw: the operations.
      scores: static description.
      refs: inputs by name.
      place: of the tile.
      shape: [rows of a warpgroup, columns].
      row: first row of the warpgroup.
      offset: absolute index of query 0.
      vectors: name -> vector of each lookup of kind "query" or "key".
      masked: whether the tile is PARTIAL.
    """

    def __init__(
        self,
        hw: Any,
        scores: Scores,
        refs: Mapping[str, Any],
        place: Place,
        shape: tuple[int, int],
        row: Any,
        offset: Any,
        vectors: Mapping[str, jax.Array],
        *,
        masked: bool,
    ):
        self.hw, self.scores, self.refs, self.place = hw, scores, refs, place
        self.shape, self.vectors = shape, vectors
        starts = (row, place.column)
        self.block = tuple(pl.ds(start, n) for start, n in zip(starts, shape, strict=True))
        rows, columns = (hw.iota(shape, i) + starts[i] for i in (0, 1))
        self.query, self.k = (columns, rows) if scores.transposed else (rows, columns)
        self.q = self.query + offset
        self.keep = self._keep() if masked else None
        self.before: Any = None  # of score_mod
        self.tanh: Any = None  # of softcap

    def value(self, name: str) -> Any:
        """A lookup's value: a scalar, or a tile."""
        x = next(x for x in self.scores.lookups if x.name == name)
        zero = jnp.int32(0)
        at = (self.place.b if x.per_row else zero, self.place.h if x.per_head else zero)
        if x.kind == "scalar":
            return self.hw.scalar(self.refs[name], at)
        if x.kind == "pair":
            return self.hw.read_block(self.refs[name].at[(*at, *self.block)])
        axis = 0 if (x.kind == "key") == self.scores.transposed else 1
        return self.hw.spread(self.vectors[name], self.shape, axis)

    def values(self, prefix: str, count: int) -> list[Any]:
        """Values of a program's reads."""
        return [self.value(f"{prefix}{i}") for i in range(count)]

    def _keep(self) -> Any:
        scores, parts = self.scores, []
        predicate = scores.spec.predicate
        if predicate is not None:
            values = self.values("mask_read", len(predicate.reads))
            parts.append(predicate(None, self.place.b, self.place.h, self.q, self.k, values))
        if scores.has("mask_array"):
            parts.append(self.value("mask_array") != 0)
        if scores.bound_keys:
            parts.append(self.k < jnp.int32(scores.kv_len))
        if scores.bound_rows:
            parts.append(self.query < jnp.int32(scores.q_len))
        keep = None
        for part in parts:
            part = part if part.shape == self.shape else jnp.broadcast_to(part, self.shape)
            keep = part if keep is None else keep & part
        return keep

    def forward(self, raw: jax.Array) -> jax.Array:
        """Scores in base 2 of q kᵀ, with -inf where hidden."""
        spec = self.scores.spec
        if self.scores.plain:
            s = raw * jnp.float32(spec.scale * LOG2E)
        else:
            s = raw * jnp.float32(spec.scale)
            if self.scores.has("bias"):
                s = s + self.value("bias").astype(jnp.float32)
            if spec.softcap is not None:
                self.tanh = jnp.tanh(s * jnp.float32(1 / spec.softcap))
                s = self.tanh * jnp.float32(spec.softcap)
            if spec.score_mod is not None:
                self.before = s
                b, h, values = self.place.b, self.place.h, self._score_values()
                s = spec.score_mod(s, b, h, self.q, self.k, values).astype(jnp.float32)
            s = s * jnp.float32(LOG2E)
        return s if self.keep is None else jnp.where(self.keep, s, jnp.float32(-jnp.inf))

    def backward(self, ct: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(gradient of scale q kᵀ, gradients of the lookups as tiles) of the scores' gradient."""
        spec, found = self.scores.spec, {}
        if spec.score_mod is not None:
            b, h, values = self.place.b, self.place.h, self._score_values()
            ct, values = spec.score_mod.grad(
                self.before, b, h, self.q, self.k, values, self._visible(ct)
            )
            for i, value in enumerate(values):
                if value is not None:
                    # what is hidden has no gradient, also where the derivative is not finite
                    found[f"score_read{i}"] = self._visible(value)
        if spec.softcap is not None:
            ct = ct * (jnp.float32(1) - self.tanh * self.tanh)
        ct = self._visible(ct)
        if self.scores.has("bias"):
            found["bias"] = ct
        return ct, found

    def dropout(self) -> Any:
        """Factors of dropout, or None."""
        rate = self.scores.spec.dropout_rate
        if not rate:
            return None
        seed: Any = [self.hw.scalar(self.refs["seed"], (jnp.int32(i),)) for i in (0, 1)]
        return tilemath.dropout_factors(seed, self.place.b, self.place.h, self.q, self.k, rate)

    def _score_values(self) -> list[Any]:
        program = self.scores.spec.score_mod
        return self.values("score_read", 0 if program is None else len(program.reads))

    def _visible(self, x: jax.Array) -> jax.Array:
        return x if self.keep is None else jnp.where(self.keep, x, jnp.float32(0))


def row_sums(
    totals: Mapping[str, jax.Array], tiles: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Adds every row of the tiles to the totals of the same name."""
    return {name: total + tiles[name].sum(axis=1) for name, total in totals.items()}
