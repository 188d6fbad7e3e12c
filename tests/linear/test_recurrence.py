"""The chunked computation against the recurrence: values, gradients, states, segments."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from attnjax.mechanisms.linear.linear_attention import linear_attention_step
from pallas_kernels.compat import enable_x64
from tests.linear.naive import LENGTH, OPTIONS, cast, chunked, error, problem, recurrence, values

SCALE = 0.4
VALUES, GRADIENTS = 1e-12, 1e-9  # float64; the gradients go through sums of decays up to -300
FLOAT32 = 1e-5  # of the largest output; b_i - b_j loses 6e-8 |b|


@functools.cache
def _wanted(option):
    return values(problem(option), SCALE)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_chunk_size_gives_the_recurrence(option):
    with enable_x64(True):
        out, state = _wanted(option)
        sizes = (1, 16, 64, 100, LENGTH)
        run = jax.jit(lambda p: [chunked(p, chunk_size=size, scale=SCALE) for size in sizes])
        for size, got in zip(sizes, run(problem(option)), strict=True):
            assert error(got[0], out) < VALUES and error(got[1], state) < VALUES, size


@pytest.mark.parametrize("option", OPTIONS)
def test_float32_with_strong_decays(option):
    with enable_x64(True):
        out, state = _wanted(option)
        p = {name: np.asarray(x, np.float32) for name, x in problem(option).items()}

    def loss(p):
        found = chunked(p, chunk_size=64, scale=SCALE)
        return jnp.sum(found[0]) + jnp.sum(found[1]), found

    grads, (got, last) = jax.jit(jax.grad(loss, has_aux=True))(p)
    assert got.dtype == last.dtype == jnp.float32
    assert error(got, out) < FLOAT32 and error(last, state) < FLOAT32
    assert all(bool(jnp.isfinite(x).all()) for x in grads.values())


@pytest.mark.parametrize(
    "option, segments",
    [(option, False) for option in OPTIONS]
    + [(option, True) for option in ("none", "head+bonus", "token+delta", "channel")],
)
def test_gradients_are_those_of_the_recurrence(option, segments):
    with enable_x64(True):
        p = problem(option, t=83)
        rng = np.random.default_rng(1)
        ids = (
            jnp.asarray(np.cumsum(rng.random((2, 83)) < 0.05, axis=1), jnp.int32)
            if segments
            else None
        )
        d_out = jnp.asarray(rng.standard_normal(p["value"].shape))
        d_state = jnp.asarray(rng.standard_normal(p["initial_state"].shape))

        def loss(p, run):
            out, state = run(p)
            return jnp.vdot(out, d_out) + jnp.vdot(state, d_state)

        runs = (
            lambda p: recurrence(p, SCALE, ids),
            lambda p: chunked(p, chunk_size=32, scale=SCALE, segment_ids=ids),
        )
        want, got = jax.jit(lambda p: [jax.grad(loss)(p, run) for run in runs])(p)
        errors = {name: error(got[name], want[name]) for name in want}
        assert max(errors.values()) < GRADIENTS, errors


def test_constant_strong_decay_keeps_the_small_gradient():
    with enable_x64(True):
        p = problem("token", b=1, t=64, h=1)
        p["decay"] = jnp.full_like(p["decay"], -8.0)
        want = jax.jit(jax.grad(lambda p: recurrence(p, SCALE)[0].sum()))(p)["decay"]
    got = jax.jit(jax.grad(lambda p: chunked(p, chunk_size=64, scale=SCALE)[0].sum()))(
        cast(p, jnp.float32)
    )
    assert error(got["decay"], want) < 1e-4


@pytest.mark.parametrize("option", ["head", "token+delta", "channel+bonus"])
@pytest.mark.parametrize("split", [1, 64, 149])
def test_state_hand_over_at_any_token(option, split):
    with enable_x64(True):
        p = problem(option)
        out, state = _wanted(option)
        parts, at = [], {"initial_state": p["initial_state"]}
        for piece in (slice(0, split), slice(split, None)):
            part = {n: x[:, piece] if x.shape[:2] == (2, LENGTH) else x for n, x in p.items()}
            got, last = chunked(part | at, chunk_size=64, scale=SCALE)
            at = {"initial_state": last}
            parts.append(got)
        assert error(jnp.concatenate(parts, axis=1), out) < VALUES
        assert error(last, state) < VALUES


@pytest.mark.parametrize("option", ["head+bonus", "token", "channel+delta"])
def test_segments_are_separate_sequences(option):
    lengths = (37, 1, 70, 42)
    with enable_x64(True):
        p = problem(option)
        # an id may come back later in the row: it is a new segment all the same
        ids = jnp.asarray(np.repeat([3, 1, 3, 0], lengths)[None].repeat(2, 0), jnp.int32)
        got, last = chunked(p, chunk_size=64, scale=SCALE, segment_ids=ids)
        parts, start = [], 0
        for n in lengths:
            piece = {
                name: x[:, start : start + n] if x.shape[:2] == (2, LENGTH) else x
                for name, x in p.items()
            }
            if start:
                piece["initial_state"] = jnp.zeros_like(p["initial_state"])
            out, state = values(piece, SCALE)
            parts.append(out)
            start += n
        assert error(got, np.concatenate(parts, axis=1)) < VALUES
        assert error(last, state) < VALUES


@pytest.mark.parametrize("option", OPTIONS)
def test_steps_give_the_parallel_form(option):
    with enable_x64(True):
        p = problem(option, t=9)
        out, state = chunked(p, chunk_size=4, scale=SCALE)
        at, outs = p["initial_state"], []
        for i in range(9):
            token = {n: p[n][:, i] for n in ("query", "key", "value", "beta") if n in p}
            if "decay" in p:
                token["decay"] = p["decay"] if p["decay"].ndim == 1 else p["decay"][:, i]
            if "bonus" in p:
                token["bonus"] = p["bonus"]
            one, at = linear_attention_step(**token, state=at, scale=SCALE)
            outs.append(one)
        assert error(jnp.stack(outs, axis=1), out) < VALUES and error(at, state) < VALUES


@pytest.mark.parametrize("option", ["none", "channel", "channel+delta"])
@pytest.mark.parametrize("length", [1, 7, 63, 129])
def test_odd_lengths(option, length):
    with enable_x64(True):
        p = problem(option, b=1, t=length)
        want = values(p, SCALE)
        got = chunked(p, scale=SCALE)
        assert error(got[0], want[0]) < VALUES and error(got[1], want[1]) < VALUES


@hypothesis.settings(max_examples=12, deadline=None, derandomize=True)
@hypothesis.given(
    option=st.sampled_from(OPTIONS),
    length=st.integers(1, 40),
    size=st.integers(1, 48),
    widths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    seed=st.integers(0, 99),
)
def test_any_size_gives_the_recurrence(option, length, size, widths, seed):
    with enable_x64(True):
        p = problem(option, b=1, t=length, k=widths[0], v=widths[1], seed=seed)
        want = values(p, 1.0)
        got = chunked(p, chunk_size=size, scale=1.0)
        assert error(got[0], want[0]) < 1e-11 and error(got[1], want[1]) < 1e-11


def test_special_cases_meet():
    with enable_x64(True):
        p = problem("token", t=40)
        flat = p | {"decay": jnp.broadcast_to(p["decay"][:, :1], p["decay"].shape)}
        by_channel = p | {"decay": jnp.broadcast_to(p["decay"][..., None], p["query"].shape)}
        assert error(chunked(by_channel)[0], chunked(p)[0]) < VALUES
        one = {n: x[:1] for n, x in flat.items()}
        assert error(chunked(one | {"decay": one["decay"][0, 0]})[0], chunked(one)[0]) < VALUES
        plain = {n: x for n, x in p.items() if n != "decay"}
        still = plain | {
            "decay": jnp.zeros_like(p["decay"]),
            "beta": jnp.full_like(p["decay"], 0.7),
        }
        assert error(chunked(still)[0], chunked({**plain, "beta": still["beta"]})[0]) < VALUES
        # the delta rule with a small beta writes v unchanged when v is divided by it
        small = plain | {"beta": jnp.full_like(p["decay"], 1e-9), "value": plain["value"] / 1e-9}
        small["initial_state"] = plain["initial_state"]
        assert error(chunked(small)[0], chunked(plain)[0]) < 1e-6
