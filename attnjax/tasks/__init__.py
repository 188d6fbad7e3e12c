"""Synthetic tasks that tell mechanisms apart, each with the score that can be reached.

    task = tasks.MQAR(num_pairs=8)
    batch = task.batch(jax.random.key(0), 64)              # inputs, targets [64, t]; -1: not scored
    accuracy = task.score(model(batch.inputs), batch)      # task.best is 1, task.chance a guess's
    harder = task.longer(4).batch(key, 64)                 # the length-generalization split
    run = tasks.fit(model, task, steps=500); tasks.evaluate(run.model, task.longer(4))

Batches depend on the key alone: there is no stream to rewind, and `batch` runs under `jax.jit`.
"""

from attnjax.tasks.base import Batch, Task
from attnjax.tasks.copying import Copy, Induction, SelectiveCopy
from attnjax.tasks.fit import Fit, evaluate, fit
from attnjax.tasks.needle import MultiKeyNeedle, Passkey, stdlib_text
from attnjax.tasks.recall import MQAR, RetrievalChain
from attnjax.tasks.regression import LinearRegression
from attnjax.tasks.state import Counting, FlipFlop, Parity, StateTracking

TASKS: dict[str, type[Task]] = {
    "copy": Copy,
    "selective_copy": SelectiveCopy,
    "induction": Induction,
    "mqar": MQAR,
    "flip_flop": FlipFlop,
    "counting": Counting,
    "parity": Parity,
    "state_tracking": StateTracking,
    "retrieval_chain": RetrievalChain,
    "linear_regression": LinearRegression,
    "passkey": Passkey,
    "multi_key_needle": MultiKeyNeedle,
}
"""All tasks by name."""

__all__ = [
    "MQAR",
    "TASKS",
    "Batch",
    "Copy",
    "Counting",
    "Fit",
    "FlipFlop",
    "Induction",
    "LinearRegression",
    "MultiKeyNeedle",
    "Parity",
    "Passkey",
    "RetrievalChain",
    "SelectiveCopy",
    "StateTracking",
    "Task",
    "evaluate",
    "fit",
    "stdlib_text",
]
