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
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax

from attnjax.models.registry import mixer_ids
from attnjax.tasks import MQAR, FlipFlop, Passkey
from benchmarks import zoo_models, zoo_report
from benchmarks.measure import machine

ALIASES = {"multi_head_attention", "lightning_attention_2"}
"""Ids that are other names of a mixer that runs anyway ("softmax", "lightning_attention")."""

SETTINGS = {
    "miras": "miras(memory=matrix)",
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
      recall: the recall task.
      steps: optimizer steps of each task.
      lengths: tokens of the speed rows.
      full: whether the pass key is trained, and recall and flip-flop are also asked at twice the
        length.
      jobs: processes, a core each, that share out the mixers.
    """

    recall: MQAR
    steps: dict[str, int]
    lengths: tuple[int, ...]
    full: bool
    jobs: int


QUICK = Plan(
    MQAR(num_pairs=3, text=20, symbols=16),
    {"mqar": 250, "flip_flop": 100, "text": 40},
    (1024,),
    False,
    2,
)
FULL = Plan(
    MQAR(num_pairs=4, text=32, symbols=32),
    {"mqar": 1000, "flip_flop": 1500, "text": 1000, "passkey": 2000},
    (1024, 2048, 4096, 8192, 16384),
    True,
    1,
)


def default_mixers() -> list[str]:
    """Every causal mechanism once."""
    return [*EXTRA, *(SETTINGS.get(i, i) for i in mixer_ids() if i not in ALIASES)]


def measurements(mixer: str, plan: Plan) -> dict[str, Callable[[], Any]]:
    """What is measured of a mixer: name -> function that gives numbers."""
    mqar, flip = plan.recall, FlipFlop(pairs=16)
    recall, flips = {"trained": mqar}, {"trained": flip, "sparse": flip.sparse()}
    if plan.full:
        recall |= {"x2": mqar.longer(2)}
        flips |= {"x2": flip.longer(2)}
    found: dict[str, Callable[[], Any]] = {
        "parameters": lambda: zoo_models.parameters(zoo_models.equal_config(mixer, 256)),
        "mqar": lambda: zoo_models.accuracy(mixer, mqar, recall, plan.steps["mqar"]),
        "flip_flop": lambda: zoo_models.accuracy(mixer, flip, flips, plan.steps["flip_flop"]),
        "text": lambda: zoo_models.bits_per_byte(mixer, plan.steps["text"]),
        "decoding": lambda: zoo_models.decoding(mixer),
    }
    if plan.full:
        key = Passkey(text=128)
        keys = {str(n): Passkey(text=n) for n in (128, 256, 512)}
        found["passkey"] = lambda: zoo_models.accuracy(mixer, key, keys, plan.steps["passkey"])
    for length in plan.lengths:
        found[f"speed_{length}"] = lambda length=length: zoo_models.speed(mixer, length)
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks zoo`."""
    parser.add_argument("--quick", action="store_true", help="fewer steps and lengths")
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
        "--jobs", type=int, metavar="N",
        help="processes, a core each; default: 1, with --quick 2",
    )  # fmt: skip
    parser.add_argument("--claims", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--publish", action="store_true", help="also write docs/zoo.md and docs/assets/zoo.png"
    )


def run(
    quick: bool,
    mixers: list[str] | None,
    fresh: bool,
    out: pathlib.Path,
    publish: bool,
    jobs: int | None = None,
    claims: pathlib.Path | None = None,
) -> int:
    """Measures, prints one line per mechanism, writes table and picture; 1 when one failed.

    Args:
      quick: the short plan.
      mixers: items of the pattern language; None is every causal mechanism.
      fresh: measure again what is there already.
      out: folder of results, table and picture.
      publish: write table and picture into the documentation too.
      jobs: processes; None is the plan's own number.
      claims: where the processes of one call mark what they have begun; None for the call itself.
    """
    plan = QUICK if quick else FULL
    plan = dataclasses.replace(plan, jobs=jobs or plan.jobs)
    folder = out / ("zoo-quick" if quick else "zoo")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = mixers or default_mixers()
    if claims is not None:
        return _measure(wanted, plan, fresh, folder, claims)
    if plan.jobs > 1:
        status = _share_out(wanted, plan.jobs, quick, fresh, out)
    else:
        status = _measure(wanted, plan, fresh, folder)
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
    return status


def _measure(
    wanted: list[str],
    plan: Plan,
    fresh: bool,
    folder: pathlib.Path,
    claims: pathlib.Path | None = None,
) -> int:
    """Measures what is not there yet and nobody else has begun; 1 when a measurement failed."""
    start, failed = time.monotonic(), []
    for place, mixer in enumerate(wanted, 1):
        name = re.sub("[^a-z0-9_]+", "-", mixer).strip("-")
        if claims is not None:
            try:
                (claims / name).touch(exist_ok=False)
            except FileExistsError:
                continue
        path = folder / f"{name}.json"
        row = json.loads(path.read_text()) if path.exists() and not fresh else {}
        row |= {"mixer": mixer}
        row.pop("errors", None)  # what failed is tried again
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
        jax.clear_caches()  # programs of one mixer are of no use to the next
    if failed:
        print(f"failed: {', '.join(sorted(set(failed)))}", flush=True)
    return int(bool(failed))


def _share_out(wanted: list[str], jobs: int, quick: bool, fresh: bool, out: pathlib.Path) -> int:
    """Runs one process per job, where possible on its own core; each takes the next free mixer."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
    with tempfile.TemporaryDirectory() as claims:
        command = [sys.executable, "-m", "benchmarks", "zoo", "--claims", claims]
        command += ["--out", str(out), "--mixers", *wanted]
        command += [flag for flag, on in (("--quick", quick), ("--fresh", fresh)) if on]
        started = []
        for job in range(min(jobs, len(wanted))):
            process = subprocess.Popen(command)
            if cores:
                os.sched_setaffinity(process.pid, {cores[job % len(cores)]})
            started.append(process)
        return max(process.wait() for process in started)
