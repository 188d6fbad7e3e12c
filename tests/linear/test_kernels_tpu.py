"""The TPU kernels of the linear recurrence, interpreted, against the float64 recurrence."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dispatch import Target, Unsupported
from pallas_kernels.linear import linear_recurrence, tpu
from tests.linear import kernel_cases as cases
from tests.linear.naive import problem

check = functools.partial(cases.check, "interpret")
DECAYS = ("none", "head", "token")


@pytest.mark.parametrize("option, t", [("none", 7), ("head", 63), ("token", 130)])
def test_float32(option, t):
    check(option, t)


def test_segments():
    check("token", 130, segments=True)


@pytest.mark.slow
@pytest.mark.parametrize("option", DECAYS)
@pytest.mark.parametrize("t", [1, 7, 63, 130, 257])
@pytest.mark.parametrize("segments", [False, True])
def test_every_length(option, t, segments):
    check(option, t, segments=segments)


@pytest.mark.parametrize("option", ["token", pytest.param("none", marks=pytest.mark.slow)])
def test_16_bit_inputs(option):
    check(option, 130, jnp.bfloat16, segments=option == "none")


@pytest.mark.slow
def test_float64():
    check("head", 130, jnp.float64, segments=True)
    check("token", 130, jnp.float64)


@pytest.mark.parametrize("option", ["head", pytest.param("token", marks=pytest.mark.slow)])
def test_heads_of_128_columns(option):
    check(option, 130, b=1, h=1, k=128, v=128)


@pytest.mark.slow
def test_wide_states_are_tiled():
    check("token", 20, b=1, h=1, k=256, v=512)
    check("head", 140, b=1, h=3, k=40, v=72)


def test_state_hand_over_at_any_token():
    cases.check_hand_over("interpret", "token", [1, 128])


@pytest.mark.slow
def test_constant_strong_decay_keeps_the_small_gradient():
    cases.check_constant_strong_decay("interpret")


def test_runs_are_equal_bit_for_bit():
    cases.check_bitwise("interpret")


@pytest.mark.parametrize("option", ["head", pytest.param("token", marks=pytest.mark.slow)])
def test_vmap(option):
    cases.check_vmap("interpret", option)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lightning", "linear_family"])
def test_golden(case, monkeypatch):
    cases.check_golden("interpret", monkeypatch, case)


@pytest.mark.parametrize(
    "option, said", [("token+delta", "beta"), ("channel", "per channel"), ("none+bonus", "bonus")]
)
def test_what_is_missing_is_named(option, said):
    x = cases.operands({n: x.astype(jnp.float32) for n, x in problem(option, t=8).items()})
    with pytest.raises(Unsupported, match=said):
        linear_recurrence(x, cases.spec("interpret"))


def test_no_races():
    races = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    pltpu = pytest.importorskip("jax.experimental.pallas.tpu")
    target = Target("tpu", interpret=pltpu.InterpretParams(detect_races=True))  # type: ignore
    p, d_out, d_state, out, *_ = cases.wanted("token", jnp.float32, 130, False, (("b", 1),))
    x = cases.operands(p)
    got, _ = jax.jit(lambda x: tpu.forward(x, cases.spec(None), target))(x)
    assert cases.error(got, out) < cases.VALUES and not races.races.races_found
    jax.jit(lambda *a: tpu.backward(*a, cases.spec(None), target))(x, d_out, d_state)
    assert not races.races.races_found
