"""MDHA: its convolutions against NumPy, its limit, its cache."""

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.attention import attention
from attnjax.mechanisms.softmax.mdha import MDHA

T, H, D = 7, 2, 4


def make(seed=0, **options):
    return MDHA(H, H * D, rngs=nnx.Rngs(seed), **options)


@pytest.mark.parametrize("sharing", ["per_head", "per_dim", "shared"])
def test_equals_the_definition(sharing):
    module = make(sharing=sharing, width=3, init="uniform", conv_bias=True)
    x = jax.random.normal(jax.random.key(1), (1, T, H * D))
    parts = []
    for name in ("query", "key", "value"):
        y = np.einsum("tm,mhd->thd", x[0], getattr(module, name).kernel[...])
        kernel = np.broadcast_to(getattr(module.convolutions, name)[...], (3, H, D))
        bias = np.asarray(getattr(module.convolutions, f"{name}_bias")[...])
        past = np.concatenate([np.zeros((2, H, D)), y])
        parts.append(np.stack([(kernel * past[t : t + 3]).sum(0) + bias for t in range(T)]))
    q, k, v = parts
    weights = np.exp(np.einsum("thd,shd->hts", q, k) / D**0.5) * np.tril(np.ones((T, T)))
    z = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)
    want = np.einsum("thd,hdm->tm", z, module.out.kernel[...])[None]
    assert_allclose(jax.jit(module)(x), want, rtol=1e-5, atol=1e-5)


def test_identity_kernels_give_plain_attention():
    module = make(init="identity")
    x = jax.random.normal(jax.random.key(1), (2, T, H * D))

    @jax.jit
    def run(x):
        q, k, v = (getattr(module, n)(x) for n in ("query", "key", "value"))
        return module(x), module.out(attention(q, k, v, is_causal=True))

    assert_array_equal(*run(x))


@pytest.mark.parametrize(("sharing", "count"), [("per_head", H * D), ("per_dim", D), ("shared", 1)])
def test_counts_of_parameters(sharing, count):
    state = nnx.state(make(sharing=sharing, conv_bias=True).convolutions, nnx.Param)
    assert sum(p.size for p in jax.tree.leaves(state)) == 3 * (3 + 1) * count


def test_starts_as_in_the_authors_code():
    kernel = make().convolutions.query[...]
    assert_allclose(kernel[:, 0, 0], [0.5 / 3, 0.5 / 3, 0.5])


def test_the_cache_keeps_two_tokens_before_the_convolutions():
    module = make(width=3)
    cache = module.init_cache(1, 5)
    assert {n: a.shape for n, a in cache.taps.items()} == dict.fromkeys(
        ("query", "key", "value"), (1, 2, H, D)
    )
    x = jax.random.normal(jax.random.key(1), (1, 3, H * D))
    _, cache = jax.jit(module)(x, cache=cache)
    assert_allclose(cache.taps["query"], module.query(x)[:, 1:], rtol=1e-6)
    assert int(cache.length[0]) == 3 and cache.max_length == 5 and cache.bytes > 0


def test_bad_options_are_named():
    for options, message in (
        (dict(width=0), "width=0"),
        (dict(sharing="none"), "sharing='none'"),
        (dict(init="zeros"), "init='zeros'"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
