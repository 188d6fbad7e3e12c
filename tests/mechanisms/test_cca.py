"""Concentric causal attention: rings, positions, mask, and images in a cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.cca import (
    ConcentricCausalAttention,
    concentric_causal_attention,
    concentric_mask,
    concentric_positions,
    rings,
)
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention


@pytest.fixture(scope="module")
def module():
    return ConcentricCausalAttention(2, 8, image_side=4, rngs=nnx.Rngs(0))


def naive(length, start, side):
    """Positions and mask, token by token."""
    n = side * side
    position, visible = [], np.tril(np.ones((length, length), bool))
    for i in range(length):
        if start <= i < start + n:
            r, c = divmod(i - start, side)
            position.append(start + min(r, c, side - 1 - r, side - 1 - c))
        else:
            position.append(i if i < start else i - n + side // 2)
    for q in range(start, start + n):
        for k in range(start, start + n):
            visible[q, k] = position[k] <= position[q]
    return np.array(position), visible


@pytest.mark.parametrize(("length", "start", "side"), [(12, 3, 2), (44, 5, 6), (64, 0, 8)])
def test_definition(length, start, side):
    position, visible = naive(length, start, side)
    index = jnp.arange(length, dtype=jnp.int32)[None]
    assert_array_equal(concentric_positions(index, start, side)[0], position)
    for at in (start, jnp.array([start])):
        assert_array_equal(concentric_mask(at, side).dense(length)[0, 0], visible)


def test_an_image_spends_half_a_side_of_positions():
    index = jnp.arange(700, dtype=jnp.int32)[None]
    positions = concentric_positions(index, 35, 24)[0]
    assert int(positions[35 + 576]) - 35 == 12 and int(positions[-1]) == 699 - 576 + 12
    assert np.bincount(np.asarray(rings(24)).ravel()).tolist() == list(range(92, 3, -8))


def test_two_by_two_image_is_one_ring():
    _, visible = naive(8, 2, 2)
    assert visible[2:6, 2:6].all()
    assert_array_equal(concentric_mask(2, 2).dense(8)[0, 0], visible)


def test_tiles_outside_the_image_need_no_comparison():
    mask = concentric_mask(128, 16)  # 256 image tokens
    starts = np.arange(0, 512, 64)
    classes = mask.classify(starts[:, None], starts[:, None] + 64, starts, starts + 64)
    outside = np.setdiff1d(np.arange(8), [2, 3, 4, 5])
    assert_array_equal(classes[np.ix_(outside, outside)][np.tril_indices(4, -1)], 2)
    assert_array_equal(classes[6:, :6], 2)
    assert_array_equal(classes[:2, 2:], 0)
    assert_array_equal(classes[2:6, 6:], 0)


def test_function_by_row_and_block_sparse(key):
    q, k, v = jax.random.normal(key, (3, 2, 24, 2, 8))
    start = jnp.array([3, -1])
    make = functools.partial(functools.partial, concentric_causal_attention, side=4)
    got, sparse = (
        jax.jit(make(implementation=path))(q, k, v, image_start=start)
        for path in ("dense", "block_sparse")
    )
    assert_allclose(sparse, got, rtol=1e-4, atol=1e-5)
    one = jax.jit(make(image_start=3))(q[:1], k[:1], v[:1])
    assert_allclose(got[:1], one, rtol=1e-4, atol=1e-5)


def test_without_image_it_is_multi_head_attention(module, key):
    x = jax.random.normal(key, (2, 24, 8))
    plain = MultiHeadAttention(2, 8, causal=True, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(1))
    nnx.update(plain, nnx.state(module, nnx.Param))
    call, want = jax.jit(module), jax.jit(plain)(x)
    assert_allclose(call(x), want, rtol=1e-5, atol=1e-6)
    assert_allclose(call(x, image_start=jnp.full((2,), -1)), want, rtol=1e-5, atol=1e-5)


def test_decoding_behind_an_image(module, key):
    """Rows with an image, and with none, prefilled together, then token by token."""
    x = jax.random.normal(key, (2, 24, 8))
    start = jnp.array([2, -1])
    call = jax.jit(module)
    want = call(x, image_start=start)
    y, cache = call(x[:, :20], image_start=start, cache=module.init_cache(2, 26))
    assert_allclose(y, want[:, :20], rtol=1e-5, atol=1e-5)
    y, cache = call(x[:, 20:22], cache=cache)
    assert_allclose(y, want[:, 20:22], rtol=1e-5, atol=1e-5)
    y, cache = call(x[:, 22:23], cache=cache)
    assert_allclose(y, want[:, 22:23], rtol=1e-5, atol=1e-5)
    assert cache.image_start.tolist() == [2, -1]


def test_bad_arguments(module, key):
    x = jax.random.normal(key, (2, 10, 8))
    with pytest.raises(ValueError, match="even number"):
        ConcentricCausalAttention(2, 8, image_side=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"image_start must have shape \[batch\]"):
        module(x, image_start=jnp.array([0]))
    with pytest.raises(ValueError, match="the image must come in one call"):
        module(x, image_start=jnp.array([0, 3]), cache=module.init_cache(2, 30))
