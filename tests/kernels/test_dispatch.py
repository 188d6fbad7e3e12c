"""Choice of the body at lowering: platforms, shard_map, vmap, export, and what is said about it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import attnjax as aj
from attnjax.masks import Causal, Lengths, Segments, Window
from pallas_kernels.dispatch import Kernel, Operation, Target, Unsupported
from tests.compiles import compilations


class Spec(tuple):
    implementation = property(lambda self: self[0])


def toy(**bodies):
    """An operation that multiplies by another number on each platform."""

    def times(n, lacks=False):
        def body(operands, spec, target):
            if lacks:
                raise Unsupported("toy: the kernel lacks this; use implementation='xla'.")
            return operands["x"] * jnp.float32(n)

        return body

    return Operation(
        "toy",
        times(1),
        lambda operands, spec: jax.ShapeDtypeStruct(operands["x"].shape, jnp.float32),
        {
            "tpu": Kernel("tpu", times(2), interpreted_by="interpret"),
            "triton": Kernel("cuda", times(3, **bodies), interpreted_by="interpret_triton"),
            "mosaic_gpu": Kernel("cuda", times(4), default=False),
        },
    )


def lowered(operation, platform, implementation=None):
    def run(x):
        return operation({"x": x}, Spec((implementation,)))

    x = jax.ShapeDtypeStruct((4,), jnp.float32)
    checks = [export.DisabledSafetyCheck.custom_call("Qr")]
    return export.export(jax.jit(run), platforms=platform, disabled_checks=checks)(x).mlir_module()


@pytest.mark.parametrize(
    ("platforms", "factors"),
    [(("cpu",), "1"), (("tpu",), "2"), (("cuda",), "3"), (("cpu", "tpu", "cuda"), "123")],
)
def test_one_module_holds_the_body_of_each_platform(platforms, factors):
    text = lowered(toy(), platforms)
    for n in "1234":
        assert (f"dense<{n}.000000e+00>" in text) == (n in factors), n


def test_kernels_that_were_never_run_are_chosen_by_name_alone():
    assert "4.000000e+00" in lowered(toy(), ("cuda",), "mosaic_gpu")
    assert "3.000000e+00" in lowered(toy(), ("cuda",), "pallas")


def test_what_a_kernel_lacks_is_said_or_falls_back():
    operation = toy(lacks=True)
    assert "3.000000e+00" not in lowered(operation, ("cuda",))
    with pytest.raises(Unsupported, match="lacks this"):
        lowered(operation, ("cuda",), "pallas")
    with pytest.raises(Unsupported, match="no Pallas kernel for cpu"):
        lowered(operation, ("cpu",), "pallas")
    with pytest.raises(Unsupported, match="runs on cuda, not on tpu"):
        lowered(operation, ("tpu",), "triton")
    x = {"x": jnp.ones(4)}
    assert operation.why_not(x, Spec((None,)), Target("cuda"))[0] == "xla"
    assert "lacks this" in operation.why_not(x, Spec((None,)), Target("cuda"))[1]
    assert operation.why_not(x, Spec((None,)), Target("tpu")) == ("tpu", "")
    sharded = operation.why_not(x, Spec((None,)), Target("tpu", num_devices=4))
    assert sharded[0] == "xla" and "jax.shard_map" in sharded[1]


def qkv(*lead, t=70, h=4, g=2, d=8):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((t, h, d), (t, g, d), (t, g, d))
    return [jax.random.normal(k, (*lead, *s)) for k, s in zip(keys, shapes, strict=True)]


def agree(got, want, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-3)


FOLDED = {
    "static mask": lambda x: {"mask": Causal() & Window(20)},
    "one traced mask for all": lambda x: {"mask": Lengths(jnp.array([70, 33]))},
    "traced masks": lambda x: {"segment_ids": x["ids"]},
    "offsets": lambda x: {"is_causal": True, "q_offset": x["offset"]},
    "shared bias": lambda x: {"bias": x["shared"]},
    "own bias": lambda x: {"bias": x["bias"]},
    "look-ups": lambda x: {
        "score_mod": lambda s, b, h, q, k: s * x["slope"][h] + x["vector"][q - k + 70]
    },
}


@pytest.mark.parametrize("name", FOLDED)
def test_vmap_becomes_batch_rows(name):
    """Values and gradients equal a loop's; the primitive is bound once, with more rows."""
    n, b = 3, 2
    q, k, v = qkv(n, b)
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    mapped = {
        "ids": jnp.asarray(np.sort(rng.integers(0, 4, (n, b, 70)), -1), jnp.int32),
        "offset": jnp.asarray([5, 0, 2], jnp.int32),
        "bias": normal(n, b, 1, 70, 70),
        "slope": normal(n, 4),
    }
    shared = {"shared": normal(1, 4, 1, 70), "vector": normal(140)}

    def loss(floats, ids, offset, q, k, v):
        arrays = {**floats, "ids": ids, "offset": offset}
        o, lse = aj.attention(
            q, k, v, return_residual=True, implementation="block_sparse", block_sizes=(32, 16),
            **FOLDED[name](arrays),
        )  # fmt: skip
        return (o**2).sum() + (lse / 7).sum()

    floats = {**{x: mapped[x] for x in ("bias", "slope")}, **shared}
    axes = {"bias": 0, "slope": 0, "shared": None, "vector": None}
    run = jax.vmap(jax.value_and_grad(loss, argnums=(0, 3, 4, 5)), in_axes=(axes, 0, 0, 0, 0, 0))
    args = (floats, mapped["ids"], mapped["offset"], q, k, v)
    got = jax.jit(run)(*args)
    one = jax.jit(jax.value_and_grad(loss, argnums=(0, 3, 4, 5)))
    each = [
        one({x: a[i] if axes[x] == 0 else a for x, a in floats.items()}, *(y[i] for y in args[1:]))
        for i in range(n)
    ]
    agree(got, jax.tree.map(lambda *xs: jnp.stack(xs), *each))
    jaxpr = str(jax.make_jaxpr(run)(*args))
    assert jaxpr.count("attn_fwd[") == 1 and jaxpr.count("attn_bwd[") == 1


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("implementation", ["block_sparse", "interpret_triton"])
def test_shard_map_works_on_each_share(check_vma, implementation):
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Auto,) * 2)
    q, k, v = qkv(2, h=4, g=2)
    spec = P("data", None, "heads", None)

    def loss(q, k, v, implementation="block_sparse"):
        return (aj.attention(q, k, v, is_causal=True, implementation=implementation) ** 2).sum()

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec,) * 3, out_specs=P(), check_vma=check_vma
    )
    def share(q, k, v):
        return jax.lax.psum(loss(q, k, v, implementation), ("data", "heads"))

    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (q, k, v)]
    got = jax.jit(jax.value_and_grad(share, argnums=(0, 1, 2)))(*placed)
    agree(got, jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v))


