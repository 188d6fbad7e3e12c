"""Sparse distributed memory: counting, the fit, and attention with its weights."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax import attention
from attnjax.masks import Causal
from attnjax.mechanisms.memory.attention_sdm import (
    AttentionSDM,
    attention_sdm,
    circle_intersection,
    effective_beta,
    fit_beta,
    intersection_table,
    log_cap_intersection,
    matching_radius,
    normalize,
    snr_radius,
)


def inputs(t=9, d=5):
    return jax.random.normal(jax.random.key(0), (3, 2, t, 2, d))


@pytest.mark.parametrize("radius", [1, 2, 3, 5])
def test_counts_by_enumeration(radius):
    addresses = np.array(list(itertools.product([0, 1], repeat=7)))
    for delta in range(8):
        other = np.arange(7) < delta
        near = (addresses.sum(1) <= radius) & ((addresses != other).sum(1) <= radius)
        assert circle_intersection(7, radius, delta) == near.sum()


def test_table_ends_at_twice_the_radius_and_falls():
    table = intersection_table(64, 11, 1e6)
    assert (table[:23] > 0).all() and not table[23:].any()
    assert (np.diff(table[:23]) <= 0).all()


def test_fit_in_large_spaces():
    """The paper's radii of n = 1000: tables underflow nothing and slopes fall with the radius."""
    slopes = [fit_beta(1000, d)[0] for d in (350, 400, 450)]
    assert np.isfinite(slopes).all() and slopes[0] > slopes[1] > slopes[2] > 0
    assert matching_radius(fit_beta(64, 20)[0], 64) == 20
    assert snr_radius(64, 1e6, 1e2) < snr_radius(64, 1e4, 1e2)
    with pytest.raises(ValueError, match="larger radius"):
        fit_beta(64, 11, distances=range(23, 33))


def test_the_exponential_is_close_to_the_circles():
    """The paper's claim, at radii near those that are best for a memory."""
    for radius in (22, 24, 27):
        exact = intersection_table(64, radius)[:33]
        beta, bias = fit_beta(64, radius)
        fitted = bias + beta * (1 - 2 * np.arange(33) / 64)
        assert np.corrcoef(np.log(exact), fitted)[0, 1] > 0.99
        assert np.corrcoef(exact, np.exp(fitted))[0, 1] > 0.98


def test_caps_are_continuous_circles():
    """In the same space the caps fall with the angle about as the circles do, and vanish."""
    cosines = np.linspace(0, 1, 9)[1:]
    logs = np.array([log_cap_intersection(c, 64, 22) for c in cosines])
    circles = np.log(intersection_table(64, 22)[(64 * (1 - cosines) / 2).astype(int)])
    assert np.corrcoef(logs, circles)[0, 1] > 0.99
    assert log_cap_intersection(-0.6, 64, 11) == -np.inf
    # two equal caps meet in one whole cap: its share of the sphere
    share = np.exp(log_cap_intersection(1.0, 3, 0.75, log_two=np.log(2)))
    assert_allclose(share, 0.25, rtol=1e-8)  # (1 - cos 60°) / 2


def test_fitted_is_cosine_attention():
    q, k, v = inputs()
    unit = [normalize(x) for x in (q, k)]
    want = attention(*unit, v, mask=Causal(), scale=fit_beta(64, 22)[0])
    assert_allclose(attention_sdm(q, k, v, mask=Causal()), want, rtol=1e-5, atol=1e-6)
    given = attention_sdm(q, k, v, mask=Causal(), beta=fit_beta(64, 22)[0])
    assert_allclose(given, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["binary", "cap"])
def test_looked_up_weights(kind):
    q, k, v = inputs()
    k = k.at[0, :, 0].set(-q[0, :1, 0])  # all keys of this head are opposite to query 0
    read = functools.partial(attention_sdm, weights=kind, radius=11)
    got = jax.jit(read)(q, k, v)
    cosine = np.einsum("bthd,bshd->bhts", *(np.asarray(normalize(x), np.float64) for x in (q, k)))
    if kind == "binary":
        distance = np.floor(64 * (1 - cosine) / 2 + 1e-5).astype(int)
        weights = intersection_table(64, 11)[np.clip(distance, 0, 64)]
    else:
        flat = [log_cap_intersection(c, 64, 11) for c in np.minimum(cosine, 1).ravel()]
        weights = np.exp(np.array(flat).reshape(cosine.shape))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1)
    want = np.einsum("bhts,bshd->bthd", weights, v)
    assert_allclose(got, want, rtol=2e-3, atol=2e-3)
    assert not np.any(got[0, 0, 0])  # nothing in reach
    grads = jax.jit(jax.grad(lambda q: (read(q, k, v) ** 2).sum()))(q)
    assert np.isfinite(grads).all() and np.abs(grads).max() > 0


def test_effective_beta_is_the_slope_of_the_scores():
    q, k, _ = inputs()
    cosine = jnp.einsum("bthd,bshd->bhts", normalize(q), normalize(k))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * 5**-0.5
    assert_allclose(effective_beta(q, k) * cosine, scores, rtol=1e-4, atol=1e-5)


def test_module_with_each_kind():
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    for kind in ("binary", "cap"):
        module = AttentionSDM(2, 8, weights=kind, rngs=nnx.Rngs(0))
        call = jax.jit(lambda x, cache=None, module=module: module(x, cache=cache))
        want, cache = call(x), module.init_cache(2, 6)
        first, cache = call(x[:, :3], cache)
        second, _ = call(x[:, 3:], cache)
        assert_allclose(jnp.concatenate([first, second], 1), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "round"},
        {"radius": 32},
        {"learn_beta": True, "weights": "cap"},
    ],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AttentionSDM(2, 8, rngs=nnx.Rngs(0), **options)
