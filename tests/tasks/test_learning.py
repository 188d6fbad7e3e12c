"""What small models must learn: trainings to the end, minutes on two cores."""

from __future__ import annotations

import pytest
from flax import nnx

from attnjax import tasks
from attnjax.models import LanguageModel, LanguageModelConfig

pytestmark = pytest.mark.slow


# other tests compile quickly; these run for longer than they compile
OPTIMIZED = {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}


def trained(mixer, task, steps, num_heads=2, batch_size=64, **options):
    config = LanguageModelConfig(
        vocab_size=task.vocab_size, width=64, num_layers=2, num_heads=num_heads, mixers=mixer,
        tie_embeddings=False, **options,
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    return tasks.fit(
        model, task, steps=steps, batch_size=batch_size, compiler_options=OPTIMIZED
    ).model


def test_softmax_recalls():
    """Softmax attention reaches 99 % on MQAR at the length of the training."""
    task = tasks.MQAR(num_pairs=4, text=32, symbols=32)
    assert tasks.evaluate(trained("softmax", task, 400, rope_base=100.0), task) >= 0.99


COPE = "cope(num_positions=16)"


@pytest.mark.parametrize(("mixer", "holds"), [(COPE, True), ("softmax", False)])
def test_cope_keeps_a_bit_for_longer_than_rotary_positions(mixer, holds):
    """Flip-flop: both solve the trained length, CoPE alone four times that length."""
    task = tasks.FlipFlop(pairs=32)
    model = trained(mixer, task, 1500, batch_size=32)
    assert tasks.evaluate(model, task) >= 0.999
    for far in (task.longer(4), task.longer(4).sparse()):
        score = tasks.evaluate(model, far)
        assert score >= 0.99 if holds else score <= 0.9


@pytest.mark.parametrize(("mixer", "holds"), [(COPE, True), ("softmax", False)])
def test_cope_counts_further_than_rotary_positions(mixer, holds):
    """Counting with three variables: both solve the trained length, CoPE alone twice that."""
    task = tasks.Counting(steps=63, variables=3)
    model = trained(mixer, task, 2000, num_heads=4)
    assert tasks.evaluate(model, task) >= 0.99
    score = tasks.evaluate(model, task.longer(2))
    assert score >= 0.99 if holds else score <= 0.6
