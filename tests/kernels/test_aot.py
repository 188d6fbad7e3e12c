"""Compiling for devices that are not there, and reading what the compilers say."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import pallas as pl

from attnjax import masks
from benchmarks import portability, portability_table
from benchmarks.portability_cases import cases
from pallas_kernels import aot, aot_inspect, tune, tuner
from pallas_kernels.decode import DecodeConfig, decode_attention
from pallas_kernels.dispatch import Target
from pallas_kernels.flash import FlashConfig
from pallas_kernels.linear import LinearSpec, Operands, linear_recurrence
from pallas_kernels.linear import tpu as linear_tpu
from pallas_kernels.machines import TARGETS, fast_memory


def needs(target):
    missing = aot.missing_packages(target)
    if missing:
        pytest.skip(f"compiling for {target} needs {', '.join(missing)}")


def doubled(x):
    def kernel(x_ref, o_ref):
        row = jax.lax.broadcasted_iota(jnp.int32, x_ref.shape, 0)
        # `//` asks for the generation of the device
        o_ref[...] = 2 * x_ref[...] + (row // 3).astype(jnp.float32)

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), name="twice")(x)


def test_tpu_report():
    needs("v5e")
    report = aot.compile_for("v5e", doubled, jax.ShapeDtypeStruct((256, 128), jnp.float32))
    assert report.device_kind == "TPU v5 lite"
    assert report.routes == {"mosaic_tpu": 1}
    (kernel,) = report.kernels
    assert kernel.name.startswith("twice")
    assert kernel.vmem_bytes >= 2 * 256 * 128 * 4
    assert report.argument_bytes == 256 * 128 * 4
    assert json.loads(json.dumps(report.as_dict()))["target"] == "v5e"


def decode(q, k, v, lengths):
    return decode_attention(q, k, v, lengths=lengths)


DECODE = (
    jax.ShapeDtypeStruct((1, 1, 4, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((1,), jnp.int32),
)


@pytest.mark.parametrize("target, route", [("v6e", "mosaic_tpu"), ("A100", "triton"), ("T4", None)])
def test_a_kernel_is_chosen_by_the_target(target, route):
    needs(target)
    report = aot.compile_for(target, decode, *DECODE)
    assert set(report.routes) == ({route} if route else set())
    for kernel in report.kernels:
        used = kernel.vmem_bytes if route == "mosaic_tpu" else kernel.smem_bytes
        assert (
            used is None
            or used <= fast_memory(TARGETS[target].platform, report.device_kind).tile_bytes
        )


def test_cpu_has_no_kernels():
    assert aot.compile_for("cpu", decode, *DECODE).routes == {}


def test_sharded_program():
    needs("v5e")
    mesh = aot.topology_mesh("v5e", (2, 2), ("data", "model"))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((512, 128), jnp.float32, sharding=spread)
    run = jax.shard_map(
        doubled, mesh=mesh, in_specs=spread.spec, out_specs=spread.spec, check_vma=False
    )
    report = aot.compile_for("v5e", run, x)
    assert report.routes == {"mosaic_tpu": 1}
    assert report.argument_bytes == 256 * 128 * 4  # of one device


def test_export_with_kernels():
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh(
            (1,), ("x",),
            abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu"),
        )
    ):  # fmt: skip
        exported = export.export(
            jax.jit(decode), platforms=["tpu"], disabled_checks=aot.EXPORT_DISABLED_CHECKS
        )(*DECODE)
    assert "tpu_custom_call" in exported.mlir_module()


def test_unknown_and_missing(monkeypatch):
    with pytest.raises(ValueError, match="unknown target 'v9'; there are v5e"):
        aot.compile_for("v9", doubled)
    monkeypatch.setattr(aot, "missing_packages", lambda target: ["libtpu"])
    with pytest.raises(ImportError, match="needs libtpu: pip install 'attnjax.aot.'"):
        aot._devices.__wrapped__("v5p")


def test_too_large_a_mesh():
    needs("v5e")
    with pytest.raises(ValueError, match="has 4 devices here, but the mesh .8,. needs 8"):
        aot.topology_mesh("v5e", (8,), ("x",))


PTX = """
.version 8.7
.target sm_90a
.visible .entry one(
) { wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {}; mma.sync.aligned {}; }
.visible .entry two() { ret; }
"""


def test_reading_programs_and_listings(tmp_path: pathlib.Path):
    line = (
        '%a.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config='
        '{"scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"9999"}],'
        '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]}'
    )
    program = f'ENTRY\n  ROOT {line}\n  %b = custom-call(), custom_call_target="Sharding"\n'
    ((route, name, found),) = aot_inspect.custom_calls(program)
    assert (route, name) == ("mosaic_tpu", "a.1")
    units = tmp_path / "12-a.1-70-final_hlo-static-per-bundle-utilization.txt"
    units.write_text(
        "== CAPACITY:\nMATMUL, VLOAD:FILL, VSTORE:SPILL\n1 1 1\n== UTILIZATION:\n1 2 0\n0 0 3\n"
    )
    original = tmp_path / "12-a.1-02-original.txt"
    original.write_text(
        "#allocation0 [space=smem, size = 0x4, offset = 0x4, fixed_abs]\n"
        "#allocation1 [space=smem, size = 0x200, scoped]\n#allocation2 [space=vmem, size = 0x9]\n"
    )
    kernel = aot_inspect.tpu_kernel(name, found, [units, original])
    assert (kernel.vmem_bytes, kernel.smem_bytes) == (4096, 512)
    assert (kernel.spills, kernel.bundles) == (5, 2)
    assert aot_inspect._matrix_instructions(PTX) == {"wgmma.mma_async": 1, "mma.sync": 1}
    assert [name for name, _ in aot_inspect._entries(PTX)] == ["one", "two"]


def test_every_case_has_arguments():
    for case in cases().values():
        function, args = case.make("xla")
        assert jax.tree.leaves(jax.eval_shape(function, *args)), case.name


def test_expected_routes():
    everything = cases()
    plain = everything["flash causal, forward"]
    named = everything["flash causal GQA mosaic_gpu, forward"]
    routes = {name: plain.expected(m) for name, m in TARGETS.items()}
    assert routes["v5e"] == "mosaic_tpu" and routes["L4"] == routes["B200"] == "triton"
    assert routes["T4"] == routes["cpu"] == "xla"
    chosen = [name for name, m in TARGETS.items() if named.expected(m) == "mosaic_gpu"]
    assert chosen == ["H100", "H200"]


def test_a_cell_that_fell_back_fails():
    report = aot.compile_for("cpu", decode, *DECODE)
    error = portability._fault(cases()["decode GQA"], "triton", report, "cpu")
    assert error.startswith("expected 1 x triton, found none") and "no Pallas kernel" in error


def test_table():
    kernel = aot.KernelReport("k", "triton", smem_bytes=1025, registers=40, spills=0)
    shown = {"route": "triton", "kernels": [kernel.__dict__], "compile_seconds": 0.5}
    cells = [
        portability._cell("a", "A100", status="run") | shown,
        portability._cell("a", "cpu", status="run") | {"route": "xla"},
        portability._cell("a", "v5e", error="no"),
        portability._cell("a", "L4", status="-"),
    ]
    assert "| a | run | run, XLA | **fails** |  |" in portability_table.summary(cells)
    details = portability_table.details(cells)
    assert "| a | triton | 1 | 0.5 | 2 | 40 | 0 | none |" in details
    assert "### cpu\n\nNo kernels" in details


def test_memory_table():
    assert fast_memory("tpu", "TPU v5 lite").tile_bytes == 128 << 20
    assert fast_memory("tpu", "TPU v5").tile_bytes == 64 << 20
    assert fast_memory("cuda", "NVIDIA L4").tile_bytes == 99 << 10
    assert fast_memory("cuda", None).tile_bytes == 99 << 10
    assert fast_memory("cpu", "cpu") is None


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A file with two measured lengths, given by the environment."""
    path = tmp_path / "h200.json"
    entries = [
        tune.Entry(
            "flash", "triton", "bfloat16", 128, n, {"block_q": q, "options": {"num_warps": 8}}
        )
        for n, q in ((1024, 64), (16384, 128))
    ]
    tune.write(path, "NVIDIA H200", entries, {})
    monkeypatch.setenv(tune.VARIABLE, str(path))
    yield path
    tune.unload()


