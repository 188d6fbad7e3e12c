"""MHE: the expanded definition, what embeddings can and cannot do, parameter counts, bad input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.masks import Causal
from attnjax.mechanisms.softmax.mhe import MHEAttention, expand, mhe
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.taps import Edits


def operands(t=7, d=3, h=4):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, t, d)) for _ in range(3))
    return q, k, v, rng.normal(size=(3, h, d))


def naive(q, k, v, e, combine, xp=np):
    """Every head's own queries, keys and values; causal."""

    def head(x, e):
        x, e = x[:, :, None], e[None, None]
        return x + e if combine == "add" else x * (e + 1)

    q, k, v = (head(x, part) for x, part in zip((q, k, v), e, strict=True))
    s = xp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    s = xp.where(xp.tril(xp.ones(s.shape[-2:]))[None, None] > 0, s, -xp.inf)
    w = xp.exp(s - s.max(-1, keepdims=True))
    return xp.einsum("bhts,bshd->bthd", w / w.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("combine", ["add", "mul"])
def test_equals_attention_with_expanded_heads(combine):
    with jax.enable_x64(True):
        data = operands()
        args = [jnp.asarray(a) for a in data]

        ct = np.cos(np.arange(2 * 7 * 4 * 3)).reshape(2, 7, 4, 3)

        @jax.jit
        def run(*args):
            ours = jax.vjp(lambda *a: mhe(*a, combine=combine, is_causal=True), *args)
            plain = jax.vjp(lambda *a: naive(*a, combine, xp=jnp), *args)
            return [(out, pull(jnp.asarray(ct))) for out, pull in (ours, plain)]

        (out, grads), (want, others) = run(*args)
        assert_allclose(want, naive(*data, combine), rtol=1e-12)
        assert_allclose(out, want, rtol=1e-12, atol=1e-14)
        for got, grad in zip(grads, others, strict=True):
            assert_allclose(got, grad, rtol=1e-10, atol=1e-12)
        if combine == "add":  # q · e_k is constant along a row: it cancels, exactly here
            assert not grads[3][1].any()
            assert np.abs(others[3][1]).max() < 1e-13
            # e_v is added to the output as it is
            assert_allclose(grads[3][2], ct.sum((0, 1)), rtol=1e-12)


def test_without_embeddings_all_heads_are_one():
    q, k, v, e = (jnp.float32(a) for a in operands())
    for combine in ("add", "mul"):
        call = jax.jit(functools.partial(mhe, combine=combine))
        out = np.asarray(call(q, k, v, jnp.zeros_like(e)))
        assert_allclose(out, np.broadcast_to(out[:, :, :1], out.shape), rtol=1e-6)
    assert_allclose(expand(q, jnp.zeros_like(e[0])), jnp.repeat(q[:, :, None], 4, 2))


def test_a_row_without_keys_stays_zero():
    q, k, v, e = (jnp.float32(a) for a in operands())
    none = jnp.arange(7)[None, None, :, None] != 3
    for combine in ("add", "mul"):
        out = np.asarray(jax.jit(functools.partial(mhe, combine=combine))(q, k, v, e, mask=none))
        assert_array_equal(out[:, 3], np.zeros_like(out[:, 3]))
        assert np.abs(out[:, 2]).min() > 0


@pytest.mark.parametrize(("n", "d"), [(4, 3), (8, 16)])
def test_parameter_counts_of_the_paper(n, d):
    """3 n d beyond one head; multi-head attention needs (3n² - 3n) d² - 3 n d more than that."""

    def count(module):
        return sum(a.size for a in jax.tree.leaves(nnx.state(module, nnx.Param)))

    width = n * d
    ours = count(nnx.eval_shape(lambda: MHEAttention(n, width, rngs=nnx.Rngs(0))))
    full = count(
        nnx.eval_shape(lambda: MultiHeadAttention(n, width, use_bias=False, rngs=nnx.Rngs(0)))
    )
    out, one_head = width * width, 3 * width * d
    assert ours - out - one_head == 3 * n * d
    assert full - ours == (3 * n**2 - 3 * n) * d**2 - 3 * n * d


def test_the_cache_holds_one_head():
    module = MHEAttention(4, 16, rngs=nnx.Rngs(0))
    full = MultiHeadAttention(4, 16, causal=True, rngs=nnx.Rngs(0))
    ours, theirs = (m.init_cache(2, 8) for m in (module, full))
    assert ours.key.nbytes * 4 == theirs.key.nbytes


@pytest.mark.parametrize("combine", ["add", "mul"])
def test_edited_weights_reach_the_value_embeddings(combine):
    """Weights that no longer sum to 1, with and without a cache."""
    module = MHEAttention(2, 8, combine=combine, rngs=nnx.Rngs(0))
    module.head_embeddings[...] = jax.random.normal(jax.random.key(3), (3, 2, 4))
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    half = Edits(weight_edit=lambda w: w / 2)
    call = jax.jit(module)
    want = np.asarray(call(x)) / 2
    assert_allclose(call(x, edits=half), want, rtol=1e-5, atol=1e-6)
    cache, parts = module.init_cache(2, 6), []
    for a, b in ((0, 3), (3, 6)):
        y, cache = call(x[:, a:b], cache=cache, edits=half)
        parts.append(y)
    assert_allclose(np.concatenate(parts, 1), want, rtol=1e-5, atol=1e-6)


def test_bad_input_is_named():
    q, k, v, e = (jnp.float32(a) for a in operands())
    for wrong in ((q, k, v, e[:, :, :2]), (q, k, v[:, :, None], e)):
        with pytest.raises(ValueError, match="embeddings"):
            mhe(*wrong)
    with pytest.raises(ValueError, match="combine='times'"):
        mhe(q, k, v, e, combine="times")
    with pytest.raises(ValueError, match="combine='times'"):
        MHEAttention(2, 8, combine="times", rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="rope_base"):
        MHEAttention(2, 8, rope_base=1e4, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="MHEAttention: num_kv_heads=1"):
        MHEAttention(2, 8, num_kv_heads=1, rngs=nnx.Rngs(0))
    assert jax.eval_shape(lambda: mhe(q, k, v, e, mask=Causal())).shape == (2, 7, 4, 3)
