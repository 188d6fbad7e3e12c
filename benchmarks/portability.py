"""Compiles every kernel for every TPU and GPU, on a machine that needs none of them.

    python -m benchmarks portability
    python -m benchmarks portability --targets v5e H100 --cases "flash causal"
    python -m benchmarks portability --write          # renews docs/support_matrix.md

A cell fails when compiling fails, when the expected kernel is not in the program (something fell
back), when a kernel is in a program that should be plain XLA, or when a body is a default that was
neither interpreted nor run on its hardware. Each machine has its own process: compilers read their
flags once, and Mosaic GPU keeps compiled kernels without regard to the architecture.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import portability_table
from benchmarks.portability_cases import Case, cases
from pallas_kernels import aot
from pallas_kernels.machines import TARGETS, fast_memory

CHILD_LIMIT = 1800
"""Seconds that one machine may take altogether."""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def run(
    *,
    targets: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    jobs: int = 2,
    out: pathlib.Path | None = None,
    write: bool = False,
) -> int:
    """Compiles, prints the table, and returns the exit code.

    Args:
      targets: names of machines, None for all.
      only: parts of case names, None for all cases.
      jobs: machines at a time.
      out: folder for all figures, `portability.json`, or None.
      write: whether to renew the tables in docs/support_matrix.md; needs all targets and cases.

    Returns:
      0, or 1 when a cell failed.
    """
    chosen = list(targets or TARGETS)
    unknown = [t for t in chosen if t not in TARGETS]
    if unknown:
        raise SystemExit(f"portability: unknown targets {unknown}; there are {list(TARGETS)}.")
    names = [n for n in cases() if not only or any(part in n for part in only)]
    if not names:
        raise SystemExit(f"portability: no case contains any of {only}; there are {list(cases())}.")
    if write and (targets or only):
        raise SystemExit("portability: --write needs all targets and cases.")
    for target in chosen:
        missing = aot.missing_packages(target)
        if missing:
            raise SystemExit(
                f"portability: compiling for {target} needs {', '.join(missing)}; pip install "
                "'attnjax[aot]' or `make aot`, or leave the target out with --targets."
            )
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        lists = list(pool.map(lambda target: _machine(target, names), chosen))
    cells = [cell for found in lists for cell in found]
    print(f"\n{len(cells)} cells in {time.perf_counter() - start:.0f} s\n")
    print(portability_table.summary(cells))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        content = {"versions": versions(), "cells": cells}
        (out / "portability.json").write_text(json.dumps(content, indent=1) + "\n")
    if write:
        portability_table.write(cells, versions())
    bad = [cell for cell in cells if cell["error"]]
    for cell in bad:
        print(f"FAILED {cell['target']}, {cell['case']}: {cell['error']}")
    return 1 if bad else 0


def versions() -> dict[str, str | None]:
    """Versions of the compilers."""
    found: dict[str, str | None] = {}
    for package in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


_printing = threading.Lock()


def _machine(target: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Cells of one machine. A compiler that kills its process costs the cell it worked on."""
    cells: list[dict[str, Any]] = []
    left = list(names)
    deadline = time.monotonic() + CHILD_LIMIT
    while left:
        found, crash = _child(target, left, deadline - time.monotonic())
        cells += found
        left = left[len(found) :]
        if left and crash is not None:
            cells.append(_cell(left.pop(0), target, error=crash))
            _show(cells[-1])
    return cells


def _child(
    target: str, names: Sequence[str], seconds: float
) -> tuple[list[dict[str, Any]], str | None]:
    """Cells that a child process finished, and how it ended if not well."""
    command = [sys.executable, "-m", "benchmarks.portability", target, json.dumps(list(names))]
    cells = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | ENVIRONMENT
        )
        timer = threading.Timer(max(1.0, seconds), process.kill)
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):  # compilers print too
                cells.append(json.loads(line))
                _show(cells[-1])
        code = process.wait()
        timer.cancel()
        errors.seek(0)
        last = [line.strip() for line in errors.read().splitlines() if line.strip()][-3:]
    if code == 0 and len(cells) == len(names):
        return cells, None
    return cells, f"the compiler's process ended with code {code}: {' / '.join(last)}"


def _show(cell: dict[str, Any]) -> None:
    with _printing:
        text = "FAILED" if cell["error"] else cell["status"]
        print(
            f"{cell['target']:6} {cell['case']:44} {text:12} {cell['seconds']:6.1f} s", flush=True
        )


def _work(target: str, names: Sequence[str]) -> None:
    """What a child process does: one line of JSON per case."""
    with tempfile.TemporaryDirectory() as folder:
        if TARGETS[target].platform == "tpu":
            aot.write_listings(folder)
        everything = cases()
        for name in names:
            print(json.dumps(compile_case(everything[name], target)), flush=True)


