"""Co4: queries, keys and values modulate each other; only the strongest tokens are attended.

    patches (q, k, v), a latent token (q_c, k_c, v_c), products by element:
    q' = q + q_c k,   k' = k + k_c q,   v' = v² + 2v + q_c k_c (1 + |v_c|)
    Q = [q_c; top(q')],  K = [k_c; top(k')],  V = [v_c; top(v')],   O = softmax(Q K^T / sqrt(d)) V

The first output row replaces the latent (a class token); the others are added to v' where top(v')
came from. top picks the largest k values of every channel on its own, so a row mixes channels of
different tokens. The cost is O(T) plus attention over k + 1 rows, k fixed. There is no output
projection.

This is the authors' code for vision. Their paper puts the transfer function of two-point neurons on
all three streams (`transfer="relu6"`): Φ(R, C) = relu6(R² + 2R + C (1 + |R|)), feed-forward drive R
and context C.

Reference: Adeel, "Beyond Attention: Toward Machines with Intrinsic Higher Mental States", 2025,
arXiv:2505.06257; official code ARIA-Funded-TREND/HMS.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.dense import qk_scores, softmax_weights, weighted_values
from attnjax.mixer import Call, SequenceMixer
from attnjax.spec import Mechanism

Transfer = Literal["vision", "plain", "relu6"]
Aggregation = Literal["topk", "max", "mean"]
Selection = Literal["channel", "token"]


def co4_attention(
    query: Float[Array, "b t c"],
    key: Float[Array, "b t c"],
    value: Float[Array, "b t c"],
    *,
    num_heads: int = 1,
    num_latents: int = 1,
    top_k: int = 12,
    transfer: Transfer = "vision",
    aggregation: Aggregation = "topk",
    selection: Selection = "channel",
    valid: Bool[Array, "b t"] | None = None,
) -> Float[Array, "b t c"]:
    """Attention of latents to the strongest modulated tokens.

    Args:
      query, key, value: of all tokens; the first `num_latents` are latents, the rest patches.
      num_heads: of the attention; divides c. Paper: 1.
      num_latents: L, at least 1; modulated streams are the mean over latents. Paper: 1.
      top_k: rows picked per stream, at most the number of patches; 0 reads the modulated values
        alone and leaves no attention beyond the latents. Paper: 12.
      transfer: "vision", or "plain" or "relu6" for Φ without or with its last step on all streams.
      aggregation: what stands for the patches in the attention: "topk"; "max", the same with one
        row; or "mean" over patches, whose output is added to no token.
      selection: "channel" picks values of every channel on its own, "token" whole tokens by their
        norm.
      valid: True for real tokens, which come first; padded patches are never picked.

    Returns:
      [b, t, c] in the dtype of `query`: latents, then patches.

    Memory: O(t c + k²).

    Raises:
      ValueError: on sizes or options out of range.

    Example: >>> co4_attention(q, k, v, top_k=4).shape
    """
    streams = modulate(query, key, value, num_latents=num_latents, transfer=transfer)
    picked = gather(streams, top_k, aggregation, selection, valid, num_latents)
    return _attend(
        (query, key, value), streams[2], picked, num_heads, num_latents,
        lambda scores, keep: softmax_weights(scores, keep)[0],
    )  # fmt: skip


def transfer_function(r: Float[Array, "..."], c: Float[Array, "..."]) -> Float[Array, "..."]:
    """Φ(R, C) = relu6(R² + 2R + C (1 + |R|)): drive R, context C, of shapes that broadcast."""
    return jax.nn.relu6(_drive(r, c))


def modulate(
    query: Float[Array, "b t c"],
    key: Float[Array, "b t c"],
    value: Float[Array, "b t c"],
    *,
    num_latents: int = 1,
    transfer: Transfer = "vision",
) -> tuple[Float[Array, "b n c"], Float[Array, "b n c"], Float[Array, "b n c"]]:
    """q', k' and v' of the n = t - L patches, the mean over latents.

    Raises:
      ValueError: when there is no latent or no patch, or for an unknown transfer.
    """
    t = query.shape[1]
    if not 1 <= num_latents < t:
        raise ValueError(
            f"co4: num_latents={num_latents} must be at least 1 and leave a patch of {t} tokens."
        )
    if transfer not in ("vision", "plain", "relu6"):
        raise ValueError(
            f"co4: transfer={transfer!r} is unknown; use 'vision', 'plain' or 'relu6'."
        )
    latents, patches = zip(
        *((x[:, :num_latents, None], x[:, None, num_latents:]) for x in (query, key, value)),
        strict=True,
    )
    (q_c, k_c, v_c), (q, k, v) = latents, patches  # [b, L, 1, c] and [b, 1, n, c]
    contexts = (q_c * k, k_c * q, q_c * k_c)
    if transfer == "vision":
        streams = (q + contexts[0], k + contexts[1], v * v + 2 * v + contexts[2] * (1 + abs(v_c)))
    else:
        law = transfer_function if transfer == "relu6" else _drive
        streams = tuple(law(r, c) for r, c in zip((q, k, v), contexts, strict=True))
    q, k, v = (x.mean(1) for x in streams)
    return q, k, v


def gather(
    streams: tuple[jax.Array, ...],
    top_k: int,
    aggregation: Aggregation,
    selection: Selection,
    valid: Bool[Array, "b t"] | None,
    num_latents: int,
) -> tuple[list[Float[Array, "b k c"]], Int[Array, "b k c"] | None, Bool[Array, "b k"] | None]:
    """Rows of the attention for each stream, where the values' rows came from, which are real.

    The places are None for a mean.

    Raises:
      ValueError: on an unknown option, or more rows than patches.
    """
    n = streams[0].shape[1]
    if aggregation not in ("topk", "max", "mean") or selection not in ("channel", "token"):
        raise ValueError(
            f"co4: aggregation={aggregation!r} must be 'topk', 'max' or 'mean' and selection="
            f"{selection!r} 'channel' or 'token'."
        )
    count = {"topk": top_k, "max": 1, "mean": 1}[aggregation]
    if not 0 <= count <= n:
        raise ValueError(f"co4: top_k={count} must be between 0 and the {n} patches.")
    keep = None if valid is None else valid[:, num_latents:]
    if aggregation == "mean":
        if keep is None:
            return [x.mean(1, keepdims=True) for x in streams], None, None
        amount = keep.sum(1, dtype=jnp.int32)[:, None, None]
        kept = [jnp.where(keep[..., None], x, jnp.zeros_like(x)) for x in streams]
        total = jnp.maximum(amount, 1).astype(streams[0].dtype)
        return [x.sum(1, keepdims=True) / total for x in kept], None, amount[:, :, 0] > 0
    real = None
    if keep is not None:  # the largest come first, so the real rows do
        amount = keep.sum(1, dtype=jnp.int32)[:, None]
        real = jnp.arange(count, dtype=jnp.int32)[None] < amount
    picked = [_largest(x, count, selection, keep) for x in streams]
    rows = [row for row, _ in picked]
    if real is not None:
        rows = [jnp.where(real[..., None], row, jnp.zeros_like(row)) for row in rows]
    return rows, picked[2][1], real


def scatter(
    rows: Float[Array, "b r c"],
    values: Float[Array, "b n c"],
    index: Int[Array, "b k c"] | None,
    real: Bool[Array, "b k"] | None,
    num_latents: int,
) -> Float[Array, "b t c"]:
    """Latents, then modulated values plus the attention's rows at the places they came from."""
    latents, others = rows[:, :num_latents], rows[:, num_latents:]
    values = values.astype(rows.dtype)
    if index is None:
        return jnp.concatenate([latents, values], axis=1)
    if real is not None:
        others = jnp.where(real[..., None], others, jnp.zeros_like(others))
    batch, _, channels = values.shape
    b = jnp.arange(batch, dtype=index.dtype)[:, None, None]
    c = jnp.arange(channels, dtype=index.dtype)[None, None]
    return jnp.concatenate([latents, values.at[b, index, c].add(others)], axis=1)


