"""DHSA: boundaries, choice of tokens and attention by their definitions."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax import attention
from attnjax.masks import BlockPattern, Causal
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.sparse import dhsa, gathered
from attnjax.mechanisms.sparse.dhsa import (
    DHSAttention,
    dhsa_attention,
    dhsa_block_mask,
    dhsa_select,
    gathered_attention,
)
from attnjax.mechanisms.sparse.dhsa_boundaries import (
    BoundaryPredictor,
    boundary_loss,
    boundary_ratios,
    dhsa_boundaries,
)


def naive_select(q, k, bounds, budget, block, local, normalize, window=None):
    """Token lists of one row, heads averaged: [t, d] and [s, d]."""
    chosen = []
    for first in range(0, len(q), block):
        mean_q = q[first : first + block].mean(0)
        end = first + block
        allowed = [j for j in range(len(k)) if (end - window if window else 0) <= j < end]
        recent = allowed[len(allowed) - min(local, budget, len(allowed)) :]
        score = {}
        for a, b in zip(bounds[:-1], bounds[1:], strict=True):
            for j in range(a, b):
                mean = k[a:b].mean(0) * (np.sqrt(b - a) if normalize else 1)
                score[j] = mean_q @ mean
        rest = sorted(set(allowed) - set(recent), key=lambda j: (-score[j], j))
        chosen.append(sorted([*recent, *rest[: budget - len(recent)]]))
    return chosen


@pytest.mark.parametrize("options", [{}, {"normalize": False, "local": 0}, {"window": 9}], ids=str)
def test_choice_is_the_definition(options):
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 22, 4, 6)), rng.normal(size=(2, 22, 2, 6))
    bounds = np.array([[0, 3, 4, 11, 11, 17, 22], [0, 8, 9, 15, 19, 22, 22]])
    sizes = {"budget": 8, "block": 5, "local": 3, "normalize": True} | options
    with jax.enable_x64(True):
        got = jax.jit(
            lambda q, k, b: dhsa_select(
                q, k, b, budget=sizes["budget"], block_q=sizes["block"],
                local_tokens=sizes["local"], normalize=sizes["normalize"],
                window=sizes.get("window"),
            )
        )(q, k, jnp.asarray(bounds, jnp.int32))  # fmt: skip
    for row in range(2):
        want = naive_select(q[row].mean(1), k[row].mean(1), bounds[row], **sizes)
        assert [[int(j) for j in r if j < 22] for r in got[row]] == want


def test_attention_is_exact_over_the_chosen_keys(monkeypatch):
    """Against a dense mask; few blocks at a time give the same values and gradients."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 19, 2, 4))
    bounds = jnp.array([[0, 4, 6, 13, 19]], jnp.int32)
    sizes = dict(budget=7, block_q=3, local_tokens=2)
    index = jax.jit(lambda q, k: dhsa_select(q, k, bounds, **sizes))(q, k)
    read = (index[..., None] == jnp.arange(19)[None, None, None]).any(2)
    mask = jnp.repeat(read, 3, axis=1)[:, None, :19] & jnp.tri(19, dtype=bool)[None, None]

    def loss(form, q, k, v):
        return (form(q, k, v) ** 2).sum()

    def ours(q, k, v):
        return dhsa_attention(q, k, v, bounds, **sizes)

    want = jax.jit(
        jax.value_and_grad(lambda *a: loss(lambda *b: attention(*b, mask=mask), *a), (0, 1, 2))
    )(q, k, v)
    for keys in (1 << 16, 14):
        monkeypatch.setattr(gathered, "GATHERED_KEYS", keys)
        got = jax.jit(jax.value_and_grad(lambda *a: loss(ours, *a), (0, 1, 2)))(q, k, v)
        jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_fixed_chunks_are_block_top_k():
    """Boundaries every c tokens, plain means: the choice of whole blocks by their means."""
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 24, 1, 4))
    bounds = jnp.arange(0, 25, 4, dtype=jnp.int32)[None]
    sizes = dict(budget=8, block_q=4, local_tokens=4, normalize=False)
    index = jax.jit(lambda q, k: dhsa_select(q, k, bounds, **sizes))(q, k)
    means = [x[0, :, 0].reshape(6, 4, 4).mean(1) for x in (q, k)]
    for i in range(2, 6):
        best = int(jnp.argmax(means[1][:i] @ means[0][i]))
        assert index[0, i].tolist() == [*range(4 * best, 4 * best + 4), *range(4 * i, 4 * i + 4)]


