"""Masks of prompts: their definitions, and tile classes against the predicate."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from attnjax.masks import Causal
from attnjax.masks.multihop import (
    Documents,
    Rectangle,
    between_documents,
    causal_within_document,
    prefix_lm,
)

T = 12
Q, K = np.arange(T)[:, None], np.arange(T)
IDS = np.array([-1, -1, 0, 0, 0, 1, 1, 2, 2, 2, -1, -1])
SAME, INSIDE = IDS[:, None] == IDS, (IDS[:, None] >= 0) & (IDS >= 0)

DEFINITIONS = {
    "prefix_lm": (prefix_lm(5), (K <= Q) | (K < 5)),
    "causal_within_document": (causal_within_document(IDS[None]), (K <= Q) & SAME & INSIDE),
    "between_documents": (between_documents(IDS[None]), ~SAME & INSIDE),
    "rectangle": (Rectangle(2, 5, 6, 11), (Q >= 2) & (Q < 5) & (K >= 6) & (K < 11)),
    "no rectangle": (Rectangle(5, 5, 2, 8), Q + K < 0),
    "combination": (
        Causal() | Rectangle(2, 5, 5, 8),
        (K <= Q) | ((Q >= 2) & (Q < 5) & (K >= 5) & (K < 8)),
    ),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_definition(name):
    mask, want = DEFINITIONS[name]
    assert_array_equal(mask.dense(T)[0, 0], want)
    assert_array_equal(jax.jit(lambda m: m.dense(T))(mask)[0, 0], want)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_classes_keep_their_promise(name):
    mask, _ = DEFINITIONS[name]
    full = np.asarray(mask.dense(T))[0, 0]
    for q0, q1, k0, k1 in itertools.product(range(0, T, 3), (4, 8, T), range(0, T, 3), (5, 9, T)):
        area = full[q0:q1, k0:k1]
        found = int(mask.classify(q0, q1, k0, k1))
        if area.size and found != 1:
            assert area.all() if found == 2 else not area.any()


def test_rectangle_classes_are_exact_and_go_by_row():
    mask = Rectangle(jnp.array([0, 4]), jnp.array([4, 8]), 0, jnp.array([4, 0]))
    assert mask.batch_size == 2
    got = mask.classify(0, 4, 0, 4, b=np.arange(2))
    assert got.tolist() == [2, 0]
    assert int(mask.classify(0, 4, 0, 4)) == 1


def test_rectangle_of_other_shapes():
    with pytest.raises(ValueError, match="rank 0 or 1"):
        Rectangle(np.zeros((2, 2), int), 1, 0, 1)
    with pytest.raises(ValueError, match="batch_size"):
        Rectangle(np.zeros(2, int), np.zeros(3, int), 0, 1)


def test_documents():
    documents = Documents.create([3, 0], [[4, 2, 3], [0, 5, 0]])
    index = jnp.broadcast_to(jnp.arange(15, dtype=jnp.int32)[None], (2, 15))
    assert documents.stop.tolist() == [12, 5]
    assert documents.ids(index).tolist() == [
        [-1, -1, -1, 0, 0, 0, 0, 1, 1, 2, 2, 2, -1, -1, -1],
        [1] * 5 + [-1] * 10,
    ]
    assert documents.positions(index).tolist() == [
        [0, 1, 2, 8, 9, 10, 11, 10, 11, 9, 10, 11, 12, 13, 14],
        list(range(15)),
    ]
    with pytest.raises(ValueError, match="disagree"):
        Documents.create([1, 2], [[3], [4], [5]])
    with pytest.raises(ValueError, match="at least 0"):
        Documents.create(1, [3, -1])
