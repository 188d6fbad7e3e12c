"""Tile sizes, warps and pipeline depths of the Triton kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.flash.spec import FlashConfig, FlashSpec
from pallas_kernels.flash.triton_tiles import padded_width
from pallas_kernels.machines import shared_memory


class KernelConfig(NamedTuple):
    """Tile sizes in tokens, warps of a program, depth of its pipeline."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int


class TritonConfig(NamedTuple):
    """One choice per kernel; `pairs` is for gradients of biases and offset tables."""

    forward: KernelConfig
    dq: KernelConfig
    dkv: KernelConfig
    pairs: KernelConfig


_K = KernelConfig

# Chosen from what the compiler reports (registers, spills, shared memory, programs that a
# multiprocessor holds), not from run times. Width of the heads -> choice.
_HOPPER = {
    64: TritonConfig(_K(128, 128, 8, 3), _K(128, 64, 8, 3), _K(64, 128, 8, 3), _K(64, 64, 8, 1)),
    128: TritonConfig(_K(128, 128, 8, 2), _K(128, 64, 8, 2), _K(64, 128, 8, 2), _K(64, 64, 8, 1)),
    256: TritonConfig(_K(64, 32, 4, 2), _K(64, 64, 8, 2), _K(32, 64, 8, 2), _K(64, 32, 8, 1)),
}
_BLACKWELL = {
    64: TritonConfig(_K(128, 128, 8, 3), _K(128, 64, 8, 3), _K(64, 128, 8, 2), _K(64, 64, 8, 1)),
    128: TritonConfig(_K(128, 64, 8, 2), _K(128, 64, 8, 2), _K(64, 64, 8, 2), _K(64, 64, 8, 1)),
    256: TritonConfig(_K(64, 32, 8, 2), _K(64, 32, 8, 2), _K(64, 64, 8, 1), _K(64, 32, 8, 1)),
}
_AMPERE = {
    64: TritonConfig(_K(128, 64, 4, 3), _K(64, 64, 4, 3), _K(64, 64, 4, 3), _K(32, 64, 4, 1)),
    128: TritonConfig(_K(128, 64, 8, 3), _K(64, 64, 8, 3), _K(64, 64, 8, 3), _K(32, 64, 4, 1)),
    256: TritonConfig(_K(64, 64, 8, 2), _K(64, 32, 8, 2), _K(64, 32, 8, 2), _K(32, 32, 4, 1)),
}
_SMALL = {  # consumer and inference GPUs: 99 KiB of shared memory
    64: TritonConfig(_K(128, 64, 4, 3), _K(64, 64, 4, 3), _K(64, 64, 4, 3), _K(32, 64, 4, 1)),
    128: TritonConfig(_K(128, 64, 8, 2), _K(64, 64, 8, 2), _K(64, 64, 8, 2), _K(32, 64, 4, 1)),
    256: TritonConfig(_K(64, 32, 8, 2), _K(32, 32, 4, 2), _K(32, 32, 4, 2), _K(32, 32, 4, 1)),
}
_FLOAT32 = {  # products without tensor cores: every term is an instruction of its own
    64: TritonConfig(*[_K(32, 32, 4, 2)] * 4),
    128: TritonConfig(*[_K(32, 32, 8, 2)] * 4),
    256: TritonConfig(*[_K(16, 32, 8, 2)] * 4),
}


def default_config(
    d: int,
    e: int,
    dtype: Any,
    capability: tuple[int, int] | None = None,
    tensor_cores: bool | None = None,
    busy: bool = False,
) -> TritonConfig:
    """Tile sizes whose kernels keep their tiles in registers.

    Args:
      d, e: widths of keys and values, at most 256.
      dtype: of the operands.
      capability: compute capability of the GPU; None is treated like 8.6.
      tensor_cores: whether products run on them; None: for 16-bit types.
      busy: whether scores take more than a scale and a mask, so that tiles must leave registers.
    """
    width = max(64, padded_width(d), padded_width(e))
    if dtype == jnp.float32:
        if not tensor_cores:
            return _FLOAT32[width]
        width = min(2 * width, 256)  # as many bytes as 16-bit columns twice as wide
    major = (capability or (8, 6))[0]
    if capability in ((8, 0), (8, 7)):
        found = _AMPERE[width]
    else:
        found = {9: _HOPPER, 10: _BLACKWELL}.get(major, _SMALL)[width]
    if not busy:
        return found
    most_rows = 128 if major in (9, 10) else 64

    def lighter(config: KernelConfig, rows: int) -> KernelConfig:
        return KernelConfig(min(config.block_q, rows), min(config.block_kv, 64), 8, 2)

    return TritonConfig(
        lighter(found.forward, most_rows),
        lighter(found.dq, 64),
        lighter(found.dkv, 64),
        found.pairs,
    )


