"""`python -m attnjax mechanisms`: every mechanism in every format, options and golden results."""

import json

import pytest

import attnjax
from attnjax import __main__ as command_line

TABLE = attnjax.mechanisms()


def run(capsys, *arguments):
    status = command_line.main(["mechanisms", *arguments])
    return status, capsys.readouterr()


@pytest.mark.parametrize("form", command_line.FORMATS)
def test_table_has_one_row_per_mechanism(capsys, form):
    status, printed = run(capsys, "--format", form)
    assert status == 0
    if form == "json":
        assert [row["id"] for row in json.loads(printed.out)] == list(TABLE)
    else:
        first = "| `" if form == "markdown" else ""
        starts = {
            line.removeprefix(first).split()[0].strip("`")
            for line in printed.out.splitlines()
            if line
        }
        assert set(TABLE) <= starts


@pytest.mark.parametrize("name", TABLE)
def test_details(capsys, name):
    spec = TABLE[name]
    status, printed = run(capsys, name)
    assert status == 0
    text = " ".join(printed.out.split())
    for wanted in (spec.id, spec.arxiv, spec.cost, *spec.golden, *spec.reduces_to.values()):
        assert " ".join(wanted.split()) in text
    undescribed = [name for name, known in command_line.options(spec).items() if not known["text"]]
    assert len(undescribed) <= len(command_line.options(spec)) // 3, undescribed


def test_results_of_golden_cases(capsys, monkeypatch):
    result = {"worst": 2.5e-9, "tolerance": 1e-8, "arrays": 3, "dtype": "float64"}
    monkeypatch.setattr(command_line, "golden_results", lambda: {"cog_attention": result})
    _, printed = run(capsys, "cog_attention")
    assert "3 arrays (float64), largest error 2.5e-09, allowed 1e-08" in printed.out
    _, printed = run(capsys)
    row = next(line for line in printed.out.splitlines() if line.startswith("cog_attention"))
    assert "2e-09" in row or "3e-09" in row
    monkeypatch.setattr(command_line, "golden_results", lambda: {})
    _, printed = run(capsys, "cog_attention", "--format", "json")
    assert json.loads(printed.out)["golden"] == {"cog_attention": None}


def test_recorded_results_have_their_fields():
    for case, result in command_line.golden_results().items():
        assert set(result) == {"worst", "tolerance", "arrays", "dtype"}, case
        assert 0 <= result["worst"] <= result["tolerance"] and result["arrays"] > 0


def test_unknown_id_suggests_others(capsys):
    status, printed = run(capsys, "cog_attentoin")
    assert status == 2 and "did you mean cog_attention" in printed.err


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit):
        command_line.main(["--help"])
    assert "mechanisms" in capsys.readouterr().out


def test_argument_texts():
    lines = ("Does.", "", "Args:", "  query, key: shapes,", "    as annotated.", "  scale: 1 / d.")
    text = "\n".join((*lines, "", "Returns:", "  x: y"))
    want = dict.fromkeys(("query", "key"), "shapes, as annotated.") | {"scale": "1 / d."}
    assert command_line.argument_texts(text) == want
