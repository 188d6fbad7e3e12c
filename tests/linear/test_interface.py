"""How the linear recurrence behaves as a JAX function: types, transformations, memory, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnjax.mechanisms.linear.linear_attention import linear_attention, linear_attention_step
from pallas_kernels.linear import rows
from tests.linear.naive import cast, chunked, error, problem


def _float32(option, **sizes):
    return cast(problem(option, **sizes), jnp.float32)


def test_16_bit_inputs_keep_a_float32_state():
    p = _float32("token", t=70, strong=False)
    low = {
        n: x if n in ("decay", "initial_state") else x.astype(jnp.bfloat16) for n, x in p.items()
    }
    out, state = chunked(low)
    assert out.dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert error(out, chunked(p)[0]) < 0.02  # 8 bits of the inputs
    grads = jax.grad(lambda p: chunked(p)[0].astype(jnp.float32).sum())(low)
    assert {n: g.dtype for n, g in grads.items()} == {n: x.dtype for n, x in low.items()}


@pytest.mark.parametrize("option", ["head", "channel+bonus"])
def test_vmap_and_jit_change_nothing(option):
    p = _float32(option, t=20)
    stacked = {n: jnp.stack([x, 0.5 * x]) for n, x in p.items()}
    one = jax.grad(lambda p: jnp.sum(chunked(p, chunk_size=8)[0] ** 2))
    got = jax.jit(jax.vmap(one))(stacked)
    for i in range(2):
        want = one({n: x[i] for n, x in stacked.items()})
        assert max(error(got[n][i], want[n]) for n in want) < 1e-5


@pytest.mark.parametrize("option", ["head+bonus", "token+delta"])
def test_batch_rows_in_groups_give_the_same(option, monkeypatch):
    p = _float32(option, b=6, t=20)

    def run(p):
        out, state = linear_attention(**p, chunk_size=8, return_state=True)
        return jnp.sum(out**2) + jnp.sum(state**2), (out, state)

    def value_and_grad():
        return jax.jit(jax.value_and_grad(lambda p: run(p), has_aux=True))(p)

    whole = value_and_grad()
    monkeypatch.setattr(rows, "CACHE_ELEMENTS", 2 * 8 * 2 * 6)  # two rows at a time
    groups = value_and_grad()
    for a, b in zip(jax.tree.leaves(groups), jax.tree.leaves(whole), strict=True):
        assert error(a, b) < 1e-6


def test_sharded_batch_and_heads_give_the_same():
    if len(jax.devices()) < 4:
        pytest.skip("needs 4 devices")
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "tensor"))
    p = _float32("head", b=4, t=40)
    place = {3: ("data", None, "tensor"), 4: ("data", None, "tensor"), 1: ("tensor",)}
    spread = {
        n: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*place[x.ndim])))
        for n, x in p.items()
        if n != "initial_state"
    }
    p = {n: x for n, x in p.items() if n in spread}
    step = jax.jit(jax.value_and_grad(lambda p: jnp.sum(chunked(p, chunk_size=16)[0] ** 2)))
    value, grads = step(spread)
    want, want_grads = step(p)
    assert error(value, want) < 1e-6
    assert max(error(grads[n], want_grads[n]) for n in grads) < 1e-5
    assert "all-gather" not in step.lower(spread).compile().as_text()


@pytest.mark.parametrize("option", ["head", "token+delta", "channel"])
def test_temporary_memory_is_linear_in_length(option):
    def temporary(t):
        p = jax.eval_shape(lambda: _float32(option, b=1, t=t, h=1, k=16, v=16))
        p = {n: jax.ShapeDtypeStruct(x.shape, jnp.float32) for n, x in p.items()}
        grad = jax.jit(jax.grad(lambda p: chunked(p)[0].sum()))
        return grad.lower(p).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(1024), temporary(8192)
    assert long < 8.2 * short
    assert long < 8192 * 16 * 4 * 20  # a few copies of the inputs; t x t would be 2.7e8 bytes


def test_no_tokens():
    out, state = chunked({n: x[:, :0] if x.ndim == 4 and n != "initial_state" else x
                          for n, x in _float32("none", t=3).items()})  # fmt: skip
    assert out.shape == (2, 0, 2, 5) and state.shape == (2, 2, 6, 5)


@pytest.mark.parametrize(
    "change, said, kind",
    [
        ({"query": np.zeros((2, 8, 2), np.float32)}, "query must have rank 4", ValueError),
        ({"key": np.zeros((2, 8, 1, 6), np.float32)}, "same number of heads", ValueError),
        ({"key": np.zeros((2, 9, 2, 6), np.float32)}, "same length", ValueError),
        ({"query": np.zeros((2, 8, 2, 6), np.int32)}, "floating point", TypeError),
        ({"decay": np.zeros((2, 8), np.float32)}, "decay must have one of the shapes", ValueError),
        ({"decay": np.zeros((3,), np.float32)}, "decay must have one of the shapes", ValueError),
        ({"beta": np.zeros((2, 8), np.float32)}, "beta must have shape", ValueError),
        ({"bonus": np.zeros((6,), np.float32)}, "bonus must have shape", ValueError),
        (
            {"initial_state": np.zeros((2, 2, 5, 6), np.float32)},
            "initial_state must have",
            ValueError,
        ),
        ({"segment_ids": np.zeros((2, 7), np.int32)}, "segment_ids must have shape", ValueError),
        ({"segment_ids": np.zeros((2, 8), np.float32)}, "must be integers", TypeError),
        ({"chunk_size": 0}, "chunk_size=0", ValueError),
        ({"implementation": "trident"}, "implementation='trident'", ValueError),
        ({"implementation": "pallas"}, "no Pallas kernel for cpu", NotImplementedError),
        (
            {"beta": np.zeros((2, 8, 2), np.float32), "bonus": np.zeros((2, 6), np.float32)},
            "exclude each other",
            ValueError,
        ),
    ],
)
def test_bad_input_is_named(change, said, kind):
    p = {n: x for n, x in _float32("none", t=8).items() if n != "initial_state"}
    arguments = {
        n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in (p | change).items()
    }
    with pytest.raises(kind, match=said):
        linear_attention(**arguments)


def test_bad_steps_are_named():
    q, v, state = jnp.zeros((2, 3, 4)), jnp.zeros((2, 3, 5)), jnp.zeros((2, 3, 4, 5))
    step = functools.partial(linear_attention_step, q, q, v)
    with pytest.raises(ValueError, match="state must have shape"):
        step(state[:, :2])
    with pytest.raises(ValueError, match="decay must have one of"):
        step(state, decay=jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match="a step takes one token"):
        linear_attention_step(q[:, None], q[:, None], v[:, None], state)
