"""Tile sizes and memory limits of the TPU kernels, by device kind."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.flash.lists import make_lists
from pallas_kernels.flash.spec import FlashSpec
from pallas_kernels.flash.tpu_lists import SMEM_BYTES
from pallas_kernels.flash.tpu_plan import LANES

SIZES = (1024, 512, 256, 128)
"""Candidates for the tile's sides, in tokens."""

TRACED_SIDE = 512
"""Largest side where nothing is known about the mask yet."""

STEP_COST = 300.0
"""Cost of a step of the grid beside its tile, in bundles."""

SEARCH_TILES = 1 << 16
"""Candidates with more tiles than this are not classified for the search."""

PARTS = {"forward": (512, 512), "dq": (512, 512), "dkv": (1024, 512), "dqkv": (512, 1024)}
"""Largest (queries, keys) of the part of a tile that is computed at once, by kernel."""

EXACT_SIDE = 256
"""Largest side in float32: six products take the place of one, and compile as slowly."""

VMEM_BYTES = {"v7": 56 << 20, "v5p": 80 << 20, "v4": 24 << 20, "v3": 14 << 20, "v2": 14 << 20}
"""Vector memory that a kernel may take, by generation; `VMEM_DEFAULT` for the others (v5e, v6e)."""

VMEM_DEFAULT = 100 << 20
VMEM_UNKNOWN = 48 << 20


def vmem_limit(kind: str | None) -> int:
    """Bytes of vector memory for one kernel on a device kind ("TPU v5 lite", "TPU7x", ...)."""
    if kind is None:
        return VMEM_UNKNOWN
    name = kind.lower().replace("tpu", "").replace(" ", "")
    name = {"v5": "v5p", "7x": "v7"}.get(name, name)
    return next((n for g, n in VMEM_BYTES.items() if name.startswith(g)), VMEM_DEFAULT)


def choose_blocks(
    operands: dict[str, Any], spec: FlashSpec, kernel: str, dtype: Any
) -> tuple[int, int]:
    """(block_q, block_kv) in tokens for the kernel "forward", "dq" or "dkv".

    Those of the config where it has them; else the least estimated cost over the tiles that the
    mask makes the kernel visit.

    Raises:
      Unsupported: when the config's sizes are no multiples of 128.
    """
    asked = _asked(spec, kernel)
    t, s = operands["query"].shape[1], operands["key"].shape[1]
    wide = max(operands["query"].shape[3], operands["value"].shape[3])
    static = spec.mask is not None and spec.q_offset is not None
    largest = SIZES[0]
    if not static or operands["mask_array"] is not None or wide > LANES:
        largest = TRACED_SIDE
    if dtype == jnp.float32:
        largest = EXACT_SIDE
    largest = min(largest, spec.config.option("largest_block", largest))
    q_sizes = [asked[0]] if asked[0] else _fitting(t, largest)
    kv_sizes = [asked[1]] if asked[1] else _fitting(s, largest)
    sizes = [(bq, bk) for bq in q_sizes for bk in kv_sizes]
    mask: Any = spec.mask if spec.mask is not None else operands["mask"]
    copies = mask.num_heads or 1
    copies *= operands["query"].shape[0] if not static or mask.batch_size else 1

    def tiles(size: tuple[int, int]) -> int:
        return -(-t // size[0]) * -(-s // size[1]) * copies

    if len(sizes) == 1:
        return sizes[0]
    if not static:
        while 4 * tiles(sizes[0]) > SMEM_BYTES and max(sizes[0]) < SIZES[0] and not any(asked):
            sizes[0] = (2 * sizes[0][0], 2 * sizes[0][1])
        return sizes[0]
    affordable = [x for x in sizes if tiles(x) <= SEARCH_TILES]
    return min(affordable or sizes[:1], key=lambda x: _cost(operands, spec, x, kernel))


def _cost(operands: Any, spec: FlashSpec, size: tuple[int, int], kernel: str) -> float:
    """Estimated bundles of a kernel over its listed tiles, per batch row and head."""
    bq, bk = size
    products = {"forward": 2, "dq": 3, "dkv": 4}[kernel]
    lists = make_lists(operands, spec, bq, bk)
    full, partial = (float(np.sum(x)) for x in (lists.full_count, lists.partial_count))
    area = bq * bk / (512 * 512)
    tile = products * (480 * area + 12 * (bq + bk) / 512 + 25)
    return full * (tile + STEP_COST) + partial * (1.1 * tile + STEP_COST)


def part_sizes(kernel: str, block_q: int, block_kv: int) -> tuple[int, int]:
    """(sub_q, sub_kv): sides of the part of a tile that is computed at once.

    The largest powers of two that divide the tile, up to those that compile to the fewest bundles.
    """
    most = PARTS[kernel]
    sub_q, sub_kv = min(most[0], block_q & -block_q), min(most[1], block_kv & -block_kv)
    if kernel == "dkv" and sub_kv == block_kv > 2 * LANES:
        sub_kv //= 2  # the parts' products and exponentials overlap
    return sub_q, sub_kv


def _asked(spec: FlashSpec, kernel: str) -> tuple[int | None, int | None]:
    config = spec.config
    q = config.block_q if kernel == "forward" else getattr(config, f"block_q_{kernel}")
    kv = config.block_kv if kernel == "forward" else getattr(config, f"block_kv_{kernel}")
    found = q or config.block_q, kv or config.block_kv
    for name, size in zip(("block_q", "block_kv"), found, strict=True):
        if size is not None and (size < LANES or size % LANES):
            raise Unsupported(
                f"flash: the tpu kernel's tiles are multiples of {LANES} tokens, got "
                f"{name}={size}; pass such a size, None, or implementation='xla'."
            )
    return found


def _fitting(length: int, largest: int) -> list[int]:
    """Sizes that the length does not make mostly padding."""
    whole = -(-length // LANES) * LANES
    found = [n for n in SIZES if n <= largest and n <= max(whole, LANES)]
    if whole <= largest and whole not in found:
        found.insert(0, whole)
    return found


def check_vmem(needed: int, limit: int, what: str) -> None:
    """Raises `Unsupported` when a kernel's blocks exceed the vector memory."""
    if needed > limit:
        raise Unsupported(
            f"flash: {what} needs {needed:,} bytes of vector memory, of {limit:,}; take smaller "
            "tiles (config.block_q, block_kv) or implementation='xla'."
        )


def tile_bytes(
    block_q: int, block_kv: int, part: int, d: int, e: int, itemsize: int, sources: list[Any]
) -> int:
    """Bytes of one step's blocks (twice, for the pipeline), sums and scores."""
    blocks = (2 * block_q * (d + e) + 2 * block_kv * (d + e)) * itemsize
    sums = 4 * (block_q + block_kv) * (d + e) + 3 * 4 * block_q * LANES
    scores = 6 * 4 * part
    looked_up = 0
    for source in sources:
        if source.kind == "tile":
            looked_up += block_q * block_kv * source.array.dtype.itemsize
            looked_up += 4 * part
        elif source.kind == "offset":
            # blocks of a vector take a sublane tile of 8 rows
            looked_up += 8 * 4 * source.array.shape[-1] + 4 * 4 * part
        else:
            looked_up += 4 * LANES * block_q
    return 2 * (blocks + looked_up) + sums + scores