def test_boundaries_are_greedy_suppression():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(3, 40)).astype(np.float32) + 1

    def naive(row, count, theta, nms, forced=None):
        taken = [] if forced is None else [forced]
        for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
            if len(taken) == count:
                break
            free = nms == 0 or all(abs(i - j) > nms for j in taken)
            if row[i] > theta and free and (forced is None or i < forced):
                taken.append(i)
        return sorted({0, len(row), *(i + 1 for i in taken)})

    for count, theta, nms, tokens in ((4, 1.1, 3, None), (30, None, 0, None), (9, 1.5, 2, 7)):
        got = dhsa_boundaries(
            jnp.asarray(logits), count, theta=theta, nms=nms, instruction_tokens=tokens
        )
        assert got.shape == (3, count + 2)
        for row, bounds in zip(logits, np.asarray(got), strict=True):
            forced = None if tokens is None else 40 - tokens
            want = naive(row, count, -np.inf if theta is None else theta, nms, forced)
            assert sorted(set(bounds.tolist())) == want
    # no candidate passes: one chunk
    assert_array_equal(dhsa_boundaries(jnp.zeros((1, 9)), 3), [[0, 9, 9, 9, 9]])


def test_predictor_sees_both_windows():
    """Against windows written out; too near to the ends there is no logit."""
    predictor = BoundaryPredictor(4, window=3, hidden=5, rngs=nnx.Rngs(0))
    key = jax.random.normal(jax.random.key(0), (1, 12, 2, 2))
    got = jax.jit(predictor.of_gaps)(key)
    x = np.asarray(key).reshape(12, 4)
    relu = lambda a: np.maximum(a, 0)  # noqa: E731

    def dense(layer, a):
        return a @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])

    def encode(part):
        conv = (part * np.asarray(predictor.kernel[...])).sum(0) + np.asarray(predictor.bias[...])
        return relu(dense(predictor.mix, relu(conv)))

    for i in range(2, 9):
        a, b = encode(x[i - 2 : i + 1]), encode(x[i + 1 : i + 4])
        cos = a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6)
        features = np.concatenate([a, b, np.abs(a - b), a * b, [cos]])
        want = dense(predictor.down, relu(dense(predictor.up, features)))[0]
        assert_allclose(got[0, i], want, rtol=1e-4, atol=1e-5)
    assert_array_equal(got[0, [0, 1, 9, 10, 11]], jnp.full((5,), -100.0))


def test_labels_and_loss():
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(0), (1, 2, 11, 11)) * 2)
    mean = np.asarray(weights, np.float64).mean(1)[0]
    got = jax.jit(lambda w: boundary_ratios(w, window=2))(weights)
    for i in range(11):
        want = 0.0
        if 1 <= i < 9:
            sides = [mean[i + 2 :, i - 1 : i + 1].sum(), mean[i + 2 :, i + 1 : i + 3].sum()]
            want = (max(sides) + 1e-6) / (min(sides) + 1e-6)
        assert_allclose(got[0, i], want, rtol=1e-4)
    ratio, logit = 1.5, 0.7
    y, p = (1 / (1 + np.exp(-a)) for a in (4 * np.log(ratio + 1e-6), logit))
    bce = -(y * np.log(p) + (1 - y) * np.log(1 - p))
    want = (1 - p * y - (1 - p) * (1 - y)) ** 2 * bce
    got = boundary_loss(jnp.array([[logit, 3.0]]), jnp.array([[ratio, 0.0]]))
    assert_allclose(got, want, rtol=1e-5)


def make(**options):
    sizes = dict(budget=5, local_tokens=1, window=2, hidden=4, nms=2, theta=None) | options
    return DHSAttention(2, 8, rope_base=1e4, rngs=nnx.Rngs(0), **sizes)


def test_module_decides_boundaries_as_tokens_come():
    """The keys of every query, against lists made again from what it had seen."""
    module = make()
    q, k = jax.random.normal(jax.random.key(3), (2, 1, 30, 2, 4))
    logit = np.asarray(jax.jit(module.predictor)(k))[0]
    total = jnp.cumsum(k.mean(2), axis=1)
    at = jnp.arange(30, dtype=jnp.int32)[None]
    starts = jax.jit(module.starts)(jnp.asarray(logit)[None])
    index = jax.jit(module.select)(q, total, starts, at)[0]
    w, nms = 2, 2
    several = 0
    for t in range(30):
        starts = [0]
        for j in range(2 * w - 1, t - nms + 1):
            before = logit[max(j - nms, 2 * w - 1) : j]
            after = logit[j + 1 : j + 1 + nms]
            if (logit[j] > before).all() and (logit[j] >= after).all():
                starts.append(j - w + 1)
        several += len(starts) > 3
        mean_q, mean_k = (np.asarray(a)[0].mean(1) for a in (q, k))
        last = naive_select(mean_q[: t + 1], mean_k[: t + 1], [*starts, t + 1], 5, 1, 1, True)[-1]
        assert [int(j) for j in index[t] if j < 30] == last
    assert several > 5


def test_later_tokens_change_nothing(monkeypatch):
    """Exactly: not only by gradient, which a choice does not have. Nor do queries at a time."""
    module = make()
    x = jax.random.normal(jax.random.key(0), (1, 26, 8))
    call = jax.jit(module)
    want = call(x)
    got = call(x.at[:, 17:].set(3.0))
    assert_array_equal(got[:, :17], want[:, :17])
    assert np.abs(got[:, 17:] - want[:, 17:]).max() > 1e-3
    monkeypatch.setattr(dhsa, "GATHERED_KEYS", 20)  # four queries
    assert_allclose(jax.jit(lambda x: module(x))(x), want, rtol=1e-5, atol=1e-6)


