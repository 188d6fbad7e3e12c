"""Results of official implementations: files `<case>_<letter>.npz`, an adapter `<case>.py` each.

The files in `data/` are used, or those in $GOLDEN_DIR. An adapter reads every size and option from
the file, so the same test runs on other files of its case. A key that the adapter does not use
fails the test unless the adapter lists it in UNUSED = {name: why}.
"""

import importlib
import os
import pathlib

import pytest

from tests.golden.compare import GoldenFile

HERE = pathlib.Path(__file__).parent
FOLDER = pathlib.Path(os.environ.get("GOLDEN_DIR", HERE / "data"))
ADAPTERS = {p.stem for p in HERE.glob("*.py")} - {"__init__", "compare", "test_golden"}
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


@pytest.mark.parametrize(
    "path", [p for p in FILES if case_of(p) in ADAPTERS], ids=lambda path: path.stem
)
def test_golden(path):
    adapter = importlib.import_module(f"tests.golden.{case_of(path)}")
    data = GoldenFile(path)
    wrong = []
    for compare in adapter.check(data):
        error = compare.error()
        if not error <= compare.rtol:
            wrong.append(f"{compare.name}: error {error:.2e}, allowed {compare.rtol:.0e}")
    unused = [name for name in data.unread() if name not in getattr(adapter, "UNUSED", {})]
    assert not wrong, "; ".join(wrong)
    assert not unused, f"keys that the adapter does not read: {unused}"
