"""Multi-head attention: drop-in for flax, masks by construction, extra keys, head sharing, bad
input."""

from __future__ import annotations

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.masks import Causal, Lengths, Segments, Window
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.taps import Edits

CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # float32, sums of up to 16 terms


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def layer(*args, seed=0, **options):
    return MultiHeadAttention(*args, rngs=nnx.Rngs(seed), **options)


def naive(q, k, v, visible, extra=None):
    """softmax([q k'/sqrt d, q K/sqrt d]) [v'; V] for q [t, h, d], k, v [s, h, d]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = np.flatnonzero(visible[t])
            scores = k[keys, h] @ q[t, h] / np.sqrt(q.shape[-1])
            values = v[keys, h]
            if extra is not None:
                logit, value = extra(q[t, h], h)
                scores, values = np.append(scores, logit), np.vstack([values, value])
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ values / weights.sum()
    return out


def through(module, x, visible, extra=None):
    """The module's output from the naive definition and its own projections."""
    q, k, v = module.query(x)[0], module.key(x)[0], module.value(x)[0]
    rep = module.num_heads // module.num_kv_heads
    z = naive(q, np.repeat(k, rep, 1), np.repeat(v, rep, 1), visible, extra)
    out = np.einsum("thd,hdm->tm", z, np.asarray(module.out.kernel[...], np.float64))
    return out + (0 if module.out.bias is None else np.asarray(module.out.bias[...]))


class TestFlaxDropIn:
    """Same names, same numbers."""

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_kv_heads": 2},
            {"normalize_qk": True, "use_bias": False},
            {"qkv_features": 32, "out_features": 6, "in_kv_features": 10},
            {"dtype": jnp.bfloat16},
        ],
        ids=str,
    )
    def test_equal_with_copied_weights(self, options):
        options = {"bias_init": nnx.initializers.normal(1.0), **options}
        theirs = nnx.MultiHeadAttention(4, 16, decode=False, rngs=nnx.Rngs(0), **options)
        ours = layer(4, 16, decode=False, seed=1, **options)
        nnx.update(ours, nnx.state(theirs, nnx.Param))
        x = normal(0, 2, 5, 16)
        y = normal(1, 2, 7, options.get("in_kv_features", 16))
        w = normal(2, 2, 7, options.get("in_kv_features", 16))
        mask = jax.random.bernoulli(jax.random.key(3), 0.7, (2, 4, 5, 7)).at[..., 0].set(True)
        calls = [((x, y), {}), ((x, y, w), {}), ((x, y, w), {"mask": mask})]
        if "in_kv_features" not in options:
            causal = jnp.tril(jnp.ones((1, 1, 5, 5), bool))
            calls += [((x,), {}), ((x,), {"mask": causal}), ((x,), {"is_causal": True})]
        close = {"rtol": 0.05, "atol": 0.05} if "dtype" in options else CLOSE
        for args, named in calls:
            got = ours(*args, **named)
            with jax.numpy_dtype_promotion("standard"):  # flax needs it for 16 bits
                want = theirs(*args, **named)
            assert got.dtype == want.dtype
            assert_allclose(np.float32(got), np.float32(want), **close)

    def test_parameters_have_the_same_names_and_shapes(self):
        theirs = nnx.MultiHeadAttention(4, 16, num_kv_heads=2, normalize_qk=True, rngs=nnx.Rngs(0))
        ours = layer(4, 16, 8 * 2, None, 2, normalize_qk=True)
        shapes = [
            jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(m, nnx.Param)))
            for m in (ours, theirs)
        ]
        assert shapes[0] == shapes[1]

    @pytest.mark.parametrize("lead", [(), (2, 3)])
    def test_any_batch_axes(self, lead):
        module = layer(2, 8)
        x = normal(0, *lead, 5, 8)
        flat = x.reshape(-1, 5, 8)
        mask = jax.random.bernoulli(jax.random.key(1), 0.8, (*lead, 2, 5, 5)).at[..., 0].set(True)
        want = module(flat, mask=mask.reshape(-1, 2, 5, 5)).reshape(*lead, 5, 8)
        assert_allclose(module(x, mask=mask), want, **CLOSE)

    def test_inside_linen(self):
        class Model(flax.linen.Module):
            @flax.linen.compact
            def __call__(self, x):
                attend = nnx.bridge.ToLinen(
                    MultiHeadAttention, args=(2, 8), kwargs={"causal": True}
                )
                return attend(x)

        x = normal(0, 2, 5, 8)
        model = Model()
        variables = model.init(jax.random.key(0), x)
        got = model.apply(variables, x)
        assert got.shape == x.shape
        (parameters,) = variables["params"].values()
        ours = layer(2, 8, causal=True)
        kernel = jax.tree.leaves(parameters["query"]["kernel"])[0]
        assert kernel.shape == ours.query.kernel[...].shape
        grads = jax.grad(lambda p: model.apply({**variables, "params": p}, x).sum())(
            variables["params"]
        )
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


