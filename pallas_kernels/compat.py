"""Differences between the supported versions of JAX, in one place (0.10.2 and 0.11)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir

__all__ = ["ClosedJaxpr", "Primitive", "enable_x64", "jaxpr_as_fun", "lowering_devices"]

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


def define_primitive(
    name: str,
    abstract: Callable[..., Sequence[Any]],
    lower: Callable[..., Any],
    batch: Callable[..., Any],
) -> Primitive:
    """A primitive with several results whose body is chosen when it is lowered.

    Args:
      name: shown in jaxprs.
      abstract: `(*avals, **params) -> [aval]`.
      lower: `(platform, num_devices) -> body`, with `body(*arrays, **params) -> [array]`.
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
            body = lower(_platform, lowering_devices(ctx))
            return mlir.lower_fun(body, multiple_results=True)(ctx, *args, **params)

        mlir.register_lowering(primitive, rule, platform=platform)
    batching.primitive_batchers[primitive] = batch
    return primitive
