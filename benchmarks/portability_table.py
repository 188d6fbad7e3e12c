"""The tables of docs/support_matrix.md from the cells that `benchmarks.portability` made."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "support_matrix.md"
START, END = "<!-- portability: start -->", "<!-- portability: end -->"

Cell = dict[str, Any]


def summary(cells: Sequence[Cell]) -> str:
    """Cases down, machines across: what is known of each, in Markdown."""
    targets = list(dict.fromkeys(c["target"] for c in cells))
    names = list(dict.fromkeys(c["case"] for c in cells))
    found = {(c["case"], c["target"]): c for c in cells}
    lines = [[name, *(_word(found.get((name, t))) for t in targets)] for name in names]
    return markdown(["case", *targets], lines)


def _word(cell: Cell | None) -> str:
    if cell is None or cell["status"] == "-":
        return ""
    if cell["error"]:
        return "**fails**"
    return f"{cell['status']}, XLA" if cell["route"] == "xla" else cell["status"]


def details(cells: Sequence[Cell]) -> str:
    """One table per machine: what compiling cost and what the kernels take."""
    parts = []
    for target in dict.fromkeys(c["target"] for c in cells):
        mine = [c for c in cells if c["target"] == target and c["kernels"]]
        if not mine:
            parts.append(f"### {target}\n\nNo kernels: every case takes the XLA route.")
            continue
        gpu = any(k["registers"] is not None for c in mine for k in c["kernels"])
        header = ["case", "route", "kernels", "compile s"]
        header += ["shared KiB", "registers", "spilled bytes", "matrix instructions"] * gpu
        header += ["VMEM KiB", "SMEM KiB", "spills", "bundles"] * (not gpu)
        lines = [[*_common(c), *(_gpu(c) if gpu else _tpu(c))] for c in mine]
        parts.append(f"### {target}\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


def _common(cell: Cell) -> list[str]:
    return [
        cell["case"],
        cell["route"],
        str(len(cell["kernels"])),
        f"{cell['compile_seconds']:.1f}",
    ]


def _gpu(cell: Cell) -> list[str]:
    kinds = [" ".join(k["matrix_instructions"] or {}) for k in cell["kernels"]]
    return [
        _each(cell, "smem_bytes", 1024),
        _each(cell, "registers"),
        _each(cell, "spills"),
        ", ".join(dict.fromkeys(k for k in kinds if k)) or "none",
    ]


def _tpu(cell: Cell) -> list[str]:
    return [
        _each(cell, "vmem_bytes", 1024),
        _each(cell, "smem_bytes", 1024),
        _each(cell, "spills"),
        _each(cell, "bundles"),
    ]


def _each(cell: Cell, field: str, unit: int = 1) -> str:
    """A figure of every kernel of a program, in the order of the program."""
    values = [k[field] for k in cell["kernels"]]
    return " / ".join("?" if v is None else str(-(-v // unit)) for v in values)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write(cells: Sequence[Cell], versions: dict[str, str | None]) -> None:
    """Renews the part of the page between its two markers."""
    text = PAGE.read_text()
    before, rest = text.split(START)
    _, after = rest.split(END)
    used = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    body = f"Compiled with {used}.\n\n{summary(cells)}\n\n## Figures\n\n{details(cells)}"
    PAGE.write_text(f"{before}{START}\n{body}\n{END}{after}")
