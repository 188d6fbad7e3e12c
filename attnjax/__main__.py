"""Command line of the library: `python -m attnjax mechanisms [ID]` shows what there is."""

from __future__ import annotations

import argparse
import difflib
import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from attnjax.spec import Mechanism, golden_results, mechanisms

FORMATS = ("text", "markdown", "json")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and prints; the exit status is 0, or 2 for an unknown id."""
    args = _parser().parse_args(arguments)
    table, results = mechanisms(), golden_results()
    if args.id is None:
        specs = list(table.values())
        if args.format == "json":
            print(json.dumps([_record(spec, results) for spec in specs], indent=2))
        else:
            print((_markdown if args.format == "markdown" else _text)(specs, results))
        return 0
    if args.id not in table:
        near = difflib.get_close_matches(args.id, table, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "without ID, all are listed."
        print(f"attnjax mechanisms: no mechanism has the id {args.id!r}; {hint}", file=sys.stderr)
        return 2
    spec = table[args.id]
    if args.format == "json":
        print(json.dumps(_record(spec, results) | {"options": options(spec)}, indent=2))
    else:
        print(_detail(spec, results, markdown=args.format == "markdown"))
    return 0


def options(spec: Mechanism) -> dict[str, dict[str, str]]:
    """Options of a mechanism's constructor, or arguments of its function.

    Args:
      spec: the mechanism.

    Returns:
      name -> {"default", "text"}, the text as its docstring gives it; the class's own options come
      before those that it inherits. "required" where there is no default.
    """
    found: dict[str, dict[str, str]] = {}
    owners: list[tuple[Any, Any]] = [(spec.function, spec.function)]
    if spec.module is not None:
        owners = [(c, vars(c)["__init__"]) for c in spec.module.__mro__ if "__init__" in vars(c)]
    for owner, call in owners:
        if not (getattr(owner, "__module__", "") or "").startswith("attnjax"):
            break
        parameters = inspect.signature(call).parameters
        texts = argument_texts(inspect.getdoc(owner) or "")
        for name, parameter in parameters.items():
            if name == "self" or parameter.kind in (
                parameter.VAR_KEYWORD,
                parameter.VAR_POSITIONAL,
            ):
                continue
            known = found.setdefault(name, {"default": _default(parameter.default), "text": ""})
            known["text"] = known["text"] or texts.get(name, "")
        for name, text in texts.items():  # a class may describe what it only passes on
            if name in found and not found[name]["text"]:
                found[name]["text"] = text
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            break
    return found


def argument_texts(docstring: str) -> dict[str, str]:
    """What the section "Args:" of a docstring says of each argument."""
    lines = docstring.splitlines()
    if "Args:" not in [line.strip() for line in lines]:
        return {}
    start = next(i for i, line in enumerate(lines) if line.strip() == "Args:")
    outer = len(lines[start]) - len(lines[start].lstrip())
    found: dict[str, str] = {}
    names: list[str] = []
    inner = None
    for line in lines[start + 1 :]:
        depth = len(line) - len(line.lstrip())
        if line.strip() and depth <= outer:
            break
        inner = depth if inner is None else inner
        if line.strip() and depth == inner and ":" in line:
            head, _, text = line.strip().partition(":")
            names = [name.strip().lstrip("*") for name in head.split(",")]
            found |= dict.fromkeys(names, text.strip())
        else:
            found |= {name: f"{found[name]} {line.strip()}".strip() for name in names}
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m attnjax", description="Attention mechanisms for JAX: what there is."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    table = commands.add_parser(
        "mechanisms",
        help="the table of all mechanisms, or one of them in detail",
        description="Lists all mechanisms, one row each, with what they support and how exactly "
        "they agree with the official implementations (the golden cases of tests/golden). With an "
        "ID, shows one of them: what it does, its options, what it reduces to.",
        epilog="examples: python -m attnjax mechanisms | python -m attnjax mechanisms cog_attention"
        " | python -m attnjax mechanisms --format markdown",
    )
    table.add_argument("id", nargs="?", metavar="ID", help="show this mechanism in detail")
    table.add_argument(
        "--format", choices=FORMATS, default="text", help="of the output (default: %(default)s)"
    )
    return parser


def _directions(spec: Mechanism) -> str:
    names = {"causal": spec.causal, "bidirectional": spec.bidirectional}
    return ", ".join(name for name, has in names.items() if has)


def _golden(spec: Mechanism, results: Mapping[str, Any]) -> str:
    """The golden cases of a mechanism in a word: the largest error, or what is missing."""
    if not spec.golden:
        return "-"
    known = [results[case]["worst"] for case in spec.golden if case in results]
    if len(known) < len(spec.golden):
        return f"{len(known)} of {len(spec.golden)} recorded"
    return "exact" if max(known) == 0 else f"{max(known):.0e}"


def _result(case: str, results: Mapping[str, Any]) -> str:
    """One golden case in a sentence."""
    if case not in results:
        return f"{case}: not recorded"
    found = results[case]
    return (
        f"{case}: {found['arrays']} arrays ({found['dtype']}), largest error {found['worst']:.1e}, "
        f"allowed {found['tolerance']:.0e}"
    )


def _rows(specs: Sequence[Mechanism], results: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "id": spec.id,
            "year": str(spec.year),
            "arXiv": spec.arxiv or "-",
            "kind": spec.kind,
            "directions": _directions(spec),
            "cache": spec.cache or "-",
            "segments": "yes" if spec.segment_ids else "-",
            "golden": _golden(spec, results),
            "cost": spec.cost,
            "title": spec.title,
        }
        for spec in specs
    ]


def _text(specs: Sequence[Mechanism], results: Mapping[str, Any]) -> str:
    """The table in columns, as wide as the terminal."""
    rows = _rows(specs, results)
    names = [name for name in rows[0] if name != "cost"]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    columns = shutil.get_terminal_size((160, 24)).columns if sys.stdout.isatty() else 10_000
    lines = ["  ".join(name.ljust(widths[name]) for name in names).rstrip()]
    lines += ["  ".join("-" * widths[name] for name in names[:-1]) + "  -----"]
    for row in rows:
        line = "  ".join(row[name].ljust(widths[name]) for name in names).rstrip()
        lines.append(line if len(line) <= columns else line[: columns - 3] + "...")
    checked = sum(bool(spec.golden) for spec in specs)
    lines += [
        "",
        f"{len(specs)} mechanisms, {checked} with golden cases: results of official "
        "implementations; the column shows the largest error relative to the largest entry.",
        "More on one of them: python -m attnjax mechanisms ID",
    ]
    return "\n".join(lines)


def _markdown(specs: Sequence[Mechanism], results: Mapping[str, Any]) -> str:
    """The table in Markdown, with links to the papers."""
    rows = _rows(specs, results)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    for spec, row in zip(specs, rows, strict=True):
        link = f"[{spec.arxiv}](https://arxiv.org/abs/{spec.arxiv})" if spec.arxiv else "-"
        cells = row | {"id": f"`{spec.id}`", "arXiv": link}
        lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells.values()) + " |")
    return "\n".join(lines)


def _record(spec: Mechanism, results: Mapping[str, Any]) -> dict[str, Any]:
    """A mechanism as data."""
    names = ("id", "title", "arxiv", "year", "code", "kind", "causal", "bidirectional", "nd")
    names += ("cache", "segment_ids", "kernel", "cost", "reading")
    return {name: getattr(spec, name) for name in names} | {
        "context_parallel": sorted(spec.context_parallel),
        "reduces_to": dict(spec.reduces_to),
        "function": _name(spec.function),
        "module": _name(spec.module),
        "golden": {case: results.get(case) for case in spec.golden},
    }


def _detail(spec: Mechanism, results: Mapping[str, Any], *, markdown: bool) -> str:
    """One mechanism on a page."""
    home = inspect.getmodule(spec.module or spec.function)
    summary, _, rest = (inspect.getdoc(home) or "").partition("\n\n")
    # the formula follows the summary as an indented block
    formula = rest.partition("\n\n")[0] if rest.startswith(" ") else ""
    facts = {
        "paper": spec.title + (f", arXiv:{spec.arxiv}" if spec.arxiv else "") + f", {spec.year}",
        "code": spec.code or "no official code",
        "function": _name(spec.function) or "-",
        "module": _name(spec.module) or "-",
        "directions": _directions(spec),
        "cache": spec.cache or "none, it does not decode step by step",
        "packed documents": "kept apart by segment_ids" if spec.segment_ids else "not supported",
        "context parallel": ", ".join(sorted(spec.context_parallel)) or "not supported",
        "kernel": spec.kernel,
        "cost": spec.cost,
    }
    parts = {
        "reduces to": [f"{given} -> {name}" for given, name in spec.reduces_to.items()],
        "golden cases": [_result(case, results) for case in spec.golden],
        "our reading": [spec.reading] if spec.reading else [],
        ("constructor" if spec.module is not None else "arguments"): [
            f"{name} = {known['default']}" + (f": {known['text']}" if known["text"] else "")
            for name, known in options(spec).items()
        ],
    }
    bold = "**{}**" if markdown else "{}"
    lines = [f"{'## ' if markdown else ''}{spec.id}", "", " ".join(summary.split()), ""]
    if formula:
        block = textwrap.dedent(formula)
        lines += [f"```\n{block}\n```" if markdown else textwrap.indent(block, "    "), ""]
    lines += [
        f"{'- ' if markdown else ''}{bold.format(name)}: {text}" for name, text in facts.items()
    ]
    for title, entries in parts.items():
        if entries:
            lines += ["", f"{bold.format(title)}:"] + ([""] if markdown else [])
            lines += [
                textwrap.fill(f"- {entry}", 100, initial_indent="", subsequent_indent="    ")
                for entry in entries
            ]
    return "\n".join(lines)


def _name(thing: Any) -> str | None:
    """Dotted name of a function or class."""
    return None if thing is None else f"{thing.__module__}.{thing.__qualname__}"


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return getattr(value, "__name__", None) or repr(value)


if __name__ == "__main__":
    sys.exit(main())
