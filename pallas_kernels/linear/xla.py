"""The XLA body of the linear recurrence: one scan over chunks, four matrix products per chunk.

Each step slices its chunk out of the operands, so that everything between the products stays in
cache and memory grows as O(t): the outputs and one state.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.linear import chunk as tile
from pallas_kernels.linear.chunk import Chunk, Decays
from pallas_kernels.linear.spec import LinearSpec, Operands, pick_chunk


def linear_fwd(operands: Operands, spec: LinearSpec) -> tuple[jax.Array, jax.Array]:
    """Output [b, t, h, v] in the type of `value`, final state in the arithmetic type."""
    chunks = Chunks(operands, spec, strict=operands.bonus is not None)

    def step(state, n):
        x, d = chunks.load(n)
        if x.beta is not None:
            state, out = tile.delta_chunk(state, x, d)
        else:
            out, state = tile.forward_chunk(state, x, d), tile.next_state(state, x.k, x.v, d)
        return state, jnp.swapaxes(out, 1, 2).astype(operands.value.dtype)

    state, out = lax.scan(step, chunks.initial_state(), jnp.arange(chunks.count))
    return chunks.join(out), state


class Chunks:
    """Cuts operands into chunks and puts outputs together again.

    A ragged last chunk is filled up with tokens that change nothing: zero keys and values, no
      decay.

    Args:
      operands: the arrays.
      spec: the static options.
      strict: whether the decays between tokens leave out the diagonal.
    """

    def __init__(self, operands: Operands, spec: LinearSpec, *, strict: bool):
        self.operands, self.scale, self.strict = operands, spec.scale, strict
        self.size, self.length = pick_chunk(operands, spec), operands.query.shape[1]
        self.count = max(1, -(-self.length // self.size))
        self.dtype = operands.dtype
        decay = operands.decay
        self.per_head = decay is not None and decay.ndim == 1
        sequences = {"query": operands.query, "key": operands.key, "value": operands.value}
        if decay is not None and not self.per_head:
            sequences["decay"] = decay if decay.ndim == 4 else decay[..., None]
        if operands.beta is not None:
            sequences["beta"] = operands.beta[..., None]
        self.sequences = {name: self.pad(x) for name, x in sequences.items()}
        self.runs = (
            None
            if operands.runs is None
            else self.pad(operands.runs, mode="edge" if self.length else "constant")
        )
        self.pair = self._shared_pair()

    def pad(self, x: jax.Array, mode: str = "constant") -> jax.Array:
        """Fills [b, t, ...] up to a whole number of chunks."""
        extra = self.count * self.size - self.length
        return (
            jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2), mode=mode) if extra else x
        )

    def take(self, x: jax.Array, n: jax.Array) -> jax.Array:
        """Chunk n of a padded [b, t, h, x] as [b, h, c, x] in the arithmetic type."""
        part = lax.dynamic_slice_in_dim(x, n * self.size, self.size, axis=1)
        return jnp.swapaxes(part, 1, 2).astype(self.dtype)

    def load(self, n: jax.Array) -> tuple[Chunk, Decays]:
        """Chunk n with its decay factors."""
        x = self.chunk(n)
        return x, tile.decay_factors(x, strict=self.strict, pair=self.pair)

    def chunk(self, n: jax.Array) -> Chunk:
        """Chunk n."""
        part = {name: self.take(x, n) for name, x in self.sequences.items()}
        b = tile.split_cumulative(part["decay"]) if "decay" in part else None
        if self.per_head:
            b = (self.elapsed(n) * self._head_decay())[None]
        bonus = self.operands.bonus
        runs = before = None
        if self.runs is not None:
            runs = lax.dynamic_slice_in_dim(self.runs, n * self.size, self.size, axis=1)
            before = lax.dynamic_slice_in_dim(
                self.runs, jnp.maximum(n * self.size - 1, 0), 1, axis=1
            )
            before = jnp.where(n > 0, before, 0)  # the initial state belongs to run 0
        return Chunk(
            q=part["query"] * jnp.asarray(self.scale, self.dtype),
            k=part["key"],
            v=part["value"],
            b=b,
            beta=part.get("beta"),
            bonus=None if bonus is None else bonus.astype(self.dtype)[:, None, :],
            runs=runs,
            run_before=before,
        )

    def elapsed(self, n: jax.Array) -> jax.Array:
        """Steps of a per-head decay up to and including each token of chunk n: [1, c, 1]."""
        steps = jnp.minimum(jnp.arange(1, self.size + 1), self.length - n * self.size)
        return steps.astype(self.dtype)[None, :, None]

    def initial_state(self) -> jax.Array:
        """The given initial state, or zeros: [b, h, k, v]."""
        given = self.operands.initial_state
        return (
            jnp.zeros(self.operands.state_shape, self.dtype)
            if given is None
            else given.astype(self.dtype)
        )

    def join(self, parts: jax.Array) -> jax.Array:
        """Chunks [n, b, c, ...] as one sequence [b, t, ...]."""
        whole = jnp.moveaxis(parts, 0, 1)
        size = self.count * self.size
        return whole.reshape(whole.shape[0], size, *whole.shape[3:])[:, : self.length]

    def _head_decay(self) -> jax.Array:
        return self.operands.decay.astype(self.dtype)[:, None, None]

    def _shared_pair(self) -> jax.Array | None:
        """Decays between tokens of a chunk where every chunk has the same ones: computed once."""
        if self.operands.decay is not None and not self.per_head:
            return None
        visible = jnp.tri(self.size, k=-1 if self.strict else 0, dtype=bool)
        if not self.per_head:
            return visible.astype(self.dtype)
        steps = jnp.arange(self.size).astype(self.dtype)
        b = (steps[None, :, None] * self._head_decay())[None]
        b_row = b - self._head_decay()[None] if self.operands.bonus is not None else b
        return tile.pair_decay(tile.total(b_row - jnp.swapaxes(b, -1, -2)), visible, self.dtype)
