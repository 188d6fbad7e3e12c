"""Our kernels beside their peers on an NVIDIA GPU.

    python -m benchmarks gpu
    python -m benchmarks gpu --only causal FLUX --implementations pallas mosaic_gpu --record
    python -m benchmarks gpu --smoke          # tiny, on any machine: does it run?

Peers: cuDNN (through `jax.nn.dot_product_attention`), PyTorch FlexAttention and SDPA, and
flash-linear-attention; one that is missing is named with the reason. Times are of the device: many
calls in one compiled loop (JAX), or between two events (PyTorch); medians of interleaved rounds,
with the fastest and the slowest. Before anything is timed, our kernel is compared with a float32
evaluation of the definition at a small size; `--record` notes a passed comparison, with device and
date, in benchmarks/hardware_runs.json, from which the support matrix knows what was run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_torch, measure
from benchmarks.gpu_problems import Problem, definition, ours, problems, small
from benchmarks.portability import RUNS
from benchmarks.portability_table import markdown
from pallas_kernels.tuner import device_loop

PASSES = ("forward", "forward+backward")
TARGET_SECONDS = 0.1
"""A timed round repeats a call until it takes about so long."""

MOST_STEPS = 200


def run(
    *,
    only: Sequence[str] | None = None,
    implementations: Sequence[str] = ("pallas",),
    repeats: int = 10,
    smoke: bool = False,
    record: bool = False,
    out: pathlib.Path = pathlib.Path("build/benchmarks"),
) -> int:
    """Measures all problems; prints a Markdown table; writes gpu.json and gpu.md.

    Args:
      only: parts of problem names, None for all.
      implementations: of our functions, each a column: "pallas", "triton", "mosaic_gpu", "xla".
      repeats: timed rounds of all candidates in turn.
      smoke: tiny problems, the XLA bodies on CPUs.
      record: whether to note passed comparisons in benchmarks/hardware_runs.json.
      out: folder for the results.

    Returns:
      0, or 1 when one of our implementations failed or gave wrong results.
    """
    device = jax.devices()[0]
    if device.platform != "gpu" and not smoke:
        raise SystemExit(
            f"gpu: JAX sees no GPU, only {device.device_kind!r}; run it on a machine with one, or "
            "add --smoke to see that the command works."
        )
    if device.platform != "gpu":
        implementations, repeats = ("xla",), min(repeats, 2)
    dtype = "bfloat16" if device.platform == "gpu" else "float32"
    chosen = [p for p in problems(smoke) if not only or any(part in p.name for part in only)]
    rows, failed = [], False
    for p in chosen:
        checked = {name: check(p, name, dtype) for name in implementations}
        failed |= any(not c["passed"] for c in checked.values())
        for name, found in checked.items():
            print(f"{p.name}, attnjax {name}: {found['text']}", flush=True)
        for passes in PASSES if p.kernel != "decode" else PASSES[:1]:
            row = _measure(p, passes, [n for n in checked if checked[n]["passed"]], dtype, repeats)
            rows.append(row | {"checked": checked})
            print(_line(row), flush=True)
    text = report(rows)
    print(f"\n{text}")
    out.mkdir(parents=True, exist_ok=True)
    settings = {"device": device.device_kind, "dtype": dtype, "repeats": repeats, "smoke": smoke}
    measure.save(out / "gpu.json", settings, rows)
    (out / "gpu.md").write_text(f"{device.device_kind}, {dtype}.\n\n{text}\n")
    print(f"\nwritten: {out / 'gpu.json'}, {out / 'gpu.md'}")
    if record:
        _record(rows, device.device_kind)
    return int(failed)


def check(p: Problem, implementation: str, dtype: str) -> dict[str, Any]:
    """Compares output and gradients with the definition in float32 at a small size of the problem.

    It passes when the largest error, relative to the largest entry, is at most twice that of the
    definition evaluated in the same dtype, plus 1e-5.
    """
    tiny = small(p)
    inputs = tiny.arrays(jnp.dtype(dtype))
    exact_inputs = [x.astype(jnp.float32) for x in inputs]

    def results(function: Any, arrays: Sequence[jax.Array]) -> list[np.ndarray]:
        q, k, v, cotangent = arrays
        with jax.default_matmul_precision("highest"):
            out, pull = jax.vjp(function, q, k, v)
            grads = pull(cotangent.astype(out.dtype))
        return [np.asarray(x, np.float32) for x in (out, *grads)]

    try:
        exact = definition(tiny)
        want, plain = results(exact, exact_inputs), results(exact, inputs)
        mine = results(ours(tiny, implementation), inputs)
    except Exception as problem:  # the kernel's refusal is the result
        text = " ".join(str(problem).split())[:300]
        return {"passed": False, "error": None, "text": f"failed: {text}"}

    def error(got: list[np.ndarray]) -> float:
        pairs = zip(got, want, strict=True)
        return max(float(np.abs(g - w).max() / (np.abs(w).max() + 1e-30)) for g, w in pairs)

    found, allowed = error(mine), 2 * error(plain) + 1e-5
    passed = bool(found <= allowed)
    verdict = "agrees" if passed else "DIFFERS"
    text = f"{verdict} with float32, largest error {found:.1e} (allowed {allowed:.1e})"
    return {"passed": passed, "error": found, "allowed": allowed, "text": text}


def _measure(
    p: Problem, passes: str, names: Sequence[str], dtype: str, repeats: int
) -> dict[str, Any]:
    made: dict[str, Callable[[], Callable[[], float]] | str] = {}
    for name in names:
        made[f"attnjax {name}"] = lambda name=name: _jax(p, ours(p, name), passes, dtype)
    made["cuDNN"] = _cudnn(p, passes, dtype)
    for name, peer in gpu_torch.candidates(p).items():
        if isinstance(peer, str):
            made[name] = peer
        else:
            made[name] = lambda peer=peer: _torch(p, peer, passes, dtype)
    seconds: dict[str, list[float]] = {}
    left_out: dict[str, str] = {}
    ready: dict[str, Callable[[], float]] = {}
    for name, make in made.items():
        if isinstance(make, str):
            left_out[name] = make
            continue
        try:
            ready[name] = make()
        except Exception as problem:  # out of memory, or an option that a peer lacks
            left_out[name] = f"failed: {' '.join(str(problem).split())[:200]}"
    for _ in range(repeats):
        for name, call in ready.items():
            time.sleep(measure.PAUSE)
            seconds.setdefault(name, []).append(call())
    return {
        "problem": p.name,
        "kernel": p.kernel,
        "pass": passes,
        "seconds": seconds,
        "median": {n: statistics.median(s) for n, s in seconds.items()},
        "operations": p.operations(passes),
        "left_out": left_out,
    }


def _jax(p: Problem, function: Callable[..., Any], passes: str, dtype: str) -> Callable[[], float]:
    q, k, v, cotangent = p.arrays(jnp.dtype(dtype))

    def both(q: Any, k: Any, v: Any, cotangent: Any) -> Any:
        out, pull = jax.vjp(function, q, k, v)
        return out, pull(cotangent)

    run: Callable[..., Any] = function if passes == "forward" else both
    args = (q, k, v) if passes == "forward" else (q, k, v, cotangent)
    once = device_loop(run, 1)
    once(*args).block_until_ready()
    start = time.perf_counter()
    once(*args).block_until_ready()
    steps = _steps(time.perf_counter() - start)
    loop = device_loop(run, steps)
    loop(*args).block_until_ready()

    def call() -> float:
        start = time.perf_counter()
        loop(*args).block_until_ready()
        return (time.perf_counter() - start) / steps

    return call


def _torch(p: Problem, peer: Callable[..., Any], passes: str, dtype: str) -> Callable[[], float]:
    once = gpu_torch.timed(p, peer, passes, 1, dtype)
    return gpu_torch.timed(p, peer, passes, _steps(once()), dtype)


def _steps(seconds: float) -> int:
    if jax.devices()[0].platform != "gpu":
        return 1
    return max(1, min(MOST_STEPS, round(TARGET_SECONDS / max(seconds, 1e-6))))


def _cudnn(p: Problem, passes: str, dtype: str) -> Callable[[], Callable[[], float]] | str:
    if p.kernel == "linear":
        return "has no linear attention"
    if p.mask == "documents":
        return "takes documents as a whole boolean mask only"
    if jax.devices()[0].platform != "gpu":
        return "there is no NVIDIA GPU"
    causal = p.mask == "causal"  # a neighborhood is compared with dense attention

    def attend(q: Any, k: Any, v: Any) -> Any:
        flat = [x.reshape(p.batch, -1, p.heads, p.width) for x in (q, k, v)]
        out = jax.nn.dot_product_attention(*flat, is_causal=causal, implementation="cudnn")
        return out.reshape(q.shape)

    return lambda: _jax(p, attend, passes, dtype)


def _line(row: dict[str, Any]) -> str:
    times = ", ".join(
        f"{name} {1e3 * row['median'][name]:.3f} ms ({1e3 * min(s):.3f}-{1e3 * max(s):.3f})"
        for name, s in row["seconds"].items()
    )
    reasons = "".join(f"; {name}: {why}" for name, why in row["left_out"].items())
    return f"{row['problem']}, {row['pass']}: {times}{reasons}"


def report(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: ms (fastest-slowest), TFLOP/s on visible pairs, peer / ours; reasons."""
    names = list(dict.fromkeys(n for r in rows for n in (*r["median"], *r["left_out"])))
    lines = []
    for row in rows:
        own = [s for n, s in row["median"].items() if n.startswith("attnjax")]
        best = min(own, default=float("nan"))
        cells = [_shown(row, n, best) for n in names]
        lines.append([row["problem"], row["pass"], *cells])
    table = markdown(["problem", "pass", *names], lines)
    reasons = {(n, why): r["problem"] for r in reversed(rows) for n, why in r["left_out"].items()}
    notes = [f"- {n}: {why} (first: {where})" for (n, why), where in reversed(reasons.items())]
    head = (
        "Milliseconds of device time, median (fastest-slowest); TFLOP/s on visible pairs; for a "
        "peer its time over our best one, above 1 we are faster. cuDNN has no neighborhoods: its "
        "column is dense attention there."
    )
    return "\n\n".join([head, table, "Left out:\n\n" + "\n".join(notes) if notes else ""]).strip()


