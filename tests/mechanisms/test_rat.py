"""RAT: the recurrence and the attention over chunk states, by loops; reductions; the cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.attention import attention
from attnjax.cache import DenseCache, cache_bytes
from attnjax.mechanisms.memory.rat import RATAttention, rat_attention
from attnjax.models import LanguageModel, LanguageModelConfig


def rotated(x, n, base=1e4):
    """One vector at position n, halves paired."""
    half = len(x) // 2
    angle = n * base ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                           b * np.cos(angle) + a * np.sin(angle)])  # fmt: skip


def naive(q, k, v, g, chunk):
    """One head [t, d]: states by the recurrence, then softmax over chunk ends and own state."""
    t, d = q.shape
    out, ends = np.zeros_like(q), []
    for i in range(t):
        if i % chunk == 0:
            ks = xs = np.zeros(d)
        ks, xs = g[i] * ks + (1 - g[i]) * k[i], g[i] * xs + (1 - g[i]) * v[i]
        seen = [*ends, (rotated(ks, i // chunk), xs)]
        s = np.array([rotated(q[i], i // chunk) @ key for key, _ in seen]) / np.sqrt(d)
        w = np.exp(s - s.max())
        out[i] = (w / w.sum()) @ np.stack([x for _, x in seen])
        if i % chunk == chunk - 1:
            ends.append(seen[-1])
    return out


def inputs(key, t, dtype=jnp.float64):
    parts = [jax.random.normal(k, (1, t, 2, 4), dtype) for k in jax.random.split(key, 4)]
    return (*parts[:3], jax.nn.sigmoid(parts[3]))


@pytest.mark.parametrize(("t", "chunk"), [(10, 3), (8, 4), (5, 9), (4, 1)])
def test_values_by_the_definition(key, t, chunk):
    with jax.enable_x64(True):
        parts = inputs(key, t)
        got = jax.jit(rat_attention, static_argnames="chunk_size")(*parts, chunk_size=chunk)
        arrays = [np.asarray(p)[0] for p in parts]
        want = np.stack([naive(*(a[:, h] for a in arrays), chunk) for h in range(2)], 1)
        assert_allclose(got[0], want, rtol=1e-10, atol=1e-12)


def test_gradients_by_differences(key):
    with jax.enable_x64(True):
        parts = inputs(key, 7)
        ct = jax.random.normal(key, parts[0].shape)
        loss = jax.jit(lambda *p: (rat_attention(*p, chunk_size=3) * ct).sum())
        grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*parts)
        parts = [np.asarray(p) for p in parts]
        for i, grad in enumerate(map(np.asarray, grads)):
            step = np.random.default_rng(i).normal(size=grad.shape)
            moved = [
                float(loss(*(p + e * step if j == i else p for j, p in enumerate(parts))))
                for e in (1e-5, -1e-5)
            ]
            assert_allclose((grad * step).sum(), (moved[0] - moved[1]) / 2e-5, rtol=1e-6)


def test_one_chunk_is_a_gated_recurrence(key):
    with jax.enable_x64(True):
        q, k, v, g = inputs(key, 6)
        state = np.zeros((2, 4))
        got = np.asarray(jax.jit(lambda *x: rat_attention(*x, chunk_size=6))(q, k, v, g))[0]
        for i, (gi, vi) in enumerate(zip(np.asarray(g[0]), np.asarray(v[0]))):
            state = gi * state + (1 - gi) * vi
            assert_allclose(got[i], state, rtol=1e-12)


def test_chunks_of_one_token_are_softmax_attention(key):
    with jax.enable_x64(True):
        q, k, v, _ = inputs(key, 6)

        @jax.jit
        def both(q, k, v):
            got = rat_attention(q, k, v, jnp.zeros_like(q), chunk_size=1, rope_base=None)
            return got, attention(q, k, v, is_causal=True)

        got, want = both(q, k, v)
        assert_allclose(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [4, 16])
def test_the_cache_holds_one_key_and_value_per_chunk(chunk):
    """C times less than attention's cache, plus the two running states of a row."""
    module = RATAttention(4, 32, chunk_size=chunk, rngs=nnx.Rngs(0))
    cache = jax.eval_shape(lambda: module.init_cache(2, 1024))
    dense = jax.eval_shape(lambda: DenseCache.create(2, 1024, 4, 8))
    lengths, running = 2 * 4, 2 * 2 * 32 * 4
    assert (cache_bytes(cache) - lengths - running) * chunk == cache_bytes(dense) - lengths


def test_gates_start_as_in_the_paper():
    bias = RATAttention(4, 64, chunk_size=16, rngs=nnx.Rngs(0)).gate_bias[...]
    assert 0 <= bias.min() < 0.7 and 2.3 < bias.max() <= np.log(15)
    assert_array_equal(RATAttention(2, 8, chunk_size=1, rngs=nnx.Rngs(0)).gate_bias[...], 0)


def test_hybrid_with_local_attention_decodes(key):
    """Layers of RAT and sliding windows in turn, as in the paper's models."""
    config = LanguageModelConfig(
        vocab_size=11, width=16, num_layers=2, num_heads=2, mlp_width=16,
        mixers="rat(chunk_size=4), window(6)",
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    call = jax.jit(lambda state, x, **options: nnx.merge(graph, state)(x, **options))
    tokens = jax.random.randint(key, (2, 14), 0, 11)
    want = call(state, tokens)
    logits, cache = call(state, tokens[:, :6], cache=model.init_cache(2, 16))
    got = [logits]
    for i in range(6, 14):
        logits, cache = call(state, tokens[:, i : i + 1], cache=cache)
        got.append(logits)
    assert_allclose(jnp.concatenate(got, 1), want, rtol=1e-4, atol=1e-5)


def test_bad_input():
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        RATAttention(2, 8, chunk_size=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multiple of groups=3"):
        RATAttention(4, 8, groups=3, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="dropout_rate is not supported"):
        RATAttention(2, 8, dropout_rate=0.1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="gate must have the shape"):
        x = jnp.ones((1, 3, 2, 4))
        rat_attention(x, x, x, x[:, :2], chunk_size=2)
    module = RATAttention(2, 8, chunk_size=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="do not fit a cache"):
        module(jnp.ones((1, 5, 8)), cache=module.init_cache(1, 4))
