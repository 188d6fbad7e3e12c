"""The differentiable linear recurrence over all bodies.

`_run_forward` and `_run_backward` are the only places that choose a body, when the computation is
lowered. What is saved for the backward pass are the operands and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tune
from pallas_kernels.dispatch import Kernel, Operation, Target
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
      spec: static options.

    Returns:
      Output [b, t, h, v] in the type of `value` and final state [b, h, k, v] in the arithmetic
      type.

    Raises:
      Unsupported: when the implementation that `spec` names lacks an option.
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
    return (_run_backward((operands, *grads), spec),)


_recurrence.defvjp(_recurrence_fwd, _recurrence_bwd)


def _forward_xla(
    operands: Operands, spec: LinearSpec, target: Target
) -> tuple[jax.Array, jax.Array]:
    if target.platform == "cpu" and target.num_devices == 1:
        return forward_by_rows(linear_fwd, operands, spec)
    return linear_fwd(operands, spec)  # the rows may be spread over devices


def _backward_xla(operands: Saved, spec: LinearSpec, target: Target) -> Operands:
    if target.platform == "cpu" and target.num_devices == 1:
        return _cast(backward_by_rows(linear_bwd, *operands, spec), operands[0])
    return _cast(linear_bwd(*operands, spec), operands[0])


def _kernel_body(name: str, *, backward: bool) -> Callable[..., Any]:
    """A body of the kernel module of that name, which is imported when it is first needed."""

    def run(operands: Any, spec: LinearSpec, target: Target) -> Any:
        module = importlib.import_module(f"pallas_kernels.linear.{name}")
        primal: Operands = operands[0] if backward else operands
        chunk = tune.linear_chunk(name, target, primal.key, primal.value, spec.chunk_size)
        spec = dataclasses.replace(spec, chunk_size=chunk)
        if backward:
            return _cast(module.backward(*operands, spec, target), operands[0])
        return module.forward(operands, spec, target)

    return run


def _kernels(*, backward: bool) -> dict[str, Kernel]:
    return {
        "tpu": Kernel("tpu", _kernel_body("tpu", backward=backward), interpreted_by="interpret"),
        "triton": Kernel(
            "cuda", _kernel_body("triton", backward=backward), interpreted_by="interpret_triton"
        ),
    }


def _cast(grads: Operands, operands: Operands) -> Operands:
    """Gradients in the types of what they belong to."""
    pairs = zip(grads, operands, strict=True)
    return Operands._make(None if g is None or x is None else g.astype(x.dtype) for g, x in pairs)


def _forward_shapes(operands: Operands, spec: LinearSpec) -> tuple[Any, Any]:
    del spec
    out = jax.ShapeDtypeStruct(operands.value.shape, operands.value.dtype)
    return out, jax.ShapeDtypeStruct(operands.state_shape, operands.dtype)


def _backward_shapes(operands: Saved, spec: LinearSpec) -> Operands:
    del spec
    shapes = (None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands[0])
    return Operands._make(shapes)._replace(runs=None)


def _head_axes(operands: Operands) -> list[int | None]:
    """The axis of the heads in every operand; None for absent ones and `runs`."""
    axes = {"query": 2, "key": 2, "value": 2, "beta": 2, "bonus": 0, "initial_state": 1}
    if operands.decay is not None:
        axes["decay"] = 0 if operands.decay.ndim == 1 else 2
    pairs = operands._asdict().items()
    return [None if x is None else axes.get(name) for name, x in pairs]


def _fold(primal: Operands, marks: Operands, more: list[Any], more_marks: list[Any]) -> Any:
    """Operands with an axis mapped by `jax.vmap` made part of the heads, behind them.

    Args:
      primal, marks: the operands, and the mapped axis of each, -1 where it is not mapped.
      more, more_marks: gradients of output and state, likewise.

    Returns:
      The folded operands and gradients, and the size of the mapped axis; None with mapped segments,
      which belong to batch rows and not to heads.
    """
    if primal.runs is not None and marks.runs >= 0:  # type: ignore[operator]
        return None
    one = primal._replace(
        decay=None if primal.decay is None else _unmapped(primal.decay, marks.decay)
    )
    axes = _head_axes(one)
    everything = [*zip(primal, marks, axes), *zip(more, more_marks, (2, 1))]
    size = next(x.shape[m] for x, m, _ in everything if x is not None and m >= 0)
    folded = [x if a is None else _fold_heads(x, m, a, size) for x, m, a in everything]
    n = len(primal)
    return Operands._make(folded[:n]), folded[n:], size


def _unmapped(x: jax.Array, mark: Any) -> Any:
    shape = list(x.shape)
    if mark >= 0:
        del shape[mark]
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def _fold_heads(x: jax.Array, mark: int, axis: int, size: int) -> jax.Array:
    if mark >= 0:
        x = jnp.moveaxis(x, mark, axis + 1)
    else:
        shape = (*x.shape[: axis + 1], size, *x.shape[axis + 1 :])
        x = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), shape)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _unfold_heads(x: jax.Array, axis: int, size: int) -> jax.Array:
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis + 1, 0)


def _fold_forward(operands: Operands, marks: Operands, spec: LinearSpec) -> Any:
    found = _fold(operands, marks, [], [])
    if found is None:
        return None
    folded, _, size = found

    def unfold(results: tuple[jax.Array, jax.Array]) -> Any:
        return tuple(_unfold_heads(x, a, size) for x, a in zip(results, (2, 1), strict=True))

    return folded, spec, unfold


def _fold_backward(operands: Saved, marks: Any, spec: LinearSpec) -> Any:
    found = _fold(operands[0], marks[0], list(operands[1:]), list(marks[1:]))
    if found is None:
        return None
    folded, grads, size = found
    axes = _head_axes(folded)

    def unfold(results: Operands) -> Operands:
        pairs = zip(results, axes, strict=True)
        return Operands._make(
            None if g is None or a is None else _unfold_heads(g, a, size) for g, a in pairs
        )

    return (folded, *grads), spec, unfold


_run_forward = Operation(
    "linear_fwd", _forward_xla, _forward_shapes, _kernels(backward=False), _fold_forward
)
_run_backward = Operation(
    "linear_bwd", _backward_xla, _backward_shapes, _kernels(backward=True), _fold_backward
)
