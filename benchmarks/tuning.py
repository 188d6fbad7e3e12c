"""Measures tile sizes on the device at hand: `python -m benchmarks tune [--smoke]`.

Writes one JSON file per device kind; `ATTNJAX_TUNING=<file>` or `pallas_kernels.tune.load(file)`
uses it, and in pallas_kernels/tuned/ it comes with the package.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnjax import masks
from attnjax.mechanisms.linear.lightning_attention import lightning_slopes
from benchmarks import measure
from pallas_kernels import tune, tuner
from pallas_kernels.decode import DecodeConfig
from pallas_kernels.flash import FlashConfig
from pallas_kernels.tuner import Result

KERNELS = ("flash", "decode", "linear")


def run(
    *,
    kernels: Sequence[str] = KERNELS,
    implementation: str | None = None,
    repeats: int = 5,
    smoke: bool = False,
    out: pathlib.Path | None = None,
) -> pathlib.Path:
    """Tunes all classes of shapes, prints what was found, and gives the file.

    Args:
      kernels: any of "flash", "decode", "linear".
      implementation: body to tune; None is the platform's.
      repeats: timed rounds of each candidate.
      smoke: two candidates on tiny arrays.
      out: folder of the file; None is pallas_kernels/tuned, or build/tuned with `smoke`.
    """
    folder = out or (pathlib.Path("build/tuned") if smoke else tune.PACKAGED)
    path = folder / tune.file_name(jax.devices()[0].device_kind)
    jobs = {"flash": _flash, "decode": _decode, "linear": _linear}
    lines = []
    for kernel in kernels:
        for name, make in jobs[kernel](implementation, repeats, smoke):
            try:
                found = make()
            except RuntimeError as problem:  # no candidate ran
                print(f"{name}: {problem}", flush=True)
                continue
            found.save(path)
            lines.append(_line(name, found))
            print(f"{name}: {found.entry.config} {found.entry.milliseconds}", flush=True)
    print(measure.table(["class", "ms", "body's own choice, ms", "refused"], lines))
    print(f"written: {path}")
    return path


def _line(name: str, found: Result) -> list[str]:
    own = {}
    for what, _, value in found.timed:
        own.setdefault(what, value)  # the first of each kind has the body's sizes
    own = [v for what, v in own.items() if what in found.entry.milliseconds]
    best = found.entry.milliseconds.values()
    return [
        name,
        " / ".join(f"{x:.3f}" for x in best),
        " / ".join(f"{x:.3f}" for x in own),
        str(len(found.refused)),
    ]


Jobs = list[tuple[str, Callable[[], Result]]]


def _arrays(*shapes: tuple[int, ...]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    dtype = jnp.float32 if jax.devices()[0].platform == "cpu" else jnp.bfloat16
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def _flash(implementation: str | None, repeats: int, smoke: bool) -> Jobs:
    classes = [(64, 4096), (128, 1024), (128, 4096), (128, 16384), (256, 4096)]
    heads, candidates = 16, None
    if smoke:
        classes, heads = [(32, 128)], 2
        candidates = [FlashConfig(32, 32), FlashConfig(64, 64)]

    def job(width: int, length: int) -> Callable[[], Result]:
        def make() -> Result:
            q, k, v = _arrays(*[(1, length, heads, width)] * 3)
            return tuner.tune_flash(
                q, k, v, mask=masks.Causal(), implementation=implementation,
                candidates=candidates, repeats=repeats,
            )  # fmt: skip

        return make

    return [(f"flash d{d} n{n}", job(d, n)) for d, n in classes]


def _decode(implementation: str | None, repeats: int, smoke: bool) -> Jobs:
    classes, batch, heads, kv_heads, candidates = [(128, 8192), (128, 65536)], 8, 32, 8, None
    if smoke:
        classes, batch, heads, kv_heads = [(32, 128)], 1, 2, 1
        candidates = [DecodeConfig(32, 1), DecodeConfig(64, 2)]

    def job(width: int, length: int) -> Callable[[], Result]:
        def make() -> Result:
            cache = (batch, length, kv_heads, width)
            q, k, v = _arrays((batch, 1, heads, width), cache, cache)
            return tuner.tune_decode(
                q, k, v, implementation=implementation, candidates=candidates, repeats=repeats
            )

        return make

    return [(f"decode d{d} n{n}", job(d, n)) for d, n in classes]


def _linear(implementation: str | None, repeats: int, smoke: bool) -> Jobs:
    classes, heads = [(64, 8192), (128, 2048), (128, 16384)], 32
    options: dict[str, Any] = {}
    if smoke:
        classes, heads, options = [(32, 128)], 2, {"candidates": (16, 64)}

    def job(width: int, length: int) -> Callable[[], Result]:
        def make() -> Result:
            q, k, v = _arrays(*[(2, length, heads, width)] * 3)
            decay = jnp.asarray(-lightning_slopes(heads), jnp.float32)
            return tuner.tune_linear(
                q, k, v, decay, implementation=implementation, repeats=repeats, **options
            )

        return make

    return [(f"linear d{d} n{n}", job(d, n)) for d, n in classes]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks tune`."""
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS)
    parser.add_argument("--implementation", help="body to tune (the platform's)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--smoke", action="store_true", help="two candidates on tiny arrays")
    parser.add_argument("--out", type=pathlib.Path, help="folder (pallas_kernels/tuned)")
