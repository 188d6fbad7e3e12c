"""Modality-mutual attention: the mask, several images, and prompts in a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.masks import Causal
from attnjax.mechanisms.softmax.aki_mma import (
    ModalityMutualAttention,
    modality_mutual_attention,
    modality_mutual_mask,
)

T = 14
Q, K = np.indices((T, T))


def rectangle(first, text, stop):
    return (Q >= first) & (Q < text) & (K >= text) & (K < stop)


@pytest.fixture(scope="module")
def module():
    return ModalityMutualAttention(2, 8, rope_base=1e4, rngs=nnx.Rngs(0))


def test_definition():
    want = (K <= Q) | rectangle(1, 5, 10)
    assert_array_equal(modality_mutual_mask([1, 5, 10]).dense(T)[0, 0], want)
    two = modality_mutual_mask([[1, 4, 6], [6, 9, 12]]).dense(T)[0, 0]
    assert_array_equal(two, (K <= Q) | rectangle(1, 4, 6) | rectangle(6, 9, 12))
    rows = modality_mutual_mask(jnp.array([[[1, 4, 6]], [[0, 0, 0]]])).dense(T)[:, 0]
    assert_array_equal(rows, np.stack([(K <= Q) | rectangle(1, 4, 6), K <= Q]))


@pytest.mark.parametrize("span", [[3, 3, 9], [3, 9, 9]])
def test_without_image_or_text_it_is_causal(span):
    assert_array_equal(modality_mutual_mask(span).dense(T), Causal().dense(T))


def test_kernel_visits_the_causal_tiles_and_the_rectangle():
    blocks = np.arange(0, 512, 64)
    mask = modality_mutual_mask([64, 192, 320])
    classes = mask.classify(blocks[:, None], blocks[:, None] + 64, blocks, blocks + 64)
    visited = np.tril(np.ones((8, 8), bool))
    visited[1:3, 3:5] = True
    assert_array_equal(classes > 0, visited)
    assert (classes[1:3, 3:5] == 2).all()


def test_block_sparse(key):
    q, k, v = jax.random.normal(key, (3, 1, T, 2, 4))
    got, want = (
        jax.jit(
            functools.partial(modality_mutual_attention, spans=[1, 5, 10], implementation=name)
        )(q, k, v)
        for name in ("block_sparse", "dense")
    )
    assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_decoding_behind_an_image(module, key):
    x = jax.random.normal(key, (2, T, 8))
    spans = jnp.array([[[1, 5, 9]], [[2, 4, 10]]])
    want, seen = jax.jit(functools.partial(module, capture=("weights",)))(x, spans=spans)
    rows = [(K <= Q) | rectangle(1, 5, 9), (K <= Q) | rectangle(2, 4, 10)]
    assert_array_equal(np.asarray(seen["weights"])[:, 1] > 0, np.stack(rows))
    call = jax.jit(module)
    y, cache = call(x[:, :10], spans=spans, cache=module.init_cache(2, T))
    assert_allclose(y, want[:, :10], rtol=1e-5, atol=1e-5)
    y, cache = call(x[:, 10:13], cache=cache)
    assert_allclose(y, want[:, 10:13], rtol=1e-5, atol=1e-5)
    y, _ = call(x[:, 13:], cache=cache)
    assert_allclose(y, want[:, 13:], rtol=1e-5, atol=1e-5)


def test_bad_arguments(module, key):
    x = jax.random.normal(key, (2, T, 8))
    with pytest.raises(ValueError, match="in order"):
        modality_mutual_mask([5, 3, 9])
    with pytest.raises(ValueError, match="in order"):
        modality_mutual_mask(jnp.array([[[1, 5, 9]], [[2, 10, 4]]]))
    with pytest.raises(ValueError, match="must have shape"):
        modality_mutual_mask([5, 3])
    with pytest.raises(ValueError, match="with batch 2"):
        module(x, spans=jnp.array([[[1, 5, 9]]]))
    with pytest.raises(ValueError, match="an image and its text must come in one call"):
        spans = jnp.array([[[1, 5, 9]], [[2, 4, 10]]])
        module(x[:, :7], spans=spans, cache=module.init_cache(2, T))
