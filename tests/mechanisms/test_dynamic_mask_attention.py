"""Dynamic mask attention: the choice of keys, exact forgetting, and what it reduces to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.masks import Causal
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.sparse.dynamic_mask_attention import (
    DynamicMaskAttention,
    dynamic_mask,
    dynamic_mask_attention,
)
from attnjax.taps import Edits


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def kept_keys(bias, window, ids=None):
    """[b, g, t, s] by the definition: sort the visible keys of each query, take the first ones."""
    b, s, g = bias.shape
    ids = np.zeros((b, s), int) if ids is None else np.asarray(ids)
    kept = np.zeros((b, g, s, s), bool)
    for i, j, t in np.ndindex(b, g, s):
        visible = [u for u in range(t + 1) if ids[i, u] == ids[i, t]]
        kept[i, j, t, sorted(visible, key=lambda u: (-bias[i, u, j], u))[:window]] = True
    return kept


def ties(seed, *shape):
    """Biases of which many are equal."""
    return jnp.round(2 * normal(seed, *shape)) / 2


@pytest.mark.parametrize(("window", "packed"), [(1, False), (4, False), (4, True), (40, True)])
def test_mask_is_the_definition(window, packed):
    bias = ties(0, 2, 40, 2)
    ids = jnp.stack([jnp.repeat(jnp.arange(4), 10), jnp.arange(40) // 17]) if packed else None
    mask = dynamic_mask(bias, window=window, segment_ids=ids)
    got = np.array(mask.dense(40, batch=2, num_heads=2) & Causal().dense(40))
    if packed:
        got &= (ids[:, :, None] == ids[:, None, :])[:, None]
    assert_array_equal(got, kept_keys(np.asarray(bias), window, ids))


def test_mask_over_many_chunks():
    """Longer than the chunks in which keys are compared, and not a multiple of them."""
    bias = ties(1, 1, 300, 1)
    mask = jax.jit(lambda bias: dynamic_mask(bias, window=7).dense(300))(bias)
    assert_array_equal(mask & Causal().dense(300), kept_keys(np.asarray(bias), 7))


@pytest.mark.parametrize("select", ["topk", "relu"])
def test_value_and_gradients(select):
    args = normal(0, 2, 11, 4, 6), normal(1, 2, 11, 2, 6), normal(2, 2, 11, 2, 5), ties(3, 2, 11, 2)
    visible = (
        np.tril(np.ones((11, 11), bool)) & (np.asarray(args[3]) > 0).transpose(0, 2, 1)[:, :, None]
    )
    visible = kept_keys(np.asarray(args[3]), 4) if select == "topk" else visible
    visible = jnp.asarray(visible)

    def naive(q, k, v, bias):
        q = q.reshape(2, 11, 2, 2, 6)
        scores = jnp.einsum("btgrd,bsgd->bgrts", q, k) / 6**0.5
        scores = scores + bias.transpose(0, 2, 1)[:, :, None, None]
        p = jnp.where(visible[:, :, None], jnp.exp(scores), 0)
        weights = p / jnp.maximum(p.sum(-1, keepdims=True), 1e-30)
        return jnp.einsum("bgrts,bsge->btgre", weights, v).reshape(2, 11, 4, 5)

    def loss(fn, *args):
        out = fn(*args)
        return (out**2).sum(), out

    got, want = (
        jax.jit(jax.value_and_grad(lambda *a, fn=fn: loss(fn, *a), range(4), has_aux=True))(*args)
        for fn in (lambda *a: dynamic_mask_attention(*a, window=4, select=select), naive)
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_tiles_of_long_texts():
    """The block-sparse path sees what the dense one sees."""
    q, k, v, bias = normal(0, 1, 150, 2, 4), normal(1, 1, 150, 1, 4), normal(2, 1, 150, 1, 4), None
    bias = normal(3, 1, 150, 1) - jnp.arange(150.0)[None, :, None] / 20
    got, want = (
        jax.jit(lambda *a, i=i: dynamic_mask_attention(*a, window=9, implementation=i))(
            q, k, v, bias
        )
        for i in ("block_sparse", "dense")
    )
    assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("select", ["topk", "relu"])
def test_forgetting_is_exact(select):
    """As many slots as keys that a query sees: chunks of any size, and lengths that differ."""
    module = DynamicMaskAttention(
        4, 16, num_kv_heads=2, window=3, select=select, rope_base=1e4, rngs=nnx.Rngs(0)
    )
    module.decay[...] = jnp.array([1.0, -1.0])
    graph, state = nnx.split(module)
    call = jax.jit(lambda x, **cache: nnx.merge(graph, state)(x, **cache))
    x = normal(1, 2, 12, 16)
    want = call(x)
    cache = module.init_cache(2, 12)
    assert cache.key.shape[1] == (3 if select == "topk" else 12)
    for start, stop in ((0, 5), (5, 7), (7, 12)):
        y, cache = call(x[:, start:stop], cache=cache)
        assert_allclose(y, want[:, start:stop], rtol=1e-5, atol=1e-6)
    assert_array_equal(cache.length, [12, 12])


@pytest.mark.parametrize("bias_form", ["linear", "exp"])
def test_reduces_to_dense(bias_form):
    dense = MultiHeadAttention(
        2, 8, causal=True, qk_norm="rms", rope_base=1e4, use_bias=False, rngs=nnx.Rngs(0)
    )
    module = DynamicMaskAttention(2, 8, bias_form=bias_form, rope_base=1e4, rngs=nnx.Rngs(0))
    for name in ("query", "key", "value", "out"):
        getattr(module, name).kernel[...] = getattr(dense, name).kernel[...]
    got, want = jax.jit(lambda x: (module(x), dense(x)))(normal(1, 2, 9, 8))
    assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_blocks_follow_their_majority():
    """Runs are shown or hidden as a whole, the last one by its own length; nothing is t x t."""
    bias = ties(4, 2, 23, 2)
    kept = kept_keys(np.asarray(bias), 6)
    for size in (2, 4, 5, 24):
        want = np.zeros_like(kept)
        for first in range(0, 23, size):
            run = kept[..., first : first + size]
            want[..., first : first + size] = 2 * run.sum(-1, keepdims=True) > run.shape[-1]
        got = jax.jit(lambda b, n=size: dynamic_mask(b, window=6, block_size=n).dense(23))(bias)
        assert_array_equal(got, want)
    many = jax.ShapeDtypeStruct((1, 4096, 1), jnp.float32)
    make = jax.jit(lambda b: jax.tree.leaves(dynamic_mask(b, window=8, block_size=16)))
    assert make.lower(many).compile().memory_analysis().temp_size_in_bytes < 4096**2 / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"select": "best"}, "select='best'"),
        ({"bias_form": "log"}, "bias_form='log'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        DynamicMaskAttention(2, 8, rngs=nnx.Rngs(0), **options)


def test_what_is_not_supported():
    module = DynamicMaskAttention(2, 8, block_size=2, rngs=nnx.Rngs(0))
    ids = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(NotImplementedError, match="cache with block_size=2"):
        module.init_cache(1, 4)
    with pytest.raises(NotImplementedError, match="segment_ids with block_size=2"):
        module(normal(0, 1, 4, 8), segment_ids=ids)
    module = DynamicMaskAttention(2, 8, rngs=nnx.Rngs(0))
    cache = module.init_cache(1, 4)
    with pytest.raises(NotImplementedError, match="score_bias"):
        module(normal(0, 1, 4, 8), cache=cache, edits=Edits(score_bias=jnp.zeros((1, 2, 4, 4))))
    with pytest.raises(ValueError, match="do not fit"):
        module(normal(0, 1, 5, 8), cache=cache)
    q = normal(0, 1, 4, 2, 8)
    with pytest.raises(ValueError, match="bias must have the shape"):
        dynamic_mask_attention(q, q, q, jnp.zeros((1, 4)))
