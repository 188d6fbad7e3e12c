"""Cog attention against its definition in NumPy: signs, empty rows, zero scores, softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.cog_attention import CogAttention, cog_attention, cog_weights
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention

T, S, H, G, D = 5, 7, 4, 2, 6


def naive(q, k, v, keep):
    """One row and head; also for complex numbers, whose imaginary parts are derivatives."""
    s = np.einsum("td,sd->ts", q, k) / np.sqrt(D)
    sign = np.sign(s.real)
    e = np.where(keep, np.exp(sign * s), 0)
    total = e.sum(-1, keepdims=True)
    return sign * e / np.where(total == 0, 1, total) @ v


def test_value_and_gradients_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, h, D)) for n, h in ((T, H), (S, G), (S, G)))
    keep = rng.random((2, 1, T, S)) < 0.6
    keep[0, 0, 2] = False
    weight = rng.normal(size=(2, T, H, D))

    def loss(q, k, v):
        out = cog_attention(q, k, v, mask=jnp.asarray(keep))
        return (out * jnp.asarray(weight)).sum(), out

    with jax.enable_x64(True):
        given = [jnp.asarray(x) for x in (q, k, v)]
        (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*given)
    want = np.zeros(out.shape)
    slopes = [np.zeros(x.shape) for x in (q, k, v)]
    for b, h in np.ndindex(2, H):
        g = h // (H // G)
        parts = [x[b, :, i] for x, i in ((q, h), (k, g), (v, g))]
        want[b, :, h] = naive(*parts, keep[b, 0])
        for slope, i, place in zip(slopes, (h, g, g), range(3), strict=True):
            for at in np.ndindex(parts[place].shape):
                moved = [part.astype(complex) for part in parts]
                moved[place][at] += 1e-30j
                change = naive(*moved, keep[b, 0]).imag / 1e-30
                slope[b, at[0], i, at[1]] += (change * weight[b, :, h]).sum()
    assert_allclose(out, want, rtol=1e-10, atol=1e-12)
    assert_array_equal(out[0, 2], np.zeros((H, D)))  # a row without keys
    for got, slope in zip(grads, slopes, strict=True):
        assert_allclose(got, slope, rtol=1e-9, atol=1e-11)


def test_magnitudes_sum_to_one_and_a_score_of_zero_has_no_weight():
    scores = jnp.asarray([[[[3.0, -3.0, 0.0, -500.0]]], [[[0.0, 0.0, 0.0, 0.0]]]])
    weights, pull = jax.vjp(jax.jit(cog_weights), scores)
    assert_allclose(weights[0, 0, 0], [0.0, 0.0, 0.0, -1.0], atol=1e-6)
    assert not weights[1].any()
    near = cog_weights(scores[:1, ..., :3])[0, 0, 0]
    e = np.exp(3.0)
    assert_allclose(near, np.array([e, -e, 0]) / (2 * e + 1), rtol=1e-6)
    assert np.isfinite(pull(weights + 1)[0]).all()


def test_positive_scores_are_softmax_attention():
    """Keys equal queries of width 1, and all inputs have one sign: no product is below 0."""
    ours, softmax = (
        kind(2, 2, causal=True, use_bias=False, rngs=nnx.Rngs(0))
        for kind in (CogAttention, MultiHeadAttention)
    )
    ours.key.kernel[...] = ours.query.kernel[...]
    nnx.update(softmax, nnx.state(ours, nnx.Param))
    x = jnp.abs(jax.random.normal(jax.random.key(1), (2, T, 2))).at[..., 1].set(0)
    got, want = jax.jit(lambda x: (ours(x), softmax(x)))(x)
    assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_module_shows_and_takes_signed_weights():
    module = CogAttention(2, 8, num_kv_heads=1, rope_base=1e4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, T, 8))
    y, sites = jax.jit(lambda x: module(x, capture=("weights", "v", "z")))(x)
    weights = np.asarray(sites["weights"])
    assert (weights < 0).any() and (weights > 0).any()
    assert_allclose(np.abs(weights).sum(-1), 1.0, rtol=1e-5)
    z = np.einsum("bhts,bsd->bthd", weights, sites["v"][:, :, 0])
    assert_allclose(sites["z"], z, rtol=1e-5, atol=1e-6)
    assert y.shape == x.shape


def test_bad_input_is_named():
    q = jnp.zeros((1, 3, 3, 4))
    with pytest.raises(ValueError, match="cog_attention.*heads"):
        cog_attention(q, q[:, :, :2], q[:, :, :2])
    with pytest.raises(ValueError, match="even"):
        CogAttention(2, 6, rope_base=1e4, rngs=nnx.Rngs(0))(jnp.zeros((1, 3, 6)))
    with pytest.raises(ValueError, match="a cache needs causal=True"):
        CogAttention(2, 8, causal=False, rngs=nnx.Rngs(0)).init_cache(1, 4)
