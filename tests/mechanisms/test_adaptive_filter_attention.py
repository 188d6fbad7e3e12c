"""Adaptive filter attention: complex definition, both paths, limits, the module's options."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax import attention
from attnjax.masks import Causal
from attnjax.mechanisms.memory.adaptive_filter_attention import (
    AdaptiveFilterAttention,
    Dynamics,
    FilterOptions,
    adaptive_filter_attention,
    propagated_variance,
)
from attnjax.positions import apply_rope

MODULE = importlib.import_module("attnjax.mechanisms.memory.adaptive_filter_attention")


def inputs(t=7, h=2, d=3, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, 2, t, h, 2 * d))
    dynamics, own = (
        Dynamics(-rng.uniform(0.1, 1, h), rng.normal(size=(h, d)), *rng.uniform(0.2, 1, (3, h)))
        for _ in range(2)
    )
    rates = dict(threshold=rng.uniform(0.5, 1, h), temperature=rng.uniform(0.8, 1.2, h))
    return q, k, v, dynamics, own, rates


def arrays(x):
    return jax.tree.map(jnp.asarray, x)


def carry(x, system, h, signed):
    return np.exp(system.decay[h] * abs(signed) + 1j * system.frequency[h] * signed) * x


def variance(system, h, gap):
    mu, kept = system.decay[h], np.exp(2 * system.decay[h] * gap)
    start = system.measurement[h] * kept + system.anchor[h]
    return system.process[h] * (1 - kept) / (-2 * mu) + start


def definition(q, k, v, dynamics, own, rates, times, options):
    """Complex loops over pairs: each key is carried to the time of the query."""
    d = q.shape[-1] // 2
    q, k, v = (x[..., :d] + 1j * x[..., d:] for x in (q, k, v))
    out = np.zeros_like(q)
    for b, i, h in np.ndindex(*q.shape[:3]):
        scores, carried = [], []
        nu, tau = rates["threshold"][h], rates["temperature"][h]
        for j in range(i + 1):
            signed = times[b, i] - times[b, j]
            gap = abs(signed)
            residual = (np.abs(q[b, i, h] - carry(k[b, j, h], own, h, signed)) ** 2).sum()
            before = np.log(variance(dynamics, h, gap) + 1e-6)
            bias = {"none": 0, "variance": -before, "linear": -nu * gap}[options.bias]
            after = variance(own, h, gap)
            noise = {"constant": d, "variance": nu * d * after, "linear": nu * d * gap}
            share = residual / max(noise[options.noise], 1e-6)
            scores.append(tau**2 * (bias - (np.log1p(share) if options.robust else share)))
            carried.append(carry(v[b, j, h], dynamics, h, signed))
        weights = np.exp(np.array(scores) - max(scores))
        out[b, i, h] = (weights / weights.sum()) @ np.array(carried)
    return np.concatenate([out.real, out.imag], -1)


@pytest.mark.parametrize(
    "options",
    [
        FilterOptions(),
        FilterOptions("linear", "constant", robust=False),
        FilterOptions("none", "linear"),
    ],
    ids=lambda o: f"{o.bias}, {o.noise}",
)
def test_definition_with_irregular_times_and_own_dynamics_of_keys(options):
    q, k, v, dynamics, own, rates = inputs()
    times = np.cumsum(np.random.default_rng(1).uniform(0.2, 2, (2, 7)), axis=1)
    with jax.enable_x64(True):
        run = jax.jit(functools.partial(adaptive_filter_attention, mask=Causal(), options=options))
        got = run(
            *arrays((q, k, v, dynamics)), key_dynamics=arrays(own), times=jnp.asarray(times),
            **arrays(rates),
        )  # fmt: skip
        want = definition(q, k, v, dynamics, own, rates, times, options)
        assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_tile_by_tile_is_the_definition():
    """Both forms, in value and every gradient."""
    q, k, v, dynamics, own, rates = inputs(t=9)
    with jax.enable_x64(True):
        given = arrays((q, k, v, dynamics, own, rates))

        def loss(given, implementation):
            q, k, v, dynamics, own, rates = given
            out = adaptive_filter_attention(
                q, k, v, dynamics, key_dynamics=own, mask=Causal(), implementation=implementation,
                **rates,
            )  # fmt: skip
            return (out**2).sum()

        both = jax.jit(jax.value_and_grad(loss), static_argnums=1)
        got, want = (both(given, name) for name in ("block_sparse", "dense"))
        jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-8, atol=1e-9), got, want)


def test_variance_without_decay_grows_with_time():
    gap = jnp.linspace(0, 5, 6)[None]
    two = jnp.array([0.0, -1e-4])
    dynamics = Dynamics(two, jnp.zeros((2, 1)), *(jnp.full((2,), x) for x in (0.5, 0.3, 0.1)))
    still, slow = propagated_variance(dynamics, gap)
    assert_allclose(still, 0.5 * gap[0] + 0.4, rtol=1e-6)
    assert_allclose(slow, still, rtol=1e-3)
    grads = jax.grad(lambda mu: propagated_variance(dynamics._replace(decay=mu), gap).sum())(two)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize("turning", [True, False])
def test_still_systems_are_softmax_attention(turning):
    """No decay, no noise of the process, constant S, unit vectors: softmax with scale 2 τ² / S."""
    q, k, v, dynamics, _, rates = inputs()
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    nothing = np.zeros(2)
    line = np.array([0.9, 0.5, 0.1]) * turning
    dynamics = Dynamics(nothing, np.stack([line, line]), nothing, *dynamics[3:])
    with jax.enable_x64(True):
        q, k, v, dynamics, rates = arrays((q, k, v, dynamics, rates))
        rates["temperature"] = jnp.ones(2)

        @functools.partial(jax.jit, static_argnums=0)
        def run(full):
            options = FilterOptions("none", "constant", robust=False, full_residual=full)
            return adaptive_filter_attention(
                q, k, v, dynamics, mask=Causal(), options=options, **rates
            )

        got = run(True)

        def rope(x, sign=-1):
            return apply_rope(x, sign * jnp.arange(7), jnp.asarray(line))

        want = attention(rope(q), rope(k), rope(v), mask=Causal(), scale=2 / 3)
        assert_allclose(got, rope(want, 1), rtol=1e-9, atol=1e-9)
        if not turning:
            assert_allclose(got, attention(q, k, v, mask=Causal(), scale=2 / 3), atol=1e-9)
        assert_allclose(run(False), rope(want, 1), rtol=1e-9, atol=1e-9)


def test_module_tile_by_tile(monkeypatch):
    """Long inputs never hold all scores: the same outputs, with documents and with a cache."""
    module = AdaptiveFilterAttention(2, 8, residual="precision", separate=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8))
    ids = jnp.array([[0, 0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]])
    dense = jax.jit(lambda x, ids: module(x, segment_ids=ids))
    packed, whole = dense(x, ids), dense(x, jnp.zeros_like(ids))
    monkeypatch.setattr(MODULE, "DENSE_SCORES", 0)
    tiles = jax.jit(lambda x: module(x, segment_ids=ids))(x)
    assert_allclose(tiles, packed, rtol=1e-4, atol=1e-5)
    step = jax.jit(lambda x, cache: module(x, cache=cache))
    cache = module.init_cache(2, 8, dtype=jnp.float32)
    first, cache = step(x[:, :4], cache)
    second, cache = step(x[:, 4:], cache)
    assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"residual": "add", "norm": "qkv", "predict": True, "learn_frequency": True},
        {"residual": "learned", "causal": False, "bias": "linear", "noise": "constant"},
    ],
    ids=str,
)
def test_options_of_the_module(options):
    module = AdaptiveFilterAttention(2, 8, rngs=nnx.Rngs(0), **options)
    y = jax.jit(module.__call__)(jax.random.normal(jax.random.key(0), (2, 5, 8)))
    assert y.shape == (2, 5, 8) and np.isfinite(y).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "log"}, "bias must be"),
        ({"full_residual": False}, "robust=False"),
        ({"norm": "all"}, "norm must be"),
        ({"residual": "yes"}, "residual must be"),
        ({"horizon": 0}, "horizon"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveFilterAttention(2, 8, rngs=nnx.Rngs(0), **options)


def test_bad_shapes():
    q, k, v, dynamics, _, rates = arrays(
        jax.tree.map(lambda x: np.asarray(x, np.float32), inputs(t=3))
    )
    with pytest.raises(ValueError, match="every head has its own keys"):
        adaptive_filter_attention(q, k[:, :, :1], v[:, :, :1], dynamics, **rates)
    with pytest.raises(ValueError, match="times must have shape"):
        adaptive_filter_attention(q, k, v, dynamics, times=jnp.ones((3,)), **rates)
    with pytest.raises(ValueError, match="frequency must have shape"):
        adaptive_filter_attention(q[..., :4], k[..., :4], v, dynamics, **rates)
