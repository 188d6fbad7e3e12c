"""Caches for decoding: static shapes, per-row lengths, one type per layer policy.

Every cache is a pytree of arrays that can be sharded by batch row and by head, stepped under
`jax.jit`, and stacked over layers. `valid` marks the real tokens of a padded chunk: only they are
stored and counted.
"""

from attnjax.cache.base import cache_bytes
from attnjax.cache.dense import DenseCache
from attnjax.cache.linear_state import LinearCache
from attnjax.cache.ring import RingCache
from attnjax.cache.state import StateCache
from attnjax.cache.strided import StridedCache
from attnjax.cache.tokens import TokenCache

__all__ = [
    "DenseCache",
    "LinearCache",
    "RingCache",
    "StateCache",
    "StridedCache",
    "TokenCache",
    "cache_bytes",
]
