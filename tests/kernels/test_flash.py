"""Block-sparse attention against the dense definition in float64: values, lse, all gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import attnjax as aj
from attnjax.masks import Causal, Full, Prefix, Segments, Sink, Window, per_head
from pallas_kernels.compat import enable_x64
from pallas_kernels.flash import prepare, xla
from tests.compiles import compilations

RTOL = 1e-11
"""Both paths are float64 and differ in the order of sums alone."""


def normal(seed, *shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def agree(got, want, rtol=RTOL):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        finite = np.isfinite(b)
        assert np.array_equal(a[~finite], b[~finite])
        scale = max(np.abs(b[finite]).max(initial=0.0), 1e-3)
        assert np.abs(a[finite] - b[finite]).max(initial=0.0) <= rtol * scale


def both_paths(case, arrays, blocks=(32, 16)):
    """((loss, (o, lse)), gradients) of each path for `case(arrays) -> arguments of attention`."""

    def gradients(arrays, implementation, block_sizes):
        def loss(arrays):
            o, lse = aj.attention(
                arrays["q"], arrays["k"], arrays["v"], implementation=implementation,
                block_sizes=block_sizes, return_residual=True, **case(arrays),
            )  # fmt: skip
            seen = jnp.where(jnp.isneginf(lse), jnp.zeros_like(lse), lse)
            total = jnp.vdot(o, normal(98, *o.shape)) + jnp.vdot(seen, normal(99, *lse.shape))
            return total, (o, lse)

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    paths = (("block_sparse", blocks), ("dense", None))
    return jax.jit(lambda arrays: [gradients(arrays, *path) for path in paths])(arrays)


def qkv(t, s, h=2, g=1, d=4, e=3, b=2):
    return {"q": normal(0, b, t, h, d), "k": normal(1, b, s, g, d), "v": normal(2, b, s, g, e)}


LENGTHS = [(1, 1), (7, 63), (63, 7), (127, 127), (129, 257)]


@pytest.mark.parametrize(("t", "s"), LENGTHS)
def test_window_with_sinks_at_odd_lengths(t, s):
    with enable_x64(True):
        case = {"mask": Causal() & (Window(17) | Sink(3))}
        agree(*both_paths(lambda _: case, qkv(t, s, h=4, g=2)))


def _options():
    ids = np.sort(np.random.default_rng(0).integers(-1, 4, (2, 129)), axis=1)
    seen = np.random.default_rng(1).random((2, 1, 129, 129)) < 0.3
    return {
        "full": lambda a: {},
        "causal": lambda a: {"is_causal": True},
        "offset": lambda a: {"is_causal": True, "q_offset": -5},
        "offset_per_row": lambda a: {"is_causal": True, "q_offset": jnp.array([3, -70])},
        "per_head": lambda a: {"mask": per_head([Causal() & Window(5 + 20 * i) for i in range(4)])},
        "segments": lambda a: {"segment_ids": jnp.asarray(ids), "is_causal": True},
        "array_mask": lambda a: {"mask": jnp.asarray(seen)},
        "array_and_window": lambda a: {"mask": jnp.asarray(seen), "local_window_size": (9, 4)},
        "prefix": lambda a: {"mask": Causal() | Prefix(jnp.array([10, 70]))},
        "lengths": lambda a: {
            "key_value_seq_lengths": jnp.array([129, 40]),
            "query_seq_lengths": jnp.array([100, 129]),
        },
        "sinks": lambda a: {"is_causal": True, "sinks": a["sinks"]},
        "off_by_one": lambda a: {"is_causal": True, "normalizer": "off_by_one"},
        "softcap": lambda a: {"is_causal": True, "softcap": 1.5, "scale": 2.0},
        "bias": lambda a: {"mask": Causal() & Window(40), "bias": a["bias"]},
        "bias_broadcast": lambda a: {"bias": a["bias"][:, :, :1]},
        "score_mod": lambda a: {
            "is_causal": True,
            "score_mod": lambda s, b, h, q, k: s * a["slope"][h] + jnp.sin((q - k).astype(s.dtype)),
        },
        "dropout": lambda a: {"dropout_rate": 0.3, "dropout_rng": jax.random.key(7)},
    }


@pytest.mark.parametrize("name", _options())
def test_option(name):
    with enable_x64(True):
        arrays = qkv(129, 129, h=4, g=2) | {
            "sinks": normal(3, 4), "bias": normal(4, 1, 4, 129, 129), "slope": normal(5, 4)
        }  # fmt: skip
        agree(*both_paths(_options()[name], arrays))


def test_rows_without_keys_are_zero_and_have_no_gradient():
    with enable_x64(True):
        arrays = qkv(40, 40)
        case = lambda a: {"mask": Causal(-20)}  # noqa: E731  (queries 0..19 see nothing)
        got, want = both_paths(case, arrays)
        agree(got, want)
        (_, (o, lse)), grads = got
        assert np.all(o[:, :20] == 0) and np.all(np.isneginf(lse[:, :20]))
        assert np.all(grads["q"][:, :20] == 0)
        assert all(np.all(np.isfinite(g)) for g in grads.values())


def test_lanes_agree_with_one_lane(monkeypatch):
    with enable_x64(True):
        case = {"mask": Causal() & (Window(40) | Sink(3)), "softcap": 3.0}
        monkeypatch.setattr("pallas_kernels.flash.xla.LANE_SCORES", 0)
        for heads, batch in ((4, 2), (1, 4)):  # lanes over heads, lanes over batch rows
            agree(*both_paths(lambda _: case, qkv(70, 70, h=4, g=heads, b=batch)))


def test_cost_model_tiles_agree_with_given_tiles():
    with enable_x64(True):
        agree(*both_paths(lambda _: {"mask": Causal() & Window(100)}, qkv(300, 300), blocks=None))


def band(arrays, mask):
    """The band that the XLA body takes instead of single tiles, or None."""
    inputs, others, spec = prepare(arrays["q"], arrays["k"], arrays["v"], mask=mask, scale=1.0)
    return xla.plan({**inputs, **others}, spec)[1].band


def test_bands_agree_with_every_option(monkeypatch):
    """Rows whose keys are neighbors are taken in one step, at starts between the blocks' edges."""
    for name, value in {"QUERY_BLOCKS": (32,), "KEY_BLOCKS": (16,), "STEP_COST": 0.0}.items():
        monkeypatch.setattr(f"pallas_kernels.flash.blocks.{name}", value)
    masks = [Causal() & Window(9 + 10 * i) for i in range(4)]
    seen = jnp.asarray(np.random.default_rng(1).random((2, 1, 130, 130)) < 0.8)
    with enable_x64(True):
        arrays = qkv(130, 130, h=4, g=2) | {
            "bias": normal(4, 1, 4, 130, 130),
            "slope": normal(5, 4),
        }

        def case(a):
            def tilt(s, b, h, q, k):
                return s + a["slope"][h] * jnp.cos((q - k).astype(s.dtype))

            return {"mask": per_head(masks) & Prefix(120), "bias": a["bias"], "score_mod": tilt}

        assert band(arrays, per_head(masks) & Prefix(120)) is not None
        agree(*both_paths(case, arrays, blocks=None))
        both = lambda a: {"mask": seen, "local_window_size": (12, 3)}  # noqa: E731
        assert band(arrays, Window(13, 3)) is not None
        agree(*both_paths(both, arrays, blocks=None))


