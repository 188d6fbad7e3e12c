"""PINE: the definition token by token, order of documents, decoding, and long prompts."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.masks.multihop import Documents
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.softmax.pine import (
    PineAttention,
    document_importance,
    document_shifts,
    pine_attention,
)

PREFIX, LENGTHS, T = 2, (4, 1, 3, 2), 15


@pytest.fixture(scope="module")
def module():
    return PineAttention(4, 16, num_kv_heads=2, max_documents=4, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def call(module):
    return jax.jit(module)


def softmax(x):
    w = np.exp(x - x.max())
    return w / w.sum()


def turned(x, position):
    half = x.size // 2
    angle = position * 1e4 ** (-np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
    )


def naive(q, k, v, prefix, lengths):
    """One head [t, d], in float64, rotating keys for every query as the paper does."""
    t, d = q.shape
    total, n = sum(lengths), len(lengths)
    of = np.full(t, -1)
    starts = prefix + np.cumsum([0, *lengths])
    for b in range(n):
        of[starts[b] : starts[b + 1]] = b
    base = np.arange(t)
    for b in range(n):
        base[of == b] += prefix + total - starts[b + 1]
    share = np.zeros((t, n))
    for i in range(t):
        others = np.flatnonzero((of >= 0) & (of != of[i]))
        weights = softmax(k[others] @ q[i] / d**0.5)
        for b in range(n):
            share[i, b] = weights[of[others] == b].sum() / lengths[b]
    out = np.zeros_like(q)
    for i in range(t):
        importance = share[i].copy()
        if of[i] >= 0:
            importance = share[of == of[i]].sum(0)
            importance[of[i]] = np.inf
        order = np.argsort(-importance, kind="stable")
        shift = np.zeros(n, int)
        shift[order] = np.cumsum([0, *np.array(lengths)[order][:-1]])
        at = np.where(of >= 0, base - shift[of], base)
        sees = (np.arange(t) <= i) | ((of >= 0) & (of[i] >= 0) & (of != of[i]))
        assert (at[sees] <= base[i]).all()
        keys = np.stack([turned(k[j], at[j]) for j in np.flatnonzero(sees)])
        out[i] = softmax(keys @ turned(q[i], base[i]) / d**0.5) @ v[sees]
    return out


def test_definition(key):
    with jax.enable_x64(True):
        q = jax.random.normal(key, (1, T, 2, 8), jnp.float64)
        k, v = jax.random.normal(jax.random.key(1), (2, 1, T, 1, 8), jnp.float64)
        documents = Documents.create(PREFIX, LENGTHS)
        got = jax.jit(pine_attention)(q, k, v, documents)
        for h in range(2):
            want = naive(
                *(np.asarray(x) for x in (q[0, :, h], k[0, :, 0], v[0, :, 0])), PREFIX, LENGTHS
            )
            assert_allclose(got[0, :, h], want, rtol=1e-10, atol=1e-12)


def test_gradients(key):
    """Against finite differences; the order of the documents is constant around the point."""
    with jax.enable_x64(True):
        q, k, v = jax.random.normal(key, (3, 1, T, 1, 8), jnp.float64)
        documents = Documents.create(PREFIX, LENGTHS)

        @jax.jit
        def f(q, k, v):
            return (pine_attention(q, k, v, documents) ** 2).sum()

        jax.test_util.check_grads(f, (q, k, v), order=1, modes=["rev"], rtol=1e-5, atol=1e-6)


def test_order_of_documents_does_not_matter(call, key):
    """Permuted documents take their outputs along, and the suffix says the same."""
    x = jax.random.normal(key, (1, T, 16))
    documents = [x[:, a : a + n] for a, n in zip((2, 6, 7, 10), LENGTHS, strict=True)]
    base = call(x, documents=Documents.create(PREFIX, LENGTHS))
    for order in ([3, 1, 0, 2], [1, 2, 3, 0]):
        moved = jnp.concatenate([x[:, :2], *(documents[i] for i in order), x[:, 12:]], 1)
        lengths = [LENGTHS[i] for i in order]
        got = call(moved, documents=Documents.create(PREFIX, lengths))
        assert_allclose(got[:, 12:], base[:, 12:], rtol=1e-5, atol=1e-5)
        assert_allclose(got[:, :2], base[:, :2], rtol=1e-5, atol=1e-5)
        start = PREFIX
        for i, n in zip(order, lengths, strict=True):
            a = (2, 6, 7, 10)[i]
            assert_allclose(got[:, start : start + n], base[:, a : a + n], rtol=1e-5, atol=1e-5)
            start += n
    plain = call(moved) - call(x)
    assert np.abs(plain[:, 12:]).max() > 1e-3  # causal attention does depend on the order


def test_two_documents_see_each_other_just_before_themselves(key):
    q, k = jax.random.normal(key, (2, 1, 9, 1, 4))
    shifts = jax.jit(document_shifts)(q, k, Documents.create(1, [3, 4]))[0, :, 0]
    assert_array_equal(shifts[1:4], [[0, 3]] * 3)
    assert_array_equal(shifts[4:8], [[4, 0]] * 4)


def test_importance_of_a_document_is_shared_by_its_tokens(key):
    q, k = jax.random.normal(key, (2, 1, T, 2, 4))
    got = np.asarray(jax.jit(document_importance)(q, k, Documents.create(PREFIX, LENGTHS)))[0]
    assert_array_equal(got[2:6], np.broadcast_to(got[2:3], (4, 2, 4)))
    assert np.isposinf(got[2:6, :, 0]).all() and np.isfinite(got[12:]).all()
    # after the documents, shares by token add up to 1
    assert_allclose((got[12:] * np.array(LENGTHS)).sum(-1), 1.0, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(), (7,), (0, 0)])
def test_without_documents_to_order_it_is_multi_head_attention(module, call, key, lengths):
    x = jax.random.normal(key, (2, 11, 16))
    plain = MultiHeadAttention(
        4, 16, num_kv_heads=2, causal=True, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(1)
    )
    nnx.update(plain, nnx.state(module, nnx.Param))
    documents = Documents.create(2, jnp.array(lengths, jnp.int32), 2) if lengths else None
    assert_allclose(call(x, documents=documents), jax.jit(plain)(x), rtol=1e-5, atol=1e-5)


def test_decoding_with_rows_of_other_documents(module, call, key):
    """Two rows with other prefixes and documents, one padded; then suffix and new tokens."""
    x = jax.random.normal(key, (2, T, 16))
    documents = Documents.create([2, 1], [[4, 1, 3, 2], [3, 3, 0, 0]])
    want = call(x, documents=documents)
    valid = jnp.arange(13)[None] < jnp.array([[13], [9]])
    prompt = jnp.where(valid[..., None], x[:, :13], jnp.nan)
    y, cache = call(prompt, documents=documents, valid=valid, cache=module.init_cache(2, T + 1))
    assert_allclose(y[0], want[0, :13], rtol=1e-5, atol=1e-5)
    assert_allclose(y[1, :9], want[1, :9], rtol=1e-5, atol=1e-5)
    for step in range(2):
        new = jnp.stack([x[0, 13 + step], x[1, 9 + step]])[:, None]
        y, cache = call(new, cache=cache)
        assert_allclose(y[0, 0], want[0, 13 + step], rtol=1e-5, atol=1e-5)
        assert_allclose(y[1, 0], want[1, 9 + step], rtol=1e-5, atol=1e-5)


def test_block_sparse_path_and_gradients(key):
    """The tiles of long prompts: values and gradients of the dense path."""
    q, k, v = jax.random.normal(key, (3, 1, T, 2, 8))
    documents = Documents.create(PREFIX, LENGTHS)

    def loss(path, q, k, v):
        out = pine_attention(q, k, v, documents, implementation=path)
        return (out**2).sum(), out

    (_, want), (_, got) = (
        jax.jit(jax.value_and_grad(functools.partial(loss, path), (0, 1, 2), has_aux=True))(q, k, v)
        for path in ("dense", "block_sparse")
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_bad_arguments(module, key):
    x = jax.random.normal(key, (2, T, 16))
    documents = Documents.create(PREFIX, LENGTHS, 2)
    with pytest.raises(ValueError, match="documents of 1 rows"):
        module(x, documents=Documents.create(PREFIX, LENGTHS))
    with pytest.raises(ValueError, match="must bring prefix and documents at once"):
        module(x[:, :9], documents=documents, cache=module.init_cache(2, T))
    with pytest.raises(ValueError, match="max_documents=5"):
        many = Documents.create(1, [1] * 5, 2)
        module(x, documents=many, cache=module.init_cache(2, T))
    with pytest.raises(NotImplementedError, match="segment_ids with documents"):
        module(x, documents=documents, segment_ids=jnp.zeros((2, T), jnp.int32))
    at = jnp.zeros((2, T), jnp.int32)
    for options in ({"documents": documents}, {"cache": module.init_cache(2, T)}):
        with pytest.raises(NotImplementedError, match="positions with (documents|a cache)"):
            module(x, positions=at, **options)
    with pytest.raises(TypeError, match="unknown argument document; further .* are documents"):
        module(x, document=documents)
    with pytest.raises(NotImplementedError, match="PineAttention: dropout_rate=0.1"):
        PineAttention(2, 8, dropout_rate=0.1, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="PineAttention: causal=False is not supported"):
        PineAttention(2, 8, causal=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="rope_base=None"):
        PineAttention(2, 8, rope_base=None, rngs=nnx.Rngs(0))
