"""The Hopper kernels, compiled for the hardware, and what they refuse.

Compiling shows that every kernel is accepted, multiplies with wgmma, and fits registers and shared
memory. It is not a run on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from attnjax import masks
from pallas_kernels import aot
from pallas_kernels.dispatch import Target, Unsupported
from pallas_kernels.flash import attention, mosaic_gpu
from pallas_kernels.flash.spec import FlashConfig
from tests.kernels.mosaic_cases import (
    CASES,
    H100,
    IDS,
    case,
    flash_with_gradients,
    lookups,
    problem,
)


def arguments(**changes: Any) -> tuple[dict[str, Any], Any]:
    """Operands and spec of a call with some arguments changed."""
    b, t, s, h, g, d = 1, 128, 128, 2, 1, 64
    x = {
        "query": jax.ShapeDtypeStruct((b, t, h, d), jnp.bfloat16),
        "key": jax.ShapeDtypeStruct((b, s, g, d), jnp.bfloat16),
        "value": jax.ShapeDtypeStruct((b, s, g, d), jnp.bfloat16),
        "mask": masks.Causal(),
        "scale": 1.0,
        **changes,
    }
    x = {n: jnp.zeros(a.shape, a.dtype) if hasattr(a, "sharding") else a for n, a in x.items()}
    inputs, others, spec = attention.prepare(**x)
    return {**inputs, **others}, spec


TABLE = jnp.zeros((300,), jnp.float32)

REFUSALS = {
    "A100": ({}, Target("cuda", "NVIDIA A100-SXM4-80GB", 1, (8, 0)), "compute capability 9.0"),
    "B200": ({}, Target("cuda", "NVIDIA B200", 1, (10, 0)), "has 10.0"),
    "by name alone": ({}, Target("cuda", "NVIDIA L4", 1), "has 8.9"),
    "unknown": ({}, Target("cuda", "a new GPU", 1), "not known"),
    "float32": (
        {n: jnp.zeros((1, 8, 1, 64)) for n in ("query", "key", "value")},
        H100,
        "float16 or all be bfloat16, got float32",
    ),
    "wide": (
        {n: jnp.zeros((1, 8, 1, 320), jnp.float16) for n in ("query", "key", "value")},
        H100,
        "head sizes go up to 256, got 320",
    ),
    "table by offset": (
        {"score_mod": lambda s, b, h, q, k: s + TABLE[q - k + 128]},
        H100,
        "score_mod looks something up by q - k",
    ),
    "primitive": ({"score_mod": lambda s, b, h, q, k: jax.nn.softplus(s)}, H100, "no .log1p."),
    "rows": ({"config": FlashConfig(block_q=96)}, H100, "config.block_q must be 64 or 128"),
    "columns": ({"config": FlashConfig(block_kv=512)}, H100, "config.block_kv must be 64, 128"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_and_what_instead(name):
    changes, target, message = REFUSALS[name]
    operands, spec = arguments(**changes)
    with pytest.raises(Unsupported, match=message):
        mosaic_gpu.forward(operands, spec, target)


def test_it_is_never_the_default():
    assert not attention._forward.kernels["mosaic_gpu"].default
    assert not attention._backward.kernels["mosaic_gpu"].default


def abstract(spec: dict[str, Any]) -> tuple[Any, Any]:
    """(function of the differentiable arguments giving o and all gradients, abstract arguments)."""
    given, fixed, ct = problem(spec, jnp.bfloat16)

    def run(given: Any) -> Any:
        return flash_with_gradients(given, fixed, spec["mod"], ct, implementation="mosaic_gpu")

    return run, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), given)


COMPILED = {
    "causal": case(masks.Causal(), d=128, e=128),
    "lookups": case(masks.Window(40, 5), lookups, d=128, e=128),
    "segments, softcap": case(
        masks.Causal() & masks.Segments(IDS[:, :150], IDS[:, :200]), softcap=20.0
    ),
}
SLOW = (
    "segments, softcap",
    "bias by pair",
    "mask by pair",
    "wide heads",
    "dropout",
    "alibi",
    "bias by key, sinks",
    "offsets",
    "odd lengths",
)
COMPILED |= {name: CASES[name] for name in SLOW if name not in COMPILED}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in COMPILED]
)
def test_compiles_for_h100(name):
    """Forward, dq, dk and dv of one call, through the public function."""
    missing = aot.missing_packages("H100")
    if missing:
        pytest.skip(f"compiling for a GPU needs {', '.join(missing)}")
    spec = COMPILED[name]
    run, given = abstract(spec)
    report = aot.compile_for("H100", run, given)
    wide = max(spec["d"], spec["e"]) > 128
    assert report.routes == {"mosaic_gpu": 4 if wide else 3}
    for kernel in report.kernels:
        counts = kernel.matrix_instructions
        assert counts is None or counts["wgmma.mma_async"] > 0
        assert kernel.smem_bytes is None or kernel.smem_bytes <= 227 * 1024
        if kernel.registers is not None:  # needs ptxas
            # three warpgroups start with 168 registers a thread and share them; two have up to 255
            assert kernel.registers <= 255
            assert kernel.spills is not None and kernel.spills <= 1024


@pytest.mark.slow
def test_compiles_for_h200_and_with_the_other_semantics(monkeypatch):
    missing = aot.missing_packages("H200")
    if missing:
        pytest.skip(f"compiling for a GPU needs {', '.join(missing)}")
    run, given = abstract(CASES["lookups"])
    assert aot.compile_for("H200", run, given).routes == {"mosaic_gpu": 3}
    params = functools.partial(
        plgpu.CompilerParams, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    )
    monkeypatch.setattr(plgpu, "CompilerParams", params)
    run, given = abstract(CASES["lookups"])
    assert aot.compile_for("H200", run, given).routes == {"mosaic_gpu": 3}
