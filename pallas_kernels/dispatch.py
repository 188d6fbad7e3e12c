"""Operations whose body is chosen by platform when they are lowered, not when they are traced.

`jax.lax.platform_dependent` cannot lower one module for several platforms when a branch holds a
kernel, and turns a batched kernel into a loop. A primitive of our own with one lowering rule per
platform has neither fault: tracing on a CPU host and compiling for a TPU picks the TPU's body.

An operation has one XLA body, which runs everywhere and is differentiable and partitionable, and
any number of kernels. `implementation` names what to run:

    None           the default kernel of the platform; the XLA body where there is none or where
                   the kernel lacks an option (`why_not` says which)
    "xla"          the XLA body
    "pallas"       the default kernel of the platform; an error says what it lacks
    a kernel name  that kernel: "tpu", "triton", "mosaic_gpu"
    "interpret"    the TPU kernel, interpreted step by step on any platform: slow, for tests;
                   "interpret_triton" likewise
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from pallas_kernels import compat

Body = Callable[..., Any]
"""`body(operands, spec, target) -> pytree of arrays`, operands a pytree of arrays."""

IMPLEMENTATIONS = (
    "xla",
    "pallas",
    "tpu",
    "triton",
    "mosaic_gpu",
    "interpret",
    "interpret_triton",
)


class Unsupported(NotImplementedError):
    """A kernel lacks an option; the message names it and the alternative."""


class Target(NamedTuple):
    """What a body is lowered for.

    Attributes:
      platform: "tpu", "cuda", "rocm" or "cpu".
      kind: device kind as JAX reports it, None where nobody knows.
      num_devices: over which the partitioner spreads the computation; 1 inside `shard_map`. A body
        may keep sharded axes whole when it is larger.
      capability: CUDA compute capability, None where nobody knows.
      interpret: run the kernel in interpret mode.
    """

    platform: str
    kind: str | None = None
    num_devices: int = 1
    capability: tuple[int, int] | None = None
    interpret: bool = False


def capability_of(device: Any) -> tuple[int, int] | None:
    """CUDA compute capability of a device, None for others."""
    text = getattr(device, "compute_capability", None)
    if not isinstance(text, str):
        return None
    major, minor = (*text.split("."), "0")[:2]
    return int(major), int(minor)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel body.

    Attributes:
      platform: where it runs.
      body: `body(operands, spec, target)`; raises `Unsupported` before it does any work.
      default: whether it is chosen without being named. A kernel that could be neither interpreted
        nor run on its hardware is not.
      interpreted_by: the implementation name that interprets it, or None.
    """

    platform: str
    body: Body
    default: bool = True
    interpreted_by: str | None = None


def lazy_body(module: str, function: str) -> Body:
    """A body that is imported when it is first lowered: kernels' compilers are slow to import."""

    def run(operands: Any, spec: Any, target: Target) -> Any:
        return getattr(importlib.import_module(module), function)(operands, spec, target)

    return run


