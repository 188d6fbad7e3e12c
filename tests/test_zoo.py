"""The zoo's harness: equal parameters, results that are kept, table and picture."""

from __future__ import annotations

import json

import pytest

from benchmarks import zoo, zoo_models, zoo_report

TINY = zoo.Plan(zoo.QUICK.recall, {"mqar": 2, "flip_flop": 2, "text": 1}, (64,), False, 1)


@pytest.mark.parametrize("mixer", zoo.default_mixers())
def test_every_mixer_has_as_many_parameters_as_softmax(mixer):
    wanted = zoo_models.parameters(zoo_models.config("softmax", 256))
    got = zoo_models.parameters(zoo_models.equal_config(mixer, 256))
    assert abs(got - wanted) <= 0.01 * wanted


@pytest.mark.slow
def test_every_measurement_is_made():
    found = {name: measure() for name, measure in zoo.measurements("window(8)", TINY).items()}
    assert {"parameters", "mqar", "flip_flop", "text", "decoding", "speed_64"} == set(found)
    assert found["decoding"]["cache_bytes_per_token"] == 0 < found["decoding"]["cache_bytes_fixed"]


def test_results_are_kept_and_shown(tmp_path, monkeypatch, capsys):
    fakes = {
        "accuracy": {"trained": 0.5, "sparse": 0.25, "loss": 1.0},
        "bits_per_byte": 3.0,
        "speed": {"forward": 1e4, "forward+backward": 4e3},
        "decoding": {
            "ms_per_token": 1.5, "cache_bytes_per_token": 0.0, "cache_bytes_fixed": 4096.0
        },
    }  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(zoo_models, name, lambda *args, value=value: value)
    monkeypatch.setattr(zoo, "QUICK", TINY)
    options = dict(quick=True, mixers=["window(8)"], fresh=False, out=tmp_path, publish=False)
    assert zoo.run(**options) == 0
    (path,) = (tmp_path / "zoo-quick").glob("*.json")
    row = json.loads(path.read_text())
    assert {"parameters", "mqar", "flip_flop", "text", "decoding", "speed_64"} < set(row)
    page = (tmp_path / "zoo.md").read_text()
    assert "| `window(8)` |" in page and "| 50.0 % |" in page and "10,000 (4,000)" in page
    assert (tmp_path / "zoo.png").read_bytes().startswith(b"\x89PNG")

    def again(*args):
        raise AssertionError("measured again")

    for name in fakes:  # nothing is left to measure
        monkeypatch.setattr(zoo_models, name, again)
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
            "plan": {"lengths": [], "steps": {}, "recall": vars(zoo.QUICK.recall)},
            "machine": {"processor": "", "cores_used": 1, "versions": {"jax": ""}},
        },
        "zoo.png",
        True,
    )
