"""The Hopper kernels, run on an emulation of the hardware.

The emulation (`mosaic_emulator.py`) draws the order of events at random, so it also shows that
barriers and buffers are used rightly. It is not a run on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnjax import masks
from pallas_kernels.blocklist import block_list
from pallas_kernels.flash import attention, mosaic_gpu
from pallas_kernels.flash.mosaic_gpu_plan import merge_lists
from pallas_kernels.flash.mosaic_gpu_ring import Ring
from pallas_kernels.flash.spec import FlashConfig
from tests.kernels.mosaic_cases import (
    CASES,
    H100,
    IDS,
    case,
    dense,
    dense_with_gradients,
    error,
    flash,
    flash_with_gradients,
    lookups,
    problem,
)
from tests.kernels.mosaic_emulator import Emulator


@pytest.fixture
def emulated(monkeypatch):
    """Makes `flash_attention` run the Hopper kernels on the emulation, in float32 too."""
    seeds = itertools.count()

    def run(body: Any) -> Any:
        return lambda operands, spec: body(operands, spec, H100, Emulator(next(seeds)))

    monkeypatch.setattr(attention, "_forward", run(mosaic_gpu.forward))
    monkeypatch.setattr(attention, "_backward", run(mosaic_gpu.backward))
    monkeypatch.setattr(mosaic_gpu, "_check_types", lambda operands: None)


@pytest.mark.parametrize("name", CASES)
def test_emulated_kernels_agree_with_the_definition(emulated, name):
    spec = CASES[name]
    given, fixed, ct = problem(spec, jnp.float32)
    got, grads = flash_with_gradients(given, fixed, spec["mod"], ct)
    want, wanted = dense_with_gradients(given, fixed, spec["mod"], ct)
    assert error(got[0], want[0]) < 2e-6
    assert error(got[1], want[1]) < 2e-6
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert error(x, y) < 1e-5


def test_merged_lists_hold_full_tiles_then_partial_ones():
    def lists(ids: jax.Array) -> Any:
        mask = masks.Causal() & masks.Segments(ids, ids)
        return merge_lists(block_list(mask, 300, 300, block_q=64, block_kv=32))

    counts, columns = lists(IDS)
    traced = jax.jit(lists)(IDS)
    np.testing.assert_array_equal(counts, traced[0])
    classes = block_list(
        masks.Causal() & masks.Segments(IDS, IDS), 300, 300, block_q=64, block_kv=32
    ).class_map()
    for row in np.ndindex(*counts.shape[:3]):
        full, total = (int(n) for n in counts[row])
        found = [int(c) for c in columns[row][:total]]
        assert sorted(found[:full]) == list(np.flatnonzero(classes[row] == 2))
        assert sorted(found[full:]) == list(np.flatnonzero(classes[row] == 1))
        np.testing.assert_array_equal(columns[row][:total], traced[1][row][:total])


def test_traced_masks(emulated):
    given, fixed, _ = problem(CASES["segments"], jnp.float32)
    inputs, others, spec = attention.prepare(*given[:3], **fixed)
    assert spec.mask is None and others["mask"] is not None
    run = functools.partial(mosaic_gpu.forward, spec=spec, target=H100, hw=Emulator(3))
    o, _ = run({**inputs, **others})
    assert error(o, jax.jit(lambda x: dense(x, fixed, None))(given)[0]) < 2e-6


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_emulated_half_precision(emulated, dtype):
    given, fixed, ct = problem(case(masks.Causal(), s=150), dtype)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), given)
    exact, wanted = dense_with_gradients(wide, fixed, None, ct.astype(jnp.float32))
    got, grads = flash_with_gradients(given, fixed, None, ct)
    unit = float(jnp.finfo(dtype).eps)
    assert error(got[0], exact[0]) < 2 * unit
    for x, y in zip(grads[:3], wanted[:3], strict=True):
        assert error(x, y) < 4 * unit


def test_every_order_of_events_gives_the_same_bits(emulated):
    given, fixed, ct = problem(CASES["lookups"], jnp.float32)
    # every run has other seeds
    runs = [jax.tree.leaves(flash_with_gradients(given, fixed, lookups, ct)) for _ in range(4)]
    for other in runs[1:]:
        for x, y in zip(runs[0], other, strict=True):
            np.testing.assert_array_equal(x, y)


class _NoWait:
    """Operations without waiting."""

    def __init__(self, hw: Any):
        self.hw = hw

    def wait(self, barrier: Any) -> None:
        del barrier

    def __getattr__(self, name: str) -> Any:
        return getattr(self.hw, name)


_PRODUCE, _WAIT, _RELEASE = Ring.produce, Ring.wait, Ring.release


def _produce_at_once(ring: Ring, step: Any, place: Any) -> None:
    _PRODUCE(dataclasses.replace(ring, hw=_NoWait(ring.hw)), step, place)


def _wait_and_release(ring: Ring, group: str, step: Any) -> None:
    _WAIT(ring, group, step)
    _RELEASE(ring, group, step)


def _nothing(ring: Ring, group: str, step: Any) -> None:
    del ring, group, step


FAULTS = {
    "no wait for readers": {"produce": _produce_at_once},
    "no wait for copies": {"wait": _nothing},
    "no release": {"release": _nothing},
    "release too early": {"wait": _wait_and_release, "release": _nothing},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_notices_faults(emulated, monkeypatch, fault):
    spec = case(t=64, s=64 * 12, b=1, h=1, g=1)
    given, fixed, _ = problem(spec, jnp.float32)
    config = FlashConfig(block_q=128, block_kv=64, options=(("num_stages", 2),))
    want = flash(given, fixed, None, config=config)[0]
    for name, method in FAULTS[fault].items():
        monkeypatch.setattr(Ring, name, method)
    try:
        found = [flash(given, fixed, None, config=config)[0] for _ in range(3)]
    except AssertionError:
        return
    assert any(not np.array_equal(x, want) for x in found)
