"""AnchorAttention: single keys ("stripes") kept for a whole group of queries, found by difference.

Queries come in groups of g = block · step. Group p always sees its core: the first block, the block
before the group, and the group itself up to each query. The largest score m_i of a query's core is
its anchor. A key between the first and the last of these is kept for the whole group when the mean
query of any of its blocks r scores it within θ of the block's mean anchor:

    C_i = {j <= i : j < b or j >= p g - b},  p = ⌊i / g⌋              m_i = max_{j∈C_i} s_ij
    S_p = {b <= j < p g - b : mean_r(q)·k_j / √d + θ >= mean_r(m) for some block r of the group}
    o_i = softmax attention to C_i ∪ S_p;  queries behind the last whole group see all before them

Nothing is sorted and no number of keys is fixed. It speeds up reading a prompt without training.
The choice is made from all queries of a group: a token may change which stripes earlier queries of
its group see (gradients never pass through the choice, and no key of the future is ever seen). So
tokens cannot be decoded one by one with the same result; the official code decodes densely.

The first kernel of the official repository has this partition. The kernels that it calls today
take the whole first group as first block and start the local part at the group, but look for
stripes in the same range: stripes before g count twice in the softmax, and the block before the
group is not seen. `partition="released"` is that behavior. It was established by reading.

Reference: Zhang et al., "AnchorAttention: Difference-Aware Sparse Attention with Stripe
Granularity", 2025, arXiv:2505.23520; official code yuzhouzhang9/Anchor-Attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnjax.attention import attention
from attnjax.checks import check_qkv
from attnjax.dense import qk_scores, softmax_weights
from attnjax.masks import BlockPattern, Causal, Mask, Or, Prefix, SinceGroup, Sink
from attnjax.merge import merge_attention
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels.tilemath import accumulator_dtype

PARTITIONS = ("disjoint", "released")


class Anchors(NamedTuple):
    """What a group of queries keeps, and why.

    Attributes:
      core: the part of the mask that does not depend on the queries.
      stripes: [b, h, n, t] booleans, key kept by group; n = ⌈t / (block step)⌉. A group that is not
        whole keeps none: its queries see everything before them.
      whole: [b, n] booleans, whether all queries of a group are there.
      anchor: [b, h, t], largest score of each query's core.
      pooled_query: [b, h, ⌈t / block⌉, d], mean query of each block.
      pooled_anchor: [b, h, ⌈t / block⌉], mean anchor of each block.
    """

    core: Or
    stripes: jax.Array
    whole: jax.Array
    anchor: jax.Array
    pooled_query: jax.Array
    pooled_anchor: jax.Array

    def mask(self) -> Mask:
        """Core, stripes, and everything for the queries of the last, incomplete group."""
        shown = self.stripes | ~self.whole[:, None, :, None]
        return Causal() & (self.core | BlockPattern(shown, self.group, 1))

    @property
    def group(self) -> int:
        """Queries per group."""
        return next(m.group for m in self.core.masks if isinstance(m, SinceGroup))


def find_anchors(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t g d"],
    *,
    block: int = 128,
    step: int = 16,
    theta: float = 12.0,
    partition: str = "disjoint",
    key_pool: bool = False,
    lengths: Int[Array, " b"] | None = None,
    scale: float | None = None,
) -> Anchors:
    """The keys that each group of queries keeps; no gradient passes through.

    Args:
      query, key: shapes as annotated; h a multiple of g.
      block: b, tokens pooled into one mean query. Paper: 128.
      step: blocks per group. Paper: 16.
      theta: θ in units of the scores (natural logarithm); infinity keeps all. Paper: 12.
      partition: "disjoint", or "released", see the module's text.
      key_pool: also keep keys by the scores of single queries with the mean key of their block, and
        leave out `scale` when comparing with the anchors, as an older path of the code does.
      lengths: [b] real tokens of each row; None is all.
      scale: None is d^-0.5.

    Cost: O(t (2 b + g) + t² / b) d. Memory: O(b (b + g) + t² / g) per head.

    Raises:
      ValueError: on sizes below 1, or an unknown partition.
    """
    _check_options("find_anchors", block, step, partition)
    query, key = lax.stop_gradient((query, key))
    size, t, h, d = query.shape
    group = block * step
    first, behind = (block, block) if partition == "disjoint" else (group, 0)
    dtype = accumulator_dtype(query.dtype)
    groups = -(-t // group)
    count = jnp.full((size,), t, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    whole = (jnp.arange(groups, dtype=jnp.int32)[None] + 1) * group <= count[:, None]
    later = ((0, 0), (0, groups * group - t), (0, 0), (0, 0))
    queries, keys = jnp.pad(query, later), jnp.pad(key, later)
    local = jnp.pad(keys, ((0, 0), (behind, 0), (0, 0), (0, 0)))  # index 0 is key -behind
    at = jnp.arange(groups * group, dtype=jnp.int32)
    blocks = None
    if key_pool:
        # the padding of the last block is left out of its mean
        real = jnp.clip(t - at[::block], 1, block).astype(dtype)
        blocks = keys.astype(dtype).reshape(size, groups * step, block, -1, d).sum(2)
        blocks = blocks / real[None, :, None, None]

    def of_block(r: jax.Array) -> Any:
        p = r // step
        rows = r * block + jnp.arange(block, dtype=jnp.int32)
        q = lax.dynamic_slice_in_dim(queries, r * block, block, 1)
        near = lax.dynamic_slice_in_dim(local, p * group, group + behind, 1)
        near_at = p * group - behind + jnp.arange(group + behind, dtype=jnp.int32)
        scores = jnp.concatenate(
            [qk_scores(q, keys[:, :first], scale), qk_scores(q, near, scale)], axis=3
        )
        places = jnp.concatenate([at[:first], near_at])
        seen = (places[None] >= 0) & (places[None] <= rows[:, None])
        anchor = jnp.where(seen[None, None], scores, -jnp.inf).max(-1)  # [b, h, block]
        real = (rows[None] < count[:, None]).astype(dtype)  # [b, block]
        total = jnp.maximum(real.sum(1), 1)[:, None]
        mean_q = (q.astype(dtype) * real[:, :, None, None]).sum(1) / total[..., None]
        mean_anchor = (anchor * real[:, None]).sum(2) / total
        pooled = mean_q.astype(dtype)[:, None]  # [b, 1, h, d]
        found = qk_scores(pooled, keys.astype(dtype), 1.0 if key_pool else scale)[:, :, 0]
        if blocks is not None:
            single = qk_scores(q.astype(dtype), blocks, 1.0)  # [b, h, block, n]
            best = jnp.where(real[:, None, :, None] > 0, single, -jnp.inf).max(2)
            found = jnp.maximum(found, jnp.repeat(best, block, axis=2))
        return anchor, mean_q, mean_anchor, found + theta >= mean_anchor[..., None]

    def of_group(p: jax.Array) -> Any:
        anchor, mean_q, mean_anchor, kept = lax.map(
            of_block, p * step + jnp.arange(step, dtype=jnp.int32)
        )
        between = (at >= block) & (at < p * group - block)
        return anchor, mean_q, mean_anchor, kept.any(0) & between[None, None]

    anchor, mean_q, mean_anchor, kept = lax.map(of_group, jnp.arange(groups, dtype=jnp.int32))
    used = -(-t // block)
    return Anchors(
        Or((Sink(first), SinceGroup(group, behind))),
        kept.transpose(1, 2, 0, 3)[..., :t] & whole[:, None, :, None],
        whole,
        anchor.transpose(2, 3, 0, 1, 4).reshape(size, h, -1)[..., :t],
        mean_q.transpose(2, 3, 0, 1, 4).reshape(size, h, -1, d)[:, :, :used],
        mean_anchor.transpose(2, 3, 0, 1).reshape(size, h, -1)[..., :used],
    )


def anchor_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    *,
    block: int = 128,
    step: int = 16,
    theta: float = 12.0,
    partition: str = "disjoint",
    key_pool: bool = False,
    lengths: Int[Array, " b"] | None = None,
    scale: float | None = None,
    gather: bool = True,
    return_residual: bool = False,
    implementation: str | None = None,
) -> Any:
    """Causal attention to first block, local blocks, and the stripes found by their difference.

    Args:
      query, key, value: shapes as annotated; h a multiple of g, and s = t.
      block, step, theta, partition, key_pool, lengths: see `find_anchors`.
      scale: None is d^-0.5.
      gather: True collects the stripes of a group, so that they fill whole tiles; False masks them
        where they stand, which visits every tile that holds one. The result is the same.
      return_residual: also return lse.
      implementation: as in `attnjax.attention`.

    Returns:
      Output [b, t, h, e] in the dtype of `query`, and lse [b, t, h] with `return_residual`.
      Gradients are those of masked softmax attention.

    Cost: `find_anchors`, then O(t (b + g + stripes of a group)) d.

    Raises:
      ValueError: on shapes that do not fit, sizes below 1, or an unknown partition.
    """
    name = "anchor_attention"
    check_qkv(name, query, key, value)
    _check_options(name, block, step, partition)
    if key.shape[1] != query.shape[1]:
        raise ValueError(
            f"{name}: reads whole prompts, so query and key must have the same length, got query "
            f"{query.shape} and key {key.shape}; decode with attnjax.attention."
        )
    found = find_anchors(
        query, key, block=block, step=step, theta=theta, partition=partition, key_pool=key_pool,
        lengths=lengths, scale=scale,
    )  # fmt: skip
    options: dict[str, Any] = dict(scale=scale, implementation=implementation, return_residual=True)
    t, group = query.shape[1], block * step
    dense = BlockPattern(~found.whole[:, None, :, None], group, t)
    if partition == "disjoint" and not gather:
        out, lse = attention(query, key, value, mask=found.mask(), **options)
        return (out, lse) if return_residual else out
    # released: keys of both parts are merged, which counts them twice
    core = attention(query, key, value, mask=Causal() & (found.core | dense), **options)
    if gather:
        stripes = _gathered(query, key, value, found.stripes, group, options)
    else:
        stripes = attention(
            query, key, value, mask=BlockPattern(found.stripes, group, 1), **options
        )
    out, lse = merge_attention([core, stripes])
    return (out, lse) if return_residual else out


def coverage(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t g d"],
    mask: Mask | Bool[Array, "#b #h t t"],
    scale: float | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How much a mask computes, and how much of dense causal attention it catches.

    Args:
      query, key: shapes as annotated.
      mask: causal, as from `find_anchors(...).mask()`.
      scale: None is d^-0.5.

    Returns:
      (visible pairs / causal pairs, mean probability mass of dense attention on visible keys).

    Memory: O(t²).
    """
    b, t, h, _ = query.shape
    causal = Causal().dense(t)
    weights, _ = softmax_weights(qk_scores(query, key, scale), causal)
    seen = mask.dense(t, batch=b, num_heads=h) if isinstance(mask, Mask) else mask
    seen = jnp.broadcast_to(seen, weights.shape)
    share = seen.astype(weights.dtype).sum() / (b * h * t * (t + 1) / 2)
    return share, jnp.where(seen, weights, 0).sum() / (b * h * t)


