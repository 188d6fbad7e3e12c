"""One token of the linear recurrence, for decoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def linear_step(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    state: jax.Array,
    *,
    decay: jax.Array | None,
    beta: jax.Array | None,
    bonus: jax.Array | None,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Output [b, h, v] and next state [b, h, k, v] of one token.

    Args:
      query, key: [b, h, k].
      value: [b, h, v].
      state: [b, h, k, v], its type is the type of the arithmetic.
      decay: log decay, None, [h], [b, h] or [b, h, k].
      beta: [b, h] or None.
      bonus: [h, k] or None.
      scale: factor on the output.
    """
    dtype = state.dtype
    q, k, v = (x.astype(dtype) for x in (query, key, value))
    q = q * jnp.asarray(scale, dtype)
    before = state
    if decay is not None:
        factor = jnp.exp(decay.astype(dtype))
        factor = factor[None] if factor.ndim == 1 else factor
        factor = factor[..., None] if factor.ndim == 2 else factor  # [b, h, 1 or k]
        state = state * factor[..., None]
    if beta is not None:
        v = beta.astype(dtype)[..., None] * (v - jnp.einsum("bhk,bhkv->bhv", k, state))
    write = k[..., None] * v[..., None, :]
    state = state + write
    read = state if bonus is None else before + bonus.astype(dtype)[None, :, :, None] * write
    return jnp.einsum("bhk,bhkv->bhv", q, read).astype(value.dtype), state
