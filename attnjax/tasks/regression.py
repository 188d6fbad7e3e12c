"""In-context linear regression: a task without tokens, whose best score is known exactly."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.tasks.base import Batch, Task, check_positive


@dataclasses.dataclass(frozen=True)
class LinearRegression(Task):
    """Pairs (x, y = β·x + noise) of a hidden β, then x alone: say y.

        x ~ N(0, I_d),   β ~ N(0, I_d / d),   y = β·x + σ N(0, 1)

    Token l holds [x_l; y_l], the last one [x; 0]. "In-Context Linear Regression Demystified", 2025,
    arXiv:2503.12734: d = 5, L = 40, σ = 0.1.

    Attributes:
      features: d.
      examples: L, pairs before the question.
      noise: σ.
    """

    features: int = 5
    examples: int = 40
    noise: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, "features", "examples")

    @property
    def length(self) -> int:
        """The pairs and the question."""
        return self.examples + 1

    @property
    def vocab_size(self) -> int:
        """0: there are no tokens; inputs are [b, t, d + 1] numbers."""
        return 0

    @property
    def best(self) -> float:
        """Mean squared error of the Bayes estimate, by 4096 drawn problems."""
        batch = self.batch(jax.random.key(0), 4096)
        return float(self.score(self.bayes(batch.inputs)[:, None], batch))

    @property
    def chance(self) -> float:
        """Mean squared error of saying 0: 1 + σ²."""
        return 1.0 + self.noise**2

    def longer(self, factor: int) -> Self:
        """`factor` times as many pairs."""
        return dataclasses.replace(self, examples=self.examples * factor)

    def example(self, key: Any) -> tuple[jax.Array, jax.Array]:
        """Inputs [t, d + 1] and targets [t], NaN but for the last."""
        for_x, for_beta, for_noise = jax.random.split(key, 3)
        x = jax.random.normal(for_x, (self.length, self.features))
        beta = jax.random.normal(for_beta, (self.features,)) / self.features**0.5
        y = x @ beta + self.noise * jax.random.normal(for_noise, (self.length,))
        inputs = jnp.concatenate([x, y.at[-1].set(0.0)[:, None]], axis=1)
        return inputs, jnp.full((self.length,), jnp.nan).at[-1].set(y[-1])

    def bayes(self, inputs: Float[Array, "b t f"]) -> Float[Array, " b"]:
        """The best prediction: ridge regression, β = (XᵀX + σ² d I)⁻¹ Xᵀ y."""
        x, y, question = inputs[:, :-1, :-1], inputs[:, :-1, -1], inputs[:, -1, :-1]
        ridge = self.noise**2 * self.features * jnp.eye(self.features)[None]
        gram = jnp.einsum("bld,ble->bde", x, x) + ridge
        beta = jnp.linalg.solve(gram, jnp.einsum("bld,bl->bd", x, y)[..., None])[..., 0]
        return jnp.einsum("bd,bd->b", beta, question)

    def loss(self, logits: Float[Array, "b t"], batch: Batch) -> Float[Array, ""]:
        """The mean squared error, which is also the score."""
        return self.score(logits, batch)

    def score(self, logits: Float[Array, "b t"], batch: Batch) -> Float[Array, ""]:
        """Mean squared error of the last prediction; lower is better."""
        return jnp.mean((logits[:, -1] - batch.targets[:, -1]) ** 2)
