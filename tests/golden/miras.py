"""Miras memories against a token-by-token float64 recurrence (exact sign and abs, scalar gates).

`<rule>_<memory>_<o|W|W1>_chunk<c>`: outputs, and the final weights. Chunks and the recurrence are
both compared.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.memory.miras import (
    MEMORA,
    MONETA,
    YAAD,
    MirasRule,
    memory_weights,
    miras,
)
from tests.golden.compare import Compare

RULES = {
    "moneta": MONETA,
    "yaad_paper": YAAD,
    "yaad_norm": dataclasses.replace(YAAD, loss="huber_norm"),
    "yaad_big_delta": YAAD,
    "memora": MEMORA,
}
NAME = re.compile(
    r"(moneta|yaad_paper|yaad_norm|yaad_big_delta|memora)_(?:(linear|mlp)_)?(o|W1|W2|W)"
    r"(?:_chunk(\d+))?"
)


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """The file holds one head: q, k, v [t, d], gates [t]."""
    for at in sorted({name.rpartition("/")[0] for name in data}):
        yield from _case(data, f"{at}/" if at else "")


def _case(data: Mapping[str, np.ndarray], at: str) -> Iterable[Compare]:
    wide = data[at + "q"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        q, k, v = (jnp.asarray(data[at + name])[None, :, None] for name in ("q", "k", "v"))
        names = [n for n in ("alpha", "eta", "delta") if at + n in data]
        gates = {n: jnp.asarray(data[at + n])[None, :, None] for n in names}
        matched = {n: NAME.fullmatch(n[len(at) :]) for n in data if n.startswith(at)}
        cases: dict[tuple[str, str, int], list[tuple[str, str]]] = {}
        for name, match in matched.items():
            if match:
                rule, memory, what, size = match.groups()
                case = (rule, memory or "linear", int(size or 1))
                cases.setdefault(case, []).append((what, name))
        for (kind, memory, size), wanted in cases.items():
            rule = dataclasses.replace(
                RULES[kind], smooth=False, p=float(data[at + "p"]), q=float(data[at + "qn"]),
                total=float(data[at + "c"]),
            )  # fmt: skip
            initial = _initial(data, at, rule, memory)
            given = dict(gates, delta=None) if kind == "yaad_big_delta" else gates
            options = dict(rule=rule, chunk_size=size, return_state=True)
            run = jax.jit(functools.partial(miras, **options))
            one = jnp.zeros(q.shape[:2], jnp.int32)
            for form, ids in (("chunks", None), ("recurrence", one)):
                out, state = run(q, k, v, initial, segment_ids=ids, **given)
                weights = memory_weights(state.raw, rule)
                found = {"o": out, "W": weights.get("matrix"), "W1": weights.get("up"),
                         "W2": weights.get("down")}  # fmt: skip
                for what, name in wanted:
                    got = found[what][0, :, 0] if what == "o" else found[what][0, 0]
                    yield Compare(f"{form} {name}", got, data[name], rtol)


def _initial(
    data: Mapping[str, np.ndarray], at: str, rule: MirasRule, memory: str
) -> dict[str, jax.Array]:
    names = {"up": "mlp_W1", "down": "mlp_W2"}
    if memory == "linear":
        names = {"matrix": "W0_simplex" if rule.retention == "entropy" else "W0"}
    start = {name: jnp.asarray(data[at + key])[None] for name, key in names.items()}
    return {n: jnp.log(x) if rule.retention == "entropy" else x for n, x in start.items()}
