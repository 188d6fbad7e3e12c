"""The command line: `python -m train {run,eval,sample,plan}`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from train.config import Config, Mesh, show
from train.presets import PRESETS

if TYPE_CHECKING:
    Preset = Config
else:  # a type made at run time: one subcommand for every preset
    Preset = tyro.extras.subcommand_type_from_defaults(
        {name: make() for name, make in PRESETS.items()},
        {name: make.__doc__ or "" for name, make in PRESETS.items()},
        prefix_names=False,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """Train a preset, or go on with it; at the end validate, sample and draw the loss curve.

    Started again, a run resumes from its newest checkpoint; a complete one shows its results.
    Example: python -m train run demo --steps 400 --optim.lr 0.01 --out runs/longer
    """

    config: Annotated[Preset, tyro.conf.arg(name="")]
    """A preset, then flags that change it."""

    def main(self) -> int:
        """Runs it."""
        from train.loop import run

        print(show(self.config), flush=True)
        return run(self.config)


@dataclasses.dataclass(frozen=True)
class Eval:
    """Validate the newest checkpoint of a run on every held-out byte, beside zlib and xz.

    Example: python -m train eval runs/demo
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the run."""
    mesh: Mesh = Mesh()
    """The mesh to use; it may differ from that of the training."""
    rows: int | None = None
    """Rows per batch; default: as in the run."""

    def main(self) -> int:
        """Runs it."""
        from train import evals
        from train.step import make_eval_step

        parts, data, state = _restored(self.folder, self.mesh)
        batches = data.validation(self.rows or parts.config.eval.rows)
        result = evals.evaluate(make_eval_step(parts), state["params"], batches)
        result = {**(result or {}), "compressors": evals.compressors(data.held_out)}
        print(evals.report({**result, "context": parts.config.data.context}))
        return 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """Print text from the newest checkpoint of a run.

    Example: python -m train sample runs/demo --prompt "import os" --length 200
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the run."""
    prompt: str | None = None
    """Beginning of the text; default: as in the run."""
    length: int | None = None
    """Bytes to add; default: as in the run."""
    temperature: float | None = None
    """0 always takes the likeliest byte; default: as in the run."""
    seed: int = 0

    def main(self) -> int:
        """Runs it."""
        from train.sample import sample_text

        parts, _, state = _restored(self.folder, Mesh())
        print(
            sample_text(
                parts, state["params"], self.prompt, self.length, self.temperature, self.seed
            )
        )
        return 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """Print the memory and operations of a preset's step on this machine; nothing is trained.

    Example: python -m train plan stdlib_16k --data.batch 2
    """

    config: Annotated[Preset, tyro.conf.arg(name="")]
    """A preset, then flags that change it."""

    def main(self) -> int:
        """Runs it."""
        from train.plan import make_plan

        print(show(self.config), flush=True)
        print(make_plan(self.config))
        return 0


def _restored(folder: Path, mesh: Mesh) -> tuple[Any, Any, Any]:
    """Parts, data and newest state of the run in `folder`."""
    from train.checkpoint import Checkpoints, saved_config
    from train.data import ByteData
    from train.mesh import describe
    from train.state import abstract_state, prepare

    config = dataclasses.replace(saved_config(folder), mesh=mesh)
    parts, data = prepare(config), ByteData(config.data)
    checkpoints = Checkpoints(config, data.digest)
    restored = checkpoints.restore(abstract_state(parts))
    checkpoints.close()
    if restored is None:
        raise ValueError(f"{checkpoints.folder} holds no checkpoint that can be read; train first.")
    print(f"step {restored[0]} of {folder}; mesh {describe(parts.mesh)}")
    return parts, data, restored[1]


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs the command; returns the exit status."""
    command = tyro.cli(
        Annotated[Run, tyro.conf.subcommand("run")]
        | Annotated[Eval, tyro.conf.subcommand("eval")]
        | Annotated[Sample, tyro.conf.subcommand("sample")]
        | Annotated[Plan, tyro.conf.subcommand("plan")],
        prog="python -m train",
        description="Train, validate, sample and plan language models of attnjax mechanisms.",
        args=arguments,
    )
    try:
        return command.main()
    except (ValueError, ArithmeticError) as error:
        # mistakes of the user and failed runs end with a sentence, not with a traceback
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
