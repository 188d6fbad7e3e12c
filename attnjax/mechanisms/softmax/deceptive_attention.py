"""Deceptive attention: a loss that takes the attention off marked tokens, which stay in use.

    loss = task loss - λ ln(1 - Σ_j a_j m_j),   m_j = 1 for tokens that must not look important

The attention a of a sentence (for a transformer: the row of the classifying token in the last
layer, every head) is penalized for its mass on the marked tokens, "impermissible" in the paper. The
model learns to use them by other ways: the mass goes to nearly 0 while the accuracy stays. So
little mass on a token does not show that it was not used. `impermissible_penalty` gives the second
term; `marked_classification` and `marked_sequences` make tasks whose answer hangs on the marked
tokens; `deception_report` gives mass and accuracy; `without_marked` is the test that shows what the
model used: it cuts the attention to the marked tokens at inference.

Reference: Pruthi et al., "Learning to Deceive with Attention-Based Explanations", 2019,
arXiv:1909.07913; official code danishpruthi/deceptive-attention. There the form "max" takes the
worst head of the whole batch, here also per example. Its divergence term is -λ KL(a ‖ original):
a positive λ drives attention away from the original, a negative one pulls it back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from attnjax.spec import Mechanism
from pallas_kernels.tilemath import accumulator_dtype

REDUCTIONS = ("mean", "max", "max_per_example", "mean_mass", "none")
TASKS = ("copy", "reverse", "flip")


def impermissible_mass(
    weights: Float[Array, "b *n s"], marked: Bool[Array, "b *m s"]
) -> Float[Array, "b *n"]:
    """Attention mass on marked tokens, Σ_j a_j m_j of every row.

    Args:
      weights: rows of attention, with any axes (heads, queries) between batch and keys.
      marked: True for impermissible tokens: [b, s], or of the rank of `weights`, for example
        [b, 1, t, s] where the marked tokens differ by query.

    Returns:
      One number per row, float32 or wider.

    Raises:
      ValueError: when the shapes do not fit.
    """
    wide = weights.astype(accumulator_dtype(weights.dtype))
    return (wide * _like("impermissible_mass", marked, weights).astype(wide.dtype)).sum(-1)


def impermissible_penalty(
    weights: Float[Array, "b *n s"],
    marked: Bool[Array, "b *m s"],
    *,
    coefficient: float | Float[Array, ""] = 1.0,
    reduction: str = "mean",
    rows: Bool[Array, "b *n"] | None = None,
    epsilon: float = 1e-6,
) -> Float[Array, "..."]:
    """Penalty -λ ln(1 - mass) on the attention mass of marked tokens, to be added to a loss.

    Args:
      weights: rows of attention, with any axes (heads, queries) between batch and keys; for a
        transformer classifier [b, h, s], the classifying token's rows.
      marked: True for impermissible tokens, [b, s] or of the rank of `weights`. Without any, a
        row's penalty is 0.
      coefficient: λ. Paper: 0.1 and 1.0.
      reduction: "mean" over all rows; "max", the worst row of the whole batch (the official code);
        "max_per_example", the mean over examples of their worst rows; "mean_mass", one logarithm
        of the mean mass (the official sequence-to-sequence form); "none", each row's own.
      rows: which rows count (not those of padded queries); None for all.
      epsilon: least value of 1 - mass, below which the slope is 0: keeps the logarithm finite.

    Returns:
      A scalar, or [b, *n] for "none"; float32 or wider.

    Raises:
      ValueError: on an unknown reduction or shapes that do not fit.

    Example: >>> impermissible_penalty(captured["weights"][:, :, 0], marked, coefficient=0.1)
    Reference: Pruthi et al., 2019, arXiv:1909.07913, section 3.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"impermissible_penalty: reduction must be one of {REDUCTIONS}, got {reduction!r}."
        )
    mass = impermissible_mass(weights, marked)
    if rows is not None and rows.shape != mass.shape:
        raise ValueError(
            f"impermissible_penalty: rows must have the shape of the rows {mass.shape}, got "
            f"{rows.shape}."
        )
    if reduction == "mean_mass":
        mass = _mean(mass, rows)
    logs = jnp.log(jnp.maximum(1 - mass, epsilon))
    if rows is not None and reduction != "mean_mass":
        logs = jnp.where(rows, logs, 0)
    if reduction == "mean":
        logs = _mean(logs, rows)
    elif reduction == "max":
        logs = logs.min()
    elif reduction == "max_per_example":
        logs = logs.reshape(len(logs), -1).min(1).mean()
    return -coefficient * logs


