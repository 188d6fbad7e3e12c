"""What a task is: examples drawn from a key, and a score."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Batch(NamedTuple):
    """Examples of a task.

    Attributes:
      inputs: [b, t] tokens (or [b, t, f] numbers, for tasks without tokens).
      targets: [b, t], what the model should say at each place; -1 where nothing is asked (NaN for
        tasks without tokens).
    """

    inputs: jax.Array
    targets: jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
    """A distribution over examples of one length.

    Subclasses are frozen dataclasses of their sizes and define `example`, `length`, `vocab_size`,
    `chance` and `longer`.
    """

    @property
    def length(self) -> int:
        """Tokens of an example, t."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        raise NotImplementedError

    @property
    def best(self) -> float:
        """The best score that any model can reach: accuracy 1 unless a task says otherwise."""
        return 1.0

    @property
    def chance(self) -> float:
        """The score of the best answer that ignores the text before."""
        raise NotImplementedError

    def longer(self, factor: int) -> Self:
        """The same task, same tokens, `factor` times as long: the length-generalization split."""
        raise NotImplementedError

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """One example: inputs [t] and targets [t]."""
        raise NotImplementedError

    def batch(self, key: Any, size: int) -> Batch:
        """`size` independent examples, a function of the key alone.

        Args:
          key: a JAX random key; use `jax.random.fold_in(key, step)` for the batch of a step.
          size: rows.
        """
        return Batch(*jax.vmap(self.example)(jax.random.split(key, size)))

    def loss(self, logits: Float[Array, "b t v"], batch: Batch) -> Float[Array, ""]:
        """Mean cross-entropy of the scored tokens, in nats."""
        asked = batch.targets >= 0
        wanted = jnp.maximum(batch.targets, 0)
        normal = jax.nn.log_softmax(logits.astype(jnp.float32))
        losses = -jnp.take_along_axis(normal, wanted[..., None], axis=-1)[..., 0]
        count = jnp.maximum(asked.sum(), 1).astype(jnp.float32)
        return jnp.where(asked, losses, 0.0).sum() / count

    def score(self, logits: Float[Array, "b t v"], batch: Batch) -> Float[Array, ""]:
        """Share of the scored tokens whose largest logit is right."""
        asked = batch.targets >= 0
        right = asked & (logits.argmax(-1) == batch.targets)
        count = jnp.maximum(asked.sum(), 1).astype(jnp.float32)
        return right.sum().astype(jnp.float32) / count


def check_positive(task: Task, *names: str) -> None:
    """Raises ValueError when one of the named sizes is below 1."""
    for name in names:
        if getattr(task, name) < 1:
            raise ValueError(
                f"{type(task).__name__}: {name} must be at least 1, got {getattr(task, name)}."
            )


def unasked(length: int) -> Int[Array, " t"]:
    """Targets of a text in which nothing is asked: -1 everywhere."""
    return jnp.full((length,), -1, jnp.int32)
