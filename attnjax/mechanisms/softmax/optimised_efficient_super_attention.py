"""Optimized, Efficient and Super attention: attention with fewer projections.

    Optimized   o_h = softmax(x W_Q^h (x W_K^h)^T / sqrt(d)) x_h          no W_V; 3 m² parameters
    Efficient   o_h = softmax(x W_Q^h x_h^T / sqrt(d)) x_h                no W_V, W_K; 2 m²
    Super       o_h = softmax(x W_Q^h x_h^T / sqrt(d)) (W_A x)_h          and W_A [T, T] on tokens

x_h is the h-th slice of the input's m channels; y = [o_1, ..., o_n] W_O. The paper calls the first
one Optimised, has a single head in the other two, and 4 m² parameters in standard attention.

W_A, the alignment kernel, mixes values along the sequence before they are attended to, so the
length is bounded by its size T; shorter inputs use its upper left corner, causal ones its lower
triangle with the diagonal. W_A starts at the identity, which makes Super equal to Efficient.

Reference: Hosseini and Hosseini, "You Need to Pay Better Attention: Rethinking the Mathematics of
Attention Mechanism", 2024, arXiv:2403.01643; no official code.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnjax.attention import attention
from attnjax.cache import DenseCache, TokenCache
from attnjax.cache.base import new_positions, write_rows
from attnjax.documents import document_starts
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels import tilemath

FORMS = ("optimized", "efficient", "super")


def super_attention(
    query: Float[Array, "b t h d"],
    x: Float[Array, "b t m"],
    kernel: Float[Array, "n n"] | None = None,
    *,
    causal: bool = False,
    **options: Any,
) -> Float[Array, "b t h d"]:
    """Attention whose keys are the input itself, and whose values are the input or W_A times it.

        o_h = softmax(q_h x_h^T / sqrt(d)) (W_A x)_h

    Args:
      query: q by head; h d = m. Paper: one head.
      x: the input.
      kernel: W_A with n >= t; None is the identity, which is Efficient attention.
      causal: token t sees tokens up to t, in W_A and in the softmax.
      options: of `attnjax.attention`. A mask does not reach into W_A.

    Returns:
      Output by head in the dtype of `query`.

    Raises:
      ValueError: on shapes that do not fit together.

    Example: >>> super_attention(x[:, :, None] @ w_q, x, kernel).shape
    """
    values = x if kernel is None else align(x, kernel, keep=_lower(x) if causal else None)
    k, v = (_split(a, query.shape[2]) for a in (x, values))
    return attention(query, k, v, is_causal=causal, **options)


def align(
    x: Float[Array, "b s m"],
    kernel: Float[Array, "n n"],
    *,
    rows: Int[Array, "b t"] | None = None,
    columns: Int[Array, "b s"] | None = None,
    keep: Bool[Array, "#b t s"] | None = None,
) -> Float[Array, "b t m"]:
    """Tokens mixed by the alignment kernel: y_t = Σ_j W_A[row_t, column_j] x_j.

    Args:
      x: tokens.
      kernel: W_A, for up to n tokens.
      rows, columns: place of the wanted and the given tokens in W_A; None counts from 0.
      keep: the pairs that take part; None is all of them.

    Returns:
      y in the dtype of `x`, summed in float32 or wider. Cost: O(t s m).

    Raises:
      ValueError: when there are more tokens than W_A has columns.
    """
    s, n = x.shape[1], kernel.shape[0]
    if kernel.shape != (n, n) or s > n:
        raise ValueError(
            f"align: {s} tokens need an alignment kernel of at least ({s}, {s}), got "
            f"{kernel.shape}; make the module with max_length >= {s}."
        )
    dtype = tilemath.accumulator_dtype(x.dtype)
    if columns is not None:
        assert rows is not None
        weights = kernel[rows[:, :, None], columns[:, None, :]]
    else:
        weights = kernel[None, :s, :s] if rows is None else kernel[rows][..., :s]
    weights = weights.astype(dtype)
    if keep is not None:
        weights = jnp.where(keep, weights, jnp.zeros((), dtype))
    if len(weights) == 1:
        return jnp.einsum("ts,bsm->btm", weights[0], x.astype(dtype)).astype(x.dtype)
    return jnp.einsum("bts,bsm->btm", weights, x.astype(dtype)).astype(x.dtype)


def _split(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def _lower(x: jax.Array) -> jax.Array:
    index = jnp.arange(x.shape[1])
    return (index[None, :] <= index[:, None])[None]


class OptimisedEfficientSuperAttention(SequenceMixer):
    """Attention without value projections: Optimized, Efficient or Super.

    The cache of Optimized is that of multi-head attention; Efficient keeps the input alone, half of
    it; Super keeps the input and W_A times it.

    Args:
      num_heads: n. Paper: 1 for Efficient and Super.
      in_features, out_features: as in `SequenceMixer`.
      qkv_features: width of all queries; None is `in_features`, which it must be where keys are
        slices of the input (Efficient, Super).
      form: "optimized", "efficient" or "super".
      max_length: of Super, the size of W_A in tokens (of one document where several are packed).
      **options: of `SequenceMixer`. `mask` is supported by Optimized and Efficient.

    Raises:
      ValueError: for another form, sizes that do not divide, or Super without max_length.
    """

    sites = SCORE_SITES
    directions = ("causal", "bidirectional")
    masked = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        form: str = "optimized",
        max_length: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        name = type(self).__name__
        width = in_features // num_heads
        if form not in FORMS:
            raise ValueError(f"{name}: form={form!r} is none of {', '.join(FORMS)}.")
        if in_features % num_heads or (form != "optimized" and self.head_dim != width):
            raise ValueError(
                f"{name}: values (and without W_K keys) are slices of the input, so in_features="
                f"{in_features} must be a multiple of num_heads={num_heads}, and qkv_features with "
                f"form={form!r} equal to it, got {self.head_dim * num_heads}."
            )
        if (form == "super") != (max_length is not None):
            raise ValueError(
                f"{name}: form={form!r} got max_length={max_length}; form='super' needs the number "
                "of tokens that its alignment kernel covers, the other forms have none."
            )
        self.form, self.max_length, self.value_dim = form, max_length, width
        # a mask would have to reach into the alignment kernel, which mixes tokens before it
        self.masked = form != "super"  # pyright: ignore[reportAttributeAccessIssue]
        heads = (num_heads, self.head_dim)
        self.query = self.projection(heads, rngs=rngs)
        self.key = nnx.data(self.projection(heads, rngs=rngs) if form == "optimized" else None)
        self.alignment = nnx.data(None)
        if max_length is not None:
            self.alignment = self.parameter(jnp.eye(max_length), (None, None))
        self.out = self.output_projection(width, rngs=rngs)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """Keys and slices of the input (Optimized), or what `token_shapes` names.

        Args:
          batch: rows.
          max_length: tokens per row; for Super not more than its own.
          dtype: of what is stored; None is the module's dtype, or that of the parameters.
        """
        self._require_decoding()
        dtype = (self.dtype or self.param_dtype) if dtype is None else dtype
        if self.form == "optimized":
            sizes = (batch, max_length, self.num_heads, self.head_dim, self.value_dim)
            return DenseCache.create(*sizes, dtype=dtype)
        if self.max_length is not None and max_length > self.max_length:
            raise ValueError(
                f"{type(self).__name__}: a cache of max_length={max_length} tokens is longer than "
                f"the alignment kernel of {self.max_length}."
            )
        return TokenCache.create(batch, max_length, self.token_shapes(), dtype)

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """The input; for Super also its aligned values."""
        names = ("x",) if self.form == "efficient" else ("x", "value")
        return dict.fromkeys(names, (self.in_features,))

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x, h = call.x, self.num_heads
        keys = _split(x, h) if self.key is None else self.key(x)
        values = x if self.alignment is None else self._aligned(call)
        q, k, v = self.heads(call, self.query(x), keys, _split(values, h))
        if self.form == "optimized" or call.cache is None:
            return self.attend(call, q, k, v)[0]
        self._refuse_edits(call)
        new = {"x": x, "value": values}
        stored = call.store(**{name: new[name] for name in self.token_shapes()})
        k, v = (_split(stored[name], h) for name in ("x", [*stored][-1]))
        cache, call.cache = call.cache, None
        z, _ = self.attend(call, q, k, v, q_offset=call.start)
        call.cache = cache
        return z

    def _aligned(self, call: Call) -> jax.Array:
        """W_A x of the new tokens [b, t, m]."""
        x, kernel = call.x, self.alignment[...]
        t = x.shape[1]
        if call.segment_ids is not None:
            ids = call.segment_ids
            index = lax.broadcasted_iota(jnp.int32, ids.shape, 1)
            places = index - document_starts(ids)
            keep = ids[:, :, None] == ids[:, None, :]
            keep = keep & _lower(x) if call.causal else keep
            return align(x, kernel, rows=places, columns=places, keep=keep)
        if call.cache is None:
            return align(x, kernel, keep=_lower(x) if call.causal else None)
        rows = new_positions(call.cache.length, t)
        past = write_rows(call.cache.tokens["x"], rows, x, call.valid).astype(x.dtype)
        keep = jnp.arange(past.shape[1], dtype=jnp.int32)[None, None, :] <= rows[:, :, None]
        return align(past, kernel, rows=rows, keep=keep)

    def _refuse_edits(self, call: Call) -> None:
        """The cache holds the input, from which keys and values are read without their edits."""
        tap = call.tap
        if tap.edits.k_add is not None or tap.edits_site("k") or tap.edits_site("v"):
            raise NotImplementedError(
                f"{type(self).__name__}: edits of k and v with a cache are not supported by "
                f"form={self.form!r}, which stores the input; edit whole sequences without a cache."
            )


def _example() -> tuple[OptimisedEfficientSuperAttention, jax.Array]:
    module = OptimisedEfficientSuperAttention(2, 16, form="super", max_length=32, rngs=nnx.Rngs(0))
    spread = 0.3 * jax.random.normal(jax.random.key(2), (32, 32))
    module.alignment[...] = module.alignment[...] + spread
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="optimised_efficient_super_attention",
    title="You Need to Pay Better Attention: Rethinking the Mathematics of Attention Mechanism",
    arxiv="2403.01643",
    year=2024,
    function=super_attention,
    module=OptimisedEfficientSuperAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2)",
    reduces_to={
        "form=optimized": "multi_head_attention with the identity as value projection",
        "form=super, W_A = 1": "form=efficient",
    },
    golden=("better_attention",),
    reading="There is no official code. Ours: W_A starts at the identity and is cut to its lower "
    "triangle when causal; more than one head without W_K, where every head reads its slice of the "
    "input; W_A starts anew with every packed document.",
    example=_example,
)
