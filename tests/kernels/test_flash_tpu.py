"""The TPU kernels of block-sparse attention, interpreted, against the definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from attnjax.masks import Causal, Full, Prefix, Segments, Window, per_head
from pallas_kernels.compat import enable_x64
from pallas_kernels.dispatch import Target, Unsupported
from pallas_kernels.flash import tpu
from pallas_kernels.flash.attention import flash_attention, prepare
from pallas_kernels.flash.lists import make_lists
from pallas_kernels.flash.spec import FlashConfig, FlashSpec
from pallas_kernels.flash.tpu_lists import is_first, is_last, kind, make_walk
from pallas_kernels.tilemath import accumulator_dtype, dropout_factors

FORWARD, BACKWARD = 2e-6, 1e-5
"""Largest errors of float32, relative to the largest entry: sums of hundreds of roundings."""

NAMES = ("q", "k", "v")


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def problem(t=200, s=300, h=4, g=2, d=16, e=24, b=2):
    """Operands, and what the cases look up."""
    return {
        "q": normal(0, b, t, h, d), "k": normal(1, b, s, g, d), "v": normal(2, b, s, g, e),
        "sinks": normal(3, h), "bias": normal(4, 1, h, t, s), "by_query": normal(5, b, 1, t, 1),
        "by_key": normal(6, 1, h, 1, s), "slope": 0.1 * normal(7, h), "row": normal(8, b),
        "distance": normal(9, h, 600), "shared": normal(10, 600), "of_query": normal(11, h, 700),
        "of_key": normal(12, 700), "d_out": normal(13, b, t, h, e), "d_lse": normal(14, b, t, h),
    }  # fmt: skip


IDS = np.sort(np.random.default_rng(0).integers(-1, 4, (2, 300)), axis=1).astype(np.int32)
SEEN = np.random.default_rng(1).random((2, 1, 200, 300)) < 0.3
SEEN[:, :, 150:, 128:] = False

CASES = {
    "causal": lambda a: {"mask": Causal(100)},
    "full": lambda a: {},
    "window": lambda a: {"mask": Causal() & Window(40), "q_offset": 100},
    "empty_rows": lambda a: {"mask": Causal(), "q_offset": -140},
    "row_offsets": lambda a: {"mask": Causal(), "q_offset": jnp.array([3, -170])},
    "per_head": lambda a: {"mask": per_head([Causal() & Window(5 + 60 * i) for i in range(4)])},
    "segments": lambda a: {"mask": Segments(jnp.asarray(IDS[:, :200]), jnp.asarray(IDS))},
    "prefix": lambda a: {"mask": Causal() | Prefix(jnp.array([10, 170]))},
    "sinks": lambda a: {"mask": Causal(), "q_offset": -20, "sinks": a["sinks"]},
    "softcap": lambda a: {"softcap": 1.5},
    "bias": lambda a: {"mask": Causal(100), "bias": a["bias"], "softcap": 3.0},
    "bias_by_query": lambda a: {"mask": Causal(), "bias": a["by_query"]},
    "bias_by_key": lambda a: {"mask": Window(64), "bias": a["by_key"]},
    "array_mask": lambda a: {"mask": Causal(100), "mask_array": jnp.asarray(SEEN)},
    "key_mask": lambda a: {"mask_array": jnp.asarray(SEEN[:, :, :1])},
    "scalar_reads": lambda a: {
        "mask": Causal(),
        "score_mod": lambda s, b, h, q, k: (
            a["row"][b] * s - a["slope"][h] * (q - k).astype(s.dtype)
        ),
    },
    "token_reads": lambda a: {
        "mask": Causal(50),
        "score_mod": lambda s, b, h, q, k: s * a["of_key"][k] + a["of_query"][h, q],
    },
    "offset_reads": lambda a: {
        "mask": Causal(50),
        "score_mod": lambda s, b, h, q, k: (
            jnp.tanh(s + a["distance"][h, jnp.clip(q - k + 300, 0, 599)])
            + a["shared"][jnp.abs(q - k)]
        ),
    },
    "dropout": lambda a: {
        "mask": Causal(), "dropout_rate": 0.3, "dropout_seed": jnp.array([1, 2], jnp.uint32)
    },
}  # fmt: skip


@functools.cache
def program(case, config):
    """Value and gradients of a case by the kernels, compiled once per shape."""

    def loss(arrays):
        o, lse = flash_attention(
            arrays["q"], arrays["k"], arrays["v"], scale=0.25, config=config,
            implementation="interpret", **{"mask": Full(), **case(arrays)},
        )  # fmt: skip
        seen = jnp.where(jnp.isneginf(lse), 0.0, lse)
        wide = o.astype(lse.dtype)
        return jnp.vdot(wide, arrays["d_out"]) + jnp.vdot(seen, arrays["d_lse"]), (o, lse)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(arrays, case, blocks=(128, 128), max_blocks=None, **options):
    """((o, lse), gradients of vdot(o, d_out) + vdot(lse, d_lse))."""
    config = FlashConfig(*blocks, max_blocks=max_blocks, options=tuple(options.items()))
    (_, out), grads = program(case, config)(arrays)
    return out, grads


def definition(arrays, case):
    """The same from the definition, with a t x s array, in the type of the arrays."""

    def loss(arrays):
        o, lse = dense(arrays["q"], arrays["k"], arrays["v"], **{"mask": Full(), **case(arrays)})
        seen = jnp.where(jnp.isneginf(lse), jnp.zeros_like(lse), lse)
        wide = o.astype(lse.dtype)
        return jnp.vdot(wide, arrays["d_out"]) + jnp.vdot(seen, arrays["d_lse"]), (o, lse)

    (_, out), grads = jax.value_and_grad(loss, has_aux=True)(arrays)
    return out, grads


def dense(q, k, v, *, mask, q_offset=0, mask_array=None, bias=None, softcap=None, score_mod=None,
          sinks=None, dropout_rate=0.0, dropout_seed=None):  # fmt: skip
    (b, t, h, _), s = q.shape, k.shape[1]
    k, v = (jnp.repeat(x, h // k.shape[2], axis=2) for x in (k, v))
    wide = accumulator_dtype(q.dtype)
    scores = 0.25 * jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=wide)
    i32 = functools.partial(jnp.arange, dtype=jnp.int32)
    rows, heads = i32(b).reshape(-1, 1, 1, 1), i32(h).reshape(1, -1, 1, 1)
    offset = jnp.broadcast_to(jnp.asarray(q_offset, jnp.int32), (b,)).reshape(-1, 1, 1, 1)
    at = (rows, heads, offset + i32(t).reshape(1, 1, -1, 1), i32(s).reshape(1, 1, 1, -1))
    scores = scores if bias is None else scores + bias.astype(wide)
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    scores = scores if score_mod is None else score_mod(scores, *at)
    seen = jnp.broadcast_to(jnp.asarray(mask.predicate(*at)), scores.shape)
    seen = seen if mask_array is None else seen & mask_array
    scores = jnp.where(seen, scores, -jnp.inf)
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(wide).reshape(1, -1, 1, 1), (b, h, t, 1))
        scores = jnp.concatenate([scores, sink], -1)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(jnp.isneginf(top), jnp.zeros_like(top), top))
    total = weights.sum(-1, keepdims=True)
    safe = jnp.where(total == 0, jnp.ones_like(total), total)
    weights = (weights / safe)[..., :s]
    if dropout_rate:
        weights = weights * dropout_factors(dropout_seed, *at, dropout_rate).astype(wide)
    o = jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v, preferred_element_type=wide)
    lse = jnp.where(total == 0, jnp.full_like(total, -jnp.inf), top + jnp.log(safe))
    return o.astype(q.dtype), lse[..., 0].swapaxes(1, 2)


def exact(arrays, case):
    with enable_x64(True):
        return jax.device_get(
            definition({n: np.asarray(x, np.float64) for n, x in arrays.items()}, case)
        )


def error(got, want):
    """Largest error relative to the largest entry; infinities must agree."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    finite = np.isfinite(want)
    assert np.array_equal(got[~finite], want[~finite])
    return np.abs(got[finite] - want[finite]).max(initial=0.0) / np.abs(want[finite]).max(
        initial=1e-3
    )


