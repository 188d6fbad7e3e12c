"""Block lists against brute force, static and traced."""

import time

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnjax import masks as am
from pallas_kernels.blocklist import BlockList, block_list, block_list_from_map
from pallas_kernels.maskprogram import EMPTY, FULL, PARTIAL
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


def brute_map(full, block_q, block_kv):
    """Classes [b, h, nq, nk] of a spelled-out mask; a ragged last column is never FULL."""
    q_len, kv_len = full.shape[2:]
    out = np.zeros((*full.shape[:2], -(-q_len // block_q), -(-kv_len // block_kv)), np.int8)
    for b, h, i, j in np.ndindex(out.shape):
        rows, columns = (
            slice(i * block_q, (i + 1) * block_q),
            slice(j * block_kv, (j + 1) * block_kv),
        )
        out[b, h, i, j] = brute_class(full[b, h, rows, columns])
        if (j + 1) * block_kv > kv_len:
            out[b, h, i, j] = min(out[b, h, i, j], PARTIAL)
    return out


def rows_of(lists, kind):
    count, cols = getattr(lists, f"{kind}_count"), getattr(lists, f"{kind}_cols")
    count, cols = np.asarray(count), np.asarray(cols)
    assert count.dtype == cols.dtype == np.int32 and cols.shape[-1] >= 1
    listed = {}
    for row in np.ndindex(count.shape):
        n = count[row]
        listed[row] = cols[row][:n].tolist()
        padding = cols[row][n:]
        assert (padding == (cols[row][n - 1] if n else 0)).all()
    return listed


def check_lists(lists, classes):
    for kind, value in (("partial", PARTIAL), ("full", FULL)):
        want = {
            row: np.flatnonzero(classes[row] == value).tolist()
            for row in np.ndindex(classes.shape[:3])
        }
        assert rows_of(lists, kind) == want


@relaxed(cases(100))
@given(data=st.data())
def test_lists_equal_brute_force(data):
    q_len, kv_len = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    block_q, block_kv = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    offset = data.draw(st.integers(0, 9))
    mask = data.draw(closed_forms(max(q_len, kv_len)))
    lists = block_list(mask, q_len, kv_len, block_q=block_q, block_kv=block_kv, q_offset=offset)
    assert lists.is_static
    full = spelled_out(mask, q_len, kv_len, offset)
    want = brute_map(full, block_q, block_kv)
    nb, nh = lists.partial_count.shape[:2]
    assert nb in (1, BATCH) and nh in (1, HEADS)
    assert nb == (mask.batch_size or 1) and nh == (mask.num_heads or 1)
    np.testing.assert_array_equal(np.broadcast_to(lists.class_map(), want.shape), want)
    check_lists(lists, want[:nb, :nh])
    flipped = lists.transpose()
    assert flipped.transposed and flipped.num_kv_blocks == lists.num_kv_blocks
    check_lists(flipped, want[:nb, :nh].swapaxes(-1, -2))
    assert_equal_lists(flipped.transpose(), lists)
    stats = lists.stats()
    assert stats["full"] == (want[:nb, :nh] == FULL).sum()
    assert stats["visited"] == (want[:nb, :nh] != EMPTY).sum() == stats["full"] + stats["partial"]
    assert stats["total"] == want[:nb, :nh].size
    assert stats["density"] == stats["visited"] / stats["total"] == flipped.stats()["density"]


@relaxed(cases(8, 200))
@given(data=st.data())
def test_traced_lists_equal_static_ones(data):
    q_len, kv_len = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 30))
    block_q, block_kv = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    mask = data.draw(compositions(max(q_len, kv_len)))
    offset = np.array(data.draw(st.lists(st.integers(0, 9), min_size=BATCH, max_size=BATCH)))

    def build(mask, offset):
        lists = block_list(mask, q_len, kv_len, block_q=block_q, block_kv=block_kv, q_offset=offset)
        return lists, lists.transpose(), lists.stats()

    static, flipped, stats = build(mask, offset)
    traced, traced_flipped, traced_stats = jax.jit(build)(mask, offset)
    for got, want in ((traced, static), (traced_flipped, flipped)):
        np.testing.assert_array_equal(got.class_map(), want.class_map())
        for kind in ("partial", "full"):
            assert rows_of(got, kind) == rows_of(want, kind)
    for name in stats:
        np.testing.assert_allclose(traced_stats[name], stats[name], rtol=1e-6)


def assert_equal_lists(x, y):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)


def test_traced_arrays_give_traced_lists():
    ids = np.array([[0, 0, 1, 1, -1, -1], [0, 1, 2, 3, 4, 5]])

    @jax.jit
    def lists(ids, offset):
        made = block_list(
            am.Causal() & am.Segments(ids, q_start=offset),
            6,
            6,
            block_q=2,
            block_kv=3,
            q_offset=offset,
        )
        assert not made.is_static
        return made

    got = lists(ids, 0)
    np.testing.assert_array_equal(got.partial_count[:, 0], [[1, 2, 0], [1, 2, 1]])
    assert isinstance(got, BlockList) and got.is_static


def test_full_tiles_beyond_the_last_key_become_partial():
    lists = block_list(am.Full(), 5, 5, block_q=4, block_kv=4)
    np.testing.assert_array_equal(lists.class_map()[0, 0], [[FULL, PARTIAL], [FULL, PARTIAL]])


def test_lists_from_a_map():
    classes = np.array([[[[EMPTY, PARTIAL, FULL], [EMPTY, EMPTY, EMPTY]]]])
    lists = block_list_from_map(classes, 4, 6, block_q=2, block_kv=2)
    check_lists(lists, classes)
    traced = jax.jit(lambda c: block_list_from_map(c, 4, 6, block_q=2, block_kv=2))(classes)
    check_lists(traced, classes)
    routed = block_list_from_map(classes > 0, 4, 6, block_q=2, block_kv=2)
    assert routed.stats()["partial"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_q": 0}, "block_q must be at least 1"),
        ({"num_heads": 4}, "num_heads=3"),
        ({"batch": 5}, "batch=2"),
        ({"q_offset": np.zeros((2, 2), int)}, "q_offset"),
    ],
)
def test_bad_input(change, message):
    mask = am.Strided(2, 3, offset=[0, 1, 2]) & am.Prefix([1, 2])
    arguments = {"block_q": 4, "block_kv": 4} | change
    with pytest.raises(ValueError, match=message):
        block_list(mask, 8, 8, **arguments)
    with pytest.raises(ValueError, match="class_map must have shape"):
        block_list_from_map(np.zeros((1, 1, 3, 3)), 8, 8, block_q=4, block_kv=4)


@pytest.mark.parametrize(("length", "block", "budget"), [(2**20, 1024, 0.100), (2**17, 512, 0.050)])
def test_long_sequences_take_milliseconds(length, block, budget):
    mask = am.Causal() & (am.Window(4096) | am.Sink(4))
    seconds = []
    for _ in range(10):  # the best of several runs: a busy machine is no defect
        start = time.perf_counter()
        lists = block_list(mask, length, length, block_q=block, block_kv=block)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < budget
    near = min(4096 // block + 1, length // block)
    assert lists.partial_count.max() + lists.full_count.max() <= near + 2
    assert lists.partial_cols.shape[-1] <= 3
