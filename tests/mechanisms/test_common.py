"""Properties of every registered mechanism, from the examples in their SPECs."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import attnjax
from attnjax.mixer import SequenceMixer
from attnjax.models import LanguageModel, LanguageModelConfig
from attnjax.models.registry import mixer_ids
from attnjax.taps import Edits

TABLE = attnjax.mechanisms()
MODULES = [
    i for i, spec in TABLE.items() if spec.example is not None and isinstance(spec.module, type)
]
KERNELS = {"flash", "linear", "neighborhood", "einsum"}
KINDS = {"module", "function", "layout", "model"}


@functools.cache
def example(name):
    """The module, its input, and the compiled call `(parameters, x, options) -> y`."""
    make = TABLE[name].example
    assert make is not None
    module, x = make()
    graph, state = nnx.split(module)

    @jax.jit
    def call(state, x, options):
        return nnx.merge(graph, state)(x, **options)

    return module, x, lambda x, state=state, **options: call(state, x, options), state


def _floating(grads):
    return [g for g in jax.tree.leaves(grads) if g.dtype != jax.dtypes.float0]


def _check_gradients(grads):
    """Gradients by (state, x) are finite, and the input has an influence."""
    assert all(np.isfinite(g).all() for g in _floating(grads))
    assert np.abs(grads[1]).max() > 0


def takes(name, argument):
    return argument in inspect.signature(TABLE[name].module.__call__).parameters


def is_causal(name):
    module = example(name)[0]
    return TABLE[name].causal and (
        not TABLE[name].bidirectional or getattr(module, "causal", False)
    )


@pytest.mark.parametrize("name", TABLE)
def test_spec_is_complete(name):
    spec = TABLE[name]
    assert spec.id == name and spec.title and spec.cost and spec.causal | spec.bidirectional
    assert spec.kernel in KERNELS and spec.kind in KINDS
    assert spec.function is not None or spec.module is not None
    for thing in (spec.function, spec.module):
        assert thing is None or len(inspect.getdoc(thing) or "") > 80
    if spec.module is not None and spec.kind == "module":
        assert spec.example is not None


@pytest.mark.parametrize(
    "name", [i for i, s in TABLE.items() if s.module and issubclass(s.module, SequenceMixer)]
)
def test_spec_says_what_the_module_does(name):
    spec = TABLE[name]
    directions = {"causal": spec.causal, "bidirectional": spec.bidirectional}
    assert spec.module is not None and issubclass(spec.module, SequenceMixer)
    assert {d for d, has in directions.items() if has} == set(spec.module.directions)
    assert spec.segment_ids == spec.module.packed
    assert (spec.cache is not None) == spec.module.decodes


@pytest.mark.parametrize("name", [n for n in mixer_ids() if n not in ("longgen",)])
def test_trains_as_the_mixer_of_a_language_model(name):
    """A model of two layers, this mechanism first, learns to copy: the loss falls."""
    config = LanguageModelConfig(
        vocab_size=12, width=16, num_layers=2, num_heads=2, mlp_width=32,
        mixers=f"{name}, softmax",
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    half = jax.random.randint(jax.random.key(1), (8, 8), 0, 12)
    tokens = jnp.concatenate([half, half], axis=1)
    optimizer = optax.adam(1e-2)

    def loss(params):
        logits = nnx.merge(graph, params, rest)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses[:, 7:].mean()

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
                updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=30)[1]

    losses = np.asarray(train(params))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "name", [n for n in mixer_ids() if TABLE[n].cache is not None and n != "longgen"]
)
def test_decodes_in_layers_that_run_as_one_loop(name):
    """Sizes of the cache do not come from parameters, which have one more axis there."""
    config = LanguageModelConfig(
        vocab_size=12, width=16, num_layers=3, num_heads=2, mlp_width=32, mixers=name
    )
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)

    def call(state):
        model = nnx.merge(graph, state)
        _, cache = model(jnp.zeros((1, 9), jnp.int32), cache=model.init_cache(1, 16))
        return model(jnp.zeros((1, 1), jnp.int32), cache=cache)[0]

    assert jax.eval_shape(call, state).shape == (1, 1, 12)


@pytest.mark.parametrize("name", MODULES)
class TestModule:
    def test_shape_and_dtype(self, name):
        _, x, call, _ = example(name)
        y = call(x)
        assert y.shape[:-1] == x.shape[:-1] and y.dtype == x.dtype
        assert np.isfinite(y).all()

    def test_every_parameter_names_its_axes(self, name):
        for path, variable in nnx.to_flat_state(nnx.state(example(name)[0], nnx.Param)):
            axes = variable.get_metadata().get("axes")
            assert axes is not None and len(axes) == variable.get_value().ndim, path

    def test_gradients_are_finite(self, name):
        if takes(name, "valid"):
            pytest.skip("checked together with padding")
        _, x, call, state = example(name)
        grads = jax.grad(lambda s, x: (call(x, s) ** 2).sum(), argnums=(0, 1), allow_int=True)(
            state, x
        )
        _check_gradients(grads)

    def test_causality_by_gradient(self, name):
        if not is_causal(name):
            pytest.skip("sees in both directions")
        _, x, call, _ = example(name)
        t = x.shape[1] // 2
        grad = jax.grad(lambda x: (call(x)[:, t] ** 2).sum())(x)
        assert_array_equal(grad[:, t + 1 :], jnp.zeros_like(grad[:, t + 1 :]))
        assert np.abs(grad[:, : t + 1]).max() > 0

    def test_nan_in_padding_changes_nothing(self, name):
        """Neither the output nor a gradient, and all of them are finite."""
        if not takes(name, "valid"):
            pytest.skip("takes no valid")
        _, x, call, state = example(name)
        valid = jnp.arange(x.shape[1])[None] < jnp.array([[x.shape[1]], [x.shape[1] // 2]])
        keep = valid[..., None]

        def loss(state, x):
            return jnp.where(keep, call(x, state, valid=valid) ** 2, 0.0).sum()

        differentiate = jax.grad(loss, argnums=(0, 1), allow_int=True)
        got, want = (differentiate(state, jnp.where(keep, x, pad)) for pad in (jnp.nan, 0.0))
        _check_gradients(want)
        for a, b in zip(_floating(got), _floating(want), strict=True):
            assert_array_equal(a, b)
        short = call(x[1:, : x.shape[1] // 2])
        full = call(jnp.where(keep, x, jnp.nan), valid=valid)
        assert_allclose(full[1:, : x.shape[1] // 2], short, rtol=1e-4, atol=1e-5)

    def test_segments_are_kept_apart(self, name):
        if not TABLE[name].segment_ids:
            pytest.skip("no segment ids")
        _, x, call, _ = example(name)
        if not takes(name, "segment_ids"):
            pytest.skip("module takes none")
        cut = x.shape[1] // 2
        ids = jnp.broadcast_to((jnp.arange(x.shape[1]) >= cut).astype(jnp.int32)[None], x.shape[:2])
        positions = jnp.where(
            ids == 0, jnp.arange(x.shape[1])[None], jnp.arange(x.shape[1])[None] - cut
        )
        options = {"positions": positions} if takes(name, "positions") else {}
        got = call(x, segment_ids=ids, **options)
        assert_allclose(got[:, :cut], call(x[:, :cut]), rtol=1e-4, atol=1e-5)
        if not hasattr(example(name)[0], "layout") or name == "multi_head_attention":
            assert_allclose(got[:, cut:], call(x[:, cut:]), rtol=1e-4, atol=1e-5)

    def test_decoding_equals_the_parallel_form(self, name):
        """Token by token, and a first chunk at once: the outputs of the whole sequence."""
        if TABLE[name].cache is None or not is_causal(name):
            pytest.skip("does not decode")
        module, x, call, state = example(name)
        want, length = call(x), x.shape[1]
        for first in (1, length // 2):
            cache = module.init_cache(x.shape[0], length + 3)
            starts = [0, *range(first, length)]
            outputs = []
            for start, stop in zip(starts, [*starts[1:], length], strict=True):
                y, cache = call(x[:, start:stop], state, cache=cache)
                outputs.append(y)
            assert_allclose(jnp.concatenate(outputs, 1), want, rtol=1e-5, atol=1e-5)

    def test_decoding_with_padded_rows(self, name):
        """A short row's padding is never stored, and the row goes on where it ended."""
        if TABLE[name].cache is None or not is_causal(name) or not takes(name, "valid"):
            pytest.skip("does not decode with padding")
        module, x, call, state = example(name)
        length = x.shape[1]
        short = length // 2
        chunk = jnp.where(jnp.arange(length)[None, :, None] < short, x[1:], jnp.nan)
        valid = jnp.arange(length)[None] < jnp.array([[length - 1], [short]])
        cache = module.init_cache(2, length + 3)
        _, cache = call(jnp.concatenate([x[:1], chunk]), state, cache=cache, valid=valid)
        y, _ = call(jnp.stack([x[0, -1:], x[1, short : short + 1]]), state, cache=cache)
        want = call(x)
        assert_allclose(y[:, 0], jnp.stack([want[0, -1], want[1, short]]), rtol=1e-5, atol=1e-5)

    def test_empty_edits_change_no_bit(self, name):
        """The traced program is the same, so its bits are."""
        if not takes(name, "edits"):
            pytest.skip("takes no edits")
        module, x, _, _ = example(name)
        with_edits = jax.make_jaxpr(lambda x: module(x, edits=Edits()))(x)
        assert str(with_edits) == str(jax.make_jaxpr(lambda x: module(x))(x))

    def test_vmap(self, name):
        module, x, call, _ = example(name)
        many = jnp.stack([x, 2 * x])
        got = jax.jit(jax.vmap(module))(many)
        assert_allclose(got[1], call(2 * x), rtol=1e-4, atol=1e-5)

    def test_float64(self, name):
        _, x, call, state = example(name)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda a: a.astype(jnp.float64), state)
            y = call(x.astype(jnp.float64), wide)
            assert y.dtype == jnp.float64
            assert_allclose(y, call(x), rtol=1e-4, atol=1e-5)

    def test_sixteen_bits(self, name):
        _, x, call, state = example(name)
        y = call(x.astype(jnp.bfloat16), jax.tree.map(lambda a: a.astype(jnp.bfloat16), state))
        assert y.dtype == jnp.bfloat16
        assert_allclose(np.float32(y), call(x), rtol=0.1, atol=0.1)


def test_table_is_sorted_and_complete():
    assert list(TABLE) == sorted(TABLE)
    assert {"multi_head_attention", "longgen", "lightning_attention"} <= set(TABLE)


def test_require_names_what_is_supported():
    with pytest.raises(NotImplementedError, match="longgen does not support bidirectional"):
        TABLE["longgen"].require(bidirectional=True)
