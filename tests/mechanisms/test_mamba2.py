"""Mamba-2: the layer written down token by token, the dual form, and what it reduces to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.mechanisms.linear.gla import gated_linear_attention
from attnjax.mechanisms.linear.lightning_attention import lightning_attention
from attnjax.mechanisms.linear.mamba2 import Mamba2, state_space_duality
from tests.linear.naive_layers import (
    both,
    convolve,
    output,
    project,
    recurrence,
    rms,
    run,
    silu,
    softplus,
)


@pytest.mark.parametrize("before", [False, True], ids=["norm after gate", "norm before gate"])
def test_layer_equals_its_definition(before):
    p, x, got = run(
        lambda: Mamba2(
            4, 10, 8, state_size=3, groups=2, norm_before_gate=before, param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        ),
        (2, 9, 10),
    )  # fmt: skip
    c, b, v = (
        silu(convolve(project(x, p[f"{n}.kernel"]), p[f"{n}_conv.kernel"], p[f"{n}_conv.bias"]))
        for n in ("query", "key", "value")
    )
    assert c.shape[2:] == (2, 3) and v.shape[2:] == (4, 4)
    step = softplus(project(x, p["step.kernel"]) + p["step_bias"])
    decay = np.exp(-step * np.exp(p["log_rate"]))[..., None]
    y = recurrence(c.repeat(2, 2), b.repeat(2, 2), v * step[..., None], decay)
    y = y + v * p["skip"][:, None]
    gate = silu(project(x, p["gate.kernel"]))
    y = y if before else y * gate
    y = rms(y.reshape(2, 9, 2, 8)).reshape(y.shape) * p["scale"]
    assert_allclose(got, output(y * gate if before else y, p["out.kernel"]), rtol=0, atol=1e-12)


def test_gradients_of_the_dual_form():
    """y = (L ∘ C B^T) Δ x with L_ts = exp(Σ_{s < r <= t} decay_r), the paper's matrix."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, b, c, ct = (jnp.asarray(rng.standard_normal((1, 9, 2, 4))) for _ in range(4))
        step = jnp.asarray(rng.random((1, 9, 2)))
        rate, skip = jnp.array([0.3, -1.0]), jnp.array([1.0, 0.5])

        def naive(x, step, rate, b, c, skip):
            total = jnp.cumsum(-step * jnp.exp(rate)[None, None], axis=1)
            decay = (
                jnp.exp(total[:, :, None] - total[:, None])
                * jnp.tril(jnp.ones((9, 9)))[None, :, :, None]
            )
            y = jnp.einsum("btsh,bthn,bshn,bshp,bsh->bthp", decay, c, b, x, step)
            return y + skip[None, None, :, None] * x

        def ours(x, step, rate, b, c, skip):
            return state_space_duality(x, step, rate, b, c, skip=skip)

        inputs = (x, step, rate, b, c, skip)
        got, want = (both(f, inputs, ct) for f in (ours, naive))
        assert_allclose(got[0], want[0], atol=1e-13)
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-11), got[1], want[1])


def test_reduces_to_lightning_and_simple_gla():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 7, 3, 4))
    slopes, ones = jnp.array([0.5, 0.25, 1.0]), jnp.ones((1, 7, 3))
    got = state_space_duality(v, ones, jnp.log(slopes), k, q)
    assert_allclose(got, lightning_attention(q, k, v, slopes), rtol=1e-5, atol=1e-6)
    gate = jax.random.normal(jax.random.key(1), (1, 7, 3))
    step = -jax.nn.log_sigmoid(gate) / 16
    got = state_space_duality(v / step[..., None], step, jnp.zeros((3,)), k, q)
    want = gated_linear_attention(q, k, v, gate, scale=1.0)
    assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_initial_steps_and_rates():
    """Steps start in [0.001, 0.1], rates in [1, 16], as in the official code."""
    module = Mamba2(64, 64, rngs=nnx.Rngs(0))
    step = softplus(np.asarray(module.step_bias[...], np.float64))
    rate = np.exp(module.log_rate[...])
    assert 0.999e-3 < step.min() < 4e-3 and 0.03 < step.max() < 0.1001
    assert 1 <= rate.min() < 4 and 13 < rate.max() <= 16.01


def test_bad_options():
    with pytest.raises(ValueError, match="groups=3"):
        Mamba2(4, 8, groups=3, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="key_factor is not supported"):
        Mamba2(4, 8, key_factor=2.0, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, 4, 2))
    with pytest.raises(ValueError, match="groups dividing the 4 heads"):
        state_space_duality(x, x[..., 0], jnp.ones((4,)), x[:, :, :3], x[:, :, :3])