def test_new_values_of_captured_arrays_do_not_retrace():
    q, k, v = qkv(1)

    def run(slopes, ids):
        return aj.attention(
            q, k, v, segment_ids=ids, score_mod=lambda s, b, h, i, j: s * slopes[h],
            implementation="block_sparse",
        )  # fmt: skip

    ids = jnp.zeros((1, 70), jnp.int32)
    run(jnp.ones(4, jnp.float32), ids)
    other = (jnp.full(4, 2.0, jnp.float32), ids.at[:, 40:].set(1))
    with compilations() as compiled:
        run(*other)
    assert not compiled


@pytest.mark.parametrize(
    ("target", "implementation", "body"),
    [
        (Target("tpu", "TPU v5 lite"), None, "tpu"),
        (Target("cuda", "NVIDIA H100 80GB HBM3", 1, (9, 0)), None, "triton"),
        (Target("cuda", "NVIDIA H100 80GB HBM3", 1, (9, 0)), "mosaic_gpu", "mosaic_gpu"),
        (Target("cuda", "Tesla T4", 1, (7, 5)), None, "xla"),
        (Target("tpu", "TPU v5 lite", 8), None, "xla"),
        (Target("cpu", "cpu"), None, "xla"),
    ],
)
def test_every_device_is_explained(target, implementation, body):
    x = jax.ShapeDtypeStruct((1, 4096, 8, 128), jnp.bfloat16)
    options = {"implementation": implementation, "target": target}
    found = aj.explain(x, x, x, mask=Causal() & Window(512), **options)
    assert found.body == body
    assert found.block_q % 16 == 0 and 0 < found.visited < 0.5
    assert (body == "xla") == bool(found.body_reason)
    if target.num_devices > 1:
        assert "attnjax.parallel" in str(found)


def test_traced_masks_are_explained():
    q, k, v = qkv(1)
    mask = Segments(jnp.zeros((1, 70), jnp.int32))
    found = aj.explain(q, k, v, mask=mask, implementation="block_sparse")
    assert found.body == "xla" and "no kernel for cpu" in str(found)
