"""Block-sparse flash attention with a memory of O(T) in both directions."""

from pallas_kernels.flash.attention import flash_attention

__all__ = ["flash_attention"]
