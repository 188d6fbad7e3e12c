"""The linear recurrence on TPUs: one walk over the chunks per batch row and group of heads.

The grid is (b, head groups, tiles of v, chunks), the chunks in order. The state stays in VMEM from
chunk to chunk. The backward pass first walks forward for the state before every chunk, then back.
Dots take the type of the inputs and sum in float32; states and decays are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Target
from pallas_kernels.linear import layout, tpu_kernels
from pallas_kernels.linear.spec import LinearSpec, Operands
from pallas_kernels.linear.tpu_plan import Plan, by_head, by_token, make_plan, read_arrays


def forward(operands: Operands, spec: LinearSpec, target: Target) -> tuple[jax.Array, jax.Array]:
    """Output [b, t, h, v] and final state [b, h, k, v]; see `linear_recurrence`."""
    plan = make_plan(operands, spec, target, backward=False)
    arrays = read_arrays(operands, plan)
    out, state = _call(
        tpu_kernels.forward_kernel,
        "linear_forward",
        arrays,
        {"out": plan.dtype, "state": plan.wide},
        plan,
        operands.state_shape,
    )
    return by_token(out, operands).astype(operands.value.dtype), state


def backward(
    operands: Operands, d_out: jax.Array, d_state: jax.Array, spec: LinearSpec, target: Target
) -> Operands:
    """Gradients of every operand; see `backward.linear_bwd`."""
    plan = make_plan(operands, spec, target, backward=True)
    arrays = read_arrays(operands, plan)
    given = {n: x for n, x in arrays.items() if n not in ("query", "pair", "row")}
    states, _ = _call(
        tpu_kernels.states_kernel,
        "linear_states",
        given,
        {"states": plan.dtype, "state": plan.wide},
        plan,
        operands.state_shape,
    )
    arrays |= {"states": states, "d_out": by_head(d_out, plan), "d_state": d_state}
    arrays.pop("initial", None)
    tiles = operands.value.shape[-1] // plan.width
    part = plan.dtype if tiles == 1 else plan.wide
    found = {"d_query": part, "d_key": part, "d_value": plan.dtype, "d_initial": plan.wide}
    if plan.decay is not None:
        found["d_cumulative"] = plan.wide
    got = _call(
        tpu_kernels.backward_kernel, "linear_backward", arrays, found, plan, operands.state_shape
    )
    grads = dict(zip(found, got, strict=True))

    def whole(x: jax.Array) -> jax.Array:  # sum over the tiles of v
        return x[0] if tiles == 1 else jnp.sum(x, axis=0)

    return Operands(
        query=by_token(whole(grads["d_query"]), operands),
        key=by_token(whole(grads["d_key"]), operands),
        value=by_token(grads["d_value"], operands),
        decay=(
            None
            if plan.decay is None
            else layout.sum_decay(operands, whole(grads["d_cumulative"])[..., 0, :])
        ),
        initial_state=None if operands.initial_state is None else grads["d_initial"],
    )


def _call(
    kernel: Callable[..., None],
    name: str,
    arrays: dict[str, jax.Array],
    results: dict[str, Any],
    plan: Plan,
    state_shape: tuple[int, int, int, int],
) -> list[jax.Array]:
    """Runs a kernel that gets its references by name.

    Args:
      kernel: `kernel(refs, plan)`.
      name: of the kernel in profiles.
      arrays: inputs by name.
      results: name -> type of the results.
      plan: sizes.
      state_shape: [b, h, k, v].
    """
    b, h, k, v = state_shape
    tiles, t = v // plan.width, plan.count * plan.chunk
    shapes = {
        "out": (b, h, t, v),
        "state": (b, h, k, v),
        "states": (b, h, plan.count, k, v),
        "d_query": (tiles, b, h, t, k),
        "d_key": (tiles, b, h, t, k),
        "d_value": (b, h, t, v),
        "d_initial": (b, h, k, v),
        "d_cumulative": (tiles, b, h, plan.count, 1, plan.chunk),
    }
    reverse = "d_out" in arrays
    names = (*arrays, *results)
    out_shapes = [jax.ShapeDtypeStruct(shapes[n], dtype) for n, dtype in results.items()]
    blocks = [
        _block(n, x.shape, plan, reverse=reverse)
        for n, x in zip(names, [*arrays.values(), *out_shapes], strict=True)
    ]

    def body(*refs: Any) -> None:
        # the context keeps a precision that the caller set for XLA out of 16-bit products
        with jax.default_matmul_precision("default" if plan.dtype == jnp.bfloat16 else "highest"):
            kernel(dict(zip(names, refs, strict=True)), plan)

    return pl.pallas_call(
        body,
        out_shape=out_shapes,
        grid=(b, h // plan.heads, tiles, plan.count),
        in_specs=blocks[: len(arrays)],
        out_specs=blocks[len(arrays) :],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=plan.interpret,
        name=name,
    )(*arrays.values())


def _block(name: str, shape: tuple[int, ...], plan: Plan, *, reverse: bool) -> pl.BlockSpec:
    """The block of one array in a grid step; with `reverse` the chunks come last to first."""
    c, k, hb = plan.chunk, shape[-1], plan.heads

    def at(n: Any) -> Any:
        return plan.count - 1 - n if reverse else n

    if name in ("query", "key"):
        return pl.BlockSpec((1, hb, c, k), lambda b, g, j, n: (b, g, at(n), 0))
    if name in ("d_query", "d_key"):
        return pl.BlockSpec((1, 1, hb, c, k), lambda b, g, j, n: (j, b, g, at(n), 0))
    if name in ("value", "out", "d_out", "d_value"):
        return pl.BlockSpec((1, hb, c, plan.width), lambda b, g, j, n: (b, g, at(n), j))
    if name in ("initial", "state", "d_state", "d_initial"):
        return pl.BlockSpec((1, hb, shape[2], plan.width), lambda b, g, j, n: (b, g, 0, j))
    if name == "states":
        block = (1, hb, 1, shape[3], plan.width)
        return pl.BlockSpec(block, lambda b, g, j, n: (b, g, at(n), 0, j))
    if name == "d_cumulative":
        return pl.BlockSpec((1, 1, hb, 1, 1, c), lambda b, g, j, n: (j, b, g, at(n), 0, 0))
    if name == "pair":
        return pl.BlockSpec((hb, c, c), lambda b, g, j, n: (g, 0, 0))
    if name in ("row", "col", "whole"):

        def last(n: Any) -> Any:
            return (at(n) == plan.count - 1).astype(jnp.int32)

        return pl.BlockSpec((1, hb, *shape[2:]), lambda b, g, j, n: (last(n), g, 0, 0))
    rows, heads = shape[0] > 1, shape[1] > 1  # factors: both may be shared
    return pl.BlockSpec(
        (1, 1, 1, shape[3], c),
        lambda b, g, j, n: (b if rows else 0, g if heads else 0, at(n), 0, 0),
    )
