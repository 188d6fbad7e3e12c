"""Tile order, the mask on it, and its classes of tiles, against loops over tokens."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pallas_kernels.blocklist import block_list
from pallas_kernels.flash import FlashSpec
from pallas_kernels.flash.tpu_blocks import choose_blocks
from pallas_kernels.maskprogram import EMPTY, FULL
from pallas_kernels.neighborhood import (
    NeighborhoodSpec,
    TokenLayout,
    permute_tokens,
    token_layout,
    unpermute_tokens,
)
from pallas_kernels.neighborhood.attention import _config as kernel_config
from pallas_kernels.neighborhood.boxes import Boxes, pack, visible
from pallas_kernels.neighborhood.windows import Axis
from tests.neighborhood.naive import axis_mask, dense_mask, random_case

RANKS = (1, 2, 3)


def random_tile(rng, rank):
    return tuple(int(n) for n in rng.choice([1, 2, 3, 4, 5, 8], rank))


def slots(layout, array):
    """A NumPy array over tokens, [n, ...], by slot: [groups, group_length, ...], -1 in padding."""
    shape = (1, *layout.shape, *array.shape[1:])
    moved = np.array(permute_tokens(jnp.asarray(array + 1).reshape(shape), layout))[0] - 1
    return moved.reshape(layout.groups, layout.group_length, *array.shape[1:])


def expected(spec, case):
    """The mask by slot, [groups, t, s], from the loops over tokens."""
    mask = dense_mask(**case)
    tokens = np.arange(np.prod(spec.shape))
    of_q, of_k = slots(spec.q_layout, tokens), slots(spec.kv_layout, tokens)
    found = mask[of_q[:, :, None], of_k[:, None, :]]
    return found & (of_q >= 0)[:, :, None] & (of_k >= 0)[:, None, :]


def got_mask(mask, groups, t, s):
    b, q, k = np.arange(groups)[:, None, None], np.arange(t)[None, :, None], np.arange(s)
    return np.broadcast_to(mask.predicate(b, 0, q, k), (groups, t, s))


@pytest.mark.parametrize("rank", RANKS)
def test_round_trip(rank):
    rng = np.random.default_rng(rank)
    for _ in range(6):
        shape = tuple(int(n) for n in rng.integers(1, 9, rank))
        dilation = tuple(int(n) for n in rng.integers(1, 4, rank))
        splits = tuple(int(i) for i in rng.integers(0, rank, rng.integers(0, 4)))
        layout = TokenLayout(shape, random_tile(rng, rank), dilation, splits)
        x = jnp.asarray(rng.standard_normal((2, *shape, 3)), jnp.float32)
        y = permute_tokens(x, layout)
        assert y.shape == (2, layout.length, 3)
        assert_array_equal(unpermute_tokens(y, layout), x)
        is_token = layout.is_token()
        assert is_token.sum() == np.prod(shape)
        assert_array_equal(np.asarray(y)[:, ~is_token], 0)
        # slots say where they come from: group, then in-group index
        at, groups = layout.coordinates(), layout.group_coordinates()
        place = at[None] * np.array(dilation)[:, None] + groups[:, :, None]
        place = place.transpose(1, 0, 2).reshape(rank, -1)[:, is_token]
        assert_array_equal(np.asarray(y)[:, is_token], np.asarray(x)[(slice(None), *place)])


def test_tiles_are_boxes():
    layout = TokenLayout((6, 8), (3, 4), (1, 1))
    x = jnp.arange(48).reshape(1, 6, 8)
    first = np.asarray(permute_tokens(x, layout))[0, :12]
    assert_array_equal(first, np.arange(48).reshape(6, 8)[:3, :4].ravel())


@pytest.mark.parametrize(
    "layout",
    [
        NeighborhoodSpec((64, 96), 9).q_layout,
        NeighborhoodSpec((64, 96), 9).kv_layout,
        NeighborhoodSpec((16, 24, 32), (3, 5, 9)).kv_layout,
        TokenLayout((13, 21), (2, 3), (1, 1), (1, 1, 0)),
    ],
)
def test_paired_tiles_are_boxes_too(layout):
    at = layout.coordinates()
    for level in range(len(layout.splits) + 1):
        box = layout.block(level)
        runs = at.reshape(len(box), -1, int(np.prod(box)))
        assert runs.shape[2] == np.prod(layout.tile) << level
        corner = runs.min(axis=2)
        assert_array_equal(runs.max(axis=2) - corner + 1, np.array(box)[:, None] + 0 * corner)


def test_pairs_cost_no_padding():
    for shape in ((56, 56), (30, 48, 80), (300,), (17, 40)):
        spec = NeighborhoodSpec(shape, 5)
        for layout in (spec.q_layout, spec.kv_layout):
            assert layout.length == TokenLayout(shape, layout.tile, layout.dilation).length


@pytest.mark.parametrize("causal", [False, True])
def test_bounds_are_the_text(causal):
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(1, 40))
        d = int(rng.integers(1, n + 1))
        w = int(rng.integers(1, n // d + 1))
        s = int(rng.integers(1, w + 1))
        axis, want = Axis(n, w, s, d, causal), axis_mask(n, w, s, d, causal)
        for group in range(d):
            first, last = axis.bounds(group)
            p = np.arange(axis.group_length(group))
            got = (p >= first[:, None]) & (p <= last[:, None])
            assert_array_equal(got, want[group::d, group::d])
        assert axis.pairs() == want.sum()
        assert (
            axis.is_full
            == bool(
                not causal
                and want.sum() == sum(axis.group_length(g) ** 2 for g in range(d))
                and axis.is_even
            )
            or causal
        )


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("seed", range(4))
def test_predicate_and_classes(rank, seed):
    """The predicate is the text; FULL tiles are all true, EMPTY ones all false, none is missed."""
    rng = np.random.default_rng((seed, rank))
    for _ in range(5):
        case = random_case(rng, rank)
        tiles = {"q_tile": random_tile(rng, rank), "kv_tile": random_tile(rng, rank)}
        spec = NeighborhoodSpec(**case, **tiles)
        additional = int(rng.integers(0, 3)) * 5
        groups, want = spec.q_layout.groups, expected(spec, case)
        t, s = want.shape[1:]
        seen = want.any(2, keepdims=True)  # padding sees no additional keys either
        want = np.concatenate([want, np.repeat(seen, additional, axis=2)], axis=2)
        mask = spec.mask(2, additional)
        got = got_mask(mask, groups, t, s + additional)
        assert_array_equal(got, want, err_msg=f"{case} {tiles}")
        block_q, block_kv = spec.block_sizes
        lists = block_list(
            mask, t, s + additional, block_q=block_q, block_kv=block_kv, batch=2 * groups
        )
        classes = lists.class_map()[:, 0]
        count = len(classes) if mask.batch_size is None else groups
        for group in range(count):
            for i in range(lists.num_q_blocks):
                for j in range(lists.num_kv_blocks):
                    part = want[group, i * block_q :][:block_q, j * block_kv :][:, :block_kv]
                    kind = classes[group, i, j]
                    # tiles are boxes, so both promises hold in both directions
                    assert (kind == EMPTY) == (not part.any())
                    whole = part.all() and part.shape[1] == block_kv
                    assert (kind == FULL) == whole or j * block_kv + block_kv > s
                    assert kind != FULL or part.all()


@pytest.mark.parametrize("rank", RANKS)
def test_classes_of_any_interval_keep_their_promise(rank):
    rng = np.random.default_rng(rank)
    for _ in range(6):
        case = random_case(rng, rank)
        spec = NeighborhoodSpec(**case, q_tile=random_tile(rng, rank))
        want = expected(spec, case)
        groups, t, s = want.shape
        q0, k0 = rng.integers(0, t, 80), rng.integers(0, s, 80)
        q1, k1 = (np.minimum(x + rng.integers(0, 20, 80), n) for x, n in ((q0, t), (k0, s)))
        for group in range(groups):
            mask = spec.mask()
            kinds = mask.classify(q0, q1, k0, k1, b=np.full(80, group))
            for kind, a, b, c, d in zip(kinds, q0, q1, k0, k1):
                part = want[group, a:b, c:d]
                assert kind != EMPTY or not part.any()
                assert kind != FULL or (part.size and part.all())


def test_words_of_many_bits_are_split():
    rng = np.random.default_rng(0)
    first = rng.integers(0, 1 << 13, (3, 1, 50), np.int32)
    last = first + rng.integers(0, 1 << 12, (3, 1, 50), np.int32)
    at = rng.integers(0, 1 << 13, (3, 400), np.int32)
    words = pack(Boxes(first, last, at, at))
    assert [bool(w.guards) for w in words] == [True, False]
    got = visible(words, 0, np.arange(50)[:, None], np.arange(400)[None])
    inside = (first[:, 0, :, None] <= at[:, None]) & (at[:, None] <= last[:, 0, :, None])
    assert_array_equal(got, inside.all(0))
    assert 0 < got.sum() < got.size


def test_masks_are_hashable_values():
    a, b = (NeighborhoodSpec((8, 8), 3).mask(2) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a.is_static
    assert a != NeighborhoodSpec((8, 8), 5).mask(2)
    assert a.batch_size is None and NeighborhoodSpec((9, 8), 3, dilation=2).mask(2).batch_size == 8


@pytest.mark.parametrize("stride,most", [(1, 1.6), (16, 1.15)])
def test_visited_share_of_a_large_map(stride, most):
    spec = NeighborhoodSpec((256, 256), (80, 80), stride)
    found = spec.efficiency()
    assert found.ideal == (80 * 80) / 256**2
    assert found.overhead <= most
    assert found.full + found.partial == pytest.approx(1)


def test_efficiency_counts_the_tiles_of_the_lists():
    for case in (
        dict(shape=(40, 56), kernel_size=(7, 12), dilation=(2, 1)),
        dict(shape=(300,), kernel_size=60, is_causal=True),
        dict(shape=(10, 12, 14), kernel_size=5, stride=(1, 2, 4)),
    ):
        spec = NeighborhoodSpec(**case)
        (t, s), (bq, bk) = (
            (spec.q_layout.group_length, spec.kv_layout.group_length),
            spec.block_sizes,
        )
        stats = block_list(spec.mask(), t, s, block_q=bq, block_kv=bk).stats()
        found = spec.efficiency()
        assert found.tiles == stats["visited"] * spec.q_layout.groups
        assert found.full == pytest.approx(stats["full"] / stats["visited"])
        assert found.ideal == pytest.approx(dense_mask(**case).mean())
        assert "pairs computed" in str(found)


def test_efficiency_of_larger_blocks():
    spec = NeighborhoodSpec((128, 96), (40, 24))
    t, s = spec.q_layout.group_length, spec.kv_layout.group_length
    for bq, bk in ((128, 128), (512, 256), (1024, 1024)):
        found = spec.efficiency(bq, bk)
        assert (
            found.tiles == block_list(spec.mask(), t, s, block_q=bq, block_kv=bk).stats()["visited"]
        )
    with pytest.raises(ValueError, match="block_q=192 is no box"):
        spec.efficiency(192)


def test_bytes_of_the_tile_order():
    spec = NeighborhoodSpec((256, 256), 80)
    assert spec.permute_bytes(24, 128) == 4 * 2 * 256 * 256 * 24 * 128 * 2
    layout = token_layout((256, 256), kernel_size=80)
    assert NeighborhoodSpec((256, 256), 80, order=layout).permute_bytes(24, 128) == 0
    padded = NeighborhoodSpec((17, 17), 5)
    slots = padded.q_layout.length
    assert padded.permute_bytes(1, 8, itemsize=4) == 4 * (17 * 17 + slots) * 8 * 4


def test_a_large_map_is_formed_quickly():
    start = time.process_time()  # what the machine does besides does not count
    spec = NeighborhoodSpec((512, 512), (33, 47), (1, 2))
    t, (bq, bk) = spec.q_layout.group_length, spec.block_sizes
    lists = block_list(spec.mask(), t, t, block_q=bq, block_kv=bk)
    lists.transpose()
    assert time.process_time() - start < 0.2
    assert lists.partial_cols.nbytes + lists.full_cols.nbytes < 1 << 20


def test_layouts_are_shared_by_windows_of_one_dilation():
    layout = token_layout((16, 16), kernel_size=5, dilation=2)
    spec = NeighborhoodSpec((16, 16), 3, dilation=2, order=layout)
    assert spec.q_layout == layout == spec.kv_layout and not spec.fixed
    with pytest.raises(ValueError, match="one tile shape"):
        NeighborhoodSpec((16, 16), 3, q_tile=4, kv_tile=8, alike=True)


def test_wrong_arrays_for_a_layout():
    layout = TokenLayout((4, 6), (2, 2), (1, 1))
    with pytest.raises(ValueError, match=r"permute_tokens: x must have shape \[batch, \*\(4, 6\)"):
        permute_tokens(jnp.zeros((1, 6, 4, 2)), layout)
    with pytest.raises(ValueError, match=r"unpermute_tokens: x must have shape \[batch, 24"):
        unpermute_tokens(jnp.zeros((1, 25, 2)), layout)


@pytest.mark.parametrize(("stride", "most"), [(1, 1.6), (16, 1.15)])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_tpu_kernels_take_tiles_that_windows_fill(stride, most, kernel):
    """Pairs computed per visible pair on a 256 x 256 map, with the tiles that a TPU chooses."""
    spec = NeighborhoodSpec((256, 256), 80, stride)
    x = jax.ShapeDtypeStruct((1, 256 * 256, 24, 128), jnp.bfloat16)
    operands = {"query": x, "key": x, "value": x, "mask": None, "mask_array": None}
    call = FlashSpec(scale=1.0, mask=spec.mask(), q_offset=0, config=kernel_config(None, spec))
    block_q, block_kv = choose_blocks(operands, call, kernel, jnp.dtype(jnp.bfloat16))
    lists = block_list(spec.mask(), x.shape[1], x.shape[1], block_q=block_q, block_kv=block_kv)
    visited = lists.stats()["visited"] * block_q * block_kv / x.shape[1] ** 2
    assert visited <= most * spec.efficiency().ideal
