"""Random masks for property tests, and the brute-force answers they are compared with."""

import os

import jax
import numpy as np
from hypothesis import strategies as st

from attnjax import masks as am
from pallas_kernels.maskprogram import EMPTY, FULL, PARTIAL

BATCH, HEADS = 2, 3

EXHAUSTIVE = os.environ.get("ATTNJAX_EXHAUSTIVE", "0") not in ("", "0")


def cases(default, exhaustive=2000):
    """Number of random cases: `default`, or `exhaustive` where the environment asks for all."""
    return exhaustive if EXHAUSTIVE else default


def odd_sum(b, h, q, k):
    return (q + 2 * k + b + h) & 1 == 1


def below_operand(b, h, q, k, limit):
    return q + k < limit


def _integers(shape, low, high, sort=False):
    def draw(seed):
        values = np.random.default_rng(seed).integers(low, high, shape, dtype=np.int32)
        return np.sort(values, axis=-1) if sort else values

    return st.integers(0, 2**20).map(draw)


def _sets(make, members):
    return jax.tree.map(np.asarray, make(members > 0))


def closed_forms(length):
    """Masks whose classes must be exact."""
    small = st.integers(1, 9)
    return st.one_of(
        st.just(am.Full()),
        st.builds(am.Causal, st.integers(-length, length)),
        st.builds(am.Window, small, st.integers(0, 5)),
        st.builds(am.Sink, st.integers(0, 9)),
        st.builds(am.Chunked, small),
        st.builds(am.Dilated, st.integers(1, 6)),
        st.builds(am.EarlierChunks, small),
        st.builds(am.SinceGroup, small, st.integers(0, 5)),
        st.builds(lambda keep: _sets(am.key_set, keep), _integers((BATCH, length), 0, 2)),
        st.builds(lambda seen: _sets(am.query_set, seen), _integers((BATCH, length, HEADS), 0, 2)),
        st.builds(am.KeptUntil, _integers((BATCH, HEADS, length), 0, length + 1)),
        st.builds(am.Rectangle, *[_integers((n,), 0, length + 1) for n in (1, BATCH, 1, BATCH)]),
        st.builds(am.Prefix, st.integers(0, 9)),
        st.builds(am.Prefix, _integers((BATCH,), 0, length)),
        st.builds(am.Prefix, _integers((1, HEADS), 0, length)),
        st.builds(am.Lengths, _integers((BATCH,), 0, length + 1)),
        st.builds(am.Lengths, _integers((1,), 0, length + 1), _integers((BATCH,), 0, length + 1)),
        st.builds(am.Strided, small, st.integers(1, 4), st.integers(1, 3), st.integers(-5, 5)),
        st.builds(
            am.Strided,
            small,
            st.integers(1, 4),
            st.integers(1, 3),
            st.lists(st.integers(-5, 5), min_size=HEADS, max_size=HEADS),
        ),
        st.builds(
            lambda p, bq, bk: am.BlockPattern(p > 0, bq, bk),
            _integers((HEADS, 4, 5), 0, 3),
            st.integers(1, 8),
            st.integers(1, 8),
        ),
        st.builds(
            lambda p, bq: am.BlockPattern(p > 0, bq),
            _integers((BATCH, 1, 3, 3), 0, 2),
            st.integers(1, 8),
        ),
    )


def leaves(length):
    """All masks that are not combinations."""
    return st.one_of(
        closed_forms(length),
        st.builds(am.Segments, _integers((BATCH, length), -1, 3)),
        st.builds(am.Segments, _integers((BATCH, length), -1, 4, sort=True)),
        st.builds(
            am.Segments,
            _integers((BATCH, length), -1, 3, sort=True),
            _integers((1, length), -1, 3, sort=True),
        ),
        st.just(am.Predicate(odd_sum, num_heads=HEADS, batch_size=BATCH)),
        st.builds(lambda n: am.Predicate(below_operand, n), st.integers(0, 2 * length)),
    )


def compositions(length):
    """Masks of any depth, some with a different mask for each head."""
    parts = st.one_of(
        leaves(length),
        st.lists(leaves(length), min_size=HEADS, max_size=HEADS).map(am.per_head),
    )
    return st.recursive(
        parts,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda p: p[0] & p[1]),
            st.tuples(inner, inner).map(lambda p: p[0] | p[1]),
            inner.map(lambda m: ~m),
        ),
        max_leaves=4,
    )


def spelled_out(mask, q_len, kv_len, q_offset=0):
    """The mask as NumPy booleans [BATCH, HEADS, q_len, kv_len]."""
    sizes = BATCH, HEADS, q_len, kv_len
    b, h, q, k = np.indices(sizes, sparse=True)
    return np.broadcast_to(mask.predicate(b, h, q + q_offset, k), sizes)


def brute_class(tile):
    """Class of one tile of booleans."""
    return EMPTY if not tile.any() else FULL if tile.all() else PARTIAL
