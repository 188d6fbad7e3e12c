"""What each mask shows, how masks print, compare and fail, and that they are good pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import masks as am
from tests.masks.random_masks import odd_sum

T = 12
Q, K = np.arange(T)[:, None], np.arange(T)

DEFINITIONS = [
    (am.Full(), Q == Q),
    (am.Causal(), K <= Q),
    (am.Causal(2), K <= Q + 2),
    (am.Causal(-1), K < Q),
    (am.Window(3), (K > Q - 3) & (K <= Q)),
    (am.Window(3, 2), (K > Q - 3) & (K <= Q + 2)),
    (am.Sink(2), K < 2),
    (am.Chunked(5), Q // 5 == K // 5),
    (am.Dilated(3), (Q - K) % 3 == 0),
    (am.EarlierChunks(3), K < Q // 3),
    (am.SinceGroup(5, 2), K >= Q // 5 * 5 - 2),
    (am.Causal() & am.SinceGroup(5), (K <= Q) & (Q // 5 == K // 5)),
    (am.Prefix(4), K < 4),
    (am.Causal() & (am.Window(3) | am.Sink(1)), (K <= Q) & ((K > Q - 3) | (K < 1))),
    (am.Strided(2, 3, 2, 1), (K <= Q) & ((Q // 2 - K // 2 < 2) | (K // 2 % 3 == 1))),
    (am.Strided(5, 1), K <= Q),
    (am.Strided(4, 3, 9), K <= Q),
    (am.BlockPattern(np.eye(3) > 0, 4, 4), Q // 4 == K // 4),
    (am.Predicate(odd_sum), (Q + 2 * K) % 2 == 1),
    (~am.Causal(), K > Q),
]


@pytest.mark.parametrize(("mask", "want"), DEFINITIONS, ids=[repr(m) for m, _ in DEFINITIONS])
def test_definition(mask, want):
    full = mask.dense(T)
    assert full.shape == (1, 1, T, T) and full.dtype == bool
    np.testing.assert_array_equal(full[0, 0], np.broadcast_to(want, (T, T)))
    np.testing.assert_array_equal(jax.jit(lambda: mask.dense(T))(), full)
    # a later stretch of queries is the same rows
    np.testing.assert_array_equal(mask.dense(4, T, q_offset=5)[0, 0], full[0, 0, 5:9])
    np.testing.assert_allclose(mask.density(T), np.mean(np.asarray(full)), rtol=1e-12)


def test_masks_of_sequences():
    ids = np.array([[0, 0, 1, -1], [2, 3, 3, 3]])
    got = am.Segments(ids).dense(4)
    same = (ids[:, :, None] == ids[:, None]) & (ids >= 0)[:, None]
    np.testing.assert_array_equal(got[:, 0], same)
    assert not got[0, 0, 3, 3]  # padding does not see padding
    cross = am.Segments(ids[:, :2], ids).dense(2, 4)
    np.testing.assert_array_equal(cross[:, 0], same[:, :2])
    late = am.Segments(ids[:, 2:], ids, q_start=2).dense(2, 4, q_offset=2)
    np.testing.assert_array_equal(late[:, 0], same[:, 2:])
    each = am.Segments(ids[:, :1], ids, q_start=np.array([1, 3])).dense(
        1, 4, q_offset=np.array([1, 3])
    )
    np.testing.assert_array_equal(each[:, 0, 0], [[1, 1, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(
        am.Prefix([1, 3]).dense(2, 4)[:, 0, 0], [[1, 0, 0, 0], [1, 1, 1, 0]]
    )
    lengths = am.Lengths([2, 4], [1, 2]).dense(2, 4)
    np.testing.assert_array_equal(lengths[:, 0].sum((1, 2)), [2, 8])


def test_sets_of_keys_and_queries():
    members = np.random.default_rng(0).random((2, T)) < 0.5
    got = am.key_set(members).dense(T)[:, 0]
    np.testing.assert_array_equal(got, np.broadcast_to(members[:, None], got.shape))
    by_head = members[:, :, None] & (np.arange(3) > 0)
    late = am.query_set(jnp.asarray(by_head[:, 4:]), jnp.array([4, 4])).dense(8, T, q_offset=4)
    np.testing.assert_array_equal(
        late, np.broadcast_to(by_head[:, 4:].swapaxes(1, 2)[..., None], late.shape)
    )
    end = np.random.default_rng(1).integers(0, T, (2, 3, T))
    np.testing.assert_array_equal(
        am.KeptUntil(end).dense(T), np.arange(T)[:, None] < end[:, :, None]
    )
    ids = np.array([[3, 3, 3, 5, 5, 1, 1, 1]])
    np.testing.assert_array_equal(
        am.document_sinks(ids, 2).dense(1, 8)[0, 0, 0], [1, 1, 0, 1, 1, 1, 1, 0]
    )


def test_masks_of_heads():
    by_head = am.Prefix([[0, 2, 5], [1, 1, 3]])
    assert (by_head.batch_size, by_head.num_heads) == (2, 3)
    np.testing.assert_array_equal(by_head.dense(1, 9)[:, :, 0].sum(-1), [[0, 2, 5], [1, 1, 3]])
    mask = am.per_head([am.Causal(), am.Window(2), am.Causal(), am.Full()])
    full = mask.dense(5)
    for head, part in enumerate((am.Causal(), am.Window(2), am.Causal(), am.Full())):
        np.testing.assert_array_equal(full[:, head], part.dense(5)[:, 0])
    assert mask.num_heads == 4 and len(mask.masks) == 3  # equal masks are kept once
    offsets = am.Strided(2, 3, 1, [0, 1, 2])
    for head in range(3):
        np.testing.assert_array_equal(
            offsets.dense(9)[0, head], am.Strided(2, 3, 1, head).dense(9)[0, 0]
        )
    traced = jax.jit(lambda offset: am.Strided(2, 3, 1, offset).dense(9))(jnp.array([0, 1, 2]))
    np.testing.assert_array_equal(traced, offsets.dense(9))
    assert mask.dense(5, batch=2, num_heads=4).shape == (2, 4, 5, 5)


def test_patterns_give_exact_classes_at_other_tile_sizes():
    pattern = np.array([[[1, 1, 0], [1, 1, 1]]], bool)
    mask = am.BlockPattern(pattern, 4, 2)
    start_q, start_k = np.arange(0, 8, 8)[:, None], np.arange(0, 6, 3)
    np.testing.assert_array_equal(
        mask.classify(start_q, start_q + 8, start_k, start_k + 3), [[2, 1]]
    )
    np.testing.assert_array_equal(mask.classify(0, 4, 0, 7), 1)
    np.testing.assert_array_equal(mask.classify(8, 9, 0, 2), 0)


def test_repr_reads_like_the_expression():
    mask = ~(am.Causal() & (am.Window(8) | am.Sink(2) | ~am.Dilated(3)))
    assert repr(mask) == "~(Causal() & (Window(8) | Sink(2) | ~Dilated(3)))"
    assert eval(repr(mask), vars(am)) == mask
    assert repr(am.Segments(np.zeros((2, 3), int))) == "Segments(int32[2, 3])"
    assert repr(am.Strided(4, 2, offset=[0, 1])) == "Strided(4, 2, offset=(0, 1))"
    assert repr(am.per_head([am.Full(), am.Causal(1)])) == "per_head([Full(), Causal(1)])"
    assert repr(am.Predicate(odd_sum, np.zeros(3))) == "Predicate(odd_sum, float64[3])"


def test_identity():
    def structure(mask):
        return jax.tree.structure(mask)

    a, b = am.Causal() & am.Window(4), am.Causal() & am.Window(4)
    assert a == b and hash(a) == hash(b) and structure(a) == structure(b)
    assert hash(structure(a)) == hash(structure(b))
    c = am.Causal() & am.Window(5)
    assert a != c and structure(a) != structure(c)
    assert am.Causal() & am.Sink(1) & am.Window(2) == am.Causal() & (am.Sink(1) & am.Window(2))
    ids = np.zeros((2, 4), int)
    assert am.Segments(ids) == am.Segments(ids.copy()) != am.Segments(ids + 1)
    assert structure(am.Segments(ids)) == structure(am.Segments(ids + 1))
    assert len({a, b, c, am.Segments(ids), am.Segments(ids.copy())}) == 3
    assert structure(am.Prefix(3)) != structure(am.Prefix(4))
    assert structure(am.Prefix(np.array([3]))) == structure(am.Prefix(np.array([4])))
    assert am.Sink(4) != am.Prefix(4) and am.Sink(4) != "Sink(4)"
    # placeholders in the place of arrays keep the structure
    mask = am.Segments(ids) & am.Strided(2, 2, offset=[0, 1]) & am.Predicate(odd_sum, ids)
    shapes = jax.tree.map(np.shape, mask)
    assert structure(jax.tree.map(lambda x: 0, mask)) == structure(mask)
    assert shapes.masks[0].query_ids == (2, 4)


def test_values_do_not_recompile_but_shapes_of_masks_do():
    traces = []

    @jax.jit
    def count(mask):
        traces.append(mask)
        return mask.dense(4, 4).sum()

    ids = np.array([[0, 0, 1, 1]])
    assert count(am.Causal() & am.Segments(ids)) == 6
    assert count(am.Causal() & am.Segments(ids * 0)) == 10
    assert len(traces) == 1 and not traces[0].is_static
    assert count(am.Causal() & am.Segments(ids) & am.Window(2)) == 6
    assert count(am.Causal() & am.Segments(ids) & am.Window(1)) == 4
    assert len(traces) == 3
    assert count(am.Prefix(np.array([2]))) == count(am.Prefix(jnp.array([2]))) == 8
    assert len(traces) == 4
    assert am.Segments(jnp.asarray(ids)).is_static


def test_masks_pass_through_vmap_and_scan():
    lengths = jnp.array([1, 3, 4])
    sums = jax.vmap(lambda n: am.Prefix(n).dense(1, 4).sum())(lengths)
    np.testing.assert_array_equal(sums, lengths)
    _, sums = jax.lax.scan(lambda c, m: (c, m.dense(1, 4).sum()), 0, am.Prefix(lengths))
    np.testing.assert_array_equal(sums, lengths)


def test_static_classes_stay_static_inside_jit():
    mask = am.Causal() & am.Segments(jnp.array([[0, 0, 1, 1]]))

    @jax.jit
    def inside(x):
        assert isinstance(mask.classify(0, 2, 0, 2), np.ndarray)
        return x

    inside(0)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: am.Window(0), ValueError, "Window: left must be at least 1"),
        (lambda: am.Window(-3), ValueError, "got left=-3"),
        (lambda: am.Window(3, -1), ValueError, "Window: right must be at least 0"),
        (lambda: am.Window(2.5), TypeError, "Window: left must be an integer"),
        (lambda: am.Sink(-1), ValueError, "Sink: n must be at least 0"),
        (lambda: am.Chunked(0), ValueError, "Chunked: size"),
        (lambda: am.Dilated(0), ValueError, "Dilated: dilation"),
        (lambda: am.Strided(4, 0), ValueError, "Strided: stride"),
        (lambda: am.Strided(4, 2, 0), ValueError, "Strided: local_blocks"),
        (lambda: am.Strided(4, 2, offset=[]), (ValueError, TypeError), "Strided: offset"),
        (lambda: am.Strided(4, 2, offset=[[1]]), ValueError, "rank 1"),
        (lambda: am.Prefix(-1), ValueError, "Prefix: n"),
        (lambda: am.Prefix(np.zeros(3)), TypeError, "float64"),
        (lambda: am.Segments(np.zeros(3, int)), ValueError, r"rank 2, got shape \(3,\)"),
        (lambda: am.Segments(jnp.zeros((2, 3))), TypeError, "integers, got float32"),
        (
            lambda: am.Segments(np.zeros((2, 3), int), np.zeros((3, 3), int)),
            ValueError,
            "same batch size",
        ),
        (lambda: am.Lengths(np.zeros((2, 3), int)), ValueError, "rank 1"),
        (lambda: am.Lengths([1, 2], [1, 2, 3]), ValueError, "different batch_size"),
        (lambda: am.BlockPattern(np.ones((2, 2)), 4), TypeError, "must be boolean"),
        (lambda: am.BlockPattern(np.ones(2, bool), 4), ValueError, "must have shape"),
        (lambda: am.BlockPattern(np.ones((2, 2), bool), 0), ValueError, "block_q"),
        (lambda: am.Predicate(3), TypeError, "must be a function"),
        (
            lambda: am.Predicate(lambda b, h, q, k: q + k).dense(3),
            TypeError,
            "must return booleans",
        ),
        (lambda: am.per_head([]), ValueError, "empty sequence"),
        (lambda: am.per_head([am.Causal(), 3]), TypeError, "member 1 must be a mask"),
        (lambda: am.per_head([am.per_head([am.Full()] * 3)]), ValueError, "made for 3 heads"),
        (
            lambda: am.per_head([am.Full()] * 2) & am.per_head([am.Full()] * 3),
            ValueError,
            "different num_heads",
        ),
        (lambda: am.Causal() | np.ones((2, 2), bool), TypeError, r"array of shape \(2, 2\)"),
        (lambda: np.ones((2, 2), bool) & am.Causal(), TypeError, "with another mask only"),
        (lambda: am.Causal() and am.Window(3), TypeError, "use &|instead of and"),
        (lambda: am.Prefix([1, 2]).dense(3, batch=4), ValueError, "batch_size|batch=2"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_traced_masks_refuse_pictures():
    with pytest.raises(ValueError, match="outside of jax.jit"):
        jax.jit(lambda n: am.Prefix(n).density(4))(jnp.array([1]))
    with pytest.raises(ValueError, match="outside of jax.jit"):
        jax.jit(lambda n: am.Prefix(n).plot(4))(jnp.array([1]))


def test_density_of_long_sequences():
    mask = am.Causal() & (am.Window(1024) | am.Sink(4))
    length = 2**16
    q = np.arange(length)
    visible = np.minimum(q + 1, 1024) + np.clip(q + 1 - 1024, 0, 4)
    np.testing.assert_allclose(mask.density(length), visible.sum() / length**2, rtol=1e-12)
    assert mask.density(1024, block=(256, 128)) == (4 * 8 - (0 + 2 + 4 + 6)) / 32 - 0.0
    assert am.Prefix([2, 4]).density(2, 4) == 0.75


@pytest.mark.parametrize(
    ("mask", "length", "panels"),
    [
        (am.Causal() & (am.Window(12) | am.Sink(2)), 50, 1),
        (am.Strided(4, 3, 2, [0, 1, 2]), 40, 3),
        (am.Causal() & am.Window(4096), 65536, 1),
        (am.Segments(np.array([[0, 1, 1, -1]])), 4, 1),
    ],
)
def test_pictures(mask, length, panels):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = mask.plot(length)
    axes = axes if panels > 1 else [axes]
    assert len(axes) == panels
    figure = axes[0].figure
    figure.canvas.draw()
    title = axes[0].get_title() if panels == 1 else figure.get_suptitle()
    assert title == repr(mask)
    assert axes[0].get_ylabel() == "query (tokens)" and axes[-1].get_xlabel() == "key (tokens)"
    if length <= 50:
        image = np.asarray(axes[0].images[0].get_array())
        np.testing.assert_array_equal(image >= 2, np.asarray(mask.dense(length))[0, 0])
    plt.close(figure)
    figure, ax = plt.subplots()
    mask.plot(length, ax=ax)
    figure.canvas.draw()
    plt.close(figure)
