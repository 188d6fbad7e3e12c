"""Mesa: the 8-bit grid, exact outputs, gradients within the grid's error, bytes that are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.attention import attention
from attnjax.mechanisms.softmax import mesa
from attnjax.mechanisms.softmax.mesa import MesaAttention, QuantStats


@pytest.fixture
def x(key):
    return jax.random.normal(key, (2, 4, 6, 8))


def test_grid_by_the_formula(x):
    stats = QuantStats.measure(x, 1)
    a = np.asarray(x, np.float64)
    low, high = a.min((0, 2, 3)), a.max((0, 2, 3))
    assert_allclose(stats.range, high - low, rtol=1e-6)
    step = ((high - low) / 255)[None, :, None, None]
    want = np.rint((a - low[None, :, None, None]) / step)
    codes = jax.jit(mesa.mesa_quantize)(x, stats)
    assert codes.dtype == jnp.uint8
    assert np.abs(np.asarray(codes, int) - want).max() <= 1
    assert (np.asarray(codes) == want).mean() > 0.99
    error = np.abs(np.asarray(jax.jit(mesa.mesa_dequantize)(codes, stats)) - a)
    assert (error <= 0.501 * step).all()


def test_stochastic_rounding_is_right_on_average():
    """Within one step always; the mean over many draws is x itself."""
    x = jnp.linspace(0, 1, 12).reshape(1, 1, 12)
    stats = QuantStats(jnp.array([5.0]), jnp.array([-1.0]))
    keys = jax.random.split(jax.random.key(0), 2000)
    many = jax.jit(
        jax.vmap(lambda k: mesa.mesa_dequantize(mesa.mesa_quantize(x, stats, rng=k), stats))
    )(keys)
    assert np.abs(many - x[None]).max() <= 1.001 * 5 / 255
    assert np.abs(many.mean(0) - x).max() < 4 * 0.5 * 5 / 255 / np.sqrt(2000)


def test_values_out_of_range_are_clipped_and_flat_groups_are_exact():
    stats = QuantStats(jnp.array([2.0, 0.0]), jnp.array([-1.0, 3.0]))
    x = jnp.array([[[9.0, -9.0], [3.0, 3.0]]])
    codes = jax.jit(mesa.mesa_quantize)(x, stats)
    assert_array_equal(codes[0], [[255, 0], [0, 0]])
    assert_allclose(jax.jit(mesa.mesa_dequantize)(codes, stats)[0], [[1.0, -1.0], [3.0, 3.0]])


def test_running_ranges(x):
    """The first step copies, later ones move by a tenth; packed groups merge neighbors."""
    first = QuantStats.empty(2).update(x, 1)
    assert_allclose(first.range, QuantStats.measure(x, 1, 2).range)
    second = first.update(3 * x, 1)
    assert_allclose(second.range, 1.2 * first.range, rtol=1e-6)
    assert_allclose(second.shift, 1.2 * first.shift, rtol=1e-6)
    assert_allclose(first.update(3 * x, 1, 1.0).range, first.range)
    assert_allclose(first.range[0], x[:, :2].max() - x[:, :2].min())
    with pytest.raises(ValueError, match="groups=3 must divide the 4"):
        QuantStats.measure(x, 1, 3)


def on_grid(key, shape, axis):
    """Activations that 8 bits hold exactly, from -127 to 128 in every group."""
    x = jax.random.randint(key, shape, -127, 129).astype(jnp.float32)
    ends = tuple(slice(None) if i == axis else 0 for i in range(len(shape)))
    return x.at[ends].set(-127.0).at[tuple(-1 if s == 0 else s for s in ends)].set(128.0)


def test_gradients_are_exact_on_the_grid(key):
    """Products of activations, a linear map, GELU and layer norm, where x̃ = x."""
    keys = jax.random.split(key, 4)
    a, b = (on_grid(k, s, 1) for k, s in zip(keys, ((2, 3, 5, 4), (2, 3, 4, 6))))
    x = on_grid(keys[2], (5, 8), 9) / 1.0
    x = x.at[0, 0].set(-127.0).at[-1, -1].set(128.0)
    w, row = jax.random.normal(keys[3], (8, 3)), jnp.linspace(0.5, 2, 8)

    def norm(x, scale, bias):
        mean = x.mean(-1, keepdims=True)
        var = jnp.square(x - mean).mean(-1, keepdims=True)
        return (x - mean) / jnp.sqrt(var + 1e-6) * scale[None] + bias[None]

    pairs = [
        (mesa.mesa_matmul, jnp.matmul, (a, b)),
        (lambda x, w: mesa.mesa_linear(x, w)[0], jnp.matmul, (x, w)),
        (mesa.mesa_gelu, lambda x: jax.nn.gelu(x, approximate=False), (x,)),
        (mesa.mesa_layer_norm, norm, (x, row, row)),
    ]

    def both(ours, plain, args):
        results = [jax.vjp(f, *args) for f in (ours, plain)]
        ct = jnp.cos(jnp.arange(results[1][0].size, dtype=jnp.float32))
        ct = ct.reshape(results[1][0].shape)
        return [(y, pull(ct)) for y, pull in results]

    results = jax.jit(lambda: [both(*pair) for pair in pairs])()
    for (y, grads), (want, right) in results:
        assert_allclose(y, want, rtol=1e-5, atol=1e-5)
        for grad, other in zip(grads, right):
            assert_allclose(grad, other, rtol=1e-3, atol=1e-3 * np.abs(other).max())


def test_softmax_gradient_uses_the_output_alone(key):
    """dx = y~ (dy - Σ y~ dy) of the dequantized output; hidden keys get exactly none."""
    scores = jax.random.normal(key, (1, 2, 5, 5))
    keep = jnp.tril(jnp.ones((1, 1, 5, 5), bool))
    dy = np.cos(np.arange(50, dtype=np.float32)).reshape(scores.shape)

    @jax.jit
    def run(scores):
        y, pull = jax.vjp(lambda s: mesa.mesa_softmax(s, keep), scores)
        stats = QuantStats.measure(y, 1)
        return pull(jnp.asarray(dy))[0], mesa.mesa_dequantize(mesa.mesa_quantize(y, stats), stats)

    got, copy = run(scores)
    copy = np.where(keep, copy, 0)
    assert_allclose(got, copy * (dy - (copy * dy).sum(-1, keepdims=True)), rtol=1e-5, atol=1e-6)
    assert_array_equal(np.where(keep, 0, got), 0)


def test_attention_is_exact_and_its_gradients_are_near(key):
    q, k, v = (
        jax.random.normal(s, (2, 9, h, 4)) for s, h in zip(jax.random.split(key, 3), (4, 2, 2))
    )
    keep = jnp.tril(jnp.ones((1, 1, 9, 9), bool))

    @jax.jit
    def both(q, k, v):
        ours = jax.vjp(lambda *a: mesa.mesa_attention(*a, mask=keep, rng=key), q, k, v)
        plain = jax.vjp(lambda *a: attention(*a, is_causal=True), q, k, v)
        return [(y, pull(jnp.ones_like(y))) for y, pull in (ours, plain)]

    (y, grads), (want, right) = both(q, k, v)
    assert_allclose(y, want, rtol=1e-6, atol=1e-6)
    for grad, other in zip(grads, right):
        assert 0 < np.abs(grad - other).max() < 0.05 * np.abs(other).max()


def test_bytes_kept_for_the_gradient(key):
    """One byte for each number of q, k, v and the weights; plain attention keeps four."""
    q, k, v = (jax.random.normal(s, (2, 16, 4, 8)) for s in jax.random.split(key, 3))
    numbers = 3 * q.size + 2 * 4 * 16 * 16
    kept = jax.tree.leaves(jax.jit(lambda *a: jax.vjp(mesa.mesa_attention, *a)[1])(q, k, v))
    codes = sum(a.nbytes for a in kept if a.dtype == jnp.uint8)
    assert codes == numbers
    assert sum(a.nbytes for a in kept) - codes == 4 * 2 * 4 * 4  # α and β by head and tensor


def test_training_moves_the_ranges_and_evaluation_does_not(key):
    module = MesaAttention(2, 8, rngs=nnx.Rngs(0))
    x = jax.random.normal(key, (2, 5, 8))
    graph, state = nnx.split(module)

    @jax.jit
    def step(state, x):
        module = nnx.merge(graph, state)
        return module(x, deterministic=False), nnx.state(module)

    @jax.jit
    def evaluate(state, x):
        module = nnx.merge(graph, state)
        return [module(x), module(x, deterministic=True)], nnx.state(module)

    y, after = step(state, x)
    same, untouched = evaluate(state, x)
    jax.tree.map(assert_array_equal, untouched, state)
    assert_array_equal(*same)
    assert_allclose(y, same[0], rtol=1e-5, atol=1e-6)
    for name in ("x", "query", "key", "value", "weights", "z"):
        assert (state[f"{name}_range"][...][0] < 0).all()
        assert (after[f"{name}_range"][...][0] > 0).all()
    halves = np.asarray(x).reshape(2, 5, 2, 4).transpose(2, 0, 1, 3).reshape(2, -1)
    want = [np.ptp(halves, axis=1), halves.min(1)]
    assert_allclose(after["x_range"][...], want, rtol=1e-6)
    again = step(after, 2 * x)[1]["x_range"][...]
    assert_allclose(again, 1.1 * after["x_range"][...], rtol=1e-5)


def test_without_running_ranges_it_holds_parameters_alone(key):
    """Gradients are those of a fresh module, whose ranges are the arrays' own too."""
    x = jax.random.normal(key, (2, 5, 8))
    grads = []
    for decay in (None, 0.9):
        module = MesaAttention(2, 8, decay=decay, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(module, nnx.Param, ...)
        assert (decay is None) == (not jax.tree.leaves(rest))

        @jax.jit
        def run(params, graph=graph, rest=rest):
            def loss(params):
                module = nnx.merge(graph, params, rest, copy=True)
                return (module(x, deterministic=False) ** 2).sum()

            return jax.grad(loss)(params)

        grads.append(run(params))
    jax.tree.map(assert_array_equal, *grads)


def test_bad_input():
    with pytest.raises(ValueError, match="rounding must be"):
        MesaAttention(2, 8, rounding="up", rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="dropout_rate is not supported"):
        MesaAttention(2, 8, dropout_rate=0.1, rngs=nnx.Rngs(0))
    q = jnp.ones((1, 2, 1, 4))
    with pytest.raises(ValueError, match="stats must be of"):
        mesa.mesa_attention(q, q, q, stats={"scores": QuantStats.empty(1)})
