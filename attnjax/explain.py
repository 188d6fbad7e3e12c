"""`explain`: which path and which body an attention call takes, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from attnjax.attention import Call, prepare_call
from pallas_kernels import dispatch
from pallas_kernels.flash import explain_flash, prepare


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which path `attention` takes and what it will visit.

    Attributes:
      implementation: "dense" or "block_sparse".
      reason: why, as a sentence.
      block_q, block_kv: tile sizes in tokens, None for the dense path.
      visited: share of all tiles that is visited (1.0 for dense), None where the mask is traced.
      unmasked: share of the visited tiles that need no mask, None likewise.
      body: "xla", or the kernel that runs the block-sparse path: "tpu", "triton", "mosaic_gpu".
      body_reason: why the XLA body runs where it does.
    """

    implementation: str
    reason: str
    block_q: int | None = None
    block_kv: int | None = None
    visited: float | None = None
    unmasked: float | None = None
    body: str = "xla"
    body_reason: str = ""

    def __str__(self) -> str:
        text = f"{self.implementation}: {self.reason}"
        if self.implementation == "block_sparse":
            text += f" Body: {self.body}" + (
                f", because {self.body_reason}" if self.body_reason else "."
            )
        if self.block_q is not None:
            text += f" Tiles of {self.block_q} queries x {self.block_kv} keys"
            if self.visited is not None:
                text += f"; {self.visited:.1%} of them are visited, "
                text += f"{self.unmasked:.1%} of these without a mask"
            text += "."
        return text


def explain(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    target: dispatch.Target | None = None,
    **options: Any,
) -> Explanation:
    """Says which path `attention` takes for these arguments, and why; nothing is computed.

    Args:
      query, key, value, bias, mask: as for `attention`; `jax.ShapeDtypeStruct`s will do.
      target: device to ask about, as `pallas_kernels.dispatch.Target("tpu", "TPU v5 lite")`; None
        is the first device here.
      **options: the other arguments of `attention`.

    Returns:
      An `Explanation`; `print` it.
    """
    options.pop("return_residual", None)
    at = target or _here()
    found: list[Explanation] = []

    def trace(query: Any, key: Any, value: Any, bias: Any) -> None:
        found.append(_explain(prepare_call(query, key, value, bias, mask, **options), at))

    jax.eval_shape(trace, query, key, value, bias)
    return found[0]


def _explain(call: Call, target: dispatch.Target) -> Explanation:
    if call.implementation == "dense":
        return Explanation("dense", call.reason, visited=1.0, unmasked=None)
    found = explain_flash(
        *prepare(
            call.query, call.key, call.value, mask=call.mask, mask_array=call.mask_array,
            bias=call.bias, **call.options,
        ),
        target,
    )  # fmt: skip
    visited = unmasked = None
    if found.lists.is_static:
        stats = found.lists.stats()
        visited = stats["density"]
        unmasked = 0.0 if call.mask_array is not None else stats["full"] / max(stats["visited"], 1)
    return Explanation(
        "block_sparse", call.reason, found.block_q, found.block_kv, visited, unmasked, found.body,
        found.reason,
    )  # fmt: skip


def _here() -> dispatch.Target:
    """The device that a computation lands on by default."""
    device = jax.devices()[0]
    platform = "cuda" if device.platform == "gpu" else str(device.platform)
    return dispatch.Target(platform, device.device_kind, 1, dispatch.capability_of(device))
