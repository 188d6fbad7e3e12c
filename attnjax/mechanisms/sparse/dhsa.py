"""Dynamic hierarchical sparse attention (DHSA): chunks at predicted boundaries, a budget of tokens.

Keys are cut into chunks of different lengths where a small predictor sees a boundary. A block of
queries is scored against the chunks, by means over tokens and over ALL heads, and every token takes
the score of its chunk. The block reads its most recent `local_tokens` keys and, up to its budget,
the tokens of highest score; attention to them is exact and causal.

    score_I(j) = mean(q of block I) · mean(k of chunk(j)) [sqrt(length of the chunk)]

The base model is not trained. The predictor is, on labels made from attention (`boundary_ratios`).
`dhsa_boundaries`, `dhsa_select` and `gathered_attention` are the official prefill: boundaries, the
means of chunks and of query blocks look ahead inside the prompt. `DHSAttention` is our causal
reading of it, whose outputs never depend on later tokens and which therefore decodes to the same
values: query blocks of one token; a boundary is a gap whose logit is the largest within `nms` gaps
on both sides (greedy suppression needs the whole text) and counts from the token that decides it
on; the chunk behind the last boundary grows. A positive factor of a query block's mean, such as
sqrt of its length in the official code, cannot change its choice and is left out.

The second revision of the code chooses blocks of fixed sizes by head: `dhsa_block_mask`.

Reference: Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for
On-Device LLMs", 2025, arXiv:2510.24606; official code xiongsiheng/DHSA (folder legacy).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnjax.mechanisms.sparse.dhsa_blocks import dhsa_block_mask
from attnjax.mechanisms.sparse.dhsa_boundaries import (
    BoundaryPredictor,
    boundary_loss,
    boundary_ratios,
    dhsa_boundaries,
)
from attnjax.mechanisms.sparse.gathered import GATHERED_KEYS, gathered_attention, in_parts
from attnjax.mixer import HEAD_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels.tilemath import accumulator_dtype

__all__ = [
    "BoundaryPredictor",
    "DHSAttention",
    "boundary_loss",
    "boundary_ratios",
    "dhsa_attention",
    "dhsa_block_mask",
    "dhsa_boundaries",
    "dhsa_select",
    "gathered_attention",
]


def dhsa_select(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    bounds: Int[Array, "b n"],
    *,
    budget: int,
    block_q: int = 64,
    local_tokens: int = 64,
    normalize: bool = True,
    window: int | None = None,
) -> Int[Array, "b q r"]:
    """The keys that each block of queries reads, shared by all heads.

    Args:
      query, key: as the attention uses them (rotated, in the official code).
      bounds: of `dhsa_boundaries`.
      budget: r, keys per block of queries.
      block_q: queries per block.
      local_tokens: most recent keys that are always read.
      normalize: score a chunk by its mean times sqrt(its length).
      window: keys that a block of queries may read at all, counted from the end of a whole block;
        None is all.

    Returns:
      Indices of keys, increasing; s where the block may read fewer keys than the budget. A block
      may read keys up to its own last token.

    Raises:
      ValueError: when budget, block_q < 1 or local_tokens < 0.
    """
    _check("dhsa_select", budget, local_tokens, block_q)
    b, t = query.shape[:2]
    s, dtype = key.shape[1], accumulator_dtype(query.dtype)
    blocks = -(-t // block_q)
    q = jnp.pad(query.mean(2, dtype=dtype), ((0, 0), (0, blocks * block_q - t), (0, 0)))
    q = q.reshape(b, blocks, block_q, -1).mean(2)
    total = jnp.cumsum(key.mean(2, dtype=dtype), axis=1)
    starts, ends = bounds[:, :-1], bounds[:, 1:]
    means = _means(total, starts, ends, normalize)
    scores = jnp.einsum("bqd,bnd->bqn", q, means)
    end = (jnp.arange(blocks, dtype=jnp.int32) + 1) * block_q
    high = jnp.minimum(end, s)
    low = jnp.zeros_like(end) if window is None else jnp.clip(end - window, 0, high)
    return _fill(
        scores, starts[:, None], ends[:, None], low[None], high[None], budget, local_tokens, s
    )


def _means(total: jax.Array, starts: jax.Array, ends: jax.Array, normalize: bool) -> jax.Array:
    """Means [b, n, d] of tokens starts .. ends - 1 from running sums [b, s, d]; 0 where none."""

    def up_to(index: jax.Array) -> jax.Array:
        found = jnp.take_along_axis(total, jnp.maximum(index - 1, 0)[..., None], axis=1)
        return jnp.where((index > 0)[..., None], found, jnp.zeros_like(found))

    length = jnp.maximum(ends - starts, 1).astype(total.dtype)[..., None]
    return (up_to(ends) - up_to(starts)) / (jnp.sqrt(length) if normalize else length)


def _fill(
    scores: jax.Array, starts: jax.Array, ends: jax.Array, low: jax.Array, high: jax.Array,
    budget: int, local_tokens: int, s: int,
) -> jax.Array:  # fmt: skip
    """Spends the budget: recent keys, then whole chunks in the order of their scores.

    Args:
      scores: [b, q, n]. starts, ends: [b, 1 or q, n] tokens of each chunk.
      low, high: [1 or b, q], the keys that may be read are low .. high - 1.
      s: stands for no key.

    Returns:
      [b, q, budget], increasing. Taking chunks in order, a part of the last one, is the choice of
      the highest token scores, ties going to the earlier token.
    """
    b, q, _ = scores.shape
    low, high = (jnp.broadcast_to(a, (b, q))[..., None] for a in (low, high))
    recent = jnp.minimum(min(local_tokens, budget), high - low)
    first = jnp.maximum(starts, low)
    count = jnp.maximum(jnp.minimum(ends, high - recent) - first, 0)
    order = jnp.argsort(jnp.where(count > 0, -scores, jnp.inf), axis=-1, stable=True)
    first, count = (jnp.take_along_axis(a, order, axis=-1) for a in (first, count))
    until = jnp.cumsum(count, axis=-1)
    slot = jnp.arange(budget, dtype=jnp.int32)

    def place(until: jax.Array) -> jax.Array:
        return jnp.searchsorted(until, slot, side="right")

    chunk = jnp.minimum(jax.vmap(jax.vmap(place))(until), until.shape[-1] - 1)
    until, first, count = (jnp.take_along_axis(a, chunk, axis=-1) for a in (until, first, count))
    slot = slot[None, None]
    chosen = first + slot - (until - count)
    chosen = jnp.where((slot < until) & (slot < budget - recent), chosen, s)
    behind = slot - (budget - recent)
    chosen = jnp.where(behind >= 0, high - recent + behind, chosen)
    return jnp.sort(chosen, axis=-1).astype(jnp.int32)


def dhsa_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t g d"],
    value: Float[Array, "b t g e"],
    bounds: Int[Array, "b n"],
    *,
    budget: int,
    block_q: int = 64,
    local_tokens: int = 64,
    normalize: bool = True,
    window: int | None = None,
) -> Float[Array, "b t h e"]:
    """Attention of blocks of queries to the tokens of the chunks that fit them best: the prefill.

    Args:
      query, key, value: as the attention uses them.
      bounds: chunk starts and the length, of `dhsa_boundaries`; or every c-th token, which with
        `normalize=False` is the usual choice of fixed blocks by their means.
      budget, block_q, local_tokens, normalize, window: see `dhsa_select`.

    Returns:
      Output in the dtype of `query`. Every query sees only itself and keys before it, but the
      choice of the keys looks ahead to the end of its block and of the last chunk.

    Time: O(t n / block_q + t budget) per head.

    Example: >>> dhsa_attention(q, k, v, bounds, budget=256).shape == v.shape
    """
    index = dhsa_select(
        query, key, bounds, budget=budget, block_q=block_q, local_tokens=local_tokens,
        normalize=normalize, window=window,
    )  # fmt: skip
    return gathered_attention(query, key, value, index, block_q=block_q)


class DHSAttention(SequenceMixer):
    """Multi-head attention to a budget of tokens, chosen by chunks; causal and decodable.

    Each query is a block of its own; see the module for how boundaries are decided as tokens come.
    Training the mixer leaves the predictor alone, since a choice has no gradient; train it with
    `boundary_loss`.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      budget: keys that a query reads.
      local_tokens: most recent keys that are always read, at most `budget`. Paper: 64.
      window: keys on each side of a gap that the predictor sees. Paper: 4.
      hidden: width of the predictor. Paper: 256.
      nms: tokens between boundaries are more than this. Paper: 8.
      theta: boundaries have logits above it; None is no threshold. Official code: 1.1, its
        threshold of ratios, for logits too.
      normalize: score a chunk by its mean times sqrt(its length).
      **options: of `SequenceMixer`, except dropout_rate.

    Raises:
      ValueError: when a size is out of range.
      NotImplementedError: for dropout of the weights.
    """

    sites = HEAD_SITES
    grouped = rotary = True
    packed = drops = False

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        budget: int = 1024,
        local_tokens: int = 64,
        window: int = 4,
        hidden: int = 256,
        nms: int = 8,
        theta: float | None = 1.1,
        normalize: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        _check("DHSAttention", budget, local_tokens, 1)
        if nms < 0:
            raise ValueError(f"DHSAttention: nms={nms} must be at least 0.")
        self.budget, self.local_tokens, self.nms = budget, local_tokens, nms
        self.theta, self.normalize = theta, normalize
        groups = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(groups, rngs=rngs)
        self.value = self.projection(groups, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)
        self.predictor = BoundaryPredictor(
            math.prod(groups), window, hidden, param_dtype=self.param_dtype, rngs=rngs
        )

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys, values, running sums of the keys' mean, and the logit known with each token."""
        groups = (self.num_kv_heads, self.head_dim)
        return {"key": groups, "value": groups, "total": (self.head_dim,), "logit": ()}

    def token_dtypes(self, dtype: Any) -> dict[str, Any]:
        """Sums and logits are at least float32."""
        wide = accumulator_dtype(dtype)
        return {"total": wide, "logit": wide}

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        q, k = self.rotate(call, q, k)
        dtype, b = accumulator_dtype(q.dtype), x.shape[0]
        total = jnp.cumsum(k.mean(2, dtype=dtype), axis=1)
        start = jnp.broadcast_to(jnp.asarray(call.start, jnp.int32), (b,))
        past = None
        if call.cache is not None:
            back = start[:, None] - jnp.arange(2 * self.predictor.window - 1, 0, -1)[None]
            rows = jnp.arange(b, dtype=jnp.int32)[:, None]
            past = call.cache.tokens["key"][rows, jnp.maximum(back, 0)]
            past = jnp.where((back >= 0)[..., None, None], past, jnp.zeros_like(past))
            before = call.cache.tokens["total"][rows, jnp.maximum(start - 1, 0)[:, None]]
            before = jnp.where((start > 0)[:, None, None], before, jnp.zeros_like(before))
            total = total + before.astype(dtype)
        logit = self.predictor(k, past)
        stored = call.store(key=k, value=v, total=total, logit=logit)
        starts = self.starts(stored["logit"])

        def some(q: jax.Array, at: jax.Array) -> jax.Array:
            index = self.select(q, stored["total"], starts, at)
            return gathered_attention(q, stored["key"], stored["value"], index, at=at)

        at = start[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
        read = min(self.budget, stored["key"].shape[1])
        return in_parts(some, max(1, GATHERED_KEYS // read), q, at)

    def starts(self, logit: Float[Array, "b s"]) -> Int[Array, "b n"]:
        """First tokens of all chunks but the first, in order; s where there are no more.

        Args:
          logit: of the gap behind token j - window, at token j.
        """
        s, w, nms = logit.shape[1], self.predictor.window, self.nms
        j = jnp.arange(s, dtype=jnp.int32)[None]
        logit = jax.lax.stop_gradient(jnp.where(j >= 2 * w - 1, logit, -jnp.inf))
        wide = jnp.pad(logit, ((0, 0), (nms, nms)), constant_values=-jnp.inf)
        best = ~jnp.isneginf(logit) if self.theta is None else logit > self.theta
        for i in range(nms):  # a peak exceeds what comes before and equals what comes after it
            best = best & (logit > wide[:, i : i + s]) & (logit >= wide[:, nms + 1 + i :][:, :s])
        n = s // (nms + 1) + 1
        found = jax.vmap(lambda row: jnp.nonzero(row, size=n, fill_value=s)[0])(best)
        return jnp.where(found < s, found.astype(jnp.int32) - w + 1, s)

    def select(
        self,
        query: Float[Array, "b t h d"],
        total: Float[Array, "b s d"],
        starts: Int[Array, "b n"],
        at: Int[Array, "b t"],
    ) -> Int[Array, "b t r"]:
        """The keys that each query reads, from what was known when it came.

        Args:
          query: as the attention uses it.
          total: running sums of the keys' mean over heads.
          starts: of chunks, from `starts`.
          at: index of each query.

        Memory: O(t n).
        """
        b, s = total.shape[:2]
        # a boundary counts once all gaps that could suppress it are known
        decided = starts + (self.predictor.window - 1 + self.nms)
        known = (decided[:, None] <= at[..., None]) & (starts < s)[:, None]  # [b, t, n]
        starts = jnp.pad(starts, ((0, 0), (1, 0)))
        until = jnp.concatenate([starts[:, 1:], jnp.full((b, 1), s, jnp.int32)], axis=1)
        begun = jnp.pad(known, ((0, 0), (0, 0), (1, 0)), constant_values=True)
        closed = jnp.pad(known, ((0, 0), (0, 0), (0, 1)))
        high = at + 1
        ends = jnp.where(closed, until[:, None], high[..., None])
        ends = jnp.where(begun, ends, starts[:, None])
        q = query.mean(2, dtype=total.dtype)
        means = _means(total, starts, jnp.minimum(until, s), self.normalize)
        scores = jnp.einsum("btd,bnd->btn", q, means)
        running = jnp.take_along_axis(starts, begun.sum(-1, dtype=jnp.int32) - 1, axis=1)
        growing = _means(total, running, high, self.normalize)
        growing = (q * growing).sum(-1, keepdims=True)
        scores = jnp.where(closed, scores, growing)
        scores = jax.lax.stop_gradient(scores)
        low, budget = jnp.zeros_like(at), min(self.budget, s)
        return _fill(scores, starts[:, None], ends, low, high, budget, self.local_tokens, s)


def _check(name: str, budget: int, local: int, block_q: int) -> None:
    if budget < 1 or local < 0 or block_q < 1:
        raise ValueError(
            f"{name}: budget={budget} and block_q={block_q} must be at least 1, and "
            f"local_tokens={local} at least 0."
        )


def _example() -> tuple[DHSAttention, jax.Array]:
    module = DHSAttention(
        4, 16, num_kv_heads=2, budget=6, local_tokens=2, window=1, hidden=8, nms=1, theta=None,
        rope_base=1e4, rngs=nnx.Rngs(0),
    )  # fmt: skip
    return module, jax.random.normal(jax.random.key(1), (2, 14, 16))


def _picture() -> dict[str, jax.Array]:
    """Keys read by blocks of 4 queries, in a text of four topics."""
    t = 32
    topic = jnp.array([0, 1, 0, 2])[
        jnp.searchsorted(jnp.array([7, 16, 22]), jnp.arange(t), side="right")
    ]
    x = jax.nn.one_hot(topic, 4)[None, :, None]
    bounds = jnp.array([[0, 7, 16, 22, t]], jnp.int32)
    index = dhsa_select(x, x, bounds, budget=14, block_q=4, local_tokens=4)
    read = (index[0][..., None] == jnp.arange(t)[None, None]).any(1)
    seen = jnp.repeat(read, 4, axis=0) & jnp.tri(t, dtype=bool)
    return {"14 keys per block of 4 queries": seen.astype(jnp.float32)}


SPEC = Mechanism(
    id="dhsa",
    title="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
    arxiv="2510.24606",
    year=2025,
    code="xiongsiheng/DHSA",
    function=dhsa_attention,
    module=DHSAttention,
    causal=True,
    bidirectional=False,
    cache="dense",
    segment_ids=False,
    kernel="einsum",
    cost="O(T n / b + T budget) for n chunks, query blocks of b tokens (1 in the module)",
    reduces_to={"budget >= T": "multi_head_attention"},
    picture=_picture,
    reading="the causal form of the boundaries that the module uses; and that blocks of the future "
    "do not compete for places in dhsa_block_mask.",
    example=_example,
)
