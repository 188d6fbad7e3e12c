"""Marginal attention: sums over the latent variable, readouts, repeated readouts, bad input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.attention import attention
from attnjax.masks import Causal, Chunked
from attnjax.mechanisms.softmax.marginal_attention import (
    SPEC,
    connection_posterior,
    marginal_attention,
    mean_field_steps,
    slot_steps,
)

TIGHT = {"rtol": 1e-10, "atol": 1e-12}  # float64


def operands():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, g, w)) for n, g, w in ((5, 4, 3), (7, 2, 3), (7, 2, 6)))
    prior = np.log(rng.dirichlet(np.ones(7), size=(2, 4, 5)))
    possible = rng.random((2, 1, 5, 7)) < 0.6
    possible[..., 0] = True
    return q, k, v, prior, possible


def naive(q, k, v, prior, potential):
    """Sums over φ: evidence, posterior, entropy, expectation; prior and potential as numbers."""
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    joint = prior * potential(
        q.transpose(0, 2, 1, 3)[:, :, :, None], k.transpose(0, 2, 1, 3)[:, :, None]
    )
    evidence = joint.sum(-1)
    p = joint / evidence[..., None]
    entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1)
    read = np.einsum("bhts,bshe->bthe", p, v)
    return np.log(evidence).transpose(0, 2, 1), p, entropy.transpose(0, 2, 1), read


def dot(q, k):
    return np.exp((q * k).sum(-1) / np.sqrt(q.shape[-1]))


def gauss(q, k):
    return np.exp(-((q - k) ** 2).sum(-1) / (2 * 0.7**2))


@pytest.mark.parametrize("case", ["uniform dot", "learned dot", "graph dot", "graph gauss"])
def test_equals_sums_over_the_latent_variable(case):
    prior_name, likelihood = case.split()
    q, k, v, log_prior, possible = operands()
    prior, options = np.full((1, 1, 1, 7), 1 / 7), {}
    with jax.enable_x64(True):
        if prior_name == "learned":
            prior, options = np.exp(log_prior), {"log_prior": jnp.asarray(log_prior)}
        if prior_name == "graph":
            prior = possible / possible.sum(-1, keepdims=True)
            options = {"mask": jnp.asarray(possible)}
        if likelihood == "gauss":
            options |= {"likelihood": "gaussian", "sigma": 0.7}
        evidence, p, entropy, read = naive(q, k, v, prior, {"dot": dot, "gauss": gauss}[likelihood])

        @jax.jit
        def all_readouts(q, k, v):
            read = functools.partial(marginal_attention, q, k, v, **options)
            return connection_posterior(q, k, **options), read(), read(mode="map").output

        got, soft, best = all_readouts(*map(jnp.asarray, (q, k, v)))
        assert_allclose(got.weights, p, **TIGHT)
        assert_allclose(got.entropy, entropy, **TIGHT)
        assert_allclose(got.log_marginal, evidence, **TIGHT)
        assert_allclose(soft.output, read, **TIGHT)
        assert_allclose(soft.log_marginal, evidence, **TIGHT)
        chosen = np.take_along_axis(
            np.repeat(v, 2, 2).transpose(0, 2, 1, 3), p.argmax(-1)[..., None], axis=2
        )
        assert_allclose(best, chosen.transpose(0, 2, 1, 3), **TIGHT)


def test_uniform_prior_is_softmax_attention():
    q, k, v = map(jnp.float32, operands()[:3])
    (want, lse), got = jax.jit(
        lambda *qkv: (
            attention(*qkv, is_causal=True, return_residual=True),
            marginal_attention(*qkv, mask=Causal()),
        )
    )(q, k, v)
    assert_array_equal(got.output, want)
    degree = jnp.log(jnp.arange(1, 6, dtype=jnp.float32))[None, :, None]
    assert_allclose(got.log_marginal, lse - degree, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_evidence_is_the_posterior():
    """d ln p(q) / d ln prior_j = p(j | q), and readouts choose whose gradient they take."""
    q, k, v, log_prior, _ = map(jnp.float32, operands())

    def evidence(log_prior):
        return marginal_attention(q, k, v, log_prior=log_prior).log_marginal.sum()

    def read(q, **options):
        return marginal_attention(q, k, v, log_prior=log_prior, **options).output.sum()

    @jax.jit
    def everything(q, log_prior):
        slopes = [
            jax.grad(functools.partial(read, **options))(q)
            for options in ({}, {"mode": "map"}, {"mode": "map", "straight_through": False})
        ]
        want = connection_posterior(q, k, log_prior=log_prior).weights
        return jax.grad(evidence)(log_prior), want, slopes

    got, want, (soft, straight, chosen) = everything(q, log_prior)
    assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    assert_allclose(straight, soft, rtol=1e-4, atol=1e-5)
    assert not chosen.any()


def test_samples_follow_the_posterior():
    q, k, _, log_prior, possible = operands()
    q, k, log_prior = map(jnp.float32, (q[:1], k[:1], log_prior[:1]))
    mask = jnp.asarray(possible[:1])
    one_hot = jnp.broadcast_to(jnp.eye(7)[None, :, None], (1, 7, 2, 7))

    @jax.jit
    @jax.vmap
    def draw(key):
        options = dict(log_prior=log_prior, mask=mask, mode="sample", rng=key)
        return marginal_attention(q, k, one_hot, **options).output

    mean = draw(jax.random.split(jax.random.key(0), 4000)).mean(0)  # [1, t, h, s]
    want = connection_posterior(q, k, log_prior=log_prior, mask=mask).weights
    assert_allclose(mean.transpose(0, 2, 1, 3), want, atol=5 * 0.5 / 4000**0.5)


def test_repeated_readouts():
    """A query near a stored pattern finds it; slots share keys out among queries."""
    patterns = jnp.eye(4)[None, :, None] * 6
    near = patterns[:, 1:2] * 0.6 + 0.3
    states = mean_field_steps(near, patterns, 3)
    assert states.shape == (3, 1, 1, 1, 4)
    assert_allclose(states[-1, 0, 0, 0], patterns[0, 1, 0], atol=1e-3)
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 3, 1, 4)), rng.normal(size=(2, 6, 1, 4))
    a = np.exp(np.einsum("btd,bsd->bts", q[:, :, 0], k[:, :, 0]) / 2)
    a = a / a.sum(1, keepdims=True)
    want = np.einsum("bts,bsd->btd", a / a.sum(-1, keepdims=True), k[:, :, 0])
    assert_allclose(slot_steps(jnp.float32(q), jnp.float32(k))[0, :, :, 0], want, rtol=1e-5)
    # a key that one query alone may explain is its own
    alone = slot_steps(jnp.float32(q), jnp.float32(k[:, :3]), mask=Chunked(1))[0]
    assert_allclose(alone, k[:, :3], rtol=1e-5)


def test_a_query_without_possible_keys():
    q, k, v = map(jnp.float32, operands()[:3])
    mask = (jnp.arange(5) != 2)[:, None] & jnp.ones((1, 7), bool)
    for mode in ("soft", "map"):
        out, log_marginal = marginal_attention(q, k, v, mask=mask, mode=mode)
        assert not out[:, 2].any() and np.isneginf(log_marginal[:, 2]).all()
        assert np.isfinite(log_marginal[:, 1]).all()


def test_picture_and_bad_input():
    assert SPEC.picture is not None
    for panel in SPEC.picture().values():
        assert_allclose(np.asarray(panel).sum(-1), np.ones(24), rtol=1e-5)
    q, k, v = map(jnp.float32, operands()[:3])
    for options, message in (
        (dict(mode="mean"), "mode='mean'"),
        (dict(mode="sample"), "needs rng=key"),
        (dict(likelihood="poisson"), "likelihood='poisson'"),
        (dict(likelihood="gaussian", sigma=0.0), "sigma=0.0"),
        (dict(likelihood="gaussian", scale=1.0), "instead of scale"),
    ):
        with pytest.raises(ValueError, match=message):
            marginal_attention(q, k, v, **options)