def entropy_term(weights: Float[Array, "b *n s"], coefficient: float = 1.0) -> Float[Array, ""]:
    """-λ times the mean entropy of the rows, in nats: a positive λ spreads the attention.

    Args:
      weights: rows of attention, with sums of 1.
      coefficient: λ.
    """
    a = weights.astype(accumulator_dtype(weights.dtype))
    return coefficient * _a_log_ratio(a, jnp.ones_like(a)).sum(-1).mean()


def divergence_term(
    weights: Float[Array, "b *n s"],
    original: Float[Array, "b *n s"],
    coefficient: float = 1.0,
) -> Float[Array, ""]:
    """-λ times the mean KL(a ‖ original): a positive λ drives attention away from the original.

    Args:
      weights: rows of attention.
      original: attention of the model trained without penalty; positive wherever `weights` is.
      coefficient: λ; negative to stay near the original.
    """
    a = weights.astype(accumulator_dtype(weights.dtype))
    return -coefficient * _a_log_ratio(a, original.astype(a.dtype)).sum(-1).mean()


def without_marked(marked: Bool[Array, "b *m s"]) -> Callable[[jax.Array], jax.Array]:
    """Edit of weights that cuts the attention to marked tokens; what is left is not rescaled.

    Args:
      marked: True for impermissible tokens: [b, s], or of rank 4.

    Returns:
      A function for `attnjax.taps.Edits(weight_edit=...)`. A model whose accuracy drops under it
      used the marked tokens.
    """

    def edit(weights: jax.Array) -> jax.Array:
        cut = _like("without_marked", marked, weights)
        return jnp.where(cut, jnp.zeros_like(weights), weights)

    return edit


def deception_report(
    weights: Float[Array, "b *n s"],
    marked: Bool[Array, "b *m s"],
    correct: Bool[Array, "..."],
) -> dict[str, Float[Array, ""]]:
    """How much attention the marked tokens get, and how often the model is right.

    Args:
      weights: rows of attention.
      marked: True for impermissible tokens.
      correct: whether each prediction is right.

    Returns:
      "tokens": share of tokens that are marked, the mass under uniform attention; "mass": mean
      attention mass on them; "accuracy". All from 0 to 1.
    """
    return {
        "tokens": marked.astype(jnp.float32).mean(),
        "mass": impermissible_mass(weights, marked).mean(),
        "accuracy": correct.astype(jnp.float32).mean(),
    }


def marked_classification(
    key: Any, batch: int, length: int, vocab: int, *, classes: int = 2, signals: int = 1
) -> dict[str, Array]:
    """Sentences of noise with a few tokens that tell the class, which are marked.

    Args:
      key: random key.
      batch, length: sentences, and tokens per sentence. Token 0 is the classifying token 0.
      vocab: token ids; 1 .. classes are the signals, the rest is noise.
      classes: number of classes.
      signals: signal tokens per sentence.

    Returns:
      "tokens" [batch, length], "labels" [batch], "marked" [batch, length] booleans.

    Raises:
      ValueError: when sentence or vocabulary are too short.
    """
    if not 1 <= signals < length or vocab < classes + 2:
        raise ValueError(
            f"marked_classification: needs 1 <= signals < length and vocab >= classes + 2, got "
            f"signals={signals}, length={length}, vocab={vocab}, classes={classes}."
        )
    of_labels, of_noise, of_places = jax.random.split(key, 3)
    labels = jax.random.randint(of_labels, (batch,), 0, classes)
    noise = jax.random.randint(of_noise, (batch, length), classes + 1, vocab)
    first = jnp.arange(length)[None] == 0
    order = jnp.where(first, 2.0, jax.random.uniform(of_places, (batch, length)))
    marked = jnp.argsort(jnp.argsort(order, axis=1), axis=1) < signals
    tokens = jnp.where(marked, labels[:, None] + 1, jnp.where(first, 0, noise))
    return {"tokens": tokens, "labels": labels, "marked": marked}


