"""S2-Attention: every head keeps near blocks and every s-th block, each head with its own phase.

A head reads its local band and one block in s, so it stores about 1/s of the keys; the phase moves
from head to head, so that the heads together still read every block. With blocks of c tokens, key
head h of G, I = ⌊i / c⌋ and J = ⌊j / c⌋:

    causal:         j <= i and (I - J < l or (J + h step + offset) mod s = 0)
    bidirectional:  (max(I - J - l + 1, 0) + max(J - I - l + 1, 0)) mod s = 0,  the same for all h

The query heads of a key head share its blocks; the last `dense_heads` key heads see everything.
The code has two rules for the phase step: s over the number of QUERY heads, at least 1 (here the
default), and in a later version s over the number of key heads (`step` sets it). With fewer than
s distinct phases some far blocks are read by no head: the module warns, and `phases` counts them.
The bidirectional form strides from the edge of the band, not from the start of the text.

Reference: Lin et al., "Efficient LLM Training and Serving with Heterogeneous Context Sharding among
Attention Heads", 2024, arXiv:2407.17678; official code linxihui/dkernel.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.cache import DenseCache, StridedCache
from attnjax.cache.base import cache_bytes
from attnjax.checks import check_no_scores
from attnjax.masks import BlockPattern, Causal, Mask, Strided, per_head
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism


def local_stride_layout(
    num_heads: int,
    length: int,
    *,
    num_kv_heads: int | None = None,
    block: int = 64,
    local_blocks: int | tuple[int, int] = 16,
    stride: int = 8,
    dense_heads: int = 0,
    step: int | None = None,
    offset: int = 0,
    homo: bool = False,
    causal: bool = True,
    relative: bool | None = None,
    past_length: int = 0,
    q_start: int = 0,
    kv_start: int = 0,
) -> Bool[np.ndarray, "h n r"]:
    """Which blocks of keys each head reads for each block of queries.

    Use it as `BlockPattern(layout, block) & Causal()` (without `Causal()` where not causal).

    Args:
      num_heads: query heads.
      length: tokens.
      num_kv_heads: G, divides `num_heads`; None is `num_heads`.
      block: c, tokens per block.
      local_blocks: l, blocks of the band, the query's own counted; (left, right) where not causal.
      stride: s, every how many blocks one is read; 1 is dense.
      dense_heads: key heads that read everything, the last ones.
      step: phase between neighboring key heads, in blocks; None is max(1, s // num_heads).
      offset: phase of head 0, in blocks; 0 reads the first block.
      homo: one phase for all heads, as LongGen.
      causal: whether blocks of the future are hidden.
      relative: count the stride from the edge of the band, which leaves step, offset and homo
        without a meaning; None does so where not causal.
      past_length: tokens already cached: their rows of blocks are left out.
      q_start, kv_start: first query and key of this part of a longer text, multiples of `block`.

    Returns:
      Booleans [num_heads, query blocks, key blocks]; one row of heads where all heads are alike.

    Raises:
      ValueError: when sizes do not divide or are out of range.

    Reference: `get_sparse_attn_mask` of linxihui/dkernel.
    """
    heads = 1 if homo else num_heads
    groups = heads if homo or num_kv_heads is None else num_kv_heads
    name = "local_stride_layout"
    _check(name, heads, groups, block, local_blocks, stride, dense_heads, homo)
    if length < 1:
        raise ValueError(f"{name}: length={length} must be at least 1 token.")
    if q_start % block or kv_start % block:
        raise ValueError(
            f"{name}: q_start={q_start} and kv_start={kv_start} must be multiples of block={block}."
        )
    blocks = -(-length // block)
    i = q_start // block + np.arange(blocks)[:, None]
    j = kv_start // block + np.arange(blocks)[None]
    left, right = (local_blocks,) * 2 if isinstance(local_blocks, int) else local_blocks
    right = 1 if causal else right
    if not causal if relative is None else relative:
        seen = (np.maximum(i - j - left + 1, 0) + np.maximum(j - i - right + 1, 0)) % stride == 0
        layout = seen[None]
        if dense_heads:
            dense = np.arange(groups) >= groups - dense_heads
            layout = layout | dense[:, None, None]
    else:
        residue = head_offsets(
            heads, groups, stride, dense_heads=dense_heads, step=step, offset=offset, homo=homo
        )[:, None, None]
        layout = ((j[None] - residue) % stride == 0) | (residue < 0)
        layout = layout | ((i - j < left) & (j - i < right))[None]
    if causal:
        layout = layout & (j <= i)[None]
    if len(layout) > 1:
        layout = np.repeat(layout, heads // len(layout), axis=0)
    return layout[:, -(-past_length // block) :]


def head_offsets(
    num_heads: int,
    num_kv_heads: int,
    stride: int,
    *,
    dense_heads: int = 0,
    step: int | None = None,
    offset: int = 0,
    homo: bool = False,
) -> Int[np.ndarray, " g"]:
    """The residue mod s of the far blocks that each key head reads; -1 for dense heads.

        o_h = -(h step + offset) mod s

    Args:
      num_heads, num_kv_heads, stride, dense_heads, step, offset, homo: as `local_stride_layout`.
    """
    count = 1 if homo else num_heads
    h = np.zeros(num_kv_heads, np.int64) if homo else np.arange(num_kv_heads)
    step = max(1, stride // count) if step is None else step
    return np.where(h < num_kv_heads - dense_heads, -(h * step + offset) % stride, -1)


def phases(offsets: Int[np.ndarray, " g"], stride: int) -> int:
    """How many of the s residues some head reads; s covers the whole text, as a dense head does."""
    return stride if (offsets < 0).any() else len(set(offsets.tolist()))


def block_csr(layout: Bool[np.ndarray, "h n r"]) -> tuple[np.ndarray, np.ndarray]:
    """Compressed rows of a layout by head: row starts [h, n + 1] and columns [h, most], -1 padded.

    Kernels of this library take block lists (`pallas_kernels.blocklist`) instead; this is the form
    of the official code.
    """
    counts = layout.sum(-1)
    rows = np.concatenate([np.zeros_like(counts[:, :1]), counts.cumsum(-1)], axis=-1)
    columns = np.full((len(layout), int(rows[:, -1].max())), -1, np.int32)
    for h, head in enumerate(layout):
        columns[h, : rows[h, -1]] = np.nonzero(head)[1]
    return rows.astype(np.int32), columns


def is_cache_efficient(layout: Bool[np.ndarray, "h n r"]) -> bool:
    """Whether a block that a head stops reading is never read again, so that it may be freed.

    True iff for every block J below the diagonal of row I, row I reads J only if row I - 1 does.
    """
    i, j = np.arange(layout.shape[1])[1:, None], np.arange(layout.shape[2])[None]
    return bool((~layout[:, 1:] | layout[:, :-1] | (i <= j)[None]).all())


@dataclasses.dataclass(frozen=True)
class S2Cache:
    """A `StridedCache` for each phase, with the key heads that have it.

    Attributes:
      parts: caches, `DenseCache` for dense heads.
      heads: key heads of each part, in tokens' order of heads. Static.

    Memory: O(l c + T / s) per sparse key head, O(T) per dense one. Shardable by b.
    """

    parts: tuple[Any, ...]
    heads: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> jax.Array:
        """[b] tokens seen so far."""
        return self.parts[0].length

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)

    def attend(
        self,
        query: Float[Array, "b t h d"],
        key: Float[Array, "b t g d"],
        value: Float[Array, "b t g e"],
        *,
        valid: Bool[Array, "b t"] | None = None,
        **options: Any,
    ) -> tuple[tuple[jax.Array, jax.Array], S2Cache]:
        """Stores the new tokens and lets each attend to the blocks of its head.

        Args:
          query, key, value: the new tokens.
          valid: True for real tokens, which come first; only they are stored and counted.
          options: of `attnjax.attention`.

        Returns:
          `((o [b, t, h, e], lse [b, t, h]), cache)`.
        """
        repeats = query.shape[2] // key.shape[2]
        outputs, parts, order = [], [], []
        for part, heads in zip(self.parts, self.heads, strict=True):
            mine = [h * repeats + i for h in heads for i in range(repeats)]
            k, v = key[:, :, np.array(heads)], value[:, :, np.array(heads)]
            out, part = part.attend(query[:, :, np.array(mine)], k, v, valid=valid, **options)
            outputs.append(out[:2])
            parts.append(part)
            order += mine
        back = np.argsort(np.array(order))
        z, lse = (jnp.concatenate(a, axis=2)[:, :, back] for a in zip(*outputs, strict=True))
        return (z, lse), S2Cache(tuple(parts), self.heads)


jax.tree_util.register_dataclass(S2Cache, data_fields=["parts"], meta_fields=["heads"])


class S2Attention(SequenceMixer):
    """Softmax attention of every head to its own shard of the text; block sparse.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      block: c, tokens per block. phi-3-small: 64.
      local_blocks: l, near blocks, counting the query's own; (left, right) where not causal, an
        integer being both. phi-3-small: 16.
      stride: s; None is the number of key heads but at most 8, so that the heads cover all blocks.
        phi-3-small: 8.
      dense_heads: key heads that see everything, the last ones.
      step: phase between key heads; None is max(1, s // num_heads). Causal only.
      offset: phase of head 0. Causal only.
      homo: one phase for all heads, as LongGen; the far context is then not covered, on purpose.
        Causal only.
      **options: of `SequenceMixer`. The paper keeps some layers dense: mix with "softmax" layers.

    Raises:
      ValueError: when a size is out of range.

    Warns:
      UserWarning: when the heads have fewer than s phases, so that no head reads some far blocks.
    """

    sites = SCORE_SITES
    directions = ("causal", "bidirectional")
    grouped = masked = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        block: int = 64,
        local_blocks: int | tuple[int, int] = 16,
        stride: int | None = None,
        dense_heads: int = 0,
        step: int | None = None,
        offset: int = 0,
        homo: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        groups = self.num_kv_heads
        stride = min(8, groups) if stride is None else stride
        _check(
            "S2Attention", num_heads, groups, block, local_blocks, stride, dense_heads, homo
        )  # fmt: skip
        if self.causal and not isinstance(local_blocks, int):
            raise ValueError(
                f"S2Attention: local_blocks={local_blocks} must be one number with causal=True."
            )
        if not self.causal and (step is not None or offset or homo):
            raise ValueError(
                f"S2Attention: step={step}, offset={offset} and homo={homo} have no meaning with "
                "causal=False, where all heads count from the edge of their band; leave them out."
            )
        both = (local_blocks, local_blocks) if isinstance(local_blocks, int) else local_blocks
        self.local_blocks, self.right_blocks = both
        self.block, self.stride = block, stride
        self.phase = {"dense_heads": dense_heads, "step": step, "offset": offset, "homo": homo}
        offsets = head_offsets(num_heads, groups, stride, **self.phase)
        self.offsets = tuple(int(o) for o in offsets)
        if self.causal and not homo and phases(offsets, stride) < stride:
            warnings.warn(
                f"S2Attention: {groups} key heads read {phases(offsets, stride)} of stride={stride}"
                " phases, so no head of this layer sees some far blocks; use stride <= "
                f"{groups}, or dense_heads=1.",
                stacklevel=2,
            )
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection((groups, self.head_dim), rngs=rngs)
        self.value = self.projection((groups, self.head_dim), rngs=rngs)
        self.out = self.output_projection(rngs=rngs)

    def layout(self, length: int | None = None) -> Mask:
        """The module's mask; blocks count from the start of the row, packed or not.

        Args:
          length: tokens; needed where not causal.

        Raises:
          ValueError: without a length where not causal.
        """
        if not self.causal:
            if length is None:
                raise ValueError("S2Attention: layout needs the length with causal=False.")
            blocks = local_stride_layout(
                self.num_heads, length, num_kv_heads=self.num_kv_heads, block=self.block,
                local_blocks=(self.local_blocks, self.right_blocks), stride=self.stride,
                causal=False, dense_heads=self.phase["dense_heads"],
            )  # fmt: skip
            return BlockPattern(blocks, self.block)
        sizes = (self.block, self.stride, self.local_blocks)
        repeats = self.num_heads // self.num_kv_heads
        if min(self.offsets) >= 0:
            if len(set(self.offsets)) == 1:
                return Strided(*sizes, self.offsets[0])
            return Strided(*sizes, np.repeat(self.offsets, repeats))
        return per_head(
            [Causal() if o < 0 else Strided(*sizes, o) for o in np.repeat(self.offsets, repeats)]
        )

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """An empty cache: a `StridedCache` per phase where that is smaller than all tokens.

        Args:
          batch: rows.
          max_length: tokens per row, prompt and continuation together.
          dtype: of keys and values; None is the module's dtype, or that of the parameters.
        """
        self._require_decoding()
        dtype = (self.dtype or self.param_dtype) if dtype is None else dtype
        store = math.ceil(max_length / (self.block * self.stride)) * self.block
        if self.local_blocks * self.block + store >= max_length:
            return super().init_cache(batch, max_length, dtype)
        heads = {o: [h for h, p in enumerate(self.offsets) if p == o] for o in self.offsets}
        strided = {"block": self.block, "stride": self.stride, "local_blocks": self.local_blocks}
        parts: list[Any] = []
        for offset, mine in heads.items():
            sizes = (batch, max_length, len(mine), self.head_dim)
            if offset < 0:
                parts.append(DenseCache.create(*sizes, dtype=dtype))
            else:
                parts.append(StridedCache.create(*sizes, dtype=dtype, **strided, offset=offset))
        return S2Cache(tuple(parts), tuple(map(tuple, heads.values())))

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        q, k = self.rotate(call, q, k)
        if not isinstance(call.cache, S2Cache):
            return self.attend(call, q, k, v, layout=self.layout(x.shape[1]))[0]
        check_no_scores(
            "S2Attention", call, "with S2Cache",
            "it keeps some keys only; use DenseCache.create(...) as the cache of this layer",
        )  # fmt: skip
        (z, _), call.cache = call.cache.attend(q, k, v, valid=call.valid)
        return z


def _check(
    name: str, heads: int, groups: int, block: int, local: Any, stride: int, dense: int, homo: bool
) -> None:
    if heads % groups:
        raise ValueError(f"{name}: num_kv_heads={groups} must divide num_heads={heads}.")
    sides = (local,) if isinstance(local, int) else tuple(local)
    if min(block, stride, *sides) < 1:
        raise ValueError(
            f"{name}: block={block}, stride={stride} and local_blocks={local} must be at least 1."
        )
    if not 0 <= dense <= groups or (homo and dense):
        raise ValueError(
            f"{name}: dense_heads={dense} must be in [0, num_kv_heads={groups}], and 0 with homo."
        )


def _example() -> tuple[S2Attention, jax.Array]:
    module = S2Attention(
        4, 16, num_kv_heads=2, block=2, local_blocks=1, stride=2, rope_base=1e4, rngs=nnx.Rngs(0)
    )
    return module, jax.random.normal(jax.random.key(1), (2, 17, 16))


def _picture() -> dict[str, np.ndarray]:
    layout = local_stride_layout(3, 36, block=2, local_blocks=2, stride=3)
    dense = BlockPattern(layout, 2) & Causal()
    heads = np.asarray(dense.dense(36, num_heads=3))[0].astype(np.float32)
    return {f"head {h}": a for h, a in enumerate(heads)} | {"all heads": heads.max(0)}


SPEC = Mechanism(
    id="s2_attention",
    title="Efficient LLM Training and Serving with Heterogeneous Context Sharding among Attention "
    "Heads",
    arxiv="2407.17678",
    year=2024,
    code="linxihui/dkernel",
    function=local_stride_layout,
    module=S2Attention,
    causal=True,
    bidirectional=True,
    cache="ring",
    segment_ids=True,
    kernel="flash",
    cost="O(T (l c + T / s)) per head",
    reduces_to={
        "stride=1": "multi_head_attention",
        "local_blocks=T/c": "multi_head_attention",
        "dense_heads=G": "multi_head_attention",
        "homo=True": "longgen",
    },
    picture=_picture,
    golden=("s2_layout",),
    reading="the default stride, which follows the number of key heads.",
    example=_example,
)
