"""What every key/value cache shares: positions of new tokens, safe writes, size in bytes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Int


def new_positions(length: Int[Array, " b"], count: int) -> Int[Array, "b t"]:
    """Absolute indices of the next `count` tokens of every row: length + 0, 1, ..., count - 1."""
    return length[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]


def valid_count(valid: Bool[Array, "b t"] | None, like: Int[Array, "b t"]) -> Int[Array, " b"]:
    """How many new tokens of each row are real; all of them where `valid` is None."""
    if valid is None:
        return jnp.full((like.shape[0],), like.shape[1], jnp.int32)
    return valid.sum(axis=1, dtype=jnp.int32)


def write_rows(
    store: jax.Array, slots: Int[Array, "b t"], values: jax.Array, keep: Bool[Array, "b t"] | None
) -> jax.Array:
    """Writes values[b, t] to store[b, slots[b, t]] where `keep` holds; other tokens touch nothing.

    Slots out of range are dropped, so a padding token (whatever it holds, NaN too) is never stored.
    The kept slots of a row must differ from each other.
    """
    if keep is not None:
        slots = jnp.where(keep, slots, store.shape[1])
    rows = jnp.arange(store.shape[0], dtype=slots.dtype)[:, None]
    return store.at[rows, slots].set(values.astype(store.dtype), mode="drop")


def check_new(name: str, cache: Any, key: jax.Array, value: jax.Array, valid: Any) -> None:
    """Checks that new keys and values fit a cache: batch, heads, widths and the shape of `valid`.

    Raises:
      ValueError: naming what differs.
    """
    for label, new, old in (("key", key, cache.key), ("value", value, cache.value)):
        want = (old.shape[0], "t", *old.shape[2:])
        if new.ndim != 4 or (new.shape[0], *new.shape[2:]) != (old.shape[0], *old.shape[2:]):
            raise ValueError(
                f"{name}: new {label} of shape {new.shape} does not fit the cache, which holds "
                f"{want}; make the cache with init_cache of the same module and batch size."
            )
    if valid is not None and valid.shape != key.shape[:2]:
        raise ValueError(
            f"{name}: valid must have shape [batch, length] = {key.shape[:2]}, got {valid.shape}."
        )


def check_room(name: str, length: jax.Array, new: jax.Array, max_length: int) -> None:
    """Checks, where the lengths are known (outside of jit), that the new tokens still fit.

    Under `jax.jit` the lengths are unknown: tokens beyond `max_length` are then not stored.

    Raises:
      ValueError: when a row would grow beyond `max_length`.
    """
    if isinstance(length, Tracer) or isinstance(new, Tracer):
        return
    longest = int((length + new).max())
    if longest > max_length:
        raise ValueError(
            f"{name}: {longest} tokens do not fit a cache of max_length={max_length}; "
            "make it longer with init_cache(batch, max_length)."
        )


def cache_bytes(cache: Any) -> int:
    """Bytes of all arrays of a cache; works on `jax.ShapeDtypeStruct` leaves as well."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(cache))
