"""Score programs: a user's `score_mod` traced once, with the arrays it closes over as operands.

A score_mod may use arrays of the surrounding code, traced and differentiated ones too. Kernels and
custom derivatives cannot close over them, so tracing turns them into explicit operands, which then
get gradients like every other input.
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
    score_mod: Callable[..., jax.Array], queries: int, keys: int, dtype: Any
) -> tuple[tuple[ScoreProgram, ScoreProgram], list[jax.Array]]:
    """Traces a score_mod on tiles of [queries, keys] scores and on transposed ones.

    Returns:
      The two programs, and the arrays that the function closes over.

    Raises:
      ValueError: when the result has not the shape of the scores, or the two traces close over
        different arrays.
    """
    plain = _trace(score_mod, (queries, keys), (queries, 1), (1, keys), dtype)
    turned = _trace(score_mod, (keys, queries), (1, queries), (keys, 1), dtype)
    if len(plain.consts) != len(turned.consts) or any(
        jnp.shape(a) != jnp.shape(b) for a, b in zip(plain.consts, turned.consts, strict=True)
    ):
        raise ValueError(
            "score_mod: must treat every pair (q, k) alike, whatever the shape of the tile; arrays "
            "that it makes from the shape of its arguments are not supported, derive them from q "
            "and k."
        )
    programs = ScoreProgram(plain.jaxpr), ScoreProgram(turned.jaxpr)
    return programs, [jnp.asarray(c) for c in plain.consts]


def _trace(score_mod: Any, shape: Any, q_shape: Any, k_shape: Any, dtype: Any) -> Any:
    index = jax.ShapeDtypeStruct((), jnp.int32)
    closed = jax.make_jaxpr(score_mod)(
        jax.ShapeDtypeStruct(shape, dtype),
        index,
        index,
        jax.ShapeDtypeStruct(q_shape, jnp.int32),
        jax.ShapeDtypeStruct(k_shape, jnp.int32),
    )
    (out,) = closed.out_avals
    if out.shape != shape:
        raise ValueError(
            f"score_mod: must return an array of the shape of its first argument, {shape}, got "
            f"{out.shape}; it receives score [m, n], b [], h [], q [m, 1] and k [1, n]."
        )
    return closed
