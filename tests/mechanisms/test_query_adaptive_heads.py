"""QAdA: moments of far keys, what they decide, and attention under the decision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.sparse.query_adaptive_heads import (
    QueryAdaptiveAttention,
    gaussian_log_mass,
    key_moments,
    local_share,
    query_adaptive_attention,
    running_log_mass,
)

SINKS, LOCAL, T = 2, 3, 16


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def layer(**options):
    options = {"sinks": SINKS, "local": LOCAL, "tau": 0.6, "rope_base": 1e4, **options}
    return QueryAdaptiveAttention(4, 16, num_kv_heads=2, rngs=nnx.Rngs(0), **options)


def jitted(module):
    graph, state = nnx.split(module)
    return jax.jit(lambda x, **options: nnx.merge(graph, state)(x, **options))


def naive_rest(q, k, ids=None, oracle=False):
    """(log Σ over local keys, estimate or true value for the rest), [b, t, h] in float64."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    b, t, h, d = q.shape
    ids = np.zeros((b, t), int) if ids is None else np.asarray(ids)
    near, rest = np.zeros((b, t, h)), np.full((b, t, h), -np.inf)
    for n, i, head in np.ndindex(b, t, h):
        past = [j for j in range(i + 1) if ids[n, j] == ids[n, i]]
        far = [j for j in past[SINKS:] if i - j >= LOCAL]
        keys = k[n, :, head // (h // k.shape[2])] / np.sqrt(d)
        scores = keys @ q[n, i, head]
        near[n, i, head] = np.logaddexp.reduce(scores[[j for j in past if j not in far]])
        if far and oracle:
            rest[n, i, head] = np.logaddexp.reduce(scores[far])
        elif far:
            spread = np.cov(keys[far].T, bias=True)
            value = q[n, i, head] @ keys[far].mean(0) + q[n, i, head] @ spread @ q[n, i, head] / 2
            rest[n, i, head] = np.log(len(far)) + value
    return near, rest


@pytest.mark.parametrize("packed", [False, True])
def test_running_moments_are_those_of_the_far_keys(packed):
    q, k = normal(0, 2, T, 4, 8), normal(1, 2, T, 2, 8) + 3
    ids = jnp.stack([jnp.arange(T) // 9, jnp.arange(T) // 5]) if packed else None
    got, _ = jax.jit(
        lambda q, k: running_log_mass(q, k, sinks=SINKS, local=LOCAL, segment_ids=ids)
    )(q, k)
    assert_allclose(got, naive_rest(q, k, ids)[1], rtol=1e-4, atol=1e-4)


def test_moments_survive_a_large_mean():
    """In float32, with keys a thousand deviations away from 0."""
    q, k = normal(0, 1, 40, 1, 4), normal(1, 1, 40, 1, 4) + 1000
    got, _ = running_log_mass(q, k, sinks=SINKS, local=LOCAL, scale=0.5)
    want = naive_rest(q, k)[1]
    assert_allclose(got[0, 5:] - want[0, 5:], 0, atol=2e-2)  # scores are around 2000


@pytest.mark.parametrize("criterion", ["running", "oracle"])
def test_value_and_gradients(criterion):
    q, k, v = normal(0, 2, T, 4, 8), normal(1, 2, T, 2, 8), normal(2, 2, T, 2, 5)
    log_near, log_rest = naive_rest(q, k, oracle=criterion == "oracle")
    local = 1 / (1 + np.exp(log_rest - log_near)) >= 0.5
    far = log_rest > -np.inf
    assert 0.1 < local[far].mean() < 0.9
    i, j = np.arange(T)[:, None], np.arange(T)
    near = (j < SINKS) | (i - j < LOCAL)
    seen = jnp.asarray((j <= i) & (near | ~local.transpose(0, 2, 1)[..., None]))

    def naive(q, k, v):
        k, v = (jnp.repeat(x, 2, 2) for x in (k, v))
        scores = jnp.where(seen, jnp.einsum("bthd,bshd->bhts", q, k) / 8**0.5, -jnp.inf)
        return jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(scores), v)

    def ours(q, k, v):
        return query_adaptive_attention(
            q, k, v, sinks=SINKS, local=LOCAL, tau=0.5, criterion=criterion
        )

    def loss(fn):
        return jax.value_and_grad(lambda *a: (lambda o: ((o**2).sum(), o))(fn(*a)), range(3), True)

    got, want = (jax.jit(loss(fn))(q, k, v) for fn in (ours, naive))
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_estimates():
    """Exact for equal keys, close for many Gaussian ones, and -inf for none."""
    q = normal(0, 1, 5, 2, 8)
    k = jnp.broadcast_to(normal(1, 1, 1, 2, 8), (1, 7, 2, 8))
    want = np.log(7) + jnp.einsum("bthd,bhd->bth", q, k[:, 0]) / 8**0.5
    assert_allclose(gaussian_log_mass(q, key_moments(k), 7), want, rtol=1e-5)
    k = normal(2, 1, 4000, 2, 8)
    true = jax.nn.logsumexp(jnp.einsum("bthd,bshd->bths", q, k) / 8**0.5, axis=-1)
    assert_allclose(gaussian_log_mass(q, key_moments(k), 4000), true, atol=0.1)
    nothing = gaussian_log_mass(q, key_moments(k, jnp.zeros((1, 4000), bool)), 0)
    assert_array_equal(nothing, jnp.full((1, 5, 2), -jnp.inf))
    assert_array_equal(local_share(jnp.zeros(()), nothing), jnp.ones((1, 5, 2)))


@pytest.mark.parametrize("tau", [1.1, 0.0])
def test_reduces_to_dense_and_to_streaming(tau):
    options = {"window": LOCAL, "sinks": SINKS} if tau == 0 else {}
    dense = MultiHeadAttention(
        4, 16, num_kv_heads=2, causal=True, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(1),
        **options,
    )  # fmt: skip
    module = layer(tau=tau)
    nnx.update(dense, nnx.state(module, nnx.Param))
    x = normal(0, 2, 9, 16)
    assert_allclose(jitted(module)(x), jitted(dense)(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("criterion", ["stored", "oracle"])
def test_other_criteria_decode_too(criterion):
    module = layer(criterion=criterion, tau=0.7)
    if criterion == "stored":
        text = normal(3, 2, 30, 16)
        module.calibrate(text)
        keys = module.rotate(module.begin(text), module.query(text), module.key(text))[1]
        far = keys[:, SINKS : 30 - LOCAL].reshape(1, -1, 2, 4)
        assert_allclose(module.covariance[...], key_moments(far).covariance, rtol=1e-5)
    call, x = jitted(module), normal(4, 2, 12, 16)
    want = call(x)
    assert np.abs(want - jitted(layer(tau=1.1))(x)).max() > 1e-3
    cache = module.init_cache(2, 12)
    for start, stop in ((0, 5), (5, 10), (10, 11), (11, 12)):
        y, cache = call(x[:, start:stop], cache=cache)
        assert_allclose(y, want[:, start:stop], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local": 0}, "local >= 1"),
        ({"sinks": -1}, "sinks >= 0"),
        ({"criterion": "guess"}, "criterion='guess'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_bad_calls():
    q = normal(0, 1, 4, 2, 8)
    with pytest.raises(ValueError, match="need each other"):
        query_adaptive_attention(q, q, q, criterion="stored")
    with pytest.raises(ValueError, match="more than sinks"):
        layer(criterion="stored").calibrate(normal(0, 1, 5, 16))
