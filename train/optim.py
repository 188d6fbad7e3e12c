"""Optimizers and schedules around optax.

The learning rate of an optimizer is its constant peak; the step multiplies the update by
`fraction(step)`. All three optimizers are linear in the learning rate, weight decay included, so
this is exact, and a skipped step leaves the schedule where the step counter says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from train.config import Optim, Schedule

Axes = Mapping[str, Sequence[str | None]]
Fraction = Callable[[jax.Array], jax.Array]


def make_fraction(schedule: Schedule, steps: int) -> Fraction:
    """The schedule: step (counted from 0) -> fraction of the peak learning rate.

    With w warm-up steps and n = `steps`, after the warm-up `(step + 1) / w`:

        cosine    f + (1 - f) (1 + cos(pi p)) / 2,  p = (step - w) / (n - w)
        wsd       1, then 1 -> f in a straight line over the last `decay * n` steps
        inv_sqrt  sqrt(w / step)
        constant  1

    Args:
      schedule: kind, warm-up in steps, f = `final`.
      steps: n, the length of the whole run in steps.
    """
    warmup, final = float(schedule.warmup), schedule.final
    tail = max(1.0, schedule.decay * steps)

    def fraction(step: jax.Array) -> jax.Array:
        now = step.astype(jnp.float32)
        if schedule.kind == "cosine":
            progress = jnp.clip((now - warmup) / max(1.0, steps - warmup), 0.0, 1.0)
            value = final + (1.0 - final) * 0.5 * (1.0 + jnp.cos(math.pi * progress))
        elif schedule.kind == "wsd":
            value = final + (1.0 - final) * jnp.clip((steps - now) / tail, 0.0, 1.0)
        elif schedule.kind == "inv_sqrt":
            value = jnp.sqrt(max(1.0, warmup) / jnp.maximum(now, max(1.0, warmup)))
        else:
            value = jnp.ones_like(now)
        return value * jnp.minimum(1.0, (now + 1.0) / max(1.0, warmup))

    return fraction


def make_optimizer(optim: Optim, axes: Axes) -> optax.GradientTransformation:
    """Clipping followed by adamw, lion or muon.

    Args:
      optim: settings.
      axes: logical axis names of every parameter. They say what is a matrix: weight decay acts on
        matrices only, and muon orthogonalizes those; embeddings, norms and biases get AdamW with
        `adam_lr`.
    """
    numbers: Any = {name: matrix_axes(names) for name, names in axes.items()}
    decayed = {name: number is not None for name, number in numbers.items()}
    if optim.name == "adamw":
        rule = optax.adamw(
            optim.lr, optim.beta1, optim.beta2, weight_decay=optim.weight_decay, mask=decayed
        )
    elif optim.name == "lion":
        rule = optax.lion(
            optim.lr, optim.beta1, optim.beta2, weight_decay=optim.weight_decay, mask=decayed
        )
    else:
        rule = contrib.muon(
            optim.lr,
            weight_decay=optim.weight_decay,
            adam_b1=optim.beta1,
            adam_b2=optim.beta2,
            adam_learning_rate=optim.adam_lr,
            muon_weight_dimension_numbers=numbers,
        )
    if optim.clip:
        rule = optax.chain(optax.clip_by_global_norm(optim.clip), rule)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        # optax mixes types and ranks; a caller may have forbidden that for code of its own
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return rule.update(updates, state, params)

    return optax.GradientTransformation(rule.init, update)


def matrix_axes(names: Sequence[str | None]) -> contrib.MuonDimensionNumbers | None:
    """Which axes of a parameter are the rows and columns of its matrix; None when it is not one.

    A matrix maps from or to the residual stream ("embed" first or last); its other axes, heads for
    example, count as one. A leading "layers" axis and unnamed axes (projections fused into one
    array) hold one matrix each. Tables over the vocabulary are no matrices here.
    """
    first = 1 if names and names[0] == "layers" else 0
    named = [i for i in range(first, len(names)) if names[i] is not None]
    if len(named) < 2 or "vocab" in names:
        return None
    if names[named[0]] == "embed":
        return contrib.MuonDimensionNumbers((named[0],), tuple(named[1:]))
    if names[named[-1]] == "embed":
        return contrib.MuonDimensionNumbers(tuple(named[:-1]), (named[-1],))
    return None
