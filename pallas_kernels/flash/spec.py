"""Static description of one block-sparse attention call, shared by every body."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class FlashSpec:
    """What is known when the call is traced; hashable.

    Attributes:
      scale: factor of the scores.
      softcap: c in c tanh(s / c), or None.
      score_mod: traced score program (`pallas_kernels.flash.score.ScoreProgram`), or None.
      dropout_rate: probability of dropping a weight.
      precision: of the matrix products.
      block_q, block_kv: tile sizes of the block lists, in tokens.
      span: keys that one step of the XLA body takes, in tokens: block_kv, or the width of a band.
      any_full, any_partial: whether the lists may hold FULL and PARTIAL tiles.
      max_blocks: largest number of listed blocks in a row.
      lanes: most tiles that one step works on side by side.
    """

    scale: float
    softcap: float | None
    score_mod: Any
    dropout_rate: float
    precision: Any
    block_q: int
    block_kv: int
    span: int
    any_full: bool
    any_partial: bool
    max_blocks: int
    lanes: int
