"""ALiBi, T5's relative bias and linearized relative positions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax.positions import (
    LRPE,
    AlibiScore,
    T5RelativeBias,
    alibi_bias,
    alibi_score_mod,
    alibi_slopes,
    apply_lrpe,
    apply_rope,
    lrpe_theta,
    rope_frequencies,
    t5_relative_bucket,
)
from pallas_kernels.compat import enable_x64

T, H, D = 5, 3, 6


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_alibi_slopes():
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-12)
    np.testing.assert_allclose(alibi_slopes(1), [2.0**-8])
    np.testing.assert_allclose(alibi_slopes(3), [2.0**-4, 2.0**-8, 2.0**-2])
    for n in range(1, 40):
        assert alibi_slopes(n).shape == (n,) and len(set(alibi_slopes(n))) == n
    with pytest.raises(ValueError, match="num_heads"):
        alibi_slopes(0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_alibi_score_mod_equals_bias(symmetric):
    slopes = alibi_slopes(H)
    bias = alibi_bias(slopes, np.arange(T), np.arange(T + 2), symmetric=symmetric)
    assert bias.shape == (1, H, T, T + 2) and bias.dtype == jnp.float32
    distance = np.arange(T)[:, None] - np.arange(T + 2)
    distance = abs(distance) if symmetric else distance
    np.testing.assert_allclose(bias[0], -slopes[:, None, None] * distance, rtol=1e-6)
    mod = alibi_score_mod(H, symmetric=symmetric)
    h, q, k = (
        jnp.arange(n).reshape(s) for n, s in ((H, (-1, 1, 1)), (T, (1, -1, 1)), (T + 2, (1, 1, -1)))
    )
    np.testing.assert_allclose(mod(jnp.zeros((H, T, T + 2)), 0, h, q, k), bias[0], rtol=1e-6)
    assert mod == AlibiScore(tuple(slopes), symmetric) and hash(mod) == hash(
        AlibiScore(tuple(slopes), symmetric)
    )
    late = alibi_bias(slopes, np.array([[3, 4], [7, 8]]), np.arange(T), symmetric=symmetric)
    assert late.shape == (2, H, 2, T)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (16, 1000), (4, 3)])
def test_t5_buckets(bidirectional, buckets, far):
    def bucket(relative):
        side, first = buckets, 0
        if bidirectional:
            side //= 2
            first = side if relative > 0 else 0
            n = abs(relative)
        else:
            n = max(-relative, 0)
        exact = side // 2
        if n < exact:
            return first + n
        step = math.log(n / exact) / math.log(far / exact) * (side - exact)
        return first + min(exact + int(step + 1e-6), side - 1)

    relative = np.arange(-2 * far, 2 * far)
    got = t5_relative_bucket(
        relative, num_buckets=buckets, max_distance=far, bidirectional=bidirectional
    )
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, [bucket(int(r)) for r in relative])


def test_t5_module():
    bias = T5RelativeBias(H, num_buckets=8, max_distance=20, rngs=nnx.Rngs(0))
    table = bias.embedding[...]
    assert table.shape == (8, H) and bias.embedding.axes == (None, "heads")
    got = bias(np.arange(T), np.arange(T))
    assert got.shape == (1, H, T, T)
    buckets = t5_relative_bucket(
        np.arange(T) - np.arange(T)[:, None], num_buckets=8, max_distance=20
    )
    np.testing.assert_array_equal(got[0], np.moveaxis(np.asarray(table)[buckets], -1, 0))
    positions = np.array([[0, 1, 2], [5, 9, 30]])
    batch = bias(positions, positions)
    assert batch.shape == (2, H, 3, 3)
    np.testing.assert_array_equal(
        batch[1, :, 0, 1], table[t5_relative_bucket(np.array(4), num_buckets=8, max_distance=20)]
    )
    grad = nnx.grad(lambda m: m(np.arange(T), np.arange(T)).sum())(bias)
    assert float(grad.embedding[...].sum()) == pytest.approx(H * T * T)
    with pytest.raises(ValueError, match="max_distance"):
        t5_relative_bucket(np.arange(3), num_buckets=32, max_distance=4)
    low = T5RelativeBias(H, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert low(np.arange(2), np.arange(2)).dtype == jnp.bfloat16


def test_lrpe_cosine_is_a_cosine_of_the_distance():
    q, k = random(1, T, H, D), random(1, T, H, D, seed=1)
    theta = lrpe_theta(H, D)
    np.testing.assert_allclose(theta.ravel(), 10000.0 ** (-2 * np.arange(H * D) / (H * D)))
    with enable_x64(True):
        eq, ek = (apply_lrpe(x, np.arange(T) + 7, theta) for x in (q, k))
        assert eq.shape == (1, T, H, 2 * D)
        got = jnp.einsum("bthd,bshd->bhts", eq, ek)
        distance = np.arange(T)[:, None] - np.arange(T)
        cosine = np.cos(distance[:, :, None, None] * theta)
        want = np.einsum("bthd,bshd,tshd->bhts", q, k, cosine)
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-10)


def test_lrpe_rotation_is_rope():
    x = random(2, T, H, D).astype(np.float32)
    inv_freq, _ = rope_frequencies(D)
    positions = np.array([[3, 1, 4, 1, 5], [0, 1, 2, 3, 4]])
    got = apply_lrpe(x, positions, inv_freq, kind="rotation")
    np.testing.assert_array_equal(got, apply_rope(x, positions, inv_freq))


def test_lrpe_permutation_depends_on_distance_only():
    q, k = random(1, T, H, D), random(1, T, H, D, seed=1)

    def scores(shift):
        eq, ek = (apply_lrpe(x, np.arange(T) + shift, kind="permutation") for x in (q, k))
        return jnp.einsum("bthd,bshd->bhts", eq, ek)

    with enable_x64(True):
        np.testing.assert_allclose(scores(0), scores(11), rtol=1e-9)
        want = np.array(
            [[np.roll(q[0, t, 0], s - t) @ k[0, s, 0] for s in range(T)] for t in range(T)]
        )
        np.testing.assert_allclose(scores(0)[0, 0], want, rtol=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "rotation"])
def test_lrpe_module(kind):
    module = LRPE(H, D, kind=kind, rngs=nnx.Rngs(0))
    x = random(1, T, H, D).astype(np.float32)
    assert isinstance(module.theta, nnx.Param) and module.theta.axes == ("heads", "head_dim")
    y = module(x, np.arange(T))
    np.testing.assert_array_equal(y, apply_lrpe(x, np.arange(T), module.theta[...], kind=kind))
    grad = nnx.grad(
        lambda m: (m(x, np.arange(T)) * jnp.arange(T, dtype=jnp.float32).reshape(1, -1, 1, 1)).sum()
    )(module)
    assert np.abs(grad.theta[...]).max() > 0
    fixed = LRPE(H, D, kind=kind, learned=False)
    assert not isinstance(fixed.theta, nnx.Param)
    np.testing.assert_array_equal(fixed(x, np.arange(T)), y)
    low = apply_lrpe(jnp.asarray(x, jnp.bfloat16), np.arange(T), module.theta[...], kind=kind)
    assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("kind", "theta", "message"),
    [
        ("cosine", None, "needs theta"),
        ("cosine", np.ones(D // 2), "needs theta"),
        ("rotation", np.ones((H + 1, D // 2)), "frequencies must have shape"),
        ("spiral", np.ones(D), "kind must be"),
    ],
)
def test_lrpe_bad_input(kind, theta, message):
    with pytest.raises(ValueError, match=message):
        apply_lrpe(np.zeros((1, T, H, D), np.float32), np.arange(T), theta, kind=kind)


def test_everything_is_jittable():
    x = random(1, T, H, D).astype(np.float32)
    positions = jnp.arange(T)
    for kind, planes in (("cosine", D), ("rotation", D // 2), ("permutation", 0)):
        theta = lrpe_theta(H, planes) if planes else None
        got = jax.jit(lambda x, p, kind=kind, theta=theta: apply_lrpe(x, p, theta, kind=kind))(
            x, positions
        )
        np.testing.assert_allclose(got, apply_lrpe(x, positions, theta, kind=kind), atol=1e-6)
