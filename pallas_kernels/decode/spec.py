"""The static description of a decode call, and the sizes that each kind of device works with."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from pallas_kernels.dispatch import Target
from pallas_kernels.tune import decode_config

BLOCK_BYTES = 1 << 21
"""Keys and values that one step of the TPU body fetches: enough to hide the cost of a step."""

SCORE_BYTES = 1 << 20
"""Scores of one step of the TPU body, float32; they live in vector memory beside the block."""

STAGE_BYTES = 1 << 15
"""Keys and values that one step of the GPU body fetches into shared memory."""

MULTIPROCESSORS = {
    "A100": 108, "A10": 72, "L4": 58, "L40": 142, "H100": 132, "H200": 132, "GH200": 132,
    "B200": 148, "GB200": 148, "RTX PRO 6000": 188,
}  # fmt: skip
"""Multiprocessors of a GPU, by a part of its device kind; 108 where the kind is not listed."""

MEGACORE = ("v4", "v5p")
"""TPUs of which one device has two cores; a grid axis has to be split for both to work."""


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Sizes of a decode kernel; a field that is None is chosen by `choose_config`.

    Attributes:
      block_kv: tokens of one block; with pages a divisor of the page, or the part it shares.
      num_splits: parts that the keys of a row are cut into, which run side by side.
      num_warps, num_stages: of the Triton kernel.
    """

    block_kv: int | None = None
    num_splits: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None


class Chosen(NamedTuple):
    """A `DecodeConfig` in which everything is chosen."""

    block_kv: int
    num_splits: int
    num_warps: int
    num_stages: int


@dataclasses.dataclass(frozen=True)
class DecodeSpec:
    """Everything about a call that is no array.

    Attributes:
      scale: factor of q·k.
      softcap: c in c tanh(s / c), None for none.
      precision: of the matrix products.
      config: sizes asked for by the caller.
      implementation: body asked for by the caller, None for the platform's.
    """

    scale: float
    softcap: float | None = None
    precision: Any = None
    config: DecodeConfig = DecodeConfig()
    implementation: str | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a call: b rows, t queries, h heads on g key/value heads, s keys, widths d and e.

    Attributes:
      page: tokens of a page, None for a contiguous cache.
      itemsize: bytes of an entry, in the widest of query, key and value.
    """

    b: int
    t: int
    h: int
    g: int
    s: int
    d: int
    e: int
    page: int | None
    itemsize: int

    @property
    def rows(self) -> int:
        """Queries that share a key/value head: (h / g) t."""
        return self.h // self.g * self.t


def sizes_of(operands: dict[str, Any]) -> Sizes:
    """The sizes of the operands of a body."""
    b, t, h, d = operands["query"].shape
    _, s, g, e = operands["value"].shape
    table = operands["page_table"]
    page = None if table is None else s
    s = s if table is None else s * table.shape[1]
    itemsize = max(operands[n].dtype.itemsize for n in ("query", "key", "value"))
    return Sizes(b, t, h, g, s, d, e, page, itemsize)


def config_of(body: str, operands: dict[str, Any], spec: DecodeSpec, target: Target) -> Chosen:
    """The sizes a kernel works with: asked for, else measured, else those of `choose_config`."""
    sizes = sizes_of(operands)
    cache = jax.ShapeDtypeStruct((sizes.b, sizes.s, sizes.g, sizes.d), operands["key"].dtype)
    found = decode_config(body, target, operands["query"], cache, operands["value"], spec.config)
    # how many parts are best depends on the rows of a call, which no measurement is looked up by
    found = dataclasses.replace(found, num_splits=spec.config.num_splits)
    return choose_config(sizes, target.kind, found, tpu=body == "tpu")


def choose_config(sizes: Sizes, kind: str | None, asked: DecodeConfig, *, tpu: bool) -> Chosen:
    """The sizes to work with: those asked for, and sensible ones for the rest.

    A step should fetch enough to hide its own cost, and all multiprocessors should have a part of
    the keys to read: decoding is bound by the memory that holds them.

    Args:
      sizes: of the call.
      kind: device kind, such as "TPU v5 lite" or "NVIDIA H100 80GB HBM3"; None if unknown.
      asked: the caller's config.
      tpu: for the TPU kernel, else for the Triton kernel.

    Returns:
      All sizes.
    """
    if tpu:
        block, splits = _tpu_block(sizes), _tpu_splits(sizes, kind)
    else:
        block = _gpu_block(sizes)
        splits = _gpu_splits(sizes, kind, block)
    block = asked.block_kv or block
    if sizes.page is not None:
        block = math.gcd(sizes.page, block)
    return Chosen(
        block_kv=block,
        num_splits=asked.num_splits or splits,
        # float32 products take no matrix instructions, and many registers
        num_warps=asked.num_warps or (8 if sizes.e > 128 or sizes.itemsize > 2 else 4),
        num_stages=asked.num_stages or 3,
    )


def _tpu_block(sizes: Sizes) -> int:
    """Tokens of a block, a power of two: all key/value heads of a token are fetched together."""
    lanes = -(-sizes.d // 128) * 128 + -(-sizes.e // 128) * 128
    by_bytes = BLOCK_BYTES // (sizes.g * lanes * sizes.itemsize)
    by_scores = SCORE_BYTES // (4 * sizes.h * sizes.t * sizes.g)
    tokens = max(16, min(by_bytes, by_scores, sizes.s))
    return 1 << (tokens.bit_length() - 1)


def _gpu_block(sizes: Sizes) -> int:
    """Tokens of a block, a power of two: 3 stages of it leave room for two programs of an SM."""
    widths = (1 << (sizes.d - 1).bit_length()) + (1 << (sizes.e - 1).bit_length())
    tokens = STAGE_BYTES // (widths * sizes.itemsize)
    return max(16, min(1 << (tokens.bit_length() - 1), 128))


def _tpu_splits(sizes: Sizes, kind: str | None) -> int:
    two_cores = kind is not None and any(name in kind.lower() for name in MEGACORE)
    return 2 if two_cores and sizes.b % 2 else 1


def _gpu_splits(sizes: Sizes, kind: str | None, block: int) -> int:
    """Parts so that every multiprocessor gets two programs, of at least two blocks each."""
    found = [n for name, n in MULTIPROCESSORS.items() if name in (kind or "")]
    wanted = 2 * max(found, default=108)
    programs = sizes.b * sizes.g * math.ceil(sizes.rows / 64)
    most = max(1, sizes.s // (2 * block))
    return max(1, min(math.ceil(wanted / programs), most, 128))
