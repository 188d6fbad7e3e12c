"""Mechanisms as mixers of a language model: hybrids, decoding, auxiliary losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnjax.masks.multihop import Documents
from attnjax.models import LanguageModel, LanguageModelConfig, generate
from attnjax.models.registry import mixer_ids
from attnjax.spec import mechanisms

CONFIG = dict(vocab_size=13, width=16, num_heads=2, mlp_width=24)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 14)), jnp.int32)


def model(mixers, layers, **options):
    config = LanguageModelConfig(num_layers=layers, mixers=mixers, **(CONFIG | options))
    return LanguageModel(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    "mixers",
    [
        "gated_deltanet, cope, window(4)+sink(1)",
        "rat(chunk_size=4), mdha, lightning",
    ],
)
def test_hybrids_decode_as_they_compute(mixers):
    net = model(mixers, 3)
    want = jax.jit(net)(TOKENS)
    call = jax.jit(lambda tokens, cache: net(tokens, cache=cache))
    cache, outputs = net.init_cache(2, 16), []
    for start, stop in ((0, 11), *((i, i + 1) for i in range(11, 14))):
        logits, cache = call(TOKENS[:, start:stop], cache)
        outputs.append(logits)
    np.testing.assert_allclose(jnp.concatenate(outputs, 1), want, rtol=1e-4, atol=1e-5)


def test_mixer_argument_replaces_the_pattern():
    config = LanguageModelConfig(num_layers=2, **CONFIG)
    net = LanguageModel(config, mixer="retnet", rngs=nnx.Rngs(0))
    assert {m.kind for m in net.layers.mixers} == {"retnet"}
    assert net.config.mixers == "retnet"


def test_options_reach_the_module():
    net = model("cope(num_positions=5,gate=separate), softmax", 2)
    assert net.layers.groups[0][0].mixer.table.shape[-1] == 5


def test_grouped_heads_where_the_mechanism_has_them():
    net = model("cog_attention, retnet", 2, num_kv_heads=1)
    assert net.layers.groups[0][0].mixer.num_kv_heads == 1


def test_mixers_by_id_are_made_for_a_block():
    """Softmax attention by its id is the model's own; no mixer adds its input a second time."""
    net = model("multi_head_attention, softmax, efficient_attention", 3, num_kv_heads=1)
    named, own, efficient = (block.mixer for (block,) in net.layers.groups)
    for option in ("rope_base", "num_kv_heads", "head_dim", "causal", "window"):
        assert getattr(named, option) == getattr(own, option)
    assert named.rope_base is not None and efficient.causal and not efficient.residual
    with pytest.raises(
        ValueError, match="efficient_attention takes value_features.* got 'residual"
    ):
        model("efficient_attention(residual=true)", 1)


def test_auxiliary_losses_of_all_layers():
    net = model("moh, softmax", 4)
    assert net.has_aux_loss
    _, captured = net(TOKENS, capture=("aux_loss",))
    assert captured["aux_loss"].shape == (4,)
    np.testing.assert_array_equal(np.isnan(captured["aux_loss"]), [False, True, False, True])
    assert not model("softmax", 2).has_aux_loss


def test_every_causal_module_is_a_mixer_or_says_why():
    for name, spec in mechanisms().items():
        if spec.causal and spec.kind == "module" and spec.module is not None:
            assert name in mixer_ids() or spec.nd > 1, name


def test_further_inputs_reach_the_mixers_that_take_them():
    """Documents in another order change nothing of what follows them: PINE in a model."""
    net = model("pine", 2)
    documents = Documents.create(2, [3, 3, 3], batch=2)
    order = jnp.asarray([0, 1, 8, 9, 10, 2, 3, 4, 5, 6, 7, 11, 12, 13])
    want = net(TOKENS, mixer_inputs={"documents": documents})[:, 11:]
    got = net(TOKENS[:, order], mixer_inputs={"documents": documents})[:, 11:]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert np.abs(net(TOKENS)[:, 11:] - net(TOKENS[:, order])[:, 11:]).max() > 1e-3
    new = [
        generate(
            net, tokens, max_new_tokens=4, temperature=0, mixer_inputs={"documents": documents}
        )
        for tokens in (TOKENS, TOKENS[:, order])
    ]
    np.testing.assert_array_equal(*new)
    with pytest.raises(ValueError, match="no mixer of 'pine' takes 'document'.*documents"):
        net(TOKENS, mixer_inputs={"document": documents})
