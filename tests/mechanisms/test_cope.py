"""CoPE against its definition in NumPy, its limits, and the streamed form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.attention import attention
from attnjax.mechanisms.softmax.cope import (
    CoPE,
    cope_attention,
    cope_gates,
    count_from_right,
    interpolate,
)

T, D, P = 11, 4, 5


def naive(q, k, v, table, gate_key, divide=True, gate_scale=None):
    """One row, one head, key by key."""
    out = np.zeros((len(q), v.shape[-1]))
    for i in range(len(q)):
        scores = []
        for j in range(i + 1):
            gates = [q[i] @ gate_key[n] * (gate_scale or D**-0.5) for n in range(j, i + 1)]
            p = min(sum(1 / (1 + np.exp(-g)) for g in gates), table.shape[1] - 1)
            low, high = int(np.floor(p)), int(np.ceil(p))
            z = q[i] @ table
            z = z[high] * (p - low) + z[low] * (1 - p + low)
            scores.append(q[i] @ k[j] * D**-0.5 + z * (D**-0.5 if divide else 1))
        w = np.exp(np.array(scores) - max(scores))
        out[i] = w @ v[: i + 1] / w.sum()
    return out


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, T, 4, D))
    k, v, gate = (rng.normal(size=(2, T, 2, D)) for _ in range(3))
    return q, k, v, rng.normal(size=(D, P)), gate


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("divide", [True, False])
def test_equals_the_definition(arrays, chunk, divide):
    q, k, v, table, gate = arrays
    with jax.enable_x64(True):
        out = cope_attention(
            *map(jnp.asarray, (q, k, v, table)), gate_key=jnp.asarray(gate),
            divide_positions=divide, gate_scale=None if divide else 1.0, chunk=chunk,
        )  # fmt: skip
    scale = None if divide else 1.0
    for b, h in np.ndindex(2, 4):
        one = (q[b, :, h], k[b, :, h // 2], v[b, :, h // 2], table, gate[b, :, h // 2])
        assert_allclose(out[b, :, h], naive(*one, divide, scale), rtol=1e-10, atol=1e-12)


def test_streamed_gradients_are_the_dense_ones(arrays):
    with jax.enable_x64(True):
        given = [jnp.asarray(x) for x in arrays]

        @functools.partial(jax.jit, static_argnums=1)
        @jax.grad
        def gradients(given, chunk):
            *main, gate = given
            return (cope_attention(*main, gate_key=gate, chunk=chunk) ** 2).sum()

        dense, streamed = (gradients(given, chunk) for chunk in (None, 3))
        for want, got in zip(dense, streamed, strict=True):
            assert_allclose(got, want, rtol=1e-9, atol=1e-11)
        # E has an effect on the gradient of everything; positions beyond the clamp share a column
        assert all(np.abs(g).max() > 0 for g in dense)


def test_a_table_of_zeros_is_plain_attention(arrays):
    q, k, v, table, _ = (jnp.asarray(x, jnp.float32) for x in arrays)
    got, want = jax.jit(
        lambda *qkv: (cope_attention(*qkv, table * 0), attention(*qkv, is_causal=True))
    )(q, k, v)
    assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_open_gates_count_tokens():
    """Gates of 1 give the relative position i - j + 1, clipped at P - 1."""
    gates = jnp.tril(jnp.ones((1, 1, T, T)))
    positions = count_from_right(gates)[0, 0]
    i, j = np.tril_indices(T)
    assert_allclose(positions[i, j], i - j + 1)
    logits = jnp.broadcast_to(jnp.arange(P, dtype=jnp.float32), (1, 1, T, P))
    looked_up = interpolate(logits, positions[None, None])[0, 0]
    assert_allclose(looked_up[i, j], np.minimum(i - j + 1, P - 1))


def test_interpolation_is_linear_and_flat_after_the_last_position():
    logits = jnp.asarray([1.0, 3.0, -1.0]).reshape(1, 1, 1, 3)
    at = jnp.asarray([0.0, 0.25, 1.0, 1.5, 2.0, 7.0]).reshape(1, 1, 1, 6)
    value, grad = interpolate(logits, at), jax.grad(lambda p: interpolate(logits, p).sum())(at)
    assert_allclose(value[0, 0, 0], [1.0, 1.5, 3.0, 1.0, -1.0, -1.0])
    assert_allclose(grad[0, 0, 0, [1, 3, 5]], [2.0, -4.0, 0.0])


def test_long_counts_do_not_drift_in_bfloat16():
    """Positions are float32 whatever the inputs: 1024 half-open gates count 512."""
    one = jnp.zeros((1, 1024, 1, 2), jnp.bfloat16)
    positions = count_from_right(cope_gates(one[:, -1:], one, None))
    assert positions.dtype == jnp.float32
    assert float(positions[0, 0, 0, 0]) == 512.0


@pytest.mark.parametrize("gate", ["separate", "value"])
def test_module_streams_and_shares_its_table(gate):
    first = CoPE(2, 8, num_positions=P, gate=gate, num_relative=3, rngs=nnx.Rngs(0))
    first.table[...] = jax.random.normal(jax.random.key(1), (4, P))
    first.relative[...] = jax.random.normal(jax.random.key(2), (4, 3))
    second = CoPE(
        2, 8, num_positions=P, gate=gate, num_relative=3, chunk=4, table=first.table,
        rngs=nnx.Rngs(1),
    )  # fmt: skip
    assert second.table is first.table
    nnx.update(second, nnx.state(first, nnx.Param))
    x = jax.random.normal(jax.random.key(3), (2, T, 8))
    want, streamed, (shown, sites) = jax.jit(
        lambda x: (first(x), second(x), second(x, capture=("weights",)))
    )(x)
    assert_allclose(streamed, want, rtol=1e-5, atol=1e-5)
    assert_allclose(shown, want, rtol=1e-5, atol=1e-5)
    assert_allclose(sites["weights"].sum(-1), 1.0, rtol=1e-5)


def test_the_relative_embedding_depends_on_the_distance_alone():
    module = CoPE(1, 4, num_positions=2, num_relative=3, rngs=nnx.Rngs(0))
    module.key.kernel[...] = jnp.zeros_like(module.key.kernel[...])
    module.query.kernel[...] = jnp.eye(4).reshape(4, 1, 4)
    module.relative[...] = jnp.asarray([[0.0, 2.0, 4.0]] + [[0.0] * 3] * 3)
    x = jnp.ones((1, 6, 4))
    scores = jax.jit(lambda x: module(x, capture=("scores",)))(x)[1]["scores"][0, 0]
    i, j = np.tril_indices(6)
    assert_allclose(scores[i, j], np.minimum(i - j, 2), atol=1e-6)


def test_bad_options_are_named():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="gate='query' is unknown"):
        CoPE(2, 8, gate="query", rngs=rngs)
    with pytest.raises(ValueError, match="num_positions=0"):
        CoPE(2, 8, num_positions=0, rngs=rngs)
    with pytest.raises(ValueError, match="table must have shape"):
        CoPE(2, 8, num_positions=3, table=nnx.Param(jnp.zeros((4, 5))), rngs=rngs)
    with pytest.raises(NotImplementedError, match="causal=False is not supported"):
        CoPE(2, 8, causal=False, rngs=rngs)
    x = jnp.zeros((1, 3, 1, 4))
    with pytest.raises(ValueError, match="table must have shape"):
        cope_attention(x, x, x, jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="chunk=0"):
        cope_attention(x, x, x, jnp.zeros((4, 4)), chunk=0)
