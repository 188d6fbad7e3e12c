"""Conditioning: rules of learning, classical phenomena, capacity and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.mechanisms.memory.pavlovian_conditioning import (
    RULES,
    PavlovianConditioning,
    association_history,
    capacity_curve,
    conditioning_protocol,
    error_propagation,
    pavlovian_conditioning,
    recall_quality,
)


def unit(seed, n, d):
    x = np.random.default_rng(seed).normal(size=(n, d))
    return jnp.asarray(x / np.linalg.norm(x, axis=-1, keepdims=True), jnp.float32)


@pytest.mark.parametrize("rule", RULES)
def test_recall_follows_the_history(rule):
    """o_t = S_t q_t, with S_t by the rule as it is written."""
    k, v, q = unit(0, 9, 5), unit(1, 9, 3), unit(2, 9, 5)
    options = dict(rule=rule, eta=0.4, gamma=0.2 if rule == "decay" else 0.0)
    histories = np.asarray(association_history(k, v, **options))
    state = np.zeros((3, 5))
    for step, history in enumerate(histories):
        kt, vt = np.asarray(k[step]), np.asarray(v[step])
        seen = vt - state @ kt if rule == "delta" else vt
        state = (0.8 if rule == "decay" else 1) * state + 0.4 * np.outer(seen, kt)
        assert_allclose(history, state, rtol=1e-5, atol=1e-6)
    given = (x[None, :, None] for x in (q, k, v))
    got = jax.jit(functools.partial(pavlovian_conditioning, **options))(*given)[0, :, 0]
    want = np.einsum("ted,td->te", histories, q)
    assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_classical_phenomena():
    """Rescorla and Wagner's, by the delta rule; Hebb's rule shows none of them."""
    last = {
        (rule, name): conditioning_protocol(name, 16, rule=rule)[-1]
        for rule in ("hebb", "delta")
        for name in ("acquisition", "extinction", "blocking", "overshadowing")
    }
    assert_allclose(last["delta", "acquisition"], [1, 0], atol=1e-3)
    assert_allclose(last["delta", "extinction"], [0, 0], atol=1e-3)
    assert_allclose(last["delta", "blocking"], [1, 0], atol=1e-3)  # B is never learned
    assert_allclose(last["delta", "overshadowing"], [0.5, 0.5], atol=1e-3)  # A and B share
    assert last["hebb", "extinction"][0] == last["hebb", "acquisition"][0] == 8.0
    assert last["hebb", "blocking"][1] == last["hebb", "overshadowing"][1] == 8.0


def test_the_delta_rule_stores_d_associations_exactly():
    k, v = unit(0, 6, 6), unit(1, 6, 4)
    sweeps = [jnp.tile(x, (400, 1))[None, :, None] for x in (k, k, v)]
    learn = functools.partial(pavlovian_conditioning, return_state=True)
    _, state = jax.jit(functools.partial(learn, rule="delta"))(*sweeps)
    assert_allclose(k @ state[0, 0], v, atol=2e-3)
    orthogonal = jnp.eye(6)
    once = [x[None, :, None] for x in (orthogonal, orthogonal, v)]
    _, state = jax.jit(learn)(*once)
    assert_allclose(state[0, 0], v, atol=1e-6)  # without interference Hebb needs one pairing


def test_interference_grows_with_the_load():
    found, quality = [], jax.jit(recall_quality)
    for seed in range(20):
        k, v = unit(seed, 33, 16), unit(seed + 100, 33, 8)
        found.append(quality(k, v, (k @ k.T) @ v))
    assert found[0]["expected"] == 2.0
    mean = np.mean([one["interference"] for one in found])
    assert_allclose(mean, 2.0, rtol=0.1)
    assert_allclose(np.mean([1 / one["snr"] for one in found]), 2.0, rtol=0.1)


@pytest.mark.slow
def test_capacity_grows_with_the_width_of_keys():
    """n* at 90 % accuracy grows about as d, faster than the worst case, and softmax holds more."""
    loads = (2, 4, 8, 16, 32, 64, 128)
    most = []
    for d in (8, 32):
        curve = np.asarray(capacity_curve(jax.random.key(0), d, loads, value_dim=64))
        assert curve[0] == 1.0 and (np.diff(curve) <= 0.02).all()
        most.append(np.interp(-0.9, -curve, np.log2(loads)))  # accuracy falls with the load
    slope = (most[1] - most[0]) / 2
    assert 0.5 < slope < 1.5  # decoding among n values adds to the exponent of small d
    control = capacity_curve(jax.random.key(0), 32, (128,), read="softmax", value_dim=64)
    assert control[0] > 0.99 > curve[-1]


def test_noisy_queries_are_recalled_less_well():
    clear, dim, lost = (
        capacity_curve(jax.random.key(0), 32, (8,), noise=noise, trials=16)[0]
        for noise in (0.0, 1.5, 30.0)
    )
    assert clear == 1.0 and 0.4 < dim < 1.0
    assert_allclose(lost, 1 / 8, atol=0.1)  # no better than a guess


@pytest.mark.parametrize(("layers", "heads"), [(4, 1), (16, 1), (16, 4)])
def test_errors_add_up_at_random(layers, heads):
    measured, expected = error_propagation(
        jax.random.key(1), layers=layers, heads=heads, error=0.1, width=32
    )
    assert_allclose(expected, 0.1 * np.sqrt(layers / heads), rtol=1e-6)
    assert_allclose(measured, expected, rtol=0.05)


def test_every_rule_decodes():
    x = jax.random.normal(jax.random.key(0), (2, 8, 8))
    for rule in ("hebb", "decay"):
        module = PavlovianConditioning(
            2, 8, rule=rule, rope_base=1e4, value_factor=1.5, rngs=nnx.Rngs(0)
        )
        want, cache = jax.jit(module.__call__)(x), module.init_cache(2, 8)
        step = jax.jit(lambda x, cache, module=module: module(x, cache=cache))
        first, cache = step(x[:, :4], cache)
        second, _ = step(x[:, 4:], cache)
        assert_allclose(jnp.concatenate([first, second], 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "oja"}, ValueError, "rule"),
        ({"eta": 1.0}, ValueError, "eta"),
        ({"gamma": 0.0}, ValueError, "gamma"),
        ({"dropout_rate": 0.1}, NotImplementedError, "dropout"),
    ],
    ids=str,
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        PavlovianConditioning(2, 8, rngs=nnx.Rngs(0), **options)
    k = jnp.ones((1, 2, 1, 2))
    with pytest.raises(ValueError, match="gamma belongs"):
        pavlovian_conditioning(k, k, k, gamma=0.1)
    with pytest.raises(ValueError, match="eta must be a number or have shape"):
        pavlovian_conditioning(k, k, k, eta=jnp.ones((3,)))
