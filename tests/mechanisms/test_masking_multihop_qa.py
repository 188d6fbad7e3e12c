"""Prefix masks: the definition, prompts in a cache, and the tools around them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.masking_multihop_qa import (
    PrefixAttention,
    arrange_documents,
    peak_document_attention,
    prefix_attention,
)
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.models import LanguageModel, LanguageModelConfig, generate


@pytest.fixture(scope="module")
def module():
    return PrefixAttention(2, 8, rope_base=1e4, rngs=nnx.Rngs(0))


def test_definition(key):
    q, k, v = np.asarray(jax.random.normal(key, (3, 2, 9, 2, 4)))
    scores = np.einsum("bthd,bshd->bhts", q, k) / 2
    t, s = np.indices((9, 9))
    visible = (s <= t) | (s < np.array([4, 0])[:, None, None])
    weights = np.exp(scores) * visible[:, None]
    weights /= weights.sum(-1, keepdims=True)
    want = np.einsum("bhts,bshd->bthd", weights, v)
    for path in ("dense", "block_sparse"):
        call = jax.jit(functools.partial(prefix_attention, implementation=path))
        assert_allclose(call(q, k, v, prefix=jnp.array([4, 0])), want, rtol=1e-4, atol=1e-5)


def test_without_prefix_it_is_multi_head_attention(module, key):
    x = jax.random.normal(key, (2, 9, 8))
    plain = MultiHeadAttention(2, 8, causal=True, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(1))
    nnx.update(plain, nnx.state(module, nnx.Param))
    call, want = jax.jit(module), jax.jit(plain)(x)
    assert_allclose(call(x), want, rtol=1e-5, atol=1e-6)
    assert_allclose(call(x, prefix_lengths=jnp.zeros(2, jnp.int32)), want, rtol=1e-5, atol=1e-6)


def test_what_each_token_sees(module, key):
    x = jax.random.normal(key, (2, 9, 8))
    call = jax.jit(functools.partial(module, capture=("weights",)))
    _, seen = call(x, prefix_lengths=jnp.array([4, 6]))
    t, s = np.indices((9, 9))
    for row, n in enumerate((4, 6)):
        assert_array_equal(np.asarray(seen["weights"])[row, 0] > 0, (s <= t) | (s < n))


def test_prompt_in_a_cache_with_padding(module, key):
    """Rows of 6 and 4 prompt tokens, then two generated ones; padding is never seen."""
    x = jax.random.normal(key, (2, 8, 8))
    lengths = jnp.array([6, 4])
    want = jax.jit(module)(x, prefix_lengths=lengths)
    valid = jnp.arange(6)[None] < lengths[:, None]
    prompt = jnp.where(valid[..., None], x[:, :6], jnp.nan)
    auto = PrefixAttention(2, 8, rope_base=1e4, bidirectional_prompt=True, rngs=nnx.Rngs(0))
    for own, options in ((module, {"prefix_lengths": lengths}), (auto, {})):
        call = jax.jit(own)
        y, cache = call(prompt, valid=valid, cache=own.init_cache(2, 12), **options)
        assert_allclose(y[0], want[0, :6], rtol=1e-5, atol=1e-5)
        assert_allclose(y[1, :4], want[1, :4], rtol=1e-5, atol=1e-5)
        for step in range(2):
            new = jnp.stack([x[0, 6 + step], x[1, 4 + step]])[:, None]
            y, cache = call(new, cache=cache)
            assert_allclose(y[0, 0], want[0, 6 + step], rtol=1e-5, atol=1e-5)
            assert_allclose(y[1, 0], want[1, 4 + step], rtol=1e-5, atol=1e-5)


def test_generating_behind_a_bidirectional_prompt():
    config = LanguageModelConfig(
        vocab_size=11, width=16, num_layers=1, num_heads=2, mlp_width=16,
        mixers="masking_multihop_qa(bidirectional_prompt=true)",
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    prompt = jax.random.randint(jax.random.key(0), (1, 7), 0, 11)
    token = generate(model, prompt, max_new_tokens=1, temperature=0)
    fixed = model.with_mixers("masking_multihop_qa(prefix=7)")
    assert int(token[0, 0]) == int(jax.jit(fixed)(prompt)[0, -1].argmax())


def test_orders_of_documents():
    gold, others = [7, 8, 9], [0, 1, 2, 3, 4]
    assert arrange_documents(gold, others) == [7, 8, 9, 0, 1, 2, 3, 4]
    assert arrange_documents(gold, others, order="backward", first=1) == [0, 9, 8, 7, 1, 2, 3, 4]
    assert arrange_documents(gold, others, distance=2) == [7, 0, 1, 8, 2, 3, 9, 4]
    with pytest.raises(ValueError, match="need 6 others, got 5"):
        arrange_documents(gold, others, distance=3)
    with pytest.raises(ValueError, match="forward"):
        arrange_documents(gold, others, order="random")


def test_peak_is_the_most_attended_document():
    weights = jnp.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    ids = jnp.array([-1, 0, 0, 1])
    assert_allclose(peak_document_attention(weights, ids, 2), (0.5 + 0.5) / 2, rtol=1e-6)


def test_bad_arguments(module, key):
    x = jax.random.normal(key, (2, 5, 8))
    with pytest.raises(ValueError, match="at least 0 tokens"):
        PrefixAttention(2, 8, prefix=-1, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="PrefixAttention: causal=False"):
        PrefixAttention(2, 8, causal=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\[batch\] = \(2,\)"):
        module(x, prefix_lengths=jnp.array([1]))
    with pytest.raises(ValueError, match="the prefix must come in one call"):
        module(x, prefix_lengths=jnp.array([3, 7]), cache=module.init_cache(2, 9))
    fixed = PrefixAttention(2, 8, prefix=3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the prefix must come in one call"):
        fixed(x[:, :1], cache=fixed.init_cache(2, 9))
    with pytest.raises(NotImplementedError, match="segment_ids"):
        ids = jnp.zeros((2, 5), jnp.int32)
        module(x, prefix_lengths=jnp.array([3, 3]), segment_ids=ids)
