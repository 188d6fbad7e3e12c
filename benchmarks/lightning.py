"""Tokens per second of lightning attention over the sequence length, at constant batch x length.

    python -m benchmarks lightning --lengths 1024 4096 16384 65536

Linear attention does the same work per token at any length, so the figures should be one line: the
spread, slowest over fastest, is printed.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.mechanisms.linear.lightning_attention import lightning_attention, lightning_slopes
from benchmarks import measure

LENGTHS = tuple(1024 * 2**i for i in range(7))


def run(
    *,
    lengths: Sequence[int] = LENGTHS,
    heads: int = 8,
    head_dim: int = 64,
    chunk_size: int | None = None,
    repeats: int = 5,
    out: pathlib.Path = pathlib.Path("build/benchmarks"),
) -> list[dict[str, Any]]:
    """Measures forward and forward plus backward, prints a table and writes `lightning.json`.

    Args:
      lengths: tokens per sequence; the longest one is also the number of tokens of every
        measurement, so each must divide it.
      heads: h.
      head_dim: width of queries, keys and values of a head.
      chunk_size: tokens per chunk; None is the default.
      repeats: timed rounds over all lengths in turn; the median counts.
      out: folder of the result file.

    Returns:
      One record per length.
    """
    tokens = max(lengths)
    if any(tokens % t for t in lengths):
        raise ValueError(
            f"lengths: every length must divide the longest, {tokens}, got {list(lengths)}."
        )
    candidates = {}
    for t in lengths:
        calls = _candidates(tokens // t, t, heads, head_dim, chunk_size)
        candidates |= {(t, name): call for name, call in calls.items()}
    seconds = measure.interleaved(candidates, repeats)
    rows = [
        {"length": t, "batch": tokens // t}
        | {name: tokens / measure.median(seconds[t, name]) for name in ("forward", "backward")}
        for t in lengths
    ]
    lines = [
        [str(r["length"]), str(r["batch"]), f"{r['forward']:,.0f}", f"{r['backward']:,.0f}"]
        for r in rows
    ]
    header = ["length", "batch", "forward, tokens/s", "forward + backward, tokens/s"]
    print(measure.table(header, lines))
    for name, label in (("forward", "forward"), ("backward", "forward + backward")):
        speeds = [r[name] for r in rows]
        print(f"{label}: slowest / fastest = {min(speeds) / max(speeds):.3f}")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"heads": heads, "head_dim": head_dim, "chunk_size": chunk_size, "tokens": tokens}
    measure.save(out / "lightning.json", settings, rows)
    return rows


def _candidates(
    batch: int, length: int, heads: int, head_dim: int, chunk_size: int | None
) -> dict[str, Callable[[], Any]]:
    """Compiled calls for one length that wait for their results."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = [jax.random.normal(key, (batch, length, heads, head_dim)) for key in keys]
    slopes = jnp.asarray(lightning_slopes(heads), jnp.float32)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return lightning_attention(q, k, v, slopes, chunk_size=chunk_size)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(forward(q, k, v) ** 2)

    def waiting(run: Callable[..., Any]) -> Callable[[], Any]:
        compiled = jax.jit(run).lower(*inputs).compile()
        return lambda: jax.block_until_ready(compiled(*inputs))

    return {
        "forward": waiting(forward),
        "backward": waiting(jax.value_and_grad(loss, argnums=(0, 1, 2))),
    }


def main() -> None:
    """`python -m benchmarks.lightning`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lightning", description=run.__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--chunk-size", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/benchmarks"))
    run(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
