"""`attnjax.functional.neighborhood_attention`, the module, and the mask in row-major order."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import attnjax as aj
from attnjax.masks import Neighborhood
from attnjax.nn import NeighborhoodAttention
from attnjax.taps import Edits
from pallas_kernels.maskprogram import EMPTY, FULL
from pallas_kernels.neighborhood import permute_tokens, token_layout, unpermute_tokens
from tests.neighborhood import naive

run = aj.functional.neighborhood_attention


def module(*args, **options):
    return NeighborhoodAttention(*args, rngs=nnx.Rngs(0), **options)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_mask_in_row_major_order(rank):
    rng = np.random.default_rng(rank)
    for _ in range(8):
        case = naive.random_case(rng, rank)
        mask = Neighborhood(**case, additional=3)
        want = np.pad(naive.dense_mask(**case), ((0, 0), (0, 3)), constant_values=True)
        t, s = want.shape
        got = mask.predicate(0, 0, np.arange(t)[:, None], np.arange(s)[None])
        assert_array_equal(got, want, err_msg=str(case))
        q0, k0 = rng.integers(0, t, 60), rng.integers(0, s, 60)
        q1, k1 = (np.minimum(x + rng.integers(1, 12, 60), n) for x, n in ((q0, t), (k0, s)))
        kinds = mask.classify(q0, q1, k0, k1)
        for kind, a, b, c, d in zip(kinds, q0, q1, k0, k1):
            assert kind != EMPTY or not want[a:b, c:d].any()
            assert kind != FULL or want[a:b, c:d].all()


def test_mask_combines_with_others():
    mask = Neighborhood((4, 5), 3) & ~aj.masks.Sink(2)
    want = naive.dense_mask((4, 5), 3)
    want[:, :2] = False
    assert_array_equal(mask.dense(20)[0, 0], want)
    assert repr(Neighborhood((4, 5), 3)).startswith("Neighborhood((4, 5), (3, 3)")
    with pytest.raises(ValueError, match="spans 5 tokens, but axis 0 has 4"):
        Neighborhood((4, 5), 5)


def test_paths_agree():
    """Dense, block-sparse by the kernel, and the mask with plain attention."""
    q, k, v = normal(0, 3, 2, 7, 9, 4, 8)
    k, v = k[..., :2, :], v[..., :2, :]
    more = normal(1, 2, 2, 3, 2, 8)
    window = dict(kernel_size=(3, 4), dilation=(2, 1), is_causal=(False, True), stride=(1, 2))
    options = dict(additional_keys=more[0], additional_values=more[1], return_residual=True)
    dense = run(q, k, v, implementation="dense", **window, **options)
    sparse = run(q, k, v, implementation="block_sparse", **window, **options)
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=2e-6), dense, sparse)
    chosen = run(q, k, v, **window, **options)
    jax.tree.map(assert_array_equal, chosen, dense)  # a small map
    flat = [x.reshape(2, 63, *x.shape[3:]) for x in (q, k, v)]
    both = [jnp.concatenate([x, y], axis=1) for x, y in zip(flat[1:], more)]
    want = aj.attention(flat[0], *both, mask=Neighborhood((7, 9), **window, additional=3))
    assert_allclose(dense[0].reshape(want.shape), want, atol=2e-6)


def test_head_groups_agree():
    q, k, v = normal(0, 3, 1, 6, 8, 4, 8)
    groups = [
        (1, {"kernel_size": 5, "rel_bias": normal(2, 1, 9, 9)}),
        (3, {"dilation": (1, 2), "stride": 2}),
    ]
    got = [
        run(q, k, v, kernel_size=3, head_groups=groups, implementation=name)
        for name in ("dense", "block_sparse")
    ]
    assert_allclose(*got, atol=2e-6)


def test_module_is_the_function():
    layer = module(4, 16, num_kv_heads=2, kernel_size=(3, 5), rel_bias=True, qk_norm="rms")
    x = normal(0, 2, 6, 7, 16)
    q, k, v = (project(x) for project in (layer.query, layer.key, layer.value))
    q, k = layer.query_ln(q), layer.key_ln(k)
    z = run(q, k, v, kernel_size=(3, 5), rel_bias=layer.rel_bias[...])
    assert_allclose(layer(x), layer.out(z), atol=1e-6)
    assert layer.rel_bias[...].shape == (4, 5, 9)


@pytest.mark.parametrize("shape", [(12,), (5, 6), (3, 4, 5)])
def test_one_module_for_every_rank(shape):
    layer = module(2, 8, kernel_size=3, is_causal=True)
    x = normal(0, 1, *shape, 8)
    assert layer(x).shape == x.shape
    at = tuple(n // 2 for n in shape)
    grad = np.asarray(jax.grad(lambda x: (layer(x)[(0, *at)] ** 2).sum())(x))[0]
    seen = np.abs(grad).max(-1) > 0
    inside = np.indices(shape)
    want = np.all([(i <= n) & (i > n - 3) for i, n in zip(inside, at)], axis=0)
    assert_array_equal(seen, want)


def test_causal_sequence_is_multi_head_attention_with_a_window():
    layer = module(2, 8, kernel_size=4, is_causal=True)
    other = aj.nn.MultiHeadAttention(2, 8, causal=True, window=4, rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(layer, nnx.Param))
    x = normal(0, 2, 15, 8)
    assert_allclose(layer(x), other(x), atol=1e-6)


def test_full_window_is_multi_head_attention():
    layer = module(2, 8, kernel_size=(3, 5))
    other = aj.nn.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(layer, nnx.Param))
    x = normal(0, 2, 3, 5, 8)
    assert_allclose(layer(x).reshape(2, 15, 8), other(x.reshape(2, 15, 8)), atol=1e-6)


def test_auto_pad_sees_zeros_behind_the_map():
    options = dict(kernel_size=(5, 3), dilation=(1, 2))
    x = normal(0, 1, 4, 5, 8)
    with pytest.raises(ValueError, match="auto_pad=True"):
        module(2, 8, **options)(x)
    got = module(2, 8, auto_pad=True, **options)(x)
    padded = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    assert_array_equal(got, module(2, 8, **options)(padded)[:, :4, :5])
    large = normal(0, 1, 6, 7, 8)
    assert_array_equal(
        module(2, 8, auto_pad=True, **options)(large), module(2, 8, **options)(large)
    )


def test_two_layers_in_tile_order():
    shape = (9, 10)
    layout = token_layout(shape, kernel_size=5)
    layers = [nnx.jit(module(2, 8, kernel_size=n)) for n in (5, 3)]
    x = normal(0, 2, *shape, 8)
    y = permute_tokens(x, layout)
    for layer in layers:
        x, y = layer(x), layer(y, pre_permuted=layout)
    assert_allclose(unpermute_tokens(y, layout), x, atol=1e-6)


def test_taps():
    layer = module(2, 8, kernel_size=3)
    x = normal(0, 1, 4, 6, 8)
    y, got = layer(x, capture=("z", "weights", "head_out"))
    assert_allclose(y, layer(x), atol=1e-6)
    assert got["weights"].shape == (1, 2, 24, 24)
    seen = naive.dense_mask((4, 6), 3)
    assert_array_equal(np.asarray(got["weights"] > 0)[0, 0], seen)
    assert_allclose(got["head_out"].sum(2) + layer.out.bias[...][None, None], y.reshape(1, 24, 8),
                    atol=1e-6)  # fmt: skip
    hidden = jnp.ones((1, 24), bool).at[0, 7].set(False)
    grad = jax.grad(lambda x: layer(x, edits=Edits(key_mask=hidden))[0, 0, 0].sum())(x)
    assert_array_equal(grad[0, 1, 1], 0)
    off = layer(x, edits=Edits(head_scale=jnp.zeros((2,))))
    assert_allclose(off, jnp.zeros_like(x) + layer.out.bias[...][None, None, None], atol=1e-6)
    layout = token_layout((4, 6), kernel_size=3)
    with pytest.raises(NotImplementedError, match="row-major order"):
        layer(permute_tokens(x, layout), pre_permuted=layout, capture=("weights",))


def test_additional_keys_and_head_groups_in_the_module():
    groups = [(2, {"kernel_size": 3}), (2, {"kernel_size": 3, "dilation": 2})]
    layer = module(4, 16, head_groups=groups)
    x, more = normal(0, 1, 6, 7, 16), normal(1, 2, 1, 5, 4, 4)
    got = layer(x, additional_keys=more[0], additional_values=more[1])
    q, k, v = (project(x) for project in (layer.query, layer.key, layer.value))
    z = run(q, k, v, head_groups=groups, additional_keys=more[0], additional_values=more[1])
    assert_allclose(got, layer.out(z), atol=1e-6)
    assert np.abs(got - layer(x)).max() > 1e-3


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(), "pass kernel_size"),
        (dict(kernel_size=3, rel_bias=True), "one entry per axis"),
        (dict(kernel_size=3, window=4), "window=4 has no meaning here"),
        (dict(kernel_size=3, rope_base=1e4), "rope_base=10000.0 has no meaning"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        module(2, 8, **options)


def test_wrong_calls():
    layer = module(2, 8, kernel_size=3)
    with pytest.raises(ValueError, match=r"x must have shape \[batch, \*shape, 8\]"):
        layer(jnp.zeros((1, 4, 4, 6)))
    with pytest.raises(NotImplementedError, match="has no cache"):
        layer.init_cache(1, 4)
    x = jnp.zeros((1, 16, 2, 4))
    with pytest.raises(NotImplementedError, match="takes tokens in their own order"):
        run(x, x, x, kernel_size=3, implementation="dense",
            pre_permuted=token_layout((4, 4), kernel_size=3))  # fmt: skip


def test_table_of_the_documentation_is_current():
    from docs.tools import neighborhood, tables

    found = tables.between(neighborhood.PAGE.read_text(), "efficiency")
    assert found == neighborhood.table(), "run `python -m docs.tools.neighborhood`"
