"""Generating text: cached prefill, then one token at a time, in a single compiled function."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int


def generate(
    model: Any,
    prompt: Int[Array, "b t"],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: Any = None,
    eos: int | None = None,
    prompt_lengths: Int[Array, " b"] | None = None,
    cache_dtype: Any = None,
    mixer_inputs: Any = None,
) -> Int[Array, "b n"]:
    """Continues prompts.

    Args:
      model: a `LanguageModel`, or anything with its `hidden`, `unembed` and `init_cache`.
      prompt: token indices, at least one per row; rows may be padded at the end.
      max_new_tokens: n, tokens to add.
      temperature: 0 takes the likeliest token; else logits are divided by it.
      top_k: draw from the k likeliest tokens only; None is all.
      top_p: draw from the smallest set of likeliest tokens with at least this probability (after
        temperature and top_k); None is all.
      rng: key; needed unless temperature is 0.
      eos: token that ends a row; the rest of the row repeats it. None never ends.
      prompt_lengths: real tokens in each row of the prompt; None is all of them.
      cache_dtype: of cached keys and values; None is the model's.
      mixer_inputs: further arguments of the mixers' calls for the prompt, by name (see
        `LanguageModel.hidden`); new tokens get none.

    Returns:
      The new tokens [b, n], without the prompt, in the dtype of the prompt.

    Raises:
      ValueError: for arguments out of range or shapes that do not fit.

    Compiles once for each shape of the prompt and each choice of `max_new_tokens`, `top_k`, and of
    whether `temperature` is 0 and `top_p`, `eos`, `prompt_lengths` are given; their values never
    recompile.
    """
    _check(model, prompt, max_new_tokens, temperature, top_k, top_p, rng, eos, prompt_lengths)
    graph, state = nnx.split(model)
    greedy = temperature == 0
    return _generate(
        graph,
        state,
        prompt,
        prompt_lengths,
        None if greedy else rng,
        None if greedy else jnp.asarray(temperature, jnp.float32),
        None if top_p is None or greedy else jnp.asarray(top_p, jnp.float32),
        None if eos is None else jnp.asarray(eos, prompt.dtype),
        mixer_inputs,
        max_new_tokens=max_new_tokens,
        top_k=None if greedy else top_k,
        cache_dtype=cache_dtype,
    )


def sample(
    logits: Float[Array, "b v"],
    rng: Any,
    *,
    temperature: Any = 1.0,
    top_k: int | None = None,
    top_p: Any = None,
) -> Int[Array, " b"]:
    """Draws one token per row; see `generate` for the arguments."""
    logits = logits.astype(jnp.float32) / jnp.asarray(temperature, jnp.float32)
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, jnp.full_like(logits, -jnp.inf), logits)
    if top_p is not None:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(ordered, axis=-1)
        # a token stays if the likelier ones together have less than top_p; the first always does
        stays = jnp.cumsum(share, axis=-1) - share < jnp.asarray(top_p, jnp.float32)
        least = jnp.where(stays, ordered, jnp.full_like(ordered, jnp.inf)).min(-1, keepdims=True)
        logits = jnp.where(logits < least, jnp.full_like(logits, -jnp.inf), logits)
    return jax.random.categorical(rng, logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("graph", "max_new_tokens", "top_k", "cache_dtype"))
def _generate(
    graph: Any,
    state: Any,
    prompt: jax.Array,
    prompt_lengths: Any,
    rng: Any,
    temperature: Any,
    top_p: Any,
    eos: Any,
    mixer_inputs: Any,
    *,
    max_new_tokens: int,
    top_k: int | None,
    cache_dtype: Any,
) -> jax.Array:
    model = nnx.merge(graph, state)
    b, t = prompt.shape
    cache = model.init_cache(b, t + max_new_tokens, cache_dtype)
    valid = None
    last = jnp.full((b,), t - 1, jnp.int32)
    if prompt_lengths is not None:
        last = prompt_lengths.astype(jnp.int32) - 1
        valid = jnp.arange(t, dtype=jnp.int32)[None, :] <= last[:, None]
    options = {} if mixer_inputs is None else {"mixer_inputs": mixer_inputs}
    hidden, cache = model.hidden(prompt, cache=cache, valid=valid, deterministic=True, **options)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)

    def choose(hidden: jax.Array, i: Any) -> jax.Array:
        logits = model.unembed(hidden)[:, 0]
        if temperature is None:
            return jnp.argmax(logits, axis=-1).astype(prompt.dtype)
        key = jax.random.fold_in(rng, i)
        token = sample(logits, key, temperature=temperature, top_k=top_k, top_p=top_p)
        return token.astype(prompt.dtype)

    def more(carry: Any) -> Any:
        i, _, _, _, done = carry
        return (i < max_new_tokens) & ~done.all()

    def step(carry: Any) -> Any:
        i, token, tokens, cache, done = carry
        hidden, cache = model.hidden(token[:, None], cache=cache, deterministic=True)
        token = choose(hidden, i)
        if eos is not None:
            token = jnp.where(done, eos, token)
            done = done | (token == eos)
        return i + 1, token, tokens.at[:, i].set(token), cache, done

    token = choose(hidden, 0)
    tokens = jnp.zeros((b, max_new_tokens), prompt.dtype)
    done = jnp.zeros((b,), bool)
    if eos is not None:
        tokens = jnp.broadcast_to(eos, tokens.shape)
        done = token == eos
    start = (jnp.int32(1), token, tokens.at[:, 0].set(token), cache, done)
    return jax.lax.while_loop(more, step, start)[2]


def _check(
    model: Any,
    prompt: Any,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    rng: Any,
    eos: int | None,
    prompt_lengths: Any,
) -> None:
    """Refuses arguments that cannot work, naming them."""
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ValueError(
            f"generate: prompt must have shape [batch, length >= 1], got {prompt.shape}; "
            "start an empty text with a token of its own."
        )
    if not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"generate: prompt must hold integers, got {prompt.dtype}.")
    if max_new_tokens < 1:
        raise ValueError(f"generate: max_new_tokens must be at least 1, got {max_new_tokens}.")
    if temperature < 0:
        raise ValueError(
            f"generate: temperature must be 0 (greedy) or positive, got {temperature}."
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k must be at least 1 or None, got {top_k}.")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p must be in (0, 1] or None, got {top_p}.")
    if temperature > 0 and rng is None:
        raise ValueError("generate: temperature > 0 draws at random; pass rng=jax.random.key(0).")
    config = getattr(model, "config", None)
    longest = getattr(config, "max_length", None)
    if longest is not None and prompt.shape[1] + max_new_tokens > longest:
        raise ValueError(
            f"generate: prompt length {prompt.shape[1]} + max_new_tokens={max_new_tokens} "
            f"exceeds the "
            f"model's max_length={longest}."
        )
    vocab = getattr(config, "vocab_size", None)
    if eos is not None and vocab is not None and not 0 <= eos < vocab:
        raise ValueError(f"generate: eos={eos} is no token; vocab_size={vocab}.")
    if prompt_lengths is not None:
        if prompt_lengths.shape != prompt.shape[:1]:
            raise ValueError(
                f"generate: prompt_lengths must have shape [batch] = {prompt.shape[:1]}, got "
                f"{prompt_lengths.shape}."
            )
        if not isinstance(prompt_lengths, Tracer):
            low, high = int(prompt_lengths.min()), int(prompt_lengths.max())
            if low < 1 or high > prompt.shape[1]:
                raise ValueError(
                    f"generate: prompt_lengths must be in [1, {prompt.shape[1]}], got {low} to "
                    f"{high}."
                )
