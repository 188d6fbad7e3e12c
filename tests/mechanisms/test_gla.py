"""GLA and simple GLA: the layers written down token by token, and what they reduce to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose

from attnjax.mechanisms.linear.gla import GatedLinearAttention, gated_linear_attention
from attnjax.mechanisms.linear.linear_attention import linear_attention
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
)


@pytest.mark.parametrize("per_head", [False, True], ids=["channel", "head"])
def test_layer_equals_its_definition(per_head):
    """Decays by channel without convolutions, and by head with them."""
    options = dict(per_head=True, conv_size=3) if per_head else dict(gate_rank=3)
    p, x, got = run(
        lambda: GatedLinearAttention(
            2, 10, 16, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options
        ),
        (2, 9, 10),
    )
    q, k, v, g = (project(x, p[f"{n}.kernel"]) for n in ("query", "key", "value", "gate"))
    assert (q.shape[-1], v.shape[-1]) == (4, 8)
    if per_head:
        q, k, v = (
            silu(convolve(a, p[f"{n}_conv.kernel"]))
            for a, n in ((q, "query"), (k, "key"), (v, "value"))
        )
        logits = (project(x, p["decay.kernel"]) + p["decay.bias"])[..., None]
    else:
        rank = project(x, p["decay_in.kernel"])
        assert rank.shape[-1] == 3
        logits = project(rank, p["decay.kernel"]) + p["decay.bias"]
    o = recurrence(q / 2, k, v, sigmoid(logits) ** (1 / 16))
    assert_allclose(got, output(rms(o) * silu(g), p["out.kernel"]), rtol=0, atol=1e-12)


def test_gradients():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        q, k, v, gate, ct = (jnp.asarray(rng.standard_normal((1, 9, 2, 4))) for _ in range(5))

        def naive(q, k, v, gate):
            total = jnp.cumsum(jax.nn.log_sigmoid(gate) / 16, axis=1)
            seen = jnp.tril(jnp.ones((9, 9)))
            return jnp.einsum(
                "bthk,bshk,bthk,bshk,ts,bshv->bthv",
                q, k, jnp.exp(total), jnp.exp(-total), seen, v,
            ) / 2  # fmt: skip

        got, want = (both(f, (q, k, v, gate), ct) for f in (gated_linear_attention, naive))
        assert_allclose(got[0], want[0], atol=1e-13)
        jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-12), got[1], want[1])


def test_reduces_to_linear_attention():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 7, 3, 4))
    got = gated_linear_attention(q, k, v, jnp.full((1, 7, 3), 60.0))
    assert_allclose(got, linear_attention(q, k, v), rtol=1e-5, atol=1e-6)


def test_equal_channels_are_one_decay_per_head():
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 7, 3, 4))
    gate = jax.random.normal(jax.random.key(1), (1, 7, 3))
    by_channel = gated_linear_attention(q, k, v, jnp.repeat(gate[..., None], 4, axis=-1))
    assert_allclose(by_channel, gated_linear_attention(q, k, v, gate), rtol=1e-4, atol=1e-6)


def test_bad_options():
    with pytest.raises(ValueError, match="normalizer"):
        GatedLinearAttention(2, 8, normalizer=0.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="key_factor"):
        GatedLinearAttention(2, 6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="norm='batch'"):
        GatedLinearAttention(2, 8, norm="batch", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="chunk_size=0 must be at least 1 token"):
        GatedLinearAttention(2, 8, chunk_size=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="width=0"):
        GatedLinearAttention(2, 8, conv_size=0, rngs=nnx.Rngs(0))
