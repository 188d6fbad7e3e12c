"""Decode attention: one or a few queries over a long cache, split over its keys."""

from pallas_kernels.decode.attention import decode_attention
from pallas_kernels.decode.spec import DecodeConfig

__all__ = ["DecodeConfig", "decode_attention"]
