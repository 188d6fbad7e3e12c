"""The plan of a run before it starts: bytes per device, and operations by formula."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.models.pattern import Mixer, layer_mixers
from attnjax.spec import mechanisms
from train.config import Config
from train.mesh import Device, describe
from train.state import Parts, abstract_state, prepare
from train.step import batch_shardings, make_train_step


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step costs.

    Attributes:
      mesh: description of the mesh.
      parameters: number of parameters.
      bytes_per_device: what -> bytes on each device.
      flops_per_step: floating-point operations of one step on all devices, forward and backward.
      tokens_per_step: tokens of one step.
      compile_seconds: how long the compiler took.
    """

    mesh: str
    parameters: int
    bytes_per_device: dict[str, int]
    flops_per_step: float
    tokens_per_step: int
    compile_seconds: float

    def __str__(self) -> str:
        """A table."""
        rows = [
            ("mesh", self.mesh),
            ("parameters", f"{self.parameters:,}"),
            ("tokens per step", f"{self.tokens_per_step:,}"),
            (
                "operations per step",
                f"{self.flops_per_step:.3e} (matrix products, forward and backward)",
            ),
            *((f"{what}, per device", _size(n)) for what, n in self.bytes_per_device.items()),
            ("compiled in", f"{self.compile_seconds:.1f} s"),
        ]
        wide = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{wide}}  {value}" for name, value in rows)


def make_plan(config: Config, devices: list[Device] | None = None) -> Plan:
    """Compiles the step for the mesh, makes no array, and reads the memory analysis."""
    parts = prepare(config, devices)
    state = abstract_state(parts)
    shape = (config.data.batch, config.data.context)
    batch = {
        n: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=s)
        for n, s in batch_shardings(parts).items()
    }
    began = time.monotonic()
    compiled = make_train_step(parts).lower(state, batch).compile()
    seconds = time.monotonic() - began
    sizes = {
        "parameters": _bytes(state["params"]),
        "optimizer state": _bytes(state["opt"]),
        "batch": _bytes(batch),
    }
    analysis = compiled.memory_analysis()
    if analysis is not None:
        sizes["temporary"] = analysis.temp_size_in_bytes
        # not the compiler's own peak: on CPU that leaves the temporaries out
        sizes["arguments, results and temporary"] = (
            analysis.argument_size_in_bytes
            + analysis.output_size_in_bytes
            - analysis.alias_size_in_bytes
            + analysis.temp_size_in_bytes
        )
    tokens = math.prod(shape)
    return Plan(
        describe(parts.mesh),
        parts.skeleton.count(),
        sizes,
        flops_per_token(parts) * tokens,
        tokens,
        seconds,
    )


def flops_per_token(parts: Parts) -> float:
    """Matrix-product operations per trained token, by formula: a compiler counts a scan body once.

        6 P + sum over layers of 12 h d n

    P are the parameters that multiply every token (a table for look-ups only does not), h d the
    width of all heads, n the keys that a query sees on average: half the row for causal attention,
    less for a window, d for a recurrence with a state of d x d per head.
    """
    skeleton, model = parts.skeleton, parts.config.model
    shapes, axes = skeleton.shapes, skeleton.axes
    dense = sum(math.prod(shapes[name]) for name in shapes if "vocab" not in axes[name])
    head = skeleton.config.vocab_size * skeleton.config.width
    length, head_dim = parts.config.data.context, model.width // model.num_heads
    seen = sum(keys_seen(m, length, head_dim) for m in layer_mixers(model.mixers, model.num_layers))
    return 6.0 * (dense + head) + 12.0 * model.width * seen


def keys_seen(mixer: Mixer, length: int, head_dim: int) -> float:
    """Mean number of keys that a query of a causal layer meets in a row of `length` tokens."""
    if mixer.kind == "window":
        reach = min(length, (mixer.window or length) + mixer.sinks)
        return reach - reach * (reach - 1) / (2 * length)
    if mixer.kind == "strided":
        blocks = mixer.local + length / mixer.block / 2 / mixer.stride
        return min((length + 1) / 2, mixer.block * blocks)
    if mixer.kind == "softmax":
        return (length + 1) / 2
    recurrent = mixer.kind == "lightning" or mechanisms()[mixer.kind].kernel == "linear"
    return float(head_dim) if recurrent else (length + 1) / 2


def _bytes(tree: Any) -> int:
    def one(x: jax.ShapeDtypeStruct) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding is not None else x.shape
        return math.prod(shape) * (
            8 if jnp.issubdtype(x.dtype, jax.dtypes.extended) else x.dtype.itemsize
        )

    return sum(one(x) for x in jax.tree.leaves(tree))


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count = count / 1024
    return f"{count:.2f} GiB"
