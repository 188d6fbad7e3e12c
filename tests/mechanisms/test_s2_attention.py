"""S2-Attention: layouts, visited blocks, coverage by the heads, caches by phase."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax import attention
from attnjax.masks import BlockPattern, Causal, Strided
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.sparse.s2_attention import (
    S2Attention,
    S2Cache,
    block_csr,
    head_offsets,
    is_cache_efficient,
    local_stride_layout,
    phases,
)
from attnjax.taps import Edits
from pallas_kernels.blocklist import block_list


def naive(heads, groups, length, c, near, s, dense=0, step=None, offset=0):
    """Token booleans [h, t, t] of the causal form, by its definition."""
    step = max(1, s // heads) if step is None else step
    seen = np.zeros((heads, length, length), bool)
    for h in range(heads):
        g = h // (heads // groups)
        for i in range(length):
            for j in range(i + 1):
                far = g >= groups - dense or (j // c + g * step + offset) % s == 0
                seen[h, i, j] = far or i // c - j // c < near
    return seen


@pytest.mark.parametrize(
    "sizes",
    [
        dict(heads=4, groups=2, length=23, c=3, near=2, s=2),
        dict(heads=6, groups=3, length=26, c=2, near=1, s=3, dense=1),
        dict(heads=2, groups=2, length=21, c=2, near=2, s=5, step=2, offset=1),
    ],
    ids=str,
)
def test_layout_is_the_definition(sizes):
    want = naive(**sizes)
    layout = local_stride_layout(
        sizes["heads"], sizes["length"], num_kv_heads=sizes["groups"], block=sizes["c"],
        local_blocks=sizes["near"], stride=sizes["s"], dense_heads=sizes.get("dense", 0),
        step=sizes.get("step"), offset=sizes.get("offset", 0),
    )  # fmt: skip
    mask = BlockPattern(layout, sizes["c"]) & Causal()
    assert_array_equal(mask.dense(sizes["length"], num_heads=sizes["heads"])[0], want)
    assert is_cache_efficient(layout)


def test_module_is_the_definition_and_decodes_by_phase():
    """Values of all paths; three strided caches and a dense one keep less than all tokens."""
    module = S2Attention(
        8, 16, num_kv_heads=4, block=2, local_blocks=2, stride=3, dense_heads=1, step=1,
        rope_base=1e4, rngs=nnx.Rngs(0),
    )  # fmt: skip
    dense = MultiHeadAttention(
        8, 16, num_kv_heads=4, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (2, 29, 16))
    mask = jnp.asarray(naive(8, 4, 29, 2, 2, 3, dense=1, step=1))[None]
    got, want = jax.jit(lambda x: (module(x), dense(x, mask=mask)))(x)
    assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    cache = module.init_cache(2, 30)
    assert isinstance(cache, S2Cache)
    assert [type(p).__name__ for p in cache.parts] == ["StridedCache"] * 3 + ["DenseCache"]
    assert cache.bytes < 0.8 * MultiHeadAttention.init_cache(dense, 2, 30).bytes
    step = jax.jit(lambda x, cache: module(x, cache=cache))
    outputs = []
    for chunk in (x[:, :13], *(x[:, i : i + 1] for i in range(13, 29))):
        y, cache = step(chunk, cache)
        outputs.append(y)
    assert_allclose(jnp.concatenate(outputs, 1), want, rtol=1e-4, atol=1e-5)


def test_visited_blocks_are_those_of_the_layout():
    """A list of tiles by head: what is visited is what the layout counts, about 1/s of causal."""
    heads, length, c = 4, 1 << 13, 64
    sizes = dict(num_kv_heads=4, block=c, local_blocks=4, stride=4)
    layout = local_stride_layout(heads, length, **sizes)
    mask = BlockPattern(layout, c) & Causal()
    formula = Strided(c, 4, 4, head_offsets(heads, 4, 4))
    for program in (mask, formula):
        tiles = block_list(program, length, length, block_q=c, block_kv=c, num_heads=heads)
        assert tiles.stats()["visited"] == layout.sum()
    causal = heads * (length // c) * (length // c + 1) // 2
    assert layout.sum() / causal == pytest.approx(1 / 4, abs=0.05)
    n = length // c
    local = sum(min(i + 1, 4) for i in range(n))
    far = sum(
        sum((j + h) % 4 == 0 for j in range(max(i - 3, 0))) for h in range(4) for i in range(n)
    )
    assert layout.sum() == heads * local + far


def test_block_sparse_with_a_layout_by_head():
    """The kernel's path equals the dense one, values and gradients."""
    layout = local_stride_layout(3, 45, block=4, local_blocks=1, stride=3)
    mask = BlockPattern(layout, 4) & Causal()
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 45, 3, 8))

    def loss(path, q, k, v):
        out = attention(q, k, v, mask=mask, implementation=path, block_sizes=path and (8, 8))
        return (out**2).sum()

    got = jax.jit(jax.grad(lambda *a: loss("block_sparse", *a), argnums=(0, 1, 2)))(q, k, v)
    want = jax.jit(jax.grad(lambda *a: loss(None, *a), argnums=(0, 1, 2)))(q, k, v)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_heads_together_read_every_block():
    layout = local_stride_layout(4, 64, block=2, local_blocks=1, stride=4)
    assert_array_equal(layout.any(0), np.tri(32, dtype=bool))
    assert phases(head_offsets(4, 4, 4), 4) == 4
    # configuration with 2 heads and stride 6: step 3, so that phases 0 and 3 alone exist
    assert phases(head_offsets(2, 2, 6), 6) == 2
    with pytest.warns(UserWarning, match="2 of stride=6 phases"):
        S2Attention(2, 8, stride=6, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("options", [{"stride": 1}, {"local_blocks": 99}, {"dense_heads": 4}])
@pytest.mark.parametrize("causal", [True, False])
def test_reduces_to_dense(options, causal):
    sizes = {"block": 2, "stride": 4, "local_blocks": 1} | options
    module = S2Attention(4, 8, causal=causal, rngs=nnx.Rngs(0), **sizes)
    dense = MultiHeadAttention(4, 8, causal=causal, use_bias=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 13, 8))
    got, want = jax.jit(lambda x: (module(x), dense(x)))(x)
    assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_one_phase_is_longgen():
    layout = local_stride_layout(4, 40, block=2, local_blocks=2, stride=3, homo=True)
    assert layout.shape[0] == 1
    want = Strided(2, 3, 2).dense(40)
    assert_array_equal((BlockPattern(layout, 2) & Causal()).dense(40), want)