def is_busy(operands: dict[str, Any], spec: FlashSpec) -> bool:
    """Whether scores take more than a scale, a mask program and a soft cap."""
    tiles = (x for x in (operands["bias"], operands["mask_array"]) if x is not None)
    per_pair = any(x.shape[2] > 1 and x.shape[3] > 1 for x in tiles)
    return per_pair or spec.score_mod is not None or spec.dropout_rate > 0


def shared_bytes(
    kernel: str,
    config: KernelConfig,
    operands: dict[str, Any],
    spec: FlashSpec,
    capability: tuple[int, int],
) -> int:
    """Estimate of the shared memory of a program: what stays, and what its pipeline holds.

    Args:
      kernel: a field of `TritonConfig`.
      config: its tile sizes.
      operands, spec: of the call.
      capability: compute capability of the GPU.
    """
    item = operands["query"].dtype.itemsize
    row = item * (
        padded_width(operands["query"].shape[3]) + padded_width(operands["value"].shape[3])
    )
    m, n, stages = config.block_q, config.block_kv, config.num_stages
    stays, streams = (n * row, m * row) if kernel == "dkv" else (m * row, n * row)
    if kernel == "forward":
        stays = m * item * padded_width(operands["query"].shape[3])
    entries = 0  # bytes that the pipeline holds for each score
    if spec.score_mod is not None:
        entries += 4 * spec.score_mod.kinds.count("offset")
    for x in (operands["bias"], operands["mask_array"]):
        if x is not None and x.shape[2] > 1 and x.shape[3] > 1:
            entries += x.dtype.itemsize
    ahead = max(stages - 1, 1)
    # asynchronous products keep their operands for longer than the loads of the next ones take
    late = {9: 1, 10: 2}.get(capability[0], 0) if stages > 1 else 0
    buffers = ahead + late
    return stays + buffers * streams + m * n * (ahead * entries + 2 * item) + 2048


def configured(
    default: TritonConfig,
    asked: FlashConfig,
    operands: dict[str, Any],
    spec: FlashSpec,
    capability: tuple[int, int] | None,
) -> TritonConfig:
    """The defaults, with what was asked for, cut to the lengths and to the shared memory.

    Args:
      default, asked: where a choice comes from; what was asked for is not made smaller.
      operands, spec: of the call.
      capability: compute capability of the GPU, None where memory sets no limit.

    Raises:
      Unsupported: for tiles that are no power of two.
    """
    lengths = {"block_q": operands["query"].shape[1], "block_kv": operands["key"].shape[1]}

    def one(name: str, config: KernelConfig) -> KernelConfig:
        fixed: dict[str, int] = {}
        for axis in ("block_q", "block_kv"):
            given = getattr(asked, f"{axis}_{name}", None) or getattr(asked, axis)
            if given is not None:
                _check_block(axis, given)
                fixed[axis] = given
        for knob in ("num_warps", "num_stages"):
            given = asked.option(f"{knob}_{name}", asked.option(knob))
            if given is not None:
                fixed[knob] = given
        config = config._replace(**fixed)
        cut = {n: min(getattr(config, n), padded_width(lengths[n])) for n in lengths}
        smaller = any(cut[n] < getattr(config, n) for n in cut)
        if smaller and "num_warps" not in fixed and cut["block_q"] * cut["block_kv"] < 64 * 64:
            cut["num_warps"] = min(config.num_warps, 4)
        config = config._replace(**cut)
        if capability is None:
            return config
        return _fitted(name, config, fixed, operands, spec, capability)

    return TritonConfig(*(one(n, c) for n, c in zip(default._fields, default, strict=True)))


def _fitted(
    name: str, config: KernelConfig, fixed: Any, operands: Any, spec: Any, capability: Any
) -> KernelConfig:
    """A config whose pipeline and tiles fit the shared memory, in what is not fixed."""
    limit = shared_memory(capability)
    while shared_bytes(name, config, operands, spec, capability) > limit:
        larger = "block_q" if config.block_q > config.block_kv else "block_kv"
        if config.num_stages > 2 and "num_stages" not in fixed:
            config = config._replace(num_stages=config.num_stages - 1)
        elif getattr(config, larger) > 16 and larger not in fixed:
            config = config._replace(**{larger: getattr(config, larger) // 2})
        elif config.num_stages > 1 and "num_stages" not in fixed:
            config = config._replace(num_stages=config.num_stages - 1)
        else:
            break
    return config


def _check_block(axis: str, block: int) -> None:
    if block < 16 or block & (block - 1):
        raise Unsupported(
            "flash_attention: the triton kernel takes tiles of a power of two of at least 16 "
            f"tokens, got {axis}={block}; change FlashConfig, or use implementation='xla'."
        )