def test_vmap_and_sharded_forms_agree():
    with enable_x64(True):
        arrays = qkv(65, 65, h=4, g=2, b=4)
        case = {"mask": Causal() & (Window(20) | Sink(2)), "block_sizes": (16, 16)}
        call = functools.partial(aj.attention, implementation="block_sparse", **case)

        def loss(arrays):
            return (call(*(arrays[n] for n in "qkv")) * normal(9, 4, 65, 4, 3)).sum()

        want = jax.jit(jax.value_and_grad(loss))(arrays)
        mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        sharding = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))
        compiled = (
            jax.jit(jax.value_and_grad(loss), in_shardings=(sharding,)).lower(arrays).compile()
        )
        agree(compiled(jax.device_put(arrays, sharding)), want)
        # batch and heads stay sharded: nothing is gathered to compute the others' rows
        assert "all-gather" not in compiled.as_text()

        rows = jax.vmap(lambda q, k, v: call(q[None], k[None], v[None])[0])
        agree(rows(*arrays.values()), call(*arrays.values()))


def test_traced_masks_do_not_recompile():
    ids = [np.repeat(np.array([[0, 1]], np.int32), n, axis=1)[:, :300] for n in (150, 200)]

    @jax.jit
    def run(q, ids):
        return aj.attention(q, q, q, mask=Causal() & Segments(ids), implementation="block_sparse")

    q = normal(0, 1, 300, 2, 8, dtype=jnp.float32)
    first, second = (jnp.asarray(x) for x in ids)
    run(q, first)
    with compilations() as compiled:
        run(q, second)
    assert not compiled


