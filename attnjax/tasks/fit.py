"""Training a small model on a task, and its score afterwards: one harness for all mechanisms.

    model = LanguageModel(LanguageModelConfig(...), mixer="gated_deltanet", rngs=nnx.Rngs(0))
    run = fit(model, tasks.MQAR(), steps=500)
    evaluate(run.model, tasks.MQAR().longer(4))

For real data, sharding, checkpoints and logs use the trainer of the repository (`train/`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.tasks.base import Task


class Fit(NamedTuple):
    """A finished training.

    Attributes:
      model: the trained model; the one given is left as it was.
      losses: [steps] training loss of every step.
    """

    model: Any
    losses: np.ndarray


def fit(
    model: Any,
    task: Task,
    *,
    steps: int = 500,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
    every: int = 50,
    compiler_options: dict[str, Any] | None = None,
) -> Fit:
    """Trains with AdamW: 10 % warm-up, cosine decay, gradients clipped to norm 1.

    Args:
      model: an `attnjax.models.LanguageModel`, or any `nnx.Module` that maps inputs to logits.
      task: gives a new batch for each step, from (seed, step) alone.
      steps: optimizer steps.
      batch_size: examples per step.
      learning_rate: the largest.
      seed: of the batches.
      report: called with the step and the mean loss since the last call, every `every` steps.
      every: steps that run as one compiled loop; divides nothing and changes no result.
      compiler_options: of `jax.jit`; a short run may want one that compiles quickly.

    Returns:
      The trained model and the losses.

    Raises:
      ValueError: when steps or every is below 1.
    """
    import optax  # not needed by anything else of the library

    if steps < 1 or every < 1:
        raise ValueError(f"fit: steps and every must be at least 1, got {steps} and {every}.")
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    warm = max(steps // 10, 1)
    rate = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warm, max(steps, warm + 1), learning_rate / 20
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))
    auxiliary = bool(getattr(model, "has_aux_loss", False))

    def loss(params: Any, batch: Any) -> jax.Array:
        copy = nnx.merge(graph, params, rest)
        if not auxiliary:
            return task.loss(copy(batch.inputs), batch)
        logits, captured = copy(batch.inputs, capture=("aux_loss",))
        extra = captured["aux_loss"].astype(jnp.float32)  # NaN in layers that have none
        return task.loss(logits, batch) + jnp.where(jnp.isnan(extra), 0.0, extra).sum()

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def advance(carry: Any, first: jax.Array) -> Any:
        def step(carry: Any, index: jax.Array) -> Any:
            params, state = carry
            batch = task.batch(jax.random.fold_in(jax.random.key(seed), index), batch_size)
            value, grads = jax.value_and_grad(loss)(params, batch)
            with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
                updates, state = optimizer.update(grads, state, params)
            new = (optax.apply_updates(params, updates), state)
            # the last piece may be shorter than the compiled loop
            return jax.tree.map(lambda a, b: jnp.where(index < steps, a, b), new, carry), value

        return jax.lax.scan(step, carry, first + jnp.arange(min(every, steps)))

    carry = (params, optimizer.init(params))
    losses: list[np.ndarray] = []
    for first in range(0, steps, min(every, steps)):
        carry, values = advance(carry, jnp.asarray(first))
        losses.append(np.asarray(values)[: steps - first])
        if report is not None:
            report(min(first + every, steps), float(losses[-1].mean()))
    return Fit(nnx.merge(graph, carry[0], rest), np.concatenate(losses))


def evaluate(
    model: Any,
    task: Task,
    *,
    examples: int = 256,
    batch_size: int = 64,
    seed: int = 1,
    compiler_options: dict[str, Any] | None = None,
) -> float:
    """Mean score on fresh examples; they depend on the seed alone.

    Args:
      model: as in `fit`.
      task: what is asked; `task.longer(k)` for lengths beyond those of the training.
      examples: how many, rounded up to whole batches.
      batch_size: examples at a time.
      seed: of the examples; other than that of the training.
      compiler_options: of `jax.jit`.
    """
    graph, state = nnx.split(model)

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def one(state: Any, index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed + (1 << 20)), index)
        batch = task.batch(key, min(batch_size, examples))
        return task.score(nnx.merge(graph, state)(batch.inputs), batch)

    count = -(-examples // min(batch_size, examples))
    return float(np.mean([one(state, jnp.asarray(i)) for i in range(count)]))
