"""Settings: checks with sentences, JSON both ways, identity of a run, the command line."""

import json
import subprocess
import sys

import pytest

from tests.train.runs import ROOT, change
from train.config import Config, Data, Mesh, Model, Optim, from_dict, show, to_json
from train.presets import PRESETS


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Model(width=30, num_heads=4), "model.width must be a multiple of model.num_heads"),
        (lambda: Model(num_heads=4, num_kv_heads=3), "num_kv_heads must divide"),
        (lambda: Data(context=1), "data.context must be at least 2"),
        (lambda: Data(holdout=1), "nothing to train on"),
        (lambda: Mesh(data=-1, fsdp=-1), "at most one -1"),
        (lambda: Mesh(context=2), "mesh.context=2"),
        (lambda: Optim(lr=0.0), "lr must be positive"),
        (lambda: Config(data=Data(batch=6), optim=Optim(accumulate=4)), "6 rows and 4 slices"),
        (lambda: Config(steps=0), "steps must be at least 1"),
    ],
)
def test_bad_settings_are_sentences(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_survive_json(name):
    config = PRESETS[name]()
    assert from_dict(Config, json.loads(to_json(config))) == config
    assert config.name == name and f"name={name!r}" in show(config)
    with pytest.raises(ValueError, match="has no field colour"):
        from_dict(Config, {"colour": 1})


def test_identity_leaves_out_what_does_not_change_numbers(config):
    free = change(config, steps=99, mesh={"data": 1}, log={"every": 1}, optim={"loss_chunk": 8})
    assert free.identity() == config.identity()
    assert change(config, optim={"lr": 0.5}).identity() != config.identity()
    assert change(config, data={"context": 32}).identity() != config.identity()


def test_help_names_commands_presets_and_fields():
    def output(*arguments: str) -> str:
        command = [sys.executable, "-m", "train", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return " ".join(done.stdout.replace("│", " ").split())

    top = output("--help")
    assert all(word in top for word in ("run", "eval", "sample", "plan", "Train a preset"))
    fields = output("run", "tiny", "--help")
    assert "--optim.lr FLOAT" in fields and "Peak learning rate" in fields
    assert "--data.context INT" in fields and "(default: 64)" in fields


def test_mistakes_on_the_command_line_end_with_a_sentence(capsys, tmp_path):
    from train.__main__ import main

    assert main(["run", "tiny", "--data.source", str(tmp_path / "no"), "--out", str(tmp_path)]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["eval", str(tmp_path)]) == 1
    assert "not the folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["run", "tiny", "--optim.lr", "-1"])