def test_runs_are_bitwise_equal():
    q = normal(0, 2, 200, 4, 8, dtype=jnp.float32)
    step = jax.jit(
        jax.grad(
            lambda q: aj.attention(q, q, q, is_causal=True, implementation="block_sparse").sum()
        )
    )
    assert np.array_equal(step(q), step(q))


def test_padding_rows_do_not_leak():
    q = normal(0, 1, 70, 2, 8, dtype=jnp.float32)
    poisoned = q.at[:, 50:].set(jnp.nan)
    call = functools.partial(
        aj.attention, implementation="block_sparse", is_causal=True, block_sizes=(16, 16)
    )
    assert np.array_equal(call(poisoned, poisoned, poisoned)[:, :48], call(q, q, q)[:, :48])


def test_bfloat16_is_as_good_as_dense():
    arrays = [normal(i, 1, 130, 2, 16, dtype=jnp.float32).astype(jnp.bfloat16) for i in range(3)]
    exact = aj.attention(
        *(x.astype(jnp.float32) for x in arrays), is_causal=True, implementation="dense"
    )

    def error(implementation):
        out = aj.attention(*arrays, is_causal=True, implementation=implementation)
        assert out.dtype == jnp.bfloat16
        return np.abs(out.astype(jnp.float32) - exact).max()

    assert error("block_sparse") <= 2 * error("dense") + 1e-3


def test_memory_of_gradients_grows_linearly():
    def temporary(t):
        x = jax.ShapeDtypeStruct((1, t, 2, 16), jnp.float32)

        def loss(q, k, v):
            return aj.attention(q, k, v, is_causal=True, implementation="block_sparse").sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(4096), temporary(16384)
    assert large <= 4.5 * small
    assert large < 16384 * 16384 * 2 * 4 / 30


masks = st.sampled_from(
    [
        Full(),
        Causal(),
        Window(9),
        Window(3, 11),
        Causal() & (Window(5) | Sink(2)),
        ~Window(7),
        Causal(4),
    ]
)


@settings(max_examples=8, deadline=None)
@given(
    mask=masks,
    t=st.sampled_from([1, 7, 63, 127, 129]),
    s=st.sampled_from([1, 7, 63, 127, 129]),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    blocks=st.sampled_from([(8, 8), (32, 16), (16, 64)]),
    sinks=st.booleans(),
)
def test_random_problems(mask, t, s, heads, blocks, sinks):
    with enable_x64(True):
        arrays = qkv(t, s, *heads) | ({"sinks": normal(5, heads[0])} if sinks else {})
        case = lambda a: {"mask": mask} | ({"sinks": a["sinks"]} if sinks else {})  # noqa: E731
        agree(*both_paths(case, arrays, blocks))
