"""Transformer-XL's relative attention against its definition in NumPy, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.attention import attention
from attnjax.mechanisms.softmax.transformer_xl import (
    TransformerXLAttention,
    next_memory,
    relative_shift,
    sinusoids,
    transformer_xl_attention,
)

T, S, H, D = 4, 6, 2, 4
INIT = nnx.initializers.lecun_normal()


def make(**options):
    module = TransformerXLAttention(H, H * D, kernel_init=INIT, rngs=nnx.Rngs(0), **options)
    for seed, name in enumerate(("content_bias", "position_bias", "table", "table_bias")):
        parameter = getattr(module, name)
        if parameter is not None:
            parameter[...] = jax.random.normal(jax.random.key(seed), parameter.shape)
    return module


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition(causal):
    rng = np.random.default_rng(0)
    n = S if causal else S + T - 1
    q, k, v = (rng.normal(size=(2, length, H, D)) for length in (T, S, S))
    r, u, beta = rng.normal(size=(n, H, D)), rng.normal(size=(H, D)), rng.normal(size=(n, H))
    with jax.enable_x64(True):
        q_, k_, v_, r_, u_, beta_ = map(jnp.asarray, (q, k, v, r, u, beta))
        call = jax.jit(transformer_xl_attention)
        got = call(q_, k_, v_, r_, content_bias=u_, relative_bias=beta_)
    for b, h, i in np.ndindex(2, H, T):
        seen = range(i + S - T + 1 if causal else S)
        row = [S - 1 - (i + S - T - j) for j in seen]  # of the distance i + M - j
        s = (q[b, i, h] + u[h]) @ k[b, list(seen), h].T + r[row, h] @ q[b, i, h] + beta[row, h]
        w = np.exp(s / np.sqrt(D))
        assert_allclose(got[b, i, h], w @ v[b, list(seen), h] / w.sum(), rtol=1e-10)


def test_without_biases_and_distances_it_is_plain_attention():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, S, H, D))

    @jax.jit
    def run(q, k, v):
        got = transformer_xl_attention(q[:, S - T :], k, v, jnp.zeros((S, H, D)))
        return got, attention(q, k, v, is_causal=True)[:, S - T :]

    assert_allclose(*run(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("t", "s", "n"), [(3, 5, 5), (3, 5, 7), (1, 4, 4), (1, 1, 1), (4, 4, 7)])
def test_the_shift_picks_columns_by_distance(t, s, n):
    x = np.arange(t * n, dtype=np.float32).reshape(1, 1, t, n)
    y = np.asarray(relative_shift(jnp.asarray(x), s))
    for i in range(t):
        for j in range(s):
            if j + t - 1 - i < n:
                assert y[0, 0, i, j] == x[0, 0, i, j + t - 1 - i]


def test_sinusoids_are_the_official_ones():
    r = sinusoids(np.arange(3, -1, -1), 6)
    assert r.shape == (4, 6)
    assert_allclose(r[-1], [0, 0, 0, 1, 1, 1])
    assert_allclose(r[0, [0, 1, 3]], [np.sin(3), np.sin(3 / 10000 ** (1 / 3)), np.cos(3)])


@pytest.mark.parametrize(
    "options",
    [dict(), dict(encoding="learned", max_distance=12), dict(residual="pre"), dict(window=3)],
    ids=lambda options: next(iter(options), "plain"),
)
def test_segments_with_memory_give_the_outputs_of_the_whole_text(options):
    module = make(**options)
    x = jax.random.normal(jax.random.key(9), (2, 9, H * D))
    run = jax.jit(lambda x, memory: module.segment(x, memory, memory_length=9))
    memory, outputs = None, []
    for part in (x[:, :3], x[:, 3:6], x[:, 6:]):
        y, memory = run(part, memory)
        outputs.append(y)
    assert_array_equal(memory, x)
    assert_allclose(np.concatenate(outputs, 1), jax.jit(module)(x), rtol=1e-5, atol=1e-5)


def test_the_memory_gets_no_gradient_and_keeps_its_length():
    module = make()
    x, memory = jax.random.normal(jax.random.key(9), (2, 1, 5, H * D))

    @jax.jit
    def run(x, memory):
        def loss(x, memory):
            y, after = module.segment(x, memory)
            return (y**2).sum(), after

        return jax.grad(loss, (0, 1), has_aux=True)(x, memory)

    (of_x, of_memory), after = run(x[:, :2], memory)
    assert_array_equal(of_memory, np.zeros_like(of_memory))
    assert np.abs(of_x).min() > 0
    assert_array_equal(after, next_memory(memory, x[:, :2], 5))
    assert next_memory(memory, x, 0).shape == (1, 0, H * D)


def test_official_blocks_and_shared_biases():
    first = make(residual="post")
    second = make(biases=(first.content_bias, first.position_bias))
    assert second.content_bias is first.content_bias
    x = jax.random.normal(jax.random.key(9), (1, 5, H * D))
    y = np.asarray(jax.jit(first)(x))
    assert_allclose(y.mean(-1), 0.0, atol=1e-5)
    assert_allclose(y.var(-1), 1.0, rtol=1e-3)


def test_bidirectional_learned_tables_use_both_signs():
    module = make(encoding="learned", max_distance=6, causal=False)
    x = jnp.zeros((1, 5, H * D))
    scores = jax.jit(lambda x: module(x, capture=("scores",)))(x)[1]["scores"][0]
    table, scores = np.asarray(module.table_bias[...]) * D**-0.5, np.asarray(scores)
    for i, j in np.ndindex(5, 5):
        assert_allclose(scores[:, i, j], table[6 + j - i], rtol=1e-5)


def test_bad_options_are_named():
    rngs = nnx.Rngs(0)
    for options, message in (
        (dict(encoding="none"), "encoding='none'"),
        (dict(residual="both"), "residual='both'"),
        (dict(residual="post", out_features=3), "out_features=3 differs"),
        (dict(max_distance=0), "max_distance=0"),
        (dict(biases=()), "biases must be 2"),
    ):
        with pytest.raises(ValueError, match=message):
            TransformerXLAttention(H, H * D, rngs=rngs, **options)
    with pytest.raises(NotImplementedError, match="TransformerXLAttention: num_kv_heads=1"):
        TransformerXLAttention(H, H * D, num_kv_heads=1, rngs=rngs)
    with pytest.raises(ValueError, match="need an even width, got 3"):
        TransformerXLAttention(1, 3, rngs=rngs)
    module, x = make(encoding="learned", max_distance=4), jnp.zeros((1, 6, H * D))
    with pytest.raises(ValueError, match="max_distance=5"):
        module(x)
    for options in (
        dict(segment_ids=jnp.zeros((1, 2), jnp.int32)),
        dict(valid=jnp.ones((1, 2), bool)),
        dict(cache=module.init_cache(1, 4)),
    ):
        with pytest.raises(NotImplementedError, match=f"{next(iter(options))} is not supported"):
            module.segment(x[:, :2], None, **options)
    with pytest.raises(ValueError, match=r"\[1, m, 8\], got \(2, 2, 8\)"):
        module.segment(x[:, :2], jnp.zeros((2, 2, 8)))
    q = jnp.zeros((1, 3, 1, 4))
    with pytest.raises(ValueError, match="relative must have shape"):
        transformer_xl_attention(q, q, q, jnp.zeros((4, 1, 4)))
