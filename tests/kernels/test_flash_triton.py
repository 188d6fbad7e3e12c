"""Triton kernels, interpreted on the CPU, against the dense definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax.masks import Causal, Full, Segments, Window, per_head
from pallas_kernels import aot, tilemath
from pallas_kernels.compat import enable_x64
from pallas_kernels.dispatch import Target, Unsupported
from pallas_kernels.flash import FlashConfig, flash_attention, prepare, triton
from pallas_kernels.flash.gpu_arch import compute_capability, require_capability
from pallas_kernels.flash.triton_config import (
    configured,
    default_config,
    shared_bytes,
)
from pallas_kernels.machines import shared_memory

FORWARD, BACKWARD = 2e-6, 1e-5
"""Float32 rounding of a few hundred terms, relative to the largest entry; measured 3e-7, 2e-6."""

CONFIG = FlashConfig(block_q=32, block_kv=16)

MASKED = -jnp.inf


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qkv(t, s, h=2, g=1, d=8, e=8, b=2):
    return {"q": normal(0, b, t, h, d), "k": normal(1, b, s, g, d), "v": normal(2, b, s, g, e)}


def indices(b, h, t, s, q_offset=0):
    """(b, h, q, k) as arrays that broadcast to [b, h, t, s]; q and k absolute."""
    offset = jnp.broadcast_to(jnp.asarray(q_offset), (b,)).reshape(b, 1, 1, 1)
    return (
        np.arange(b).reshape(b, 1, 1, 1),
        np.arange(h).reshape(1, h, 1, 1),
        jnp.arange(t).reshape(1, 1, t, 1) + offset,
        np.arange(s).reshape(1, 1, 1, s),
    )


def dense(
    q, k, v, *, mask, scale, mask_array=None, bias=None, score_mod=None, sinks=None, softcap=None,
    q_offset=0, dropout_rate=0.0, dropout_seed=None,
):  # fmt: skip
    """(o, lse) by the definition, with every score in memory."""
    (b, t, h, _), (s, g) = q.shape, k.shape[1:3]
    k, v = (jnp.repeat(x, h // g, axis=2) for x in (k, v))
    index = indices(b, h, t, s, q_offset)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) * scale
    if bias is not None:
        scores = scores + bias
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if score_mod is not None:
        scores = score_mod(scores, *(jnp.asarray(i, jnp.int32) for i in index))
    seen = jnp.broadcast_to(jnp.asarray(mask.predicate(*index)), scores.shape)
    if mask_array is not None:
        seen = seen & mask_array
    top = jax.lax.stop_gradient(jnp.where(seen, scores, 0.0).max(-1, keepdims=True))
    e = jnp.where(seen, jnp.exp(scores - top), 0.0)
    total = e.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks.reshape(1, -1, 1, 1) - top)
    empty = total == 0
    p = e / jnp.where(empty, 1.0, total)
    if dropout_rate:
        factors = tilemath.dropout_factors(dropout_seed, *index, dropout_rate)
        p = p * factors.astype(p.dtype)
    lse = jnp.where(empty, MASKED, top + jnp.log(jnp.where(empty, 1.0, total)))
    return jnp.einsum("bhts,bshe->bthe", p, v), lse[..., 0].swapaxes(1, 2)


def run(attend, arrays, case, dtype):
    """((o, lse), gradients) of a random projection of o and of lse."""
    arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), arrays)

    def loss(arrays):
        o, lse = attend(arrays["q"], arrays["k"], arrays["v"], **case(arrays))
        seen = jnp.where(jnp.isneginf(lse), jnp.zeros_like(lse), lse)
        weights = (jnp.asarray(normal(98 + i, *x.shape), dtype) for i, x in enumerate((o, lse)))
        return sum(jnp.vdot(w, x) for w, x in zip(weights, (o, seen), strict=True)), (o, lse)

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return jax.tree.map(np.asarray, (out, grads))


def compare(arrays, case, config=CONFIG):
    def kernel(*xs, **options):
        return flash_attention(*xs, config=config, implementation="interpret_triton", **options)

    out, grads = run(kernel, arrays, case, jnp.float32)
    with enable_x64(True):
        exact, exact_grads = run(dense, arrays, case, jnp.float64)
    for got, want in zip(out, exact, strict=True):
        agree("output", got, want, FORWARD)
    for name, want in exact_grads.items():
        agree(name, grads[name], want, BACKWARD)
    return out, grads


def agree(name, got, want, tolerance):
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite]), name
    error = np.abs(got[finite] - want[finite]).max(initial=0.0)
    assert error <= tolerance * max(np.abs(want[finite]).max(initial=0.0), 1e-3), (name, error)


def everything(a):
    t, s = a["q"].shape[1], a["k"].shape[1]

    def score_mod(score, b, h, q, k):
        lift = a["row"][b, q] * score + a["col"][h, k] + a["table"][h, q - k + s - 1]
        return a["slope"][h] * lift + a["shared"][q] * jnp.tanh(score)

    assert a["table"].shape[1] == t + s - 1
    return {
        "mask": Causal(s - t) & Window(40), "bias": a["bias"], "softcap": 3.0, "scale": 0.3,
        "sinks": a["sinks"], "score_mod": score_mod,
    }  # fmt: skip


def test_all_options_and_their_gradients():
    t, s, h = 70, 85, 4
    arrays = qkv(t, s, h=h, g=2, d=24, e=40) | {
        "bias": normal(3, 1, h, t, s), "sinks": normal(4, h), "slope": normal(5, h),
        "row": normal(6, 2, t), "col": normal(7, h, s), "table": normal(8, h, t + s - 1),
        "shared": normal(9, t),
    }  # fmt: skip
    compare(arrays, everything)


def rows_and_dropout(a):
    seen = jnp.asarray(np.random.default_rng(1).random((2, 1, 50, 60)) < 0.6)
    return {
        "mask": Causal(), "mask_array": seen, "bias": a["bias"], "scale": 0.5,
        "q_offset": jnp.array([3, -20]), "dropout_rate": 0.3,
        "dropout_seed": jnp.array([1, 2], jnp.uint32),
    }  # fmt: skip


def test_array_mask_traced_offsets_dropout_and_empty_rows():
    arrays = qkv(50, 60) | {"bias": normal(3, 2, 1, 50, 1)}
    (o, lse), grads = compare(arrays, rows_and_dropout)
    assert np.all(o[1, :20] == 0) and np.all(np.isneginf(lse[1, :20]))
    assert np.all(grads["q"][1, :20] == 0)


SIMPLE = {
    "full": lambda a: {"mask": Full()},
    "key_bias": lambda a: {"mask": Full(), "bias": a["key_bias"]},
    "row_bias": lambda a: {"mask": Causal(), "bias": a["bias"]},
    "per_head": lambda a: {"mask": per_head([Causal() & Window(5 + 20 * i) for i in range(2)])},
    "segments": lambda a: {
        "mask": Causal() & Segments(jnp.asarray(np.sort(np.arange(128) % 5).reshape(2, 64)))
    },
    "relative": lambda a: {
        "mask": Full(), "score_mod": lambda s, b, h, q, k: s + a["table"][q - k + 63]
    },
    "negative_scale": lambda a: {"mask": Causal(), "scale": -0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", SIMPLE)
def test_option(name):
    arrays = qkv(64, 64) | {
        "key_bias": normal(3, 1, 2, 1, 64), "bias": normal(4, 2, 1, 64, 64), "table": normal(5, 127)
    }  # fmt: skip
    compare(arrays, lambda a: {"scale": 0.4} | SIMPLE[name](a))


@pytest.mark.slow
@pytest.mark.parametrize(("t", "s"), [(1, 1), (7, 63), (63, 7), (129, 257)])
def test_odd_lengths(t, s):
    compare(qkv(t, s, h=4, g=2, d=60, e=80), lambda a: {"mask": Causal(s - t), "scale": 0.2})


def test_offset_tables_in_chunks(monkeypatch):
    """The pair gradients of an offset table are made a few query blocks at a time."""
    monkeypatch.setattr("pallas_kernels.flash.triton_pairs.CHUNK_BYTES", 1)
    arrays = qkv(70, 33, b=1, g=2) | {"table": normal(5, 2, 102)}

    def case(a):
        return {
            "mask": Causal(), "scale": 0.4,
            "score_mod": lambda s, b, h, q, k: s + a["table"][h, q - k + 32],
        }  # fmt: skip

    compare(arrays, case)


def kernel_call(q, k, v, **options):
    options = {"mask": Causal(), "scale": 0.3, "config": CONFIG} | options
    return flash_attention(q, k, v, implementation="interpret_triton", **options)


def test_runs_are_bitwise_equal():
    arrays = [jnp.asarray(x) for x in qkv(70, 70, h=4, g=2).values()]
    step = jax.jit(jax.grad(lambda *x: kernel_call(*x)[0].sum(), argnums=(0, 1, 2)))
    assert all(map(np.array_equal, step(*arrays), step(*arrays)))


def test_tiles_without_visible_keys_are_never_read():
    q = jnp.asarray(normal(0, 1, 70, 2, 8))
    poisoned = q.at[:, 50:].set(jnp.nan)
    config = FlashConfig(block_q=16, block_kv=16)
    clean, got = (kernel_call(x, x, x, config=config)[0] for x in (q, poisoned))
    assert np.array_equal(got[:, :48], clean[:, :48])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_as_good_as_dense(dtype):
    arrays = jax.tree.map(
        lambda x: np.asarray(jnp.asarray(x, dtype), np.float32), qkv(70, 70, d=16)
    )

    def case(a):
        return {"mask": Causal(), "scale": 0.25}

    def kernel(*xs, **options):
        return flash_attention(*xs, config=CONFIG, implementation="interpret_triton", **options)

    def in_dtype(*xs, **options):
        o, lse = dense(*(x.astype(dtype) for x in xs), **options)
        return o.astype(jnp.float32), lse.astype(jnp.float32)

    def kernel_in_dtype(*xs, **options):
        o, lse = kernel(*(x.astype(dtype) for x in xs), **options)
        assert o.dtype == dtype
        return o.astype(jnp.float32), lse

    exact = run(dense, arrays, case, jnp.float32)
    plain, ours = (run(f, arrays, case, jnp.float32) for f in (in_dtype, kernel_in_dtype))
    for want, a, b in zip(*map(jax.tree.leaves, (exact, plain, ours)), strict=True):
        assert np.abs(b - want).max() <= 2 * np.abs(a - want).max() + 1e-4


def test_lengths_beyond_the_arrays_are_never_read():
    """Interpreted reads beyond an array give NaN; none may reach a result."""
    arrays = qkv(17, 19, h=2, g=2, d=5, e=3)
    (o, lse), grads = compare(arrays, lambda a: {"mask": Full(), "scale": 1.0})
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((o, lse, grads)))


KINDS = {
    "NVIDIA A100-SXM4-80GB": (8, 0), "NVIDIA L4": (8, 9), "NVIDIA L40S": (8, 9),
    "NVIDIA GeForce RTX 4090": (8, 9), "NVIDIA GeForce RTX 3090": (8, 6), "NVIDIA A10G": (8, 6),
    "NVIDIA H100 80GB HBM3": (9, 0), "NVIDIA H200": (9, 0), "NVIDIA GH200 480GB": (9, 0),
    "NVIDIA B200": (10, 0), "NVIDIA GB200": (10, 0), "Tesla T4": (7, 5),
    "NVIDIA RTX PRO 6000 Blackwell Server Edition": (12, 0), "Tesla V100-SXM2-16GB": (7, 0),
    "NVIDIA RTX 6000 Ada Generation": (8, 9), "NVIDIA RTX A6000": (8, 6), "NVIDIA A1000000": None,
    "something else": None, None: None,
}  # fmt: skip


def test_compute_capabilities():
    assert {kind: compute_capability(kind) for kind in KINDS} == KINDS
    assert require_capability(Target("cuda", "NVIDIA H200"), (8, 0), "x") == (9, 0)
    assert require_capability(Target("cuda", None, 1, (8, 6)), (8, 0), "x") == (8, 6)
    for kind, said in (("Tesla T4", "7.5"), (None, "not known"), ("new GPU", "not known")):
        with pytest.raises(Unsupported, match=said):
            require_capability(Target("cuda", kind), (8, 0), "x")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "Tesla T4"}, "7.5"),
        ({"platform": "rocm"}, "rocm"),
        ({"d": 264}, "256"),
        ({"dtype": jnp.int8}, "int8"),
        ({"config": FlashConfig(block_q=48)}, "block_q=48"),
        ({"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32}, "BF16_BF16_F32"),
        ({"score_mod": lambda s, b, h, q, k: s + jnp.cbrt(s)}, "cbrt"),
        ({"mask_array": (1, 1, 1 << 16, 1 << 16)}, "32 bits"),
    ],
)
def test_unsupported_options_are_named(change, said):
    target = Target(change.pop("platform", "cuda"), change.pop("kind", "NVIDIA H200"))
    d, dtype = change.pop("d", 64), change.pop("dtype", jnp.float32)
    big = change.pop("mask_array", None)
    q = jnp.zeros((1, 16, 2, d), jnp.float32)
    inputs, others, spec = prepare(q, q, q, mask=Causal(), scale=1.0, **change)
    operands = {**inputs, **others, **{n: q.astype(dtype) for n in ("query", "key", "value")}}
    if big is not None:
        operands["mask_array"] = jax.ShapeDtypeStruct(big, jnp.bool_)
    with pytest.raises(Unsupported, match=said):
        triton.forward(operands, spec, target)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("busy", [False, True])
def test_default_tiles_fit_the_shared_memory(capability, busy):
    table = jnp.zeros(2 * 512 - 1)
    mod = (lambda s, b, h, q, k: s + table[q - k + 511]) if busy else None
    for d, dtype in ((16, jnp.bfloat16), (64, jnp.float16), (96, jnp.bfloat16), (256, jnp.float32)):
        q = jnp.zeros((1, 512, 1, d), dtype)
        inputs, others, spec = prepare(q, q, q, mask=Causal(), scale=1.0, score_mod=mod)
        for tensor_cores in (False, True):
            default = default_config(d, d, dtype, capability, tensor_cores, busy)
            got = configured(default, FlashConfig(), {**inputs, **others}, spec, capability)
            for name, config in zip(got._fields, got, strict=True):
                need = shared_bytes(name, config, {**inputs, **others}, spec, capability)
                assert need <= shared_memory(capability)
                assert all(n >= 16 and n & (n - 1) == 0 for n in config[:2])


def test_tiles_that_are_asked_for_are_taken():
    q = jnp.zeros((1, 512, 1, 64), jnp.bfloat16)
    inputs, others, spec = prepare(q, q, q, mask=Causal(), scale=1.0)
    asked = FlashConfig(32, 128, block_q_dkv=16, options=(("num_warps", 2), ("num_stages_dq", 1)))
    default = default_config(64, 64, q.dtype, (9, 0))
    got = configured(default, asked, {**inputs, **others}, spec, (9, 0))
    assert got.forward == (32, 128, 2, 3) and got.dq == (32, 128, 2, 1)
    assert got.dkv == (16, 128, 2, 3)


@pytest.mark.slow
@pytest.mark.skipif(bool(aot.missing_packages("H100")), reason="needs jax's CUDA plugin")
@pytest.mark.parametrize("target", ["A100", "L4", "H100", "B200"])
@pytest.mark.parametrize("plain", [True, False])
def test_kernels_compile_without_a_gpu(target, plain):
    t, h = 512, 4

    def mod(a):
        return lambda s, b, h, q, k: a["slope"][h] * s + a["table"][h, q - k + t - 1]

    def loss(a):
        options = {} if plain else {"score_mod": mod(a), "softcap": 20.0, "bias": a["bias"]}
        o, _ = flash_attention(
            a["q"], a["k"], a["v"], mask=Causal(), scale=0.1, implementation="triton", **options
        )
        return o.astype(jnp.float32).sum()

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    heads = {n: array(1, t, g, 128, dtype=jnp.bfloat16) for n, g in (("q", h), ("k", 2), ("v", 2))}
    arrays = heads | {
        "slope": array(h), "table": array(h, 2 * t - 1), "bias": array(1, h, 1, t),
    }  # fmt: skip
    report = aot.compile_for(target, jax.grad(loss), arrays)
    assert report.routes["triton"] == (3 if plain else 4)
