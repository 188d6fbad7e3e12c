"""Table and picture of the zoo."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

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
            f"![Accuracy and speed of every mixer]({picture})",
            "",
            "| " + " | ".join(header) + " |",
            "|" + "---|" * len(header),
            *("| " + " | ".join(cells) + " |" for cells in body),
            "",
            "MQAR: 4 pairs in 32 tokens, 16 values (a guess among the four values of a row is "
            "right in 25 %). Flip-flop: 16 instructions; x2 has twice as many, sparse 98 % "
            "ignored. Bits per byte: held-out tenth of a mebibyte of Python's standard library. "
            "Speed: one row, float32; in brackets forward and backward. Cache: growth per token, "
            "and what does not grow; decoding at 256 tokens. A dash: the mechanism has no "
            "step-by-step form, or the figure was not measured.",
            "",
        ]
    )


def picture(rows: list[Row]) -> bytes:
    """Recall against bits per byte, and speed by length, as a PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.5), layout="constrained")
    for row in rows:
        recall, text = row.get("mqar", {}).get("trained"), row.get("text")
        if recall is not None and text is not None:
            axes[0].plot(100 * recall, text, "o", color=_color(row), markersize=4)
            axes[0].annotate(row["mixer"], (100 * recall, text), fontsize=5, alpha=0.8)
        speeds = {
            int(name.removeprefix("speed_")): value["forward+backward"]
            for name, value in row.items()
            if name.startswith("speed_")
        }
        if speeds:
            lengths = sorted(speeds)
            axes[1].loglog(
                lengths, [speeds[n] for n in lengths], "o-", color=_color(row), markersize=3, lw=0.8
            )
            last = lengths[-1]
            axes[1].annotate(row["mixer"], (last, speeds[last]), fontsize=5, alpha=0.8)
    axes[0].set(xlabel="MQAR accuracy (%)", ylabel="bits per byte (lower is better)")
    axes[1].set(xlabel="tokens of a row", ylabel="tokens per second, forward and backward")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


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


def _color(row: Row) -> str:
    decoding = row.get("decoding") or {}
    if not decoding:
        return "tab:gray"
    return "tab:orange" if decoding["cache_bytes_per_token"] == 0 else "tab:blue"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
