"""Local linear attention: brute-force ridge regression, gradients, limits, memory."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax import attention
from attnjax.dense import qk_scores, weighted_values
from attnjax.masks import Causal, Window
from attnjax.mechanisms.memory.local_linear_attention import (
    RIDGE_MODES,
    LocalLinearAttention,
    local_linear_attention,
    local_linear_weights,
)
from attnjax.taps import Edits

SMALL = dict(block_sizes=(4, 3))


def inputs(t=10, s=10, h=4, g=2, d=3, e=2, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(2, n, m, w)) for n, m, w in ((t, h, d), (s, g, d), (s, g, e))]


def brute_force(q, k, v, keep, ridge, mode):
    """min over (c, W) of Σ w_j |v_j - c - W (k_j - q)|² + λ |W|², for every query."""
    b, t, h, d = q.shape
    out = np.zeros((b, t, h, v.shape[-1]))
    for i, m, a in np.ndindex(b, t, h):
        seen = keep[m]
        keys, values = (x[i, seen, a // (h // k.shape[2])] for x in (k, v))
        scores = keys @ q[i, m, a] / np.sqrt(d)
        shift = {"raw": 0, "max": scores.max(), "softmax": np.log(np.exp(scores).sum())}[mode]
        w = np.exp(scores - shift)
        design = np.concatenate([np.ones((len(keys), 1)), keys - q[i, m, a]], 1)
        penalty = ridge * np.diag([0.0] + [1.0] * d)
        normal = design.T @ (w[:, None] * design) + penalty
        out[i, m, a] = np.linalg.solve(normal, design.T @ (w[:, None] * values))[0]
    return out


@pytest.mark.parametrize("solver", ["cg", "direct"])
@pytest.mark.parametrize("mode", RIDGE_MODES)
def test_is_the_intercept_of_a_weighted_ridge_regression(mode, solver):
    q, k, v = inputs()
    keep = np.tril(np.ones((10, 10), bool))
    with jax.enable_x64(True):
        run = jax.jit(
            functools.partial(
                local_linear_attention, mask=Causal(), ridge=0.1, ridge_mode=mode, solver=solver,
                **SMALL,
            )
        )  # fmt: skip
        assert_allclose(run(q, k, v), brute_force(q, k, v, keep, 0.1, mode), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", RIDGE_MODES)
def test_gradients_are_those_of_the_definition(mode):
    q, k, v = inputs(t=7, s=8)
    rng = np.random.default_rng(1)
    keep = rng.random((2, 1, 7, 8)) < 0.7
    keep[0, 0, 3] = False  # a row without keys
    ct = rng.normal(size=(2, 7, 4, 2))

    def definition(q, k, v, ridge):
        weights, _ = local_linear_weights(
            q, k, qk_scores(q, k), mask=keep, ridge=ridge, ridge_mode=mode
        )
        return (weighted_values(weights, v) * ct).sum()

    def blocks(q, k, v, ridge):
        out = local_linear_attention(
            q, k, v, mask=jnp.asarray(keep), ridge=ridge, ridge_mode=mode, solver="cg", **SMALL
        )
        return (out * ct).sum()

    with jax.enable_x64(True):
        given = [jnp.asarray(x) for x in (q, k, v, np.array([0.1, 0.3, 0.5, 1.0]))]
        got, want = (
            jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2, 3)))(*given)
            for f in (blocks, definition)
        )
        jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-8, atol=1e-9), got, want)


def test_floor_bounds_the_denominator_and_its_gradient():
    q, k, v = inputs(t=5, s=5)
    q = 4 * q  # far outside of the keys
    rho = 0.3

    def definition(q, k, v):
        weights, rho_ = local_linear_weights(q, k, qk_scores(q, k), ridge=rho)
        scores = qk_scores(q, k)
        w = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        keys = jnp.repeat(k, 2, axis=2)
        z = keys.swapaxes(1, 2)[:, :, None] - q.swapaxes(1, 2)[:, :, :, None]
        c = w * (1 - jnp.einsum("bhtsd,bhtd->bhts", z, rho_))
        norm = jnp.maximum(c.sum(-1), 0.5 * w.sum(-1))
        return (weighted_values(c / norm[..., None], v) ** 2).sum()

    def blocks(q, k, v):
        return (local_linear_attention(q, k, v, ridge=rho, floor=0.5, **SMALL) ** 2).sum()

    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x) for x in (q, k, v))
        got, want = (
            jax.value_and_grad(f, argnums=(0, 1, 2))(q, k, v) for f in (blocks, definition)
        )
        jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-8, atol=1e-8), got, want)


def test_a_large_ridge_is_softmax_attention():
    q, k, v = inputs()
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x) for x in (q, k, v))
        got = local_linear_attention(q, k, v, mask=Causal(), ridge=1e12, **SMALL)
        assert_allclose(got, attention(q, k, v, mask=Causal()), rtol=1e-8, atol=1e-8)


def test_affine_values_are_continued_exactly():
    q, k, _ = inputs(h=2, g=2)
    rng = np.random.default_rng(2)
    slope, shift = rng.normal(size=(3, 2)), rng.normal(size=2)
    with jax.enable_x64(True):
        v = jnp.asarray(k @ slope + shift)
        got = local_linear_attention(jnp.asarray(q), jnp.asarray(k), v, ridge=1e-12, **SMALL)
        assert_allclose(got, q @ slope + shift, rtol=1e-6, atol=1e-6)


def test_one_visible_token_gives_its_value_and_rows_sum_to_one():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in inputs(h=2, g=2))
    one = functools.partial(local_linear_attention, mask=Causal() & Window(1), **SMALL)
    assert_allclose(jax.jit(one)(q, k, v), v, rtol=1e-5, atol=1e-5)
    weights, _ = local_linear_weights(q, k, qk_scores(q, k), ridge=0.1)
    assert_allclose(weights.sum(-1), jnp.ones((2, 2, 10)), rtol=1e-4)
    assert (weights < 0).any()


def test_no_array_of_queries_by_keys():
    q, k, v = (jnp.zeros((1, 192, 1, 4)) for _ in range(3))

    def loss(q, k, v):
        out = local_linear_attention(q, k, v, mask=Causal(), block_sizes=(32, 64))
        return out.sum()

    text = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v))
    assert "32,64]" in text and not re.search(r"192,(\d+,)?192", text)


def test_capturing_weights_changes_nothing():
    module = LocalLinearAttention(2, 8, num_kv_heads=1, rope_base=1e4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 7, 8))

    @jax.jit
    def call(x, edits):
        return module(x, edits=edits), module(x, edits=edits, capture=("weights",))

    got, (y, captured) = call(x, Edits())
    assert_allclose(y, got, rtol=1e-4, atol=1e-5)
    assert_allclose(captured["weights"].sum(-1), jnp.ones((2, 2, 7)), rtol=1e-4)
    hidden = Edits(key_mask=jnp.arange(7)[None] != 2)
    got, (y, captured) = call(x, hidden)
    assert not np.any(captured["weights"][..., 2])
    assert_allclose(got, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"ridge_mode": "min"}, {"ridge": -1.0}, {"solver": "lu"}, {"block_sizes": (0, 4)}],
    ids=str,
)
def test_bad_options(options):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in inputs())
    with pytest.raises(ValueError, match=next(iter(options))):
        local_linear_attention(q, k, v, **options)
    if "block_sizes" not in options and "solver" not in options:
        with pytest.raises(ValueError, match=next(iter(options))):
            LocalLinearAttention(2, 8, rngs=nnx.Rngs(0), **options)
