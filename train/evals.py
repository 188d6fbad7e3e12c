"""Validation: bits per byte on held-out files, by context seen, beside general compressors."""

from __future__ import annotations

import lzma
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from train.data import Batch
from train.log import NATS_PER_BIT


def evaluate(
    eval_step: Callable[..., Any],
    params: Any,
    batches: Iterable[Batch],
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Mean loss over the predicted bytes of `batches`.

    Args:
      eval_step: from `train.step.make_eval_step`.
      params: the weights.
      batches: from `train.data.ByteData.validation`.
      stopped: asked before every batch; when it says yes the validation ends with None.

    Returns:
      loss (nats per byte), bits_per_byte, bytes, and the bits per byte of each quarter of the
      context (`quarters`, and `quarter_bytes` how many bytes each holds; None for an empty one).
    """
    sums, counts = np.zeros(4), np.zeros(4)
    for batch in batches:
        if stopped():
            return None
        loss, tokens = jax.device_get(eval_step(params, batch))
        sums, counts = sums + loss.astype(np.float64), counts + tokens.astype(np.float64)
    total = float(sums.sum() / counts.sum())
    quarters = [
        s / n / NATS_PER_BIT if n else None
        for s, n in zip(sums.tolist(), counts.tolist(), strict=True)
    ]
    return {
        "loss": total,
        "bits_per_byte": total / NATS_PER_BIT,
        "bytes": int(counts.sum()),
        "quarters": quarters,
        "quarter_bytes": [int(n) for n in counts],
    }


def compressors(documents: list[bytes]) -> dict[str, float]:
    """Bits per byte of zlib -9 and xz -9e on the documents joined to one, their best case."""
    joined = b"".join(documents)
    packed = {
        "zlib -9": zlib.compress(joined, 9),
        "xz -9e": lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME),
    }
    return {name: 8.0 * len(data) / len(joined) for name, data in packed.items()}


def report(result: dict[str, Any]) -> str:
    """The table after a run: the model beside the compressors, and by quarter of context."""
    rows = [("this model", result["bits_per_byte"]), *result["compressors"].items()]
    lines = [f"bits per byte on {result['bytes']:,} held-out bytes (lower is better)"]
    lines += [f"  {name:<12} {bits:.3f}" for name, bits in rows]
    context = result["context"]
    lines.append("this model by bytes of context before the predicted one")
    for i, bits in enumerate(result["quarters"]):
        shown = "   -" if bits is None else f"{bits:.3f}"
        lines.append(f"  {i * context // 4:>6} to {(i + 1) * context // 4 - 1:<6} {shown}")
    return "\n".join(lines)
