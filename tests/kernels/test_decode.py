"""Decode attention of every body against the definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax as aj
from attnjax.cache import DenseCache
from attnjax.decode import decode_attention as attend
from attnjax.masks import Causal, Sink, Window, per_head
from pallas_kernels.compat import enable_x64
from pallas_kernels.decode import DecodeConfig, decode_attention

BODIES = ["xla", "interpret", "interpret_triton"]
KERNELS = BODIES[1:]
FLOAT32 = 2e-6
"""Largest error of float32 bodies, relative to the largest entry: a few rounding errors."""


def definition(query, key, value, *, start, end, scale=None, softcap=None, sinks=None, mask=None,
               bias=None):  # fmt: skip
    """(o, lse) in float64; start and end are [b, h, t], mask and bias broadcast to [b, h, t, s]."""
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    (b, t, h, d), (_, s, g, e) = q.shape, v.shape
    out, lse = np.zeros((b, t, h, e)), np.full((b, t, h), -np.inf)
    full = (b, h, t, s)
    mask = np.broadcast_to(True if mask is None else mask, full)
    bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), full)
    for i, j, n in np.ndindex(b, t, h):
        seen = [c for c in range(start[i, n, j], end[i, n, j]) if mask[i, n, j, c]]
        at = n // (h // g)
        scores = k[i, seen, at] @ q[i, j, n] * (d**-0.5 if scale is None else scale)
        scores = scores + bias[i, n, j, seen]
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        extra = [] if sinks is None else [float(sinks[n])]
        if not seen and not extra:
            continue
        lse[i, j, n] = np.logaddexp.reduce(np.array([*scores, *extra]))
        out[i, j, n] = np.exp(scores - lse[i, j, n]) @ v[i, seen, at]
    return out, lse


def causal_ends(length, t):
    """[b, h] lengths to ends [b, h, t] of the last t tokens."""
    return np.maximum(length[..., None] - t + 1 + np.arange(t), 0)


def agree(got, want, tolerance=FLOAT32):
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        finite = np.isfinite(b)
        assert np.array_equal(a[~finite], b[~finite])
        scale = np.abs(b[finite]).max(initial=1e-3)
        assert np.abs(a[finite] - b[finite]).max(initial=0.0) <= tolerance * scale


def operands(b, t, s, h, g, d=8, e=8, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((b, t, h, d), (b, s, g, d), (b, s, g, e))
    return [jax.random.normal(k, x, dtype) for k, x in zip(keys, shapes, strict=True)]


STATIC = ("block", "splits", "causal", "window", "scale", "softcap")


@functools.partial(jax.jit, static_argnums=0, static_argnames=STATIC)
def run(body, *arrays, block=16, splits=None, **options):
    config = DecodeConfig(block_kv=None if body == "xla" else block, num_splits=splits)
    return decode_attention(
        *arrays, implementation=body, config=config, return_residual=True, **options
    )


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("t", "h", "g"), [(1, 8, 1), (2, 4, 2), (5, 2, 2), (1, 8, 4), (1, 3, 3)])
def test_groups_and_few_queries(body, t, h, g):
    q, k, v = operands(2, t, 40, h, g, d=12, e=20)
    lengths = np.array([7, 40])
    got = run(body, q, k, v, lengths=jnp.asarray(lengths), splits=2)
    end = causal_ends(np.repeat(lengths[:, None], h, 1), t)
    agree(got, definition(q, k, v, start=np.zeros_like(end), end=end))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("heads", [2, 4])
def test_lengths_and_starts_by_head(body, heads):
    q, k, v = operands(3, 2, 37, 4, 2)
    rng = np.random.default_rng(heads)
    lengths = rng.integers(0, 38, (3, heads))
    lengths[0, 0], lengths[1, 1] = 0, 37
    starts = rng.integers(0, 12, (3, heads))
    got = run(body, q, k, v, lengths=jnp.asarray(lengths), starts=jnp.asarray(starts), splits=3)
    end = causal_ends(np.repeat(lengths, 4 // heads, 1), 2)
    start = np.broadcast_to(np.repeat(starts, 4 // heads, 1)[..., None], end.shape)
    agree(got, definition(q, k, v, start=start, end=end))


@pytest.mark.parametrize("body", BODIES)
def test_rows_without_keys(body):
    q, k, v = operands(2, 1, 24, 2, 1)
    out, lse = run(body, q, k, v, lengths=jnp.array([0, 24]))
    assert np.all(np.asarray(out[0]) == 0) and np.all(np.isneginf(lse[0]))
    out, lse = run(body, q, k, v, lengths=jnp.array([0, 24]), sinks=jnp.array([0.5, -1.0]))
    assert np.all(np.asarray(out[0]) == 0)
    np.testing.assert_allclose(lse[0, 0], [0.5, -1.0], rtol=1e-6)


@pytest.mark.parametrize("body", BODIES)
def test_window_positions_sinks_and_softcap(body):
    q, k, v = operands(2, 3, 50, 4, 2)
    positions = np.array([[9, 3, 40], [0, 49, 20]])
    sinks = jnp.array([0.3, -2.0, 5.0, 0.0])
    options = {"sinks": sinks, "softcap": 2.0, "scale": 0.7}
    got = run(body, q, k, v, q_positions=jnp.asarray(positions), window=17, **options)
    end = np.broadcast_to(positions[:, None] + 1, (2, 4, 3))
    start = np.maximum(end - 17, 0)
    agree(got, definition(q, k, v, start=start, end=end, **options))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("shape", [(2, 1, 145), (1, 4, 145), (2, 4, 2, 145), (1, 1, 2, 145)])
def test_mask_and_bias(body, shape):
    q, k, v = operands(2, 2, 145, 4, 2)
    mask = np.random.default_rng(0).random(shape) < 0.4
    bias = 5 * jax.random.normal(jax.random.key(5), shape)
    options = {"mask": jnp.asarray(mask), "bias": bias, "lengths": jnp.array([145, 31])}
    got = run(body, q, k, v, causal=False, splits=2, block=128, **options)
    end = np.broadcast_to(np.array([145, 31])[:, None, None], (2, 4, 2))
    four = [x if x.ndim == 4 else x[:, :, None] for x in (mask, np.asarray(bias))]
    want = definition(q, k, v, start=np.zeros_like(end), end=end, mask=four[0], bias=four[1])
    agree(got, want)


@pytest.mark.parametrize("body", BODIES)
def test_what_lies_outside_of_the_range_never_leaks(body):
    q, k, v = operands(2, 2, 40, 4, 2)
    lengths, starts = np.array([[5, 20], [0, 33]]), np.array([[2, 0], [0, 9]])
    at = np.arange(40)[None, :, None]
    hidden = (at >= lengths[:, None]) | (at < starts[:, None])
    options = {"lengths": jnp.asarray(lengths), "starts": jnp.asarray(starts), "splits": 2}
    want = run(body, q, k, v, **options)
    for bad in (np.nan, np.inf):
        poisoned = [jnp.where(hidden[..., None], bad, x) for x in (k, v)]
        got = run(body, q, *poisoned, **options)
        assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("body", BODIES)
def test_what_a_mask_hides_never_leaks(body):
    q, k, v = operands(1, 1, 140, 4, 2)
    mask = np.arange(140) % 3 != 0
    options = {"mask": jnp.asarray(mask)[None, None], "block": 128}
    want = run(body, q, k, v, **options)
    end = np.full((1, 4, 1), 140)
    agree(want, definition(q, k, v, start=np.zeros_like(end), end=end, mask=mask))
    poisoned = [jnp.where(mask[None, :, None, None], x, np.nan) for x in (k, v)]
    got = run(body, q, *poisoned, **options)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("body", BODIES)
def test_pages(body):
    q, k, v = operands(2, 1, 64, 4, 2)
    table = np.random.default_rng(0).permutation(9)[:8].reshape(2, 4)

    def pool(x):
        pages = np.full((9, 16, *x.shape[2:]), np.nan, np.float32)
        pages[table] = np.asarray(x).reshape(2, 4, 16, *x.shape[2:])
        return jnp.asarray(pages)

    lengths = jnp.array([50, 13])
    want = run(body, q, k, v, lengths=lengths, splits=1)
    got = run(body, q, pool(k), pool(v), lengths=lengths, page_table=jnp.asarray(table), splits=1)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("body", BODIES)
def test_pages_of_several_blocks(body):
    q, k, v = operands(2, 1, 64, 4, 2)
    table = jnp.array([[1, 0], [2, 3]])
    pools = [x.reshape(4, 32, *x.shape[2:])[jnp.array([1, 0, 2, 3])] for x in (k, v)]
    want = run(body, q, k, v, lengths=jnp.array([50, 13]), splits=2)
    got = run(body, q, *pools, lengths=jnp.array([50, 13]), page_table=table, splits=2)
    agree(got, [np.asarray(x, np.float64) for x in want], tolerance=1e-6)


@pytest.mark.parametrize("body", BODIES)
def test_cache_in_another_dtype(body):
    q, k, v = operands(1, 1, 40, 4, 2)
    narrow = [x.astype(jnp.bfloat16) for x in (k, v)]
    got = run(body, q, *narrow)
    assert got[0].dtype == jnp.float32
    want = run(body, q, *(x.astype(jnp.float32) for x in narrow))
    agree(got, [np.asarray(x, np.float64) for x in want], tolerance=1e-6)


@pytest.mark.parametrize("body", BODIES)
def test_large_logits_keep_their_digits(body):
    q, k, v = operands(1, 1, 64, 2, 1)
    got = run(body, q * 1e4, k, v, splits=4)
    end = np.full((1, 2, 1), 64)
    want = definition(q * 1e4, k, v, start=np.zeros_like(end), end=end)
    agree(got, want, tolerance=1e-3)  # scores near 10^4 have an error of 10^-3 in float32


@pytest.mark.parametrize("body", KERNELS)
@pytest.mark.parametrize("t", [1, 2])
def test_bfloat16_as_close_as_plain_attention(body, t):
    q, k, v = operands(1, t, 96, 4, 2, d=32, e=32, dtype=jnp.bfloat16)
    end = causal_ends(np.full((1, 4), 96), t)
    want, _ = definition(q, k, v, start=np.zeros_like(end), end=end)
    grouped = q.reshape(1, t, 2, 2, 32)
    scores = jnp.einsum("btgrd,bsgd->bgrts", grouped, k) * 32**-0.5
    seen = np.arange(96) < end[0, 0][:, None]
    weights = jax.nn.softmax(jnp.where(seen[None, None, None], scores, -jnp.inf))
    plain = jnp.einsum("bgrts,bsge->btgre", weights, v).reshape(want.shape)
    got, _ = run(body, q, k, v, splits=2)
    error, allowed = (np.abs(np.asarray(x, np.float64) - want).max() for x in (got, plain))
    assert error <= 2 * allowed


@pytest.mark.parametrize("body", BODIES)
def test_same_bits_in_every_run(body):
    q, k, v = operands(2, 1, 50, 4, 2)
    first, second = (run(body, q, k, v, lengths=jnp.array([50, 20]), splits=3) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_float64_is_exact_for_any_number_of_splits():
    with enable_x64(True):
        q, k, v = operands(2, 2, 48, 4, 2, dtype=jnp.float64)
        end = causal_ends(np.full((2, 4), 48), 2)
        want = definition(q, k, v, start=np.zeros_like(end), end=end)
        for splits in (1, 2, 5, 48):
            agree(run("xla", q, k, v, splits=splits), want, tolerance=1e-13)


def test_gradients_are_those_of_the_definition():
    with enable_x64(True):
        q, k, v = operands(2, 2, 24, 4, 2, dtype=jnp.float64)
        sinks = jnp.array([0.1, -1.0, 2.0, 0.0])
        bias = jax.random.normal(jax.random.key(3), (1, 4, 1, 24), jnp.float64)
        lengths = jnp.array([0, 17])
        hidden = jnp.arange(24)[None, :, None, None] >= lengths[:, None, None, None]
        poisoned = [jnp.where(hidden, jnp.nan, x) for x in (k, v)]

        def loss(q, k, v, sinks, bias):
            options = {"lengths": lengths, "softcap": 3.0, "sinks": sinks, "bias": bias}
            out, lse = decode_attention(q, k, v, return_residual=True, num_splits=4, **options)
            return (out**2).sum() + jnp.sin(lse).sum()

        def plain(q, k, v, sinks, bias):
            end = np.array([[-1, 0], [16, 17]])
            keep = (np.arange(24) < end[..., None])[:, None]
            scores = jnp.einsum("bthd,bshd->bhts", q, jnp.repeat(k, 2, 2)) * 8**-0.5
            scores = scores + bias
            scores = jnp.where(keep, 3.0 * jnp.tanh(scores / 3.0), -jnp.inf)
            extra = jnp.broadcast_to(sinks[None, :, None, None], (2, 4, 2, 1))
            full = jnp.concatenate([scores, extra], -1)
            out = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(full)[..., :-1], jnp.repeat(v, 2, 2))
            return (out**2).sum() + jnp.sin(jax.nn.logsumexp(full, -1)).sum()

        arguments = (0, 1, 2, 3, 4)
        want = jax.jit(jax.grad(plain, arguments))(q, k, v, sinks, bias)
        got = jax.jit(jax.grad(loss, arguments))(q, *poisoned, sinks, bias)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("body", BODIES)
def test_vmap_is_a_loop(body):
    q, k, v = operands(6, 2, 32, 4, 2)
    lengths = jnp.array([[3, 32], [8, 0], [20, 31]])
    bias = jax.random.normal(jax.random.key(4), (1, 4, 32))
    arrays = [x.reshape(3, 2, *x.shape[1:]) for x in (q, k, v)]

    def each(q, k, v, lengths):
        return run(body, q, k, v, lengths=lengths, bias=bias, block=32)

    got = jax.vmap(each)(*arrays, lengths)
    want = jax.lax.map(lambda x: each(*x), (*arrays, lengths))
    agree(got, [np.asarray(x, np.float64) for x in want], tolerance=1e-6)


def test_vmap_over_queries_of_one_cache():
    q, k, v = operands(2, 1, 32, 4, 2)
    queries = jnp.stack([q, -q])
    got = jax.vmap(lambda q: decode_attention(q, k, v))(queries)
    agree(got, [decode_attention(q, k, v), decode_attention(-q, k, v)], tolerance=1e-6)


MASKS = [
    Causal(),
    Causal() & Window(7),
    Window(9, 2) & Causal(),
    Causal() & (Window(5) | Sink(3)),
    per_head([Window(4), Causal(), Window(30), Causal() & Sink(2)]),
    Window(6, 3),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_entry_takes_masks_as_attention_does(mask):
    q, k, v = operands(2, 3, 40, 4, 2)
    lengths = jnp.array([11, 40])
    options = {"mask": mask, "return_residual": True}
    got = attend(q, k, v, lengths=lengths, causal=False, **options)
    want = aj.attention(q, k, v, q_offset=lengths - 3, key_value_seq_lengths=lengths, **options)
    agree(got, [np.asarray(x, np.float64) for x in want], tolerance=1e-6)


@pytest.mark.parametrize("t", [1, 4])
def test_dense_cache_can_be_read_by_it(t):
    q, k, v = operands(2, 12, 12, 4, 2)
    cache = DenseCache.create(2, 32, 2, 8)
    valid = jnp.arange(12 - t)[None] < jnp.array([[5], [8]])
    cache = cache.append(k[:, : 12 - t], v[:, : 12 - t], valid=valid)
    last = [x[:, 12 - t :] for x in (q, k, v)]
    (want, want_lse), after = cache.attend(*last)
    lengths = cache.length + t
    got = attend(last[0], after.key, after.value, lengths=lengths, return_residual=True)
    agree(got, [np.asarray(x, np.float64) for x in (want, want_lse)], tolerance=1e-6)


def test_entry_names_what_is_wrong():
    q, k, v = operands(2, 1, 32, 4, 2)
    with pytest.raises(ValueError, match="query heads 4"):
        attend(q, *operands(2, 1, 32, 4, 3)[1:])
    with pytest.raises(ValueError, match="window=0 needs causal=True"):
        attend(q, k, v, window=0)
    with pytest.raises(TypeError, match="mask must be boolean"):
        attend(q, k, v, mask=jnp.ones((2, 1, 32)))
    with pytest.raises(ValueError, match="page_table must have shape"):
        attend(q, k, v, page_table=jnp.zeros((3, 2), jnp.int32))
    with pytest.raises(ValueError, match="num_splits=0"):
        attend(q, k, v, num_splits=0)
    with pytest.raises(ValueError, match="implementation='cuda' is unknown"):
        attend(q, k, v, implementation="cuda")


def test_what_is_wrong_is_named():
    q, k, v = operands(2, 1, 32, 4, 2)
    with pytest.raises(ValueError, match=r"lengths must be integers of shape .* got float32"):
        decode_attention(q, k, v, lengths=jnp.ones((2,)))
    with pytest.raises(ValueError, match="starts must be integers"):
        decode_attention(q, k, v, starts=jnp.zeros((2, 3), jnp.int32))
    with pytest.raises(ValueError, match="mask must have shape"):
        decode_attention(q, k, v, mask=jnp.ones((2, 31), bool))
    with pytest.raises(ValueError, match="window needs causal"):
        decode_attention(q, k, v, window=3, causal=False)
    with pytest.raises(NotImplementedError, match="1024 rows"):
        decode_attention(jnp.tile(q, (1, 300, 1, 1)), k, v, implementation="interpret")
    with pytest.raises(NotImplementedError, match="multiple of 128 tokens"):
        run("interpret", q, k, v, mask=jnp.ones((2, 1, 32), bool))
    with pytest.raises(NotImplementedError, match="no power of two"):
        run("interpret_triton", q, k, v, block=24)
    with pytest.raises(NotImplementedError, match="no Pallas kernel for cpu"):
        decode_attention(q, k, v, implementation="pallas")
