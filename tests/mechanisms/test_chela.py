"""CHELA: the long convolution, merged branches, and the layer written down token by token."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.linear.chela import ChelaAttention, long_convolution, merged_kernel
from attnjax.mechanisms.linear.linear_attention import linear_attention
from tests.linear.naive_layers import convolve, output, project, recurrence, rms, run, sigmoid, silu

X = np.random.default_rng(0).standard_normal((2, 70, 3))


def direct(x, kernel, ids=None):
    """y_t = Σ_i kernel_i x_{t-i} over tokens of the same document."""
    y = np.zeros_like(x)
    for t in range(x.shape[1]):
        for s in range(max(0, t + 1 - len(kernel)), t + 1):
            same = 1.0 if ids is None else (ids[:, s] == ids[:, t])[:, None]
            y[:, t] += same * kernel[t - s] * x[:, s]
    return y


@pytest.mark.parametrize("taps", [1, 20, 33, 100])
def test_long_convolution_equals_the_direct_sum(taps):
    kernel = np.random.default_rng(taps).standard_normal((taps, 3))
    ids = np.repeat([[0, 1, 2, 3], [7, 7, 1, 7]], [9, 30, 11, 20], axis=1)  # the last 7 is new
    with jax.enable_x64(True):
        call = jax.jit(long_convolution)
        got = call(jnp.asarray(X), jnp.asarray(kernel))
        packed = call(jnp.asarray(X), jnp.asarray(kernel), segment_ids=jnp.asarray(ids))
    assert_allclose(got, direct(X, kernel), atol=1e-12)
    runs = np.cumsum(np.diff(ids, axis=1, prepend=0) != 0, axis=1)
    assert_allclose(packed, direct(X, kernel, runs), atol=1e-12)


def test_rounding_never_reaches_an_earlier_token():
    """A huge late token changes no bit before it, which one FFT of the sequence would not keep."""
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal((64, 3)), jnp.float32)
    x = jnp.asarray(X, jnp.float32)
    call = jax.jit(long_convolution)
    for t in (1, 16, 47, 69):
        assert_array_equal(call(x.at[:, t].set(1e6), kernel)[:, :t], call(x, kernel)[:, :t])


def test_gradients_of_the_long_convolution():
    kernel = jnp.asarray(np.random.default_rng(1).standard_normal((40, 3)))
    with jax.enable_x64(True):
        kernel, x = (jnp.asarray(np.asarray(a), jnp.float64) for a in (kernel, X))
        ct = jnp.asarray(np.random.default_rng(2).standard_normal(X.shape))
        lag = np.arange(70)[:, None] - np.arange(70)[None]
        inside = jnp.asarray((lag >= 0) & (lag < 40))

        def matrix(x, kernel):
            toeplitz = jnp.where(inside[..., None], kernel[np.clip(lag, 0, 39)], 0.0)
            return jnp.einsum("tsc,bsc->btc", toeplitz, x)

        def pulled(f):
            return jax.jit(lambda x, kernel, ct: jax.vjp(f, x, kernel)[1](ct))(x, kernel, ct)

        got, want = (pulled(f) for f in (long_convolution, matrix))
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-11), got, want)


def test_merged_branches_are_the_sum_of_the_branches():
    rng = np.random.default_rng(0)
    kernels = [jnp.asarray(rng.standard_normal((n, 3)), jnp.float32) for n in (40, 3, 7)]
    x = jnp.asarray(X, jnp.float32)
    got, *parts = jax.jit(
        lambda x: [long_convolution(x, k) for k in (merged_kernel(*kernels), *kernels)]
    )(x)
    assert_allclose(got, functools.reduce(jnp.add, parts), rtol=1e-4, atol=1e-5)


def both_ways(x, early, late):
    """One causal convolution from the left and one from the right."""
    return convolve(x, early) + convolve(x[:, ::-1], late)[:, ::-1]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_layer_equals_its_definition(causal):
    """Causal: affine maps, divided, update gate. Both ways: linear maps, not divided, decay."""
    options = (
        dict(update_gate=True, branches=(3,))
        if causal
        else dict(causal=False, qk="linear", feature_map="identity", slopes=(0.5, 0.0))
    )
    p, x, got = run(
        lambda: ChelaAttention(
            2, 8, conv_size=3, kernel_length=9, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options
        ),
        (2, 12, 8),
    )
    window = np.exp(-np.arange(9)[:, None] * np.geomspace(1 / 9, 1, 8)[None])
    long = p["long_0"] * window
    if causal:
        short = np.exp(-np.arange(3)[:, None] * np.geomspace(1 / 3, 1, 8)[None])
        long[:, :3] += p["long_1"] * short
        z = convolve(silu(convolve(x, p["short"][0])), long[0, ::-1])
        by_head = z.reshape(2, 12, 2, 4)
        q, k = (by_head * p["factors"][i] + p["offsets"][i] for i in range(2))
        q, k = (np.where(a > 0, a + 1, np.exp(np.minimum(a, 0))) for a in (q, k))
    else:
        z = both_ways(silu(both_ways(x, *p["short"])), *long[:, ::-1])
        q, k = project(z, p["query.kernel"]) / 2, project(z, p["key.kernel"])
    v = silu(project(x, p["value.kernel"]))
    if causal:
        m = recurrence(q, k, v, 1.0) / recurrence(q, k, np.ones_like(v), 1.0)
    else:
        distance = np.abs(np.arange(12)[:, None] - np.arange(12)[None])
        decay = np.exp(-np.array([0.5, 0.0])[:, None, None] * distance)
        m = np.einsum("bthd,bshd,hts,bshe->bthe", q, k, decay, v)
    want = output(rms(m) * silu(project(z, p["gate.kernel"])), p["out.kernel"])
    if causal:
        share = sigmoid(project(z, p["update.kernel"]))
        want = share * want + (1 - share) * x
    assert_allclose(got, want, rtol=0, atol=1e-10)


def test_identity_convolutions_leave_gated_linear_attention():
    module = ChelaAttention(
        2, 8, conv_size=1, kernel_length=1, qk="linear", feature_map="identity", rngs=nnx.Rngs(0)
    )
    module.short[...] = jnp.ones_like(module.short[...])
    module.long_0[...] = jnp.ones_like(module.long_0[...])
    x = jax.random.normal(jax.random.key(0), (1, 7, 8))

    @jax.jit
    def both(x):
        z = jax.nn.silu(x)
        m = linear_attention(module.query(z), module.key(z), jax.nn.silu(module.value(x)))
        return module(x), module.out(module.norm(m) * jax.nn.silu(module.gate(z)))

    assert_allclose(*both(x), rtol=1e-4, atol=1e-6)


def test_padding_and_documents_in_both_directions():
    module = ChelaAttention(2, 8, causal=False, kernel_length=20, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 12, 8))
    first = jnp.arange(12)[None] < 6
    step = jax.jit(lambda x, valid, ids: module(x, valid=valid, segment_ids=ids))

    def call(x, valid=None, ids=None):
        ones = jnp.ones(x.shape[:2], bool) if valid is None else valid
        return step(x, ones, jnp.zeros(x.shape[:2], jnp.int32) if ids is None else ids)

    alone = call(x[:, :6])
    got = call(jnp.where(first[..., None], x, jnp.nan), valid=first)
    assert_allclose(got[:, :6], alone, rtol=1e-4, atol=1e-6)
    got = call(x, ids=1 - first.astype(jnp.int32))
    assert_allclose(got[:, :6], alone, rtol=1e-4, atol=1e-6)
    assert_allclose(got[:, 6:], call(x[:, 6:]), rtol=1e-4, atol=1e-6)


def test_cache_is_as_long_as_the_kernel():
    module = ChelaAttention(2, 8, conv_size=3, kernel_length=32, rngs=nnx.Rngs(0))
    shapes = [
        {name: a.shape for name, a in module.init_cache(3, length).state.items()}
        for length in (10, 10**6)
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0] == {"state": (3, 2, 4, 5), "short_conv": (3, 2, 8), "long_conv": (3, 31, 8)}


def test_bad_options():
    with pytest.raises(ValueError, match="qk='linear'"):
        ChelaAttention(2, 8, 16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least 1 token"):
        ChelaAttention(2, 8, kernel_length=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="feature_map='relu'"):
        ChelaAttention(2, 8, feature_map="relu", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="slopes"):
        ChelaAttention(2, 8, slopes=(1.0,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="kernel must be"):
        long_convolution(jnp.ones((1, 4, 3)), jnp.ones((4, 2)))
