"""Rotary embedding, its scaling family and xPos."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.positions import (
    RopeScaling,
    apply_rope,
    apply_xpos,
    rope_frequencies,
    xpos_center,
)
from pallas_kernels.compat import enable_x64

B, T, H, D = 2, 5, 3, 8
LAYOUTS = ["half", "interleaved"]


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def rotated_by_definition(x, positions, inv_freq, layout):
    """Complex multiplication by exp(i m w)."""
    c = len(inv_freq)
    pairs = (x[..., :c], x[..., c : 2 * c]) if layout == "half" else (x[..., 0::2], x[..., 1::2])
    angle = np.broadcast_to(positions, x.shape[:2])[:, :, None, None] * inv_freq
    z = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angle)
    if layout == "half":
        return np.concatenate([z.real, z.imag], -1)
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("positions", [np.arange(T), np.array([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])])
def test_definition(layout, positions):
    x = random(B, T, H, D)
    inv_freq, factor = rope_frequencies(D)
    assert factor == 1.0
    np.testing.assert_allclose(inv_freq, 10000.0 ** (-np.arange(0, D, 2) / D), rtol=1e-12)
    with enable_x64(True):
        got = apply_rope(x, positions, inv_freq, layout=layout)
        assert got.dtype == jnp.float64
    np.testing.assert_allclose(
        got, rotated_by_definition(x, positions, inv_freq, layout), atol=1e-12
    )
    single = apply_rope(x.astype(np.float32), positions, inv_freq, layout=layout)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, got, atol=2e-6)
    half = apply_rope(jnp.asarray(x, jnp.bfloat16), positions, inv_freq, layout=layout)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), got, atol=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_depend_on_distance_only(layout):
    q, k = random(1, T, H, D), random(1, T, H, D, seed=1)
    inv_freq, _ = rope_frequencies(D, base=500.0)

    def scores(shift):
        p = np.arange(T) + shift
        rq, rk = (apply_rope(x, p, inv_freq, layout=layout) for x in (q, k))
        return jnp.einsum("bthd,bshd->bhts", rq, rk)

    with enable_x64(True):
        np.testing.assert_allclose(scores(0), scores(1000), rtol=1e-9, atol=1e-9)


def test_positions_by_head_and_partial_rotation():
    x = random(B, T, H, D).astype(np.float32)
    inv_freq, _ = rope_frequencies(D)
    positions = np.random.default_rng(2).integers(0, 50, (B, H, T))
    got = apply_rope(x, positions, inv_freq)
    for h in range(H):
        want = apply_rope(x[:, :, h : h + 1], positions[:, h], inv_freq)
        np.testing.assert_array_equal(got[:, :, h : h + 1], want)
    shared = apply_rope(x, positions[:1, :1], inv_freq)
    np.testing.assert_array_equal(shared, apply_rope(x, positions[0, 0], inv_freq))
    part, _ = rope_frequencies(4)
    got = apply_rope(x, np.arange(T), part)
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(got[..., :4], apply_rope(x[..., :4], np.arange(T), part))


def test_attention_factor_scales_rotated_channels():
    x = random(B, T, H, D).astype(np.float32)
    inv_freq, _ = rope_frequencies(D)
    plain = apply_rope(x, np.arange(T), inv_freq)
    got = apply_rope(x, np.arange(T), inv_freq, attention_factor=1.5)
    np.testing.assert_allclose(got, 1.5 * plain, rtol=1e-6)


def test_gradient_is_the_inverse_rotation():
    x, ct = random(B, T, H, D), random(B, T, H, D, seed=1)
    inv_freq, _ = rope_frequencies(D)
    with enable_x64(True):
        _, pull = jax.vjp(lambda x: apply_rope(x, np.arange(T), inv_freq), jnp.asarray(x))
        np.testing.assert_allclose(
            pull(jnp.asarray(ct))[0], apply_rope(ct, -np.arange(T), inv_freq), atol=1e-12
        )


def test_simple_schemes():
    plain, _ = rope_frequencies(D)
    got, _ = rope_frequencies(D, scaling=RopeScaling("linear", factor=4.0))
    np.testing.assert_allclose(got, plain / 4, rtol=1e-12)
    got, _ = rope_frequencies(D, scaling=RopeScaling("ntk", factor=4.0))
    np.testing.assert_allclose(got[0], plain[0], rtol=1e-12)
    np.testing.assert_allclose(got[-1], plain[-1] / 4, rtol=1e-12)  # the slowest is interpolated
    dynamic = RopeScaling("dynamic", factor=2.0, original_max_length=100)
    for length in (None, 7, 100):
        np.testing.assert_allclose(rope_frequencies(D, scaling=dynamic, seq_len=length)[0], plain)
    got, _ = rope_frequencies(D, scaling=dynamic, seq_len=300)
    stretched = 10000.0 * (2 * 300 / 100 - 1) ** (D / (D - 2))
    np.testing.assert_allclose(got, stretched ** (-np.arange(0, D, 2) / D), rtol=1e-12)


def test_yarn():
    d, trained, s = 64, 4096, 8.0
    scaling = RopeScaling("yarn", factor=s, original_max_length=trained)
    plain, _ = rope_frequencies(d)
    got, factor = rope_frequencies(d, scaling=scaling)
    assert factor == pytest.approx(0.1 * math.log(s) + 1)
    turns = trained * plain / (2 * math.pi)
    np.testing.assert_allclose(got[turns > 40], plain[turns > 40], rtol=1e-12)
    np.testing.assert_allclose(got[turns < 0.7], plain[turns < 0.7] / s, rtol=1e-12)
    assert ((got <= plain) & (got >= plain / s)).all() and (np.diff(got) < 0).all()
    options = {"factor": s, "original_max_length": trained}
    assert (
        rope_frequencies(d, scaling=RopeScaling("yarn", mscale=1.0, mscale_all_dim=1.0, **options))[
            1
        ]
        == 1
    )
    assert rope_frequencies(d, scaling=RopeScaling("yarn", attention_factor=3.0, **options))[1] == 3
    rough = rope_frequencies(d, scaling=RopeScaling("yarn", truncate=False, **options))[0]
    assert np.abs(rough - got).max() > 0


def test_llama3():
    d, trained, s = 64, 8192, 8.0
    scaling = RopeScaling("llama3", factor=s, original_max_length=trained)
    plain, _ = rope_frequencies(d, 500000.0)
    got, factor = rope_frequencies(d, 500000.0, scaling)
    want = []
    for w in plain:  # as the published code branches
        wavelength = 2 * math.pi / w
        if wavelength < trained / 4:
            want.append(w)
        elif wavelength > trained / 1:
            want.append(w / s)
        else:
            smooth = (trained / wavelength - 1) / (4 - 1)
            want.append((1 - smooth) * w / s + smooth * w)
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert factor == 1.0


def test_longrope():
    short, long = np.linspace(1, 2, 4), np.linspace(3, 9, 4)
    scaling = RopeScaling(
        "longrope",
        original_max_length=64,
        max_length=256,
        short_factor=tuple(short),
        long_factor=tuple(long),
    )
    plain, _ = rope_frequencies(D)
    for length, divisor in ((None, short), (64, short), (65, long)):
        got, factor = rope_frequencies(D, scaling=scaling, seq_len=length)
        np.testing.assert_allclose(got, plain / divisor, rtol=1e-12)
        assert factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(64)))


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("dynamic", factor=2.0, original_max_length=16),
        RopeScaling(
            "longrope", original_max_length=16, short_factor=(1, 2, 3, 4), long_factor=(5, 6, 7, 8)
        ),
    ],
)
def test_traced_lengths(scaling):
    traced = jax.jit(lambda n: rope_frequencies(D, scaling=scaling, seq_len=n)[0])
    for length in (3, 16, 17, 80):
        want, _ = rope_frequencies(D, scaling=scaling, seq_len=length)
        np.testing.assert_allclose(traced(length), want, rtol=1e-5)


def test_from_dict_reads_common_configurations():
    got = RopeScaling.from_dict({"type": "linear", "factor": 2.0}, 2048)
    assert (got.kind, got.factor, got.original_max_length) == ("linear", 2.0, 2048)
    got = RopeScaling.from_dict(
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048
    )
    assert (got.original_max_length, got.max_length) == (512, 2048)
    assert hash(got) == hash(RopeScaling("yarn", 4.0, 512, 2048))
    with pytest.raises(ValueError, match="unknown option 'speed'"):
        RopeScaling.from_dict({"rope_type": "linear", "factor": 2.0, "speed": 3})


def test_xpos():
    q, k = random(1, T, H, D), random(1, T, H, D, seed=1)
    p = np.arange(T)

    def scores(center, shift=0):
        up = apply_xpos(q, p + shift, center=center)
        down = apply_xpos(k, p + shift, downscale=True, center=center)
        return jnp.einsum("bthd,bshd->bhts", up, down)

    inv_freq, _ = rope_frequencies(D)
    with enable_x64(True):
        want = np.zeros((1, H, T, T))
        zeta = (np.arange(0, D, 2) + 0.4 * D) / (1.4 * D)
        for m in range(T):
            for n in range(T):
                z = (q[0, m, :, 0::2] + 1j * q[0, m, :, 1::2]) * np.conj(
                    k[0, n, :, 0::2] + 1j * k[0, n, :, 1::2]
                )
                factor = np.exp(1j * (m - n) * inv_freq) * zeta ** ((m - n) / 512)
                want[0, :, m, n] = (z * factor).real.sum(-1)
        np.testing.assert_allclose(scores(0), want, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(scores(xpos_center(T)), want, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(scores(0, shift=100), want, rtol=1e-10, atol=1e-10)
    assert xpos_center(5) == -3 and xpos_center(4, 2) == -3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: apply_rope(x, np.arange(4), np.ones(4)), r"\[length\]=\(5,\)"),
        (lambda x: apply_rope(x, np.zeros((B, T, H)), np.ones(4)), "positions must have shape"),
        (lambda x: apply_rope(x, np.arange(T), np.ones(5)), "width of 10"),
        (
            lambda x: apply_rope(x, np.arange(T), np.ones(4), layout="odd"),
            "'half' or 'interleaved'",
        ),
        (lambda x: apply_rope(x[0], np.arange(T), np.ones(4)), "rank 4"),
        (lambda x: apply_xpos(x[..., :3], np.arange(T)), "even"),
        (lambda x: rope_frequencies(7), "even"),
        (lambda x: rope_frequencies(8, base=0.0), "base"),
        (lambda x: RopeScaling("stretch"), "kind must be one of"),
        (lambda x: RopeScaling("linear"), "needs factor"),
        (lambda x: RopeScaling("yarn", factor=2.0), "needs original_max_length"),
        (lambda x: RopeScaling("linear", factor=0.5), "at least 1"),
        (
            lambda x: rope_frequencies(
                8,
                scaling=RopeScaling(
                    "longrope", original_max_length=4, short_factor=(1.0,), long_factor=(1.0,)
                ),
            ),
            "short_factor must have head_dim / 2 = 4",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make(np.zeros((B, T, H, D), np.float32))
