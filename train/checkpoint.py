"""Checkpoints with Orbax: asynchronous, restored onto any mesh; and export of the weights alone.

Beside the state every checkpoint keeps the configuration and the digest of the data. One that was
made with other settings is refused with the names of the fields that differ; one that cannot be
read is put aside with a warning and the one before it is used.
"""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from train.config import Config, from_dict
from train.state import TrainState


class TornCheckpointWarning(UserWarning):
    """A checkpoint could not be read and was put aside."""


class Checkpoints:
    """The checkpoints of one run, in `<folder>/checkpoints/<step>`."""

    def __init__(self, config: Config, data_digest: str) -> None:
        """Opens (and makes) the folder; unfinished saves in it are ignored.

        Args:
          config: the run's configuration.
          data_digest: hash of the data's files.
        """
        self.config, self.data_digest = config, data_digest
        self.folder = config.folder / "checkpoints"
        self._last_time = time.monotonic()
        self._manager = _open(self.folder, config.checkpoint.keep)

    def due(self, step: int) -> bool:
        """Whether the state after `step` steps is to be saved, by step or by minutes."""
        settings = self.config.checkpoint
        by_step = settings.every_steps > 0 and step % settings.every_steps == 0
        waited = time.monotonic() - self._last_time
        return by_step or (settings.every_minutes > 0 and waited >= 60 * settings.every_minutes)

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving; a copy is taken first, so the state may be donated at once."""
        if self._manager.latest_step() == step:
            return
        meta = {
            "config": dataclasses.asdict(self.config),
            "identity": self.config.identity(),
            "data_digest": self.data_digest,
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
            ),
        )
        self._last_time = time.monotonic()

    def restore(self, target: TrainState) -> tuple[int, TrainState] | None:
        """The newest checkpoint that can be read, as (step, state); None when there is none.

        Args:
          target: shapes, types and shardings (`train.state.abstract_state`); any mesh will do.

        Raises:
          ValueError: the checkpoint was made with another configuration or other data.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._manager.restore(
                    step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
                )["meta"]
                saved = meta["identity"], meta["data_digest"]
            except Exception as error:  # any failure to read means the same: not usable
                self._put_aside(step, error)
                continue
            self._check(step, *saved)
            try:
                args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
                return step, self._manager.restore(step, args=args)["state"]
            except Exception as error:
                self._put_aside(step, error)
        return None

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return self._manager.latest_step()

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _check(self, step: int, identity: dict[str, Any], digest: str) -> None:
        mine = json.loads(json.dumps(self.config.identity()))
        fields = sorted(set(mine) | set(identity))
        unlike = [
            f"{name} is {identity.get(name, 'absent')!r} there and {mine.get(name, 'absent')!r} "
            "here"
            for name in fields
            if identity.get(name, "absent") != mine.get(name, "absent")
        ]
        if not unlike and digest != self.data_digest:
            unlike = [
                f"the data files differ (digest {digest[:12]} there and {self.data_digest[:12]} "
                "here)"
            ]
        if unlike:
            raise ValueError(
                f"the checkpoint of step {step} in {self.folder} belongs to another configuration: "
                f"{'; '.join(unlike)}. Use the same settings to go on, or another folder (--out) "
                "to begin anew."
            )

    def _put_aside(self, step: int, error: Exception) -> None:
        torn = self.folder / str(step)
        aside = self.folder.parent / f"torn-{step}-{time.time_ns()}"
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        warnings.warn(
            f"the checkpoint of step {step} cannot be read ({reason}); it was moved to {aside} "
            "and the one before "
            "it is used.",
            TornCheckpointWarning,
            stacklevel=3,
        )
        self._manager.close()
        torn.rename(aside)
        self._manager = _open(self.folder, self.config.checkpoint.keep)


def _open(folder: Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=True, create=True
    )
    return ocp.CheckpointManager(folder, options=options, item_names=("state", "meta"))


def saved_config(folder: Path) -> Config:
    """The configuration of the run in `folder`, from its `config.json`.

    Raises:
      ValueError: `folder` is not the folder of a run.
    """
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(
            f"{folder} is not the folder of a run: {path.name} is missing; pass one such as "
            "runs/demo."
        )
    return dataclasses.replace(from_dict(Config, json.loads(path.read_text())), out=str(folder))


def export_weights(path: Path, params: dict[str, jax.Array], config: Config) -> None:
    """Writes the parameters, and the configuration as "config", to one NumPy `.npz` file."""
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in params.items()}
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        np.savez(file, config=np.asarray(json.dumps(dataclasses.asdict(config))), **arrays)
    part.replace(path)  # never a half-written file under the final name


def load_weights(path: Path) -> tuple[dict[str, np.ndarray], Config]:
    """What `export_weights` wrote: (parameters, configuration)."""
    with np.load(path) as file:
        config = from_dict(Config, json.loads(str(file["config"])))
        return {name: file[name] for name in file.files if name != "config"}, config
