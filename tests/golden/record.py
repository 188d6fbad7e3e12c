"""Records how exactly the golden cases agree: `python -m tests.golden.record [-n WORKERS]`.

Runs `tests/golden` with ATTNJAX_RECORD_GOLDEN=1, which leaves one small JSON per file in
`build/golden/`, and merges them by case into `attnjax/golden_results.json`, which
`python -m attnjax mechanisms` shows. A case is recorded only when all its files pass.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
PARTS = ROOT / "build" / "golden"
RESULTS = ROOT / "attnjax" / "golden_results.json"


def write_part(stem, compares):
    """Leaves the result of one file, `compares` being all its (Compare, error)."""
    worst, error = max(compares, key=lambda pair: pair[1])
    kinds = {np.asarray(compare.want).dtype for compare, _ in compares}
    floats = sorted(str(kind) for kind in kinds if np.issubdtype(kind, np.floating))
    part = {
        "worst": float(error),
        "tolerance": float(worst.rtol),
        "arrays": len(compares),
        "dtype": ", ".join(floats) or "integer",
    }
    PARTS.mkdir(parents=True, exist_ok=True)
    (PARTS / f"{stem}.json").write_text(json.dumps(part))


def merge(stems):
    """{case: result} of parts {stem: part}, files of one case joined."""
    merged = {}
    for stem in sorted(stems):
        part, case = stems[stem], stem.rpartition("_")[0]
        old = merged.get(case)
        if old is None:
            merged[case] = dict(part)
            continue
        bigger = max(old, part, key=lambda p: p["worst"])
        kinds = sorted({*old["dtype"].split(", "), *part["dtype"].split(", ")})
        merged[case] = {
            "worst": bigger["worst"],
            "tolerance": bigger["tolerance"],
            "arrays": old["arrays"] + part["arrays"],
            "dtype": ", ".join(kinds),
        }
    return merged


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "-n", metavar="WORKERS", default="0", help="processes (default: 0, this one)"
    )
    args = parser.parse_args()
    if "GOLDEN_DIR" in os.environ:
        parser.error(
            "GOLDEN_DIR is set; results are recorded for the files of the repository only."
        )
    shutil.rmtree(PARTS, ignore_errors=True)
    status = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", args.n, "tests/golden"],
        cwd=ROOT,
        env=os.environ | {"ATTNJAX_RECORD_GOLDEN": "1"},
    ).returncode
    found = {file.stem: json.loads(file.read_text()) for file in PARTS.glob("*.json")}
    results = merge(found)
    text = ",\n".join(f"  {json.dumps(case)}: {json.dumps(results[case])}" for case in results)
    RESULTS.write_text("{\n" + text + "\n}\n")
    print(f"{len(results)} cases of {len(found)} files recorded in {RESULTS.relative_to(ROOT)}")
    return status


if __name__ == "__main__":
    sys.exit(main())
