"""Synthetic tasks: targets against plain Python, splits, statelessness."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import tasks
from attnjax.tasks import TASKS

SMALL = {
    "copy": dict(num_tokens=5, symbols=7),
    "selective_copy": dict(num_tokens=4, blanks=6, symbols=5),
    "induction": dict(text=12, symbols=6),
    "mqar": dict(num_pairs=3, text=24, symbols=20),
    "flip_flop": dict(pairs=9, ignore=0.5),
    "counting": dict(steps=20, variables=3, most=4),
    "parity": dict(bits=6, kind="mnemonic", anchors=20),
    "state_tracking": dict(text=9, group="s3"),
    "retrieval_chain": dict(depth=4, symbols=11),
    "linear_regression": dict(features=3, examples=8),
    "passkey": dict(text=160),
    "multi_key_needle": dict(text=200, needles=3),
}
TOKENS = [name for name in TASKS if name != "linear_regression"]


def make(name, **options):
    return TASKS[name](**(SMALL[name] | options))


def draw(task, key, size):
    """A batch by one program."""
    return jax.jit(task.batch, static_argnums=1)(key, size)


def solve_copy(inputs):
    n = len(inputs) // 2
    return {n + i: inputs[i] for i in range(n)}


def solve_selective_copy(inputs, blank=5, separator=6):
    cut = list(inputs).index(separator)
    data = [x for x in inputs[:cut] if x != blank]
    return {cut + i: x for i, x in enumerate(data)}


def solve_induction(inputs, mark=6):
    first = list(inputs).index(mark)
    return {len(inputs) - 1: inputs[first + 1]}


def solve_mqar(inputs, pairs=3):
    table = {inputs[2 * i]: inputs[2 * i + 1] for i in range(pairs)}
    return {t: table[x] for t, x in enumerate(inputs) if t >= 2 * pairs and x in table}


def solve_flip_flop(inputs):
    stored, answers = None, {}
    for t in range(0, len(inputs), 2):
        if inputs[t] == 2:
            stored = inputs[t + 1]
        elif inputs[t] == 4:
            answers[t] = stored
    return answers


def solve_counting(inputs, v=3, most=4):
    values = {}
    for token in inputs[:-1]:
        kind, x = divmod(token - most - 2, v)
        if kind == 0:
            values[x] = 0
        elif kind == 1:
            values[x] += 1
    return {len(inputs) - 1: values[inputs[-1] - most - 2 - 2 * v]}


def solve_parity(inputs):
    cut = list(inputs).index(2)
    bits = dict(zip(inputs[:cut:2], inputs[1:cut:2], strict=True))
    answers, parity = {}, 0
    for t in range(cut + 1, len(inputs), 2):
        parity ^= bits[inputs[t]]
        answers[t] = parity
    return answers


def solve_state_tracking(inputs):
    import itertools

    elements = list(itertools.permutations(range(3)))
    state, answers = (0, 1, 2), {}
    for t, x in enumerate(inputs):
        state = tuple(elements[x][i] for i in state)
        answers[t] = elements.index(state)
    return answers


def solve_retrieval_chain(inputs):
    d = len(inputs) // 3
    links = dict(zip(inputs[: 2 * d : 2], inputs[1 : 2 * d : 2], strict=True))
    answers, node = {}, inputs[2 * d]
    for t in range(2 * d, 3 * d):
        node = links[node]
        answers[t] = node
    return answers


def solve_needle(inputs):
    """The value that stands after the last line's own words, wherever they stood before."""
    text = bytes(inputs.tolist())
    question = text[text.rindex(b"\n#") :]
    question = question[: question.index(b" is ") + 4]
    place = text.index(question) + len(question)
    return {len(text) - 5 + i: text[place + i] for i in range(5)}


