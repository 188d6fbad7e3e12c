"""Interrupted runs end in the same numbers, bit for bit, and never keep a bad state."""

import json
import signal

import pytest

from tests.train.runs import change, child, losses


def test_kill_at_two_points_gives_the_uninterrupted_losses(config, tmp_path, compile_cache):
    config = change(config, steps=10, eval={"sample_bytes": 0}, checkpoint={"every_steps": 3})
    whole = change(config, out=str(tmp_path / "whole"))
    done = child(whole, compile_cache)
    assert done.returncode == 0, done.stderr
    expected = losses(whole)
    assert sorted(expected) == list(range(1, 11))

    killed = child(config, compile_cache, event="step", at=5, number=signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    first = losses(config)
    assert max(first) == 5

    killed = child(config, compile_cache, event="save", at=6, number=signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert "resumed from step 3 of 10" in killed.stdout
    # the save was still under way: no finished checkpoint of step 6
    names = {path.name for path in (config.folder / "checkpoints").iterdir()}
    assert "3" in names and "6" not in names

    done = child(config, compile_cache)
    assert done.returncode == 0, done.stderr
    assert "resumed from step 3 of 10" in done.stdout
    assert losses(config) == expected
    lines = [json.loads(x) for x in (config.folder / "metrics.jsonl").read_text().splitlines()]
    redone = [(x["step"], x["loss"]) for x in lines if x["kind"] == "step"]
    assert len(redone) > 10 and all(expected[step] == loss for step, loss in redone)

    again = child(config, compile_cache)
    assert "This run is complete: step 10 of 10" in again.stdout
    assert "--steps 20" in again.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_saves_and_leaves(config, compile_cache, number):
    config = change(config, checkpoint={"every_steps": 0}, eval={"sample_bytes": 0})
    stopped = child(config, compile_cache, event="step", at=4, number=number)
    assert stopped.returncode == 128 + number, stopped.stderr
    last = max(losses(config))
    assert last <= 4 + 3  # those in flight
    assert f"step {last} is saved" in stopped.stdout
    assert [p.name for p in (config.folder / "checkpoints").iterdir()] == [str(last)]
    assert not (config.folder / "results.json").exists()
