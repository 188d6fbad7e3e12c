"""Co4 against its definition in NumPy, its options, and its linear cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.co4 import (
    Co4,
    gather,
    modulate,
    transfer_function,
)
from attnjax.mechanisms.softmax.co4 import (
    co4_attention as eager,
)

T, C, K = 9, 4, 3
co4_attention = jax.jit(
    eager,
    static_argnames=(
        "num_heads", "num_latents", "top_k", "transfer", "aggregation", "selection",
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def arrays():
    return np.random.default_rng(0).normal(size=(3, 2, T, C))


def naive(q, k, v):
    """One row, channel by channel."""
    (qc, q), (kc, k), (vc, v) = ((x[:1], x[1:]) for x in (q, k, v))
    mods = q + qc * k, k + kc * q, v**2 + 2 * v + qc * kc * (1 + abs(vc))
    order = [np.argsort(-m, axis=0)[:K] for m in mods]
    tops = [np.take_along_axis(m, i, 0) for m, i in zip(mods, order, strict=True)]
    big = [np.concatenate(p) for p in zip((qc, kc, vc), tops, strict=True)]
    w = np.exp(big[0] @ big[1].T / np.sqrt(C))
    o = w @ big[2] / w.sum(-1, keepdims=True)
    out = mods[2].copy()
    for row, c in np.ndindex(K, C):
        out[order[2][row, c], c] += o[1 + row, c]
    return np.concatenate([o[:1], out])


def test_equals_the_definition(arrays):
    with jax.enable_x64(True):
        got = co4_attention(*map(jnp.asarray, arrays), top_k=K)
    for b in range(2):
        assert_allclose(got[b], naive(*arrays[:, b]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("selection", ["channel", "token"])
@pytest.mark.parametrize("aggregation", ["topk", "max", "mean"])
def test_padding_is_never_picked(arrays, selection, aggregation):
    """Long padded rows give what short rows give, even when fewer patches than k are real."""
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays)
    valid = jnp.arange(T)[None] < jnp.asarray([[T], [K]])  # the second row has K - 1 patches
    options = dict(aggregation=aggregation, selection=selection)
    got = co4_attention(q, k, v, top_k=K, valid=valid, **options)
    want = co4_attention(q[1:, :K], k[1:, :K], v[1:, :K], top_k=K - 1, **options)
    assert_allclose(got[1:, :K], want, rtol=1e-5, atol=1e-5)
    assert_allclose(got[:1], co4_attention(q, k, v, top_k=K, **options)[:1], rtol=1e-5, atol=1e-5)


def test_top_k_of_zero_reads_modulated_values_alone(arrays):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays)
    got = eager(q, k, v, top_k=0)
    assert_allclose(got[:, :1], v[:, :1], rtol=1e-6)
    assert_array_equal(got[:, 1:], modulate(q, k, v)[2])


def test_max_is_the_largest_entry_of_each_channel(arrays):
    streams = modulate(*(jnp.asarray(x, jnp.float32) for x in arrays))
    rows, _, _ = gather(streams, 0, "max", "channel", None, 1)
    assert_array_equal(rows[0][:, 0], streams[0].max(1))
    tokens, index, _ = gather(streams, 2, "topk", "token", None, 1)
    norms = jnp.linalg.norm(streams[2], axis=-1)
    assert_array_equal(index[:, 0, 0], norms.argmax(1))
    assert_allclose(jnp.linalg.norm(tokens[2][:, 0], axis=-1), norms.max(1), rtol=1e-6)


def test_the_transfer_function_and_its_use_on_all_streams(arrays):
    q, k, v = (jnp.asarray(x, jnp.float32) for x in arrays)
    assert_allclose(transfer_function(jnp.asarray(1.0), jnp.asarray(0.5)), 4.0)
    assert_allclose(transfer_function(jnp.asarray(9.0), jnp.asarray(1.0)), 6.0)
    assert_allclose(transfer_function(jnp.asarray(-1.0), jnp.asarray(0.0)), 0.0)
    relu, plain = (modulate(q, k, v, transfer=name) for name in ("relu6", "plain"))
    for got, want in zip(relu, plain, strict=True):
        assert_array_equal(got, jnp.clip(want, 0, 6))
    context = q[:, :1] * k[:, 1:]
    assert_allclose(relu[0], transfer_function(q[:, 1:], context), rtol=1e-6)


def test_equal_latents_count_as_one(arrays):
    doubled = [jnp.concatenate([x[:, :1], x], 1) for x in jnp.asarray(arrays, jnp.float32)]
    for got, want in zip(
        modulate(*doubled, num_latents=2), modulate(*jnp.asarray(arrays, jnp.float32)), strict=True
    ):
        assert_allclose(got, want, rtol=1e-6)


def test_the_cost_is_linear_in_the_tokens():
    def flops(t):
        x = jax.ShapeDtypeStruct((1, t, 16), jnp.float32)
        run = jax.jit(lambda q, k, v: co4_attention(q, k, v, top_k=4))
        return run.lower(x, x, x).compile().cost_analysis()["flops"]

    assert flops(1025) / flops(257) < 4.5


def test_module_has_no_output_projection_unless_asked_for():
    x = jax.random.normal(jax.random.key(1), (1, T, 8))
    module = Co4(2, 8, top_k=K, rngs=nnx.Rngs(0))
    assert module.out is None
    wide = Co4(2, 8, out_features=5, top_k=K, output_projection=True, rngs=nnx.Rngs(0))

    @jax.jit
    def run(x):
        q, k, v = (getattr(module, n)(x).reshape(1, T, 8) for n in ("query", "key", "value"))
        want = eager(q, k, v, num_heads=2, top_k=K)
        return module(x), want, wide(x, capture=("weights",))

    got, want, (y, sites) = run(x)
    assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert y.shape == (1, T, 5) and sites["weights"].shape == (1, 2, K + 1, K + 1)


def test_bad_options_are_named(arrays):
    q = jnp.asarray(arrays[0], jnp.float32)
    for options, message in (
        (dict(top_k=T), f"top_k={T} must be between 0 and the {T - 1} patches"),
        (dict(num_latents=T), f"num_latents={T}"),
        (dict(transfer="x"), "transfer='x'"),
        (dict(selection="x"), "selection='x'"),
        (dict(num_heads=3, top_k=1), "num_heads=3"),
    ):
        with pytest.raises(ValueError, match=message):
            co4_attention(q, q, q, **options)
    with pytest.raises(ValueError, match="output_projection=True"):
        Co4(1, 8, out_features=4, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="bidirectional only"):
        Co4(1, 8, causal=True, rngs=nnx.Rngs(0))