class TestLayouts:
    """Masks that the module makes by itself."""

    @pytest.mark.parametrize(
        ("options", "rule"),
        [
            ({}, lambda i, j: True),
            ({"causal": True}, lambda i, j: j <= i),
            ({"causal": True, "window": 3}, lambda i, j: 0 <= i - j < 3),
            (
                {"causal": True, "window": 3, "sinks": 2},
                lambda i, j: j <= i and (i - j < 3 or j < 2),
            ),
            ({"window": 3}, lambda i, j: abs(i - j) < 3),
            ({"window": 2, "sinks": 1}, lambda i, j: abs(i - j) < 2 or j < 1),
        ],
        ids=lambda x: str(x) if isinstance(x, dict) else "",
    )
    def test_equals_the_rule(self, options, rule):
        module = layer(4, 8, num_kv_heads=2, **options)
        x = normal(0, 1, 9, 8)
        visible = np.array([[rule(i, j) for j in range(9)] for i in range(9)])
        assert_allclose(module(x)[0], through(module, x, visible), **CLOSE)

    def test_combines_with_the_callers_mask(self):
        module = layer(2, 8, causal=True)
        x = normal(0, 2, 9, 8)
        ids = jnp.array([[0] * 4 + [1] * 5, [0] * 6 + [1] * 3])
        want = module(x, mask=Segments(ids))
        assert_allclose(
            module(x, mask=(ids[:, None, :, None] == ids[:, None, None, :])), want, **CLOSE
        )
        assert_allclose(module(x, segment_ids=ids), want, **CLOSE)
        assert_allclose(layer(2, 8)(x, mask=Causal() & Segments(ids)), want, **CLOSE)

    def test_no_square_array_is_built(self):
        module = layer(1, 8, causal=True, window=64)
        x = jax.ShapeDtypeStruct((1, 4096, 8), jnp.float32)
        memory = jax.jit(module).lower(x).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 4096 * 4096 / 4


class TestHeads:
    """Shared key/value heads."""

    @pytest.mark.parametrize("num_kv_heads", [1, 2])
    def test_equals_repeated_heads(self, num_kv_heads):
        shared = layer(4, 16, num_kv_heads=num_kv_heads, causal=True, rope_base=1e4)
        full = layer(4, 16, causal=True, rope_base=1e4)
        state = nnx.to_pure_dict(nnx.state(shared))
        for name in ("key", "value"):
            rep = 4 // num_kv_heads
            state[name]["kernel"] = jnp.repeat(state[name]["kernel"], rep, axis=1)
            state[name]["bias"] = jnp.repeat(state[name]["bias"], rep, axis=0)
        target = nnx.state(full)
        nnx.replace_by_pure_dict(target, state)
        nnx.update(full, target)
        x = normal(0, 2, 7, 16)
        assert_allclose(shared(x), full(x), **CLOSE)