class Operation:
    """A differentiable-by-others operation `(operands, spec) -> results` with a body per platform.

    Args:
      name: name of the primitive.
      xla: the XLA body, or a mapping platform -> body with "default".
      kernels: name -> kernel.
      shapes: `(operands, spec) -> pytree of jax.ShapeDtypeStruct`, the results of every body.
      fold: `(operands, dims, spec) -> (operands, spec, unfold)` for `jax.vmap`: the mapped axis
        becomes part of the batch axis, and `unfold(results)` brings it back to axis 0. None, or a
        result of None, vectorizes the XLA body instead.

    `operands` is a pytree of arrays, `spec` a hashable static description with a field
    `implementation`; both reach the body unchanged.
    """

    def __init__(
        self,
        name: str,
        xla: Body | Mapping[str, Body],
        shapes: Callable[[Any, Any], Any],
        kernels: Mapping[str, Kernel] | None = None,
        fold: Callable[[Any, Any, Any], Any] | None = None,
    ):
        self.name, self.shapes, self.kernels = name, shapes, dict(kernels or {})
        self.xla = dict(xla) if isinstance(xla, Mapping) else {"default": xla}
        self.fold = fold
        self.primitive = compat.define_primitive(name, self._abstract, self._lower, self._batch)

    def __call__(self, operands: Any, spec: Any) -> Any:
        """The results, as a pytree like that of `shapes`."""
        leaves, tree = jax.tree.flatten(operands)
        out = self.primitive.bind(*leaves, tree=tree, spec=spec)
        return jax.tree.unflatten(jax.tree.structure(self.shapes(operands, spec)), out)

    def run(self, operands: Any, spec: Any, target: Target) -> Any:
        """Traces the body for a target.

        Raises:
          Unsupported: when the named implementation lacks an option.
        """
        name, interpret = self._named(spec.implementation, target.platform)
        if name is not None:
            if target.num_devices > 1 and not interpret:
                if spec.implementation is not None:
                    raise Unsupported(_sharded(self.name, name))
                return self._xla(operands, spec, target)
            try:
                target = target._replace(interpret=interpret)
                return self.kernels[name].body(operands, spec, target)
            except Unsupported:
                if spec.implementation is not None:
                    raise
        return self._xla(operands, spec, target)

    def why_not(self, operands: Any, spec: Any, target: Target) -> tuple[str, str]:
        """(the body that `run` takes, why it is not the platform's kernel or an empty string).

        Args:
          operands: arrays or `jax.ShapeDtypeStruct`s.
          spec: the static description.
          target: what to ask about.
        """
        name, interpret = self._named(spec.implementation, target.platform)
        if name is None:
            if spec.implementation == "xla":
                return "xla", "asked for by implementation='xla'."
            return "xla", f"there is no kernel for {target.platform}."
        if target.num_devices > 1 and not interpret:
            return "xla", _sharded(self.name, name)
        kernel = self.kernels[name]
        try:
            jax.eval_shape(
                lambda x: kernel.body(x, spec, target._replace(interpret=interpret)), operands
            )
        except Unsupported as lack:
            return "xla", str(lack)
        return name, ""

    def _named(self, implementation: str | None, platform: str) -> tuple[str | None, bool]:
        """(kernel or None for XLA, whether it is interpreted)."""
        if implementation == "xla":
            return None, False
        if implementation in (None, "pallas"):
            for name, kernel in self.kernels.items():
                if kernel.platform == platform and kernel.default:
                    return name, False
            if implementation == "pallas":
                raise Unsupported(
                    f"{self.name}: there is no Pallas kernel for {platform}; use "
                    "implementation=None or 'xla', or 'interpret' to step through the TPU kernel."
                )
            return None, False
        for name, kernel in self.kernels.items():
            if kernel.interpreted_by == implementation:
                return name, True
        if implementation not in self.kernels:
            raise Unsupported(
                f"{self.name}: implementation={implementation!r} does not exist; there are 'xla', "
                f"'pallas', {', '.join(map(repr, self.kernels))}."
            )
        if self.kernels[implementation].platform != platform:
            raise Unsupported(
                f"{self.name}: implementation={implementation!r} runs on "
                f"{self.kernels[implementation].platform}, not on {platform}; use "
                "implementation=None, which chooses by platform."
            )
        return implementation, False

    def _xla(self, operands: Any, spec: Any, target: Target) -> Any:
        return self.xla.get(target.platform, self.xla["default"])(operands, spec, target)

    def _abstract(self, *avals: Any, tree: Any, spec: Any) -> list[Any]:
        results = jax.tree.leaves(self.shapes(jax.tree.unflatten(tree, avals), spec))
        return [compat.shaped(r.shape, r.dtype, avals) for r in results]

    def _lower(self, platform: str, device: Any, num_devices: int) -> Callable[..., list[Any]]:
        kind = None if device is None else device.device_kind
        target = Target(platform, kind, num_devices, capability_of(device))

        def run(*leaves: Any, tree: Any, spec: Any) -> list[Any]:
            return jax.tree.leaves(self.run(jax.tree.unflatten(tree, leaves), spec, target))

        return run

    def _batch(self, args: Any, dims: Any, *, tree: Any, spec: Any) -> Any:
        folded = None
        if self.fold is not None:
            operands = jax.tree.unflatten(tree, args)
            # an operand that is not mapped has dim None, which is no leaf of a pytree
            marks = jax.tree.unflatten(tree, [-1 if d is None else d for d in dims])
            folded = self.fold(operands, marks, spec)
        if folded is not None:
            operands, spec, unfold = folded
            out = jax.tree.leaves(unfold(self(operands, spec)))
            return out, [0] * len(out)
        if spec.implementation not in (None, "xla"):
            raise Unsupported(
                f"{self.name}: implementation={spec.implementation!r} cannot be mapped over these "
                "operands; map over batch rows only, or use implementation='xla'."
            )
        # more than one device: the form of the body that loops over neither batch nor heads
        target = Target("any", num_devices=2)

        def run(*xs: Any) -> list[Any]:
            return jax.tree.leaves(self._xla(jax.tree.unflatten(tree, xs), spec, target))

        out = jax.vmap(run, in_axes=tuple(dims))(*args)
        return out, [0] * len(out)


def _sharded(operation: str, kernel: str) -> str:
    return (
        f"{operation}: the {kernel} kernel cannot be partitioned automatically; call it inside "
        "jax.shard_map or through attnjax.parallel, so that each device works on its own share, "
        "or use implementation='xla'."
    )


def check_implementation(function: str, implementation: str | None) -> None:
    """Raises ValueError for a name that no operation knows."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{function}: implementation={implementation!r} is unknown; use None or one of "
            f"{IMPLEMENTATIONS}."
        )
