"""Differences between the supported versions of JAX, in one place (0.10.2 and 0.11)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Literal, Primitive
from jax.interpreters import batching, mlir

__all__ = [
    "ClosedJaxpr",
    "Literal",
    "Primitive",
    "bind_equation",
    "define_primitive",
    "enable_x64",
    "lowering_device",
    "lowering_devices",
    "mosaic_gpu_load",
    "shaped",
    "source_line",
    "tracing_for",
    "triton",
    "triton_call",
    "triton_fma",
]

try:  # the name without "experimental" is the newer one
    enable_x64 = jax.enable_x64
except AttributeError:  # pragma: no cover
    # pyright knows the installed version alone, where this one is gone
    from jax.experimental import enable_x64  # noqa: F401  # pyright: ignore[reportAttributeAccessIssue]


def lowering_devices(ctx: Any) -> int:
    """Number of devices that the partitioner spreads a computation over, 1 inside `shard_map`.

    Args:
      ctx: the context that a lowering rule receives.
    """
    axis_context = ctx.module_context.axis_context
    if getattr(axis_context, "manual_axes", None):
        return 1
    return getattr(axis_context, "num_devices", None) or 1


def lowering_device(ctx: Any, platform: str) -> Any:
    """The device that a module is lowered for: a device, an abstract one, or None if unknown.

    Args:
      ctx: the context that a lowering rule receives.
      platform: "tpu", "cuda", "rocm" or "cpu"; a device of another platform is not returned.
    """
    module = ctx.module_context
    found: list[Any] = []
    mesh = getattr(module.axis_context, "mesh", None)  # inside shard_map
    if isinstance(mesh, jax.sharding.Mesh):
        found.append(mesh.devices.flat[0])
    found.extend((getattr(module.axis_context, "device_assignment", None) or ())[:1])
    if module.backend is not None:  # jit: the client of its devices
        found.extend(module.backend.devices()[:1])
    found.append(getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None))  # export
    names = {"cuda": ("cuda", "gpu"), "rocm": ("rocm", "gpu")}.get(platform, (platform,))
    return next((d for d in found if d is not None and d.platform in names), None)


@contextlib.contextmanager
def tracing_for(device: Any) -> Iterator[None]:
    """Tells tracing which device it is for.

    Integer `//` and `%` inside kernels ask the ambient mesh for the generation of the device, and
    fail when it is the host's CPU.
    """
    ambient = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is None or ambient is not None:
        yield
        return
    cores = getattr(device, "num_cores", None) or getattr(device, "core_count", None)
    known = jax.sharding.AbstractDevice(
        device_kind=device.device_kind, platform=device.platform, num_cores=cores
    )
    mesh = jax.sharding.AbstractMesh(
        (1,), ("_device",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=known
    )
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def bind_equation(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Results of one equation of a jaxpr; what is traced keeps the user's source line."""
    from jax._src import source_info_util

    params = eqn.primitive.get_bind_params(eqn.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # tuple: before 0.10
    with source_info_util.user_context(eqn.source_info.traceback):
        out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def source_line(eqn: Any) -> str:
    """File and line of the user's code that made an equation, or an empty string."""
    try:
        from jax._src import source_info_util

        return source_info_util.summarize(eqn.source_info)
    except (ImportError, AttributeError):  # pragma: no cover
        return ""


def define_primitive(
    name: str,
    abstract: Callable[..., Sequence[Any]],
    lower: Callable[[str, Any, int], Callable[..., Any]],
    batch: Callable[..., Any],
) -> Primitive:
    """A primitive with several results whose body is chosen when it is lowered.

    Args:
      name: shown in jaxprs.
      abstract: `(*avals, **params) -> [aval]`.
      lower: `(platform, device or None, num_devices) -> body`, with `body(*arrays, **params) ->
        [array]`.
      batch: batching rule, `(arguments, dimensions, **params) -> (results, dimensions)`.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(lambda *avals, **params: list(abstract(*avals, **params)))

    @functools.lru_cache(maxsize=256)
    def compiled(params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        return jax.jit(lambda *xs: primitive.bind(*xs, **dict(params)))

    primitive.def_impl(lambda *xs, **params: compiled(tuple(sorted(params.items())))(*xs))
    for platform in ("cpu", "cuda", "rocm", "tpu"):

        def rule(ctx: Any, *args: Any, _platform: str = platform, **params: Any) -> Any:
            device = lowering_device(ctx, _platform)
            body = lower(_platform, device, lowering_devices(ctx))
            # inside shard_map the body computes on this device's share alone
            ctx = ctx.replace(avals_in=[_local(a) for a in ctx.avals_in])
            with tracing_for(device), _without_axis_types(), _triton_allowed():
                return mlir.lower_fun(body, multiple_results=True)(ctx, *args, **params)

        mlir.register_lowering(primitive, rule, platform=platform)
    batching.primitive_batchers[primitive] = batch
    return primitive


def shaped(shape: Any, dtype: Any, like: Sequence[Any]) -> Any:
    """Abstract result of a primitive, varying over the mesh axes that its operands vary over."""
    types = [t for a in like if (t := getattr(a, "manual_axis_type", None))]
    varying = frozenset().union(*(t.varying for t in types))
    if not varying:
        return ShapedArray(shape, dtype)
    given: dict[str, Any] = {"manual_axis_type": type(types[0])(varying=varying)}
    sharding = next(a.sharding for a in like if getattr(a, "manual_axis_type", None))
    spec = jax.sharding.PartitionSpec(*[None] * len(shape))
    given["sharding"] = sharding.update(spec=spec)
    return ShapedArray(shape, dtype, **given)


def _without_axis_types() -> contextlib.AbstractContextManager[Any]:
    """Inside `shard_map` kernels need not say over which mesh axes their results vary."""
    from jax._src import config

    check = getattr(config, "_check_vma", None)
    return contextlib.nullcontext() if check is None else check(False)


@contextlib.contextmanager
def _triton_allowed() -> Iterator[None]:
    """JAX 0.11 warns that the Triton backend will go, which is not for users to act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        yield


def _local(aval: Any) -> Any:
    """The aval without the mesh axes it varies over."""
    if not getattr(aval, "manual_axis_type", None):
        return aval
    return ShapedArray(aval.shape, aval.dtype)


def triton() -> Any:
    """Pallas' Triton dialect (`load`, `store`, `CompilerParams`), imported when it is first used.

    JAX 0.11 deprecates this backend, and warns where it is lowered; nothing outside the Triton
    kernels may depend on it.

    Raises:
      ImportError: when JAX no longer has it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return importlib.import_module("jax.experimental.pallas.triton")


def triton_call(
    kernel: Callable[..., None],
    out_shape: Any,
    grid: int,
    *,
    name: str,
    num_warps: int,
    num_stages: int,
    interpret: bool,
) -> Callable[..., Any]:
    """`pallas_call` for the Triton backend: every operand and result is seen whole, by pointer.

    Args:
      kernel: `kernel(*inputs, *outputs)`, pytrees of references.
      out_shape: pytree of `jax.ShapeDtypeStruct`.
      grid: number of programs.
      name: shown in profiles.
      num_warps, num_stages: threads / 32 of a program, and depth of its software pipelines.
      interpret: run step by step on any platform.
    """
    from jax.experimental import pallas as pl

    params = triton().CompilerParams(num_warps=num_warps, num_stages=num_stages)
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(grid,),
        compiler_params=params,
        interpret=interpret,
        name=name,
    )


def triton_fma(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    """The sum a b + c in one instruction, for float32 arrays of one shape inside a Triton kernel.

    The compiler keeps products and sums apart, which costs an instruction for each score.
    """
    (out,) = triton().elementwise_inline_asm(
        "fma.rn.f32 $0, $1, $2, $3;",
        args=[a, b, c],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(a.shape, a.dtype)],
    )
    return out


def mosaic_gpu_load(ref: Any) -> jax.Array:
    """A block of global memory in registers, in a Mosaic GPU kernel, whatever its alignment.

    JAX 0.10 wants an index, 0.11 deprecates it.
    """
    from jax.experimental.pallas import mosaic_gpu

    load: Any = mosaic_gpu.load
    index = inspect.signature(load).parameters.get("idx")
    if index is not None and index.default is inspect.Parameter.empty:
        return load(ref, (), optimized=False)
    return load(ref, optimized=False)
