"""Table and picture of the zoo."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter  # noqa: E402

Row = dict[str, Any]


def line(row: Row) -> str:
    """A mechanism's results in one line, for the terminal."""
    mqar, flip = row.get("mqar", {}), row.get("flip_flop", {})
    return (
        f"{row['mixer']:<36} mqar {_share(mqar.get('trained'))}  "
        f"flip-flop {_share(flip.get('trained'))}  {_number(row.get('text'), '.2f')} bits/byte"
    )


def page(rows: list[Row], settings: dict[str, Any], picture: str, quick: bool) -> str:
    """The Markdown page: what was done, the picture, the table."""
    plan, machine = settings["plan"], settings["machine"]
    recall = plan["recall"]
    lengths = [n for n in plan["lengths"] if any(f"speed_{n}" in row for row in rows)]
    passkey = any("passkey" in row for row in rows)
    header = ["mixer", "parameters", "MQAR", "MQAR x2", "flip-flop", "x2", "sparse"]
    header += ["pass key 128 / 256 / 512"] if passkey else []
    header += ["bits/byte", *(f"tokens/s {n}, forward (both)" for n in lengths)]
    header += ["cache bytes per token (fixed)", "ms/token"]
    body = [_cells(row, lengths, passkey) for row in sorted(rows, key=_rank)]
    steps = ", ".join(f"{name} {count}" for name, count in plan["steps"].items())
    kind = "quick form: too few steps to rank mechanisms by accuracy" if quick else "full form"
    command = "python -m benchmarks zoo" + (" --quick" if quick else "")
    cores = f"{machine['cores_used']} cores"
    if plan.get("jobs", 1) > 1:
        cores += f" shared out among {plan['jobs']} mixers at a time"
    return "\n".join(
        [
            "# The zoo",
            "",
            f"Every causal mechanism as the mixer of the same small model ({kind}). "
            "The MLP's width makes up for the parameters that a mixer has more or fewer.",
            "",
            f"`{command}` on {machine['processor']}, {cores}, jax "
            f"{machine['versions']['jax']}. Optimizer steps: {steps}.",
            "",
            f"![What was measured of every mixer, best bits per byte first]({picture})",
            "",
            "| " + " | ".join(header) + " |",
            "|" + "---|" * len(header),
            *("| " + " | ".join(cells) + " |" for cells in body),
            "",
            f"MQAR: {recall['num_pairs']} pairs in {recall['text']} tokens, "
            f"{recall['symbols'] // 2} values (a guess among the values of a row is right in "
            f"{100 / recall['num_pairs']:.0f} %). Flip-flop: 16 instructions; x2 has twice as "
            "many, sparse 98 % ignored. Bits per byte: held-out tenth of a mebibyte of Python's "
            "standard library. Speed: one row, float32; in brackets forward and backward. Cache: "
            "growth per token, and what does not grow; decoding at 256 tokens. A dash: the "
            "mechanism has no step-by-step form, or the figure was not measured. Masks and "
            "buckets that are wider than these texts leave softmax attention as it is, and so "
            "its figures.",
            "",
        ]
    )


def picture(rows: list[Row]) -> bytes:
    """One line per mixer, best bits per byte first, one column per measurement, as a PNG."""
    rows = sorted(rows, key=lambda row: row.get("text") or float("inf"), reverse=True)
    columns: list[tuple[str, bool, dict[str, list[float | None]]]] = []

    def column(title: str, log: bool, **series: Callable[[Row], float | None]) -> None:
        found = {label: [value(row) for row in rows] for label, value in series.items()}
        found = {label: values for label, values in found.items() if any(values)}
        if found:
            columns.append((title, log, found))

    def share(task: str, test: str) -> Callable[[Row], float | None]:
        value = _at(task, test)
        return lambda row: None if value(row) is None else 100 * (value(row) or 0.0)

    lengths = sorted({int(k.removeprefix("speed_")) for row in rows for k in row if "speed_" in k})
    column("bits per byte", False, trained=lambda row: row.get("text"))
    column("MQAR, %", False, **{"trained": share("mqar", "trained"), "x2": share("mqar", "x2")})
    flips = {test: share("flip_flop", test) for test in ("trained", "x2", "sparse")}
    column("flip-flop, %", False, **flips)
    column("pass key, %", False, **{n: share("passkey", n) for n in ("128", "256", "512")})
    speeds = {f"{n} tokens": _at(f"speed_{n}", "forward+backward") for n in lengths}
    column("tokens/s, training", True, **speeds)
    column("decoding, ms/token", True, step=_at("decoding", "ms_per_token"))
    column("cache, bytes/token", False, growth=_at("decoding", "cache_bytes_per_token"))
    height = 1.2 + 0.17 * len(rows)
    figure, axes = plt.subplots(
        1, max(len(columns), 1), figsize=(3 + 2.1 * len(columns), height), sharey=True,
        layout="constrained", squeeze=False,
    )  # fmt: skip
    places = list(range(len(rows)))
    for axis, (title, log, series) in zip(axes[0], columns, strict=False):
        shades = plt.get_cmap("viridis")
        for number, (label, values) in enumerate(series.items()):
            shown = [(v, y) for v, y in zip(values, places, strict=True) if v is not None]
            color = shades(0.85 * number / max(len(series) - 1, 1))
            axis.plot(*zip(*shown, strict=True), "o", color=color, markersize=3.5, label=label)
        axis.set_title(title, fontsize=9)
        axis.set_xscale("log" if log else "linear")
        if log:
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, lw=0.5)
        axis.tick_params(labelsize=7)
        if len(series) > 1:
            axis.legend(
                fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.04), ncols=3, frameon=False
            )
    axes[0, 0].set_yticks(places, [row["mixer"] for row in rows], fontsize=7)
    axes[0, 0].set_ylim(-0.7, len(rows) - 0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _at(name: str, key: str) -> Callable[[Row], float | None]:
    """Reads one figure of a row; None where it was not measured."""
    return lambda row: (row.get(name) or {}).get(key)


def _cells(row: Row, lengths: list[int], passkey: bool) -> list[str]:
    mqar, flip, decoding = (row.get(name) or {} for name in ("mqar", "flip_flop", "decoding"))
    cells = [f"`{row['mixer']}`", f"{row.get('parameters', 0):,}"]
    cells += [_share(mqar.get(name)) for name in ("trained", "x2")]
    cells += [_share(flip.get(name)) for name in ("trained", "x2", "sparse")]
    if passkey:
        found = row.get("passkey") or {}
        cells.append(" / ".join(_share(found.get(n)) for n in ("128", "256", "512")))
    cells.append(_number(row.get("text"), ".2f"))
    for length in lengths:
        speed = row.get(f"speed_{length}") or {}
        both = [_number(speed.get(name), ",.0f") for name in ("forward", "forward+backward")]
        cells.append(f"{both[0]} ({both[1]})")
    per_token = _number(decoding.get("cache_bytes_per_token"), ",.0f")
    cells.append(f"{per_token} ({_number(decoding.get('cache_bytes_fixed'), ',.0f')})")
    return [*cells, _number(decoding.get("ms_per_token"), ".2f")]


def _rank(row: Row) -> tuple[float, float]:
    return (-(row.get("mqar") or {}).get("trained", 0.0), row.get("text") or 99.0)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
