"""AnchorAttention: which stripes are kept, both ways to compute them, and its limits."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.attention import attention
from attnjax.masks import Causal
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.sparse.anchor_attention import (
    AnchorAttention,
    anchor_attention,
    coverage,
    find_anchors,
)

SIZES = {"block": 3, "step": 2, "theta": 0.5}
T = 27  # four groups of six, and three queries behind them


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture(scope="module")
def qkv():
    return normal(0, 2, T, 4, 8), normal(1, 2, T, 2, 8), normal(2, 2, T, 2, 5)


def naive_masks(q, k, partition="disjoint", block=3, step=2, theta=0.5):
    """Core [t, t] and stripes [b, h, t, t] by the definition, in float64."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    b, t, h, d = q.shape
    k = np.repeat(k, h // k.shape[2], 2)
    g, whole = block * step, t // (block * step)
    first, behind = (block, block) if partition == "disjoint" else (g, 0)
    core = np.zeros((t, t), bool)
    for i, j in np.ndindex(t, t):
        core[i, j] = j <= i and (j < first or j >= i // g * g - behind or i >= whole * g)
    stripes = np.zeros((b, h, t, t), bool)
    for n, head, p in np.ndindex(b, h, whole):
        scores = q[n, :, head] @ k[n, :, head].T / np.sqrt(d)
        rows = slice(p * g, (p + 1) * g)
        anchors = np.where(core[rows], scores[rows], -np.inf).max(1).reshape(step, block).mean(1)
        pooled = scores[rows].reshape(step, block, t).mean(1)
        kept = (pooled + theta >= anchors[:, None]).any(0)
        kept &= (np.arange(t) >= block) & (np.arange(t) < p * g - block)
        stripes[n, head, rows] = kept
    return core, stripes


def weighted(q, k, v, times):
    """Softmax attention in which key j enters times[..., i, j] times."""
    b, t, h, d = q.shape
    k, v = (jnp.repeat(x, h // x.shape[2], 2) for x in (k, v))
    p = jnp.exp(jnp.einsum("bthd,bshd->bhts", q, k) / d**0.5) * times
    return jnp.einsum("bhts,bshe->bthe", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("partition", ["disjoint", "released"])
def test_value_and_gradients(qkv, partition):
    core, stripes = naive_masks(*qkv[:2], partition)
    assert 0 < stripes.mean() < (~core).mean() / 2
    assert (core & stripes).any() == (partition == "released")
    times = jnp.asarray(core[None, None].astype(np.float32) + stripes)

    def loss(fn):
        return jax.value_and_grad(lambda *a: (lambda o: ((o**2).sum(), o))(fn(*a)), range(3), True)

    got = jax.jit(loss(lambda *a: anchor_attention(*a, partition=partition, **SIZES)))(*qkv)
    want = jax.jit(loss(lambda *a: weighted(*a, times)))(*qkv)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_gathered_stripes_are_masked_stripes(qkv):
    """Also where tiles are visited, and for rows of different lengths."""
    lengths = jnp.array([T, 16])

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def run(gather, implementation):
        options = {"gather": gather, "implementation": implementation, "return_residual": True}
        return anchor_attention(*qkv, lengths=lengths, **options, **SIZES)

    outs = [run(False, None), run(True, "block_sparse")]
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-5, atol=1e-5), *outs)
    short = jax.jit(lambda *a: anchor_attention(*a, gather=False, **SIZES))
    short = short(*(x[1:, :16] for x in qkv))
    assert_allclose(outs[0][0][1:, :16], short, rtol=1e-5, atol=1e-6)


def test_all_keys_and_no_keys(qkv):
    q, k, _ = qkv
    options = SIZES | {"theta": jnp.inf}
    found = find_anchors(q, k, **options)
    causal = Causal().dense(T)
    assert_array_equal(
        found.mask().dense(T, batch=2, num_heads=4), np.broadcast_to(causal, (2, 4, T, T))
    )
    assert_allclose(coverage(q, k, found.mask()), [1.0, 1.0], rtol=1e-6)
    found = find_anchors(q, k, **(SIZES | {"theta": -jnp.inf}))
    core = naive_masks(q, k)[0]
    assert_array_equal(found.mask().dense(T)[0, 0], core)
    share, recall = coverage(q, k, found.mask())
    assert_allclose(share, core.sum() / causal.sum(), rtol=1e-6)
    assert 0 < recall < 1


def test_key_pool_adds_keys():
    """Single queries against mean keys, without the scale: a key of a strong block is kept."""
    q, k = normal(0, 1, 24, 1, 4), normal(1, 1, 24, 1, 4)
    plain, pooled = (
        find_anchors(q, k, block=2, step=2, theta=0.0, scale=1.0, key_pool=key_pool).stripes
        for key_pool in (False, True)
    )
    assert (pooled | ~plain).all() and pooled.sum() > plain.sum()
    # the definition, for the group of queries 16 .. 19
    scores = np.asarray(q[0, :, 0] @ k[0, :, 0].T)
    core = naive_masks(q, k, block=2, step=2)[0]
    anchors = np.where(core, scores, -np.inf).max(1)[16:20].reshape(2, 2).mean(1)
    means = np.repeat(np.asarray(k[0, :, 0]).reshape(12, 2, 4).mean(1), 2, 0)
    single = (np.asarray(q[0, 16:20, 0]) @ means.T).reshape(2, 2, 24).max(1)
    best = np.maximum(scores[16:20].reshape(2, 2, 24).mean(1), single)
    kept = (best >= anchors[:, None]).any(0)
    at = np.arange(24)
    assert_array_equal(pooled[0, 0, 4], kept & (at >= 2) & (at < 14))


def test_short_texts_are_dense(qkv):
    """Up to the first group and the core of the second there is nothing to choose."""
    short = [x[:, :12] for x in qkv]
    options = {"theta": -jnp.inf, "block": 6, "step": 1, "gather": False}
    got = jax.jit(lambda *a: anchor_attention(*a, **options))(*short)
    assert_allclose(got, attention(*short, is_causal=True), rtol=1e-5, atol=1e-6)


def test_module_has_the_parameters_of_dense_attention():
    module = AnchorAttention(4, 16, num_kv_heads=2, rope_base=1e4, rngs=nnx.Rngs(0))
    dense = MultiHeadAttention(
        4, 16, num_kv_heads=2, causal=True, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(1)
    )
    nnx.update(dense, nnx.state(module, nnx.Param))
    x = normal(0, 1, 9, 16)
    got, want = jax.jit(lambda x: (module(x), dense(x)))(x)
    assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="no step-by-step form"):
        module.init_cache(1, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"block": 0}, "block must"), ({"step": 0}, "step must"), ({"partition": "new"}, "'new'")],
)
def test_bad_options(qkv, options, message):
    with pytest.raises(ValueError, match=message):
        anchor_attention(*qkv, **options)
    with pytest.raises(ValueError, match="same length"):
        anchor_attention(qkv[0][:, :3], *qkv[1:])
