"""Block-sparse flash attention with a memory of O(T) in both directions."""

from pallas_kernels.flash.attention import explain_flash, flash_attention, prepare
from pallas_kernels.flash.spec import FlashConfig, FlashSpec

__all__ = ["FlashConfig", "FlashSpec", "explain_flash", "flash_attention", "prepare"]