def test_budget_of_all_tokens_is_dense_attention():
    module = make(budget=99)
    dense = MultiHeadAttention(2, 8, causal=True, rope_base=1e4, use_bias=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 17, 8))
    assert_allclose(jax.jit(module)(x), jax.jit(dense)(x), rtol=1e-5, atol=1e-6)
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 17, 2, 4))
    bounds = jnp.array([[0, 5, 17]], jnp.int32)
    got, want = jax.jit(
        lambda q, k, v: (
            dhsa_attention(q, k, v, bounds, budget=17, block_q=4),
            attention(q, k, v, is_causal=True),
        )
    )(q, k, v)
    assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def line_scores(q, k, i, budget, share, block_q=8, block_kv=4):
    """One head [t, d]: what the strongest columns and diagonals put on each block of row i."""
    t = len(q)
    rows = range(t - block_q, t)
    weights = np.zeros((t, t))
    for r in rows:
        e = np.exp(q[r] @ k[: r + 1].T / np.sqrt(q.shape[1]))
        weights[r, : r + 1] = e / e.sum()
    columns = {j: weights[:, j].sum() for j in range(t)}
    diagonals = {n: sum(weights[r, r - n] for r in rows if r >= n) for n in range(t)}
    count = int(share * budget)
    kept = [
        sorted(lines, key=lambda n, lines=lines: -lines[n])[:most]
        for lines, most in ((columns, count), (diagonals, budget - count))
    ]
    score = dict.fromkeys(range(-(-t // block_kv)), 0.0)
    for j in kept[0]:
        score[j // block_kv] += columns[j]
    for n in kept[1]:
        for j in {(r - n) // block_kv for r in range(block_q * i, block_q * (i + 1)) if r >= n}:
            if j in score:
                score[j] += diagonals[n]
    return score


@pytest.mark.parametrize(
    ("kind", "share"),
    [("plain", 0.5), ("a_shape", 0.5), ("vertical_slash", 0.5), ("vertical_slash", 0.0)],
)
def test_fixed_blocks_of_two_sizes(kind, share):
    """Keys of two query heads; rows of 8 queries read 4 of 12 blocks of 4 keys."""
    t, most = 46, 4
    q = jax.random.normal(jax.random.key(0), (1, t, 4, 4))
    k = jax.random.normal(jax.random.key(1), (1, t, 2, 4))
    choose = functools.partial(
        dhsa_block_mask, block_q=8, block_kv=4, density=0.4, kind=kind, vertical=share
    )
    got = np.asarray(jax.jit(choose)(q, k))
    assert got.shape == (1, 4, 6, 12)
    q, k = (np.asarray(a, np.float64)[0] for a in (q, k))
    for h, i in np.ndindex(4, 6):
        keys, queries = k[:, h // 2], q[:, h]
        causal = [j for j in range(12) if 4 * j < 8 * (i + 1)]
        if kind == "vertical_slash":
            score = line_scores(queries, keys, i, most * 4, share)
            if 8 * i < most * 4 or i == 5:
                assert np.nonzero(got[0, h, i])[0].tolist() == causal
                continue
        else:
            mean = queries[8 * i : 8 * i + 8].mean(0)
            score = {j: mean @ keys[4 * j : 4 * j + 4].mean(0) for j in causal}
        always = set() if kind == "plain" else {0, causal[-1]}
        best = sorted(causal, key=lambda j: (j not in always, -score[j]))[:most]
        assert np.nonzero(got[0, h, i])[0].tolist() == sorted(best)
    assert (BlockPattern(got, 8, 4) & Causal()).density(t) < 0.6


def test_bad_options():
    with pytest.raises(ValueError, match="budget=0"):
        make(budget=0)
    with pytest.raises(ValueError, match="nms=-1"):
        make(nms=-1)
    with pytest.raises(ValueError, match="window=0"):
        make(window=0)
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        make(dropout_rate=0.5)
    with pytest.raises(NotImplementedError, match="segment_ids"):
        make()(jnp.zeros((1, 3, 8)), segment_ids=jnp.zeros((1, 3), jnp.int32))
    with pytest.raises(ValueError, match="num_chunks=0"):
        dhsa_boundaries(jnp.zeros((1, 3)), 0)
    with pytest.raises(ValueError, match="instruction_tokens=9"):
        dhsa_boundaries(jnp.zeros((1, 3)), 1, instruction_tokens=9)
    q = jnp.zeros((1, 4, 1, 2))
    with pytest.raises(ValueError, match="kind='star'"):
        dhsa_block_mask(q, q, kind="star")
    with pytest.raises(ValueError, match="density=0"):
        dhsa_block_mask(q, q, density=0)
    with pytest.raises(ValueError, match="same length"):
        dhsa_block_mask(q[:, :2], q)
    with pytest.raises(ValueError, match="1 rows and 2 blocks of block_q=2"):
        gathered_attention(q, q, q, jnp.zeros((1, 3, 1), jnp.int32), block_q=2)
