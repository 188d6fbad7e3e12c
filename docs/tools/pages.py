"""The documentation page of one mechanism, from its record, its files and its docstrings."""

from __future__ import annotations

import pathlib
import re

from attnjax.spec import Mechanism
from docs.tools import tables

CAPTION = (
    "A small instance with random parameters; rows t are queries, columns s keys. Influence is the "
    "norm of the gradient of output t with respect to input s, relative to the largest in its row; "
    "its square root is shown."
)


def source(spec: Mechanism) -> pathlib.Path:
    """The file of a mechanism, found by its id, relative to the root of the project."""
    (file,) = (tables.ROOT / "attnjax/mechanisms").rglob(f"{spec.id}.py")
    return file.relative_to(tables.ROOT)


def folder(spec: Mechanism) -> str:
    """The folder of a mechanism, which says what it is: "softmax", "sparse", "linear", ..."""
    return source(spec).parent.name


def page(spec: Mechanism, picture: str | None) -> str:
    """Markdown of a mechanism's page.

    Args:
      spec: the record.
      picture: address of the picture, relative to the page, or None.
    """
    module = ".".join(source(spec).with_suffix("").parts)
    parts = [f"# {spec.id}", f"{tables.paper(spec)}."]
    if spec.reading:
        parts.append(
            f'!!! note "Our reading"\n    {spec.reading} Where the authors publish more, this may '
            "change."
        )
    if picture:
        parts.append(f"![What a small {spec.id} computes]({picture})\n\n{CAPTION}")
    parts += [_facts(spec), f"## Interface\n\n::: {module}"]
    return "\n\n".join(parts) + "\n"


def _facts(spec: Mechanism) -> str:
    rows = {
        "what one calls": tables.calls(spec),
        "cost in T tokens": spec.cost,
        "direction": tables.direction(spec),
        "token axes": str(spec.nd),
        "cache": spec.cache or "none",
        "packed documents": "kept apart by `segment_ids`" if spec.segment_ids else "not supported",
        "context parallelism": ", ".join(sorted(spec.context_parallel)) or "none",
        "kernel": f"`{spec.kernel}`",
        "official code": f"[{spec.code}](https://github.com/{spec.code})" if spec.code else "none",
        "source": f"`{source(spec)}`",
        "equal to official numbers": tables.golden(spec),
        "tests": _tests(spec),
    }
    for options, other in spec.reduces_to.items():
        rows[f"with `{options}`"] = f"equals `{other}`"
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| property | |", "|---|---|", *lines])


def _tests(spec: Mechanism) -> str:
    tests = tables.ROOT / "tests"
    names = [spec.id, *(obj.__name__ for obj in (spec.function, spec.module) if obj is not None)]
    pattern = re.compile(rf"\b({'|'.join(names)})\b")
    files = sorted(p for p in tests.rglob("*.py") if pattern.search(p.read_text()))
    found = [f"`{p.relative_to(tables.ROOT)}`" for p in files]
    return ", ".join(["the common properties of all mechanisms", *found])