class TestExtraKey:
    """sink="...": an explicit place for attention to go."""

    def module(self, sink, **options):
        module = layer(4, 8, num_kv_heads=2, causal=True, sink=sink, **options)
        for i, name in enumerate(("sink_logit", "key_bias", "value_bias")):
            parameter = getattr(module, name)
            if parameter is not None:
                parameter[...] = normal(i + 5, *parameter.shape)
        return module

    @pytest.mark.parametrize("sink", ["sink_logit", "off_by_one", "kv_bias", "k_bias", "v_bias"])
    def test_equals_the_definition(self, sink):
        module = self.module(sink)
        x = normal(0, 1, 6, 8)
        key, value, logit = (
            None if p is None else np.asarray(p[...], np.float64)
            for p in (module.key_bias, module.value_bias, module.sink_logit)
        )

        def extra(q, h):
            score = 0.0 if key is None else key[h] @ q / np.sqrt(2)
            score = score if logit is None else logit[h]
            return score, np.zeros(2) if value is None else value[h]

        visible = np.tril(np.ones((6, 6), bool))
        assert_allclose(module(x)[0], through(module, x, visible, extra), **CLOSE)

    def test_zero_bias_is_off_by_one(self):
        bias, plain = self.module("kv_bias"), self.module("off_by_one")
        bias.key_bias[...] = jnp.zeros((4, 2))
        bias.value_bias[...] = jnp.zeros((4, 2))
        x = normal(0, 2, 6, 8)
        assert_array_equal(bias(x), plain(x))

    def test_tiny_logit_is_plain(self):
        module = self.module("sink_logit")
        module.sink_logit[...] = jnp.full((4,), -100.0)
        plain = layer(4, 8, num_kv_heads=2, causal=True)
        x = normal(0, 2, 6, 8)
        assert_allclose(module(x), plain(x), **CLOSE)

    @pytest.mark.parametrize("sink", ["sink_logit", "kv_bias", "k_bias", "v_bias"])
    def test_learns(self, sink):
        module = self.module(sink)
        graph, state = nnx.split(module)
        x = normal(0, 2, 6, 8)
        grads = jax.grad(lambda s: (nnx.merge(graph, s)(x) ** 2).sum())(state)
        grads = nnx.to_pure_dict(grads)
        for name in ("sink_logit", "key_bias", "value_bias"):
            if name in grads and grads[name] is not None:
                assert np.abs(grads[name]).max() > 1e-4

    @pytest.mark.parametrize("sink", ["sink_logit", "off_by_one", "kv_bias"])
    def test_empty_rows_stay_finite(self, sink):
        module = self.module(sink)
        x = normal(0, 1, 6, 8)
        hidden = Edits(key_mask=jnp.zeros((1, 6), bool))
        y, captured = module(x, edits=hidden, capture=("z", "weights"))
        want = (
            np.zeros((6, 4, 2))
            if sink != "kv_bias"
            else np.broadcast_to(module.value_bias[...], (6, 4, 2))
        )
        assert_allclose(captured["z"][0], want, **CLOSE)
        assert_array_equal(captured["weights"], np.zeros((1, 4, 6, 6)))
        grads = jax.grad(lambda x: module(x, edits=hidden).sum())(x)
        assert np.isfinite(grads).all()

    def test_captured_weights_leave_room(self):
        module = self.module("kv_bias")
        _, captured = module(normal(0, 1, 6, 8), capture=("weights",))
        total = captured["weights"].sum(-1)
        assert (total < 1).all() and (total > 0).all()