def _attend(
    full: tuple[jax.Array, ...],
    values: jax.Array,
    picked: tuple[list[jax.Array], jax.Array | None, jax.Array | None],
    num_heads: int,
    num_latents: int,
    weigh: Callable[[jax.Array, jax.Array | None], jax.Array],
) -> jax.Array:
    """Attention of latents and picked rows, put back: [b, t, c]; `weigh(scores, keep)` weights."""
    rows, index, real = picked
    q, k, v = (
        _split(jnp.concatenate([x[:, :num_latents], row], axis=1), num_heads)
        for x, row in zip(full, rows, strict=True)
    )
    weights = weigh(qk_scores(q, k), _visible(real, num_latents))
    z = weighted_values(weights, v).astype(q.dtype)
    return scatter(z.reshape(*z.shape[:2], -1), values, index, real, num_latents)


def _drive(r: jax.Array, c: jax.Array) -> jax.Array:
    return r * r + 2 * r + c * (1 + jnp.abs(r))


def _largest(
    x: jax.Array, count: int, selection: Selection, keep: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Rows [b, k, c] from the largest down, and the index of every entry."""
    measure = x
    if selection == "token":
        measure = jnp.square(x.astype(jnp.promote_types(x.dtype, jnp.float32))).sum(-1)[..., None]
    measure = jax.lax.stop_gradient(measure)
    if keep is not None:
        measure = jnp.where(keep[..., None], measure, jnp.full_like(measure, -jnp.inf))
    index = jax.lax.top_k(measure.swapaxes(1, 2), count)[1].swapaxes(1, 2)
    index = jnp.broadcast_to(index, (*index.shape[:2], x.shape[-1]))
    return jnp.take_along_axis(x, index, axis=1), index


def _split(x: jax.Array, num_heads: int) -> jax.Array:
    if x.shape[-1] % num_heads:
        raise ValueError(
            f"co4: the width {x.shape[-1]} must be a multiple of num_heads={num_heads}."
        )
    return x.reshape(*x.shape[:2], num_heads, -1)


def _visible(real: jax.Array | None, num_latents: int) -> jax.Array | None:
    """[b, 1, 1, L + k]: latents and the rows that are real."""
    if real is None:
        return None
    return jnp.pad(real, ((0, 0), (num_latents, 0)), constant_values=True)[:, None, None]


class Co4(SequenceMixer):
    """Projections and `co4_attention`. The first tokens are the latents.

    The sites "scores" and "weights" are those of the small attention, [b, h, L + k, L + k].

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`; without an output
        projection out_features is qkv_features. Paper: one head.
      num_latents, top_k, transfer, aggregation, selection: as in `co4_attention`.
      output_projection: whether there is one. Paper: none.
      rngs: stream `params`.
      **options: of `SequenceMixer`. Paper: use_bias=True.

    Raises:
      ValueError: when out_features needs an output projection.
    """

    sites = ("q", "k", "v", "scores", "weights", "z", "attn_out")
    directions = ("bidirectional",)
    packed = decodes = False

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        num_latents: int = 1,
        top_k: int = 12,
        transfer: Transfer = "vision",
        aggregation: Aggregation = "topk",
        selection: Selection = "channel",
        output_projection: bool = False,
        causal: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, causal=causal, rngs=rngs, **options
        )
        if not output_projection and self.out_features != num_heads * self.head_dim:
            raise ValueError(
                f"Co4: out_features={self.out_features} differs from qkv_features="
                f"{num_heads * self.head_dim}; make it with output_projection=True."
            )
        self.num_latents, self.top_k = num_latents, top_k
        self.transfer: Transfer = transfer
        self.aggregation: Aggregation = aggregation
        self.selection: Selection = selection
        sizes = (num_heads, self.head_dim)
        self.query, self.key, self.value = (self.projection(sizes, rngs=rngs) for _ in range(3))
        self.out = nnx.data(None)
        if output_projection:
            self.out = self.output_projection(rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x, first = call.x, self.num_latents
        heads = self.heads(call, self.query(x), self.key(x), self.value(x))
        q, k, v = (a.reshape(*a.shape[:2], -1) for a in heads)
        streams = modulate(q, k, v, num_latents=first, transfer=self.transfer)
        picked = gather(streams, self.top_k, self.aggregation, self.selection, call.valid, first)

        def weigh(scores: jax.Array, keep: jax.Array | None) -> jax.Array:
            weights = softmax_weights(self.edit_scores(call, scores), keep)[0]
            return self.edit_weights(call, weights)

        z = _attend((q, k, v), streams[2], picked, self.num_heads, first, weigh)
        return _split(z, self.num_heads)

    def finish(self, call: Call, z: jax.Array) -> jax.Array:
        """The output: z by all heads, projected where there is a projection."""
        if self.out is not None:
            return super().finish(call, z)
        z = call.tap.heads(z)
        return call.tap("attn_out", z.reshape(*z.shape[:2], -1))


def _example() -> tuple[Co4, jax.Array]:
    module = Co4(1, 8, top_k=4, use_bias=True, rngs=nnx.Rngs(0))
    # a key with clear winners: rounding to 16 bits may swap tokens of nearly equal strength
    return module, jax.random.normal(jax.random.key(4), (2, 17, 8))


def _picture() -> dict[str, Any]:
    """The transfer function over drive (down) and context (right), and its plain form."""
    grid = jnp.linspace(-3.0, 3.0, 25)
    r, c = jnp.meshgrid(grid, grid, indexing="ij")
    return {"Φ(R, C)": transfer_function(r, c), "R² + 2R + C (1 + |R|)": _drive(r, c)}


SPEC = Mechanism(
    id="co4",
    title="Beyond Attention: Toward Machines with Intrinsic Higher Mental States",
    arxiv="2505.06257",
    year=2025,
    code="ARIA-Funded-TREND/HMS",
    function=co4_attention,
    module=Co4,
    causal=False,
    bidirectional=True,
    kernel="einsum",
    cost="O(T + k^2)",
    golden=("co4",),
    reading="The vision code's form is exact. Contexts of relu6 on all streams, the mean over "
    "several latents, pooled aggregation and selection by token are our reading.",
    picture=_picture,
    example=_example,
)
