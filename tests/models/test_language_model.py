"""The language model: scan and loop, caches, edits and captures over all layers, remat, abstract
building."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.models import LanguageModel, LanguageModelConfig
from attnjax.taps import Edits, Patch
from tests.compiles import compilations

T = 14
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32, four layers
BASE = LanguageModelConfig(
    vocab_size=13,
    width=8,
    num_layers=4,
    num_heads=2,
    num_kv_heads=1,
    mlp_width=8,
    mixers="lightning, window(4)+sink(2)",
)
# one scan over a period of two; a scan and two single layers
PATTERNS = {
    "period": BASE.mixers,
    "runs": "softmax*2, strided(block=2,stride=3,local=2), lightning",
}


@functools.cache
def model(**changes):
    return build(dataclasses.replace(BASE, **changes))


def build(config):
    """The model, its parameters made by one compiled program: much faster than one by one."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    state = jax.jit(lambda: nnx.state(LanguageModel(config, rngs=nnx.Rngs(0))))()
    return nnx.merge(graph, state)


def tokens():
    return jnp.asarray(np.random.default_rng(1).integers(0, BASE.vocab_size, (2, T)), jnp.int32)


@functools.cache
def compiled(**changes):
    """`(parameters, tokens, options) -> result` of a model, and its parameters."""
    graph, state = nnx.split(model(**changes))

    @functools.partial(jax.jit, static_argnames="capture")
    def call(state, tokens, options, capture):
        return nnx.merge(graph, state)(tokens, capture=capture, **options)

    return lambda tokens, state=state, capture=(), **options: call(state, tokens, options, capture)


@functools.cache
def loss_and_grads(**changes):
    """Loss and gradients under a config, always from the same parameters."""
    graph, state = nnx.split(model(mixers=changes.get("mixers", BASE.mixers)))
    graph = nnx.split(model(**changes))[0]

    @jax.jit
    def run(state):
        def loss(state):
            logits = nnx.merge(graph, state)(tokens())
            return -jax.nn.log_softmax(logits)[..., 0].mean()

        return jax.value_and_grad(loss)(state)

    return run(state)


@pytest.mark.parametrize("pattern", PATTERNS)
class TestScan:
    def test_equals_the_loop(self, pattern):
        mixers = PATTERNS[pattern]
        scanned = loss_and_grads(mixers=mixers)
        unrolled = loss_and_grads(mixers=mixers, scan_layers=False)
        assert_allclose(scanned[0], unrolled[0], rtol=1e-6)
        jax.tree.map(
            lambda a, b: assert_allclose(a, b, rtol=1e-3, atol=1e-6), scanned[1], unrolled[1]
        )

    def test_captures_and_edits_follow_the_layers(self, pattern):
        mixers = PATTERNS[pattern]
        sites = ("resid_pre", "z", "mlp_out", "resid_post")
        results = [
            compiled(mixers=mixers, scan_layers=scan)(tokens(), capture=sites)
            for scan in (True, False)
        ]
        jax.tree.map(lambda a, b: assert_allclose(a, b, **CLOSE), *results)
        captured = results[0][1]
        assert set(captured) == set(sites)
        assert captured["z"].shape == (4, 2, T, 2, 4)
        # what leaves a layer enters the next one
        assert_allclose(captured["resid_post"][:-1], captured["resid_pre"][1:], **CLOSE)
        # scaling the heads of layer 2 changes nothing before it
        scale = jnp.ones((4, 2)).at[2].set(0.0)
        edited = compiled(mixers=mixers)(tokens(), edits=Edits(head_scale=scale), capture=sites)[1]
        assert_allclose(edited["resid_post"][:2], captured["resid_post"][:2], **CLOSE)
        assert_array_equal(edited["z"][2], jnp.zeros((2, T, 2, 4)))
        assert np.abs(edited["resid_post"][2] - captured["resid_post"][2]).max() > 1e-4

    def test_prefill_and_decoding(self, pattern):
        mixers = PATTERNS[pattern]
        call = compiled(mixers=mixers)
        want = call(tokens())
        cache = model(mixers=mixers).init_cache(2, T + 2)
        shapes = jax.tree.map(jnp.shape, cache)
        lengths = np.array([3, 6])
        valid = jnp.arange(8)[None] < lengths[:, None]
        y, cache = call(tokens()[:, :8], cache=cache, valid=valid)
        assert jax.tree.map(jnp.shape, cache) == shapes
        for row in range(2):
            assert_allclose(y[row, : lengths[row]], want[row, : lengths[row]], **CLOSE)
        for i in range(6):
            step = tokens()[np.arange(2), lengths + i][:, None]
            y, cache = call(step, cache=cache)
            assert_allclose(y[:, 0], want[np.arange(2), lengths + i], **CLOSE)

    def test_empty_edits_change_no_bit(self, pattern):
        call = compiled(mixers=PATTERNS[pattern])
        assert_array_equal(call(tokens(), edits=Edits()), call(tokens()))


