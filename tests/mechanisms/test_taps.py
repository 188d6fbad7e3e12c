"""Edits and captures of one attention module: exact no-ops, removals, patches, no recompilation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.linear.lightning_attention import LightningAttention
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.taps import MIXER_SITES, Edits, Patch, Tap
from tests.compiles import compilations

T, H, D = 6, 4, 2
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def softmax():
    return MultiHeadAttention(H, 8, num_kv_heads=2, causal=True, rope_base=1e4, rngs=nnx.Rngs(0))


MODULES = {"softmax": softmax, "lightning": lambda: LightningAttention(H, 8, rngs=nnx.Rngs(0))}


@pytest.fixture(params=MODULES, scope="module")
def case(request):
    module = MODULES[request.param]()
    x = jax.random.normal(jax.random.key(0), (2, T, 8))
    sites = tuple(s for s in MIXER_SITES if s in module.sites)
    run = jax.jit(lambda x, edits: module(x, edits=edits, capture=sites))
    return module, x, sites, run, run(x, None)


def test_empty_edits_change_no_bit(case):
    module, x, _, run, want = case
    jax.tree.map(assert_array_equal, run(x, Edits()), want)
    plain = jax.jit(module)(x)
    assert_array_equal(jax.jit(lambda x, e: module(x, edits=e))(x, Edits()), plain)
    assert_allclose(want[0], plain, **CLOSE)


def test_captures_every_site(case):
    module, _, sites, _, (y, captured) = case
    assert set(captured) == set(sites)
    for site, array in captured.items():
        heads = 2 if site in ("k", "v", "k_rot") and isinstance(module, MultiHeadAttention) else H
        shape = {"head_out": (2, T, H, 8), "attn_out": (2, T, 8)}.get(site, (2, T, heads, D))
        assert array.shape == ((2, H, T, T) if site in ("scores", "weights") else shape), site
    assert_array_equal(captured["attn_out"], y)
    assert_allclose(captured["head_out"].sum(2), y, **CLOSE)


def test_own_activation_is_a_no_op(case):
    _, x, sites, run, want = case
    for site in sites:
        own = want[1][site]
        patch = Edits(patch={site: Patch(own, jnp.ones(own.shape, bool))})
        # the compiler fuses another program around the patch: one unit in the last place is allowed
        assert_allclose(run(x, patch)[0], want[0], rtol=1e-6, atol=2e-7, err_msg=site)


def test_patch_moves_an_activation(case):
    _, x, sites, run, _ = case
    other = run(x[::-1], None)
    for site in sites:
        value = other[1][site]
        edits = Edits(patch={site: Patch(value, jnp.ones((1,) * value.ndim, bool))})
        assert_array_equal(run(x, edits)[1][site], value, err_msg=site)


def test_zero_scale_removes_a_head(case):
    module, x, _, run, want = case
    scale = jnp.array([1.0, 0.0, 1.0, 1.0])
    y, captured = run(x, Edits(head_scale=scale))
    assert_array_equal(captured["z"][:, :, 1], jnp.zeros((2, T, D)))
    assert_allclose(y, want[0] - want[1]["head_out"][:, :, 1], **CLOSE)
    graph, state = nnx.split(module)
    kernel = state["out"]["kernel"]
    state["out"]["kernel"] = kernel.replace(kernel[...].at[1].set(0.0))
    assert_allclose(y, nnx.merge(graph, state)(x), **CLOSE)
    per_token = jnp.broadcast_to(scale[None, None, :, None], (2, T, H, 1))
    assert_array_equal(run(x, Edits(head_scale=per_token))[0], y)


def test_head_bias_and_residual_additions(case):
    module, x, _, run, want = case
    bias = jax.random.normal(jax.random.key(3), (H, D))
    y, _ = run(x, Edits(head_bias=bias))
    shift = jnp.einsum("hd,hdm->m", bias, module.out.kernel[...])
    assert_allclose(y, want[0] + shift[None, None], **CLOSE)
    y, _ = run(x, Edits(residual_add={"attn_out": jnp.arange(8.0)}))
    assert_array_equal(y, want[0] + jnp.arange(8.0)[None, None])


def test_additions_to_queries_and_keys(case):
    module, x, _, run, want = case
    heads = want[1]["k"].shape[2]
    q_add, k_add = jnp.ones((H, D)), jnp.full((heads, D), 0.5)
    _, captured = run(x, Edits(q_add=q_add, k_add=k_add))
    assert_allclose(captured["q"], want[1]["q"] + 1, **CLOSE)
    assert_allclose(captured["k"], want[1]["k"] + 0.5, **CLOSE)


def test_values_never_recompile(case):
    module, x, _, _, _ = case
    step = jax.jit(lambda x, edits: module(x, edits=edits))

    def edits(seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        value = jax.random.normal(keys[0], (2, T, H, D))
        return Edits(
            head_scale=jax.random.normal(keys[1], (H,)),
            patch={"z": Patch(value, jax.random.bernoulli(keys[2], 0.5, value.shape))},
        )

    tables = [edits(i) for i in range(4)]
    jax.block_until_ready(step(x, tables[0]))
    with compilations() as found:
        results = [np.asarray(step(x, table)) for table in tables]
    assert not found
    assert np.abs(results[0] - results[1]).max() > 1e-3


class TestSoftmaxOnly:
    def test_score_bias_and_key_mask(self):
        module, x = softmax(), jax.random.normal(jax.random.key(0), (2, T, 8))
        hidden = jnp.ones((2, T), bool).at[:, 2].set(False)
        bias = jnp.where(hidden, 0.0, -jnp.inf)[:, None, None]
        want = module(x, edits=Edits(score_bias=bias))
        assert_allclose(module(x, edits=Edits(key_mask=hidden)), want, **CLOSE)
        assert_allclose(module(x, mask=hidden[:, None, None]), want, **CLOSE)

    def test_weight_edit(self):
        module, x = softmax(), jax.random.normal(jax.random.key(0), (2, T, 8))

        def first_token_only(weights):
            return jnp.zeros_like(weights).at[..., 0].set(weights.sum(-1))

        _, captured = module(
            x, edits=Edits(weight_edit=first_token_only), capture=("z", "v", "weights")
        )
        want = jnp.repeat(captured["v"][:, :1], 2, axis=2)
        assert_allclose(captured["z"], jnp.broadcast_to(want, (2, T, H, D)), **CLOSE)
        assert_allclose(captured["weights"][..., 0], jnp.ones((2, H, T)), **CLOSE)

    def test_patched_scores_reach_long_texts(self):
        """The block-sparse path takes score patches too."""
        module, t = softmax(), 300
        x = jax.random.normal(jax.random.key(0), (1, t, 8))
        mask = jnp.zeros((1, H, t, t), bool).at[:, 1, :, 5].set(True)
        edits = Edits(patch={"scores": Patch(jnp.full((1, 1, 1, 1), 3.0), mask)})
        want = module(x, edits=edits, capture=("weights",))[0]
        assert_allclose(jax.jit(lambda x: module(x, edits=edits))(x), want, rtol=1e-4, atol=1e-5)

    def test_positions_by_token_and_by_head(self):
        module, x = softmax(), jax.random.normal(jax.random.key(0), (2, T, 8))
        shifted = jnp.broadcast_to(jnp.arange(T)[None] * 2 + 7, (2, T))
        want = module(x, positions=shifted)
        by_token = Edits(query_positions=shifted, key_positions=shifted)
        assert_allclose(module(x, edits=by_token), want, **CLOSE)
        heads = jnp.broadcast_to(shifted[:, None], (2, H, T))
        by_head = Edits(query_positions=heads, key_positions=heads)
        assert_allclose(module(x, edits=by_head), want, **CLOSE)
        one = heads.at[:, 0].set(0)  # no positions in head 0
        y, captured = module(
            x, edits=Edits(query_positions=one, key_positions=one), capture=("q", "q_rot")
        )
        assert_allclose(captured["q_rot"][:, :, 0], captured["q"][:, :, 0], **CLOSE)
        assert np.abs(y - want).max() > 1e-3

    def test_gradient_reaches_edits(self):
        module, x = softmax(), jax.random.normal(jax.random.key(0), (2, T, 8))
        zero = jnp.zeros((2, T, H, D))

        def loss(bias):
            return (module(x, edits=Edits(residual_add={"z": bias})) ** 2).sum()

        _, captured = module(x, capture=("z",))
        got = jax.grad(loss)(zero)
        step = 1e-2 * jnp.ones_like(zero).at[..., 1:].set(0.0)
        assert_allclose(loss(step) - loss(-step), 2 * (got * step).sum(), rtol=1e-3)
        assert captured["z"].shape == zero.shape


class TestBadInput:
    def test_unknown_names(self):
        with pytest.raises(ValueError, match="unknown site 'head'"):
            Tap(None, ("head",))
        with pytest.raises(ValueError, match="unknown site 'head'"):
            Tap(Edits(residual_add={"head": jnp.zeros(3)}))

    @pytest.mark.parametrize(
        ("edits", "words"),
        [
            (Edits(score_bias=jnp.zeros((1, 1, 1, 1))), "score_bias"),
            (Edits(weight_edit=lambda w: w), "weight_edit"),
            (Edits(patch={"weights": Patch(jnp.zeros(()), jnp.zeros((), bool))}), "weights"),
        ],
        ids=["score_bias", "weight_edit", "patch"],
    )
    def test_a_site_that_the_module_lacks(self, edits, words):
        with pytest.raises(
            NotImplementedError, match=f"LightningAttention.*{words}|{words}.*Lightning|has no site"
        ):
            MODULES["lightning"]()(jnp.zeros((1, 3, 8)), edits=edits)

    def test_extra_key_refuses_weight_edits(self):
        module = MultiHeadAttention(2, 8, sink="kv_bias", rngs=nnx.Rngs(0))
        with pytest.raises(NotImplementedError, match="kv_bias"):
            module(jnp.zeros((1, 3, 8)), edits=Edits(weight_edit=lambda w: w))
