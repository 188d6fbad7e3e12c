"""RetNet: the layer written down as T x T scores, its decays, and what it reduces to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.mechanisms.linear.lightning_attention import lightning_attention
from attnjax.mechanisms.linear.retnet import MultiScaleRetention, retention, retention_decay
from tests.linear.naive_layers import both, output, project, rms, run, silu

GAMMA = 1 - 2.0 ** (-5 - np.arange(3))


def turned(x, base, planes):
    """Pairs (2c, 2c + 1) rotated by n base^-linspace(0, 1)."""
    angle = np.arange(x.shape[1])[:, None] * base ** -np.linspace(0, 1, planes)[None]
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[None, :, None]
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def scores(q, k):
    """γ^(n-m) q_n · k_m / sqrt(d), [b, h, n, m]."""
    t = np.arange(q.shape[1])
    distance = np.maximum(t[:, None] - t[None], 0)
    decay = np.where(t[:, None] >= t[None], GAMMA[:, None, None] ** distance, 0.0)
    return np.einsum("bnhd,bmhd->bhnm", q, k) * decay / np.sqrt(q.shape[-1]), decay


@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "as in the paper"])
def test_layer_equals_its_definition(normalized):
    p, x, got = run(
        lambda: MultiScaleRetention(3, 10, 12, param_dtype=jnp.float64, rngs=nnx.Rngs(0)),
        (2, 11, 10),
    )
    q, k, v, g = (project(x, p[f"{n}.kernel"]) for n in ("query", "key", "value", "gate"))
    assert v.shape[-1] == 2 * q.shape[-1]
    a, decay = scores(turned(q, 1e4, 2), turned(k, 1e4, 2))
    epsilon = 1e-5
    if normalized:  # the paper's parallel form; the norm by head undoes both factors
        a = a / np.sqrt(decay.sum(-1))[None, ..., None]
        a = a / np.maximum(np.abs(a.sum(-1, keepdims=True)), 1)
        epsilon = 0.0
    o = np.einsum("bhnm,bmhe->bnhe", a, v)
    want = output(rms(o, epsilon) * silu(g), p["out.kernel"])
    assert_allclose(got, want, rtol=0, atol=2e-3 if normalized else 1e-12)


def test_gradients():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v, ct = (jnp.asarray(rng.standard_normal((1, 9, 3, 4))) for _ in range(4))

        def naive(q, k, v):
            t = jnp.arange(9.0)
            decay = jnp.tril(jnp.asarray(GAMMA)[:, None, None] ** (t[:, None] - t[None])[None])
            return jnp.einsum("bnhd,bmhd,hnm,bmhe->bnhe", q, k, decay, v) / 2

        got, want = (both(f, (q, k, v), ct) for f in (retention, naive))
        assert_allclose(got[0], want[0], atol=1e-13)
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-12), got[1], want[1])


def test_decays():
    assert_allclose(np.exp(retention_decay(3)), [31 / 32, 63 / 64, 127 / 128], rtol=1e-15)


def test_reduces_to_lightning_attention():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 7, 3, 4))
    slopes = jnp.array([0.5, 0.25, 0.0])
    got = retention(q, k, v, decay=-slopes, scale=1.0)
    assert_allclose(got, lightning_attention(q, k, v, slopes), rtol=1e-6)


def test_bad_options():
    with pytest.raises(ValueError, match="even width"):
        MultiScaleRetention(2, 6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="frequencies"):
        MultiScaleRetention(2, 8, frequencies="yarn", rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        MultiScaleRetention(2, 8, dropout_rate=0.1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="value_factor"):
        MultiScaleRetention(2, 8, value_factor=0.3, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="causal=False"):
        MultiScaleRetention(2, 8, causal=False, rngs=nnx.Rngs(0))
