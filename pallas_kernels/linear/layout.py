"""What the kernels read: chunks of equal length and the decay factors of every token.

Everything that has one number per token, and not one per token and channel, is computed here in
XLA. It comes to `ROWS` numbers per token and head, beside several hundred of q, k, v and o.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Target, Unsupported
from pallas_kernels.linear import chunk as tile
from pallas_kernels.linear.chunk import Chunk
from pallas_kernels.linear.spec import Operands

ROWS = 8
"""Rows of `token_factors`: one tile of a TPU register."""
ROW, COL, WHOLE, COARSE, FINE, RUN = range(6)
"""Which row holds what, see `token_factors`."""


def check_supported(kernel: str, operands: Operands, target: Target, types: tuple[Any, ...]) -> Any:
    """The type in which products take their operands.

    Args:
      kernel: name for messages.
      operands: the arrays.
      target: interpreted kernels take float64 too.
      types: what the kernel can multiply.

    Raises:
      Unsupported: on an option that the chunk kernels lack.
    """
    lacks = {
        "the delta rule (beta)": operands.beta is not None,
        "an exclusive read (bonus)": operands.bonus is not None,
        "decays per channel": operands.decay is not None and operands.decay.ndim == 4,
        "an empty sequence": operands.query.shape[1] == 0,
        "float64": operands.dtype == jnp.float64 and not target.interpret,
        "heads wider than 256": operands.query.shape[-1] > 256,
    }
    for what, lacking in lacks.items():
        if lacking:
            raise Unsupported(
                f"linear attention: the {kernel} kernel does not support {what}; use "
                "implementation='xla', or None, which falls back to it."
            )
    if operands.dtype == jnp.float64:
        return operands.dtype
    given = {jnp.dtype(x.dtype) for x in operands[:3]}
    return given.pop() if len(given) == 1 and given <= set(map(jnp.dtype, types)) else jnp.float32


def pad_tokens(x: jax.Array, size: int) -> jax.Array:
    """[b, t, ...] filled up with zeros to a multiple of `size` tokens."""
    extra = -x.shape[1] % size
    return jnp.pad(x, ((0, 0), (0, extra)) + ((0, 0),) * (x.ndim - 2)) if extra else x


def token_factors(operands: Operands, size: int, scale: float) -> jax.Array | None:
    """Numbers per token: [b or 1, h or 1, n, ROWS, c] in the type of the arithmetic.

    ROW: `scale` times the decay from the state before the chunk; COL: the decay to the end of the
    chunk; WHOLE: the decay over the chunk, at every token; COARSE and FINE: cumulative log decay in
    its two parts; RUN: number of the segment. Tokens that fill up the last chunk do not decay, and
    belong to the last segment. None without decays and segments.
    """
    if operands.decay is None and operands.runs is None:
        return None
    dtype, count = operands.dtype, -(-operands.query.shape[1] // size)
    b = None if operands.decay is None else cumulative_decay(operands, size)
    runs = before = None
    if operands.runs is not None:
        x = jnp.pad(operands.runs, ((0, 0), (0, -operands.runs.shape[1] % size)), mode="edge")
        runs = x.reshape(-1, size)
        starts = jnp.pad(x[:, size - 1 :: size], ((0, 0), (1, 0)))[:, :count]  # run 0 at first
        before = starts.reshape(-1, 1)
        if b is not None and b.shape[1] != len(runs):  # per head: [parts, n, h, c, 1]
            b = jnp.tile(b, (1, len(runs) // count, 1, 1, 1))
    one = jnp.ones((1, 1, size, 1), dtype)
    x = Chunk(q=one, k=one, v=one, b=b, beta=None, bonus=None, runs=runs, run_before=before)
    d = tile.decay_factors(x, strict=False, pair=one)
    rows = {
        ROW: one * jnp.asarray(scale, dtype)
        if d.row is None
        else d.row * jnp.asarray(scale, dtype),
        COL: d.col,
        WHOLE: d.whole,
        COARSE: None if b is None else b[0],
        FINE: None if b is None or b.shape[0] == 1 else b[1],
        RUN: None if runs is None else runs.astype(dtype)[:, None, :, None],
    }
    lead = jnp.broadcast_shapes(*(r.shape[:2] for r in rows.values() if r is not None))
    full = [
        jnp.zeros((*lead, size), dtype)
        if (r := rows.get(i)) is None
        else jnp.broadcast_to(r[..., 0], (*lead, size))
        for i in range(ROWS)
    ]
    stacked = jnp.stack(full, axis=-2)  # [b * n or n, h or 1, ROWS, c]
    return jnp.swapaxes(stacked.reshape(-1, count, *stacked.shape[1:]), 1, 2)


def cumulative_decay(operands: Operands, size: int) -> jax.Array:
    """Cumulative log decay inside chunks, in parts: [2, b * n, h, c, 1] or [1, n, h, c, 1]."""
    decay, dtype = operands.decay, operands.dtype
    assert decay is not None
    if decay.ndim == 1:
        return (elapsed(operands, size) * decay.astype(dtype)[None, :, None, None])[None]
    x = pad_tokens(decay.astype(dtype), size)
    x = x.reshape(-1, size, x.shape[-1])
    return tile.split_cumulative(jnp.swapaxes(x, 1, 2)[..., None])


def elapsed(operands: Operands, size: int) -> jax.Array:
    """Steps of a per-head decay up to and including each token of its chunk: [n, 1, c, 1]."""
    t = operands.query.shape[1]
    last = jnp.arange(-(-t // size))[:, None] * size
    steps = jnp.minimum(jnp.arange(1, size + 1)[None], t - last)
    return steps.astype(operands.dtype)[:, None, :, None]


def head_pairs(operands: Operands, size: int, scale: float) -> jax.Array | None:
    """`scale` exp(g (i - j)) for i >= j, else 0: [h, c, c]. None unless decays are per head."""
    decay, dtype = operands.decay, operands.dtype
    if decay is None or decay.ndim != 1:
        return None
    steps = jnp.arange(size).astype(dtype)[None, :, None]
    exponent = (steps - jnp.swapaxes(steps, 1, 2)) * decay.astype(dtype)[:, None, None]
    visible = jnp.tri(size, dtype=bool)
    return tile.pair_decay(exponent, visible, dtype) * jnp.asarray(scale, dtype)


def sum_decay(operands: Operands, db: jax.Array) -> jax.Array:
    """Gradient of the decays from that of the cumulative ones, db [b, h, n, c]."""
    decay, t = operands.decay, operands.query.shape[1]
    assert decay is not None
    if decay.ndim == 1:
        steps = elapsed(operands, db.shape[-1])[..., 0].swapaxes(0, 1)  # [1, n, c]
        return jnp.sum(db * steps[None], axis=(0, 2, 3))
    dg = tile.cumulative(db[..., None], reverse=True)[..., 0]
    return jnp.swapaxes(dg.reshape(*db.shape[:2], -1)[..., :t], 1, 2)
