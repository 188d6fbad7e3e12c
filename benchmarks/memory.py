"""Temporary memory of attention as the compiler plans it, beside dense attention.

Nothing is run: a function is compiled for each length and `memory_analysis()` is read.
"""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import attnjax as aj
from benchmarks import measure

GOALS = {"forward": 50.0, "forward+backward": 30.0}
"""How many times less temporary memory than dense attention is wanted at 16,384 tokens."""


def temporary_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """Bytes that a jitted function needs beside its arguments and results."""
    plan = jax.jit(function).lower(*arguments).compile().memory_analysis()
    if plan is None:
        raise RuntimeError(f"the {jax.default_backend()} compiler gives no memory analysis.")
    return plan.temp_size_in_bytes


def with_gradients(attention: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The output of attention and the gradients of query, key and value for a given cotangent."""

    def both(query, key, value, cotangent):
        out, pull = jax.vjp(attention, query, key, value)
        return out, pull(cotangent)

    return both


def run(
    *,
    lengths: Sequence[int],
    heads: int = 8,
    head_dim: int = 64,
    out: pathlib.Path | None = None,
) -> list[dict[str, Any]]:
    """Prints and returns planned temporary bytes of causal attention, forward and with gradients.

    Args:
      lengths: tokens, increasing.
      heads, head_dim: shape of query, key and value; the batch is 1, the type float32.
      out: folder for `memory.json` and `memory.png`, or None.
    """
    attentions = {
        "attnjax": functools.partial(aj.attention, mask=aj.masks.Causal()),
        "dense": functools.partial(
            jax.nn.dot_product_attention, is_causal=True, implementation="xla"
        ),
    }
    rows = []
    for length in lengths:
        x = jax.ShapeDtypeStruct((1, length, heads, head_dim), jnp.float32)
        for passes in GOALS:
            for name, attention in attentions.items():
                function = attention if passes == "forward" else with_gradients(attention)
                arguments = (x,) * (3 if passes == "forward" else 4)
                count = temporary_bytes(function, *arguments)
                rows.append({"pass": passes, "length": length, "candidate": name, "bytes": count})
    _report(rows, lengths)
    if out is not None:
        measure.save(out / "memory.json", {"heads": heads, "head_dim": head_dim, "batch": 1}, rows)
        _picture(rows, lengths, out / "memory.png")
        print(f"\nwritten: {out / 'memory.json'}, {out / 'memory.png'}")
    return rows


def slope(lengths: Sequence[int], counts: Sequence[int]) -> float:
    """Exponent p of the least-squares fit bytes ~ length^p; 1 is linear growth."""
    x = [math.log(n) for n in lengths]
    y = [math.log(n) for n in counts]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y))
    return rise / sum((a - mean_x) ** 2 for a in x)


def _pick(rows: Sequence[dict[str, Any]], passes: str, candidate: str) -> list[int]:
    return [r["bytes"] for r in rows if r["pass"] == passes and r["candidate"] == candidate]


def _report(rows: Sequence[dict[str, Any]], lengths: Sequence[int]) -> None:
    for passes, goal in GOALS.items():
        ours, dense = (_pick(rows, passes, name) for name in ("attnjax", "dense"))
        lines = [
            [str(n), f"{a / 2**20:.2f}", f"{b / 2**20:.1f}", f"{b / a:.1f}x"]
            for n, a, b in zip(lengths, ours, dense)
        ]
        print(f"\n{passes}, causal, temporary MiB")
        print(measure.table(["tokens", "attnjax", "dense", "dense / attnjax"], lines))
        if len(lengths) > 1:
            grown = slope(lengths, ours), slope(lengths, dense)
            print(
                f"bytes grow with length^{grown[0]:.2f} (attnjax) and length^{grown[1]:.2f} (dense)"
            )
        print(f"wanted at 16384 tokens: at least {goal:.0f}x")


def _picture(rows: Sequence[dict[str, Any]], lengths: Sequence[int], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(GOALS), figsize=(8, 3.2), sharey=True, layout="constrained")
    for axis, passes in zip(axes, GOALS):
        for name in ("attnjax", "dense"):
            mib = [n / 2**20 for n in _pick(rows, passes, name)]
            axis.loglog(lengths, mib, "o-", label=name)
        axis.set(title=passes, xlabel="tokens")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("temporary memory, MiB")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
