"""The base class of the mixers: further inputs, what a token may see, caches, axes of tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from attnjax.masks import Mask, Window
from attnjax.mixer import SCORE_SITES, SequenceMixer
from attnjax.taps import Edits, Patch


class Sum(SequenceMixer):
    """A toy: z is x by head, plus a further input."""

    sites = SCORE_SITES
    directions = ("causal", "bidirectional")
    masked = spatial = True
    further = ("shift", "other")

    def __init__(self, *, causal=True, rngs, **options):
        super().__init__(2, 4, causal=causal, rngs=rngs, **options)
        self.out = self.output_projection(rngs=rngs)

    def token_shapes(self):
        return {"key": (2, 2), "place": ()}

    def token_dtypes(self, dtype):
        return {"place": jnp.int32}

    def mix(self, call):
        z = call.x.reshape(*call.x.shape[:2], 2, 2)
        shift = call.further["shift"]
        assert set(call.further) == {"shift", "other"}
        return z if shift is None else z + shift


@pytest.fixture(scope="module")
def causal():
    return Sum(rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def whole():
    return Sum(causal=False, rngs=nnx.Rngs(0))


X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)


def test_further_inputs(causal):
    plain = causal(X)
    assert_array_equal(causal(X, shift=None), plain)
    assert_array_equal(causal(X, shift=jnp.float32(0)), plain)
    assert np.abs(causal(X, shift=jnp.float32(1)) - plain).max() > 0
    with pytest.raises(TypeError, match="Sum: unknown argument shfit; .* are shift, other"):
        causal(X, shfit=None)


def test_options_that_a_mechanism_lacks():
    class Plain(Sum):
        directions = ("causal",)
        masked = packed = decodes = drops = False
        further = ()

    module = Plain(rngs=nnx.Rngs(0))
    ids = jnp.zeros((2, 5), jnp.int32)
    for options, words in (
        ({"mask": Window(2)}, "mask is not supported; use valid for padding.$"),
        ({"segment_ids": ids}, "segment_ids are not supported"),
    ):
        with pytest.raises(NotImplementedError, match=f"Plain: {words}"):
            module(X, **options)
    with pytest.raises(TypeError, match="unknown argument shift; .* are none"):
        module(X, shift=None)
    with pytest.raises(NotImplementedError, match="Plain: has no step-by-step form"):
        module.init_cache(2, 5)
    for option in ({"dropout_rate": 0.1}, {"causal": False}, {"num_kv_heads": 1}):
        with pytest.raises(NotImplementedError, match=f"Plain: {[*option][0]}"):
            Plain(rngs=nnx.Rngs(0), **option)


def test_what_a_token_may_see(causal, whole):
    """Causality, padding, documents, masks as programs and as arrays, and edits of keys."""
    t, s = np.indices((5, 5))
    valid = jnp.arange(5)[None] < jnp.array([[5], [3]])
    ids = jnp.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, -1]], jnp.int32)
    same = np.asarray((ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, :, None])
    kept = jnp.array([[True] * 5, [False, True, True, True, True]])
    near = np.abs(t - s) < 2
    row = np.asarray(valid)[:, None]
    cases = [
        (causal, {}, s <= t),
        (whole, {}, None),
        (causal, {"valid": valid}, s <= t),  # causality hides what comes behind
        (whole, {"valid": valid}, row),
        (causal, {"segment_ids": ids}, (s <= t) & same),
        (whole, {"segment_ids": ids, "mask": Window(2, 1)}, near & same),
        (causal, {"mask": jnp.asarray(near)}, (s <= t) & near),
        (whole, {"mask": jnp.asarray(near), "valid": valid}, near & row),
        (whole, {"edits": Edits(key_mask=kept)}, np.asarray(kept)[:, None]),
    ]
    for module, options, want in cases:
        call = module.begin(X, **options)
        got, seen = call.keep(5), call.visible(5)
        if want is None:
            assert got is None and seen is None
            continue
        assert_array_equal(
            np.broadcast_to(got, (2, 1, 5, 5))[:, 0], np.broadcast_to(want, (2, 5, 5))
        )
        assert isinstance(seen, Mask) == (not isinstance(options.get("mask"), jax.Array))
    layout = causal.begin(X, segment_ids=ids).visible(5, Window(2), documents=False)
    assert_array_equal(layout.dense(5)[0, 0], (s <= t) & near)


def test_when_scores_must_exist(causal):
    seven = jnp.zeros((2, 1, 5, 5))
    patch = {"scores": Patch(seven, seven > 0)}
    assert not causal.begin(X, edits=Edits(), capture=("z",)).wants_scores
    for options in (
        {"capture": ("weights",)},
        {"edits": Edits(score_bias=seven)},
        {"edits": Edits(weight_edit=lambda w: w)},
        {"edits": Edits(patch=patch)},
    ):
        assert causal.begin(X, **options).wants_scores
    drops = Sum(dropout_rate=0.5, deterministic=False, rngs=nnx.Rngs(0))
    assert drops.begin(X, dropout_rng=jax.random.key(0)).wants_scores
    assert not drops.begin(X, deterministic=True).wants_scores


def test_tokens_of_a_cache_have_their_own_dtypes(causal):
    cache = causal.init_cache(3, 7, jnp.bfloat16)
    found = {name: (a.shape, a.dtype) for name, a in cache.tokens.items()}
    assert found == {"key": ((3, 7, 2, 2), jnp.bfloat16), "place": ((3, 7), jnp.int32)}


def test_positions_know_whether_they_were_given(causal):
    call = causal.begin(X)
    assert not call.placed and call.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert causal.begin(X, positions=call.positions).placed


def test_tokens_on_several_axes(causal, whole):
    image = jnp.concatenate([X, 2 * X, 3 * X], axis=1).reshape(2, 3, 5, 4)
    y, seen = whole(image, capture=("z",))
    assert y.shape == image.shape and seen["z"].shape == (2, 15, 2, 2)
    assert_array_equal(y.reshape(2, 15, 4), whole(image.reshape(2, 15, 4)))
    valid = jnp.ones((2, 3, 5), bool).at[:, 2].set(False)
    call = whole.begin(image, valid=valid)
    assert_array_equal(call.x[:, 10:], jnp.zeros((2, 5, 4)))
    with pytest.raises(ValueError, match=r"Sum: valid must be .* \(2, 3, 5\), got bool \(2, 15\)"):
        whole(image, valid=valid.reshape(2, 15))
    with pytest.raises(ValueError, match=r"Sum: x must have shape \[batch, length, 4\]"):
        causal(image)
