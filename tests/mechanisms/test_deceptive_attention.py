"""Penalties on attention mass by their formulas, the tasks, and a small model that deceives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.mechanisms.softmax import deceptive_attention as da
from attnjax.nn import MultiHeadAttention
from attnjax.taps import Edits


@pytest.fixture
def rows():
    """Attention [2, 3, 5] and marks [2, 5], of which the second sentence has none."""
    rng = np.random.default_rng(0)
    a = rng.dirichlet(np.ones(5), size=(2, 3))
    return a, np.array([[True, False, False, True, False], [False] * 5])


def test_reductions_by_the_formula(rows):
    a, m = rows
    logs = -np.log(1 - (a * m[:, None]).sum(-1))
    mean = (a * m[:, None]).sum(-1).mean()
    want = {
        "none": logs, "mean": logs.mean(), "max": logs.max(),
        "max_per_example": logs.max(1).mean(), "mean_mass": -np.log(1 - mean),
    }  # fmt: skip
    with jax.enable_x64(True):
        for reduction in da.REDUCTIONS:
            got = da.impermissible_penalty(
                jnp.asarray(a), jnp.asarray(m), coefficient=0.1, reduction=reduction
            )
            assert_allclose(got, 0.1 * want[reduction], rtol=1e-12)


def test_rows_that_do_not_count(rows):
    a, m = (jnp.asarray(x) for x in rows)
    few = jnp.array([[True, False, True], [False, False, False]])
    for reduction in ("mean", "mean_mass"):
        got = da.impermissible_penalty(a, m, rows=few, reduction=reduction)
        want = da.impermissible_penalty(a[:1, ::2], m[:1], reduction=reduction)
        assert_allclose(got, want, rtol=1e-6)
    worst = da.impermissible_penalty(a, m, rows=few, reduction="max")
    assert_allclose(worst, da.impermissible_penalty(a[:1, ::2], m[:1], reduction="max"), rtol=1e-6)


def test_whole_mass_stays_finite():
    a, m = jnp.array([[1.0, 0.0]]), jnp.array([[True, False]])
    loss, grad = jax.value_and_grad(lambda a: da.impermissible_penalty(a, m))(a)
    assert_allclose(loss, -np.log(1e-6), rtol=1e-4)
    assert np.isfinite(grad).all()


def test_slope(rows):
    """d/da_j of -ln(1 - Σ a m) is m_j / (1 - mass)."""
    a, m = (jnp.asarray(x) for x in rows)
    grad = jax.grad(lambda a: da.impermissible_penalty(a, m, reduction="none").sum())(a)
    mass = np.asarray(da.impermissible_mass(a, m))
    assert_allclose(grad, np.asarray(m)[:, None] / (1 - mass)[..., None], rtol=1e-5)


def test_entropy_and_divergence(rows):
    a, _ = rows
    b = np.full_like(a, 0.2)
    entropy = -(a * np.log(a)).sum(-1).mean()
    assert_allclose(da.entropy_term(jnp.asarray(a), 0.5), -0.5 * entropy, rtol=1e-5)
    got = da.divergence_term(jnp.asarray(a), jnp.asarray(b), 0.5)
    assert_allclose(got, -0.5 * (np.log(5) - entropy), rtol=1e-5)
    zero = jnp.array([[0.0, 1.0]])
    grad = jax.grad(lambda a: da.entropy_term(a) + da.divergence_term(a, zero))(zero)
    assert np.isfinite(grad).all()


def test_tasks(key):
    source = {"copy": [0, 1, 2, 3], "reverse": [3, 2, 1, 0], "flip": [1, 0, 3, 2]}
    for task, origin in source.items():
        data = da.marked_sequences(key, task, 3, 4, 9)
        assert_array_equal(data["target"], np.asarray(data["source"])[:, origin])
        assert_array_equal(data["marked"], np.eye(4, dtype=bool)[origin])
    data = da.marked_classification(key, 6, 5, 9, classes=3, signals=2)
    assert_array_equal(data["marked"].sum(1), 2)
    assert_array_equal(data["marked"][:, 0], False)
    signal = np.where(data["marked"], data["tokens"], 0).max(1)
    assert_array_equal(signal - 1, data["labels"])
    assert_array_equal(np.where(data["marked"], 9, data["tokens"])[:, 1:] > 3, True)


class Classifier(nnx.Module):
    """Two layers of attention; the second one's first row is what a user would look at."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(12, 16, rngs=rngs)
        self.first, self.last = (MultiHeadAttention(2, 16, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, tokens, edits=None):
        x = self.embed(tokens)
        x = x + self.first(x)
        y, captured = self.last(x, capture="weights", edits=edits)
        return self.head((x + y)[:, 0]), captured["weights"][:, :, 0]


def test_a_model_learns_to_hide_what_it_uses(key):
    """With the penalty the mass on the marked token vanishes and the accuracy stays."""
    graph, start = nnx.split(Classifier(nnx.Rngs(0)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train(coefficient):
        def loss(params, data):
            logits, weights = nnx.merge(graph, params)(data["tokens"])
            task = optax.softmax_cross_entropy_with_integer_labels(logits, data["labels"]).mean()
            return task + da.impermissible_penalty(weights, data["marked"], coefficient=coefficient)

        def step(carry, key):
            params, state = carry
            grads = jax.grad(loss)(params, da.marked_classification(key, 32, 7, 12))
            with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
                updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        begin = (start, optimizer.init(start))
        (params, _), _ = jax.lax.scan(step, begin, jax.random.split(key, 150))
        data = da.marked_classification(jax.random.key(7), 128, 7, 12)
        logits, weights = nnx.merge(graph, params)(data["tokens"])
        report = da.deception_report(weights, data["marked"], logits.argmax(-1) == data["labels"])
        cut = Edits(weight_edit=da.without_marked(data["marked"]))
        blind, left = nnx.merge(graph, params)(data["tokens"], cut)
        mass = da.impermissible_mass(left, data["marked"]).max()
        return report, mass, (blind.argmax(-1) == data["labels"]).mean()

    honest, mass, _ = train(0.0)
    assert mass == 0  # the cut takes all of it
    hidden, _, blind = train(1.0)
    assert_allclose(honest["tokens"], 1 / 7, rtol=1e-5)
    assert honest["accuracy"] > 0.95 and hidden["accuracy"] > 0.95
    assert hidden["mass"] < 0.01 < honest["mass"]
    assert blind > 0.95  # the last layer did not need it: the first one had moved it elsewhere


def test_bad_input(key):
    a, m = jnp.ones((2, 3, 5)) / 5, jnp.zeros((2, 5), bool)
    with pytest.raises(ValueError, match="reduction must be one of"):
        da.impermissible_penalty(a, m, reduction="sum")
    with pytest.raises(ValueError, match="marked must be"):
        da.impermissible_penalty(a, m[:, :4])
    with pytest.raises(ValueError, match="rows must have the shape"):
        da.impermissible_penalty(a, m, rows=m)
    with pytest.raises(ValueError, match="must be even"):
        da.marked_sequences(key, "flip", 1, 3, 4)
    with pytest.raises(ValueError, match="task must be one of"):
        da.marked_sequences(key, "sort", 1, 3, 4)
    with pytest.raises(ValueError, match="signals < length"):
        da.marked_classification(key, 1, 3, 9, signals=3)