class AnchorAttention(SequenceMixer):
    """Multi-head `anchor_attention` with rotary positions, for prompts and training.

    The parameters are those of `MultiHeadAttention`, which decodes with them.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      block, step, theta: see `find_anchors`. Paper: 128, 16, 12.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: when block or step < 1.
    """

    sites = SCORE_SITES
    directions = ("causal",)
    grouped = rotary = True
    packed = decodes = False

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        block: int = 128,
        step: int = 16,
        theta: float = 12.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        _check_options("AnchorAttention", block, step, "disjoint")
        self.block, self.step, self.theta = block, step, theta
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        q, k = self.rotate(call, q, k)
        found = find_anchors(
            q, k, block=self.block, step=self.step, theta=self.theta,
            lengths=None if call.valid is None else call.count,
        )  # fmt: skip
        return self.attend(call, q, k, v, layout=found.mask())[0]


def _gathered(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    stripes: Bool[Array, "b h n t"],
    group: int,
    options: dict[str, Any],
) -> tuple[jax.Array, jax.Array]:
    """Attention to the stripes alone: (output, lse), group by group."""
    b, t, h, d = query.shape
    groups = stripes.shape[2]
    queries = jnp.pad(query, ((0, 0), (0, groups * group - t), (0, 0), (0, 0)))
    queries = queries.reshape(b, groups, group, h, d).swapaxes(0, 1)
    keys, values = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (key, value))

    @jax.checkpoint  # the backward pass collects the keys again instead of storing every group's
    def of_group(part: Any) -> Any:
        q, kept = part  # [b, g, h, d], [b, h, t]
        order = jnp.argsort(~kept, axis=-1, stable=True).swapaxes(1, 2)[..., None]  # [b, t, h, 1]
        k, v = (jnp.take_along_axis(x, order, axis=1) for x in (keys, values))
        seen = Prefix(kept.sum(-1, dtype=jnp.int32))
        return attention(q, k, v, mask=seen, **options)

    out, lse = lax.map(of_group, (queries, stripes.transpose(2, 0, 1, 3)))
    out = out.swapaxes(0, 1).reshape(b, groups * group, h, -1)[:, :t]
    return out, lse.swapaxes(0, 1).reshape(b, groups * group, h)[:, :t]


