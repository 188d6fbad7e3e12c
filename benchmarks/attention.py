"""Attention beside its peers on this machine's CPU: one process, interleaved rounds, float32.

Candidates: `attnjax.attention`; `jax.nn.dot_product_attention` with the same window or a boolean
mask; PyTorch's `scaled_dot_product_attention` and compiled `flex_attention` when torch is installed
(each in its own layout; block masks and boolean masks are made beforehand). Before anything is
timed all candidates must agree. Ratios are peer / attnjax: above 1 attnjax is faster.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import attnjax as aj
from benchmarks import measure
from benchmarks.memory import temporary_bytes, with_gradients
from benchmarks.problems import (
    MAX_TEMPORARY_BYTES,
    SINKS,
    WINDOW,
    Candidate,
    Problem,
    problem,
    visible,
)

PASSES = ("forward", "forward+backward")
PEERS = ("jax.nn", "torch SDPA", "torch Flex")
AGREEMENT = 2e-4
"""Largest allowed difference between candidates, relative to the largest value (float32 sums)."""


def attnjax_attention(p: Problem) -> tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]:
    """The library's function of (query, key, value, *extra) and its extra arguments."""
    causal, window, sink = aj.masks.Causal(), aj.masks.Window(WINDOW), aj.masks.Sink(SINKS)
    masks = {
        "full": None,
        "causal": causal,
        "window256": causal & window,
        "window_sink": causal & (window | sink),
        "documents": causal,
    }
    attend = functools.partial(aj.attention, mask=masks[p.case])
    if p.case == "documents":
        ids = jnp.asarray(p.segment_ids)
        return lambda q, k, v, ids: attend(q, k, v, segment_ids=ids), (ids,)
    return attend, ()


def jax_attention(p: Problem) -> tuple[Callable[..., jax.Array], tuple[jax.Array, ...]]:
    """`jax.nn.dot_product_attention` for the same problem."""
    attend = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    if p.case == "full":
        return attend, ()
    if p.case == "causal":
        return functools.partial(attend, is_causal=True), ()
    if p.case == "window256":
        return functools.partial(attend, local_window_size=(WINDOW - 1, 0)), ()
    i = np.arange(p.length)
    mask = jnp.asarray(visible(p.case, i[:, None], i[None, :], p.segment_ids[0]))[None, None]
    return lambda q, k, v, mask: attend(q, k, v, mask=mask), (mask,)


def jax_candidate(
    name: str, make: Callable[[Problem], Any], p: Problem, passes: str
) -> Candidate | str:
    """A jitted candidate, or the reason why it is left out."""
    function, extra = make(p)
    arguments = tuple(jnp.asarray(x) for x in (p.query, p.key, p.value))
    if passes == "forward":
        compute, arguments = function, (*arguments, *extra)
    else:
        arguments = (*arguments, jnp.asarray(p.cotangent), *extra)

        def compute(q, k, v, cotangent, *extra):
            return with_gradients(lambda q, k, v: function(q, k, v, *extra))(q, k, v, cotangent)

    needed = temporary_bytes(compute, *arguments)
    if needed > MAX_TEMPORARY_BYTES:
        return f"needs {needed / 1e9:.0f} GB"
    jitted = jax.jit(compute)
    return Candidate(
        name,
        lambda: jax.block_until_ready(jitted(*arguments)),
        lambda: [np.asarray(x) for x in jax.tree.leaves(jitted(*arguments))],
    )


def candidates(p: Problem, passes: str) -> dict[str, Candidate | str]:
    """All candidates for a problem: name -> candidate, or why there is none."""
    made: dict[str, Candidate | str] = {
        "attnjax": jax_candidate("attnjax", attnjax_attention, p, passes),
        "jax.nn": jax_candidate("jax.nn", jax_attention, p, passes),
    }
    if importlib.util.find_spec("torch") is not None:
        from benchmarks import torch_peers

        made["torch SDPA"] = torch_peers.sdpa(p, passes)
        made["torch Flex"] = torch_peers.flex(p, passes)
    return made


