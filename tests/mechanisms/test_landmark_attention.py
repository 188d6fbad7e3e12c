"""Landmark attention: the grouped softmax by brute force, and retrieval of blocks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.sparse.landmark_attention import (
    LandmarkAttention,
    LandmarkCache,
    grouped_softmax,
    insert_landmarks,
    landmark_attention,
)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def naive(scores, marks):
    """Weights [t, t] of one head, group by group."""
    t = len(marks)
    section = np.cumsum(marks) - marks
    weights = np.zeros((t, t))
    for i in range(t):
        past = np.arange(t) <= i
        own = past & (section == section[i]) & ~marks
        earlier = past & marks & (section < section[i])
        group = own | earlier
        if not group.any():
            continue
        top = np.zeros(t)
        top[group] = softmax(scores[i, group])
        weights[i, own] = top[own]
        for landmark in np.nonzero(earlier)[0]:
            block = past & (section == section[landmark]) & ~marks
            weights[i, block] = top[landmark] * softmax(scores[i, block])
    return weights


def test_grouped_softmax_is_the_definition():
    """Landmarks anywhere, blocks of any size; float64."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(2, 2, 15, 15)) * 3
    marks = np.zeros((2, 15), bool)
    marks[0, [3, 7, 11]] = marks[1, [1, 8, 13]] = True
    want = np.stack(
        [[naive(head, m) for head in row] for row, m in zip(scores, marks, strict=True)]
    )
    with jax.enable_x64(True):
        visible = jnp.tri(15, dtype=bool)[None, None]
        got = jax.jit(grouped_softmax)(jnp.asarray(scores), jnp.asarray(marks), visible)
    assert_allclose(got, want, atol=1e-13)
    assert_allclose(want.sum(-1), 1.0, atol=1e-12)


def test_product_rule_of_equal_logits():
    """Own block of n tokens, e earlier blocks of m: 1 / (n + e) each, shared by m below a gate."""
    scores = jnp.zeros((1, 1, 11, 11))
    marks = jnp.arange(11) % 4 == 3
    seen = jnp.tri(11, dtype=bool)[None, None]
    weights = jax.jit(grouped_softmax)(scores, marks[None], seen)[0, 0, 10]
    want = np.array([1 / 15] * 3 + [0] + [1 / 15] * 3 + [0] + [1 / 5] * 3)
    assert_allclose(weights, want, rtol=1e-6)


