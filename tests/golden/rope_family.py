"""Rotary frequencies and rotations, ALiBi slopes, T5 buckets, xPos: official implementations."""

from collections.abc import Iterator

import numpy as np

from attnjax.positions import (
    RopeScaling,
    alibi_slopes,
    apply_rope,
    apply_xpos,
    rope_frequencies,
    t5_relative_bucket,
    xpos_center,
)
from pallas_kernels.compat import enable_x64
from tests.golden.compare import Compare

RESULTS = ("inv_freq", "attention_factor")


def check(data):
    with enable_x64(True):
        return [*_frequencies(data), *_rotations(data), *_biases(data), *_xpos(data)]


def _tolerance(want):
    return 1e-9 if np.asarray(want).dtype == np.float64 else 1e-5


def _number(value):
    """Options come as arrays without axes or with one."""
    value = np.asarray(value)
    return value.item() if value.ndim == 0 else tuple(value.tolist())


def _optional(data, key):
    return _number(data[key]) if key in data else None


def _frequencies(data) -> Iterator[Compare]:
    kinds = sorted({key.split("/")[0] for key in data if key.endswith("/inv_freq")})
    for kind in kinds:
        names = [key.split("/", 1)[1] for key in data if key.startswith(f"{kind}/")]
        options = {n: _number(data[f"{kind}/{n}"]) for n in names if n not in RESULTS}
        scaling = RopeScaling.from_dict(
            {"rope_type": kind} | options, _optional(data, "max_position_embeddings")
        )
        inv_freq, factor = rope_frequencies(
            _optional(data, "head_dim"),
            _optional(data, "theta"),
            scaling,
            seq_len=_optional(data, "query_len"),
        )
        want = data[f"{kind}/inv_freq"]
        yield Compare(f"{kind}/inv_freq", inv_freq, want, _tolerance(want))
        if "attention_factor" in names:
            yield Compare(
                f"{kind}/attention_factor", factor, data[f"{kind}/attention_factor"], 1e-9
            )


def _rotations(data) -> Iterator[Compare]:
    for name in ("q", "k"):
        for layout in ("half", "interleaved"):
            if f"{name}_{layout}" not in data:
                continue
            inv_freq, _ = rope_frequencies(data[name].shape[-1], _optional(data, "theta"))
            got = apply_rope(data[name], data["positions"], inv_freq, layout=layout)
            want = data[f"{name}_{layout}"]
            yield Compare(f"{name}_{layout}", got, want, _tolerance(want))


def _biases(data) -> Iterator[Compare]:
    for key in sorted(k for k in data if k.startswith("alibi_slopes_")):
        yield Compare(
            key, alibi_slopes(int(key.rsplit("_", 1)[1])), data[key], _tolerance(data[key])
        )
    sizes = {"num_buckets": "t5_num_buckets", "max_distance": "t5_max_distance"}
    options = {name: _number(data[key]) for name, key in sizes.items() if key in data}
    for direction in ("bidirectional", "causal"):
        key = f"t5_bucket_{direction}"
        if key in data:
            got = t5_relative_bucket(
                data["t5_rel"], bidirectional=direction == "bidirectional", **options
            )
            yield Compare(key, got, data[key], 0.0)


def _xpos(data) -> Iterator[Compare]:
    for name in ("up", "down"):
        key = f"xpos_{name}"
        if key not in data:
            continue
        x = data["xpos_in"].swapaxes(0, 1)[None]  # [1, t, h, d]
        length = x.shape[1]
        got = apply_xpos(x, np.arange(length), downscale=name == "down", center=xpos_center(length))
        yield Compare(key, got[0].swapaxes(0, 1), data[key], _tolerance(data[key]))