class TestEdits:
    def test_own_activation_is_a_no_op(self):
        sites = (
            "resid_pre",
            "q",
            "z",
            "head_out",
            "attn_out",
            "resid_mid",
            "mlp_out",
            "resid_post",
        )
        call = compiled()
        want, captured = call(tokens(), capture=sites)
        patch = {s: Patch(captured[s], jnp.ones(captured[s].shape, bool)) for s in sites}
        assert_allclose(call(tokens(), edits=Edits(patch=patch)), want, rtol=1e-5, atol=1e-6)

    def test_residual_addition_in_one_layer(self):
        call = compiled()
        steer = jnp.zeros((4, 8)).at[2].set(1.0)
        edits = Edits(residual_add={"resid_pre": steer})
        _, plain = call(tokens(), capture=("resid_pre",))
        _, steered = call(tokens(), edits=edits, capture=("resid_pre",))
        assert_allclose(steered["resid_pre"][2], plain["resid_pre"][2] + 1, **CLOSE)
        assert_allclose(steered["resid_pre"][:2], plain["resid_pre"][:2], **CLOSE)

    def test_values_never_recompile(self):
        call = compiled()
        tables = [Edits(head_scale=jax.random.normal(jax.random.key(i), (4, 2))) for i in range(3)]
        jax.block_until_ready(call(tokens(), edits=tables[0]))
        with compilations() as found:
            outputs = [np.asarray(call(tokens(), edits=e)) for e in tables]
        assert not found
        assert np.abs(outputs[0] - outputs[1]).max() > 1e-4

    def test_layers_without_a_site_are_nan(self):
        _, captured = compiled()(tokens(), capture=("weights",))
        weights = captured["weights"]
        assert weights.shape == (4, 2, 2, T, T)
        lightning = np.array([True, False] * 2)
        assert np.isnan(weights[lightning]).all()
        assert_allclose(weights[~lightning].sum(-1), np.ones((2, 2, 2, T)), rtol=1e-5)

    def test_bad_edits(self):
        with pytest.raises(ValueError, match="leading axis over the 4 layers"):
            model()(tokens(), edits=Edits(head_scale=jnp.ones((3, 2))))
        with pytest.raises(NotImplementedError, match="LightningAttention cannot apply score_bias"):
            model()(tokens(), edits=Edits(score_bias=jnp.zeros((4, 1, 1, 1, 1))))
        with pytest.raises(NotImplementedError, match="differ in the shape of 'k'"):
            model()(tokens(), capture=("k",))
        with pytest.raises(
            NotImplementedError, match="no layer of this model has the site 'weights'"
        ):
            model(mixers="lightning", num_kv_heads=None)(tokens(), capture=("weights",))
        with pytest.raises(ValueError, match="unknown site"):
            model()(tokens(), capture=("attention",))


@pytest.mark.parametrize("remat", ["full", "dots", "names"])
def test_remat_changes_nothing(remat):
    options = {"mixers": "softmax, window(3)"}
    want, got = loss_and_grads(**options), loss_and_grads(remat=remat, **options)
    assert_allclose(got[0], want[0], rtol=1e-6)
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-7), got[1], want[1])


def test_remat_saves_memory():
    def temporary(remat):
        config = dataclasses.replace(BASE, width=32, mixers="softmax", num_layers=8, remat=remat)
        graph, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
        run = jax.jit(jax.grad(lambda s, t: nnx.merge(graph, s)(t).mean()))
        text = jax.ShapeDtypeStruct((4, 256), jnp.int32)
        return run.lower(state, text).compile().memory_analysis().temp_size_in_bytes

    assert temporary("full") < 0.6 * temporary("none")