def flash_config(length, asked=None, kind="NVIDIA H200", width=128):
    x = jax.ShapeDtypeStruct((1, length, 2, width), jnp.bfloat16)
    return tune.flash_config("triton", Target("cuda", kind), x, x, x, asked)


def test_measured_choices(tuned, tmp_path):
    assert flash_config(1500).block_q == 64
    assert flash_config(9000).block_q == 128
    assert flash_config(9000, width=100).options == (("num_warps", 8),)
    assert flash_config(9000, kind="NVIDIA A100-SXM4-80GB") == FlashConfig()
    assert flash_config(9000, width=64) == FlashConfig()
    asked = FlashConfig(block_kv=32)
    assert flash_config(9000, asked) == asked
    assert flash_config(9000, FlashConfig(max_blocks=3)).block_q == 128
    mine = tmp_path / "mine.json"
    entry = tune.Entry("flash", "triton", "bfloat16", 128, 9000, {"block_q": 256})
    tune.write(mine, "NVIDIA H200", [entry], {})
    tune.load(mine)
    assert flash_config(1500).block_q == 256  # files given by hand come first


def test_no_tuning_file(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('{"device": "x"}')
    with pytest.raises(ValueError, match="bad.json is no tuning file"):
        tune.load(path)


def test_tuning_on_this_machine(tmp_path):
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 64, 2, 16)), jnp.float32)
    found = tuner.tune_flash(
        q, q, q, mask=masks.Causal(), candidates=[FlashConfig(32, 32)], backward=False, repeats=1
    )
    assert len(found.timed) == 2 and not found.refused
    found.save(tmp_path / "cpu.json")
    (entry,) = tune.read(tmp_path / "cpu.json")["cpu"]
    assert (entry.kernel, entry.body, entry.width, entry.length) == ("flash", "xla", 32, 64)


def test_tuning_without_a_candidate_that_runs():
    q = jnp.ones((1, 8, 2, 16))
    with pytest.raises(RuntimeError, match="no candidate ran for forward: .*[Pp]allas"):
        tuner.tune_decode(q, q, q, candidates=[DecodeConfig(8)], implementation="pallas", repeats=1)


def test_measured_chunks_of_linear_attention_are_taken(tmp_path, monkeypatch):
    chunks = []
    make_plan = linear_tpu.make_plan

    def spy(operands, spec, target, **options):
        chunks.append(spec.chunk_size)
        return make_plan(operands, spec, target, **options)

    monkeypatch.setattr(linear_tpu, "make_plan", spy)
    entry = tune.Entry("linear", "tpu", "float32", 32, 64, {"chunk_size": 16})
    tune.write(tmp_path / "cpu.json", "cpu", [entry], {})
    tune.load(tmp_path / "cpu.json")
    x = jnp.ones((1, 40, 1, 8))

    def run(chunk_size):
        spec = LinearSpec(chunk_size, 1.0, "interpret")
        return jax.grad(lambda x: linear_recurrence(Operands(x, x, x), spec)[0].sum())(x)

    try:
        run(None)
        run(8)
    finally:
        tune.unload()
    assert chunks == [16, 16, 8, 8]
