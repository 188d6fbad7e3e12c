"""Deconstructed attention: definitions, long texts, second streams, parameters, indicators."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax.deconstructing_attention import (
    VARIANTS,
    DeconstructingAttention,
    nonapprox_attention,
    random_stream,
    taylor_attention,
    weight_indicators,
    without_layers,
)
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.models import LanguageModel, LanguageModelConfig

CLOSE = {"rtol": 2e-5, "atol": 2e-6}  # float32


def make(variant, width=12, heads=2, **options):
    return DeconstructingAttention(heads, width, variant=variant, rngs=nnx.Rngs(0), **options)


def tokens(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), shape or (2, 7, 12))


def naive(q, k, v, form, xp=np):
    t, d = q.shape[1], q.shape[3]
    if form == "nonapprox":
        e = (q / (1 + xp.exp(-q)) * k).sum(-1) / d**0.5
        f = xp.broadcast_to(xp.exp(e).swapaxes(1, 2)[:, :, None], (len(q), q.shape[2], t, t))
    else:
        s = xp.einsum("bthd,bshd->bhts", q, k) / d**0.5
        f = 1 + s + s**2 / 2
    f = f * xp.tril(xp.ones((t, t)))[None, None]
    return xp.einsum("bhts,bshd->bthd", f / f.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("form", ["nonapprox", "taylor"])
def test_equals_the_definition(form):
    ours = {
        "nonapprox": functools.partial(nonapprox_attention, chunk_size=16),
        "taylor": functools.partial(taylor_attention, is_causal=True),
    }[form]
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        data = [rng.normal(size=(2, 35, 2, 3)) for _ in range(4)]
        *args, ct = map(jnp.asarray, data)

        @functools.partial(jax.jit, static_argnums=0)
        def both(f, *args):
            out, pull = jax.vjp(f, *args)
            return out, pull(ct)

        out, grads = both(ours, *args)
        assert_allclose(out, naive(*data[:3], form), rtol=1e-10, atol=1e-12)
        _, want = both(functools.partial(naive, form=form, xp=jnp), *args)
        for a, b in zip(grads, want, strict=True):
            assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_running_mean_stands_far_logits_and_goes_on_from_a_state():
    q, k, v = (tokens(1, 12, 1, 4, seed=i) for i in range(3))
    q, k = 40 * q, 40 * k  # logits of thousands
    run = jax.jit(functools.partial(nonapprox_attention, return_state=True))
    out, state = run(q, k, v)
    assert np.isfinite(out).all()
    first, half = run(*(a[:, :6] for a in (q, k, v)))
    rest, end = run(*(a[:, 6:] for a in (q, k, v)), state=half)
    assert_allclose(jnp.concatenate([first, rest], 1), out, **CLOSE)
    jax.tree.map(lambda a, b: assert_allclose(a, b, **CLOSE), end, state)
    apart, _ = run(*(jnp.concatenate([a, a[:, :6]], 1) for a in (q, k, v)),
                   segment_ids=jnp.array([[0] * 12 + [1] * 6]))  # fmt: skip
    assert_allclose(apart, jnp.concatenate([out, first], 1), **CLOSE)
    same, _ = run(0 * q, k, v)  # no logits: the mean of what was seen
    count = jnp.arange(1, 13, dtype=jnp.float32)[None, :, None, None]
    assert_allclose(same, jnp.cumsum(v, 1) / count, **CLOSE)


def test_the_quadratic_form_shows_the_shared_logits():
    module, x = make("nonapprox"), tokens()
    full = jnp.ones((7, 7), bool)
    (y, captured), linear, masked = jax.jit(
        lambda x: (module(x, capture=("weights", "scores")), module(x), module(x, mask=full))
    )(x)
    assert_allclose(y, linear, **CLOSE)
    logits = captured["scores"][:, :, -1]  # [b, h, s]; all rows share them
    shared = jnp.exp(logits) / jnp.exp(logits).cumsum(-1)
    assert_allclose(jnp.diagonal(captured["weights"], 0, -2, -1), shared, **CLOSE)
    assert_allclose(masked, y, **CLOSE)
    with pytest.raises(NotImplementedError, match="keeps a mean"):
        module(x, cache=module.init_cache(2, 8), capture=("weights",))


def test_standard_is_multi_head_attention():
    ours = make("standard", rope_base=1e4)
    full = MultiHeadAttention(2, 12, causal=True, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(1))
    nnx.update(full, nnx.state(ours, nnx.Param))
    assert_allclose(ours(tokens()), full(tokens()), **CLOSE)


def test_all_variants_have_the_same_number_of_parameters():
    def count(variant):
        make_one = functools.partial(DeconstructingAttention, 2, 24, variant=variant)
        state = nnx.state(nnx.eval_shape(lambda: make_one(rngs=nnx.Rngs(0))), nnx.Param)
        return sum(a.size for a in jax.tree.leaves(state))

    assert {count(variant) for variant in VARIANTS} == {4 * 24**2}


def test_mlp_mixes_no_tokens():
    module, x = make("mlp"), tokens()
    g, u, w = (getattr(module, n).kernel[...].reshape(12, -1) for n in ("gate", "up", "out"))
    want = (jax.nn.silu(x @ g) * (x @ u)) @ module.out.kernel[...].reshape(-1, 12)
    assert w.size == module.out.kernel.size
    assert_allclose(module(x), want, **CLOSE)
    y, cache = module(x[:, :3], cache=module.init_cache(2, 8))
    assert_allclose(y, want[:, :3], **CLOSE)
    assert_array_equal(cache.length, jnp.array([3, 3]))


@pytest.mark.parametrize("variant", ["approximate", "static_emb_qk", "fixed_seq_qk"])
def test_decoding_of_the_other_variants(variant):
    module, x = make(variant, rope_base=1e4), tokens()
    rows = 1 if variant == "fixed_seq_qk" else 2
    stream = None if variant == "approximate" else tokens(rows, 7, 12, seed=5)

    @jax.jit
    def call(x, stream, cache=None):
        options = {} if stream is None else {"qk_input": stream}
        return module(x, cache=cache, **options)

    cache, parts = module.init_cache(2, 7), []
    for a, b in ((0, 3), (3, 5), (5, 7)):
        part = None if stream is None else stream[:, a:b]
        y, cache = call(x[:, a:b], part, cache)
        parts.append(y)
    assert_allclose(jnp.concatenate(parts, 1), call(x, stream), **CLOSE)


def test_weights_from_a_stream_do_not_depend_on_the_input():
    module, stream = make("fixed_seq_qk"), tokens(1, 7, 12, seed=5)
    call = jax.jit(lambda x: module(x, qk_input=stream, capture=("weights",)))
    both = [call(tokens(seed=s))[1] for s in (1, 2)]
    assert_array_equal(both[0]["weights"], both[1]["weights"])
    assert_array_equal(both[0]["weights"][0], both[0]["weights"][1])
    first = make("fixed_seq_qk", first_row=True)
    x = tokens().at[0].set(stream[0])
    assert_allclose(jax.jit(lambda x: first(x))(x), call(x)[0], **CLOSE)


def test_a_model_with_a_random_stream_in_its_first_row():
    """Weights of layers with fixed queries and keys are the same for every text, at every layer."""
    config = LanguageModelConfig(
        vocab_size=11, width=8, num_layers=2, num_heads=2, mlp_width=8,
        mixers="deconstructing_attention(variant=rnd_emb_qk,first_row=true)",
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    edits = random_stream(jax.random.key(3), 3, 6, 8, 2)
    texts = jax.random.randint(jax.random.key(1), (2, 3, 6), 0, 11)

    @jax.jit
    def weights(text):
        return model(text, edits=edits, capture=("weights",))[1]["weights"]

    one, other = weights(texts[0]), weights(texts[1])
    assert_allclose(one, other, rtol=1e-6)
    assert_allclose(one[:, 0], one[:, 2], rtol=1e-6)
    assert np.abs(one[0] - one[1]).max() > 0.01


def test_a_deleted_layer_leaves_the_stream_alone():
    config = LanguageModelConfig(vocab_size=11, width=8, num_layers=3, num_heads=2, mlp_width=8)
    model, text = LanguageModel(config, rngs=nnx.Rngs(0)), jnp.arange(6, dtype=jnp.int32)[None]
    edits = without_layers((0, 2), 3)
    sites = jax.jit(lambda text: model(text, edits=edits, capture=("resid_pre", "resid_post")))(
        text
    )[1]
    changed = np.abs(sites["resid_post"] - sites["resid_pre"]).max((1, 2, 3)) > 0
    assert_array_equal(changed, [False, True, False])
    with pytest.raises(ValueError, match="of 3; they count from 0"):
        without_layers((3,), 3)


def test_indicators():
    uniform = np.tril(np.ones((4, 4))) / np.arange(1, 5)[:, None]
    both = jnp.asarray(np.stack([uniform, np.eye(4)])[None], jnp.float32)
    got = weight_indicators(both, offsets=(0, 1))
    assert_allclose(got["entropy"][0], [np.log(np.arange(1, 5)).mean(), 0], rtol=1e-6)
    assert_allclose(got["concentration"][0, 1], 2.0)
    assert_allclose(got["sink"][0], [np.mean([1, 1 / 2, 1 / 3, 1 / 4]), 0.25], rtol=1e-6)
    assert_allclose(got["local"][:, 0, 1], [1.0, 0.0])
    spread = np.abs(uniform - np.eye(4)).sum() / 2 * 2 / (4 * 5)
    assert_allclose(got["head_diversity"][0], spread, rtol=1e-6)


def test_bad_input_is_named():
    for options, message in (
        (dict(variant="other"), "variant='other'"),
        (dict(variant="static_emb_qk", first_row=True), "first_row=True needs"),
    ):
        with pytest.raises(ValueError, match=message):
            DeconstructingAttention(2, 12, rngs=nnx.Rngs(0), **options)
    x = tokens()
    with pytest.raises(ValueError, match="needs qk_input"):
        make("rnd_emb_qk")(x)
    with pytest.raises(ValueError, match="qk_input must have shape"):
        make("static_emb_qk")(x, qk_input=x[:1])
    with pytest.raises(ValueError, match="qk_input is for"):
        make("standard")(x, qk_input=x)
    with pytest.raises(NotImplementedError, match="mask is not supported"):
        make("mlp")(x, mask=jnp.ones((7, 7), bool))
    with pytest.raises(NotImplementedError, match="has no site 'weights'"):
        make("mlp")(x, capture=("weights",))
    module = make("fixed_seq_qk", first_row=True)
    with pytest.raises(NotImplementedError, match="first_row=True with a cache"):
        module(x, cache=module.init_cache(2, 8))
    with pytest.raises(NotImplementedError, match="dropout_rate=0.1"):
        make("mlp", dropout_rate=0.1)
    with pytest.raises(NotImplementedError, match="causal=False"):
        make("standard", causal=False)
