"""The training loop: two steps in flight, saved on a stop signal, never silent about a NaN."""

from __future__ import annotations

import collections
import json
import signal
import time
from collections.abc import Callable
from typing import Any

import jax

from train import evals, sample
from train.checkpoint import Checkpoints, export_weights
from train.config import Config, to_json
from train.data import ByteData
from train.log import Log, draw_curve
from train.mesh import describe
from train.state import Parts, TrainState, abstract_state, init_state, prepare
from train.step import batch_shardings, make_eval_step, make_train_step
from train.stop import StopSignal

IN_FLIGHT = 2
"""Steps that may be queued on the device before the host waits."""
PATIENCE = 50
"""Steps in a row that `on_nan="skip"` skips before the run stops all the same."""


class NonFiniteLossError(ArithmeticError):
    """A step produced a loss, gradient or update that is not finite."""


def run(config: Config, on_step: Callable[[int], None] | None = None) -> int:
    """Trains, or goes on training, validates, and shows what came out.

    Args:
      config: the run.
      on_step: called with the number of each finished step after it was logged.

    Returns:
      Exit status: 0, or 128 + signal number when a signal stopped the run (its state is saved).

    Raises:
      NonFiniteLossError: see `Optim.on_nan`; nothing is saved after the bad step.
      ValueError: settings, data or checkpoint do not fit together.
    """
    parts = prepare(config)
    data = ByteData(config.data)
    folder = config.folder
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(config, data.digest)
    try:
        with StopSignal() as stop, Log(folder, config.log, config.steps) as log:
            log.note(f"data   {data.describe()}")
            log.note(f"mesh   {describe(parts.mesh)}")
            log.note(f"model  {parts.skeleton.count():,} parameters: {config.model.mixers}")
            first, state = _start(parts, checkpoints, log)
            (folder / "config.json").write_text(to_json(config) + "\n", encoding="utf-8")
            if first < config.steps:
                state = _steps(parts, data, checkpoints, log, stop, first, state, on_step)
            if not stop():
                result = _results(parts, data, state, log, stop)
            if stop():
                log.note(
                    f"stopped by {signal.Signals(stop.number or 0).name}; step "
                    f"{int(state['step'])} is saved."
                )
                log.note("Run the same command again to go on.")
                return 128 + (stop.number or 0)
            _finish(parts, result, first, state, log)
            return 0
    finally:
        checkpoints.close()


def _start(parts: Parts, checkpoints: Checkpoints, log: Log) -> tuple[int, TrainState]:
    config = parts.config
    if not config.checkpoint.resume and checkpoints.latest() is not None:
        raise ValueError(
            f"{checkpoints.folder} holds checkpoints, but checkpoint.resume is off; pass another "
            "folder (--out) or delete it."
        )
    restored = checkpoints.restore(abstract_state(parts))
    if restored is None:
        return 0, init_state(parts)
    first, state = restored
    if first >= config.steps:
        log.note(f"This run is complete: step {first} of {config.steps}. Its results once more:")
    else:
        log.note(f"resumed from step {first} of {config.steps}")
    return first, state


def _steps(
    parts: Parts,
    data: ByteData,
    checkpoints: Checkpoints,
    log: Log,
    stop: StopSignal,
    first: int,
    state: TrainState,
    on_step: Callable[[int], None] | None,
) -> TrainState:
    config, shardings = parts.config, batch_shardings(parts)
    pending: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
    skipped = 0

    def settle(left: int) -> None:
        """Waits until at most `left` steps are in flight; only here is the device read."""
        nonlocal skipped
        while len(pending) > left:
            step, metrics = pending.popleft()
            values = {k: v.item() for k, v in jax.device_get(metrics).items()}
            log.step(step, values)
            skipped = 0 if values["finite"] else skipped + 1
            if skipped and (config.optim.on_nan == "stop" or skipped > PATIENCE):
                raise NonFiniteLossError(
                    f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}. "
                    "Nothing was saved "
                    f"after it; the last checkpoint is of step {checkpoints.latest()}. Lower "
                    "optim.lr, lengthen "
                    "schedule.warmup, or pass --optim.on-nan skip to leave such steps out."
                )
            if skipped:
                log.note(f"step {step}: loss or update not finite, left out ({skipped} in a row)")
            if on_step is not None:
                on_step(step)

    def fetch(step: int) -> Any:
        return jax.device_put(data.batch(config.seed, step, config.data.batch), shardings)

    began = time.monotonic()
    # compiled once, ahead of the loop: any later mismatch of shapes or shardings is an error, not a
    # second compile
    train_step = make_train_step(parts).lower(state, fetch(first)).compile()
    log.note(f"compiled the step in {time.monotonic() - began:.1f} s")
    eval_step = make_eval_step(parts)
    for step in range(first + 1, config.steps + 1):
        state, metrics = train_step(state, fetch(step - 1))
        pending.append((step, metrics))
        settle(IN_FLIGHT)
        stopping = (
            stop()
        )  # asked once: a signal after this line is seen, and saved for, one step later
        if stopping or step == config.steps or checkpoints.due(step):
            settle(0)  # the losses up to here are known to be finite before anything is written
            checkpoints.save(step, state)
        if stopping:
            break
        if config.eval.every and step % config.eval.every == 0 and step < config.steps:
            settle(0)
            batches = data.validation(config.eval.rows, config.eval.batches)
            found = evals.evaluate(eval_step, state["params"], batches, stop)
            if found is not None:
                log.write({"kind": "eval", "step": step, **found})
                log.note(
                    f"step {step}: {found['bits_per_byte']:.3f} bits/byte on part of the held-out "
                    "files"
                )
            log.pause()
    return state


def _results(
    parts: Parts, data: ByteData, state: TrainState, log: Log, stop: StopSignal
) -> dict[str, Any]:
    """Final validation and sample, kept in `results.json` for a second call of a complete run."""
    config, path = parts.config, parts.config.folder / "results.json"
    step = int(state["step"])
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["step"] == step and known["data_digest"] == data.digest:
            return known
    log.note("validating on every held-out byte ...")
    rows = config.eval.rows
    found = evals.evaluate(make_eval_step(parts), state["params"], data.validation(rows), stop)
    if found is None or stop():
        return {}
    log.write({"kind": "eval", "step": step, **found})
    result = {"step": step, "data_digest": data.digest, "context": config.data.context, **found}
    result["compressors"] = evals.compressors(data.held_out)
    if config.eval.sample_bytes:
        result["sample"] = sample.sample_text(parts, state["params"])
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _finish(parts: Parts, result: dict[str, Any], first: int, state: TrainState, log: Log) -> None:
    config, folder = parts.config, parts.config.folder
    log.note(evals.report(result))
    if "sample" in result:
        log.note(f"sample after {config.eval.prompt!r}:\n{result['sample']}")
    log.note(f"checkpoint  {folder / 'checkpoints' / str(result['step'])}")
    log.note(f"curve       {draw_curve(folder)}")
    if config.checkpoint.export:
        weights = folder / "weights.npz"
        if first < config.steps or not weights.exists():
            export_weights(weights, state["params"], config)
        log.note(f"weights     {weights}")
    log.note(f"To train longer: the same command with --steps {2 * result['step']}")
