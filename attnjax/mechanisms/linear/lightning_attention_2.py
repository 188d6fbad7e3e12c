"""Lightning Attention-2: the tiling that computes lightning attention in linear time.

The output is split into what the tokens of a chunk do to each other, (Q K^T ⊙ D) V, and what the
state before the chunk adds, diag(e^{-slope i}) Q S, so that no cumulative sum over tokens is
needed. The function has the values of `lightning_attention`; its chunked computation is the one
that every caller gets.

Reference: Qin et al., "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths
in Large Language Models", 2024, arXiv:2401.04658.
"""

from __future__ import annotations

import dataclasses

from attnjax.mechanisms.linear import lightning_attention as tiled

SPEC = dataclasses.replace(
    tiled.SPEC,
    id="lightning_attention_2",
    title="Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large "
    "Language Models",
    arxiv="2401.04658",
    reduces_to={"any": "lightning_attention"},
)
