"""Optimized, Efficient, Super: definitions, parameter counts, what they reduce to, bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.cache import cache_bytes
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.softmax.optimised_efficient_super_attention import (
    OptimisedEfficientSuperAttention,
    align,
    super_attention,
)
from attnjax.taps import Edits

CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # float32, sums of up to 16 terms
T = 6


def make(form, heads=2, width=8, causal=True, **options):
    size = T + 3 if form == "super" else None
    module = OptimisedEfficientSuperAttention(
        heads, width, form=form, causal=causal, max_length=size, rngs=nnx.Rngs(0), **options
    )
    if form == "super":
        module.alignment[...] = jax.random.normal(jax.random.key(7), (size, size))
    return module


def tokens(*shape):
    return jax.random.normal(jax.random.key(1), shape or (2, T, 8))


def naive(module, x, causal):
    """By the formulas, one row and head after the other, in float64."""
    x = np.asarray(x, np.float64)
    wq, wo = (np.asarray(p.kernel[...], np.float64) for p in (module.query, module.out))
    out = np.zeros(x.shape)
    for b, row in enumerate(x):
        y = row
        if module.alignment is not None:
            w = np.asarray(module.alignment[...], np.float64)[: len(row), : len(row)]
            y = (np.tril(w) if causal else w) @ row
        for h, (keys, values) in enumerate(
            zip(*(np.split(a, module.num_heads, -1) for a in (row, y)), strict=True)
        ):
            if module.key is not None:
                keys = row @ np.asarray(module.key.kernel[...], np.float64)[:, h]
            s = row @ wq[:, h] @ keys.T / np.sqrt(keys.shape[1])
            s = np.where(np.tril(np.ones_like(s)) > 0, s, -np.inf) if causal else s
            p = np.exp(s - s.max(-1, keepdims=True))
            out[b] += p @ values / p.sum(-1, keepdims=True) @ wo[h]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("form", "heads"), [("optimized", 2), ("efficient", 1), ("super", 2)])
def test_equals_the_formula(form, heads, causal):
    module, x = make(form, heads, causal=causal), tokens()
    assert_allclose(jax.jit(module)(x), naive(module, x, causal), **CLOSE)


def test_optimized_is_multi_head_attention_with_the_identity_for_values():
    module, x = make("optimized"), tokens()
    full = MultiHeadAttention(2, 8, causal=True, use_bias=False, rngs=nnx.Rngs(0))
    for part in ("query", "key", "out"):
        getattr(full, part).kernel[...] = getattr(module, part).kernel[...]
    full.value.kernel[...] = jnp.eye(8).reshape(8, 2, 4)
    assert_allclose(jax.jit(module)(x), jax.jit(full)(x), **CLOSE)


def test_super_with_the_identity_is_efficient():
    efficient, x = make("efficient"), tokens()
    fresh = OptimisedEfficientSuperAttention(2, 8, form="super", max_length=9, rngs=nnx.Rngs(0))
    for part in ("query", "out"):
        getattr(fresh, part).kernel[...] = getattr(efficient, part).kernel[...]

    @jax.jit
    def run(x):
        q = efficient.query(x)
        both = [super_attention(q, x, kernel, causal=True) for kernel in (None, jnp.eye(9))]
        return both, [fresh(x), efficient(x)]

    for pair in run(x):
        assert_allclose(*pair, **CLOSE)


def test_parameter_counts_of_the_paper():
    """Of standard attention's 4 m²: three quarters, one half, one half and T²."""
    width, length = 64, 32

    def count(make):
        state = nnx.state(nnx.eval_shape(make), nnx.Param)
        return sum(a.size for a in jax.tree.leaves(state))

    def ours(heads, **options):
        cls = OptimisedEfficientSuperAttention
        return count(lambda: cls(heads, width, rngs=nnx.Rngs(0), **options))

    full = count(lambda: MultiHeadAttention(4, width, use_bias=False, rngs=nnx.Rngs(0)))
    assert ours(4) * 4 == full * 3
    assert ours(1, form="efficient") * 2 == full
    assert ours(1, form="super", max_length=length) == full // 2 + length**2


def test_the_cache_of_efficient_is_half_of_standard():
    full = MultiHeadAttention(2, 8, causal=True, rngs=nnx.Rngs(0)).init_cache(1, 9)
    ours = make("efficient").init_cache(1, 9)
    lengths = full.length.nbytes
    assert 2 * (cache_bytes(ours) - lengths) == cache_bytes(full) - lengths


@pytest.mark.parametrize("form", ["optimized", "efficient"])
def test_decoding_of_the_other_forms(form):
    module, x = make(form), tokens()
    call, cache, parts = jax.jit(module), module.init_cache(2, T), []
    for a, b in ((0, 2), (2, 4), (4, T)):
        y, cache = call(x[:, a:b], cache=cache)
        parts.append(y)
    assert_allclose(np.concatenate(parts, 1), call(x), **CLOSE)


def test_documents_start_anew_in_the_alignment_kernel():
    module, x = make("super", causal=False), tokens()
    ids, call = jnp.array([[0, 0, 1, 1, 1, 1], [5, 5, 5, 5, 2, 2]]), jax.jit(module)
    got = call(x, segment_ids=ids)
    assert_allclose(got[:1, 2:], call(x[:1, 2:]), **CLOSE)
    assert_allclose(got[1:, :4], call(x[1:, :4]), **CLOSE)
    assert_allclose(got[1:, 4:], call(x[1:, 4:]), **CLOSE)


def test_bad_input_is_named():
    x = tokens(1, T + 4, 8)
    for options, message in (
        (dict(form="fast"), "form='fast'"),
        (dict(form="super"), "needs the number"),
        (dict(max_length=4), "max_length=4"),
        (dict(form="efficient", qkv_features=16), "slices of the input"),
    ):
        with pytest.raises(ValueError, match=message):
            OptimisedEfficientSuperAttention(2, 8, rngs=nnx.Rngs(0), **options)
    with pytest.raises(NotImplementedError, match="num_kv_heads=1"):
        OptimisedEfficientSuperAttention(2, 8, num_kv_heads=1, rngs=nnx.Rngs(0))
    module = make("super")
    with pytest.raises(ValueError, match="max_length >= 10"):
        module(x)
    with pytest.raises(ValueError, match="longer than"):
        module.init_cache(1, T + 4)
    with pytest.raises(ValueError, match="alignment kernel"):
        align(x, jnp.ones((3, 3)))
    with pytest.raises(NotImplementedError, match="mask is not supported"):
        module(x[:, :T], mask=jnp.ones((T, T), bool))
    efficient = make("efficient")
    with pytest.raises(NotImplementedError, match="stores the input"):
        efficient(x, cache=efficient.init_cache(1, 12), edits=Edits(k_add=jnp.ones((2, 4))))