def _check_options(name: str, block: int, step: int, partition: str) -> None:
    for label, size in (("block", block), ("step", step)):
        if size < 1:
            raise ValueError(f"{name}: {label} must be at least 1, got {label}={size}.")
    if partition not in PARTITIONS:
        raise ValueError(f"{name}: partition={partition!r} is none of {', '.join(PARTITIONS)}.")


def _example() -> tuple[AnchorAttention, jax.Array]:
    module = AnchorAttention(
        4, 16, num_kv_heads=2, block=2, step=2, theta=0.2, rope_base=1e4, rngs=nnx.Rngs(0)
    )
    return module, jax.random.normal(jax.random.key(1), (2, 18, 16))


SPEC = Mechanism(
    id="anchor_attention",
    title="AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity",
    arxiv="2505.23520",
    year=2025,
    code="yuzhouzhang9/Anchor-Attention",
    function=anchor_attention,
    module=AnchorAttention,
    causal=True,
    bidirectional=False,
    segment_ids=False,
    kernel="flash",
    cost="O(T (block + group + stripes) + T^2 / block)",
    reduces_to={"theta=inf": "multi_head_attention"},
    reading="partition='released' and key_pool follow the code as it was read, not run; gradients, "
    "which the paper has none of, are those of attention with the choice held fixed.",
    golden=("anchor_attention",),
    example=_example,
)
