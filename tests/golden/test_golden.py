"""Results of official implementations: files `<case>_<letter>.npz`, an adapter `<case>.py` each.

The files in `data/` are used, or those in $GOLDEN_DIR. An adapter reads every size and option from
the file, so the same test runs on other files of its case. A key that the adapter does not use
fails the test unless the adapter lists it in UNUSED = {name: why}. With ATTNJAX_RECORD_GOLDEN=1 the
largest errors are recorded, see `tests/golden/record.py`.
"""

import importlib
import os
import pathlib

import pytest

import attnjax
from tests.golden import record
from tests.golden.compare import GoldenFile

HERE = pathlib.Path(__file__).parent
FOLDER = pathlib.Path(os.environ.get("GOLDEN_DIR", HERE / "data"))
ADAPTERS = {p.stem for p in HERE.glob("*.py")} - {"__init__", "compare", "record", "test_golden"}
FILES = sorted(FOLDER.glob("*.npz"))


def case_of(path):
    return path.stem.rpartition("_")[0]


def test_the_folder_holds_cases():
    assert any(case_of(path) in ADAPTERS for path in FILES), (
        f"no golden case with an adapter in {FOLDER}; set GOLDEN_DIR to a folder of "
        "<case>_<letter>.npz"
    )


def test_every_adapter_has_data():
    if FOLDER == HERE / "data":
        assert {case_of(path) for path in FILES} == ADAPTERS


def test_every_case_of_a_mechanism_has_an_adapter():
    named = {case for spec in attnjax.mechanisms().values() for case in spec.golden}
    assert named == ADAPTERS


def test_results_of_files_are_joined_by_case():
    parts = {
        "one_a": {"worst": 1e-9, "tolerance": 1e-8, "arrays": 2, "dtype": "float64"},
        "one_b": {"worst": 2e-6, "tolerance": 1e-5, "arrays": 3, "dtype": "float32"},
    }
    want = {"worst": 2e-6, "tolerance": 1e-5, "arrays": 5, "dtype": "float32, float64"}
    assert record.merge(parts) == {"one": want}


@pytest.mark.parametrize(
    "path", [p for p in FILES if case_of(p) in ADAPTERS], ids=lambda path: path.stem
)
def test_golden(path):
    adapter = importlib.import_module(f"tests.golden.{case_of(path)}")
    data = GoldenFile(path)
    compares = [(compare, compare.error()) for compare in adapter.check(data)]
    wrong = [
        f"{compare.name}: error {error:.2e}, allowed {compare.rtol:.0e}"
        for compare, error in compares
        if not error <= compare.rtol
    ]
    unused = [name for name in data.unread() if name not in getattr(adapter, "UNUSED", {})]
    assert compares, "the adapter compared nothing"
    assert not wrong, "; ".join(wrong)
    assert not unused, f"keys that the adapter does not read: {unused}"
    if os.environ.get("ATTNJAX_RECORD_GOLDEN"):
        record.write_part(path.stem, compares)