def test_packed_documents_are_kept_apart():
    """Every document has sinks of its own."""
    ids = jnp.array([[0] * 7 + [1] * 7, [3] * 7 + [2] * 7])
    positions = jnp.array([[*range(7), *range(7)]] * 2)
    got = compiled()(tokens(), segment_ids=ids, positions=positions)
    for cut in (slice(0, 7), slice(7, 14)):
        assert_allclose(got[:, cut], compiled()(tokens()[:, cut]), **CLOSE)


def test_dropout_is_explicit_and_by_layer():
    keys = jax.random.split(jax.random.key(0))
    call = compiled(dropout_rate=0.5)
    assert_array_equal(call(tokens()), compiled()(tokens()))
    one = call(tokens(), dropout_rng=keys[0])
    assert_array_equal(call(tokens(), dropout_rng=keys[0]), one)
    assert np.abs(call(tokens(), dropout_rng=keys[1]) - one).max() > 1e-3
    loop = compiled(dropout_rate=0.5, scan_layers=False)(tokens(), dropout_rng=keys[0])
    assert_allclose(loop, one, **CLOSE)
    with pytest.raises(ValueError, match="needs dropout_rng"):
        model(dropout_rate=0.5)(tokens(), deterministic=False)


def test_options_of_the_models_in_the_literature():
    options = dict(
        mlp="sglu", norm="srmsnorm", tie_embeddings=False, scale_embeddings=True, qk_norm=True,
        mixers="lightning(lrpe=true), lightning, softmax", num_layers=3, head_dim=6, num_kv_heads=2,
    )  # fmt: skip
    call = compiled(**options)
    want = call(tokens())
    assert want.shape == (2, T, 13) and want.dtype == jnp.float32
    y, cache = call(tokens()[:, :9], cache=model(**options).init_cache(2, T))
    z, _ = call(tokens()[:, 9:], cache=cache)
    assert_allclose(jnp.concatenate([y, z], 1), want, **CLOSE)


def test_sixteen_bits():
    call = compiled(dtype="bfloat16")
    y, captured = call(tokens(), capture=("resid_post",))
    assert y.dtype == jnp.float32 and captured["resid_post"].dtype == jnp.bfloat16
    assert_allclose(y, compiled()(tokens()), rtol=0.2, atol=0.1)
    cache = model(dtype="bfloat16").init_cache(2, T)
    kinds = {leaf.dtype for leaf in jax.tree.leaves(cache)}
    assert kinds == {jnp.dtype("bfloat16"), jnp.dtype("float32"), jnp.dtype("int32")}


def test_abstract_building_and_axes():
    abstract = nnx.eval_shape(lambda: LanguageModel(BASE, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    seen = set()
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata()["axes"]
        assert len(axes) == len(variable.get_value().shape), path
        assert (axes[0] == "layers") == (path[0] == "layers"), path
        seen |= set(axes)
    assert seen - {None} == {"vocab", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp"}
    assert nnx.split(model())[0] == graph  # the same structure, so states are interchangeable


def test_parameters_do_not_depend_on_scan():
    states = [nnx.to_pure_dict(nnx.state(model(scan_layers=scan))) for scan in (True, False)]
    jax.tree.map(assert_array_equal, *states)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 9}, "width=9"),
        ({"num_heads": 3}, "num_kv_heads|width"),
        ({"num_kv_heads": 4}, "num_kv_heads=4"),
        ({"mlp": "relu"}, "mlp='relu'"),
        ({"norm": "batch"}, "norm='batch'"),
        ({"remat": "some"}, "remat='some'"),
        ({"mixers": "magic"}, "unknown mixer"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
        ({"vocab_size": 0}, "vocab_size"),
    ],
    ids=str,
)
def test_bad_configs(changes, words):
    if changes == {"num_heads": 3}:
        changes = {"num_heads": 3, "num_kv_heads": 2}
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(BASE, **changes)


def test_bad_calls():
    cases = [
        (TypeError, "integers", (tokens().astype(jnp.float32),), {}),
        (ValueError, r"\[batch, length\]", (tokens()[0],), {}),
        (ValueError, "segment_ids", (tokens(),), {"segment_ids": jnp.zeros((2, 3), jnp.int32)}),
        (ValueError, "valid", (tokens(),), {"valid": jnp.ones((2, 3), bool)}),
        (ValueError, "positions", (tokens(),), {"positions": jnp.zeros((2, 3), jnp.int32)}),
    ]
    for error, words, args, options in cases:
        with pytest.raises(error, match=words):
            model()(*args, **options)
    with pytest.raises(ValueError, match="max_length=4"):
        model(max_length=4)(tokens())
