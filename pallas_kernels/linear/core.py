"""The differentiable linear recurrence over all bodies.

`_run_forward` and `_run_backward` are the only places that choose a body, when the computation is
lowered. What is saved for the backward pass are the operands and nothing else.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import platform_primitive
from pallas_kernels.linear.backward import linear_bwd
from pallas_kernels.linear.rows import backward_by_rows, forward_by_rows
from pallas_kernels.linear.spec import LinearSpec, Operands
from pallas_kernels.linear.xla import linear_fwd

Saved = tuple[Operands, jax.Array, jax.Array]
"""What the backward pass reads: the operands, and the gradients of output and final state."""


def linear_recurrence(operands: Operands, spec: LinearSpec) -> tuple[jax.Array, jax.Array]:
    """Outputs and final state of a linear recurrence, differentiable in every floating operand.

    Args:
      operands: see `Operands`; shapes are not checked here.
      spec: static options; for per-channel decays `chunk_size` comes from `pick_chunk`.

    Returns:
      Output [b, t, h, v] in the type of `value` and final state [b, h, k, v] in the arithmetic
      type.
    """
    decay = operands.decay
    if operands.beta is not None and decay is not None and decay.ndim == 1:
        operands = operands._replace(
            decay=jnp.broadcast_to(decay[None, None], operands.query.shape[:3])
        )
    return _recurrence(operands, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _recurrence(operands: Operands, spec: LinearSpec) -> tuple[jax.Array, jax.Array]:
    return _run_forward(operands, spec)


def _recurrence_fwd(
    operands: Operands, spec: LinearSpec
) -> tuple[tuple[jax.Array, jax.Array], Operands]:
    return _run_forward(operands, spec), operands


def _recurrence_bwd(
    spec: LinearSpec, operands: Operands, grads: tuple[jax.Array, jax.Array]
) -> tuple[Operands]:
    found = _run_backward((operands, *grads), spec)
    pairs = zip(operands, found, strict=True)
    return (Operands._make(None if g is None else g.astype(x.dtype) for x, g in pairs),)


_recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)


def _forward_cpu(
    operands: Operands, spec: LinearSpec, num_devices: int
) -> tuple[jax.Array, jax.Array]:
    if num_devices > 1:  # the rows may be spread over devices
        return linear_fwd(operands, spec)
    return forward_by_rows(linear_fwd, operands, spec)


def _forward_shapes(operands: Operands, spec: LinearSpec) -> tuple[Any, Any]:
    del spec
    out = jax.ShapeDtypeStruct(operands.value.shape, operands.value.dtype)
    return out, jax.ShapeDtypeStruct(operands.state_shape, operands.dtype)


def _backward_default(operands: Saved, spec: LinearSpec, num_devices: int) -> Operands:
    del num_devices
    return linear_bwd(*operands, spec)


def _backward_cpu(operands: Saved, spec: LinearSpec, num_devices: int) -> Operands:
    if num_devices > 1:
        return linear_bwd(*operands, spec)
    return backward_by_rows(linear_bwd, *operands, spec)


def _backward_shapes(operands: Saved, spec: LinearSpec) -> Operands:
    del spec
    primal = operands[0]
    shapes = (None if x is None else jax.ShapeDtypeStruct(x.shape, primal.dtype) for x in primal)
    return Operands._make(shapes)._replace(runs=None)


_run_forward = platform_primitive(
    "linear_fwd",
    {
        "cpu": _forward_cpu,
        "default": lambda operands, spec, num_devices: linear_fwd(operands, spec),
    },
    _forward_shapes,
)
_run_backward = platform_primitive(
    "linear_bwd",
    {"cpu": _backward_cpu, "default": _backward_default},
    _backward_shapes,
)
