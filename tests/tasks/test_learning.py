"""What small models must learn: trainings to the end, minutes on two cores."""

from __future__ import annotations

import pytest
from flax import nnx

from attnjax import tasks
from attnjax.models import LanguageModel, LanguageModelConfig

pytestmark = pytest.mark.slow


def trained(mixer, task, steps, **options):
    config = LanguageModelConfig(
        vocab_size=task.vocab_size, width=64, num_layers=2, num_heads=2, mixers=mixer,
        tie_embeddings=False, **options,
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    return tasks.fit(model, task, steps=steps, batch_size=64).model


def test_softmax_recalls():
    """Softmax attention reaches 99 % on MQAR at the length of the training."""
    task = tasks.MQAR(num_pairs=4, text=32, symbols=32)
    assert tasks.evaluate(trained("softmax", task, 400, rope_base=100.0), task) >= 0.99