def test_bidirectional_counts_from_the_band():
    layout = local_stride_layout(2, 12, block=1, local_blocks=2, stride=3, causal=False)
    i, j = np.arange(12)[:, None], np.arange(12)
    beyond = np.maximum(np.abs(i - j) - 1, 0)
    assert_array_equal(layout[0], beyond % 3 == 0)
    assert layout.shape[0] == 1 and not is_cache_efficient(layout)
    # a module with bands of other lengths to the left and to the right
    sizes = dict(block=2, local_blocks=(1, 3), stride=4)
    module = S2Attention(2, 8, causal=False, **sizes, rngs=nnx.Rngs(0))
    i, j = i // 2, j // 2
    seen = (np.maximum(i - j, 0) + np.maximum(j - i - 2, 0)) % 4 == 0
    assert_array_equal(module.layout(12).dense(12)[0, 0], seen)


def test_rows_of_a_part():
    """Rows behind a cache, and parts of a longer text, are slices of the whole layout."""
    sizes = dict(block=4, local_blocks=2, stride=3)
    whole = local_stride_layout(3, 48, **sizes)
    assert_array_equal(local_stride_layout(3, 48, past_length=17, **sizes), whole[:, 5:])
    part = local_stride_layout(3, 16, q_start=32, kv_start=16, **sizes)
    assert_array_equal(part, whole[:, 8:12, 4:8])
    rows, columns = block_csr(whole)
    h, i = 2, 7
    got = columns[h, rows[h, i] : rows[h, i + 1]]
    assert_array_equal(got, np.nonzero(whole[h, i])[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "at least 1"),
        ({"dense_heads": 5}, "dense_heads=5"),
        ({"dense_heads": 1, "homo": True}, "0 with homo"),
        ({"block": 0}, "block=0"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        S2Attention(4, 8, **{"stride": 2, **options}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        local_stride_layout(4, 16, **{"stride": 2, **options})


def test_bad_calls():
    with pytest.raises(ValueError, match="multiples of block"):
        local_stride_layout(4, 16, q_start=3, block=2)
    with pytest.raises(ValueError, match="length=0"):
        local_stride_layout(4, 0)
    for options in ({"step": 1}, {"offset": 1}, {"homo": True}):
        with pytest.raises(ValueError, match="no meaning with causal=False"):
            S2Attention(4, 8, causal=False, **options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must be one number with causal=True"):
        S2Attention(4, 8, local_blocks=(1, 2), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="layout needs the length"):
        S2Attention(4, 8, causal=False, rngs=nnx.Rngs(0)).layout()


def test_a_cache_of_some_keys_refuses_edits():
    module = S2Attention(2, 8, block=1, local_blocks=1, rngs=nnx.Rngs(0))
    cache = module.init_cache(1, 9)
    x = jnp.ones((1, 2, 8))
    with pytest.raises(NotImplementedError, match="key_mask with S2Cache"):
        module(x, cache=cache, edits=Edits(key_mask=jnp.ones((1, 9), bool)))
    with pytest.raises(NotImplementedError, match="capture='weights'"):
        module(x, cache=cache, capture=("weights",))
