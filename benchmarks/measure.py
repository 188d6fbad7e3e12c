"""Interleaved timing, tables, and the description of the machine in every result file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)

PAUSE = 0.02
"""Seconds between two candidates: idle threads of one library spin for a while and would cost the
next one a core."""


def interleaved(
    candidates: Mapping[Name, Callable[[], Any]], repeats: int
) -> dict[Name, list[float]]:
    """Times all candidates in turn (A B C A B C ...), so that a slow spell of the machine hits all.

    Args:
      candidates: name -> function that computes and waits for its result. Called once unmeasured.
      repeats: timed rounds.

    Returns:
      Seconds of every round, by name.
    """
    for call in candidates.values():
        call()
    seconds: dict[Name, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, call in candidates.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median(seconds: Sequence[float]) -> float:
    """The middle of the measured rounds, in seconds."""
    return statistics.median(seconds)


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores used, memory, Python and library versions."""
    versions = {}
    for package in ("attnjax", "jax", "jaxlib", "flax", "numpy", "torch"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "processor": _processor(),
        "cores_used": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain text columns: the first one to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def show(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        return "  ".join(cells).rstrip()

    return "\n".join([show(header), "  ".join("-" * w for w in widths), *map(show, rows)])


def save(
    path: pathlib.Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Writes one result file: the machine, the settings and the measured rows."""
    content = {"machine": machine(), "settings": dict(settings), "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n")
