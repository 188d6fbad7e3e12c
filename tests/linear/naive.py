"""The definition of the linear recurrence, one token after the other, and random problems."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.linear.linear_attention import linear_attention

LENGTH = 150
DECAYS = ("none", "head", "token", "channel")
OPTIONS = [f"{decay}{rule}" for decay in DECAYS for rule in ("", "+delta", "+bonus")]
"""Every kind of decay, alone, with the delta rule, and with an exclusive read plus bonus."""


def recurrence(p: dict, scale: float, ids=None, xp=jnp):
    """Outputs [b, t, h, v] and final state [b, h, k, v] of the recurrence as it is written down.

    `xp` is `jax.numpy`, or `numpy`, which compiles nothing.
    """
    q, k, v, g = p["query"], p["key"], p["value"], p.get("decay")
    b, t, h, width = q.shape
    if g is not None:
        g = {1: lambda: g[None, None, :, None], 3: lambda: g[..., None], 4: lambda: g}[g.ndim]()
        g = xp.broadcast_to(g, (b, t, h, width))
    fresh = xp.zeros((b, t), bool)
    if ids is not None:
        fresh = xp.concatenate([fresh[:, :1], ids[:, 1:] != ids[:, :-1]], axis=1)

    def token(state, i):
        state = xp.where(fresh[:, i, None, None, None], 0.0, state)
        decayed = state if g is None else xp.exp(g[:, i])[..., None] * state
        new = v[:, i]
        if "beta" in p:
            seen = xp.einsum("bhkv,bhk->bhv", decayed, k[:, i])
            new = p["beta"][:, i, :, None] * (new - seen)
        write = k[:, i, :, :, None] * new[:, :, None, :]
        after = decayed + write
        read = state + p["bonus"][None, :, :, None] * write if "bonus" in p else after
        return after, scale * xp.einsum("bhkv,bhk->bhv", read, q[:, i])

    start = p.get("initial_state")
    start = xp.zeros((b, h, width, v.shape[-1]), q.dtype) if start is None else start
    if xp is jnp:
        state, out = jax.lax.scan(token, start, jnp.arange(t))
        return jnp.moveaxis(out, 0, 1), state
    out = []
    for i in range(t):
        start, one = token(start, i)
        out.append(one)
    return xp.stack(out, axis=1), start


def values(p: dict, scale: float, ids=None):
    """Outputs and final state of the recurrence in NumPy."""
    return recurrence({name: np.asarray(x) for name, x in p.items()}, scale, ids, np)


def problem(option: str, *, b=2, t=LENGTH, h=2, k=6, v=5, seed=0, strong=True) -> dict:
    """Random float64 arguments of an option; `strong`: three in ten decays are exp(-8)."""
    rng = np.random.default_rng(seed)
    decay, _, rule = option.partition("+")
    p = {name: rng.standard_normal((b, t, h, k)) for name in ("query", "key")}
    p["key"] /= np.linalg.norm(p["key"], axis=-1, keepdims=True)
    p["value"] = rng.standard_normal((b, t, h, v))
    p["initial_state"] = rng.standard_normal((b, h, k, v))
    shape = {"none": None, "head": (h,), "token": (b, t, h), "channel": (b, t, h, k)}[decay]
    if shape is not None:
        p["decay"] = -0.3 * np.abs(rng.standard_normal(shape))
        if strong and len(shape) > 1:
            p["decay"] = np.where(rng.random(shape) < 0.3, -8.0, p["decay"])
    if rule == "delta":
        p["beta"] = rng.random((b, t, h))
    if rule == "bonus":
        p["bonus"] = rng.standard_normal((h, k))
    return {name: jnp.asarray(x) for name, x in p.items()}


def cast(p: dict, dtype) -> dict:
    """The same arguments in another type."""
    return {name: x.astype(dtype) for name, x in p.items()}


@functools.partial(jax.jit, static_argnames=("chunk_size", "scale"))
def chunked(p: dict, chunk_size=None, scale=None, segment_ids=None):
    """`linear_attention` with the final state."""
    return linear_attention(
        **p, chunk_size=chunk_size, scale=scale, segment_ids=segment_ids, return_state=True
    )


def error(got, want) -> float:
    """Largest difference, relative to the largest wanted value."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())
