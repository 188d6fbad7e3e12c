"""The classifier of tiles against the predicate, element by element."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnjax import masks as am
from pallas_kernels.compat import enable_x64
from pallas_kernels.maskprogram import EMPTY, FULL, PARTIAL, both, either, negate
from tests.masks.random_masks import (
    BATCH,
    HEADS,
    brute_class,
    cases,
    closed_forms,
    compositions,
    spelled_out,
)


def relaxed(max_examples):
    return settings(
        max_examples=max_examples, deadline=None, suppress_health_check=list(HealthCheck)
    )


lengths = st.integers(1, 40)


def check_random_tiles(data, exact):
    q_len, kv_len = data.draw(lengths), data.draw(lengths)
    strategy = closed_forms if exact else compositions
    mask = data.draw(strategy(max(q_len, kv_len)))
    full = spelled_out(mask, q_len, kv_len)
    ends = [
        np.sort(np.asarray(data.draw(st.lists(st.tuples(e, e), min_size=8, max_size=8))), axis=1)
        for e in (st.integers(0, q_len), st.integers(0, kv_len))
    ]
    (q0, q1), (k0, k1) = ends[0].T, ends[1].T
    b, h = np.arange(BATCH)[:, None, None], np.arange(HEADS)[:, None]
    got = mask.classify(q0, q1, k0, k1, b=b, h=h)
    assert isinstance(got, np.ndarray) and got.dtype == np.int8
    got = np.broadcast_to(got, (BATCH, HEADS, 8))
    whole = np.broadcast_to(mask.classify(q0, q1, k0, k1), (8,))
    for i in range(8):
        area = full[:, :, q0[i] : q1[i], k0[i] : k1[i]]
        for j in np.ndindex(BATCH, HEADS):
            want = brute_class(area[j])
            assert got[*j, i] in ((want,) if exact else (want, PARTIAL)), (mask, j, i)
        # asking about all rows and heads at once must hold for each of them
        assert whole[i] in (brute_class(area), PARTIAL)


@relaxed(cases(200))
@given(data=st.data())
def test_classes_hold_for_random_compositions(data):
    check_random_tiles(data, exact=False)


@pytest.mark.exhaustive
@relaxed(2000)
@given(data=st.data())
def test_classes_hold_for_many_random_compositions(data):
    check_random_tiles(data, exact=False)


@relaxed(cases(200))
@given(data=st.data())
def test_closed_forms_are_exact(data):
    check_random_tiles(data, exact=True)


@relaxed(cases(15, 300))
@given(data=st.data())
def test_traced_classes_equal_static_ones(data):
    length = data.draw(st.integers(1, 33))
    mask = data.draw(compositions(length))
    block = data.draw(st.integers(1, 12))
    start = np.arange(0, length, block)
    ends = start[:, None], np.minimum(start + block, length)[:, None], start, start + block
    b, h = np.arange(BATCH)[:, None, None, None], np.arange(HEADS)[:, None, None]

    def classify(mask, ends):
        return mask.classify(*ends, b=b, h=h)

    static = classify(mask, ends)
    np.testing.assert_array_equal(jax.jit(classify)(mask, ends), static)
    np.testing.assert_array_equal(jax.jit(lambda m: classify(m, ends))(mask), static)


def test_sorted_segments_are_exact():
    ids = np.repeat([[0, 1, 2, 3, -1]], [7, 1, 12, 9, 3], axis=1)
    mask = am.Segments(ids)
    full = spelled_out(mask, 32, 32)
    start = np.arange(0, 32, 4)
    got = mask.classify(start[:, None], start[:, None] + 4, start, start + 4)
    want = [[brute_class(full[0, 0, i : i + 4, j : j + 4]) for j in start] for i in start]
    np.testing.assert_array_equal(got, want)


def test_laws_of_combination():
    c = np.array([EMPTY, PARTIAL, FULL], np.int8)
    x, y = c[:, None], c
    np.testing.assert_array_equal(both(x, y), [[0, 0, 0], [0, 1, 1], [0, 1, 2]])
    np.testing.assert_array_equal(either(x, y), [[0, 1, 2], [1, 1, 2], [2, 2, 2]])
    np.testing.assert_array_equal(negate(c), [2, 1, 0])
    np.testing.assert_array_equal(negate(both(x, y)), either(negate(x), negate(y)))


@relaxed(cases(50))
@given(data=st.data())
def test_de_morgan_and_double_negation(data):
    a, b = data.draw(compositions(9)), data.draw(compositions(9))
    x, y = spelled_out(a, 9, 9), spelled_out(b, 9, 9)
    np.testing.assert_array_equal(spelled_out(~(a & b), 9, 9), ~x | ~y)
    np.testing.assert_array_equal(spelled_out(~a | ~b, 9, 9), ~(x & y))
    assert ~~a == a


@relaxed(cases(30, 300))
@given(data=st.data())
def test_traced_predicates_equal_static_ones(data):
    mask = data.draw(compositions(12))
    b, h, q, k = np.indices((BATCH, HEADS, 12, 12), sparse=True, dtype=np.int32)
    got = mask.predicate(*map(jnp.asarray, (b, h, q - 3, k)))
    want = np.broadcast_to(mask.predicate(b, h, q - 3, k), (BATCH, HEADS, 12, 12))
    np.testing.assert_array_equal(jnp.broadcast_to(got, want.shape), want)
    with enable_x64(True):  # indices of the wider type, tables of the narrower one
        wide = mask.predicate(*(jnp.asarray(x, jnp.int64) for x in (b, h, q - 3, k)))
        np.testing.assert_array_equal(jnp.broadcast_to(wide, want.shape), want)


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "jaxpr"):
                yield from primitives(inner.jaxpr)
        yield equation.primitive.name, [v.aval.dtype for v in equation.invars[1:]]


@pytest.mark.parametrize(
    "mask",
    [
        am.Causal(3) & (am.Window(5, 2) | am.Sink(2) | am.Prefix(3)),
        ~am.Chunked(6) | am.Chunked(8) | am.Dilated(3),
        am.Strided(6, 3, 2, [0, 1, 2]),
        am.per_head([am.Causal(), am.Window(3), am.Causal()]),
    ],
    ids=repr,
)
def test_predicates_fit_every_kernel_language(mask):
    index = [jax.ShapeDtypeStruct(s, jnp.int32) for s in ((), (), (8, 1), (1, 8))]
    used = list(primitives(jax.make_jaxpr(mask.predicate)(*index).jaxpr))
    # sign asks for the device's generation; Mosaic cannot select between booleans
    assert "sign" not in {name for name, _ in used}
    assert not any(name == "select_n" and np.bool_ in types for name, types in used)
    assert not any(name in ("gather", "dynamic_slice") for name, _ in used)


def test_a_tile_without_elements_is_empty():
    assert am.Full().classify(3, 3, 0, 4) == EMPTY
    assert (~am.Causal()).classify(0, 4, 4, 4) == EMPTY
