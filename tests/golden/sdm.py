"""Circle and cap intersections of sparse distributed memory, and the fit, against official code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from attnjax.mechanisms.memory.attention_sdm import (
    circle_intersection,
    fit_beta,
    log_cap_intersection,
)
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """For every radius: I over the distances, β and bias over them, and ln of caps at cosines."""
    for at in sorted({name.rpartition("/")[0] for name in data}):
        yield from _case(data, f"{at}/" if at else "")


def _case(data: Mapping[str, np.ndarray], at: str) -> Iterable[Compare]:
    n, r = int(data[at + "n"]), float(data[at + "r"])
    distances = [int(d) for d in data[at + "dvals"]]
    cosines = [float(c) for c in data[at + "cap_cos"]]
    for radius in (int(x) for x in np.ravel(data[at + "radii"])):
        exact = [r * (circle_intersection(n, radius, d) / 2**n) for d in distances]
        if f"{at}intersect_{radius}" in data:
            yield Compare(f"intersect_{radius}", exact, data[f"{at}intersect_{radius}"], 1e-8)
        if f"{at}beta_{radius}" in data:
            beta, bias = fit_beta(n, radius, r, distances)
            yield Compare(f"beta_{radius}", beta, data[f"{at}beta_{radius}"], 1e-8)
            yield Compare(f"bias_{radius}", bias, data[f"{at}bias_{radius}"], 1e-8)
        if f"{at}cap_log_{radius}" in data:
            want = data[f"{at}cap_log_{radius}"]
            logs = [log_cap_intersection(c, n, radius, r) for c in cosines]
            got, meet = np.array(logs), want > -1e29  # the file's value for caps that do not meet
            yield Compare(f"caps meet {radius}", np.isfinite(got), meet, 0)
            yield Compare(f"cap_log_{radius}", got[meet], want[meet], 1e-8)
