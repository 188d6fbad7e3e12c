"""Compile for a TPU or an NVIDIA GPU on a machine that has none, and report what came out.

    report = compile_for("v6e", fn, jax.ShapeDtypeStruct((2, 1024, 8, 128), jnp.bfloat16))
    report.routes            # {"mosaic_tpu": 1}: one Pallas kernel is in the program
    report.kernels[0].vmem_bytes

The compilers are packages: `libtpu` for TPUs, `jax-cuda13-plugin` and `jax-cuda13-pjrt` (of JAX's
own version) for GPUs; registers and spills of GPU kernels also need `ptxas` on PATH. Compiling says
that a kernel is accepted and what it takes, not that its results are right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import importlib.util
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels import aot_inspect
from pallas_kernels.aot_inspect import KernelReport
from pallas_kernels.machines import TARGETS, Machine

__all__ = [
    "EXPORT_DISABLED_CHECKS",
    "TARGETS",
    "KernelReport",
    "Machine",
    "Report",
    "compile_for",
    "lower_for",
    "missing_packages",
    "topology_mesh",
    "write_listings",
]

EXPORT_DISABLED_CHECKS = tuple(
    export.DisabledSafetyCheck.custom_call(name) for name in aot_inspect.ROUTES
)
"""For `jax.export.export(f, disabled_checks=EXPORT_DISABLED_CHECKS)`: the custom calls of Pallas
kernels. Exported Triton kernels run only with the JAX version that exported them."""


_PACKAGES = {
    "tpu": (("libtpu", "libtpu"),),
    "cuda": (
        ("jax_plugins.xla_cuda13", "jax-cuda13-pjrt"),
        ("jax_cuda13_plugin", "jax-cuda13-plugin"),
    ),
    "cpu": (),
}

_listings: pathlib.Path | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What compiling one function for one machine gave.

    Attributes:
      target: name of the machine.
      device_kind: as JAX calls the device.
      routes: compiler of kernels -> number of custom calls in the program; {} means plain XLA.
      kernels: one report per custom call.
      lower_seconds: tracing and lowering.
      compile_seconds: compiling.
      temp_bytes, argument_bytes, output_bytes: of device memory.
      compiled: the compiled function (`jax.stages.Compiled`).
    """

    target: str
    device_kind: str
    routes: dict[str, int]
    kernels: tuple[KernelReport, ...]
    lower_seconds: float
    compile_seconds: float
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    compiled: Any = dataclasses.field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the compiled function, ready for JSON."""
        fields = dataclasses.asdict(dataclasses.replace(self, compiled=None))
        del fields["compiled"]
        return fields


def missing_packages(target: str) -> list[str]:
    """Packages that compiling for a target needs and this Python lacks."""
    found = []
    for module, package in _PACKAGES[_machine(target).platform]:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            found.append(package)
    return found


def topology_mesh(
    target: str, shape: Sequence[int] = (1,), axis_names: Sequence[str] = ("x",)
) -> jax.sharding.Mesh:
    """Mesh of devices that can be compiled for but not run on.

    Args:
      target: one of `TARGETS`.
      shape, axis_names: of the mesh; a TPU slice has up to 4 devices (tpu7x: 8), a GPU machine 8.

    Raises:
      ValueError: for an unknown target, or a mesh larger than the slice.
      ImportError: when the compiler is not installed; the message says what to install.
    """
    devices = _devices(target)
    count = int(np.prod(shape))
    if count > len(devices):
        raise ValueError(
            f"topology_mesh: {target} has {len(devices)} devices here, but the mesh "
            f"{tuple(shape)} needs {count}."
        )
    return jax.sharding.Mesh(np.array(devices[:count]).reshape(tuple(shape)), tuple(axis_names))


def lower_for(target: str, fn: Callable[..., Any], *args: Any) -> jax.stages.Lowered:
    """Traces and lowers a function for a target, without compiling it.

    Args:
      target: one of `TARGETS`.
      fn: a function of arrays, jitted or not.
      args: pytrees of arrays or `jax.ShapeDtypeStruct`. Leaves with a NamedSharding over a
        `topology_mesh` keep it, all others are on one device.
    """
    mesh = topology_mesh(target)
    for leaf in jax.tree.leaves(args):
        given = getattr(leaf, "sharding", None)
        if isinstance(given, NamedSharding) and isinstance(given.mesh, jax.sharding.Mesh):
            mesh = given.mesh
    whole = NamedSharding(mesh, PartitionSpec())

    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        given = getattr(leaf, "sharding", None)
        kept = isinstance(given, NamedSharding) and given.mesh == mesh
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=given if kept else whole)

    # `//` in a user's function asks the ambient mesh for the device, else the host's CPU
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(fn).lower(*jax.tree.map(abstract, args))


def compile_for(
    target: str,
    fn: Callable[..., Any],
    *args: Any,
    compiler_options: dict[str, Any] | None = None,
) -> Report:
    """Compiles a function for a target; this machine need not have the device.

    Args:
      target: one of `TARGETS`.
      fn, args: as in `lower_for`.
      compiler_options: passed on to XLA.

    Returns:
      The report. Spills, bundles and scalar memory of TPU kernels are in it after
      `write_listings()` alone; registers and spills of GPU kernels need `ptxas` on PATH.

    Raises:
      ValueError: for an unknown target.
      ImportError: when the compiler is not installed; the message says what to install.
      RuntimeError: for Mosaic GPU kernels of a second GPU architecture in one process.
    """
    machine = _machine(target)
    start = time.perf_counter()
    lowered = lower_for(target, fn, *args)
    lowered_at = time.perf_counter()
    with contextlib.ExitStack() as stack:
        options = dict(compiler_options or {})
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if machine.platform != "cpu":
            options["xla_dump_to"] = str(folder)
        stack.enter_context(_mosaic_listings(folder / "mosaic"))
        before = set(_listings.iterdir()) if _listings else set()
        compiled = lowered.compile(compiler_options=options or None)
        seconds = time.perf_counter() - lowered_at
        written = set(_listings.iterdir()) - before if _listings else set()
        # for programs with parts for the sparse core, as_text() fails with jaxlib 0.10.2
        texts = [path.read_text() for path in sorted(folder.glob("*.after_codegen.txt"))]
        calls = aot_inspect.custom_calls("\n".join(texts) or compiled.as_text() or "")
        if machine.platform == "cuda":
            kernels = aot_inspect.gpu_kernels(calls, folder)
        else:
            listing = sorted(written)
            kernels = [aot_inspect.tpu_kernel(name, line, listing) for _, name, line in calls]
        for path in written:
            path.unlink()
    if any(route == "mosaic_gpu" for route, _, _ in calls):
        _check_one_architecture(machine)
    memory: Any = compiled.memory_analysis()
    routes: dict[str, int] = {}
    for route, _, _ in calls:
        routes[route] = routes.get(route, 0) + 1
    return Report(
        target=target,
        device_kind=_devices(target)[0].device_kind,
        routes=routes,
        kernels=tuple(kernels),
        lower_seconds=lowered_at - start,
        compile_seconds=seconds,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        compiled=compiled,
    )


def write_listings(folder: str | os.PathLike[str]) -> None:
    """Has the TPU compiler write its listings, so that reports know spills and scalar memory.

    Call it before anything compiles for a TPU: the compiler reads its flags once. Compiling then
    takes somewhat longer. `compile_for` deletes the listings after it has read them.

    Args:
      folder: an existing folder of this process alone.

    Raises:
      RuntimeError: when the compiler is loaded already.
    """
    global _listings
    if any(_machine(name).platform == "tpu" for name in _loaded):
        raise RuntimeError(
            "write_listings: the TPU compiler is loaded already and reads its flags once; call "
            "write_listings before the first compile_for or topology_mesh of the process."
        )
    flags = f"--xla_jf_dump_to={os.fspath(folder)} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    _listings = pathlib.Path(folder)


def _machine(target: str) -> Machine:
    if target not in TARGETS:
        raise ValueError(f"aot: unknown target {target!r}; there are {', '.join(TARGETS)}.")
    return TARGETS[target]


_loaded: set[str] = set()
_mosaic_capability: list[tuple[int, int]] = []


def _check_one_architecture(machine: Machine) -> None:
    """Mosaic keeps compiled kernels per process without regard to the architecture."""
    _mosaic_capability.append(machine.capability or (0, 0))
    first = _mosaic_capability[0]
    if machine.capability != first:
        raise RuntimeError(
            f"compile_for: this process compiled Mosaic GPU kernels for compute capability "
            f"{first[0]}.{first[1]} and would reuse them for {machine.name}; compile for "
            f"{machine.name} in a process of its own."
        )


@functools.lru_cache
def _devices(target: str) -> tuple[Any, ...]:
    machine = _machine(target)
    missing = missing_packages(target)
    if missing:
        raise ImportError(
            f"aot: compiling for {target} needs {' and '.join(missing)}: pip install "
            f"'attnjax[aot]' (or the packages themselves; jax-cuda13-* at the version of JAX, "
            f"{jax.__version__})."
        )
    if machine.platform == "cpu":
        return tuple(jax.devices("cpu"))
    from jax.experimental import topologies

    _loaded.add(target)
    if machine.platform == "tpu":
        _without_tpu()
        return tuple(topologies.get_topology_desc(machine.topology, "tpu").devices)
    topology = topologies.get_topology_desc(
        machine.name, "cuda", topology="1x1x8", target_config=machine.gpu_description
    )
    return tuple(topology.devices)


def _without_tpu() -> None:
    """Settings with which the TPU compiler loads on a machine without TPUs."""
    if glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"):
        return  # real devices: their own settings hold
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else a lock file admits one process
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")


@contextlib.contextmanager
def _mosaic_listings(folder: pathlib.Path) -> Iterator[None]:
    """Has Mosaic write the PTX of its kernels, which XLA does not see, to a folder."""
    folder.mkdir()
    previous = os.environ.get("MOSAIC_GPU_DUMP_TO")
    os.environ["MOSAIC_GPU_DUMP_TO"] = str(folder)
    try:
        yield
    finally:
        if previous is None:
            del os.environ["MOSAIC_GPU_DUMP_TO"]
        else:
            os.environ["MOSAIC_GPU_DUMP_TO"] = previous
