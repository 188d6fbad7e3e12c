"""Modular duplex attention: shares of modalities, alignment, and mixed sequences in a cache."""

import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.moda import (
    ModularDuplexAttention,
    gram_align,
    modular_attention,
)
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention

T = 10
IDS = np.array([0, 0, 1, 1, 1, 0, 0, 1, 0, 0])
JIDS = jnp.asarray(IDS[None], jnp.int32)


def visible():
    t, s = np.indices((T, T))
    return (s <= t) | ((IDS[:, None] == 1) & (IDS == 1))


def naive(q, k, v, mix, mode):
    """One head in float64: a softmax for each modality of keys, then their shares."""
    scores, keep, out = q @ k.T / q.shape[1] ** 0.5, visible(), np.zeros_like(v)
    for t in range(T):
        masks = [keep[t]] if mode == "joint" else [keep[t] & (IDS == c) for c in (0, 1)]
        parts, logits = [], []
        for c, m in enumerate(masks):
            if m.any():
                w = np.exp(scores[t, m])
                parts.append(w @ v[m] / w.sum())
                logits.append(mix[IDS[t], c])
        share = np.exp(logits) / np.exp(logits).sum()
        out[t] = share @ np.stack(parts)
    return out


@pytest.mark.parametrize("mode", ["modular", "joint"])
def test_definition(key, mode):
    with jax.enable_x64(True):
        q, k, v = jax.random.normal(key, (3, 1, T, 2, 4), jnp.float64)
        mix = jax.random.normal(jax.random.key(1), (2, 2, 2), jnp.float64)
        got = jax.jit(functools.partial(modular_attention, mode=mode))(q, k, v, JIDS, mix=mix)
        for h in range(2):
            want = naive(*(np.asarray(x[0, :, h]) for x in (q, k, v)), np.asarray(mix[h]), mode)
            assert_allclose(got[0, :, h], want, rtol=1e-10, atol=1e-12)


def test_gradients(key):
    """Of queries, keys, values and shares, against finite differences; a row that sees nothing."""
    with jax.enable_x64(True):
        q, k, v = jax.random.normal(key, (3, 1, T, 1, 4), jnp.float64)
        mix = jax.random.normal(jax.random.key(1), (1, 2, 2), jnp.float64)
        some = (jnp.arange(T) != 4)[None, None, :, None]

        @jax.jit
        def f(*arrays):
            return (modular_attention(*arrays[:3], JIDS, mix=arrays[3], mask=some) ** 2).sum()

        jax.test_util.check_grads(f, (q, k, v, mix), order=1, modes=["rev"], rtol=1e-5, atol=1e-6)


def test_text_cannot_starve_vision(key):
    """However large the scores of text, vision keeps its share; in a joint softmax it does not."""
    q = jnp.ones((1, T, 1, 4))
    k = jnp.where(JIDS[..., None, None] == 0, 20.0, -20.0) * jnp.ones((1, T, 1, 4))
    value = (JIDS == 1).astype(jnp.float32)[..., None, None]  # output = weight on vision
    got = {
        mode: jax.jit(functools.partial(modular_attention, mode=mode))(q, k, value, JIDS)[0, -1]
        for mode in ("modular", "joint")
    }
    assert_allclose(got["modular"], 0.5, rtol=1e-6)
    assert_allclose(got["joint"], 0.0, atol=1e-6)


def test_patterns(key):
    """Word by word: which keys have weight, by values that are one-hot."""
    q, k = jax.random.normal(key, (2, 1, T, 1, 4))
    value = jnp.eye(T)[None, :, None]
    patterns = (("causal", "none"), ("full", "causal"))
    call = jax.jit(functools.partial(modular_attention, patterns=patterns))
    got = np.asarray(call(q, k, value, JIDS))[0, :, 0] > 0
    t, s = np.indices((T, T))
    a, c = IDS[:, None], IDS[None]
    want = ((a == c) & (s <= t)) | ((a == 1) & (c == 0))
    assert_array_equal(got, want)


