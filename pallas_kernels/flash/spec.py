"""Static description of one block-sparse attention call, shared by every body."""

from __future__ import annotations

import dataclasses
from typing import Any

from pallas_kernels.maskprogram import MaskProgram
from pallas_kernels.modtrace import TileProgram


@dataclasses.dataclass(frozen=True)
class FlashConfig:
    """Tile sizes and the like; None leaves the choice to the body.

    Attributes:
      block_q, block_kv: tokens of a tile in the forward pass.
      block_q_dq, block_kv_dq: in the kernel for the gradient of the queries; None: the forward's,
        or what the body prefers.
      block_q_dkv, block_kv_dkv: in the kernel for the gradients of keys and values; likewise.
      max_blocks: room in the TPU kernel's traced lists, in key blocks per row on average; None is
        room for all. A longer list gives NaN. The other bodies always have room for all.
      options: further knobs of one backend, as (name, value) pairs: "num_warps", "num_stages",
        "compute_kv" and others that the body documents.
    """

    block_q: int | None = None
    block_kv: int | None = None
    block_q_dq: int | None = None
    block_kv_dq: int | None = None
    block_q_dkv: int | None = None
    block_kv_dkv: int | None = None
    max_blocks: int | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def option(self, name: str, default: Any = None) -> Any:
        """The value of a backend's knob."""
        return dict(self.options).get(name, default)


@dataclasses.dataclass(frozen=True)
class FlashSpec:
    """What is known when the call is traced; hashable.

    Attributes:
      scale: factor of the scores.
      softcap: c in c tanh(s / c), or None.
      dropout_rate: probability of dropping a weight.
      precision: of the matrix products.
      mask: the mask where all its arrays are known now (NumPy), else None.
      q_offset: absolute index of the first query where it is known now, else None.
      predicate: the mask's predicate; None shows every key to every query.
      score_mod: traced score function, or None.
      config: tile sizes asked for.
      implementation: see `pallas_kernels.dispatch`.
      folds: number of calls that `jax.vmap` folded into the batch axis, each with its own traced
        mask, 0 without.
    """

    scale: float
    softcap: float | None = None
    dropout_rate: float = 0.0
    precision: Any = None
    mask: MaskProgram | None = None
    q_offset: int | None = None
    predicate: TileProgram | None = None
    score_mod: TileProgram | None = None
    config: FlashConfig = FlashConfig()
    implementation: str | None = None
    folds: int = 0