class TestOptions:
    """Scale, softcap, norms, dropout, padding."""

    def test_softcap_and_scale(self):
        module = layer(2, 8, softcap=0.5, scale=2.0)
        x = normal(0, 1, 5, 8)
        q, k, v = (
            np.asarray(m(x)[0], np.float64) for m in (module.query, module.key, module.value)
        )
        scores = 0.5 * np.tanh(2.0 * np.einsum("thd,shd->hts", q, k) / 0.5)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        z = np.einsum("hts,shd->thd", weights, v)
        want = np.einsum(
            "thd,hdm->tm", z, np.asarray(module.out.kernel[...])
        )  # the bias starts at 0
        assert_allclose(module(x)[0], want, **CLOSE)

    def test_rms_norm_of_queries_and_keys(self):
        module = layer(2, 8, qk_norm="rms")
        _, captured = module(100 * normal(0, 1, 5, 8), capture=("q", "k"))
        for site in ("q", "k"):
            assert_allclose((captured[site] ** 2).mean(-1), np.ones((1, 5, 2)), rtol=1e-4)

    def test_dropout(self):
        module = layer(2, 8, dropout_rate=0.5, deterministic=False)
        x = normal(0, 2, 5, 8)
        keys = jax.random.split(jax.random.key(0))
        assert_array_equal(module(x, dropout_rng=keys[0]), module(x, dropout_rng=keys[0]))
        assert np.abs(module(x, dropout_rng=keys[0]) - module(x, dropout_rng=keys[1])).max() > 0.01
        assert np.abs(module(x) - module(x)).max() > 0.01
        plain = layer(2, 8)
        assert_array_equal(module(x, deterministic=True), plain(x))
        with pytest.raises(ValueError, match="dropout needs dropout_rng"):
            layer(2, 8, dropout_rate=0.5, keep_rngs=False)(x, deterministic=False)
        with pytest.raises(ValueError, match="needs deterministic"):
            layer(2, 8, dropout_rate=0.5)(x)

    @pytest.mark.parametrize("causal", [True, False])
    def test_nan_in_padding_changes_nothing(self, causal):
        module = layer(2, 8, causal=causal, rope_base=1e4)
        x = normal(0, 2, 7, 8)
        lengths = jnp.array([7, 4])
        valid = jnp.arange(7)[None] < lengths[:, None]
        bad = jnp.where(valid[..., None], x, jnp.nan)

        def loss(module, x):
            return jnp.where(valid[..., None], module(x, valid=valid) ** 2, 0).sum()

        want = jax.value_and_grad(loss, argnums=(0, 1))(module, jnp.where(valid[..., None], x, 0.0))
        got = jax.value_and_grad(loss, argnums=(0, 1))(module, bad)
        jax.tree.map(assert_array_equal, got, want)
        alone = module(x[1:, :4])
        assert_allclose(module(bad, valid=valid)[1, :4], alone[0], **CLOSE)

    def test_cross_attention_with_lengths(self):
        module = layer(2, 8, in_kv_features=6)
        x, y = normal(0, 2, 5, 8), normal(1, 2, 7, 6)
        got = module(x, y, mask=Lengths(jnp.array([7, 3])))
        assert_allclose(got[1], module(x[1:], y[1:, :3])[0], **CLOSE)

    def test_float64(self):
        with jax.enable_x64(True):
            module = layer(2, 8, param_dtype=jnp.float64, causal=True, rope_base=1e4)
            assert module(jnp.ones((1, 5, 8), jnp.float64)).dtype == jnp.float64


class TestBadInput:
    """Errors name the argument and say what to do."""

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"num_kv_heads": 3}, "num_kv_heads=3"),
            ({"qkv_features": 10}, "qkv_features=10"),
            ({"window": 0}, "window=0"),
            ({"sinks": 2}, "sinks=2"),
            ({"sink": "magic"}, "magic"),
            ({"qk_norm": "batch"}, "batch"),
            ({"decode": True}, "init_cache"),
        ],
        ids=str,
    )
    def test_constructor(self, options, words):
        with pytest.raises((ValueError, NotImplementedError), match=words):
            layer(4, 16, **options)

    def test_call(self):
        module = layer(2, 8, causal=True)
        x = normal(0, 2, 5, 8)
        cases = [
            (ValueError, r"inputs_q.*\(2, 5, 7\)", (x[..., :7],), {}),
            (ValueError, "inputs_v", (x, None, x), {}),
            (TypeError, "int32", (jnp.ones((2, 5, 8), jnp.int32),), {}),
            (ValueError, "same length", (x, x, x[:, :4]), {}),
            (ValueError, "unknown site", (x,), {"capture": ("weight",)}),
            (NotImplementedError, "resid_pre", (x,), {"capture": ("resid_pre",)}),
            (
                NotImplementedError,
                "Segments",
                (x, x),
                {"segment_ids": jnp.zeros((2, 5), jnp.int32)},
            ),
            (ValueError, "valid", (x,), {"valid": jnp.ones((2, 4), bool)}),
            (ValueError, "positions", (x,), {"positions": jnp.ones((2, 4), jnp.int32)}),
        ]
        for error, words, args, options in cases:
            with pytest.raises(error, match=words):
                module(*args, **options)
        with pytest.raises(ValueError, match="causal=True"):
            layer(2, 8)(x, cache=module.init_cache(2, 8))
        ring = layer(2, 8, causal=True, window=2)
        with pytest.raises(NotImplementedError, match="RingCache"):
            ring(x, cache=ring.init_cache(2, 8), mask=Window(2))
        with pytest.raises(NotImplementedError, match="capture with RingCache"):
            ring(x, cache=ring.init_cache(2, 8), capture=("weights",))
