"""The linear recurrence on NVIDIA GPUs from compute capability 8.0 on, in Pallas Triton.

Two phases: one walk over the chunks for the state before every chunk (parallel over rows, heads and
tiles of the state), then all outputs at once. The backward pass walks forward for the states, back
for their gradients, and then takes all chunks at once. Nothing is added atomically.

Dots take the type of the inputs and sum in float32; states and decays are float32. States that a
later kernel reads are stored in the type of the inputs, in which that kernel multiplies them.

JAX 0.11 deprecates this backend; what depends on it is in `triton*.py` and `compat.py` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import compat
from pallas_kernels.dispatch import Target
from pallas_kernels.flash.gpu_arch import require_capability
from pallas_kernels.linear import layout, triton_chunks, triton_states
from pallas_kernels.linear.spec import LinearSpec, Operands, default_chunk
from pallas_kernels.linear.triton_tiles import Plan, padded_width

DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def forward(operands: Operands, spec: LinearSpec, target: Target) -> tuple[jax.Array, jax.Array]:
    """Output [b, t, h, v] and final state [b, h, k, v]; see `linear_recurrence`."""
    plan, arrays = _prepare(operands, spec, target)
    b, h, k, v = operands.state_shape
    states, state = _run(triton_states.forward, "linear_states", arrays, plan, plan.state_results)
    arrays["states"] = states
    out = jax.ShapeDtypeStruct((b, plan.length, h, v), plan.dtype)
    (out,) = _run(triton_chunks.outputs, "linear_outputs", arrays, plan, [out])
    return out.astype(operands.value.dtype), state


def backward(
    operands: Operands, d_out: jax.Array, d_state: jax.Array, spec: LinearSpec, target: Target
) -> Operands:
    """Gradients of every operand; see `backward.linear_bwd`."""
    plan, arrays = _prepare(operands, spec, target)
    b, h, k, v = operands.state_shape
    states, _ = _run(triton_states.forward, "linear_states", arrays, plan, plan.state_results)
    arrays |= {"d_out": d_out.astype(plan.dtype), "d_state": d_state.astype(plan.wide)}
    d_states, d_initial = _run(
        triton_states.backward, "linear_state_gradients", arrays, plan, plan.state_results
    )
    arrays |= {"states": states, "d_states": d_states}
    keys = jax.ShapeDtypeStruct((b, plan.length, h, k), plan.dtype)
    found = [keys, keys]
    if plan.decay:
        # one part per tile of k
        parts = (plan.k_tiles, b, h, plan.count * plan.chunk)
        found.append(jax.ShapeDtypeStruct(parts, plan.wide))
    dq, dk, *db = _run(triton_chunks.key_gradients, "linear_key_gradients", arrays, plan, found)
    values = jax.ShapeDtypeStruct((b, plan.length, h, v), plan.dtype)
    (dv,) = _run(triton_chunks.value_gradients, "linear_value_gradients", arrays, plan, [values])
    d_decay = None
    if db:
        each = jnp.sum(db[0], axis=0).reshape(b, h, plan.count, plan.chunk)
        d_decay = layout.sum_decay(operands, each)
    return Operands(
        query=dq,
        key=dk,
        value=dv,
        decay=d_decay,
        initial_state=None if operands.initial_state is None else d_initial,
    )


def _prepare(
    operands: Operands, spec: LinearSpec, target: Target
) -> tuple[Plan, dict[str, jax.Array]]:
    """Sizes, and what the kernels read by name."""
    dtype = layout.check_supported("triton", operands, target, DTYPES)
    if not target.interpret:
        require_capability(target, (8, 0), "linear attention's triton kernel")
    b, t, h, k = operands.query.shape
    wide = jnp.dtype(dtype).itemsize > 2
    size = min(spec.chunk_size or default_chunk("cuda", dtype), 128)
    size = min(padded_width(size), padded_width(t))
    plan = Plan(
        batch=b,
        length=t,
        heads=h,
        key_width=k,
        value_width=operands.value.shape[-1],
        chunk=size,
        k_tile=min(32 if wide else 64, padded_width(k)),
        v_tile=min(32 if wide else 64, padded_width(operands.value.shape[-1])),
        scale=spec.scale,
        dtype=jnp.dtype(dtype),
        wide=operands.dtype,
        decay=operands.decay is not None,
        runs=operands.runs is not None,
        interpret=target.interpret,
    )
    arrays = {n: getattr(operands, n).astype(dtype) for n in ("query", "key", "value")}
    factors = layout.token_factors(operands, size, spec.scale)
    if factors is not None:
        arrays["factors"] = factors
    if operands.initial_state is not None:
        arrays["initial"] = operands.initial_state.astype(plan.wide)
    return plan, arrays


def _run(
    kernel: Callable[..., None],
    name: str,
    arrays: dict[str, jax.Array],
    plan: Plan,
    results: list[jax.ShapeDtypeStruct],
) -> list[jax.Array]:
    """Runs `kernel(plan, references by name, *references of the results)` on its grid."""
    programs, num_warps, num_stages = plan.launch(name)

    def body(refs: dict[str, Any], *out: Any) -> None:
        # the context keeps a precision that the caller set for XLA out of 16-bit products
        wide = plan.dtype.itemsize > 2
        with jax.default_matmul_precision("highest" if wide else "default"):
            kernel(plan, refs, *out)

    return compat.triton_call(
        body, results, programs, name=name,
        num_warps=num_warps, num_stages=num_stages, interpret=plan.interpret,
    )(arrays)  # fmt: skip
