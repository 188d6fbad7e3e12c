"""Small models of the zoo: the same size for every mechanism, and what is measured of one."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.cache import cache_bytes
from attnjax.models import LanguageModel, LanguageModelConfig
from attnjax.tasks import Task, evaluate, fit, stdlib_text

WIDTH, LAYERS, HEADS = 64, 2, 2
REFERENCE_MLP = 256
"""Width inside the MLP of the softmax model, whose number of parameters all others are given."""

BYTES_CONTEXT = 256
BATCH = 32


QUICK_COMPILE: dict[str, Any] = {"xla_backend_optimization_level": 1}
"""Trainings of the zoo are short: more time went into compiling them than it saved."""
if jax.__version_info__ < (0, 11):
    QUICK_COMPILE["xla_cpu_use_fusion_emitters"] = False


def config(mixer: str, vocab_size: int, mlp_width: int = REFERENCE_MLP) -> LanguageModelConfig:
    """The model of the zoo with that mixer in every layer."""
    return LanguageModelConfig(
        vocab_size=vocab_size, width=WIDTH, num_layers=LAYERS, num_heads=HEADS, mixers=mixer,
        mlp_width=mlp_width, tie_embeddings=False, rope_base=100.0,
    )  # fmt: skip


@functools.cache
def parameters(config: LanguageModelConfig) -> int:
    """Number of parameters, without making any."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


@functools.cache
def equal_config(mixer: str, vocab_size: int) -> LanguageModelConfig:
    """The config whose MLP makes up for what the mixer has more or fewer than softmax attention.

    Raises:
      ValueError: when the mixer alone has more parameters than the whole reference.
    """
    wanted = parameters(config("softmax", vocab_size))
    one, two = (parameters(config(mixer, vocab_size, width)) for width in (8, 16))
    per_unit = (two - one) / 8
    width = round(8 + (wanted - one) / per_unit)
    if width < 1:
        raise ValueError(f"{mixer} alone has more parameters than the reference, {wanted}.")
    return config(mixer, vocab_size, width)


def build(mixer: str, vocab_size: int) -> LanguageModel:
    """The model with its parameters, the same seed for all."""
    return LanguageModel(equal_config(mixer, vocab_size), rngs=nnx.Rngs(0))


def accuracy(mixer: str, task: Task, tests: Mapping[str, Task], steps: int) -> dict[str, float]:
    """Trains on a task; the score on each of `tests`, by name."""
    run = fit(
        build(mixer, task.vocab_size),
        task,
        steps=steps,
        batch_size=BATCH,
        compiler_options=QUICK_COMPILE,
    )
    found = {
        name: evaluate(run.model, test, compiler_options=QUICK_COMPILE)
        for name, test in tests.items()
    }
    return found | {"loss": float(run.losses[-20:].mean())}


def bits_per_byte(mixer: str, steps: int) -> float:
    """Trains on nine tenths of the standard library's text; bits per byte on the last tenth."""
    text = stdlib_text()
    cut = len(text) * 9 // 10
    model = build(mixer, 256)
    task = _Text(cut)
    run = fit(model, task, steps=steps, batch_size=8, compiler_options=QUICK_COMPILE)
    graph, state = nnx.split(run.model)
    rows = text[cut:][: 32 * (BYTES_CONTEXT + 1)].reshape(32, -1).astype(np.int32)

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def nats(state: Any, rows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, state)(rows[:, :-1])
        wanted = jnp.take_along_axis(jax.nn.log_softmax(logits), rows[:, 1:, None], axis=-1)
        return -wanted.mean()

    return float(nats(state, jnp.asarray(rows))) / float(np.log(2))


class _Text(Task):
    """Next-byte prediction on the first `size` bytes of the text."""

    def __init__(self, size: int):
        object.__setattr__(self, "text", jnp.asarray(stdlib_text()[:size]))

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        text: jax.Array = self.text  # pyright: ignore[reportAttributeAccessIssue]
        start = jax.random.randint(key, (), 0, text.size - BYTES_CONTEXT - 1, jnp.int32)
        row = jax.lax.dynamic_slice(text, (start,), (BYTES_CONTEXT + 1,)).astype(jnp.int32)
        return row[:-1], row[1:]


def speed(mixer: str, length: int, repeats: int = 3) -> dict[str, float]:
    """Tokens per second of one row, forward and forward with backward, medians."""
    graph, state = nnx.split(build(mixer, 256))
    tokens = jnp.asarray(stdlib_text()[:length].astype(np.int32))[None]

    def loss(state: Any, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(tokens).mean()

    found = {}
    for name, call in (
        ("forward", jax.jit(loss)),
        ("forward+backward", jax.jit(jax.grad(loss, allow_int=True))),
    ):
        jax.block_until_ready(call(state, tokens))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(call(state, tokens))
            seconds.append(time.perf_counter() - start)
        found[name] = length / float(np.median(seconds))
    return found


def decoding(mixer: str, filled: int = 256, steps: int = 32) -> dict[str, float] | None:
    """Milliseconds per token of one row, and bytes of cache per token and at all.

    None for a mechanism without a step-by-step form.
    """
    model = build(mixer, 256)
    try:
        sizes = {
            n: cache_bytes(jax.eval_shape(lambda n=n: model.init_cache(1, n)))
            for n in (1 << 13, 1 << 15)  # longer than any window, whose cache stops growing
        }
        cache = model.init_cache(1, filled + steps)
    except NotImplementedError:
        return None
    graph, state = nnx.split(model)
    per_token = (sizes[1 << 15] - sizes[1 << 13]) / (3 << 13)

    @jax.jit
    def step(state: Any, tokens: jax.Array, cache: Any) -> Any:
        logits, cache = nnx.merge(graph, state)(tokens, cache=cache)
        return logits[:, -1:].argmax(-1), cache

    text = jnp.asarray(stdlib_text()[:filled].astype(np.int32))[None]
    token, cache = step(state, text, cache)
    token, cache = jax.block_until_ready(step(state, token, cache))
    start = time.perf_counter()
    for _ in range(steps - 2):
        token, cache = step(state, token, cache)
    jax.block_until_ready(token)
    return {
        "ms_per_token": 1e3 * (time.perf_counter() - start) / (steps - 2),
        "cache_bytes_per_token": per_token,
        "cache_bytes_fixed": sizes[1 << 13] - (1 << 13) * per_token,
    }
