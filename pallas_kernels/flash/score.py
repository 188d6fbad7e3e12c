"""Score programs: a user's `score_mod` traced once, with the arrays it closes over as operands.

A score_mod may use arrays of the surrounding code, traced and differentiated ones too. Kernels and
custom derivatives cannot close over them, so tracing turns them into explicit operands, which then get
gradients like every other input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreProgram:
    """`score_mod(score, b, h, q, k)` for tiles of one shape, as a closed-over-nothing jaxpr.

    Equality is identity: two traces of the same function may close over different things.
    """

    jaxpr: Any

    def __call__(self, consts: Any, score: jax.Array, b: Any, h: Any, q: Any, k: Any) -> jax.Array:
        """The modified scores [m, n] of one tile."""
        closed = compat.ClosedJaxpr(self.jaxpr, list(consts))
        b, h = jnp.asarray(b, jnp.int32), jnp.asarray(h, jnp.int32)
        (out,) = compat.jaxpr_as_fun(closed)(score, b, h, q, k)
        return out


def trace_score_mod(
    score_mod: Callable[..., jax.Array], rows: int, cols: int, dtype: Any
) -> tuple[ScoreProgram, list[jax.Array]]:
    """Traces a score_mod on tiles of [rows, cols] scores.

    Returns:
      The program and the arrays that the function closes over.

    Raises:
      ValueError: when the result has not the shape of the scores.
    """
    index = jax.ShapeDtypeStruct((), jnp.int32)
    closed = jax.make_jaxpr(score_mod)(
        jax.ShapeDtypeStruct((rows, cols), dtype),
        index,
        index,
        jax.ShapeDtypeStruct((rows, 1), jnp.int32),
        jax.ShapeDtypeStruct((1, cols), jnp.int32),
    )
    (out,) = closed.out_avals
    if out.shape != (rows, cols):
        raise ValueError(
            f"score_mod: must return an array of the shape of its first argument, {(rows, cols)}, got "
            f"{out.shape}; it receives (score [m, n], b [], h [], q [m, 1], k [1, n])."
        )
    return ScoreProgram(closed.jaxpr), [jnp.asarray(c) for c in closed.consts]
