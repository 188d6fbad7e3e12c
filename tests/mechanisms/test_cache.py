"""Caches: prefill and decoding equal the full forward pass, for every mixer and every way to cut a
text."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.cache import DenseCache, LinearCache, RingCache, StateCache, StridedCache
from attnjax.mechanisms.linear.lightning_attention import LightningAttention
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.sparse.longgen import BlockStrideAttention

T = 23
LENGTH = 32
CLOSE = {"rtol": 2e-4, "atol": 2e-5}  # float32; merged parts round differently

SOFTMAX = {"num_kv_heads": 2, "causal": True, "rope_base": 100.0}
MIXERS = {
    "softmax": (lambda **o: MultiHeadAttention(4, 8, **SOFTMAX, **o), DenseCache),
    "sinks": (lambda **o: MultiHeadAttention(4, 8, window=5, sinks=3, **SOFTMAX, **o), RingCache),
    "sink logits": (
        lambda **o: MultiHeadAttention(4, 8, window=5, sinks=3, sink="kv_bias", **SOFTMAX, **o),
        RingCache,
    ),
    "strided": (
        lambda **o: BlockStrideAttention(
            4, 8, num_kv_heads=2, rope_base=100.0, block=3, stride=3, local_blocks=2, offset=1, **o
        ),
        StridedCache,
    ),
    "lightning": (lambda **o: LightningAttention(2, 8, **o), LinearCache),
    "lightning lrpe": (lambda **o: LightningAttention(2, 8, lrpe=True, **o), LinearCache),
}


@functools.cache
def case(name):
    """A module, its input, and its output for the whole text."""
    module = MIXERS[name][0](rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, T, 8))
    step = jax.jit(lambda x, cache, valid: module(x, cache=cache, valid=valid))

    def call(x, cache, valid=None):
        # one shape of arguments per length keeps the number of compilations small
        return step(x, cache, jnp.ones(x.shape[:2], bool) if valid is None else valid)

    return module, x, jax.jit(module)(x), call


def run(step, x, cache, cuts):
    """Output of the text given in pieces of these lengths."""
    outputs, start = [], 0
    for count in cuts:
        y, cache = step(x[:, start : start + count], cache)
        outputs.append(y)
        start += count
    assert start == x.shape[1]
    return jnp.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize("name", MIXERS)
class TestEveryMixer:
    def test_cache_type_and_size(self, name):
        module = case(name)[0]
        cache = module.init_cache(3, LENGTH)
        assert type(cache) is MIXERS[name][1]
        assert cache.length.shape == (3,) and cache.length.dtype == jnp.int32
        shapes = jax.tree.map(jnp.shape, cache)
        _, after = jax.eval_shape(lambda c: module(jnp.zeros((3, 4, 8)), cache=c), cache)
        assert jax.tree.map(jnp.shape, after) == shapes

    def test_token_by_token(self, name):
        module, x, want, step = case(name)
        got, cache = run(step, x, module.init_cache(2, LENGTH), [1] * T)
        assert_allclose(got, want, **CLOSE)
        assert_array_equal(cache.length, [T, T])

    @pytest.mark.parametrize("cuts", [[T], [9, 7, 7], [7, 1, 1, 7, 7]], ids=str)
    def test_chunks(self, name, cuts):
        module, x, want, step = case(name)
        got, _ = run(step, x, module.init_cache(2, LENGTH), cuts)
        assert_allclose(got, want, **CLOSE)

    def test_ragged_prompts(self, name):
        """Rows of different lengths, padding full of NaN, in two chunks, then token by token."""
        module, x, want, step = case(name)
        lengths = np.array([4, 13])
        cache = module.init_cache(2, LENGTH)
        for start, count in ((0, 9), (9, 7)):
            valid = np.arange(start, start + count)[None] < lengths[:, None]
            piece = jnp.where(valid[..., None], x[:, start : start + count], jnp.nan)
            y, cache = step(piece, cache, jnp.asarray(valid))
            for row in range(2):
                assert_allclose(
                    y[row][valid[row]], want[row, start : start + count][valid[row]], **CLOSE
                )
        assert_array_equal(cache.length, lengths)
        for i in range(8):
            at = lengths + i
            y, cache = step(x[np.arange(2), at][:, None], cache)
            assert_allclose(y[:, 0], want[np.arange(2), at], **CLOSE)

    def test_padding_is_never_stored(self, name):
        module, x, _, step = case(name)
        valid = jnp.array([[True] * 3 + [False] * 6, [False] * 9])
        caches = [
            step(jnp.where(valid[..., None], x[:, :9], pad), module.init_cache(2, LENGTH), valid)[1]
            for pad in (0.0, jnp.nan)
        ]
        jax.tree.map(assert_array_equal, *caches)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(caches[1]))
        empty = module.init_cache(2, LENGTH)
        jax.tree.map(lambda a, b: assert_array_equal(a[1], b[1]), caches[1], empty)

    def test_gradient_through_prefill(self, name):
        if name == "lightning lrpe":
            pytest.skip("differs from lightning in its positions only")
        module, x, _, _ = case(name)

        def loss(x, cached):
            if not cached:
                return (module(x) ** 2).sum()
            first, cache = module(x[:, :9], cache=module.init_cache(2, LENGTH))
            second, _ = module(x[:, 9:], cache=cache)
            return (first**2).sum() + (second**2).sum()

        got, want = (
            jax.jit(jax.grad(loss), static_argnums=1)(x, cached) for cached in (True, False)
        )
        assert_allclose(got, want, rtol=1e-3, atol=1e-4)


class TestRing:
    def test_size_does_not_depend_on_the_text(self):
        module = case("sinks")[0]
        assert isinstance(module.init_cache(1, 8), DenseCache)  # the window keeps everything
        sizes = [module.init_cache(1, n).bytes for n in (64, 4096)]
        assert sizes[0] == sizes[1] < module.init_cache(1, 8).bytes * 2

    def test_keeps_sinks_and_the_last_window(self):
        cache = RingCache.create(1, 4, 1, 1, sinks=2)
        new = jnp.arange(11, dtype=jnp.float32).reshape(1, 11, 1, 1)
        whole = cache.append(new, new)
        for i in range(11):
            cache = cache.append(new[:, i : i + 1], new[:, i : i + 1])
        jax.tree.map(assert_array_equal, whole, cache)
        assert sorted(cache.positions[0].tolist()) == [0, 1, 7, 8, 9, 10]
        assert_array_equal(cache.key[0, :, 0, 0], cache.positions[0].astype(jnp.float32))

    def test_prefill_memory_is_linear(self):
        module = MultiHeadAttention(2, 16, causal=True, window=64, sinks=4, rngs=nnx.Rngs(0))
        temporary = []
        for t in (2048, 8192):
            cache = jax.eval_shape(lambda t=t: module.init_cache(1, t))
            x = jax.ShapeDtypeStruct((1, t, 16), jnp.float32)
            step = jax.jit(lambda x, cache: module(x, cache=cache))
            temporary.append(step.lower(x, cache).compile().memory_analysis().temp_size_in_bytes)
        assert temporary[1] < 6 * temporary[0]

    @pytest.mark.parametrize("options", [{"window": 0}, {"window": 3, "sinks": -1}], ids=str)
    def test_bad_sizes(self, options):
        with pytest.raises(ValueError, match="window >= 1"):
            RingCache.create(1, num_kv_heads=1, key_dim=1, **options)


class TestStrided:
    def test_stores_less(self):
        module = BlockStrideAttention(2, 8, block=4, stride=8, local_blocks=2, rngs=nnx.Rngs(0))
        small, dense = module.init_cache(1, 1024), DenseCache.create(1, 1024, 2, 4)
        assert small.key.shape[1] == 2 * 4 + 1024 // 8
        assert small.bytes < dense.bytes / 6

    def test_bad_sizes(self):
        with pytest.raises(ValueError, match="offset=3"):
            StridedCache.create(1, 64, 1, 1, block=4, stride=3, local_blocks=1, offset=3)


class TestDense:
    def test_full_cache_is_an_error_outside_of_jit(self):
        module = case("softmax")[0]
        with pytest.raises(ValueError, match="max_length=8"):
            module(jnp.zeros((1, 9, 8)), cache=module.init_cache(1, 8))

    def test_wrong_cache(self):
        module = case("softmax")[0]
        with pytest.raises(ValueError, match="init_cache"):
            module(jnp.zeros((1, 3, 8)), cache=module.init_cache(2, 8))

    def test_callers_mask(self):
        module, x, _, _ = case("softmax")
        hide = jnp.ones((1, 1, 1, LENGTH), bool).at[..., 2].set(False)
        want = module(x, mask=hide[..., :T])
        got, cache = module(x[:, :9], cache=module.init_cache(2, LENGTH), mask=hide)
        assert_allclose(got, want[:, :9], **CLOSE)
        got, cache = module(x[:, 9:], cache=cache, mask=hide)
        assert_allclose(got, want[:, 9:], **CLOSE)

    def test_sixteen_bits(self):
        module = case("softmax")[0]
        cache = module.init_cache(2, LENGTH, jnp.bfloat16)
        assert cache.key.dtype == jnp.bfloat16 and cache.bytes < module.init_cache(2, LENGTH).bytes
        y, cache = module(jnp.ones((2, 3, 8)), cache=cache)
        assert y.dtype == jnp.float32 and cache.key.dtype == jnp.bfloat16

    def test_positions_and_edits_while_decoding(self):
        from attnjax.taps import Edits, Patch

        module, x, _, _ = case("softmax")
        shifted = jnp.broadcast_to(jnp.arange(T)[None] * 3, (2, T))
        key_mask = jnp.ones((2, LENGTH), bool).at[:, 4].set(False)
        scores = Patch(
            jnp.full((2, 4, 1, LENGTH), 2.0),
            jnp.zeros((2, 4, 1, LENGTH), bool).at[..., 6].set(True),
        )
        edits = Edits(
            head_scale=jnp.array([1.0, 0.0, 2.0, 1.0]), key_mask=key_mask, patch={"scores": scores}
        )
        cut = dataclasses.replace(
            edits,
            key_mask=key_mask[:, :T],
            patch={"scores": jax.tree.map(lambda a: a[..., :T], scores)},
        )
        want = module(x, positions=shifted, edits=cut)
        cache = module.init_cache(2, LENGTH)
        outputs = []
        for start, stop in ((0, 8), (8, 9), (9, T)):
            y, cache = module(
                x[:, start:stop], positions=shifted[:, start:stop], cache=cache, edits=edits
            )
            outputs.append(y)
        assert_allclose(jnp.concatenate(outputs, 1), want, **CLOSE)


def test_caches_shard_by_rows_and_heads():
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    module, x, want, _ = case("sinks")
    place = jax.sharding.NamedSharding(mesh, jax.P("data", None, "tensor"))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
    cache = module.init_cache(2, LENGTH)
    shardings = jax.tree.map(lambda a: place if a.ndim == 4 else rows, cache)
    cache = jax.device_put(cache, shardings)
    step = jax.jit(lambda x, c: module(x, cache=c), out_shardings=(None, shardings))
    got, cache = run(step, x[:, :16], cache, [9, 7])
    assert_allclose(got, want[:, :16], **CLOSE)
    assert cache.key.sharding.is_equivalent_to(place, 4)


def test_states_may_have_any_name_and_keep_shape_and_dtype():
    cache = StateCache.create(
        2, {"count": (3,), "self": ()}, {"count": jnp.float32, "self": "int8"}
    )
    after = cache.next(jnp.array([1, 4]), count=jnp.ones((2, 3)), self=jnp.ones((2,)))
    assert_array_equal(after.length, [1, 4])
    assert_array_equal(after.state["count"], np.ones((2, 3)))
    assert after.state["self"].dtype == jnp.int8
    with pytest.raises(ValueError, match="every state must be given"):
        cache.next(jnp.array([1, 4]), count=jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="every state must be given"):
        cache.next(jnp.array([1, 4]), count=jnp.ones((2, 2)), self=jnp.ones((2,)))
