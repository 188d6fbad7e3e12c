"""Operations whose body is chosen by platform when they are lowered, not when they are traced.

`jax.lax.platform_dependent` cannot lower one module for several platforms when a branch holds a
kernel, and turns a batched kernel into a loop. A primitive of our own with one lowering rule per
platform has neither fault: tracing on a CPU host and compiling for a TPU picks the TPU's body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.core import ShapedArray

from pallas_kernels import compat

Body = Callable[..., Any]
"""`body(operands, spec, num_devices) -> pytree of arrays`, operands a pytree of arrays."""


def platform_primitive(
    name: str, bodies: Mapping[str, Body], shapes: Callable[[Any, Any], Any]
) -> Callable[[Any, Any], Any]:
    """A function `(operands, spec) -> results` that runs the body of its platform.

    Args:
      name: name of the primitive.
      bodies: platform ("tpu", "cuda", "rocm", "cpu") -> body; "default" serves every other one. A
        body takes `(operands, spec, num_devices)`; `num_devices` counts the devices over which the
        partitioner spreads the computation, so that a body may keep sharded axes whole.
      shapes: `(operands, spec) -> pytree of jax.ShapeDtypeStruct`, the results of every body.

    Returns:
      The function. `operands` is a pytree of arrays, `spec` a hashable static description; both
      reach the body unchanged. Under `jax.vmap` the default body is vectorized.
    """

    def flat_body(platform: str, num_devices: int) -> Callable[..., list[Any]]:
        body = bodies.get(platform, bodies["default"])

        def run(*leaves: Any, tree: Any, spec: Any) -> list[Any]:
            return jax.tree.leaves(body(jax.tree.unflatten(tree, leaves), spec, num_devices))

        return run

    def abstract(*avals: Any, tree: Any, spec: Any) -> list[Any]:
        results = jax.tree.leaves(shapes(jax.tree.unflatten(tree, avals), spec))
        return [ShapedArray(r.shape, r.dtype) for r in results]

    def batch(args: Any, dims: Any, *, tree: Any, spec: Any) -> Any:
        # more than one device: the form of the body that loops over neither batch nor heads
        run = flat_body("default", 2)
        # an operand that is not batched has dim None, as in vmap's own in_axes
        out = jax.vmap(lambda *xs: run(*xs, tree=tree, spec=spec), in_axes=tuple(dims))(*args)
        return out, [0] * len(out)

    primitive = compat.define_primitive(name, abstract, flat_body, batch)

    def call(operands: Any, spec: Any) -> Any:
        leaves, tree = jax.tree.flatten(operands)
        out = primitive.bind(*leaves, tree=tree, spec=spec)
        return jax.tree.unflatten(jax.tree.structure(shapes(operands, spec)), out)

    return call