def _shown(row: dict[str, Any], name: str, best: float) -> str:
    if name not in row["median"]:
        return "-"
    seconds, middle = row["seconds"][name], row["median"][name]
    text = f"{1e3 * middle:.3f} ({1e3 * min(seconds):.3f}-{1e3 * max(seconds):.3f})"
    text += f", {row['operations'] / middle / 1e12:.1f} TFLOP/s"
    return text if name.startswith("attnjax") else f"{text}, {middle / best:.2f}x"


def _record(rows: Sequence[dict[str, Any]], device: str) -> None:
    """Notes which of our bodies agreed with the definition on every problem they were given."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        for name, result in row["checked"].items():
            body = "triton" if name == "pallas" else name
            found.setdefault((row["kernel"], body), []).append(result)
    runs = json.loads(RUNS.read_text())
    command = f"python -m benchmarks {shlex.join(sys.argv[1:])}"
    for (kernel, body), results in found.items():
        if body == "xla" or not all(r["passed"] for r in results):
            continue
        runs = [r for r in runs if (r["kernel"], r["body"], r["device"]) != (kernel, body, device)]
        run = {"kernel": kernel, "body": body, "device": device, "command": command}
        run |= {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
        runs.append(run | {"largest_error": max(r["error"] for r in results)})
    RUNS.write_text(json.dumps(runs, indent=1) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks gpu`."""
    # PyTorch needs memory too: JAX must not take it all. Read when JAX first uses the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    parser.add_argument("--only", nargs="+", help="parts of problem names (all)")
    parser.add_argument(
        "--implementations", nargs="+", default=["pallas"], help="of our functions (pallas)"
    )
    parser.add_argument("--repeats", type=int, default=10, help="timed rounds (10)")
    parser.add_argument("--smoke", action="store_true", help="tiny problems, on any machine")
    parser.add_argument("--record", action="store_true", help="note passed comparisons")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("build/benchmarks"), help="results' folder"
    )
