"""FAST: the function against its definition, gradients, state, documents, and its errors."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.mechanisms.linear.fast_fastmax import FastAttention, fastmax, features
from attnjax.mechanisms.linear.linear_attention import linear_attention


def inputs(b=2, t=11, h=4, g=2, d=5, e=3):
    rng = np.random.default_rng(0)
    shapes = ((b, t, h, d), (b, t, g, d), (b, t, g, e))
    return [jnp.asarray(rng.standard_normal(s)) for s in shapes]


def naive(q, k, v, *, order, causal, ids=None, coefficients=(1.0, 1.0, 0.5)):
    """The matrix A of the paper, with normalization by token."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    q, k = (x - x.mean(-1, keepdims=True) for x in (q, k))
    q, k = (x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) for x in (q, k))
    x = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    f = sum(a * x**n for n, a in enumerate(coefficients[: order + 1]))
    seen = jnp.ones((1, 1, *f.shape[2:]), bool)
    if causal:
        seen = seen & jnp.tril(seen)
    if ids is not None:
        seen = seen & (ids[:, None, :, None] == ids[:, None, None])
    f = jnp.where(seen, f, 0.0)
    return jnp.einsum("bhts,bshe->bthe", f / f.sum(-1, keepdims=True), v)


IDS = np.repeat([[5, 1, 3], [2, 2, 9]], [4, 2, 5], axis=1)


@pytest.mark.parametrize(
    ("order", "causal", "packed"),
    [(1, True, False), (2, True, True), (1, False, True), (2, False, False)],
)
def test_values_and_gradients(order, causal, packed):
    """Chunks of 4 tokens, two query heads for every key head, and coefficients of one's own."""
    with jax.enable_x64(True):
        ids = jnp.asarray(IDS) if packed else None
        a = (1.5, 0.25, 0.75)
        options = dict(order=order, causal=causal)

        @functools.partial(jax.jit, static_argnums=0)
        def both(f, arguments, ct):
            out, pull = jax.vjp(f, *arguments)
            return out, pull(ct)

        ours = functools.partial(
            fastmax, coefficients=a[: order + 1], segment_ids=ids, chunk_size=4, **options
        )
        definition = functools.partial(naive, coefficients=a, ids=ids, **options)
        ct = jnp.asarray(np.random.default_rng(1).standard_normal((2, 11, 4, 3)))
        got, want = (both(f, inputs(), ct) for f in (ours, definition))
        jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-9, atol=1e-11), got, want)


def test_state_goes_on_and_has_gradients():
    """Two pieces, the second from the first one's moments, equal the whole sequence."""
    with jax.enable_x64(True):
        q, k, v = inputs()

        def pieces(k):
            _, state = fastmax(
                q[:, :6], k[:, :6], v[:, :6], causal=True, return_state=True, chunk_size=4
            )
            return fastmax(q[:, 6:], k[:, 6:], v[:, 6:], causal=True, initial_state=state)

        def whole(k):
            return fastmax(q, k, v, causal=True)[:, 6:]

        @functools.partial(jax.jit, static_argnums=0)
        def both(f, k):
            out, pull = jax.vjp(f, k)
            return out, pull(out)[0]

        got, want = both(pieces, k), both(whole, k)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, want)


def test_weights_of_order_two_are_positive_and_sum_to_one():
    """Values of ones give ones, and f = ((1 + x)² + 1) / 2 >= 1/2 keeps outputs between values."""
    q, k, v = (x.astype(jnp.float32) for x in inputs())
    out = fastmax(3 * q, k, jnp.ones_like(v), normalize="none", scale=1.0)
    assert_allclose(out, jnp.ones_like(out), rtol=1e-5)
    out = fastmax(3 * q, k, v, normalize="none", scale=1.0)
    assert out.max() <= v.max() and out.min() >= v.min()


def test_approaches_softmax_for_small_scores():
    """The first term left out is x³/6: a quarter of the scores, 1/64 of the error."""
    q, k, v = (np.asarray(x, np.float32) for x in inputs(g=4))
    errors = []
    for scale in (0.04, 0.01):
        weights = np.exp(scale * np.einsum("bthd,bshd->bhts", q, k)) * np.tri(11)
        softmax = np.einsum("bhts,bshe->bthe", weights / weights.sum(-1, keepdims=True), v)
        out = fastmax(*map(jnp.asarray, (q, k, v)), causal=True, normalize="none", scale=scale)
        errors.append(np.abs(np.asarray(out) - softmax).max())
    assert errors[1] < errors[0] / 40 and errors[0] < 0.01


def test_linear_term_is_linear_attention():
    """Moments of order 1 with a0 = 0, before the division, are those of linear attention."""
    q, k, v = (x.astype(jnp.float32) for x in inputs(g=4))
    _, state = fastmax(q, k, v, order=1, causal=True, normalize="none", return_state=True)
    _, want = linear_attention(q, k, v, return_state=True)
    assert_allclose(state[:, :, 1:, :-1], want, rtol=1e-5, atol=1e-5)
    assert_allclose(state[:, :, 0, -1], jnp.full((2, 4), 11.0))
    assert state.shape[2] == features(5, 1) == 6 and features(5, 2) == 21


def test_dropout_of_channels():
    """Its mean is that of no dropout; order 2 refuses."""
    q, k, v = (x.astype(jnp.float32) for x in inputs())
    call = functools.partial(fastmax, q, k, v, normalize="max", dropout_rate=0.1)
    drop = jax.jit(jax.vmap(lambda key: call(order=1, dropout_rng=key)))
    outs = drop(jax.random.split(jax.random.key(0), 400))
    assert_allclose(outs.mean(0), fastmax(q, k, v, order=1, normalize="max"), atol=0.05)
    with pytest.raises(NotImplementedError, match="order=1 only"):
        call(order=2, dropout_rng=jax.random.key(0))
    with pytest.raises(NotImplementedError, match="order=1 only"):
        FastAttention(2, 8, dropout_rate=0.1, rngs=nnx.Rngs(0))


def test_module_in_both_directions_with_padding():
    module = FastAttention(2, 8, causal=False, normalize="max", use_bias=True, rngs=nnx.Rngs(0))
    module.query.bias[...] = jnp.full((2, 4), 3.0)
    x = jax.random.normal(jax.random.key(0), (1, 9, 8))
    valid = jnp.arange(9)[None] < 6
    call = jax.jit(module.__call__)
    got = call(jnp.where(valid[..., None], x, jnp.nan), valid=valid)
    assert_allclose(got[:, :6], call(x[:, :6]), rtol=1e-4, atol=1e-6)


def test_bad_options():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="causal=True would see later tokens"):
        FastAttention(2, 8, normalize="max", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="order=3"):
        fastmax(q, k, v, order=3)
    with pytest.raises(ValueError, match="3 coefficients"):
        fastmax(q, k, v, coefficients=(1.0, 1.0))
    with pytest.raises(ValueError, match="a state needs causal=True"):
        fastmax(q, k, v, return_state=True)
    with pytest.raises(ValueError, match="same length when causal"):
        fastmax(q, k[:, 1:], v[:, 1:], causal=True)
