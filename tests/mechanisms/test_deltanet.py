"""DeltaNet: the layer written down token by token, what its writes do, what it reduces to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.mechanisms.linear.deltanet import DeltaNet, delta_rule
from attnjax.mechanisms.linear.linear_attention import linear_attention
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
    unit,
)


@pytest.mark.parametrize("old", [False, True], ids=["2024", "2021"])
def test_layer_equals_its_definition(old):
    """Convolution, silu, unit keys; and elu + 1 with keys that sum to 1, gate, β up to 2."""
    options = (
        dict(activation="elu", qk_norm="sum", conv_size=None, negative_eigenvalues=True, gate=True)
        if old
        else {}
    )
    p, x, got = run(
        lambda: DeltaNet(2, 10, 8, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options),
        (2, 9, 10),
    )
    q, k, v = (project(x, p[f"{n}.kernel"]) for n in ("query", "key", "value"))
    beta = sigmoid(project(x, p["beta.kernel"]))
    if old:
        q, k = (np.where(a > 0, a + 1, np.exp(np.minimum(a, 0))) for a in (q, k))
        q, k = (a / a.sum(-1, keepdims=True) for a in (q, k))
        v, beta = silu(v), 2 * beta
    else:
        q, k, v = (
            silu(convolve(a, p[f"{n}_conv.kernel"]))
            for a, n in ((q, "query"), (k, "key"), (v, "value"))
        )
        q, k = unit(q), unit(k)
    z = rms(recurrence(q / 2, k, v, 1.0, beta))
    if old:
        z = z * silu(project(x, p["gate.kernel"]))
    assert_allclose(got, output(z, p["out.kernel"]), rtol=0, atol=1e-12)


def test_gradients():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v, ct = (jnp.asarray(rng.standard_normal((1, 9, 2, 4))) for _ in range(4))
        beta = jnp.asarray(rng.random((1, 9, 2)))

        def naive(q, k, v, beta):
            q, k = (a / jnp.sqrt((a * a).sum(-1, keepdims=True) + 1e-6) for a in (q, k))
            return naive_recurrence(dict(query=q, key=k, value=v, beta=beta), 0.5)[0]

        got, want = (both(f, (q, k, v, beta), ct) for f in (delta_rule, naive))
        assert_allclose(got[0], want[0], atol=1e-13)
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-11), got[1], want[1])


def test_a_write_replaces_what_the_key_held():
    """With β = 1 a key reads back its last value; plain linear attention reads their sum."""
    key = jnp.broadcast_to(jnp.array([3.0, 0.0, 4.0]), (1, 2, 1, 3))
    value = jnp.array([[1.0, 2.0], [5.0, -1.0]])[None, :, None]
    out = delta_rule(key, key, value, jnp.ones((1, 2, 1)), scale=1.0)
    assert_allclose(out[0, 1, 0], value[0, 1, 0], atol=1e-5)


def test_reduces_to_linear_attention_for_orthogonal_keys():
    key = jnp.eye(5)[None, :, None]
    q, v = jax.random.normal(jax.random.key(0), (2, 1, 5, 1, 5))
    q = q / jnp.linalg.norm(q, axis=-1, keepdims=True)
    got = delta_rule(q, key, v, jnp.ones((1, 5, 1)))
    assert_allclose(got, linear_attention(q, key, v), atol=1e-5)


def test_bad_options():
    with pytest.raises(ValueError, match="qk_norm='max'"):
        DeltaNet(2, 8, qk_norm="max", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="activation='elu'"):
        DeltaNet(2, 8, qk_norm="sum", rngs=nnx.Rngs(0))
    ones = jnp.ones((1, 3, 2, 4))
    with pytest.raises(ValueError, match="qk_norm"):
        delta_rule(ones, ones, ones, ones[..., 0], qk_norm="l1")
    module = DeltaNet(2, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="init_cache of the same module"):
        other = DeltaNet(2, 8, conv_size=3, rngs=nnx.Rngs(0))
        module(jnp.ones((1, 1, 8)), cache=other.init_cache(1, 4))