def run(
    *,
    lengths: Sequence[int],
    cases: Sequence[str],
    heads: int = 8,
    head_dim: int = 64,
    repeats: int = 5,
    threads: int = 2,
    out: pathlib.Path | None = None,
) -> list[dict[str, Any]]:
    """Measures every case at every length; prints ratios; writes `attention.json` and a picture.

    Args:
      lengths: tokens.
      cases: any of "causal", "full", "window256", "window_sink", "documents".
      heads, head_dim: shape of query, key and value; the batch is 1.
      repeats: timed rounds; medians are reported.
      threads: cores that the process may use, told to PyTorch.
      out: folder for the results, or None.
    """
    if importlib.util.find_spec("torch") is not None:
        import torch

        torch.set_num_threads(threads)
    rows = []
    for case in cases:
        for length in lengths:
            p = problem(case, length, heads, head_dim)
            for passes in PASSES:
                row = _measure(p, passes, repeats)
                rows.append(row)
                print(_line(row), flush=True)
    _report(rows)
    if out is not None:
        settings = {"heads": heads, "head_dim": head_dim, "repeats": repeats, "threads": threads}
        measure.save(out / "attention.json", {**settings, "batch": 1, "dtype": "float32"}, rows)
        _picture(rows, out / "attention.png")
        print(f"\nwritten: {out / 'attention.json'}, {out / 'attention.png'}")
    return rows


def _measure(p: Problem, passes: str, repeats: int) -> dict[str, Any]:
    found = candidates(p, passes)
    ready = {name: c for name, c in found.items() if isinstance(c, Candidate)}
    left_out = {name: c for name, c in found.items() if isinstance(c, str)}
    want = ready["attnjax"].arrays()
    for name, candidate in ready.items():
        for got, expected in zip(candidate.arrays(), want, strict=True):
            error = float(np.abs(got - expected).max() / np.abs(expected).max())
            if error > AGREEMENT:
                raise RuntimeError(
                    f"{name} and attnjax differ by {error:.1e} in {p.case}, {passes}"
                )
    seconds = measure.interleaved({name: c.call for name, c in ready.items()}, repeats)
    return {
        "case": p.case,
        "length": p.length,
        "pass": passes,
        "seconds": seconds,
        "median": {name: measure.median(values) for name, values in seconds.items()},
        "left_out": left_out,
    }


def _line(row: dict[str, Any]) -> str:
    times = ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in row["median"].items())
    reasons = "".join(f"; {name}: {why}" for name, why in row["left_out"].items())
    return f"{row['case']}, T={row['length']}, {row['pass']}: {times}{reasons}"


def _report(rows: Sequence[dict[str, Any]]) -> None:
    peers = [
        n for n in ("jax.nn", "torch SDPA", "torch Flex") if any(n in r["median"] for r in rows)
    ]
    for passes in PASSES:
        lines = []
        for row in (r for r in rows if r["pass"] == passes):
            own = row["median"]["attnjax"]
            ratios = [
                f"{row['median'][peer] / own:.2f}x" if peer in row["median"] else "-"
                for peer in peers
            ]
            lines.append([row["case"], str(row["length"]), f"{1e3 * own:.1f}", *ratios])
        print(f"\n{passes}: time of a peer / time of attnjax (above 1: attnjax is faster)")
        print(measure.table(["case", "tokens", "attnjax ms", *peers], lines))


def _picture(rows: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(row["case"] for row in rows))
    size = (2.6 * len(cases) + 0.6, 5.0)
    figure, axes = plt.subplots(
        len(PASSES), len(cases), figsize=size, sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for column, case in enumerate(cases):
        for line, passes in enumerate(PASSES):
            axis = axes[line, column]
            mine = [r for r in rows if r["case"] == case and r["pass"] == passes]
            for name in dict.fromkeys(n for r in mine for n in r["median"]):
                points = [
                    (r["length"], 1e3 * r["median"][name]) for r in mine if name in r["median"]
                ]
                axis.loglog(*zip(*points), "o-", label=name, markersize=4)
            axis.grid(alpha=0.3)
            axis.set_title(case if line == 0 else "")
            axis.set_xlabel("tokens" if line else "")
            axis.set_ylabel(f"{passes}, ms" if column == 0 else "")
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
