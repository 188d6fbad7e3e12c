"""LongHeads: chunk keys, choice of chunks, and renumbered positions, by the definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.sparse import longheads
from attnjax.mechanisms.sparse.longheads import (
    LongHeadsAttention,
    longheads_attention,
    select_chunks,
)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rope(x, positions, base=1e4):
    d = x.shape[-1]
    angle = np.asarray(positions, float)[:, None] * base ** (-2 * np.arange(d // 2) / d)
    x1, x2 = x[:, : d // 2], x[:, d // 2 :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


def naive(q, k, v, w, chosen, cut=False):
    """One head [t, d]: the chosen keys are written out and rotated for every query."""
    t, d = q.shape
    keys = []
    for start in range(0, t - w + 1, w):
        part = slice(start, start + w)
        qc, kc = rope(q[part], range(w)), rope(k[part], range(w))
        summary = (softmax(qc @ kc.T / d**0.5) @ v[part]).mean(0)
        keys.append(softmax(summary @ kc.T / d**0.5) @ kc)
    out = np.zeros_like(q)
    for i in range(t):
        own = i // w
        if own < chosen:
            read = list(range(own + 1))
        else:
            scores = {j: q[i] @ keys[j] for j in range(1, own - 1)}
            best = sorted(scores, key=lambda j: (-scores[j], j))[: chosen - 3]
            read = sorted([0, *best, own - 1, own])
        tokens = [j for c in read for j in range(c * w, (c + 1) * w)]
        position = min(own, chosen - 1) * w + i % w
        tokens = tokens[: position + (0 if cut and own >= chosen else 1)]
        rotated = rope(k[tokens], range(len(tokens)))
        scores = rotated @ rope(q[i : i + 1], [position])[0] / d**0.5
        out[i] = softmax(scores) @ v[tokens]
    return out


@pytest.mark.parametrize("cut", [False, True])
def test_definition(cut):
    """Grouped heads, an unfinished last chunk; float64."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, 28, h, 4)) for h in (4, 2, 2))
    heads = [(b, h, h // 2) for b in range(2) for h in range(4)]
    want = np.stack([naive(q[b, :, h], k[b, :, g], v[b, :, g], 3, 4, cut) for b, h, g in heads])
    want = want.reshape(2, 4, 28, 4).swapaxes(1, 2)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in (q, k, v)]
        call = functools.partial(
            longheads_attention, chunk=3, attended=12, official_prefill_cut=cut
        )
        assert_allclose(jax.jit(call)(*arrays), want, atol=1e-12)


def test_few_queries_at_a_time_give_the_same(monkeypatch):
    """Values and gradients do not depend on how many keys are gathered at once."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 20, 2, 4))

    def loss(q, k, v):
        return (longheads_attention(q, k, v, chunk=2, attended=8) ** 2).sum()

    want = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)
    monkeypatch.setattr(longheads, "GATHERED_KEYS", 24)  # three queries
    got = jax.jit(jax.value_and_grad(lambda *a: loss(*a), argnums=(0, 1, 2)))(q, k, v)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_choice_of_chunks():
    query = jnp.ones((1, 1, 1, 1))
    keys = jnp.array([9.0, 1.0, 3.0, 3.0, 2.0, 7.0, 8.0, 9.0]).reshape(1, 8, 1, 1)

    def read(at, chosen):
        where, there = select_chunks(query, keys, jnp.array([[at]], jnp.int32), chosen, 10)
        return where[there].tolist()

    assert read(65, 4) == [0, 2, 5, 6]  # of 2 and 3, which tie, the older
    assert read(65, 5) == [0, 2, 3, 5, 6]
    assert read(65, 3) == [0, 5, 6]
    assert read(25, 4) == [0, 1, 2]
    assert read(3, 4) == [0]


def test_short_texts_are_ordinary_attention():
    """Up to `attended` tokens nothing changes, in one call or token by token."""
    options = dict(num_kv_heads=2, rope_base=1e4, use_bias=False)
    module = LongHeadsAttention(4, 16, chunk=3, attended=9, rngs=nnx.Rngs(0), **options)
    dense = MultiHeadAttention(4, 16, causal=True, rngs=nnx.Rngs(0), **options)
    x = jax.random.normal(jax.random.key(0), (1, 11, 16))
    want, short, long = jax.jit(lambda x: (dense(x), module(x[:, :9]), module(x)))(x)
    assert_allclose(short, want[:, :9], rtol=1e-4, atol=1e-5)
    # from the tenth token on chunk 1 is left out
    assert_allclose(long[:, :9], want[:, :9], rtol=1e-4, atol=1e-5)
    assert np.abs(long[:, 9:] - want[:, 9:]).max() > 1e-3


def test_distances_stay_in_the_trained_range():
    """A text of 20 chunks is read with angles of at most K w tokens."""
    original = longheads.apply_rope

    def farthest(x):
        positions = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                longheads, "apply_rope", lambda x, at, f: positions.append(at) or original(x, at, f)
            )
            longheads_attention(*x, chunk=2, attended=8)
        return [p.max() for p in positions]

    x = jax.random.normal(jax.random.key(0), (3, 1, 40, 1, 2))
    assert max(jax.jit(farthest)(x)) == 4 * 2 - 1


def test_chunk_keys_are_made_once():
    """The cache after any chunks of input holds the keys of the whole text's chunks."""
    module = LongHeadsAttention(2, 8, chunk=3, attended=9, rope_base=1e4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 14, 8))
    step = jax.jit(lambda x, cache: module(x, cache=cache)[1])
    whole = step(x, module.init_cache(1, 14))
    cache = module.init_cache(1, 14)
    for start, stop in ((0, 7), (7, 14)):
        cache = step(x[:, start:stop], cache)
    assert_allclose(cache.chunk_key, whole.chunk_key, rtol=1e-5, atol=1e-6)
    assert np.abs(whole.chunk_key[:, 3]).max() > 0
    assert_array_equal(whole.chunk_key[:, 4], jnp.zeros((1, 2, 4)))
    # places 0 and 1 hold the unfinished chunk
    assert_allclose(cache.query[:, :2], whole.query[:, :2], rtol=1e-5, atol=1e-6)


def test_bad_options():
    for sizes in ({"attended": 8}, {"attended": 10}, {"chunk": 0}):
        with pytest.raises(ValueError, match="at least 3"):
            LongHeadsAttention(2, 8, **({"chunk": 4, "attended": 12} | sizes), rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        LongHeadsAttention(2, 8, dropout_rate=0.1, rngs=nnx.Rngs(0))
    module = LongHeadsAttention(2, 8, chunk=1, attended=3, rngs=nnx.Rngs(0))
    x = jnp.zeros((1, 2, 8))
    with pytest.raises(NotImplementedError, match="positions are not supported"):
        module(x, positions=jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(NotImplementedError, match="segment_ids"):
        module(x, segment_ids=jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="do not fit a cache"):
        module(x, cache=module.init_cache(1, 1))
