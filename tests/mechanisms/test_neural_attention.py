"""Neural attention: the concatenating definition, tiles, memory, and what the paper's form is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.masks import Causal, Window
from attnjax.mechanisms.softmax.neural_attention import (
    NeuralAttention,
    neural_attention,
    neural_scores,
)
from attnjax.taps import Edits

TIGHT = {"rtol": 1e-12, "atol": 1e-13}  # float64


def operands(t=7, s=7, h=2, p=3, e=5, sizes=(6, 3, 2, 1)):
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, n, h, w)) for n, w in ((t, p), (s, p), (s, e)))
    network = [
        (rng.normal(size=pair), rng.normal(size=pair[1:]))
        for pair in zip(sizes, sizes[1:], strict=False)
    ]
    return q, k, v, network


def naive(q, k, v, network, keep):
    """One pair after the other, with the concatenation of the official code."""
    out = np.zeros((*q.shape[:3], v.shape[3]))
    for b, i, h in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero(keep[i])
        x = np.stack([np.concatenate([q[b, i, h], k[b, j, h]]) for j in keys])
        for n, (kernel, bias) in enumerate(network):
            x = (x if n == 0 else np.maximum(x, 0)) @ kernel + bias
        w = np.exp(x[:, 0] - x.max())
        out[b, i, h] = w @ v[b, keys, h] / w.sum()
    return out


@pytest.mark.parametrize("sizes", [(6, 3, 1), (6, 3, 2, 1)], ids=["paper", "code"])
def test_equals_the_definition_and_so_do_its_tiles(sizes):
    with jax.enable_x64(True):
        data = operands(t=7, s=9, sizes=sizes)
        q, k, v, network = jax.tree.map(jnp.asarray, data)
        keep = np.tril(np.ones((7, 9), bool))
        want = naive(*data, keep)
        ct = jnp.asarray(np.random.default_rng(1).normal(size=want.shape))
        grads = []
        for options in (
            dict(mask=jnp.asarray(keep)),
            dict(mask=Causal(), chunk_size=4),
            dict(mask=jnp.asarray(keep)[None, None], chunk_size=2),
        ):

            def f(q, k, v, network, options=options):
                return neural_attention(q, k, v, network, **options)

            @jax.jit
            def both(*args, f=f):
                out, pull = jax.vjp(f, *args)
                return out, pull(ct)

            out, grad = both(q, k, v, network)
            assert_allclose(out, want, **TIGHT)
            grads.append(grad)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-10, atol=1e-12), *grads[:2])
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-10, atol=1e-12), *grads[1:])
        # a step in a random direction against the naive definition
        way = jnp.asarray(np.random.default_rng(2).normal(size=k.shape))
        steps = [(naive(data[0], data[1] + e * np.asarray(way), *data[2:], keep) * ct).sum()
                 for e in (1e-6, -1e-6)]  # fmt: skip
        assert_allclose((grads[0][1] * way).sum(), (steps[0] - steps[1]) / 2e-6, rtol=1e-6)


def test_tiles_leave_out_rows_without_keys_and_count_queries_from_the_offset():
    q, k, v, network = jax.tree.map(jnp.float32, operands(t=3, s=8))
    whole = jnp.zeros((2, 8, 2, 3)).at[:, 5:].set(q)
    none = jnp.zeros((1, 1, 3, 8), bool)

    @jax.jit
    def run(k):
        want = neural_attention(whole, k, v, network, mask=Window(3))[:, 5:]
        tiled = [
            neural_attention(q, k, v, network, mask=Window(3), q_offset=start, chunk_size=2)
            for start in (5, jnp.array([5, 5]))
        ]
        hidden = jax.value_and_grad(
            lambda k: (neural_attention(q, k, v, network, mask=none, chunk_size=2) ** 2).sum()
        )
        return want, tiled, hidden(k)

    want, tiled, (nothing, grad) = run(k)
    for got in tiled:
        assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert nothing == 0 and not grad.any()


def test_memory_of_tiles_does_not_grow_with_the_square_of_the_length():
    def peak(t, chunk_size):
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, "float32"), operands(t, t))

        def loss(q, k, v, network):
            return neural_attention(q, k, v, network, mask=Causal(), chunk_size=chunk_size).sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = peak(256, 32), peak(1024, 32)
    assert long < 6 * short
    assert peak(256, 256) > 5 * short


def test_a_last_layer_of_zeros_gives_the_mean_of_the_visible_values():
    q, k, v, network = jax.tree.map(jnp.float32, operands())
    network[-1] = (jnp.zeros_like(network[-1][0]), network[-1][1])
    got = jax.jit(lambda *a: neural_attention(*a, mask=Causal()))(q, k, v, network)
    count = jnp.arange(1, 8, dtype=jnp.float32)[None, :, None, None]
    assert_allclose(got, jnp.cumsum(v, 1) / count, rtol=1e-5, atol=1e-6)


def test_scores_are_not_a_bilinear_form():
    """A dot product of widths p has scores of rank p; those of the network exceed it."""
    with jax.enable_x64(True):
        q, k, _, network = jax.tree.map(jnp.asarray, operands(t=20, s=20))
        assert np.linalg.matrix_rank(np.asarray(neural_scores(q, k, network))[0, 0], 1e-6) > 6


def test_defaults_are_those_of_the_code_and_the_cache_holds_narrow_keys():
    module = nnx.eval_shape(lambda: NeuralAttention(2, 256, rngs=nnx.Rngs(0)))
    assert module.projection_dim == 128 // 32
    assert [layer.kernel.shape for layer in module.network] == [(8, 4), (4, 2), (2, 1)]
    paper = NeuralAttention(2, 16, hidden_layers=1, rngs=nnx.Rngs(0))
    assert [layer.kernel.shape for layer in paper.network] == [(4, 2), (2, 1)]
    tokens = jax.eval_shape(lambda: module.init_cache(1, 10)).tokens
    assert {name: a.shape[2:] for name, a in tokens.items()} == {"key": (2, 4), "value": (2, 128)}
    count = sum(a.size for a in jax.tree.leaves(nnx.state(module, nnx.Param)))
    assert count == 4 * 256**2 + 2 * (128 * 4 + 4) + (8 * 4 + 4) + (4 * 2 + 2) + (2 + 1)


def test_edits_and_captures_see_the_same_attention():
    module = NeuralAttention(2, 8, projection_dim=4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    call = jax.jit(module)
    y, captured = jax.jit(lambda x: module(x, capture=("scores", "weights", "v", "z")))(x)
    assert_allclose(y, call(x), rtol=1e-5, atol=1e-6)
    z = np.einsum("bhts,bshd->bthd", captured["weights"], captured["v"])
    assert_allclose(z, captured["z"], rtol=1e-5, atol=1e-6)
    kept = jnp.arange(6)[None].repeat(2, 0) != 2
    got = call(x, edits=Edits(key_mask=kept))
    want = call(x, mask=kept[:, None, None])
    assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    bias = jnp.where(kept, 0.0, -1e9)[:, None, None]
    got = call(x, edits=Edits(score_bias=bias))
    assert_allclose(got[:, 3:], want[:, 3:], rtol=1e-4, atol=1e-6)


def test_bad_input_is_named():
    q, k, v, network = jax.tree.map(jnp.float32, operands())
    with pytest.raises(ValueError, match="network must be"):
        neural_attention(q, k, v, network[:-1])
    with pytest.raises(ValueError, match="same heads"):
        neural_attention(q, k[:, :, :1], v[:, :, :1], network)
    with pytest.raises(ValueError, match="chunk_size=0"):
        neural_attention(q, k, v, network, chunk_size=0)
    for options, message in (
        (dict(projection_dim=1), "projection_dim >= 2"),
        (dict(hidden_layers=3), "hidden_layers=3"),
    ):
        with pytest.raises(ValueError, match=message):
            NeuralAttention(2, 16, rngs=nnx.Rngs(0), **options)
    with pytest.raises(NotImplementedError, match="num_kv_heads=1"):
        NeuralAttention(2, 16, num_kv_heads=1, rngs=nnx.Rngs(0))
