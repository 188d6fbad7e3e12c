"""Miras: chunks against the recurrence, the delta rule, constraints of the retentions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.mechanisms.memory.miras import (
    MEMORA,
    MONETA,
    YAAD,
    Miras,
    MirasRule,
    MirasState,
    memory_weights,
    miras,
)


def inputs(t=11, d=4, h=2, gates="channel", memory="mlp", seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = rng.normal(size=(3, 2, t, h, d))
    k, q = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (k, q))
    shape = (2, t, h, d) if gates == "channel" else (2, t, h)
    alpha, eta = rng.uniform(0.7, 1, shape), rng.uniform(0.1, 0.5, shape)
    delta = rng.uniform(0.5, 1.5, (2, t, h))
    sizes = {"mlp": {"up": (h, 8, d), "down": (h, d, 8)}, "matrix": {"matrix": (h, d, d)}}[memory]
    initial = {name: 0.5 * rng.normal(size=size) for name, size in sizes.items()}
    arrays = jax.tree.map(jnp.asarray, (q, k, v, initial))
    return arrays, dict(alpha=jnp.asarray(alpha), eta=jnp.asarray(eta), delta=jnp.asarray(delta))


def naive(q, k, v, start, alpha, eta, slope, normalize=lambda a: a):
    """One head with a matrix memory, token by token: outputs [t, d]."""
    raw, out = start, []
    for t in range(len(q)):
        error = slope(normalize(raw) @ k[t] - v[t])
        raw = alpha[t] * raw - eta[t] * np.outer(error, k[t])
        out.append(normalize(raw) @ q[t])
    return np.stack(out)


@pytest.mark.parametrize(
    ("rule", "slope", "normalize"),
    [
        (MirasRule("lp", "q_norm", p=2, q=2, smooth=False), lambda r: 2 * r, lambda a: a),
        (MirasRule("huber_coordinate"), lambda r: np.clip(r, -0.7, 0.7), lambda a: a),
        (
            MirasRule("value_shift", "entropy", by_row=True),
            lambda r: r + 0.7 * r / np.linalg.norm(r),
            lambda a: np.exp(a) / np.exp(a).sum(-1, keepdims=True),
        ),
    ],
    ids=["moneta with p = q = 2", "coordinate", "shift by row"],
)
def test_definition(rule, slope, normalize):
    with jax.enable_x64(True):
        (q, k, v, initial), gates = inputs(gates="head", memory="matrix", h=1)
        gates["delta"] = jnp.full_like(gates["delta"], 0.7)
        got = jax.jit(functools.partial(miras, rule=rule, chunk_size=1))(q, k, v, initial, **gates)
        for row in range(2):
            tokens = (np.asarray(x[row, :, 0]) for x in (q, k, v))
            kept, step = (np.asarray(gates[name][row, :, 0]) for name in ("alpha", "eta"))
            start = np.asarray(initial["matrix"][0])
            want = naive(*tokens, start, kept, step, slope, normalize)
            assert_allclose(got[row, :, 0], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("rule", "gates", "memory"),
    [
        (MONETA, "channel", "matrix"),
        (dataclasses.replace(MONETA, norm="chunk"), "channel", "mlp"),
        (YAAD, "head", "matrix"),
        (MEMORA, "head", "matrix"),
    ],
    ids=["moneta", "moneta by chunk", "yaad", "memora"],
)
def test_chunks_are_the_recurrence(rule, gates, memory):
    """Outputs, states and the gradient of everything."""
    with jax.enable_x64(True):
        (q, k, v, initial), gates = inputs(gates=gates, memory=memory)
        valid = jnp.arange(11)[None] < jnp.array([[11], [6]])
        one = jnp.zeros((2, 11), jnp.int32)

        def loss(q, k, v, initial, gates, ids):
            out, state = miras(
                q, k, v, initial, rule=rule, chunk_size=4, segment_ids=ids, valid=valid,
                return_state=True, **gates,
            )  # fmt: skip
            return (jnp.where(valid[..., None, None], out, 0.0) ** 2).sum(), state

        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))
        got, want = (run(q, k, v, initial, gates, ids) for ids in (None, one))
        jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-8, atol=1e-8), got, want)


def test_yaad_without_threshold_is_the_delta_rule():
    with jax.enable_x64(True):
        (q, k, v, initial), gates = inputs(gates="head", memory="matrix")
        got = miras(
            q, k, v, initial, alpha=jnp.ones_like(gates["alpha"]), eta=gates["eta"], rule=YAAD,
            chunk_size=1,
        )  # fmt: skip
        start = jnp.broadcast_to(initial["matrix"].swapaxes(1, 2)[None], (2, 2, 4, 4))
        want = linear_attention(q, k, v, beta=gates["eta"], initial_state=start, scale=1.0)
        assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_weights_stay_where_the_retention_keeps_them():
    (q, k, v, initial), gates = inputs(memory="matrix")

    @functools.partial(jax.jit, static_argnums=0)
    def last(rule):
        raw = miras(q, k, v, initial, rule=rule, return_state=True, **gates)[1].raw
        more = jax.tree.map(lambda a: 10 * a, raw)
        return memory_weights(raw, rule)["matrix"], memory_weights(more, rule)["matrix"]

    for by_row in (False, True):
        rule = dataclasses.replace(MEMORA, total=3.0, by_row=by_row)
        weights = np.asarray(last(rule)[0])
        sums = weights.sum(-1) if by_row else weights.sum((-2, -1))
        assert (weights > 0).all()
        assert_allclose(sums, np.full_like(sums, 3.0), rtol=1e-5)
    want, scaled = last(MONETA)  # homogeneous of degree 1 - (q - 2)
    assert_allclose(10 * scaled, want, rtol=1e-4)
    empty = memory_weights({"matrix": jnp.zeros((2, 2))}, MONETA)["matrix"]
    assert not np.any(empty)


@pytest.mark.parametrize(
    "rule",
    [dataclasses.replace(MONETA, norm="chunk"), MEMORA],
    ids=["moneta by chunk", "memora"],
)
def test_states_go_on_inside_chunks(rule):
    """Pieces of up to 5 real tokens in chunks of 4: every row of the batch cuts elsewhere."""
    with jax.enable_x64(True):
        (q, k, v, initial), gates = inputs(t=13, gates="head")
        call = functools.partial(miras, initial=initial, rule=rule, chunk_size=4)
        run = jax.jit(lambda q, k, v, **options: call(q, k, v, return_state=True, **options))
        want, last = run(q, k, v, **gates)
        seen, outputs = np.zeros(2, int), np.zeros(want.shape)
        state = MirasState(*(jax.tree.map(jnp.zeros_like, x) for x in last))
        rows = np.arange(2)[:, None]
        for count in ([5, 2], [3, 5], [5, 1], [0, 5]):
            at = seen[:, None] + np.arange(5)
            index = np.minimum(at, 12)
            part = [x[rows, index] for x in (q, k, v)]
            given = {name: x[rows, index] for name, x in gates.items()}
            valid = np.arange(5) < np.array(count)[:, None]
            out, state = run(*part, **given, valid=jnp.asarray(valid), state=state)
            outputs[np.nonzero(valid)[0], at[valid]] = np.asarray(out)[valid]
            seen += count
        assert_allclose(outputs, want, rtol=1e-9, atol=1e-9)
        jax.tree.map(lambda x, y: assert_allclose(x, y, rtol=1e-9, atol=1e-9), state, last)


@pytest.mark.parametrize(
    "options",
    [
        {"variant": "yaad", "memory": "matrix", "gate_rank": None, "rope_base": 1e4},
        {"variant": "memora", "conv_size": None},
    ],
    ids=str,
)
def test_variants_decode(options):
    module = Miras(2, 8, chunk_size=4, rngs=nnx.Rngs(0), **options)
    x = jax.random.normal(jax.random.key(0), (2, 12, 8))
    call = jax.jit(lambda x, cache=None: module(x, cache=cache))
    want, outputs = call(x), []
    cache = module.init_cache(2, 12)
    for part in (x[:, :6], x[:, 6:]):  # a chunk of 4 goes on from one to the next
        y, cache = call(part, cache)
        outputs.append(y)
    assert_allclose(jnp.concatenate(outputs, 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"variant": "titan"}, ValueError, "variant"),
        ({"memory": "tree"}, ValueError, "memory"),
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"expansion": 0}, ValueError, "expansion"),
        ({"conv_size": 0}, ValueError, "width=0"),
        ({"value_factor": 2.0}, NotImplementedError, "value_factor"),
        ({"dropout_rate": 0.1}, NotImplementedError, "dropout"),
        ({"q": 1.0}, ValueError, "q >= 2"),
        ({"causal": False}, NotImplementedError, "causal"),
    ],
    ids=str,
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        Miras(2, 8, rngs=nnx.Rngs(0), **options)


def test_bad_shapes():
    (q, k, v, initial), gates = inputs()
    with pytest.raises(ValueError, match="multiple of d"):
        miras(q, k, v, {"up": jnp.zeros((2, 6, 4)), "down": jnp.zeros((2, 4, 6))}, **gates)
    with pytest.raises(ValueError, match="'matrix', or 'up' and 'down'"):
        miras(q, k, v, {"left": initial["up"]}, **gates)
    with pytest.raises(ValueError, match="segment_ids with a state"):
        _, state = miras(q, k, v, initial, return_state=True, **gates)
        miras(q, k, v, initial, segment_ids=jnp.zeros((2, 11), int), state=state, **gates)
    with pytest.raises(ValueError, match="alpha must have shape"):
        miras(q, k, v, initial, alpha=jnp.ones((2, 3)), eta=gates["eta"])
