"""Mixture-of-head attention: gates by the formulas, both routers, head skipping, balance loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.attention import attention
from attnjax.mechanisms.gates.moh import (
    MoHAttention,
    moh_balance_loss,
    moh_gates,
    moh_norm_router,
    moh_selection,
)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def naive_gates(routed, shared, balance, k, n, code=True):
    """One token: logits of routed heads, shared heads, and their balance."""
    p = softmax(routed)
    chosen = np.zeros_like(p)
    best = np.argsort(-p, kind="stable")[:k]
    chosen[best] = k * p[best] / p[best].sum() if code else p[best]
    if n == 0:
        return chosen
    g = softmax(shared) * (n if code else 1)
    w = softmax(balance) * (2 if code else 1)
    return np.concatenate([w[0] * g, w[1] * chosen])


@pytest.mark.parametrize("normalize", ["code", "paper"])
def test_gates_by_the_formula(key, normalize):
    with jax.enable_x64(True):
        parts = [
            jax.random.normal(k, (3, n), jnp.float64)
            for k, n in zip(jax.random.split(key, 3), (5, 2, 2))
        ]
        got = moh_gates(*parts, top_k=2, num_shared=2, normalize=normalize)
        rows = zip(*map(np.asarray, parts))
        want = np.stack([naive_gates(*row, 2, 2, normalize == "code") for row in rows])
        assert_allclose(got, want, rtol=1e-12)


def test_gradients_of_gates(key):
    """The choice is constant: gradients are those of the formula with the mask held fixed."""
    with jax.enable_x64(True):
        logits = jax.random.normal(key, (4, 5), jnp.float64)
        chosen = moh_selection(jax.nn.softmax(logits), 2).astype(jnp.float64)
        ct = jnp.arange(20.0).reshape(4, 5)

        def fixed(x):
            p = jax.nn.softmax(x) * chosen
            return (2 * p / p.sum(-1, keepdims=True) * ct).sum()

        got = jax.jit(jax.grad(lambda x: (moh_gates(x, top_k=2) * ct).sum()))(logits)
        assert_allclose(got, jax.jit(jax.grad(fixed))(logits), rtol=1e-10, atol=1e-12)


def test_gates_are_one_on_average(key):
    parts = [jax.random.normal(k, (6, n)) for k, n in zip(jax.random.split(key, 2), (6, 2))]
    gates = moh_gates(*parts, jnp.zeros((6, 2)), top_k=3, num_shared=2)
    assert_allclose(gates[:, :2].sum(-1), 2, rtol=1e-6)
    assert_allclose(gates[:, 2:].sum(-1), 3, rtol=1e-6)
    assert_array_equal((gates[:, 2:] > 0).sum(-1), 3)


def test_of_equal_scores_the_first_heads_are_chosen():
    assert_array_equal(moh_selection(jnp.zeros((1, 4)), 2)[0], [True, True, False, False])


def called(module, x, capture=()):
    """One compiled call."""
    graph, state = nnx.split(module)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x, capture=capture))(state, x)


def test_all_heads_and_a_router_of_zeros_is_plain_attention(key):
    module = MoHAttention(4, 8, num_shared=1, top_k=3, rngs=nnx.Rngs(0))
    for router in (module.route, module.balance):
        router.kernel[...] = jnp.zeros_like(router.kernel[...])
    _, captured = called(module, jax.random.normal(key, (2, 7, 8)), ("z", "q", "k", "v"))
    want = attention(captured["q"], captured["k"], captured["v"], is_causal=True)
    assert_allclose(captured["z"], want, rtol=1e-5, atol=1e-6)


def test_norm_router_by_the_formula(key):
    with jax.enable_x64(True):
        q = jax.random.normal(key, (2, 3, 4, 6), jnp.float64)
        norms = np.linalg.norm(np.asarray(q), axis=-1)
        want = softmax(norms / norms.std(-1, ddof=1, keepdims=True))
        assert_allclose(jax.jit(moh_norm_router)(q), want, rtol=1e-12)
        grad = jax.jit(jax.grad(lambda q: moh_norm_router(q)[..., 0].sum()))(jnp.zeros_like(q))
        assert np.isfinite(grad).all()


def test_norm_router_keeps_whole_heads(key):
    """The straight-through form has the same output, and a gradient through the probabilities."""
    x = jax.random.normal(key, (2, 7, 8))
    module = MoHAttention(4, 8, num_shared=1, top_k=1, router="norm", rngs=nnx.Rngs(0))
    y, captured = called(module, x, ("z", "q", "k", "v"))
    plain = attention(captured["q"], captured["k"], captured["v"], is_causal=True)
    on = (jnp.abs(captured["z"]) > 0).any(-1)
    assert_array_equal(on[..., :1], True)
    assert_array_equal(on[..., 1:].sum(-1), 1)
    assert_allclose(captured["z"], jnp.where(on[..., None], plain, 0), rtol=1e-5, atol=1e-6)
    slopes = []
    for straight_through in (False, True):
        module.straight_through = straight_through
        graph, state = nnx.split(module)

        def total(x, graph=graph, state=state):
            return nnx.merge(graph, state)(x).sum()

        value, slope = jax.jit(jax.value_and_grad(total))(x)
        assert_allclose(value, y.sum(), rtol=1e-5)
        slopes.append(slope)
    assert np.abs(slopes[0] - slopes[1]).max() > 1e-3


def test_balance_loss():
    """Uniform routing gives k; all tokens on one set of heads gives more; padding is left out."""
    p = jnp.full((1, 6, 3), 1 / 3)
    chosen = jnp.tile(jnp.eye(3, dtype=bool), (2, 1))[None]
    assert_allclose(moh_balance_loss(p, chosen), 1, rtol=1e-6)
    skewed = jnp.zeros((1, 6, 3)).at[..., 0].set(1.0)
    assert_allclose(moh_balance_loss(skewed, skewed > 0), 3, rtol=1e-6)
    valid = jnp.arange(6)[None] < 3
    mixed = jnp.where(valid[..., None], p, skewed)
    picked = jnp.where(valid[..., None], chosen, skewed > 0)
    assert_allclose(moh_balance_loss(mixed, picked, valid), 1, rtol=1e-6)


def test_aux_loss_is_tapped_with_its_coefficient(key):
    x = jax.random.normal(key, (2, 7, 8))
    losses = []
    module = MoHAttention(4, 8, num_shared=1, top_k=3, rngs=nnx.Rngs(0))
    for coefficient in (0.01, 1.0):
        module.aux_coefficient = coefficient
        losses.append(called(module, x, "aux_loss")[1]["aux_loss"])
    assert_allclose(losses[0], 0.01 * losses[1], rtol=1e-5)
    assert losses[1] > 2


def test_skipped_heads_change_nothing_and_cost_nothing(key):
    """A step that computes 3 of 8 heads: the same output for 3/8 of the attention's products."""
    x = jax.random.normal(key, (2, 6, 16))
    module = MoHAttention(
        8, 16, 64, num_kv_heads=2, num_shared=1, top_k=2, rope_base=1e4, rngs=nnx.Rngs(0)
    )
    outputs, flops = [], []
    for skip in (False, True):
        module.skip_heads = skip
        graph, state = nnx.split(module)

        @jax.jit
        def step(state, x, cache, graph=graph):
            return nnx.merge(graph, state)(x, cache=cache)

        if not skip:
            _, cache = step(state, x[:, :5], module.init_cache(2, 512))
        compiled = step.lower(state, x[:, 5:], cache).compile()
        outputs.append(compiled(state, x[:, 5:], cache)[0])
        flops.append(compiled.cost_analysis()["flops"])
    assert_allclose(*outputs, rtol=1e-5, atol=1e-6)
    # 2 products of 2 b h s d operations, for 5 heads fewer; softmax and projections come on top
    assert flops[0] - flops[1] > 2 * 2 * 2 * 5 * 512 * 8
    assert flops[1] < 0.6 * flops[0]


