"""DuoAttention: gates and their training, and caches by head once the heads are chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.cache import DenseCache
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.sparse.duo_attention import (
    DuoAttention,
    binarize,
    clip_gates,
    duo_attention,
    duo_loss,
    duo_schedule,
)

SIZES = {"sinks": 2, "recent": 3}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def layer(**options):
    options = {"num_kv_heads": 2, "rope_base": 1e4, **SIZES, **options}
    return DuoAttention(4, 16, rngs=nnx.Rngs(0), **options)


def jitted(module):
    graph, state = nnx.split(module)
    return jax.jit(lambda x, **options: nnx.merge(graph, state)(x, **options))


def naive(q, k, v, gates):
    """The definition, with explicit softmax over explicit sets of keys."""
    t, rep = q.shape[1], q.shape[2] // k.shape[2]
    i, j = np.arange(t)[:, None], np.arange(t)
    k, v = (jnp.repeat(x, rep, 2) for x in (k, v))
    p = jnp.exp(jnp.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5)
    outs = []
    for seen in (j <= i, (j <= i) & ((j < 2) | (i - j < 3))):
        w = p * seen.astype(np.float32)[None, None]
        outs.append(jnp.einsum("bhts,bshe->bthe", w / w.sum(-1, keepdims=True), v))
    alpha = jnp.repeat(gates, rep)[None, None, :, None]
    return alpha * outs[0] + (1 - alpha) * outs[1]


def test_value_and_gradients():
    args = normal(0, 2, 9, 4, 6), normal(1, 2, 9, 2, 6), normal(2, 2, 9, 2, 5)
    args = *args, jnp.array([0.3, 0.9])

    def loss(fn):
        return jax.value_and_grad(lambda *a: (lambda o: ((o**2).sum(), o))(fn(*a)), range(4), True)

    got = jax.jit(loss(lambda *a: duo_attention(*a, **SIZES)))(*args)
    want = jax.jit(loss(naive))(*args)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_gates_outside_get_no_gradient():
    gates = jnp.array([-0.1, 0.0, 0.4, 1.0, 1.2])
    assert_allclose(clip_gates(gates), [0, 0, 0.4, 1, 1])
    assert_allclose(jax.grad(lambda g: clip_gates(g).sum())(gates), [0, 1, 1, 1, 0])
    module = layer()
    module.gate[...] = jnp.array([-0.1, 1.2])
    module.project()
    assert_allclose(module.gate[...], [0, 1])


@pytest.mark.parametrize("gate", [0.0, 1.0])
def test_reduces_to_dense_and_to_streaming(gate):
    options = {"window": 3, "sinks": 2} if gate == 0 else {}
    dense = MultiHeadAttention(
        4, 16, num_kv_heads=2, causal=True, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(1),
        **options,
    )  # fmt: skip
    gated = layer()
    state = nnx.state(gated, nnx.Param)
    nnx.update(dense, {n: state[n] for n in ("query", "key", "value", "out")})
    gated.gate[...] = jnp.full((2,), gate)
    x = normal(0, 2, 9, 16)
    want = jitted(dense)(x)
    assert_allclose(jitted(gated)(x), want, rtol=1e-5, atol=1e-6)
    assert_allclose(jitted(gated.deploy([gate == 1] * 2))(x), want, rtol=1e-5, atol=1e-6)


def test_two_streams():
    """The full part is the dense stream's and carries no gradient, unless asked for."""
    module = layer()
    module.gate[...] = jnp.array([0.2, 0.7])
    graph, state = nnx.split(module)
    x_full, x = normal(0, 2, 8, 16), normal(1, 2, 8, 16)

    @jax.jit
    def run(x_full, x):
        module = nnx.merge(graph, state)
        y_full, y = module.streams(x_full, x)
        same = module.streams(x, x, full_from="mixed_stream")
        of_full = jax.grad(lambda a: (nnx.merge(graph, state).streams(a, x)[1] ** 2).sum())(x_full)
        return y_full, y, same, of_full, module(x)

    y_full, y, same, of_full, plain = run(x_full, x)
    assert_array_equal(of_full, jnp.zeros_like(of_full))
    assert_allclose(same[1], plain, rtol=1e-5, atol=1e-6)
    assert_allclose(same[0], jitted(module.deploy([True, True]))(x), rtol=1e-5, atol=1e-6)
    assert np.abs(y - same[1]).max() > 1e-3
    assert y_full.shape == y.shape


