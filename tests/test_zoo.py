"""The zoo's harness: equal parameters, results that are kept, table and picture."""

from __future__ import annotations

import json

import pytest

from benchmarks import zoo, zoo_models, zoo_report

TINY = zoo.Plan({"mqar": 2, "flip_flop": 2, "text": 1}, (64,), False, 1)


@pytest.mark.parametrize("mixer", zoo.default_mixers())
def test_every_mixer_has_as_many_parameters_as_softmax(mixer):
    wanted = zoo_models.parameters(zoo_models.config("softmax", 256))
    got = zoo_models.parameters(zoo_models.equal_config(mixer, 256))
    assert abs(got - wanted) <= 0.01 * wanted


def test_results_are_kept_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "QUICK", TINY)
    options = dict(quick=True, mixers=["window(8)"], fresh=False, out=tmp_path, publish=False)
    assert zoo.run(**options) == 0
    (path,) = (tmp_path / "zoo-quick").glob("*.json")
    row = json.loads(path.read_text())
    assert {"parameters", "mqar", "flip_flop", "text", "decoding", "speed_64"} < set(row)
    page = (tmp_path / "zoo.md").read_text()
    assert "| `window(8)` |" in page and "MQAR" in page
    assert (tmp_path / "zoo.png").read_bytes().startswith(b"\x89PNG")

    def again(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(zoo_models, "accuracy", again)  # nothing is left to measure
    monkeypatch.setattr(zoo_models, "speed", again)
    assert zoo.run(**options) == 0
    assert "window(8)" in capsys.readouterr().out


def test_a_failing_mixer_does_not_end_the_zoo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "QUICK", TINY)
    monkeypatch.setattr(zoo, "measurements", lambda mixer, plan: {"parameters": lambda: 1 / 0})
    options = dict(quick=True, mixers=["softmax"], fresh=True, out=tmp_path, publish=False)
    assert zoo.run(**options) == 1
    assert "failed: softmax" in capsys.readouterr().out


def test_a_dash_for_what_was_not_measured():
    assert "| - |" in zoo_report.page(
        [{"mixer": "softmax"}],
        {
            "plan": {"lengths": [], "steps": {}},
            "machine": {"processor": "", "cores_used": 1, "versions": {"jax": ""}},
        },
        "zoo.png",
        True,
    )
