"""LongGen: layer schedules, layouts, memory, and weights taken over from a dense model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.masks import Strided
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.sparse.longgen import (
    BlockStrideAttention,
    from_dense,
    kv_bytes,
    layer_kinds,
    longgen_layers,
)
from attnjax.models import LanguageModel, LanguageModelConfig, parse_pattern
from attnjax.models.pattern import layer_groups
from pallas_kernels.blocklist import block_list


@pytest.mark.parametrize(
    ("placement", "want"),
    [
        ("middle", "000111000"),
        ("first", "111000000"),
        ("last", "000000111"),
        ("interleaved", "001001001"),
    ],
)
def test_placements(placement, want):
    assert "".join(str(int(k)) for k in layer_kinds(9, 1 / 3, placement)) == want


@pytest.mark.parametrize("num_layers", [1, 2, 5, 32, 80])
@pytest.mark.parametrize("fraction", [0.0, 1 / 3, 1.0])
def test_fraction(num_layers, fraction):
    for placement in ("middle", "interleaved", "first", "last"):
        assert sum(layer_kinds(num_layers, fraction, placement)) == round(num_layers * fraction)


def test_pattern_is_three_scans():
    layers = parse_pattern(longgen_layers(12, sparse="sink", window=128, sinks=4))
    assert [count for _, count in layer_groups(layers)] == [4, 4, 4]
    assert [m.kind for m in layers] == ["window"] * 4 + ["softmax"] * 4 + ["window"] * 4
    assert layers[0].window == 128 and layers[0].sinks == 4
    strided = parse_pattern(longgen_layers(3, block=32, stride=8, local=4))[0]
    assert (strided.block, strided.stride, strided.local) == (32, 8, 4)


@pytest.mark.parametrize(
    "options",
    [{"sparse": "magic"}, {"placement": "top"}, {"full_fraction": 1.5}, {"stride": 0}],
    ids=str,
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=str(next(iter(options)))):
        longgen_layers(6, **options)


def test_bad_layers():
    def make(**options):
        return BlockStrideAttention(2, 8, rngs=nnx.Rngs(0), **options)

    for options in ({"block": 0}, {"stride": 0}, {"local_blocks": 0}, {"stride": 2, "offset": 2}):
        with pytest.raises(ValueError, match="BlockStrideAttention: needs block, stride"):
            make(**options)
    with pytest.raises(NotImplementedError, match="causal=False is not supported"):
        make(causal=False)
    with pytest.raises(ValueError, match="window=4 has no meaning"):
        make(window=4)
    with pytest.raises(ValueError, match="num_layers must be at least 1"):
        layer_kinds(0)


def test_block_layout_is_the_definition():
    module = BlockStrideAttention(2, 8, block=2, stride=3, local_blocks=2, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 17, 8))
    i, j = np.arange(17)[:, None], np.arange(17)
    visible = (j <= i) & ((i // 2 - j // 2 < 2) | (j // 2 % 3 == 0))
    dense = MultiHeadAttention(2, 8, rngs=nnx.Rngs(0))
    got, want = jax.jit(lambda x: (module(x), dense(x, mask=visible[None, None])))(x)
    assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"stride": 1}, {"local_blocks": 99}], ids=str)
def test_reduces_to_dense(options):
    sizes = {"block": 2, "stride": 3, "local_blocks": 2} | options
    x = jax.random.normal(jax.random.key(0), (1, 17, 8))
    dense = MultiHeadAttention(2, 8, causal=True, rngs=nnx.Rngs(0))
    sparse = BlockStrideAttention(2, 8, rngs=nnx.Rngs(0), **sizes)
    got, want = jax.jit(lambda x: (sparse(x), dense(x)))(x)
    assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_memory_of_the_paper():
    """About 7 % of the keys in two thirds of the layers at 128k tokens save about 62 %."""
    for sparse in ("block", "sink"):
        report = kv_bytes(30, 131072, 32, 128, sparse=sparse)
        assert report["dense"] == pytest.approx(30 * 2 * 131072 * 32 * 128 * 2, rel=1e-6)
        assert 0.60 < report["saved"] < 0.67
    report = kv_bytes(30, 131072, 32, 128)
    assert 0.06 < report["sparse_layer"] / report["full_layer"] < 0.08
    assert report["saved"] == pytest.approx(0.62, abs=0.01)


def test_from_dense_keeps_every_weight():
    config = LanguageModelConfig(
        vocab_size=11, width=8, num_layers=5, num_heads=2, mlp_width=8, mixers="softmax"
    )
    dense = LanguageModel(config, rngs=nnx.Rngs(0))
    options = {"block": 2, "stride": 3, "local": 2, "full_fraction": 0.2}
    sparse = from_dense(dense, **options)
    assert [len(group) for group in sparse.layers.groups] == [1, 1, 1]
    back = sparse.with_mixers("softmax")
    states = [nnx.to_pure_dict(nnx.state(m)) for m in (dense, back)]
    jax.tree.map(assert_array_equal, *states)
    tokens = jax.random.randint(jax.random.key(0), (2, 9), 0, 11)
    got = jax.jit(lambda t: from_dense(dense, full_fraction=1.0)(t))(tokens)
    want = jax.jit(lambda t: dense(t))(tokens)
    assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert np.abs(jax.jit(lambda t: sparse(t))(tokens) - want).max() > 1e-4


def test_context_extension_changes_the_base_alone():
    """The recipe's larger base: every weight is the dense model's, every layer turns slower."""
    config = LanguageModelConfig(
        vocab_size=11, width=8, num_layers=3, num_heads=2, mlp_width=8, mixers="softmax",
        rope_base=1e4, max_length=16,
    )  # fmt: skip
    dense = LanguageModel(config, rngs=nnx.Rngs(0))
    sizes = {"block": 4, "stride": 2, "local": 2}
    long = from_dense(dense, rope_base=5e6, max_length=64, **sizes)
    assert (long.config.rope_base, long.config.max_length) == (5e6, 64)
    assert dense.config.rope_base == 1e4
    back = long.with_mixers("softmax")
    states = [nnx.to_pure_dict(nnx.state(m)) for m in (dense, back)]
    jax.tree.map(assert_array_equal, *states)
    assert {b.mixer.rope_base for unit in long.layers.groups for b in unit} == {5e6}
    tokens = jax.random.randint(jax.random.key(0), (1, 40), 0, 11)
    graph, params, rest = nnx.split(long, nnx.Param, ...)

    @jax.jit
    def loss(params):
        logits = nnx.merge(graph, params, rest)(tokens[:, :-1])
        chances = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(chances, tokens[:, 1:, None], axis=-1).mean()

    grads = jax.grad(loss)(params)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    with pytest.raises(ValueError, match="rope_base=0.0 must be positive"):
        from_dense(dense, rope_base=0.0, **sizes)


def test_visited_blocks_of_the_sparse_layers():
    """At 128k tokens a sparse layer visits about 7 % of the keys per row, plus the band."""
    length, block, stride, local = 131072, 64, 16, 16
    tiles = block_list(Strided(block, stride, local), length, length, block_q=block, block_kv=block)
    n = length // block
    band = sum(min(i + 1, local) for i in range(n))
    far = sum(-(-max(i + 1 - local, 0) // stride) for i in range(n))
    assert tiles.stats()["visited"] == band + far
    causal = n * (n + 1) // 2
    assert 0.06 < (band + far) / causal < 0.085


def test_from_dense_refuses_other_weights():
    config = LanguageModelConfig(
        vocab_size=11, width=8, num_layers=2, num_heads=2, mixers="lightning, softmax"
    )
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="other parameters"):
        from_dense(model)
    assert jnp.isfinite(jax.jit(lambda t: model(t))(jnp.zeros((1, 3), jnp.int32))).all()
