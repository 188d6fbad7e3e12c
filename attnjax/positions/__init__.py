"""Positions: rotary embeddings and their extensions, relative biases, positions in linear cores.

Every function takes positions as an argument, [t], [b, t] or [b, h, t], so that caches, packed
documents and positions by head need nothing special.
"""

from attnjax.positions.alibi import AlibiScore, alibi_bias, alibi_score_mod, alibi_slopes
from attnjax.positions.lrpe import LRPE, apply_lrpe, lrpe_theta
from attnjax.positions.rope import apply_rope, rotate
from attnjax.positions.scaling import RopeScaling, rope_frequencies
from attnjax.positions.t5 import T5RelativeBias, t5_relative_bucket
from attnjax.positions.xpos import apply_xpos, xpos_center

__all__ = [
    "LRPE",
    "AlibiScore",
    "RopeScaling",
    "T5RelativeBias",
    "alibi_bias",
    "alibi_score_mod",
    "alibi_slopes",
    "apply_lrpe",
    "apply_rope",
    "apply_xpos",
    "lrpe_theta",
    "rope_frequencies",
    "rotate",
    "t5_relative_bucket",
    "xpos_center",
]
