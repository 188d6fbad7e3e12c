"""The zoo: every causal mechanism at equal parameters under one harness.

Each mechanism mixes the tokens of the same small model; the width of the MLPs makes up for the
parameters that a mixer has more or fewer. Measured are recall (MQAR), a flip-flop (also at twice
the length and with rare writes), the pass key by length, bits per byte of the standard library's
text at equal steps, tokens per second by length, bytes of cache and the time of a decoding step.

Every result is written as soon as it is there, one file per mechanism: a second call goes on where
the first was stopped, and `--fresh` forgets. Table and picture are written anew each time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
import traceback
from collections.abc import Callable
from typing import Any

from attnjax.models.registry import mixer_ids
from attnjax.tasks import MQAR, FlipFlop, Passkey
from benchmarks import zoo_models, zoo_report
from benchmarks.measure import machine

ALIASES = {"multi_head_attention", "lightning_attention_2"}
"""Ids that are other names of a mixer that runs anyway ("softmax", "lightning_attention")."""

SETTINGS = {
    "rcmha": "rcmha(encoding=sinusoid)",
    "dhsa": "dhsa(hidden=32,budget=64,local_tokens=16)",
}
"""Where a mechanism's own sizes are made for larger models: id -> item of the pattern."""

EXTRA = ("softmax", "window(32)+sink(4)", "strided(block=16,stride=4,local=2)")
"""Mixers of the pattern language without an id of their own, and the reference."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
      steps: optimizer steps of each task.
      lengths: tokens of the speed rows.
      passkey: whether the pass key is trained.
    """

    steps: dict[str, int]
    lengths: tuple[int, ...]
    passkey: bool


QUICK = Plan({"mqar": 200, "flip_flop": 100, "text": 40}, (1024,), False)
FULL = Plan(
    {"mqar": 1000, "flip_flop": 1500, "text": 1000, "passkey": 2000},
    (1024, 2048, 4096, 8192, 16384),
    True,
)


def default_mixers() -> list[str]:
    """Every causal mechanism once."""
    return [*EXTRA, *(SETTINGS.get(i, i) for i in mixer_ids() if i not in ALIASES)]


def measurements(mixer: str, plan: Plan) -> dict[str, Callable[[], Any]]:
    """What is measured of a mixer: name -> function that gives numbers."""
    mqar = MQAR(num_pairs=4, text=32, symbols=32)
    flip = FlipFlop(pairs=16)
    flips = {"trained": flip, "x2": flip.longer(2), "sparse": flip.sparse()}
    found: dict[str, Callable[[], Any]] = {
        "parameters": lambda: zoo_models.parameters(zoo_models.equal_config(mixer, 256)),
        "mqar": lambda: zoo_models.accuracy(
            mixer, mqar, {"trained": mqar, "x2": mqar.longer(2)}, plan.steps["mqar"]
        ),
        "flip_flop": lambda: zoo_models.accuracy(mixer, flip, flips, plan.steps["flip_flop"]),
        "text": lambda: zoo_models.bits_per_byte(mixer, plan.steps["text"]),
        "decoding": lambda: zoo_models.decoding(mixer),
    }
    if plan.passkey:
        key = Passkey(text=128)
        keys = {str(n): Passkey(text=n) for n in (128, 256, 512)}
        found["passkey"] = lambda: zoo_models.accuracy(mixer, key, keys, plan.steps["passkey"])
    for length in plan.lengths:
        found[f"speed_{length}"] = lambda length=length: zoo_models.speed(mixer, length)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks zoo`."""
    parser.add_argument(
        "--quick", action="store_true", help="fewer steps and lengths: 20 minutes on 2 cores"
    )
    parser.add_argument(
        "--mixers", nargs="+", metavar="MIXER",
        help="items of the pattern language; default: every causal mechanism",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("build/benchmarks"),
        help="folder for results, zoo.md and zoo.png (build/benchmarks)",
    )  # fmt: skip
    parser.add_argument(
        "--publish", action="store_true", help="also write docs/zoo.md and docs/assets/zoo.png"
    )


def run(
    quick: bool, mixers: list[str] | None, fresh: bool, out: pathlib.Path, publish: bool
) -> int:
    """Measures, prints one line per mechanism, writes table and picture; 1 when one failed."""
    plan = QUICK if quick else FULL
    folder = out / ("zoo-quick" if quick else "zoo")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = mixers or default_mixers()
    start, failed = time.monotonic(), []
    for place, mixer in enumerate(wanted, 1):
        path = folder / f"{mixer.replace('(', '_').replace(')', '').replace(',', '_')}.json"
        row = json.loads(path.read_text()) if path.exists() and not fresh else {}
        row |= {"mixer": mixer}
        began = time.monotonic()
        for name, measure in measurements(mixer, plan).items():
            if name in row:
                continue
            try:
                row[name] = measure()
            except Exception as error:  # one mechanism must not end the zoo
                row.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"
                failed.append(mixer)
                traceback.print_exc()
            path.write_text(json.dumps(row, indent=1) + "\n")
        minutes = (time.monotonic() - start) / 60
        print(
            f"{place}/{len(wanted)} {zoo_report.line(row)}  "
            f"{time.monotonic() - began:.0f} s, {minutes:.1f} min in all",
            flush=True,
        )
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    settings = {"plan": dataclasses.asdict(plan), "machine": machine()}
    targets = [(out / "zoo.md", out / "zoo.png", "zoo.png")]
    if publish:
        targets.append(
            (pathlib.Path("docs/zoo.md"), pathlib.Path("docs/assets/zoo.png"), "assets/zoo.png")
        )
    for page, picture, address in targets:
        picture.write_bytes(zoo_report.picture(rows))
        page.write_text(zoo_report.page(rows, settings, address, quick))
        print(f"written: {page}, {picture}")
    if failed:
        print(f"failed: {', '.join(sorted(set(failed)))}")
    return int(bool(failed))