def test_scan_over_blocks_equals_the_definition():
    """Several tiles of keys, several of queries, gradients, logits as large as 100."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 300, 2, 4)) * 3
    marks = (jnp.arange(300) % 7 == 6)[None]

    def loss(form, q, k, v):
        return (landmark_attention(q, k, v, **form) ** 2).sum()

    forms = [{"block": 7}, {"is_landmark": marks}]
    got, want = (
        jax.jit(jax.value_and_grad(lambda *a, f=form: loss(f, *a), argnums=(0, 1, 2)))(q, k, v)
        for form in forms
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)


def test_without_landmarks_it_is_dense_attention():
    x = jax.random.normal(jax.random.key(0), (1, 9, 16))
    module = LandmarkAttention(2, 16, block=10, rope_layout="half", rope_base=1e4, rngs=nnx.Rngs(0))
    dense = MultiHeadAttention(2, 16, causal=True, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(0))
    none = jnp.zeros((1, 9), bool)
    outputs = jax.jit(lambda x: (module(x), module(x, is_landmark=none), dense(x)))(x)
    for got in outputs[:2]:
        assert_allclose(got, outputs[2], rtol=1e-5, atol=1e-6)


def test_insertion():
    ids = jnp.arange(1, 9)[None]
    assert_array_equal(insert_landmarks(ids, 3, 0)[0], [1, 2, 3, 0, 4, 5, 6, 0, 7, 8])
    assert_array_equal(insert_landmarks(ids[:, :3], 3, 0, pending=1)[0], [1, 2, 0, 3])
    assert_array_equal(insert_landmarks(ids[:, :3], 3, 0)[0], [1, 2, 3, 0])
    with pytest.raises(ValueError, match="pending=3"):
        insert_landmarks(ids, 3, 0, pending=3)


@pytest.mark.parametrize("select", ["per_token_and_head", "max_over_heads", "max_over_tokens"])
def test_fetching_all_blocks_at_true_positions_is_training(select):
    """top_k >= blocks: any chunks, and rows of any length, give the outputs of the whole text."""
    module = LandmarkAttention(4, 16, num_kv_heads=2, block=3, rope_base=1e4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 17, 16))
    want = jax.jit(module)(x)
    cache = module.init_retrieval(2, 6, 6, select=select, renumber=False)
    step = jax.jit(lambda x, cache, valid: module(x, cache=cache, valid=valid))
    place = jnp.arange(5)[None]
    for count in ([5, 4], [5, 1], [5, 5], [1, 5], [1, 2]):
        new = place < jnp.array(count)[:, None]
        at = jnp.where(new, cache.length[:, None] + place, 0)
        chunk = jnp.where(new[..., None], jnp.take_along_axis(x, at[..., None], 1), 9.0)
        y, cache = step(chunk, cache, new)
        rows, columns = jnp.nonzero(new)
        assert_allclose(y[rows, columns], want[rows, at[rows, columns]], rtol=1e-4, atol=1e-5)
    assert cache.length.tolist() == [17, 17]


def test_retrieval_reads_top_k_blocks_only():
    """Blocks that are not among the best change nothing but their landmark's score."""
    module = LandmarkAttention(2, 8, block=3, rope_base=1e4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 13, 8))
    step = jax.jit(lambda x, cache: module(x, cache=cache))
    _, cache = step(x[:, :12], module.init_retrieval(1, 4, 2))
    assert_array_equal(cache.sizes, [[4], [4], [0]])

    def loss(value):
        return (module(x[:, 12:], cache=dataclasses.replace(cache, value=value))[0] ** 2).sum()

    used = jnp.abs(jax.jit(jax.grad(loss))(cache.value)).sum((2, 4))[0] > 0  # [blocks, heads]
    assert_array_equal(used.sum(0), [2, 2])


def test_full_store_drops_the_oldest_block():
    module = LandmarkAttention(2, 8, block=2, rope_base=1e4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (1, 12, 8))
    step = jax.jit(lambda x, cache: module(x, cache=cache))
    at_once, cache = module.init_retrieval(1, 3, 1), module.init_retrieval(1, 3, 1)
    _, at_once = step(x, at_once)
    for i in range(0, 12, 4):
        _, cache = step(x[:, i : i + 4], cache)
    assert_array_equal(cache.length, [12])
    assert cache.key.shape[1] == 3
    # first layer: what is stored does not depend on the chunks
    for a, b in zip(at_once.by_age(), cache.by_age(), strict=True):
        assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    seen, stored, tail = cache.sizes
    assert (int(seen[0]), int(stored[0]), int(tail[0])) == (6, 3, 0)
    assert int(cache.start[0]) == 2 * 2  # min(N, top_k + 1) blocks


def test_bad_options():
    with pytest.raises(ValueError, match="block=1"):
        LandmarkAttention(2, 8, block=1, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        LandmarkAttention(2, 8, dropout_rate=0.1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="top_k=5 must be in"):
        LandmarkCache.create(1, 4, 3, 2, 8, top_k=5)
    with pytest.raises(ValueError, match="select="):
        LandmarkCache.create(1, 4, 3, 2, 8, top_k=1, select="best")
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match="either block or is_landmark"):
        landmark_attention(q, q, q)
    with pytest.raises(ValueError, match="segment_ids need is_landmark"):
        landmark_attention(q, q, q, block=3, segment_ids=jnp.zeros((1, 4), jnp.int32))
    module = LandmarkAttention(2, 8, block=3, rngs=nnx.Rngs(0))
    x = jnp.zeros((1, 2, 8))
    with pytest.raises(NotImplementedError, match="is_landmark with a cache"):
        module(x, is_landmark=jnp.zeros((1, 2), bool), cache=module.init_cache(1, 4))
    with pytest.raises(ValueError, match="is_landmark must be boolean of shape"):
        module(x, is_landmark=jnp.zeros((1, 3), bool))
    with pytest.raises(NotImplementedError, match="positions with LandmarkCache"):
        cache = module.init_retrieval(1, 4, 1)
        module(x, positions=jnp.zeros((1, 2), jnp.int32), cache=cache)
