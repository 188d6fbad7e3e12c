"""Efficient attention: both normalizers, causal form, padding, decoding, spatial axes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax.mechanisms.linear.efficient_attention import (
    ContextCache,
    EfficientAttention,
    efficient_attention,
)
from attnjax.taps import Edits
from pallas_kernels.compat import enable_x64
from tests.linear.naive import error

ROUNDING = 2e-5


def _inputs(b=2, t=20, h=2, k=4, v=3, dtype=np.float64):
    rng = np.random.default_rng(0)
    shapes = ((b, t, h, k), (b, t, h, k), (b, t, h, v))
    return [jnp.asarray(3.0 * rng.standard_normal(s), dtype) for s in shapes]


def _naive(q, k, v, *, causal, normalizer, mask):
    """Explicit weights of every query on every key; keys normalized over what the query sees."""
    t = q.shape[1]
    sees = jnp.tri(t, dtype=bool) if causal else jnp.ones((t, t), bool)
    sees = sees[None] & mask[:, None, :]  # [b, t, s]
    if normalizer == "scaling":
        weights = jnp.einsum("bthk,bshk->bhts", q, k)
        count = jnp.maximum(sees.sum(2), 1).astype(q.dtype)
        weights = weights / count[:, None, :, None]
    else:
        logits = jnp.where(sees[:, :, :, None, None], k[:, None], -jnp.inf)  # [b, t, s, h, k]
        top = jnp.max(logits, axis=2, keepdims=True)
        e = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0.0))
        total = e.sum(2, keepdims=True)
        weights = jnp.einsum(
            "bthk,btshk->bhts", jax.nn.softmax(q, -1), e / jnp.where(total > 0, total, 1.0)
        )
    return jnp.einsum("bhts,bshv->bthv", jnp.where(sees[:, None], weights, 0.0), v)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalizer", ["softmax", "scaling"])
def test_function_is_its_definition(normalizer, causal, padding):
    with enable_x64(True):
        q, k, v = _inputs()
        mask = jnp.ones((2, 20), bool)
        if padding is not None:
            mask = jnp.arange(20)[None] < jnp.array([[13], [20]])
            mask = mask[:, ::-1] if padding == "left" else mask
        options = dict(causal=causal, normalizer=normalizer)

        def ours(q, k, v):
            # whatever stands at padding must not matter
            k, v = (jnp.where(mask[..., None, None], x, jnp.nan) for x in (k, v))
            given = mask if padding else None
            return efficient_attention(q, k, v, key_mask=given, **options)

        def naive(q, k, v):
            return _naive(q, k, v, mask=mask, **options)

        got, pull = jax.vjp(jax.jit(ours), q, k, v)
        want, pull_naive = jax.vjp(jax.jit(naive), q, k, v)
        assert error(got, want) < 1e-12
        for a, b in zip(pull(jnp.cos(want)), pull_naive(jnp.cos(want)), strict=True):
            assert error(a, b) < 1e-9


def test_rows_sum_to_one():
    q, k, _ = _inputs(dtype=np.float32)
    for causal in (False, True):
        out = efficient_attention(q, k, jnp.ones((2, 20, 2, 1)), causal=causal)
        np.testing.assert_allclose(out, 1.0, rtol=1e-5)


def test_everything_masked_gives_zero():
    q, k, v = _inputs(dtype=np.float32)
    for causal in (False, True):
        hidden = functools.partial(
            efficient_attention, causal=causal, key_mask=jnp.zeros((2, 20), bool)
        )
        out, pull = jax.vjp(jax.jit(hidden), q, k, v)
        assert bool((out == 0).all()) and all(bool((g == 0).all()) for g in pull(out + 1.0))


@pytest.mark.parametrize("normalizer", ["softmax", "scaling"])
def test_pieces_give_the_whole(normalizer):
    with enable_x64(True):
        q, k, v = _inputs()
        options = dict(causal=True, normalizer=normalizer)
        want = efficient_attention(q, k, v, **options)
        cache, parts = ContextCache.create(2, 2, 4, 3, jnp.float64), []
        for piece in (slice(0, 9), slice(9, 10), slice(10, 20)):
            out, cache = efficient_attention(
                q[:, piece], k[:, piece], v[:, piece], cache=cache, **options
            )
            parts.append(out)
        assert error(jnp.concatenate(parts, axis=1), want) < 1e-12
        assert cache.length.tolist() == [20, 20]


def test_module_decodes():
    module = EfficientAttention(2, 12, 8, value_features=16, causal=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 9, 12))
    full = module(x)
    valid = jnp.arange(6)[None] < jnp.array([[6], [3]])
    _, cache = module(x[:, :6], cache=module.init_cache(2, 16), valid=valid)
    for i in range(3):
        at = jnp.array([6, 3]) + i
        token = jnp.take_along_axis(x, at[:, None, None], axis=1)
        y, cache = module(token, cache=cache)
        assert error(y, jnp.take_along_axis(full, at[:, None, None], axis=1)) < ROUNDING


def test_module_over_images_and_taps():
    module = EfficientAttention(2, 12, 8, value_features=6, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 12))
    y, seen = module(x, capture=("z", "head_out", "attn_out"))
    assert y.shape == x.shape and seen["z"].shape == (2, 20, 2, 3)
    flat = module(x.reshape(2, 20, 12))
    assert error(y.reshape(flat.shape), flat) < ROUNDING
    bias = module.out.bias[...]
    assert error(seen["head_out"].sum(2) + bias[None, None], seen["attn_out"]) < ROUNDING
    off = module(x, edits=Edits(head_scale=jnp.zeros(2)))
    assert error(off, x + bias[None, None, None]) < ROUNDING
    valid = jnp.ones((2, 5, 4), bool).at[:, 3:].set(False)
    padded = module(jnp.where(valid[..., None], x, jnp.nan), valid=valid)
    assert error(padded[:, :3], module(x[:, :3])) < ROUNDING


def test_bad_input_is_named():
    q, k, v = _inputs(dtype=np.float32)
    with pytest.raises(ValueError, match="normalizer='mean'"):
        efficient_attention(q, k, v, normalizer="mean")
    with pytest.raises(ValueError, match="key_mask must have shape"):
        efficient_attention(q, k, v, key_mask=jnp.ones((2, 3), bool))
    with pytest.raises(ValueError, match="same length when causal"):
        efficient_attention(q[:, :5], k, v, causal=True)
    with pytest.raises(ValueError, match="needs causal=True"):
        efficient_attention(q, k, v, cache=ContextCache.create(2, 2, 4, 3))
    for sizes in ({"qkv_features": 9}, {"value_features": 9}):
        with pytest.raises(ValueError, match=f"{[*sizes][0]}=9 must be a multiple of num_heads=2"):
            EfficientAttention(2, 12, **sizes, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="normalizer='mean'"):
        EfficientAttention(2, 12, normalizer="mean", rngs=nnx.Rngs(0))
    for option in ({"num_kv_heads": 1}, {"rope_base": 1e4}, {"dropout_rate": 0.1}):
        with pytest.raises(NotImplementedError, match=f"EfficientAttention: {[*option][0]}"):
            EfficientAttention(2, 12, **option, rngs=nnx.Rngs(0))
    module = EfficientAttention(2, 12, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="segment_ids are not supported"):
        module(jnp.zeros((1, 3, 12)), segment_ids=jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(NotImplementedError, match="mask is not supported; use valid for padding.$"):
        module(jnp.zeros((1, 3, 12)), mask=jnp.ones((3, 3), bool))
    with pytest.raises(ValueError, match=r"x must have shape \[batch, \*spatial, 12\]"):
        module(jnp.zeros((1, 3, 3, 10)))
    with pytest.raises(ValueError, match=r"length\] = \(1, 3, 2\), got bool \(1, 6\)"):
        module(jnp.zeros((1, 3, 2, 12)), valid=jnp.ones((1, 6), bool))
    with pytest.raises(ValueError, match="a cache needs causal=True"):
        module.init_cache(1, 3)
    causal = EfficientAttention(2, 12, causal=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"x must have shape \[batch, length, 12\]"):
        causal(jnp.zeros((1, 3, 3, 12)))
    with pytest.raises(ValueError, match="residual=True"):
        EfficientAttention(2, 12, out_features=10, rngs=nnx.Rngs(0))
