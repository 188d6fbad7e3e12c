"""Attention Buckets: rows with their own bases, merged predictions, generation, chosen bases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.attention_buckets import (
    PRESETS,
    AttentionBuckets,
    BucketModel,
    attention_waveform,
    bucket_weights,
    complementary_bases,
    merge_buckets,
)
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.models import LanguageModel, LanguageModelConfig, generate

BASES = (1e4, 2e4, 25e3)


@pytest.fixture(scope="module")
def model():
    config = LanguageModelConfig(
        vocab_size=11, width=16, num_layers=1, num_heads=2, mlp_width=16, rope_base=500.0,
    )  # fmt: skip
    return LanguageModel(config, rngs=nnx.Rngs(0))


def test_every_part_of_the_batch_has_its_base(key):
    x = jax.random.normal(key, (2, 9, 8))
    module = AttentionBuckets(2, 8, bases=BASES, rngs=nnx.Rngs(0))
    got = jax.jit(module)(jnp.tile(x, (3, 1, 1)))
    for j, base in enumerate(BASES):
        plain = MultiHeadAttention(
            2, 8, causal=True, rope_base=base, use_bias=False, rngs=nnx.Rngs(1)
        )
        nnx.update(plain, nnx.state(module, nnx.Param))
        assert_allclose(got[2 * j : 2 * j + 2], jax.jit(plain)(x), rtol=1e-5, atol=1e-6)


def test_merging_by_the_definition(key):
    logits = np.asarray(3 * jax.random.normal(key, (4, 2, 7)))
    top = np.exp(logits.max(-1))
    weights = top / top.sum(0)
    assert_allclose(bucket_weights(logits), weights, rtol=1e-5)
    assert_allclose(
        merge_buckets(logits), np.einsum("jb,jbv->bv", weights, logits), rtol=1e-5, atol=1e-5
    )
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = (p.max(-1, keepdims=True) * p).sum(0) / p.max(-1, keepdims=True).sum(0)
    got = jnp.exp(merge_buckets(logits, "probs"))
    assert_allclose(got, want, rtol=1e-5)
    assert_allclose(got.sum(-1), 1.0, rtol=1e-5)
    for merge in ("logits", "probs"):
        one = jax.nn.softmax(merge_buckets(logits[:1], merge))
        assert_allclose(one, p[0], rtol=1e-5)


def test_generation_with_all_bases_at_once(model):
    """Cached generation is greedy in the merged logits of models with one base each."""
    prompt = jax.random.randint(jax.random.key(2), (2, 6), 0, 11)
    bases = (500.0, 20000.0)
    merged = BucketModel(model.with_mixers("attention_buckets(bases=500/20000)"), len(bases))
    tokens = generate(merged, prompt, max_new_tokens=3, temperature=0)
    text = jnp.concatenate([prompt, tokens], 1)
    whole = jax.jit(merged)(text)
    assert_array_equal(tokens, whole[:, 5:8].argmax(-1))
    runs = jnp.stack([_with_base(model, base)(text) for base in bases])
    assert_allclose(whole, jax.jit(merge_buckets)(runs), rtol=1e-4, atol=1e-5)


def _with_base(model, base):
    return jax.jit(model.with_mixers(f"attention_buckets(rope_base={base})"))


def test_packed_documents_in_all_runs(model):
    merged = BucketModel(model.with_mixers("attention_buckets(bases=500/20000)"), 2)
    text = jax.random.randint(jax.random.key(2), (2, 6), 0, 11)
    ids = jnp.array([[0, 0, 0, 1, 1, 1]] * 2)
    got, first = jax.jit(lambda text: (merged(text, segment_ids=ids), merged(text[:, :3])))(text)
    later = jax.jit(merged)(text[:, 3:])
    assert_allclose(got, jnp.concatenate([first, later], 1), rtol=1e-4, atol=1e-5)


def test_one_base_is_the_model_itself(model):
    prompt = jax.random.randint(jax.random.key(2), (2, 6), 0, 11)
    merged = BucketModel(model.with_mixers("attention_buckets"), 1)
    assert_allclose(jax.jit(merged)(prompt), jax.jit(model)(prompt), rtol=1e-5, atol=1e-5)
    want = generate(model, prompt, max_new_tokens=2, temperature=0)
    assert_array_equal(generate(merged, prompt, max_new_tokens=2, temperature=0), want)


def test_chosen_bases_fill_each_others_troughs():
    candidates = [10000.0 + 500 * i for i in range(41)]
    chosen = complementary_bases(candidates, 6, 4096)
    assert chosen[0] == 10000.0 and len(set(chosen)) == 6
    waves = {base: attention_waveform(base, 4096) for base in candidates}
    assert_allclose(waves[10000.0][0], 1.0)

    def covered(bases):
        return np.max([waves[b] for b in bases], axis=0).sum()

    assert covered(chosen) > covered(candidates[:6]) > covered(candidates[:1])
    with pytest.raises(ValueError, match="cannot choose 3 of 2"):
        complementary_bases([1e4, 2e4], 3, 16)


def test_bad_arguments(model):
    assert AttentionBuckets(2, 8, bases="tool", rngs=nnx.Rngs(0)).bases == PRESETS["tool"]
    with pytest.raises(ValueError, match="none of tool, rag"):
        AttentionBuckets(2, 8, bases="search", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="positive"):
        AttentionBuckets(2, 8, bases=(1e4, 0), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="multiple of 3"):
        AttentionBuckets(2, 8, bases=BASES, rngs=nnx.Rngs(0))(jnp.ones((4, 5, 8)))
    with pytest.raises(ValueError, match="none of logits, probs"):
        merge_buckets(jnp.ones((2, 3)), "max")
    with pytest.raises(ValueError, match="num_bases"):
        BucketModel(model, 0)