def compile_case(case: Case, target: str) -> dict[str, Any]:
    """One cell of the matrix: compiles one case for one machine and judges the program."""
    machine = TARGETS[target]
    expected = case.expected(machine)
    if expected is None:
        return _cell(case.name, target, status="-")
    start = time.perf_counter()
    try:
        report = aot.compile_for(target, *_made(case, case.implementation))
        error = _fault(case, expected, report, target)
    except Exception as problem:  # any compiler's error is the cell's result
        text = " ".join(str(problem).split())
        return _cell(case.name, target, error=f"{type(problem).__name__}: {text[:600]}")
    seconds = time.perf_counter() - start
    status = status_of(case.kernel, expected, report.device_kind)
    if not error and case.implementation is None and expected != "xla" and status == "compiled":
        error = "a default kernel that was neither interpreted nor run on its hardware"
    found = report.as_dict()
    return _cell(case.name, target, error, status, seconds) | {
        "route": expected,
        "kernels": found["kernels"],
        "compile_seconds": report.compile_seconds,
        "temp_bytes": report.temp_bytes,
    }


def _made(case: Case, implementation: str | None) -> tuple[Any, ...]:
    function, args = case.make(implementation)
    return function, *args


def _fault(case: Case, expected: str, report: aot.Report, target: str) -> str:
    """Why a compiled program is not what it should be, or an empty string."""
    if expected == "xla":
        return f"unexpected kernels {report.routes}" if report.routes else ""
    if set(report.routes) == {expected} and report.routes[expected] >= case.calls:
        return _overflow(report)
    reason = "the kernel accepts it when named"
    try:
        aot.lower_for(target, *_made(case, case.implementation or "pallas"))
    except Exception as problem:
        reason = " ".join(str(problem).split())[:600]
    return f"expected {case.calls} x {expected}, found {report.routes or 'none'}: {reason}"


def _overflow(report: aot.Report) -> str:
    """Which kernel takes more memory than the machine has; GPU compilers do not check."""
    machine = TARGETS[report.target]
    memory = fast_memory(machine.platform, report.device_kind)
    for kernel in report.kernels:
        used = kernel.vmem_bytes if machine.platform == "tpu" else kernel.smem_bytes
        if memory is not None and used is not None and used > memory.tile_bytes:
            return (
                f"{kernel.name} takes {used >> 10} KiB next to the arithmetic, and {machine.name} "
                f"has {memory.tile_bytes >> 10} KiB"
            )
    return ""


_BODIES = {"mosaic_tpu": "tpu", "triton": "triton", "mosaic_gpu": "mosaic_gpu"}
_OPERATIONS = {
    "flash": "pallas_kernels.flash.attention",
    "neighborhood": "pallas_kernels.flash.attention",
    "decode": "pallas_kernels.decode.attention",
    "linear": "pallas_kernels.linear.core",
}
RUNS = pathlib.Path(__file__).with_name("hardware_runs.json")
"""Runs against the reference on real devices: kernel, body, device kind, date, command, error."""


def status_of(kernel: str, route: str, device_kind: str) -> str:
    """The best that is known of a body on a device: "run", "interpreted" or "compiled"."""
    if route == "xla":  # the same body that all tests run on CPUs
        return "run" if device_kind == "cpu" else "compiled"
    body = _BODIES[route]
    runs = json.loads(RUNS.read_text())
    keys = ("kernel", "body", "device")
    if [kernel, body, device_kind] in [[r[k] for k in keys] for r in runs]:
        return "run"
    from pallas_kernels.dispatch import Operation

    module = importlib.import_module(_OPERATIONS[kernel])
    operations = [x for x in vars(module).values() if isinstance(x, Operation)]
    bodies = [op.kernels[body] for op in operations if body in op.kernels]
    if bodies and all(b.interpreted_by is not None for b in bodies):
        return "interpreted"
    return "compiled"


def _cell(
    case: str, target: str, error: str = "", status: str = "compiled", seconds: float = 0.0
) -> dict[str, Any]:
    return {
        "case": case,
        "target": target,
        "error": error,
        "status": status,
        "seconds": seconds,
        "route": None,
        "kernels": [],
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks portability`."""
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), help="machines (all)")
    parser.add_argument("--cases", nargs="+", dest="only", help="parts of case names (all)")
    parser.add_argument("--jobs", type=int, default=2, help="machines at a time (2)")
    parser.add_argument("--out", type=pathlib.Path, help="folder for portability.json (none)")
    parser.add_argument("--write", action="store_true", help="renew docs/support_matrix.md")


if __name__ == "__main__":
    _work(sys.argv[1], json.loads(sys.argv[2]))
