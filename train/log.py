"""What a run writes and shows: one JSON line per step, a live console, and the loss curve."""

from __future__ import annotations

import collections
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from train.config import Log as LogConfig

NATS_PER_BIT = math.log(2.0)
_WINDOW = 20  # steps over which the speed is averaged


class Log:
    """Metrics file and console of one run; a context manager.

    `metrics.jsonl` is only appended to. After a resume a step may appear again; the later line
    counts (`read_metrics`).
    """

    def __init__(self, folder: Path, config: LogConfig, steps: int) -> None:
        """Opens the metrics file.

        Args:
          folder: the run's folder.
          config: console style and interval.
          steps: the run's total, for the progress bar and the time left.
        """
        self._config, self._steps = config, steps
        self._times: collections.deque[tuple[float, float]] = collections.deque(maxlen=_WINDOW + 1)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a", encoding="utf-8")
        if broken:  # a killed process may have left half a line
            self._file.write("\n")
        self.console = Console(quiet=config.console == "quiet", highlight=False, soft_wrap=True)
        live = config.console == "live" or (config.console == "auto" and sys.stdout.isatty())
        self._progress: Progress | None = None
        if live:
            self._progress = Progress(
                TextColumn("[bold]step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task(
                "train", total=steps, numbers="compiling the step ..."
            )

    def __enter__(self) -> Log:
        """Starts the live display."""
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops the display and closes the file."""
        if self._progress is not None:
            self._progress.stop()
        self._file.close()

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes the metrics of one step (nats per token become bits per byte) and shows them."""
        now = time.monotonic()
        self._times.append((now, metrics["tokens"]))
        speed, left = self._speed(step)
        bits = metrics["loss"] / NATS_PER_BIT
        record = {
            "kind": "step",
            "step": step,
            **metrics,
            "bits_per_byte": bits,
            "tokens_per_s": speed,
        }
        self.write({**record, "time": time.time()})
        numbers = f"loss {metrics['loss']:.4f}  {bits:.3f} bits/byte"
        if speed is not None:
            numbers += f"  {speed:,.0f} tokens/s  {_clock(left)} left"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=numbers)
        elif step % self._config.every == 0 or step in (1, self._steps):
            self.note(f"step {step}/{self._steps}  {numbers}")

    def write(self, record: dict[str, Any]) -> None:
        """Appends one JSON line; numbers that are not finite become null."""
        # JSON knows no NaN
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self._file.write(json.dumps(plain) + "\n")
        self._file.flush()

    def note(self, text: str) -> None:
        """Shows a line of text, above the progress bar if there is one."""
        self.console.print(text, markup=False)
        self.console.file.flush()

    def pause(self) -> None:
        """Forgets the last step's time, so that a validation does not count as slow training."""
        self._times.clear()

    def _speed(self, step: int) -> tuple[float | None, float]:
        if len(self._times) < 2:
            return None, 0.0
        seconds = self._times[-1][0] - self._times[0][0]
        tokens = sum(n for _, n in list(self._times)[1:])
        return tokens / seconds, (self._steps - step) * seconds / (len(self._times) - 1)


def read_metrics(folder: Path, kind: str = "step") -> dict[int, dict[str, Any]]:
    """The last complete record of each step, by step."""
    records: dict[int, dict[str, Any]] = {}
    path = folder / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # half a line of a killed process
            continue
        if record["kind"] == kind:
            records[record["step"]] = record
    return dict(sorted(records.items()))


def draw_curve(folder: Path) -> Path:
    """Draws training and validation bits per byte over the steps to `loss.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train, held_out = read_metrics(folder), read_metrics(folder, "eval")
    axes.plot(
        list(train),
        [r["bits_per_byte"] or math.nan for r in train.values()],
        lw=0.8,
        label="training batches",
    )
    if held_out:
        bits = [r["bits_per_byte"] for r in held_out.values()]
        axes.plot(list(held_out), bits, "o-", ms=4, label="held-out files")
    axes.set(xlabel="step", ylabel="bits per byte", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
