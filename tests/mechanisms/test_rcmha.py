"""RCMHA is the composition of its two parts, and each of them where the other does nothing."""

import jax
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.mechanisms.softmax.mdha import MDHA
from attnjax.mechanisms.softmax.rcmha import RCMHA
from attnjax.mechanisms.softmax.transformer_xl import TransformerXLAttention

T, H, D = 7, 2, 4
INIT = nnx.initializers.lecun_normal()


def make(**options):
    return RCMHA(H, H * D, max_distance=10, kernel_init=INIT, rngs=nnx.Rngs(0), **options)


def randomize(module, names):
    for seed, name in enumerate(names):
        parameter = getattr(module, name)
        parameter[...] = jax.random.normal(jax.random.key(seed), parameter.shape)


def copy(source, target, names):
    for name in names:
        for parameter in ("kernel", "bias"):
            new = getattr(getattr(source, name), parameter)
            if new is not None:
                getattr(getattr(target, name), parameter)[...] = new[...]


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(5), (2, T, H * D))


def test_tables_of_zeros_give_mdha(x):
    module = make()
    plain = MDHA(H, H * D, init="uniform", conv_bias=True, rngs=nnx.Rngs(1))
    copy(module, plain, ("query", "key", "value", "out"))
    plain.convolutions = module.convolutions
    assert_allclose(jax.jit(module)(x), jax.jit(plain)(x), rtol=1e-5, atol=1e-5)


def test_identity_kernels_give_relative_attention(x):
    module = make(init="identity")
    names = ("table", "table_bias", "content_bias")
    randomize(module, names)
    other = TransformerXLAttention(H, H * D, encoding="learned", max_distance=10, rngs=nnx.Rngs(1))
    copy(module, other, ("query", "key", "value", "out"))
    for name in names:
        getattr(other, name)[...] = getattr(module, name)[...]
    assert_allclose(jax.jit(module)(x), jax.jit(other)(x), rtol=1e-5, atol=1e-5)


def test_a_memory_is_convolved_with_the_segment(x):
    module = make()
    randomize(module, ("table", "table_bias", "content_bias"))

    @jax.jit
    def run(x):
        _, memory = module.segment(x[:, :4], None)
        return module.segment(x[:, 4:], memory)[0], module(x)[:, 4:]

    got, want = run(x)
    assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_sinusoids_can_replace_the_tables(x):
    assert make(encoding="sinusoid").table is None
    assert np.isfinite(jax.jit(make(encoding="sinusoid"))(x)).all()