def test_alignment_is_the_running_gram_matrix(key):
    given = jax.random.normal(key, (1, T, 3))
    got, (sums, counts) = jax.jit(functools.partial(gram_align, num_modalities=2))(given, JIDS)
    x = np.asarray(given)
    unit = x[0] / np.linalg.norm(x[0], axis=1, keepdims=True)
    for j in range(T):
        for a in (0, 1):
            seen = (IDS[: j + 1] == a).nonzero()[0]
            gram = unit[seen].T @ unit[seen] / max(len(seen), 1)
            want = x[0, j] if a == IDS[j] or not len(seen) else x[0, j] @ gram
            assert_allclose(got[0, j, a], want, rtol=1e-4, atol=1e-5)
    assert counts.tolist() == [[6, 4]]
    call = jax.jit(functools.partial(gram_align, num_modalities=2, causal=False))
    whole, _ = call(given, JIDS)
    # traces: N unit vectors, so the mean has trace 1
    assert_allclose(np.trace(sums[0], axis1=1, axis2=2), [6, 4], rtol=1e-5)
    assert_allclose(whole[0, -1, 1], x[0, -1] @ np.asarray(sums[0, 1]) / 4, rtol=1e-4, atol=1e-5)
    soft, _ = jax.jit(
        functools.partial(
            gram_align, num_modalities=2, causal=False, normalization="softmax",
            valid=jnp.asarray(IDS[None] >= 0),
        )
    )(given, JIDS)  # fmt: skip
    for a in (0, 1):
        mine = x[0, IDS == a]
        gram = np.exp(mine.T @ mine / len(mine))
        want = x[0] @ (gram / gram.sum(-1, keepdims=True))
        assert_allclose(soft[0, IDS != a, a], want[IDS != a], rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="needs all tokens"):
        gram_align(given, JIDS, 2, normalization="softmax")


@pytest.mark.parametrize("options", [{}, {"mode": "joint", "align": "none"}], ids=str)
def test_reduces_to_multi_head_attention(key, options):
    """One modality, as ids too; a joint softmax over causal modalities."""
    x = jax.random.normal(key, (2, 9, 8))
    module = ModularDuplexAttention(
        2, 8, rope_base=1e4, patterns=(("causal", "causal"),) * 2, rngs=nnx.Rngs(0), **options
    )
    plain = MultiHeadAttention(2, 8, causal=True, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(1))
    nnx.update(plain, nnx.state(module, lambda path, _: path[0] != "mix_logits"))
    ids = jnp.zeros((2, 9), jnp.int32).at[:, 3:6].set(1 if options else 0)
    want = jax.jit(plain)(x)
    assert_allclose(jax.jit(module)(x, modality_ids=ids), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("align", ["l2", "none"])
def test_decoding_a_mixed_sequence(key, align):
    """An image comes in one call; text before and after it token by token."""
    module = ModularDuplexAttention(2, 8, rope_base=1e4, align=align, rngs=nnx.Rngs(0))
    x = jax.random.normal(key, (2, T, 8))
    ids = jnp.broadcast_to(jnp.array([[0, 0, 1, 1, 1, 1, 0, 0, 0, 0]]), (2, T))
    call = jax.jit(module)
    want, cache, outputs = call(x, modality_ids=ids), module.init_cache(2, T + 1), []
    for start, stop in ((0, 1), (1, 2), (2, 6), *((t, t + 1) for t in range(6, T))):
        options = {"modality_ids": ids[:, start:stop]} if stop == 6 else {}
        y, cache = call(x[:, start:stop], cache=cache, **options)
        outputs.append(y)
    assert_allclose(np.concatenate(outputs, 1), want, rtol=1e-5, atol=1e-5)
    # only image tokens see later ones, of the image
    for changed, first in ((5, 2), (7, 7)):
        y = call(x.at[:, changed].add(1.0), modality_ids=ids)
        assert_array_equal(y[:, :first], want[:, :first])
        assert np.abs(y[:, first] - want[:, first]).min() > 0


def test_bad_arguments(key):
    x = jax.random.normal(key, (2, 5, 8))
    for options in ({"mode": "both"}, {"align": "mean"}, {"patterns": (("causal", "future"),) * 2}):
        with pytest.raises(ValueError, match="is none of"):
            ModularDuplexAttention(2, 8, rngs=nnx.Rngs(0), **options)
    with pytest.raises(ValueError, match="rows of n words"):
        ModularDuplexAttention(2, 8, patterns=(("causal",), ("full",)), rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="softmax"):
        ModularDuplexAttention(2, 8, align="softmax", rngs=nnx.Rngs(0))
    module = ModularDuplexAttention(2, 8, rngs=nnx.Rngs(0))
    ids = jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match="modality_ids must have shape"):
        module(x, modality_ids=ids[:, :3])
    with pytest.raises(ValueError, match=r"in 0 .. 1, .* got 0 .. 2"):
        module(x, modality_ids=ids.at[0, 3].set(2))
    with pytest.raises(NotImplementedError, match="segment_ids with modality_ids"):
        module(x, modality_ids=ids, segment_ids=ids)
    full = ModularDuplexAttention(2, 8, patterns=(("full", "full"),) * 2, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="patterns.0..0.='full' and causal=True"):
        full(x, segment_ids=ids)
