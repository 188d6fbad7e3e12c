"""ComplexFormer against its definition in complex numbers, and its limits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.complexformer import (
    ComplexFormer,
    adapt_angles,
    complexformer_attention,
    euler_rotation,
)
from attnjax.positions import apply_rope
from attnjax.positions.angles import inverse_powers

T, H, D = 7, 2, 8


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    q, k, v = rng.normal(size=(3, 2, T, H, D))
    return q, k, v, 1 + 0.5 * rng.normal(size=(H, D // 2)), rng.normal(size=(H, D // 2))


def naive_scores(q, k, delta, bias):
    """One head: Re Σ_c q'_c conj(k'_c) / sqrt(d), in complex numbers."""
    q, k = (x[:, 0::2] + 1j * x[:, 1::2] for x in (q, k))
    turn = np.exp(1j * np.arange(T)[:, None] / 10000 ** (np.arange(0, D, 2) / D))
    q = abs(q) * np.exp(1j * (delta * np.angle(q) + bias)) * turn
    k = abs(k) * np.exp(1j * delta * np.angle(k)) * turn
    return np.real(q @ k.conj().T) / np.sqrt(D)


def test_equals_the_definition(arrays):
    with jax.enable_x64(True):
        out, sites = complexformer_attention(*map(jnp.asarray, arrays), capture=("scores",))
    q, k, v, delta, bias = arrays
    for b, h in np.ndindex(2, H):
        scores = naive_scores(q[b, :, h], k[b, :, h], delta[h], bias[h])
        assert_allclose(sites["scores"][b, h], scores, rtol=1e-10, atol=1e-12)
        w = np.exp(scores)
        assert_allclose(out[b, :, h], w @ v[b, :, h] / w.sum(-1, keepdims=True), rtol=1e-10)


def test_without_adaptation_it_is_rope_bit_by_bit(arrays):
    q = jnp.asarray(arrays[0], jnp.float32)
    at = jnp.arange(T)
    got = adapt_angles(q, at, jnp.ones((H, D // 2)), jnp.zeros((H, D // 2)))
    want = apply_rope(q, at, jnp.asarray(inverse_powers(1e4, D), jnp.float32), layout="interleaved")
    assert_array_equal(got, want)


def test_delta_zero_keeps_magnitudes_and_positions_only(arrays):
    q = jnp.asarray(arrays[0], jnp.float32)
    zero = jnp.zeros((H, D // 2))
    pairs = adapt_angles(q, jnp.arange(T), zero).reshape(2, T, H, D // 2, 2)
    angle = np.arange(T)[:, None] * inverse_powers(1e4, D)[None]
    magnitude = jnp.hypot(q[..., 0::2], q[..., 1::2])
    assert_allclose(
        pairs[..., 0],
        magnitude * np.cos(angle, dtype=np.float32)[None, :, None],
        rtol=1e-5,
        atol=1e-5,
    )


def test_scores_depend_on_the_distance_of_positions(arrays):
    given = [jnp.asarray(x, jnp.float32) for x in arrays]
    at = jnp.arange(T) + 50
    got = complexformer_attention(*given, positions=at, key_positions=at)
    assert_allclose(got, complexformer_attention(*given), rtol=1e-4, atol=1e-5)


def test_zero_vectors_have_finite_gradients():
    x = jnp.zeros((1, 2, 1, 4)).at[0, 0, 0, 0].set(1.0)
    delta, bias = jnp.full((1, 2), 0.5), jnp.ones((1, 2))

    def loss(x, delta, bias):
        return adapt_angles(x, jnp.arange(2), delta, bias).sum()

    assert all(np.isfinite(g).all() for g in jax.grad(loss, (0, 1, 2))(x, delta, bias))


def test_euler_rotation_spreads_frequencies_over_the_whole_width(arrays):
    x = jnp.asarray(arrays[0], jnp.float32).reshape(2, T, H * D)
    got = euler_rotation(x, jnp.float32(1.0))
    frequencies = jnp.asarray(inverse_powers(1e4, H * D), jnp.float32)
    want = apply_rope(x[:, :, None], jnp.arange(T), frequencies, layout="interleaved")
    assert_array_equal(got, want[:, :, 0])


def test_bad_sizes_are_named(arrays):
    q = jnp.asarray(arrays[0], jnp.float32)
    with pytest.raises(ValueError, match="delta must have shape"):
        adapt_angles(q, jnp.arange(T), jnp.ones((H, D)))
    with pytest.raises(ValueError, match="must be even"):
        ComplexFormer(2, 6, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="num_kv_heads=1 is not supported"):
        ComplexFormer(2, 8, num_kv_heads=1, rngs=nnx.Rngs(0))