SOLVERS = {
    "copy": solve_copy, "selective_copy": solve_selective_copy, "induction": solve_induction,
    "mqar": solve_mqar, "flip_flop": solve_flip_flop, "counting": solve_counting,
    "parity": solve_parity, "state_tracking": solve_state_tracking,
    "retrieval_chain": solve_retrieval_chain, "passkey": solve_needle,
    "multi_key_needle": solve_needle,
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("factor", [1, 2])
def test_targets_are_what_plain_python_finds(name, factor, key):
    task = make(name) if factor == 1 else make(name).longer(2)
    batch = draw(task, key, 16)
    assert batch.inputs.shape == batch.targets.shape == (16, task.length)
    assert batch.inputs.min() >= 0 and batch.inputs.max() < task.vocab_size
    for inputs, targets in zip(*map(np.asarray, batch), strict=True):
        asked = {int(t): int(targets[t]) for t in np.flatnonzero(targets >= 0)}
        assert asked == {int(t): int(x) for t, x in SOLVERS[name](inputs).items()}


@pytest.mark.parametrize("name", TASKS)
def test_batches_depend_on_the_key_alone(name, key):
    task = make(name)
    first, again = task.batch(key, 4), draw(task, key, 4)
    np.testing.assert_allclose(first.inputs, again.inputs, rtol=1e-5)  # exact for tokens
    np.testing.assert_allclose(first.targets, again.targets, rtol=1e-5)
    other = draw(task, jax.random.fold_in(key, 1), 4)
    assert (np.asarray(first.inputs) != np.asarray(other.inputs)).any()


@pytest.mark.parametrize("name", TOKENS)
def test_scores(name, key):
    task = make(name)

    @jax.jit
    def found(key):
        batch = task.batch(key, 64)
        right = jax.nn.one_hot(jnp.maximum(batch.targets, 0), task.vocab_size)
        guess = jax.random.uniform(key, right.shape)
        return task.score(right, batch), task.loss(20 * right, batch), task.score(guess, batch)

    best, loss, guessed = found(key)
    assert best == task.best == 1.0
    assert loss < 1e-4
    assert guessed <= 2 * task.chance + 0.05


@pytest.mark.parametrize("name", TASKS)
def test_longer_keeps_the_tokens(name):
    task = make(name)
    assert task.longer(2).length > task.length
    assert task.longer(2).vocab_size == task.vocab_size


@pytest.mark.parametrize("kind", ["plain", "scratchpad", "interleaved"])
def test_other_kinds_of_parity(kind, key):
    task = tasks.Parity(bits=5, kind=kind)
    batch = draw(task, key, 8)
    assert batch.inputs.shape == (8, task.length)
    step = 2 if kind == "interleaved" else 1
    bits = np.asarray(batch.inputs)[:, : 5 * step : step]
    answers = np.asarray(batch.targets)
    answers = answers[answers >= 0].reshape(8, -1)
    want = np.cumsum(bits, 1) % 2
    np.testing.assert_array_equal(answers, want[:, -1:] if kind == "plain" else want)


def test_flip_flop_splits(key):
    task = tasks.FlipFlop(pairs=200)
    share = [np.mean(draw(t, key, 8).inputs == 3) for t in (task.dense(), task, task.sparse())]
    np.testing.assert_allclose(share, [0.05, 0.4, 0.49], atol=0.02)


def test_depth_of_the_needle(key):
    for depth in (0.0, 1.0):
        task = tasks.MultiKeyNeedle(text=300, needles=3, depth=depth)
        for inputs in np.asarray(draw(task, key, 8).inputs):
            text = bytes(inputs.tolist())
            question = text[-17:-4]
            place = text.index(question) / len(text)
            assert place < 0.01 if depth == 0 else place > 0.8


def test_regression_by_its_bayes_estimate(key):
    task = tasks.LinearRegression(features=4, examples=12, noise=0.2)

    @jax.jit
    def found(key):
        batch = task.batch(key, 512)
        best = task.score(task.bayes(batch.inputs)[:, None], batch)
        return best, task.score(jnp.zeros((512, 1)), batch)

    best, blind = found(key)
    assert abs(best - task.best) < 0.1 * task.best
    assert best < 0.2 * task.chance
    assert abs(blind - task.chance) < 0.2


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tasks.Copy(num_tokens=0), "num_tokens must be at least 1"),
        (lambda: tasks.MQAR(num_pairs=8, text=16), "at least 32 tokens"),
        (lambda: tasks.MQAR(num_pairs=8, text=64, symbols=8), "use at least 18"),
        (lambda: tasks.Parity(kind="odd"), "none of plain, scratchpad"),
        (lambda: tasks.Parity(bits=9, anchors=4), "at least bits=9"),
        (lambda: tasks.StateTracking(group="a5"), "not like 'z2'"),
        (lambda: tasks.Passkey(text=30), "use text >="),
        (lambda: tasks.RetrievalChain(depth=9, symbols=4), "at least depth"),
    ],
)
def test_bad_sizes(build, words):
    with pytest.raises(ValueError, match=words):
        build()
