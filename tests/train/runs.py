"""Helpers of the trainer's tests: changed configurations, and runs in child processes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from train.checkpoint import Checkpoints
from train.config import Config, from_dict, to_json
from train.log import read_metrics
from train.loop import run

ROOT = Path(__file__).resolve().parents[2]


def change(config: Config, **fields: Any) -> Config:
    """`config` with fields replaced; a dictionary replaces fields of a section."""
    new = {
        name: dataclasses.replace(getattr(config, name), **value)
        if isinstance(value, dict)
        else value
        for name, value in fields.items()
    }
    return dataclasses.replace(config, **new)


def losses(config: Config) -> dict[int, float]:
    """Logged loss of each step, as exact numbers."""
    return {step: record["loss"] for step, record in read_metrics(config.folder).items()}


def child(
    config: Config, cache: Path, *, event: str = "", at: int = 0, number: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs `config` in a process of its own with one CPU device.

    Args:
      config: the run.
      cache: folder of compiled programs.
      event: "step" or "save": when the process sends itself a signal; "": never.
      at: after this step was logged, or right after its asynchronous save was started.
      number: the signal.
    """
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
    }
    command = [
        sys.executable,
        "-m",
        "tests.train.runs",
        to_json(config),
        event,
        str(at),
        str(number),
    ]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def _main(settings: str, event: str, at: str, number: str) -> int:
    config = from_dict(Config, json.loads(settings))

    def send(step: int) -> None:
        if step != int(at):
            return
        every = config.checkpoint.every_steps
        if event == "step" and every:  # let the save before this step reach the disk
            saved = config.folder / "checkpoints" / str(step // every * every)
            while not saved.exists():
                time.sleep(0.01)
        os.kill(os.getpid(), signal.Signals(int(number)))

    if event == "save":
        save = Checkpoints.save

        def save_and_send(self: Checkpoints, step: int, state: Any) -> None:
            save(self, step, state)
            send(step)

        Checkpoints.save = save_and_send  # type: ignore[method-assign]
    return run(config, on_step=send if event == "step" else None)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
