"""Lightning attention: function, slopes, module, cache, taps, and the TransNormer layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax.mechanisms.linear.lightning_attention import (
    LightningAttention,
    lightning_attention,
    lightning_attention_step,
    lightning_slopes,
)
from attnjax.mechanisms.linear.transnormer import TransNormerBlock
from attnjax.taps import Edits, Patch
from pallas_kernels.compat import enable_x64
from tests.linear.naive import error

ROUNDING = 2e-5  # float32, relative to the largest value


def _inputs(b=2, t=23, h=3, k=4, v=5, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = ((b, t, h, k), (b, t, h, k), (b, t, h, v))
    return [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]


def _x(b=2, t=11, m=16):
    return jax.random.normal(jax.random.key(1), (b, t, m))


@pytest.mark.parametrize("decay", [True, False])
def test_function_is_the_masked_product(decay):
    with enable_x64(True):
        q, k, v = _inputs(dtype=np.float64)
        slopes = jnp.asarray(lightning_slopes(3, 1, 4)) if decay else None
        gap = jnp.arange(23)[:, None] - jnp.arange(23)[None]
        rate = jnp.zeros(3, q.dtype) if slopes is None else slopes
        weights = jnp.where(
            gap >= 0, jnp.exp(-rate[:, None, None] * jnp.maximum(gap, 0)[None].astype(q.dtype)), 0.0
        )
        want = jnp.einsum("bthk,bshk,hts,bshv->bthv", q, k, weights, v)
        assert error(lightning_attention(q, k, v, slopes, chunk_size=8), want) < 1e-12


def test_slopes():
    np.testing.assert_allclose(lightning_slopes(4), [2**-2, 2**-4, 2**-6, 2**-8])
    assert lightning_slopes(6).shape == (6,)
    np.testing.assert_allclose(lightning_slopes(4, 3, 4), lightning_slopes(4) * 1e-5)
    np.testing.assert_allclose(lightning_slopes(4, 1, 2, kind="paper"), [0, 1, 2, 3])
    for bad in ({"kind": "rope"}, {"layer": 2, "num_layers": 2}):
        with pytest.raises(ValueError, match="lightning_slopes"):
            lightning_slopes(4, **bad)


def test_slopes_have_a_gradient():
    with enable_x64(True):
        q, k, v = _inputs(dtype=np.float64)
        slopes = jnp.asarray(lightning_slopes(3))
        loss = lambda s: jnp.sum(lightning_attention(q, k, v, s, chunk_size=8) ** 2)  # noqa: E731
        step = 1e-5 * jnp.eye(3)
        want = jnp.stack([(loss(slopes + e) - loss(slopes - e)) / 2e-5 for e in step])
        assert error(jax.grad(loss)(slopes), want) < 1e-6


def test_padding_is_not_written_and_does_not_decay():
    q, k, v = _inputs()
    slopes = lightning_slopes(3)
    valid = jnp.arange(23)[None] < jnp.array([[23], [9]])
    out, state = lightning_attention(q, k, v, slopes, valid=valid, return_state=True, chunk_size=8)
    short = lightning_attention(q[1:, :9], k[1:, :9], v[1:, :9], slopes, return_state=True)
    assert error(out[1:, :9], short[0]) < ROUNDING and error(state[1:], short[1]) < ROUNDING
    step = lightning_attention_step(q[:, 9], k[:, 9], v[:, 9], state, slopes)
    longer = lightning_attention(q[1:, :10], k[1:, :10], v[1:, :10], slopes, return_state=True)
    assert error(step[0][1:], longer[0][:, 9]) < ROUNDING


def test_bad_input_is_named():
    q, k, v = _inputs()
    with pytest.raises(ValueError, match="slopes must have shape"):
        lightning_attention(q, k, v, lightning_slopes(4))
    with pytest.raises(ValueError, match="valid must be boolean"):
        lightning_attention(q, k, v, None, valid=jnp.ones((2, 23)))
    with pytest.raises(ValueError, match="multiple of num_heads=3"):
        LightningAttention(3, 16, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError, match="num_kv_heads=2"):
        LightningAttention(4, 16, num_kv_heads=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="slopes must be num_heads=4"):
        LightningAttention(4, 16, slopes=[1.0, -1.0, 0.0, 0.0], rngs=nnx.Rngs(0))
    module = LightningAttention(4, 16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="x must have shape"):
        module(_x(m=8))
    with pytest.raises(NotImplementedError, match="mask is not supported"):
        module(_x(), mask=jnp.ones((11, 11), bool))
    with pytest.raises(NotImplementedError, match="no site 'weights'"):
        module(_x(), capture=("weights",))
    with pytest.raises(ValueError, match="lrpe=True"):
        module(_x(), edits=Edits(query_positions=jnp.zeros((2, 11), jnp.int32)))
    with pytest.raises(ValueError, match="made for batch .2,., the input has 3 rows"):
        module(_x(b=3), cache=module.init_cache(2, 8))
    with pytest.raises(
        ValueError, match=r"holds a state of shape \(4, 8, 4\), needed is \(4, 4, 4\)"
    ):
        wide = LightningAttention(4, 16, lrpe=True, rngs=nnx.Rngs(0))
        module(_x(), cache=wide.init_cache(2, 8))
    for option in ({"causal": False}, {"rope_base": 1e4}, {"dropout_rate": 0.1}):
        with pytest.raises(NotImplementedError, match=f"LightningAttention: {[*option][0]}"):
            LightningAttention(4, 16, **option, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="unknown argument slope; further .* are slopes"):
        module(_x(), slope=jnp.zeros(4))


@pytest.mark.parametrize("lrpe", [False, True])
def test_prefill_and_decode_give_the_full_forward(lrpe):
    module = LightningAttention(4, 16, lrpe=lrpe, chunk_size=4, rngs=nnx.Rngs(0))
    x, lengths = _x(), jnp.array([7, 4])
    full = module(x)
    valid = jnp.arange(7)[None] < lengths[:, None]
    prompt = jnp.where(valid[..., None], x[:, :7], jnp.nan)
    y, cache = module(prompt, cache=module.init_cache(2, 16), valid=valid)
    assert (
        error(jnp.where(valid[..., None], y, 0.0), jnp.where(valid[..., None], full[:, :7], 0.0))
        < ROUNDING
    )
    for i in range(4):
        at = lengths + i
        token = jnp.take_along_axis(x, at[:, None, None], axis=1)
        want = jnp.take_along_axis(full, at[:, None, None], axis=1)
        y, cache = module(token, cache=cache)
        assert error(y, want) < ROUNDING
        # a padded step leaves the row's cache alone
        idle = module(token, cache=cache, valid=jnp.zeros((2, 1), bool))[1]
        assert bool((idle.state == cache.state).all()) and bool((idle.length == cache.length).all())
    assert cache.length.tolist() == [11, 8]


def test_segments_are_separate_sequences():
    module = LightningAttention(4, 16, chunk_size=4, rngs=nnx.Rngs(0))
    x = _x()
    ids = jnp.array([[0] * 5 + [1] * 6] * 2, jnp.int32)
    want = jnp.concatenate([module(x[:, :5]), module(x[:, 5:])], axis=1)
    assert error(module(x, segment_ids=ids), want) < ROUNDING
    # the state of a cache belongs to the first of them
    _, cache = module(x[:, :3], cache=module.init_cache(2, 11))
    rest, cache = module(x[:, 3:], segment_ids=ids[:, 3:], cache=cache)
    assert error(rest, want[:, 3:]) < ROUNDING
    _, alone = module(x[:, 5:], cache=module.init_cache(2, 11))
    assert error(cache.state, alone.state) < ROUNDING


def test_taps():
    module = LightningAttention(4, 16, lrpe=True, chunk_size=4, rngs=nnx.Rngs(0))
    x = _x()
    y, seen = module(x, capture=module.sites)
    assert bool((y == module(x, edits=Edits())).all())
    assert seen["q"].shape == (2, 11, 4, 4) and seen["q_rot"].shape == (2, 11, 4, 8)
    assert error(seen["head_out"].sum(2), y) < ROUNDING and bool((seen["attn_out"] == y).all())
    patch = {s: Patch(a, jnp.ones(a.shape, bool)) for s, a in seen.items() if s != "head_out"}
    assert bool((module(x, edits=Edits(patch=patch)) == y).all())
    without = module(x, edits=Edits(head_scale=jnp.array([1.0, 0.0, 1.0, 1.0])))
    assert error(without, y - seen["head_out"][:, :, 1]) < ROUNDING
    moved = Edits(query_positions=jnp.arange(11)[None] + 5, key_positions=jnp.arange(11)[None] + 5)
    assert error(module(x, edits=moved), y) < ROUNDING  # only differences of positions count


def test_slopes_of_a_call_replace_the_module_s():
    plain = LightningAttention(4, 16, slopes=None, rngs=nnx.Rngs(0))
    paper = LightningAttention(4, 16, slopes="paper", layer=1, num_layers=3, rngs=nnx.Rngs(0))
    given = jnp.asarray(lightning_slopes(4, 1, 3, "paper"), jnp.float32)
    assert bool((plain(_x(), slopes=given) == paper(_x())).all())
    assert error(plain(_x(), slopes=jnp.zeros(4)), plain(_x())) < ROUNDING


def test_transnormer_prefill_and_decode():
    block = TransNormerBlock(4, 16, 24, lrpe=True, layer=1, num_layers=3, rngs=nnx.Rngs(0))
    x = _x()
    full, seen = block(x, capture=("resid_mid", "mlp_out", "z"))
    assert error(seen["resid_mid"] + seen["mlp_out"], full) < ROUNDING
    y, cache = block(x[:, :8], cache=block.init_cache(2, 16))
    outs = [y]
    for i in range(8, 11):
        y, cache = block(x[:, i : i + 1], cache=cache)
        outs.append(y)
    assert error(jnp.concatenate(outs, axis=1), full) < ROUNDING
