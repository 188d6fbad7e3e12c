"""Sets of keys: visible to every query or to none, whatever the query's index."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from attnjax.masks.base import Mask
from pallas_kernels.maskprogram import look_up, mask_node, to_class


@mask_node("counts")
class KeySet(Mask):
    """Keys of a set: visible iff counts[b, k + 1] > counts[b, k].

    Made by `key_set` or `document_sinks`. Counting makes every tile exact: it holds counts[k1] -
    counts[k0] keys of the set.

    Attributes:
      counts: [b, s + 1] int32, members among the first 0, 1, ..., s keys.
    """

    counts: Any

    @property
    def batch_size(self) -> int | None:
        """Rows of `counts`, or None when one serves all."""
        return None if self.counts.shape[0] == 1 else self.counts.shape[0]

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """See `MaskProgram.predicate`."""
        return look_up(self.counts, b, k + 1) > look_up(self.counts, b, k)

    def _classify(self, xp: Any, b: Any, h: Any, q0: Any, q1: Any, k0: Any, k1: Any) -> Any:
        count = look_up(self.counts, b, k1) - look_up(self.counts, b, k0)
        return to_class(xp, count == 0, count == k1 - k0)


def key_set(keep: Bool[Array, "b s"]) -> KeySet:
    """The keys where `keep` is True.

    Args:
      keep: by row of the batch, or [1, s] for all rows.
    """
    counts = jnp.cumsum(jnp.asarray(keep).astype(jnp.int32), axis=1)
    return KeySet(jnp.pad(counts, ((0, 0), (1, 0))))


def document_sinks(segment_ids: Int[Array, "b s"], sinks: int) -> KeySet:
    """The first tokens of every document of a packed row.

    Args:
      segment_ids: documents are runs of equal ids.
      sinks: number of tokens per document.
    """
    ids = jnp.asarray(segment_ids)
    index = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
    begins = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(begins, index, jnp.zeros_like(index)), axis=1)
    return key_set(index - start < sinks)