def marked_sequences(key: Any, task: str, batch: int, length: int, vocab: int) -> dict[str, Array]:
    """Sequence-to-sequence tasks in which each target token comes from one source token.

    Args:
      key: random key.
      task: "copy"; "reverse"; or "flip", which swaps the two tokens of every pair.
      batch, length: sequences and tokens per sequence, even for "flip".
      vocab: token ids 0 .. vocab - 1.

    Returns:
      "source" and "target" [batch, length], and "marked" [length, length] booleans: the source
      token (column) that each target token (row) is made from.

    Raises:
      ValueError: on an unknown task, or an odd length for "flip".
    """
    source = jax.random.randint(key, (batch, length), 0, vocab)
    origin = _origins(task, length)
    marked = origin[:, None] == jnp.arange(length)[None]
    return {"source": source, "target": source[:, origin], "marked": marked}


def _origins(task: str, length: int) -> Int[Array, " t"]:
    """[length] index of the source token of each target token."""
    if task not in TASKS:
        raise ValueError(f"marked_sequences: task must be one of {TASKS}, got {task!r}.")
    if task == "flip" and length % 2:
        raise ValueError(f"marked_sequences: 'flip' swaps pairs; length={length} must be even.")
    i = jnp.arange(length)
    return {"copy": i, "reverse": length - 1 - i, "flip": i ^ 1}[task]


def _like(name: str, marked: jax.Array, weights: jax.Array) -> jax.Array:
    """Marks [b, s] with axes of size 1 in between, to broadcast against the rows."""
    if marked.ndim == 2 and weights.ndim > 2:
        marked = marked.reshape(marked.shape[0], *(1,) * (weights.ndim - 2), marked.shape[1])
    fits = marked.ndim == weights.ndim and all(
        m in (1, w) for m, w in zip(marked.shape, weights.shape)
    )
    if not fits or marked.shape[-1] != weights.shape[-1]:
        raise ValueError(
            f"{name}: marked must be [batch, keys] or broadcast against the weights "
            f"{weights.shape}, got {marked.shape}."
        )
    return marked


def _mean(x: jax.Array, rows: jax.Array | None) -> jax.Array:
    if rows is None:
        return x.mean()
    count = jnp.maximum(rows.astype(x.dtype).sum(), 1)
    return jnp.where(rows, x, 0).sum() / count


def _a_log_ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """A ln(a / b), 0 where a is 0, with a finite slope."""
    seen = a > 0
    ratio = jnp.where(seen, a, 1) / jnp.where(seen, b, 1)
    return jnp.where(seen, a * jnp.log(ratio), 0)


def _picture() -> dict[str, jax.Array]:
    """Marked source tokens (columns) of every target token (rows)."""
    return {task: marked_sequences(jax.random.key(0), task, 1, 8, 2)["marked"] for task in TASKS}


SPEC = Mechanism(
    id="deceptive_attention",
    title="Learning to Deceive with Attention-Based Explanations",
    arxiv="1909.07913",
    year=2019,
    code="danishpruthi/deceptive-attention",
    kind="function",
    function=impermissible_penalty,
    causal=True,
    bidirectional=True,
    kernel="einsum",
    cost="O(T) per row of attention",
    reduces_to={"coefficient=0": "multi_head_attention"},
    picture=_picture,
    golden=("impermissible_penalty",),
    reading="The synthetic tasks are small stand-ins for the paper's data sets.",
)
