"""Gated DeltaNet: the layer written down token by token, and what it reduces to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.mechanisms.linear.deltanet import delta_rule
from attnjax.mechanisms.linear.gated_deltanet import GatedDeltaNet, gated_delta_rule
from tests.linear.naive import recurrence as naive_recurrence
from tests.linear.naive_layers import (
    both,
    convolve,
    output,
    project,
    recurrence,
    rms,
    run,
    sigmoid,
    silu,
    softplus,
    unit,
)


@pytest.mark.parametrize("conv_size", [4, None])
def test_layer_equals_its_definition(conv_size):
    p, x, got = run(
        lambda: GatedDeltaNet(
            2, 10, 8, conv_size=conv_size, negative_eigenvalues=True, param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        ),
        (2, 9, 10),
    )  # fmt: skip
    q, k, v = (project(x, p[f"{n}.kernel"]) for n in ("query", "key", "value"))
    assert (q.shape[-1], v.shape[-1]) == (3, 6)
    if conv_size:
        q, k, v = (
            convolve(a, p[f"{n}_conv.kernel"]) for a, n in ((q, "query"), (k, "key"), (v, "value"))
        )
    q, k, v = unit(silu(q)), unit(silu(k)), silu(v)
    beta = 2 * sigmoid(project(x, p["beta.kernel"]))
    step = softplus(project(x, p["step.kernel"]) + p["step_bias"])
    decay = np.exp(-step * np.exp(p["log_rate"]))[..., None]
    z = rms(recurrence(q / np.sqrt(3), k, v, decay, beta)) * silu(project(x, p["gate.kernel"]))
    assert_allclose(got, output(z, p["out.kernel"]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("by_channel", [False, True], ids=["head", "channel"])
def test_gradients(by_channel):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v, ct = (jnp.asarray(rng.standard_normal((1, 9, 2, 4))) for _ in range(4))
        beta = jnp.asarray(rng.random((1, 9, 2)))
        decay = -jnp.asarray(rng.random((1, 9, 2, 4) if by_channel else (1, 9, 2)))

        def naive(q, k, v, beta, decay):
            q, k = (a / jnp.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
            return naive_recurrence(dict(query=q, key=k, value=v, beta=beta, decay=decay), 0.5)[0]

        got, want = (both(f, (q, k, v, beta, decay), ct) for f in (gated_delta_rule, naive))
        assert_allclose(got[0], want[0], atol=1e-13)
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-11), got[1], want[1])


def test_reduces_to_delta_rule():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 7, 3, 4))
    beta = jax.nn.sigmoid(q[..., 0])
    got = gated_delta_rule(q, k, v, beta, jnp.zeros((1, 7, 3)))
    assert_allclose(got, delta_rule(q, k, v, beta), rtol=1e-5, atol=1e-6)


def test_six_matrices_of_the_input_width():
    """0.75 m² each for q and k, 1.5 m² each for v, gate and output: 6 m² in all."""
    module = GatedDeltaNet(4, 64, rngs=nnx.Rngs(0))
    parts = (module.query, module.key, module.value, module.gate, module.out)
    assert sum(part.kernel[...].size for part in parts) == 6 * 64**2


def test_bad_factor():
    with pytest.raises(ValueError, match="key_factor"):
        GatedDeltaNet(2, 10, rngs=nnx.Rngs(0))
