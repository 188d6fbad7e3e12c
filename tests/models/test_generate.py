"""Generation: equal to the plain forward pass, ragged prompts, sampling rules, one compilation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_array_equal

from attnjax.models import LanguageModel, LanguageModelConfig, generate, sample
from tests.compiles import compilations

CONFIG = LanguageModelConfig(
    vocab_size=13,
    width=8,
    num_layers=3,
    num_heads=2,
    mlp_width=8,
    mixers="lightning, window(3)+sink(1), softmax",
    max_length=32,
)


@functools.cache
def model():
    # large embeddings make likeliest tokens clear, so that rounding cannot change them
    graph, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(CONFIG, rngs=nnx.Rngs(0))))
    built = nnx.merge(graph, jax.jit(lambda: nnx.state(LanguageModel(CONFIG, rngs=nnx.Rngs(0))))())
    built.embed.embedding[...] = built.embed.embedding[...] * 50
    return built


@functools.cache
def prompt():
    return jax.random.randint(jax.random.key(1), (2, 6), 0, 13)


@functools.cache
def forward():
    graph, state = nnx.split(model())
    run = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens))
    return lambda tokens: run(state, tokens)


def greedy(row, count):
    """Continues one row by full passes without a cache; padding to one length compiles once."""
    row = list(row)
    for _ in range(count):
        padded = jnp.asarray([row + [0] * (16 - len(row))])
        row.append(int(jnp.argmax(forward()(padded)[0, len(row) - 1])))
    return row[-count:]


def test_greedy_equals_full_passes():
    got = generate(model(), prompt(), max_new_tokens=7, temperature=0.0)
    assert got.shape == (2, 7) and got.dtype == prompt().dtype
    for row in range(2):
        assert got[row].tolist() == greedy(prompt()[row].tolist(), 7)


def test_ragged_prompts():
    lengths = jnp.array([2, 5])
    got = generate(model(), prompt(), max_new_tokens=7, temperature=0.0, prompt_lengths=lengths)
    for row in range(2):
        assert got[row].tolist() == greedy(prompt()[row, : int(lengths[row])].tolist(), 7)


def test_eos_ends_a_row():
    plain = generate(model(), prompt(), max_new_tokens=7, temperature=0.0)
    eos = int(plain[0, 2])
    got = generate(model(), prompt(), max_new_tokens=7, temperature=0.0, eos=eos)
    for row in range(2):
        tokens = plain[row].tolist()
        stop = tokens.index(eos) if eos in tokens else 7
        assert got[row].tolist() == (tokens[: stop + 1] + [eos] * 7)[:7]


def test_one_compilation():
    calls = [
        (prompt()[:, :5], jax.random.key(seed), temperature, top_p, jnp.array([2, 5]))
        for seed, temperature, top_p in ((1, 1.0, 0.9), (2, 0.7, 0.8), (3, 1.3, 0.5))
    ]

    def run(tokens, rng, temperature, top_p, lengths):
        return jax.block_until_ready(
            generate(
                model(),
                tokens,
                max_new_tokens=4,
                temperature=temperature,
                top_k=5,
                top_p=top_p,
                rng=rng,
                eos=3,
                prompt_lengths=lengths,
            )  # fmt: skip
        )

    run(prompt()[:, :4], *calls[0][1:4], jnp.array([2, 4]))  # compiles what checks the arguments
    with compilations() as found:
        for call in calls:
            run(*call)
    assert len(found) == 1


def test_same_key_same_text():
    texts = [
        generate(
            model(), prompt(), max_new_tokens=8, temperature=5.0, rng=jax.random.key(seed)
        ).tolist()
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


class TestSample:
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))

    def draws(self, **options):
        keys = jax.random.split(jax.random.key(0), 2000)
        drawn = jax.jit(jax.vmap(lambda key: sample(self.logits, key, **options)[0]))(keys)
        return np.bincount(np.asarray(drawn), minlength=4) / 2000

    def test_plain(self):
        assert np.abs(self.draws() - [0.4, 0.3, 0.2, 0.1]).max() < 0.04

    def test_temperature(self):
        want = np.array([0.4, 0.3, 0.2, 0.1]) ** 2
        assert np.abs(self.draws(temperature=0.5) - want / want.sum()).max() < 0.04

    def test_top_k(self):
        assert np.abs(self.draws(top_k=2) - [4 / 7, 3 / 7, 0, 0]).max() < 0.04
        assert_array_equal(self.draws(top_k=9), self.draws())

    @pytest.mark.parametrize(
        ("top_p", "kept"), [(0.39, 1), (0.41, 2), (0.71, 3), (1.0, 4), (1e-6, 1)]
    )
    def test_top_p(self, top_p, kept):
        assert (self.draws(top_p=top_p) > 0).sum() == kept


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": jnp.zeros((2, 0), jnp.int32)}, "length >= 1"),
        ({"prompt": jnp.zeros((3,), jnp.int32)}, "batch, length"),
        ({"prompt": jnp.zeros((1, 3))}, "integers"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 40}, "max_length=32"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"rng": None}, "rng"),
        ({"eos": 99}, "eos=99"),
        ({"prompt_lengths": jnp.array([3])}, "prompt_lengths"),
        ({"prompt_lengths": jnp.array([0, 3])}, r"\[1, 6\]"),
        ({"prompt_lengths": jnp.array([3, 7])}, r"\[1, 6\]"),
    ],
    ids=str,
)
def test_bad_arguments(changes, words):
    options = {"max_new_tokens": 3, "rng": jax.random.key(0)} | changes
    text = options.pop("prompt", None)
    with pytest.raises((ValueError, TypeError), match=words):
        generate(model(), prompt() if text is None else text, **options)
