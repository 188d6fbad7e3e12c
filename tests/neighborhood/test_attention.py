"""`neighborhood_attention` in value and gradient against the loops of `naive.py`, in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pallas_kernels.compat import enable_x64
from pallas_kernels.flash import flash_attention
from pallas_kernels.neighborhood import (
    NeighborhoodSpec,
    TokenLayout,
    neighborhood_attention,
    permute_tokens,
    token_layout,
    unpermute_tokens,
)
from tests.neighborhood import naive

TOLERANCE = 1e-12
"""Both sides are float64; sums differ in order alone."""


def arrays(rng, shape, *, b=1, h=2, g=2, d=4, e=4, additional=0):
    """query, key, value, additional keys and values (or None), and a cotangent."""
    make = rng.standard_normal
    q, k, v = make((b, *shape, h, d)), make((b, *shape, g, d)), make((b, *shape, g, e))
    more = (make((b, additional, g, d)), make((b, additional, g, e))) if additional else (None,) * 2
    return (q, k, v, *more), make((b, *shape, h, e))


def both(inputs, cot, case, *, rel_bias=None, **options):
    """(results, gradients) of the function and of the text, by name."""
    window = {name: x for name, x in case.items() if name != "shape"}
    q, k, v, ak, av = inputs
    common = {name: options.pop(name, None) for name in ("scale", "softcap")}
    bias = None
    if rel_bias is not None:
        bias = naive.relative_bias(case["shape"], case["kernel_size"], case["dilation"], rel_bias)
    want = naive.attention(
        q, k, v, naive.dense_mask(**case), ak=ak, av=av, bias=bias, cot=cot, **common
    )
    with enable_x64(True):
        given = {"dq": q, "dk": k, "dv": v, "dak": ak, "dav": av, "drpb": rel_bias}
        given = {name: jnp.asarray(x) for name, x in given.items() if x is not None}

        def call(given):
            return neighborhood_attention(
                given["dq"], given["dk"], given["dv"], additional_keys=given.get("dak"),
                additional_values=given.get("dav"), rel_bias=given.get("drpb"),
                return_residual=True, **window, **common, **options,
            )  # fmt: skip

        @jax.jit
        def with_gradients(given, cot):
            (out, lse), pull = jax.vjp(call, given)
            return {"out": out, "lse": lse, **pull((cot, jnp.zeros_like(lse)))[0]}

        got = with_gradients(given, jnp.asarray(cot))
        return {name: np.asarray(x) for name, x in got.items()}, want


def run(*arrays, **options):
    """`neighborhood_attention` as one program."""
    return jax.jit(functools.partial(neighborhood_attention, **options))(*arrays)


def check(got, want):
    for name in got:
        assert_allclose(got[name], want[name], rtol=0, atol=TOLERANCE * 100, err_msg=name)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_random_windows(rank, seed):
    rng = np.random.default_rng((rank, seed))
    case = naive.random_case(rng, rank, tokens=90)
    h, g = [(2, 2), (4, 2), (3, 1)][seed]
    inputs, cot = arrays(rng, case["shape"], b=2, h=h, g=g, e=3 + seed, additional=3 * seed)
    check(*both(inputs, cot, case, softcap=2.0 if seed == 2 else None, scale=0.7))


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("seed", range(40))
def test_many_random_windows(rank, seed):
    rng = np.random.default_rng((7, rank, seed))
    case = naive.random_case(rng, rank)
    tiles = {
        name: tuple(int(n) for n in rng.choice([1, 2, 4, 8], rank))
        for name in ("q_tile", "kv_tile")
    }
    inputs, cot = arrays(rng, case["shape"], additional=int(rng.integers(0, 4)))
    check(*both(inputs, cot, case, **(tiles if seed % 2 else {})))


@pytest.mark.parametrize(
    "case",
    [
        dict(shape=(40,), kernel_size=(7,), q_tile=8, kv_tile=16),
        dict(shape=(13, 18), kernel_size=(6, 5), dilation=(2, 3), q_tile=(2, 4), kv_tile=(4, 2)),
        dict(shape=(12, 16), kernel_size=(6, 8), stride=(3, 4), is_causal=(True, False),
             q_tile=(2, 8), kv_tile=(8, 4)),
        dict(shape=(5, 6, 7), kernel_size=(3, 4, 2), stride=(2, 1, 2), q_tile=(2, 2, 4),
             kv_tile=(4, 1, 8)),
    ],
)  # fmt: skip
def test_many_tiles(case):
    """Tiles much smaller than the map, so that full, partial and empty ones all occur."""
    tiles = {name: case.pop(name) for name in ("q_tile", "kv_tile")}
    rng = np.random.default_rng(3)
    inputs, cot = arrays(rng, case["shape"], additional=5)
    check(*both(inputs, cot, case, **tiles))


@pytest.mark.parametrize("additional", [0, 3])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(
    "case",
    [
        dict(shape=(19,), kernel_size=(5,), dilation=(2,), stride=(1,)),
        dict(shape=(7, 9), kernel_size=(3, 5), dilation=(2, 1), stride=(1, 2)),
        dict(shape=(4, 5, 3), kernel_size=(3, 5, 3), dilation=(1, 1, 1)),
    ],
)
def test_relative_bias(case, additional, softcap):
    rng = np.random.default_rng(5)
    inputs, cot = arrays(rng, case["shape"], additional=additional)
    table = rng.standard_normal((2, *(2 * w - 1 for w in case["kernel_size"])))
    got, want = both(inputs, cot, case, rel_bias=table, softcap=softcap)
    # the table's gradient: sum over the pairs of each distance
    want["drpb"] = np.zeros_like(table)
    for place in np.ndindex(table.shape[1:]):
        one = np.zeros_like(table)
        one[(slice(None), *place)] = 1
        pairs = naive.relative_bias(case["shape"], case["kernel_size"], case["dilation"], one)
        want["drpb"][(slice(None), *place)] = (want["dscores"] * pairs).sum((0, 2, 3))
    check(got, want)


def test_full_window_is_dense_attention():
    rng = np.random.default_rng(0)
    for case in (
        dict(shape=(5, 6), kernel_size=(5, 6), stride=(3, 1)),
        dict(shape=(6, 8), kernel_size=(3, 2), dilation=(2, 4)),
    ):
        inputs, cot = arrays(rng, case["shape"], g=1, additional=2)
        got, want = both(inputs, cot, case)
        check(got, want)
        spec = NeighborhoodSpec(**case, q_tile=case["kernel_size"], kv_tile=case["kernel_size"])
        assert spec.is_full and spec.mask().shows_everything
    assert not NeighborhoodSpec((6,), 6, is_causal=True).is_full
    assert not NeighborhoodSpec((7,), 3, dilation=2).is_full


def test_stride_equal_to_the_window_is_blocked_attention():
    rng = np.random.default_rng(1)
    (q, k, v, *_), _ = arrays(rng, (8, 12))
    got = run(*map(f32, (q, k, v)), kernel_size=(4, 3), stride=(4, 3))

    def blocks(x):  # [b, 2, 4, 4, 3, h, d] -> a batch row per block
        x = f32(x).reshape(2, 4, 4, 3, *x.shape[3:]).transpose(0, 2, 1, 3, 4, 5)
        return x.reshape(8, 12, *x.shape[4:])

    want = plain(*map(blocks, (q, k, v)))
    assert_allclose(blocks(got), want, atol=1e-5)


def test_dilation_is_interleaved_problems():
    rng = np.random.default_rng(2)
    (q, k, v, *_), _ = arrays(rng, (9, 12))
    got = run(*map(f32, (q, k, v)), kernel_size=3, dilation=(2, 3))
    for i in range(2):
        for j in (0, 2):
            part = [f32(x)[:, i::2, j::3] for x in (q, k, v)]
            want = run(*part, kernel_size=3)
            assert_allclose(got[:, i::2, j::3], want, atol=1e-5)


def test_causal_in_one_dimension_is_a_sliding_window():
    from attnjax import attention
    from attnjax.masks import Causal, Window

    rng = np.random.default_rng(3)
    (q, k, v, *_), _ = arrays(rng, (50,))
    q, k, v = map(f32, (q, k, v))
    got = run(q, k, v, kernel_size=8, is_causal=True)
    assert_allclose(got, attention(q, k, v, mask=Causal() & Window(8)), atol=1e-5)
    got = run(q, k, v, kernel_size=50, is_causal=True)
    assert_allclose(got, attention(q, k, v, is_causal=True), atol=1e-5)


def test_staying_in_tile_order():
    """Two layers with other windows in between, permuted once; padding stays 0."""
    rng = np.random.default_rng(4)
    shape = (9, 11)
    (q, k, v, *_), _ = arrays(rng, shape)
    q, k, v = map(f32, (q, k, v))
    layout = token_layout(shape, kernel_size=5)
    at = [permute_tokens(x, layout) for x in (q, k, v)]
    inner, lse = run(*at, kernel_size=5, pre_permuted=layout, return_residual=True)
    assert_array_equal(np.asarray(inner)[:, ~layout.is_token()], 0)
    assert_array_equal(np.asarray(lse)[:, ~layout.is_token()], -np.inf)
    got = run(inner, *at[1:], kernel_size=3, stride=2, pre_permuted=layout)
    want = run(q, k, v, kernel_size=5)
    want = run(want, k, v, kernel_size=3, stride=2)
    assert_allclose(unpermute_tokens(got, layout), want, atol=1e-5)
    with pytest.raises(ValueError, match="needs another tile order"):
        neighborhood_attention(*at, kernel_size=3, dilation=2, pre_permuted=layout)


def test_nan_in_padding_slots_does_not_leak():
    """Pre-permuted arrays may hold anything in their padding."""
    rng = np.random.default_rng(4)
    shape, layout = (5, 6), TokenLayout((5, 6), (4, 4), (1, 1))
    (q, k, v, *_), _ = arrays(rng, shape)
    real = jnp.asarray(layout.is_token())[None, :, None, None]
    at = [jnp.where(real, permute_tokens(f32(x), layout), jnp.nan) for x in (q, k, v)]

    def loss(q, k, v):
        o = neighborhood_attention(q, k, v, kernel_size=3, pre_permuted=layout)
        return (jnp.where(real, o, 0.0) ** 2).sum()

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(*at)
    want = run(*map(f32, (q, k, v)), kernel_size=3)
    assert_allclose(value, (want**2).sum(), rtol=1e-5)
    for grad in grads:
        assert np.isfinite(np.asarray(grad)[:, layout.is_token()]).all()


def test_head_groups():
    rng = np.random.default_rng(6)
    (q, k, v, ak, av), _ = arrays(rng, (8, 9), h=4, g=2, additional=2)
    q, k, v, ak, av = map(f32, (q, k, v, ak, av))
    table = f32(rng.standard_normal((4, 5, 5)))
    groups = [(2, {}), (2, {"kernel_size": (4, 5), "dilation": (2, 1), "rel_bias": None})]
    got = run(
        q, k, v, kernel_size=3, rel_bias=table, head_groups=groups, additional_keys=ak,
        additional_values=av,
    )  # fmt: skip
    options = [
        dict(kernel_size=3, rel_bias=table[:2]),
        dict(kernel_size=(4, 5), dilation=(2, 1)),
    ]
    for i, window in enumerate(options):
        kv = slice(i, i + 1)
        want = run(
            q[..., 2 * i : 2 * i + 2, :], k[..., kv, :], v[..., kv, :],
            additional_keys=ak[..., kv, :], additional_values=av[..., kv, :], **window,
        )  # fmt: skip
        assert_allclose(got[..., 2 * i : 2 * i + 2, :], want, atol=1e-5)
    for heads in ([(3, {}), (1, {})], [(2, {})]):
        with pytest.raises(ValueError, match="must add up to 4 query heads"):
            neighborhood_attention(q, k, v, kernel_size=3, head_groups=heads)
    with pytest.raises(ValueError, match=r"unknown options \['window'\]"):
        neighborhood_attention(q, k, v, kernel_size=3, head_groups=[(4, {"window": 3})])


@pytest.mark.parametrize("dilation", [1, 2])
def test_vmap(dilation):
    rng = np.random.default_rng(7)
    call = functools.partial(neighborhood_attention, kernel_size=3, dilation=dilation)
    q, k, v = (jnp.stack([f32(x), f32(x[::-1])]) for x in arrays(rng, (7, 6), b=2)[0][:3])

    def loss(q, k, v):
        return (call(q, k, v) ** 2).sum()

    for f in (call, jax.grad(loss)):
        got, one = jax.jit(jax.vmap(f))(q, k, v), jax.jit(f)
        for i in range(2):
            assert_allclose(got[i], one(q[i], k[i], v[i]), atol=1e-5)


def test_sixteen_bits():
    rng = np.random.default_rng(8)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in arrays(rng, (7, 8))[0][:3])
    got, lse = neighborhood_attention(q, k, v, kernel_size=3, return_residual=True)
    assert got.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    want = naive.attention(
        *(np.asarray(x, np.float64) for x in (q, k, v)), naive.dense_mask((7, 8), 3)
    )
    assert_allclose(np.asarray(got, np.float64), want["out"], atol=2e-2)


def test_no_array_of_all_pairs():
    """64 x 64 tokens: all pairs would take 67 MB in float32."""
    x = jax.ShapeDtypeStruct((1, 64, 64, 1, 8), jnp.float32)

    def loss(q, k, v):
        return (neighborhood_attention(q, k, v, kernel_size=(13, 9)) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 12e6


@pytest.mark.parametrize("kernel", ["interpret", "interpret_triton"])
@pytest.mark.parametrize("dilation", [1, 2])
def test_kernels_step_by_step(kernel, dilation):
    """The TPU and GPU kernels, interpreted: all reads of the mask depend on q or on k alone."""
    rng = np.random.default_rng(10)
    inputs, cot = arrays(rng, (15, 9), h=2, g=1, d=16, e=8, additional=5)
    window = dict(kernel_size=(4, 3), stride=(2, 1), dilation=dilation, is_causal=(False, True))
    q, k, v, ak, av = (x.astype(np.float32) for x in inputs)
    want = naive.attention(q, k, v, naive.dense_mask((15, 9), **window), ak=ak, av=av, cot=cot)

    def call(q, k, v, ak, av):
        return neighborhood_attention(
            q, k, v, additional_keys=ak, additional_values=av, implementation=kernel, **window
        )

    @jax.jit
    def with_gradients(cot, *inputs):
        out, pull = jax.vjp(call, *inputs)
        return {"out": out, **dict(zip(("dq", "dk", "dv", "dak", "dav"), pull(cot)))}

    got = with_gradients(f32(cot), *map(jnp.asarray, (q, k, v, ak, av)))
    for name, x in got.items():
        error = np.abs(np.asarray(x, np.float64) - want[name]).max() / np.abs(want[name]).max()
        assert error <= (2e-6 if name == "out" else 1e-5), name


def test_relative_bias_of_a_sequence_runs_in_the_kernels():
    rng = np.random.default_rng(11)
    (q, k, v, *_), _ = arrays(rng, (70,), d=16, e=16)
    table = f32(rng.standard_normal((2, 17)))

    def loss(q, k, v, table, kernel):
        options = dict(kernel_size=9, rel_bias=table, implementation=kernel)
        return (neighborhood_attention(q, k, v, **options) ** 2).sum()

    got, want = (
        jax.jit(jax.grad(functools.partial(loss, kernel=name), (0, 1, 2, 3)))(
            *map(f32, (q, k, v)), table
        )
        for name in ("interpret", "xla")
    )
    jax.tree.map(lambda a, b: assert_allclose(a, b, rtol=0, atol=2e-5), got, want)


def test_two_runs_are_equal_to_the_bit():
    rng = np.random.default_rng(9)
    q, k, v = (f32(x) for x in arrays(rng, (8, 9))[0][:3])
    gradients = jax.jit(
        jax.grad(lambda *x: (neighborhood_attention(*x, kernel_size=3) ** 2).sum(), (0, 1, 2))
    )
    jax.tree.map(assert_array_equal, gradients(q, k, v), gradients(q, k, v))


@pytest.mark.parametrize(
    "options,error,message",
    [
        (dict(kernel_size=9), ValueError, "dilation=1 spans 9 tokens, but axis 0"),
        (dict(kernel_size=3, dilation=(1, 4)), ValueError, "spans 12 tokens, but axis 1"),
        (dict(kernel_size=3, stride=4), ValueError, "stride=4 on axis 0 exceeds kernel_size=3"),
        (dict(kernel_size=(3, 3, 3)), ValueError, "has 3 entries for 2 token axes"),
        (dict(kernel_size=0), ValueError, "must be at least 1"),
        (dict(kernel_size=3.0), TypeError, "must be integers"),
        (dict(kernel_size=3, is_causal=1), TypeError, "must be boolean"),
        (dict(), ValueError, "kernel_size is missing"),
        (dict(kernel_size=3, q_tile=(2, 2, 2)), ValueError, "q_tile=.* has 3 entries"),
        (dict(kernel_size=3, rel_bias=jnp.zeros((2, 3, 3))), ValueError, r"\(2, 5, 5\)"),
        (dict(kernel_size=4, rel_bias=jnp.zeros((2, 7, 7))), NotImplementedError, "odd windows"),
        (
            dict(kernel_size=3, is_causal=(True, False), rel_bias=jnp.zeros((2, 5, 5))),
            NotImplementedError,
            "both directions",
        ),
        (dict(kernel_size=3, additional_keys=jnp.zeros((1, 3, 2, 4))), ValueError, "together"),
        (
            dict(
                kernel_size=3,
                additional_keys=jnp.zeros((1, 3, 2, 4)),
                additional_values=jnp.zeros((1, 2, 2, 4)),
            ),
            ValueError,
            "additional_values must have shape",
        ),
        (
            dict(kernel_size=3, pre_permuted=TokenLayout((7, 8), (4, 4), (1, 1))),
            ValueError,
            "use permute_tokens",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_say_what_to_do(options, error, message):
    x = jnp.zeros((1, 7, 8, 2, 4))
    with pytest.raises(error, match=message):
        neighborhood_attention(x, x, x, **options)


def test_wrong_arrays():
    x = jnp.zeros((1, 7, 8, 2, 4))
    for bad, message in (
        ((x[0, 0], x, x), "query must have shape"),
        ((x, x[:, :6], x), "key must have the batch and token axes"),
        ((x, x[..., :3], x), "same width"),
        ((x[..., :1, :], x, x), "must divide those of query"),
    ):
        with pytest.raises(ValueError, match=message):
            neighborhood_attention(*bad, kernel_size=3)


def f32(x):
    return jnp.asarray(x, jnp.float32)


def plain(q, k, v):
    """Attention of every query to every key, by the kernel that windows are built on."""
    from attnjax.masks import Full

    return flash_attention(q, k, v, mask=Full(), scale=q.shape[-1] ** -0.5)[0]