def agree(got, want):
    (out, grads), (true_out, true_grads) = got, want
    for name, a, b in zip(("o", "lse"), out, true_out, strict=True):
        assert error(a, b) <= FORWARD, name
    for name, x in grads.items():
        if name not in ("d_out", "d_lse"):
            assert error(x, true_grads[name]) <= BACKWARD, name


def some(names, quick):
    """Test parameters, those not in `quick` marked slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


QUICK = set(CASES) - {"full", "window", "prefix", "key_mask", "bias_by_query", "softcap"}


@pytest.mark.parametrize("name", some(CASES, QUICK))
def test_case(name):
    arrays = problem()
    agree(run(arrays, CASES[name]), exact(arrays, CASES[name]))


@pytest.mark.parametrize("name", some(CASES, {"per_head", "softcap"}))
def test_separate_backward_kernels(name):
    arrays = problem()
    agree(run(arrays, CASES[name], fused=False), exact(arrays, CASES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_parts_of_tiles(name):
    arrays = problem()
    agree(
        run(arrays, CASES[name], (256, 256), sub_q=128, sub_kv=128, fused=False),
        exact(arrays, CASES[name]),
    )


SHAPES = [
    (1, 1, 1, 1, 8, 8), (7, 63, 2, 1, 80, 8), (128, 128, 2, 2, 128, 64), (129, 257, 3, 1, 60, 96),
    (257, 127, 8, 2, 8, 130),
]  # fmt: skip


@pytest.mark.parametrize("shape", some(SHAPES, SHAPES[1:2] + SHAPES[3:4]), ids=str)
def test_shape(shape):
    t, s, h, g, d, e = shape
    arrays = problem(t, s, h, g, d, e, b=1)
    case = lambda a: {"mask": Causal(s // 2)}  # noqa: E731
    agree(run(arrays, case, (None, None)), exact(arrays, case))


@pytest.mark.parametrize("name", some(["causal", "softcap", "sinks"], {"sinks"}))
def test_bfloat16_is_as_good_as_dense(name):
    arrays = {n: x.astype(jnp.bfloat16) if n in NAMES else x for n, x in problem().items()}
    want = exact(arrays, CASES[name])
    plain = definition(arrays, CASES[name])
    got = run(arrays, CASES[name])
    pairs = [(got[0][0], plain[0][0], want[0][0])]
    pairs += [(got[1][n], plain[1][n], want[1][n]) for n in NAMES]
    for ours, theirs, true in pairs:
        assert ours.dtype == jnp.bfloat16
        assert error(ours, true) <= 2 * error(theirs, true)


def test_large_logits():
    arrays = problem()
    arrays["q"] = 300 * arrays["q"]
    (o, lse), grads = run(arrays, CASES["causal"])
    want = exact(arrays, CASES["causal"])
    assert error(lse, want[0][1]) <= FORWARD
    assert error(o, want[0][0]) <= 1e-4  # a rounding of logits near 1000 moves the weights
    assert all(np.all(np.isfinite(grads[n])) for n in NAMES)


def test_rows_that_see_nothing():
    (o, lse), grads = run(problem(), CASES["empty_rows"])
    assert np.all(np.asarray(o[:, :140]) == 0) and np.all(np.isneginf(lse[:, :140]))
    assert np.all(np.asarray(grads["q"][:, :140]) == 0)


@pytest.mark.parametrize("name", some(["offset_reads", "bias_by_key", "segments"], {"segments"}))
def test_bitwise_repeatable(name):
    arrays = problem()
    first, second = (run(arrays, CASES[name]) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert np.array_equal(a, b)


WATCHED = pltpu.InterpretParams(
    detect_races=True, dma_execution_mode="on_wait", out_of_bounds_reads="raise",
    uninitialized_memory="nan",
)  # fmt: skip


@pytest.mark.parametrize(("name", "fused"), [("segments", True), ("token_reads", None)])
def test_no_races_and_nothing_uninitialized(name, fused):
    arrays = problem(t=130, s=200, h=2, g=1, b=1)
    arrays["of_query"] = arrays["of_query"][:2]
    case = CASES[name](arrays)
    if name == "segments":
        case["mask"] = Segments(jnp.asarray(IDS[:1, :130]), jnp.asarray(IDS[:1, :200]))
    config = FlashConfig(128, 128, options=(("fused", fused),))
    inputs, others, spec = prepare(*(arrays[n] for n in NAMES), scale=0.25, config=config, **case)
    operands, target = {**inputs, **others}, Target("tpu", interpret=WATCHED)  # pyright: ignore
    o, lse = tpu.forward(operands, spec, target)
    delta = jnp.sum(o * arrays["d_out"], -1)
    more = {"d_out": arrays["d_out"], "lse": lse, "delta": delta}
    grads = tpu.backward({**operands, **more}, spec, target)
    plain = target._replace(interpret=True)
    want = tpu.backward({**operands, **more}, spec, plain)
    assert error(o, tpu.forward(operands, spec, plain)[0]) <= FORWARD
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        assert error(a, b) <= FORWARD


@pytest.mark.parametrize("traced", [False, True])
def test_walk_lists_what_the_map_lists(traced):
    classes = np.random.default_rng(3).integers(0, 3, (2, 3, 5, 7)).astype(np.int8)
    classes[0, 1, 2] = classes[1, 0, 0] = 0
    classes[1, 2] = 0
    walk = jax.jit(make_walk_arrays)(classes) if traced else make_walk_arrays(classes)
    words, steps = np.asarray(walk[0]).reshape(2, 3, -1), int(walk[1])
    shape = make_walk(classes)
    for b, h in np.ndindex(2, 3):
        seen = np.zeros((5, 7), np.int8)
        opened = closed = 0
        for word in jnp.asarray(words[b, h, :steps]):
            at = int(shape.row(word)), int(shape.column(word))
            seen[at] += int(kind(word))
            opened, closed = opened + int(is_first(word)), closed + int(is_last(word))
        assert np.array_equal(seen, classes[b, h])
        assert opened == closed == 5
    assert steps == max(1, max_steps(classes))


def make_walk_arrays(classes):
    walk = make_walk(classes)
    return walk.words, jnp.asarray(walk.steps)


def max_steps(classes):
    return int(np.maximum((classes > 0).sum(-1), 1).sum(-1).max())


def test_window_visits_the_ideal_number_of_tiles():
    x = jax.ShapeDtypeStruct((1, 32768, 1, 128), jnp.bfloat16)
    mask = Causal() & Window(1024)
    operands = {"query": x, "key": x, "value": x, "mask_array": None}
    spec = FlashSpec(scale=1.0, mask=mask, q_offset=0)
    for block in (256, 512, 1024):
        rows = 32768 // block
        ideal = sum(min(i, -(-1023 // block)) + 1 for i in range(rows))
        walk = make_walk(make_lists(operands, spec, block, block).class_map())
        assert walk.steps == ideal


def test_room_of_a_traced_list():
    """A list longer than its room gives NaN; one that fits is not touched."""
    arrays = problem()
    (o, _), _ = run(arrays, CASES["segments"], max_blocks=1)
    assert np.isnan(np.asarray(o)).any()
    agree(run(arrays, CASES["segments"], max_blocks=3), exact(arrays, CASES["segments"]))


def _lacks(case, arrays=None, blocks=(128, 128), **options):
    with pytest.raises(Unsupported) as lack:
        run(arrays or problem(), case, blocks, **options)
    message = str(lack.value)
    assert "xla" in message
    return message


def test_what_is_not_supported_is_named():
    half = {n: x.astype(jnp.float16) if n in NAMES else x for n, x in problem().items()}
    assert "float16" in _lacks(CASES["full"], half)
    assert "block_q=64" in _lacks(CASES["full"], blocks=(64, 64))
    table = normal(0, 200, 300)
    pairs = lambda a: {"score_mod": lambda s, b, h, q, k: s + table[q, k]}  # noqa: E731
    assert "q - k" in _lacks(pairs)
    bent = lambda a: {"score_mod": lambda s, b, h, q, k: jnp.sinh(s)}  # noqa: E731
    assert "sinh" in _lacks(bent)
    assert "vector memory" in _lacks(CASES["full"], blocks=(4096, 4096), sub_q=4096, sub_kv=4096)
    with pytest.raises(Unsupported, match="scalar memory"):
        make_walk(np.ones((8, 16, 64, 64), np.int8))
