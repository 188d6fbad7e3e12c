"""Factored attention, the wave function's symmetry and size, J1-J2 by variational Monte Carlo."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.softmax.transformer_wavefunction import (
    FactoredAttention,
    WaveFunction,
    circulant,
    factored_attention,
    log_cosh,
)
from attnjax.tasks.spin_lattice import J1J2, natural_gradient, sample

CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # float32


def make(weights, grid=(3, 4), **options):
    return FactoredAttention(2, 8, grid=grid, weights=weights, rngs=nnx.Rngs(0), **options)


def tokens(seed=1):
    return jax.random.normal(jax.random.key(seed), (2, 12, 8))


def test_circulant_by_its_definition():
    alpha = np.arange(24.0).reshape(2, 12)
    got = np.asarray(circulant(jnp.asarray(alpha), (3, 4)))
    for i1, i2, j1, j2 in np.ndindex(3, 4, 3, 4):
        move = (i1 - j1) % 3 * 4 + (i2 - j2) % 4
        assert_array_equal(got[:, i1 * 4 + i2, j1 * 4 + j2], alpha[:, move])


def test_value_and_gradients_of_the_function():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        v, alpha = rng.normal(size=(2, 6, 3, 4)), rng.normal(size=(3, 6, 6))
        out, pull = jax.vjp(factored_attention, jnp.asarray(v), jnp.asarray(alpha))
        want = np.zeros_like(v)
        for h in range(3):
            want[:, :, h] = alpha[h] @ v[:, :, h]
        assert_allclose(out, want, rtol=1e-12)
        dv, da = pull(out)
        assert_allclose(dv, np.einsum("hts,bthe->bshe", alpha, want), rtol=1e-12)
        assert_allclose(da, np.einsum("bthe,bshe->hts", want, v), rtol=1e-12)


@pytest.mark.parametrize("weights", ["position_ti", "position"])
def test_positions_alone_make_a_linear_map_of_the_input(weights):
    module, x = make(weights), tokens()
    table = np.asarray(module.by_position())
    v = np.einsum("bsm,mhe->bshe", x, module.value.kernel[...])
    want = np.einsum("hts,bshe,hem->btm", table, v, module.out.kernel[...])
    assert_allclose(jax.jit(module)(x), want, **CLOSE)
    call = jax.jit(lambda x: module(x, capture=("weights",)))
    (y, one), (_, two) = (call(tokens(seed)) for seed in (1, 2))
    assert_array_equal(one["weights"], two["weights"])
    assert_array_equal(one["weights"][1], table)
    assert_allclose(y, want, **CLOSE)
    size = {"position_ti": 2 * 12, "position": 2 * 12 * 12}[weights]
    assert module.alpha.size == size


def test_translation_invariance_of_a_layer():
    module, x = make("position_ti"), tokens()

    def roll(x):
        return np.roll(np.reshape(x, (2, 3, 4, 8)), (1, 2), (1, 2)).reshape(2, 12, 8)

    call, free = jax.jit(module), jax.jit(make("position"))
    assert_allclose(call(roll(x)), roll(call(x)), **CLOSE)
    assert np.abs(free(roll(x)) - roll(free(x))).max() > 0.1


def test_content_with_softmax_is_multi_head_attention():
    module, x = make("content", softmax=True), tokens()
    full = MultiHeadAttention(2, 8, rngs=nnx.Rngs(1))
    nnx.update(full, nnx.state(module, nnx.Param))
    assert_allclose(jax.jit(module)(x), jax.jit(full)(x), **CLOSE)
    both = make("content+position_ti", softmax=True)
    assert both.query is not None and both.key is not None
    y, shown = jax.jit(lambda x: both(x, capture=("scores", "weights")))(x)
    q, k = (np.einsum("btm,mhd->bthd", x, p.kernel[...]) for p in (both.query, both.key))
    scores = np.einsum("bthd,bshd->bhts", q, k) / 2 + np.asarray(both.by_position())
    assert_allclose(shown["scores"], scores, **CLOSE)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    assert_allclose(shown["weights"], weights, **CLOSE)
    assert y.shape == x.shape


def test_the_wave_function_has_the_size_of_the_source_and_its_symmetry():
    big = nnx.eval_shape(lambda: WaveFunction(10, rngs=nnx.Rngs(0)))
    assert sum(a.size for a in jax.tree.leaves(nnx.state(big, nnx.Param))) == 155_620
    with jax.enable_x64(True):
        psi = WaveFunction(
            6, width=8, num_heads=2, num_layers=1, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        spins = np.random.default_rng(0).choice([-1.0, 1.0], (1, 6, 6))
        moves = [(0, 0), (2, 0), (0, 4), (1, 0)]
        many = np.concatenate([np.roll(spins, move, (1, 2)) for move in moves])
        value = np.asarray(jax.jit(psi)(many))
        assert value.dtype == np.complex128
        assert_allclose(value[1:3], value[[0, 0]], rtol=1e-12)  # whole patches
        assert np.abs(value[3] - value[0]) > 1e-6
        z = np.array([0.3 - 0.2j, -2 + 1j, -900 + 1j])
        got = np.asarray(jax.jit(log_cosh)(z))
        assert_allclose(np.exp(got[:2]), np.cosh(z[:2]), rtol=1e-12)
        assert_allclose(got[2].real, 900 - np.log(2), rtol=1e-12)


def test_exact_energies_known_from_the_literature():
    assert_allclose(J1J2((8,), j2=0.0).ground_energy() / 8, -0.456387, atol=1e-6)
    assert_allclose(J1J2((8,), j2=0.5).ground_energy() / 8, -0.375, atol=1e-12)  # dimers
    pairs, couplings = J1J2((4, 4)).bonds()
    assert len(pairs) == 4 * 16 and couplings.sum() == 2 * 16 * 1.5


def chain(seed=0, sites=8):
    """The state of a chain as a random vector of log amplitudes over the basis."""
    model = J1J2((sites,))
    basis = model.basis()
    codes = (basis > 0) @ (1 << np.arange(sites))
    place = np.zeros(1 << sites, np.int32)
    place[codes] = np.arange(len(basis))
    table = jnp.asarray(place)

    def log_psi(vector, spins):
        powers = (1 << jnp.arange(sites, dtype=jnp.int32))[None]
        code = ((spins > 0).astype(jnp.int32) * powers).sum(1)
        return jax.lax.complex(vector[0][table[code]], vector[1][table[code]])

    vector = jax.random.normal(jax.random.key(seed), (2, len(basis)))
    return model, jnp.asarray(basis), vector, log_psi


def test_local_energies_and_natural_gradient_against_the_matrix():
    with jax.enable_x64(True):
        model, basis, vector, log_psi = chain()
        psi = np.exp(np.asarray(log_psi(vector, basis)))
        p = jnp.asarray(np.abs(psi) ** 2 / (np.abs(psi) ** 2).sum())

        @jax.jit
        def run(vector):
            energies = model.local_energy(functools.partial(log_psi, vector), basis)
            return energies, natural_gradient(
                log_psi, vector, basis, energies, probabilities=p, damping=1e-2
            )

        energies, step = run(vector)
        assert_allclose(energies, model.matrix() @ psi / psi, rtol=1e-10)
        mean = (np.asarray(p) * np.asarray(energies)).sum()
        assert abs(mean.imag) < 1e-12
        assert mean.real > model.ground_energy()
        # the primal form (X^T X + λ)^-1 X^T f
        n = len(basis)
        x = np.sqrt(np.asarray(p))[:, None] * (np.eye(n) - np.asarray(p)[None])
        e = np.sqrt(np.asarray(p)) * (np.asarray(energies) - mean)
        want = [
            np.linalg.solve(x.T @ x + 1e-2 * np.eye(n), x.T @ part) for part in (e.real, e.imag)
        ]
        assert_allclose(step, want, rtol=1e-7, atol=1e-9)


def test_samples_follow_the_squared_amplitudes():
    model, basis, vector, log_psi = chain(1, 4)
    start = jnp.repeat(basis[:1], 2000, 0)
    run = jax.jit(lambda key: sample(key, lambda s: log_psi(vector, s), start, sweeps=10))
    spins = np.asarray(run(jax.random.key(0)))
    assert not spins.sum(1).any()
    codes = (np.asarray(basis) > 0) @ (1 << np.arange(4))
    found = np.array([((spins > 0) @ (1 << np.arange(4)) == code).mean() for code in codes])
    p = np.exp(2 * np.asarray(vector[0]))
    assert_allclose(found, p / p.sum(), atol=5 * 0.5 / 2000**0.5)


def test_the_energy_of_a_wave_function_falls_to_the_ground_state():
    """Factored attention on a chain of 8 spins by natural gradient over all configurations."""
    model = J1J2((8,), j2=0.5)
    basis = jnp.asarray(model.basis(), jnp.float32)
    layer = FactoredAttention(2, 8, grid=4, rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    keys = jax.random.split(jax.random.key(1), 3)
    shapes = {"embed": (2, 8), "real": (8, 8), "imag": (8, 8)}
    params = {
        n: jax.random.normal(k, s) / 2 for (n, s), k in zip(shapes.items(), keys, strict=True)
    }

    def log_psi(params, spins):
        x = jnp.tanh(spins.reshape(len(spins), 4, 2) @ params["embed"])
        x = jax.nn.gelu(x + nnx.merge(graph, params["layer"])(x)).sum(1)
        return log_cosh(jax.lax.complex(x @ params["real"], x @ params["imag"])).sum(-1)

    @jax.jit
    def train(params):
        def step(params, _):
            value = log_psi(params, basis)
            p = jax.nn.softmax(2 * value.real)
            local = model.local_energy(functools.partial(log_psi, params), basis)
            way = natural_gradient(log_psi, params, basis, local, probabilities=p, damping=1e-2)
            return jax.tree.map(lambda a, g: a - 0.05 * g, params, way), (p * local.real).sum()

        return jax.lax.scan(step, params, None, length=60)[1]

    energies = np.asarray(train(params | {"layer": state}))
    assert energies[-1] >= model.ground_energy() - 1e-4
    assert energies[-1] < model.ground_energy() * 0.95 < energies[0]


def test_bad_input_is_named():
    for options, message in (
        (dict(weights="both"), "weights='both'"),
        (dict(grid=(0, 2)), "no places"),
    ):
        with pytest.raises(ValueError, match=message):
            FactoredAttention(2, 8, **({"grid": 3} | options), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="do not cover 12 tokens"):
        make("position", grid=(2, 2))(tokens())
    with pytest.raises(NotImplementedError, match="no queries and keys"):
        make("position")(tokens(), capture=("q",))
    with pytest.raises(NotImplementedError, match="causal=True"):
        make("position", causal=True)
    with pytest.raises(NotImplementedError, match="num_kv_heads=1"):
        make("position", num_kv_heads=1)
    with pytest.raises(NotImplementedError, match="no step-by-step form"):
        make("position").init_cache(1, 12)
    with pytest.raises(ValueError, match="multiple of patch"):
        WaveFunction(5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least 3 sites"):
        J1J2((2, 2))
    with pytest.raises(ValueError, match="alpha must be"):
        factored_attention(jnp.ones((1, 3, 2, 4)), jnp.ones((2, 4, 4)))
    with pytest.raises(ValueError, match="12 places"):
        circulant(jnp.ones((2, 9)), (3, 4))