@pytest.mark.parametrize("rule", ["exact", "released"])
def test_chunks_of_deployed_heads(rule):
    """Exact: as the whole text. Released: each token sees the cache and its whole chunk."""
    module = layer(full_heads=[False, True], chunk_rule=rule)
    x = normal(0, 2, 12, 16)
    call = jitted(module)
    if rule == "exact":
        want = call(x)
    else:
        dense = layer(sinks=0, recent=99)
        nnx.update(dense, nnx.state(module, nnx.Param))
        q, k, v = dense.query(x), dense.key(x), dense.value(x)
        begin = dense.begin(x)
        q, k = dense.rotate(begin, q, k)
        i, j = np.arange(12)[:, None], np.arange(12)
        first = np.repeat([0, 5, 10, 11], [5, 5, 1, 1])[:, None]
        seen = (j <= i) & ((j < 2) | (j >= first - 3))
        full = np.broadcast_to(j <= i, seen.shape)
        visible = np.stack([seen, seen, full, full])[None]
        z, _ = dense.attend(begin, q, k, v, layout=jnp.asarray(visible))
        want = dense.out(z)
    cache = module.init_cache(2, 12)
    for start, stop in ((0, 5), (5, 10), (10, 11), (11, 12)):
        y, cache = call(x[:, start:stop], cache=cache)
        assert_allclose(y, want[:, start:stop], rtol=1e-5, atol=1e-5)


def test_memory_is_by_head():
    """g_full T + g_stream (n + w) keys and values; the rest are positions and lengths."""
    for heads in ([True, False], [False, False], [True, True]):
        module = layer(full_heads=heads)
        cache = module.init_cache(3, 40)
        kept = sum(40 if full else 2 + 3 for full in heads)
        arrays = [x for x in jax.tree.leaves(cache) if x.ndim == 4]
        assert sum(x.size for x in arrays) == 2 * 3 * kept * 4
        assert cache.bytes < 4 * 2 * 3 * kept * 4 + 4 * 3 * (5 + 2) + 1
    assert isinstance(layer().init_cache(3, 40), DenseCache)


def test_padded_rows_of_deployed_heads():
    module = layer(full_heads=[True, False])
    call, x = jitted(module), normal(0, 2, 9, 16)
    valid = jnp.arange(9)[None] < jnp.array([[8], [4]])
    _, cache = call(
        jnp.where(valid[..., None], x, jnp.nan), cache=module.init_cache(2, 12), valid=valid
    )
    y, cache = call(jnp.stack([x[0, 8:], x[1, 4:5]]), cache=cache)
    want = call(x)
    assert_array_equal(cache.length, [9, 5])
    assert_allclose(y[:, 0], jnp.stack([want[0, 8], want[1, 4]]), rtol=1e-5, atol=1e-5)


def test_binarize():
    gates = np.array([[0.1, 0.9, 0.9], [0.9, 1.3, -0.2]])
    assert_array_equal(binarize(gates, threshold=0.5), gates >= 0.5)
    for sparsity in (0.0, 0.5, 1.0):  # exact shares although three gates are equal
        full = binarize(gates, sparsity=sparsity)
        assert full.sum() == 6 * (1 - sparsity)
    assert not binarize(gates, sparsity=0.5)[0, 0]
    for options in ({}, {"sparsity": 0.5, "threshold": 0.5}, {"sparsity": 2.0}):
        with pytest.raises(ValueError, match="sparsity"):
            binarize(gates, **options)


def test_loss_and_schedule():
    full, mixed = normal(0, 2, 3, 4), normal(1, 2, 3, 4)
    labeled = jnp.array([[True, False, True], [False, False, False]])
    gates = jnp.array([[0.5, -0.5], [1.0, 0.0]])
    want = np.mean(np.asarray((full - mixed) ** 2)[0, [0, 2]]) + 0.05 * 0.5
    assert_allclose(duo_loss(full, mixed, labeled, gates), want, rtol=1e-6)
    rate = duo_schedule(100, 1.0)
    assert_allclose(
        [rate(i) for i in (0, 9, 19, 50, 89, 99)], [0.1, 0.5, 1, 1, 0.55, 0.1], rtol=1e-6
    )
    module = layer(gate_penalty=0.25)
    _, captured = module(normal(0, 1, 4, 16), capture=("aux_loss",))
    assert_allclose(captured["aux_loss"], 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recent": 0}, "recent >= 1"),
        ({"sinks": -1}, "sinks >= 0"),
        ({"full_heads": [True]}, "one boolean for each of the 2"),
        ({"chunk_rule": "fast"}, "chunk_rule='fast'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        layer(**options)


def test_bad_calls():
    x = normal(0, 1, 4, 16)
    with pytest.raises(ValueError, match="needs gates"):
        layer(full_heads=[True, False]).streams(x, x)
    with pytest.raises(ValueError, match="full_from='both'"):
        layer().streams(x, x, full_from="both")
    q = normal(0, 1, 4, 2, 8)
    with pytest.raises(ValueError, match="gates must have the shape"):
        duo_attention(q, q, q, jnp.ones((3,)))