def test_skipping_refuses_what_needs_all_heads(key):
    module = MoHAttention(4, 8, skip_heads=True, rngs=nnx.Rngs(0))
    cache = module.init_cache(1, 4)
    with pytest.raises(NotImplementedError, match="capture='scores' with skip_heads=True"):
        module(jnp.ones((1, 1, 8)), cache=cache, capture="scores")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(num_shared=5), "num_shared=5"),
        (dict(num_shared=2, top_k=3), "top_k=3 must be at least 1 and at most the 2"),
        (dict(router="hash"), "router must be one of"),
        (dict(normalize="none"), "normalize must be one of"),
        (dict(num_shared=3, top_k=1, router="norm"), "at least 2 routed heads"),
        (dict(router="norm", normalize="paper"), "normalize='paper' has no meaning"),
        (dict(straight_through=True), "straight_through=True is for router='norm'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        MoHAttention(4, 8, **options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shared", [0, 1, 4])
def test_no_shared_one_shared_all_shared(key, shared):
    module = MoHAttention(4, 8, num_shared=shared, qk_norm=True, rngs=nnx.Rngs(0))
    y, captured = called(module, jax.random.normal(key, (2, 7, 8)), "aux_loss")
    assert np.isfinite(y).all() and captured["aux_loss"].shape == ()
