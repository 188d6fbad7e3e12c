"""N-D neighborhood attention in front of the block-sparse kernels."""

from pallas_kernels.neighborhood.attention import neighborhood_attention, token_layout
from pallas_kernels.neighborhood.layout import TokenLayout, permute_tokens, unpermute_tokens
from pallas_kernels.neighborhood.mask import NeighborhoodMask
from pallas_kernels.neighborhood.spec import NeighborhoodSpec
from pallas_kernels.neighborhood.tiles import Efficiency

__all__ = [
    "Efficiency",
    "NeighborhoodMask",
    "NeighborhoodSpec",
    "TokenLayout",
    "neighborhood_attention",
    "permute_tokens",
    "token_layout",
    "unpermute_tokens",
]
