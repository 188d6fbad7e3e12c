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


def brute_force(q, k, v, keep, ridge, mode, bandwidth=None):
    """min over (c, W) of Σ w_j |v_j - c - W (k_j - q)|² + λ |W|², for every query."""
    b, t, h, d = q.shape
    out = np.zeros((b, t, h, v.shape[-1]))
    for i, m, a in np.ndindex(b, t, h):
        seen = keep[m]
        keys, values = (x[i, seen, a // (h // k.shape[2])] for x in (k, v))
        scores = keys @ q[i, m, a] / (bandwidth or np.sqrt(d))
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


def test_a_large_bandwidth_is_a_global_ridge_regression():
    """Weights of 1: the plane through all visible pairs, read at the query."""
    q, k, v = inputs(t=6, s=6)
    keep = np.tril(np.ones((6, 6), bool))
    with jax.enable_x64(True):
        run = functools.partial(
            local_linear_attention, mask=Causal(), ridge=0.1, bandwidth=1e12, **SMALL
        )
        want = brute_force(q, k, v, keep, 0.1, "max", bandwidth=np.inf)
        assert_allclose(jax.jit(run)(q, k, v), want, rtol=1e-8, atol=1e-8)


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
    """Every numerator is divided by floor · ω where ω - μ·ρ is smaller."""
    q, k, v = inputs(t=5, s=5)

    def definition(q, k, v):
        weights, _ = local_linear_weights(q, k, qk_scores(q, k), ridge=0.3, floor=0.5)
        return (weighted_values(weights, v) ** 2).sum(), weights

    def blocks(q, k, v):
        return (local_linear_attention(q, k, v, ridge=0.3, floor=0.5, **SMALL) ** 2).sum(), None

    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x) for x in (q, k, v))
        (got, _), grads = jax.jit(jax.value_and_grad(blocks, (0, 1, 2), has_aux=True))(q, k, v)
        (want, bounded), wanted = jax.jit(jax.value_and_grad(definition, (0, 1, 2), has_aux=True))(
            q, k, v
        )
        jax.tree.map(
            lambda x, y: assert_allclose(x, y, rtol=1e-8, atol=1e-8), (got, grads), (want, wanted)
        )
        scores = qk_scores(q, k)
        free, rho = jax.jit(functools.partial(local_linear_weights, ridge=0.3))(q, k, scores)
        q, k, w, rho = (np.asarray(x) for x in (q, k, jnp.exp(scores), rho))
        z = np.repeat(k, 2, axis=2).swapaxes(1, 2)[:, :, None] - q.swapaxes(1, 2)[:, :, :, None]
        share = (w * (1 - np.einsum("bhtsd,bhtd->bhts", z, rho))).sum(-1) / w.sum(-1)
        assert (share < 0.5).any() and (share > 0.5).any()
        bound = np.minimum(share / 0.5, 1)[..., None]
        assert_allclose(bounded, np.asarray(free) * bound, rtol=1e-8)


def test_a_large_ridge_is_softmax_attention():
    q, k, v = inputs()
    with jax.enable_x64(True):
        q, k, v = (jnp.asarray(x) for x in (q, k, v))
        run = functools.partial(local_linear_attention, mask=Causal(), ridge=1e12, **SMALL)
        got = jax.jit(run)(q, k, v)
        assert_allclose(got, attention(q, k, v, mask=Causal()), rtol=1e-8, atol=1e-8)


def test_affine_values_are_continued_exactly():
    q, k, _ = inputs(h=2, g=2)
    rng = np.random.default_rng(2)
    slope, shift = rng.normal(size=(3, 2)), rng.normal(size=2)
    with jax.enable_x64(True):
        v = jnp.asarray(k @ slope + shift)
        run = jax.jit(functools.partial(local_linear_attention, ridge=1e-12, **SMALL))
        got = run(jnp.asarray(q), jnp.asarray(k), v)
        assert_allclose(got, q @ slope + shift, rtol=1e-6, atol=1e-6)


def test_one_visible_token_gives_its_value_and_rows_sum_to_one():
    q, k, v = (jnp.asarray(x, jnp.float32) for x in inputs(h=2, g=2))
    one = functools.partial(local_linear_attention, mask=Causal() & Window(1), **SMALL)
    assert_allclose(jax.jit(one)(q, k, v), v, rtol=1e-5, atol=1e-5)
    definition = jax.jit(functools.partial(local_linear_weights, ridge=0.1))
    weights, _ = definition(q, k, qk_scores(q, k))
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

    got, (y, captured) = call(x, Edits(key_mask=jnp.ones((1, 7), bool)))
    assert_allclose(y, got, rtol=1e-4, atol=1e-5)
    assert_allclose(captured["weights"].sum(-1), jnp.ones((2, 2, 7)), rtol=1e-4)
    hidden = Edits(key_mask=jnp.arange(7)[None] != 2)
    got, (y, captured) = call(x, hidden)
    assert not np.any(captured["weights"][..., 2])
    assert_allclose(got, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"ridge_mode": "min"},
        {"ridge": -1.0},
        {"solver": "lu"},
        {"iterations": 0},
        {"floor": -0.1},
        {"block_sizes": (0, 4)},
    ],
    ids=str,
)
def test_bad_options(options):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in inputs())
    with pytest.raises(ValueError, match=next(iter(options))):
        local_linear_attention(q, k, v, **options)
    if "block_sizes" not in options:
        with pytest.raises(ValueError, match=next(iter(options))):
            LocalLinearAttention(2, 8, rngs=nnx.Rngs(0), **options)
