"""What one linear recurrence is: its arrays and its static options.

The state S is [k, v] per batch row and head, and queries read it: o_t = scale * S_t^T q_t.

    none      S_t = S_{t-1} + k_t v_t^T
    head      S_t = exp(g_h) S_{t-1} + k_t v_t^T                      g [h]
    token     S_t = exp(g_t) S_{t-1} + k_t v_t^T                      g [b, t, h]
    channel   S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T                g [b, t, h, k]
    beta      S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  S' = the decayed S_{t-1}      (delta rule)
    bonus     o_t = scale * (S_{t-1} + Diag(u) k_t v_t^T)^T q_t                        u [h, k]

`g` is a logarithm and at most 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

SUB_CHUNK = 16
"""Rows of the tiles in which per-channel decays are applied element by element."""


class Operands(NamedTuple):
    """The arrays of one linear recurrence; None where an option is off.

    Attributes:
      query, key: [b, t, h, k].
      value: [b, t, h, v].
      decay: log decay, [h], [b, t, h] or [b, t, h, k].
      beta: [b, t, h], write strength of the delta rule.
      bonus: [h, k], weight of the current token when queries read the state before it is written.
      initial_state: [b, h, k, v].
      runs: [b, t] int32, numbers the segments of a row upwards from 0; the initial state belongs to
        run 0.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    decay: jax.Array | None = None
    beta: jax.Array | None = None
    bonus: jax.Array | None = None
    initial_state: jax.Array | None = None
    runs: jax.Array | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """Type of all decay and state arithmetic: float32, or float64 when an input is float64."""
        wide = any(x is not None and x.dtype == jnp.float64 for x in self)
        return jnp.dtype(jnp.float64 if wide else jnp.float32)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """[b, h, k, v]."""
        b, _, h, k = self.query.shape
        return b, h, k, self.value.shape[-1]


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """Static options, hashable.

    Attributes:
      chunk_size: tokens per chunk; None is the default of the platform. Kernels round it up.
      scale: factor on the output.
      implementation: what to run, see `pallas_kernels.dispatch`; None chooses.
    """

    chunk_size: int | None
    scale: float
    implementation: str | None = None


def default_chunk(platform: str, dtype: Any) -> int:
    """Tokens per chunk where nobody asked for a number.

    A token costs c (k + v) + 2 k v products with chunks of c tokens: the unit of a TPU multiplies
    128 rows at a time, a GPU keeps its [c, c] tiles in registers.
    """
    if platform == "tpu":
        return 128
    return 32 if platform == "cuda" and jnp.dtype(dtype).itemsize > 2 else 64


def pick_chunk(operands: Operands, spec: LinearSpec) -> int:
    """The chunk length in tokens that the XLA body really uses.

    Per-channel decays work in tiles of `SUB_CHUNK` rows, so that a longer chunk is rounded up to a
    multiple of it. A chunk is never longer than the (rounded) sequence.
    """
    wanted = default_chunk("xla", operands.dtype) if spec.chunk_size is None else spec.chunk_size
    c = max(1, min(wanted, operands.query.shape[1]))
    if operands.decay is not None and operands.decay.ndim == 4 and c > SUB_CHUNK:
        c = -(-c // SUB_CHUNK) * SUB_CHUNK
    return c
