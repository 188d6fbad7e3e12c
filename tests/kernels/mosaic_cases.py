"""Calls that the tests of the Hopper kernels make, and what they must give by the definition."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import masks
from pallas_kernels import tilemath
from pallas_kernels.dispatch import Target
from pallas_kernels.flash import attention

H100 = Target("cuda", "NVIDIA H100 80GB HBM3", 1, (9, 0))

RNG = np.random.default_rng(20240917)
SLOPES = jnp.asarray(RNG.random(4), jnp.float32)
BY_QUERY = jnp.asarray(RNG.normal(size=(4, 300)), jnp.float32)
BY_KEY = jnp.asarray(RNG.normal(size=(2, 300)), jnp.float32)
IDS = jnp.asarray(np.sort(RNG.integers(0, 4, (2, 300)), axis=1), jnp.int32)

UNSEEN = jnp.asarray([[100], [0]], jnp.int32)  # ids of batch row 0 that no key has


def alibi(tables: Any, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    """A distance times a slope by head: a read of kind "scalar"."""
    return s - tables[0][h] * jnp.abs(q - k).astype(jnp.float32)


def lookups(tables: Any, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    """Reads of kind "query", "key" and "scalar", and a function of the score."""
    return jnp.tanh(s) * tables[1][h, q] + tables[2][b, k] * tables[0][h]


def by_key_and_head(tables: Any, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    """A read of kind "key" that differs between the heads of a group."""
    return s + s * tables[1][h, k]


def case(mask: Any = None, mod: Any = None, **options: Any) -> dict[str, Any]:
    """Sizes b, t, s, h, g, d, e and arguments of a call, with defaults."""
    defaults = {"b": 2, "t": 150, "s": 200, "h": 4, "g": 2, "d": 64, "e": 64, "bias": None}
    return {**defaults, "mask": masks.Full() if mask is None else mask, "mod": mod, **options}


CASES = {
    "full": case(t=128, s=256),
    "odd lengths": case(t=1, s=7),
    "causal, wide values": case(masks.Causal(), s=150, e=128),
    "window, uneven heads": case(masks.Window(20, 5), d=40, e=80),
    "segments": case(masks.Segments(IDS[:, :150], IDS[:, :200])),
    "nothing to see": case(masks.Segments(IDS[:, :150] + UNSEEN, IDS[:, :200])),
    "offsets": case(masks.Causal(), q_offset=jnp.asarray([50, 7]), h=2, g=1),
    "softcap": case(masks.Causal(), softcap=2.0, b=1),
    "alibi": case(masks.Causal(), alibi, s=150),
    "lookups": case(masks.Window(40, 5), lookups),
    "lookups by head": case(None, by_key_and_head, b=1),
    "bias by key, sinks": case(bias=(2, 1, 1, 200), sinks=True),
    "bias by query, sinks": case(masks.Causal(), bias=(1, 4, 150, 1), sinks=True),
    "bias by head, sinks": case(bias=(1, 4, 1, 1), sinks=True, softcap=3.0, b=1),
    "bias by pair": case(masks.Window(60, 5), bias=(2, 1, 150, 200), h=2),
    "bias by head and pair": case(bias=(1, 2, 150, 200), h=2, softcap=3.0),
    "mask by pair": case(masks.Causal(), mask_array=(1, 2, 150, 200), h=2),
    "key padding": case(mask_array=(2, 1, 1, 200)),
    "dropout": case(masks.Causal(), dropout_rate=0.3, b=1, h=2),
    "wide heads": case(masks.Causal(), d=256, e=192, b=1, h=2, g=1),
}


def problem(spec: dict[str, Any], dtype: Any) -> tuple[list[Any], dict[str, Any], jax.Array]:
    """(differentiable arguments: q, k, v, tables, bias, sinks; fixed ones; output cotangent)."""
    n = spec
    rng = np.random.default_rng(1)

    def normal(*shape: int, dtype: Any = dtype) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    q = normal(n["b"], n["t"], n["h"], n["d"])
    k = normal(n["b"], n["s"], n["g"], n["d"])
    v = normal(n["b"], n["s"], n["g"], n["e"])
    bias = None if n["bias"] is None else normal(*n["bias"], dtype=jnp.float32)
    sinks = normal(n["h"], dtype=jnp.float32) if n.get("sinks") else None
    fixed: dict[str, Any] = {
        "mask": n["mask"],
        "scale": n["d"] ** -0.5,
        **{x: n[x] for x in ("softcap", "q_offset", "dropout_rate") if x in n},
    }
    if "mask_array" in n:
        fixed["mask_array"] = jnp.asarray(rng.random(n["mask_array"]) < 0.7)
    if "dropout_rate" in n:
        fixed["dropout_seed"] = jnp.asarray([3, 5], jnp.uint32)
    given = [q, k, v, [SLOPES, BY_QUERY, BY_KEY], bias, sinks]
    return given, fixed, normal(n["b"], n["t"], n["h"], n["e"])


def flash(given: list[Any], fixed: dict[str, Any], mod: Any, **more: Any) -> Any:
    """(o, lse) of `flash_attention`."""
    q, k, v, tables, bias, sinks = given
    score_mod = None if mod is None else functools.partial(mod, tables)
    return attention.flash_attention(
        q, k, v, score_mod=score_mod, bias=bias, sinks=sinks, **fixed, **more
    )


def dense(given: list[Any], fixed: dict[str, Any], mod: Any) -> tuple[jax.Array, jax.Array]:
    """(o, lse) by the definition, for every batch row and head."""
    q, k, v, tables, bias, sinks = given
    (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
    offsets = jnp.broadcast_to(jnp.asarray(fixed.get("q_offset", 0), jnp.int32), (b,))

    def pick(x: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        x = x[i if x.shape[0] > 1 else 0, j if x.shape[1] > 1 else 0]
        return jnp.broadcast_to(x, (t, s))

    def one(row: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        group = jax.lax.div(head, jnp.int32(h // g))
        queries = jnp.arange(t, dtype=jnp.int32)[:, None] + offsets[row]
        keys = jnp.arange(s, dtype=jnp.int32)[None]
        score = tilemath.dot(q[row, :, head], k[row, :, group], (1, 1), "highest")
        score = score * fixed["scale"]
        if bias is not None:
            score = score + pick(bias, row, head)
        cap = fixed.get("softcap")
        if cap is not None:
            score = cap * jnp.tanh(score / cap)
        if mod is not None:
            by_key = jax.vmap(lambda x, n, m: mod(tables, x, row, head, n, m), (0, None, 0))
            score = jax.vmap(by_key, (0, 0, None))(score, queries[:, 0], keys[0])
        keep = jnp.asarray(fixed["mask"].predicate(row, head, queries, keys))
        keep = jnp.broadcast_to(keep, (t, s))
        if "mask_array" in fixed:
            keep = keep & pick(fixed["mask_array"], row, head)
        sink = jnp.full((t, 1), -jnp.inf if sinks is None else sinks[head], jnp.float32)
        # a huge negative score instead of -inf, so that gradients of empty rows are 0 and not NaN
        score = jnp.where(keep, score, -1e30)
        lse = jax.nn.logsumexp(jnp.concatenate([score, sink], axis=1), axis=1)
        weights = jnp.where(keep, jnp.exp(score - lse[:, None]), 0.0)
        if "dropout_rate" in fixed:
            seed, rate = fixed["dropout_seed"], fixed["dropout_rate"]
            weights *= tilemath.dropout_factors(seed, row, head, queries, keys, rate)
        o = tilemath.dot(weights, v[row, :, group], (1, 0), "highest")
        return o, jnp.where(lse < -1e29, -jnp.inf, lse)

    each = jax.vmap(jax.vmap(one, (None, 0)), (0, None))
    o, lse = each(jnp.arange(b, dtype=jnp.int32), jnp.arange(h, dtype=jnp.int32))
    return o.transpose(0, 2, 1, 3).astype(q.dtype), lse.transpose(0, 2, 1)


def dense_with_gradients(given: Any, fixed: Any, mod: Any, ct: jax.Array) -> Any:
    """((o, lse), gradients): lse has the cotangent of o's first column where it is finite."""

    def run(given: Any, ct: jax.Array) -> Any:
        (o, lse), pull = jax.vjp(lambda x: dense(x, fixed, mod), given)
        return (o, lse), pull((ct, _lse_cotangent(lse, ct)))[0]

    return jax.jit(run)(given, ct)


def flash_with_gradients(given: Any, fixed: Any, mod: Any, ct: jax.Array, **more: Any) -> Any:
    """The same of `flash_attention`."""
    (o, lse), pull = jax.vjp(lambda x: flash(x, fixed, mod, **more), given)
    return (o, lse), pull((ct, _lse_cotangent(lse, ct)))[0]


def _lse_cotangent(lse: jax.Array, ct: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(lse), ct[..., 0].astype(lse.dtype), 0.0)


def error(x: Any, want: Any) -> float:
    """Largest difference relative to the largest entry."""
    x, want = (np.asarray(a, np.float64) for a in (x, want))
    same = np.isneginf(x) & np.isneginf(want)
    x, want = np.where(same, 0, x), np.where(same, 0, want)
    return float(np.abs(x - want).max() / max(np.abs(want).max(), 1e-3))
