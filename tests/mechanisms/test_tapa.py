"""TAPA against its definition in NumPy, and what its parameters do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.attention import attention
from attnjax.masks import Causal
from attnjax.mechanisms.softmax.tapa import TAPA, tapa_attention, tapa_scores

T, D = 9, 8


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    return [rng.normal(size=(2, T, h, D)) for h in (4, 2, 2)]


@pytest.mark.parametrize(("theta", "causal"), [(0.5, True), (0.25, False)])
def test_equals_the_definition(arrays, theta, causal):
    q, k, v = arrays
    a = int(theta * D)
    with jax.enable_x64(True):
        mask = Causal().dense(T, T) if causal else None
        call = jax.jit(functools.partial(tapa_attention, mask=mask, theta=theta, alpha=0.3))
        out = np.asarray(call(*map(jnp.asarray, arrays)))
    for b, h in np.ndindex(2, 4):
        one, two = q[b, :, h], k[b, :, h // 2]
        distance = np.abs(np.subtract.outer(np.arange(T), np.arange(T))) ** 0.3
        phase = one[:, a:] @ two[:, a:].T / np.sqrt(D - a)
        s = one[:, :a] @ two[:, :a].T / np.sqrt(a) * np.cos(2 * np.pi * distance * phase)
        w = np.exp(s) * (np.tril(np.ones((T, T))) if causal else 1)
        want = w @ v[b, :, h // 2] / w.sum(-1, keepdims=True)
        assert_allclose(out[b, :, h], want, rtol=1e-10, atol=1e-12)


def test_without_phase_it_is_attention_on_the_amplitude(arrays):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays)

    @jax.jit
    def run(q, k, v):
        still = tapa_attention(q.at[..., 4:].set(0.0), k, v, alpha=0.7)
        pairs = (still, attention(q[..., :4], k[..., :4], v))
        return pairs, (tapa_attention(q, k, v, theta=1.0), attention(q, k, v))

    for got, want in run(q, k, v):
        assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_the_diagonal_is_the_plain_product_and_scores_are_bounded_by_it(arrays, alpha):
    q, k, _ = (jnp.asarray(x, jnp.float32) for x in arrays)
    distance = (jnp.arange(T)[:, None] - jnp.arange(T)[None])[None]
    call = jax.jit(functools.partial(tapa_scores, alpha=alpha))
    scores, plain = (np.asarray(call(q, k, d)) for d in (distance, 0 * distance))
    diagonal = np.arange(T)
    assert_allclose(scores[..., diagonal, diagonal], plain[..., diagonal, diagonal], rtol=1e-6)
    assert (np.abs(scores) <= np.abs(plain) + 1e-6).all()
    assert np.abs(scores - plain).max() > 0.1


def test_positions_matter_through_their_distance_alone(arrays):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays)
    at = jnp.asarray([[0, 1, 2, 5, 6, 7, 30, 31, 40]])

    @jax.jit
    def call(at):
        return tapa_attention(q, k, v, positions=at, key_positions=at, alpha=0.4)

    want = call(at)
    assert_allclose(call(at + 100), want, rtol=1e-5, atol=1e-5)
    assert np.abs(want - call(jnp.arange(T)[None])).max() > 1e-3


def test_cached_positions_are_exact_in_bfloat16():
    module = TAPA(1, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    cache = module.init_cache(1, 4)
    x = jnp.ones((1, 1, 4), jnp.bfloat16)
    _, cache = jax.jit(module)(x, cache=cache, positions=jnp.asarray([[100_003]]))
    assert int(cache.tokens["position"][0, 0]) == 100_003


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"theta=1.5 of a head width of 4"):
        TAPA(2, 8, theta=1.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="alpha=-1"):
        TAPA(2, 8, alpha=-1, rngs=nnx.Rngs(0))
    x = jnp.zeros((1, 3, 1, 4))
    with pytest.raises(ValueError, match=r"theta=0.0 of a head width of 4"):
        tapa_attention(x, x, x, theta=0.0)
