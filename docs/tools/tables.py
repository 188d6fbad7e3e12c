"""Text generated from the table of mechanisms, for the README and the documentation."""

from __future__ import annotations

import pathlib

import attnjax as aj
from attnjax.spec import Mechanism, golden_results

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


def between(text: str, name: str) -> str:
    """The part of a text between `<!-- name -->` and `<!-- /name -->`."""
    head, tail = around(text, name)
    return text[len(head) : len(text) - len(tail)]


def around(text: str, name: str) -> tuple[str, str]:
    """What stands before and after that part, the markers included."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the text must hold {start.strip()} ... {end} once.")
    return text[: text.index(start) + len(start)], text[text.index(end) :]


def mechanism_table(link: str = "") -> str:
    """A Markdown table with one row per mechanism.

    Args:
      link: pattern of a link with `{id}` in it, or "" for none.
    """
    lines = [
        "| id | module or function | direction | cache | documents | cost | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for spec in aj.mechanisms().values():
        name = f"[`{spec.id}`]({link.format(id=spec.id)})" if link else f"`{spec.id}`"
        documents = "yes" if spec.segment_ids else "-"
        called = calls(spec).split(", ")[-1]  # the module where there is one
        cells = [name, called, direction(spec), spec.cache or "-", documents, spec.cost]
        lines.append("| " + " | ".join([*cells, paper(spec)]) + " |")
    return "\n".join(lines) + "\n"


def golden(spec: Mechanism) -> str:
    """Golden cases of a mechanism with the largest recorded error, as text."""
    if not spec.golden:
        return "no golden case: reductions and an independent reference in the tests"
    results = golden_results()
    shown = []
    for case in spec.golden:
        found = results.get(case)
        error = f" {found['worst']:.0e} ({found['dtype']})" if found else ""
        shown.append(f"`{case}`{error}")
    return ", ".join(shown)


def calls(spec: Mechanism) -> str:
    """Function and module of a mechanism, as code."""
    found = [obj.__name__ for obj in (spec.function, spec.module) if obj is not None]
    return ", ".join(f"`{name}`" for name in found) or "-"


def direction(spec: Mechanism) -> str:
    """Which directions of attention a mechanism supports, in a word."""
    if spec.causal and spec.bidirectional:
        return "both"
    return "causal" if spec.causal else "bidirectional"


def paper(spec: Mechanism) -> str:
    """Title and year, linked to arXiv where the work is there."""
    title = spec.title.replace("|", "\\|")
    linked = f"[{title}](https://arxiv.org/abs/{spec.arxiv})" if spec.arxiv else title
    return f"{linked}, {spec.year}"
