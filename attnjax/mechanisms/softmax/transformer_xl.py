"""Transformer-XL: scores of content and distance, and a memory of earlier segments.

    s_ij = ((q_i + u) · k_j + q_i · r_{i-j} + β_{i-j}) / sqrt(d)

    sinusoids (Transformer-XL)      r_n = W_r R_n,  β_n = v · r_n,  R_n the sinusoid of distance n
    learned (RMHA of labmlai)       r_n and β_n are tables, up to a largest distance

u and v are learned by head: how much content and distance count for every query alike. Keys and
values also come from the memory, the inputs of the layer in earlier segments, without gradient.
Distances are differences of indices in the row (memory first), not of `positions`.

Reference: Dai et al., "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
2019, arXiv:1901.02860; official code kimiyoung/transformer-xl. The learned form equals
labmlai/annotated_deep_learning_paper_implementations (relative multi-head attention).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnjax.checks import check_qkv
from attnjax.dense import qk_scores, softmax_weights, weighted_values
from attnjax.layers import LayerNorm, add_bias
from attnjax.masks import Window
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels import tilemath

Encoding = Literal["sinusoid", "learned"]
Residual = Literal["post", "pre"]
_normal = nnx.initializers.normal(0.02)


def transformer_xl_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h e"],
    relative: Float[Array, "n h d"],
    *,
    content_bias: Float[Array, "h d"] | None = None,
    relative_bias: Float[Array, "n h"] | None = None,
    mask: Bool[Array, "#b #h #t #s"] | None = None,
) -> Float[Array, "b t h e"]:
    """Attention with relative scores; the t queries are the last t of the s keys.

        s_ij = ((q_i + u) · k_j + q_i · r_{i-j} + β_{i-j}) / sqrt(d),   o = softmax(s) v

    Args:
      query, key, value: shapes as annotated.
      relative: r, from the largest distance s - 1 down to 0 (n = s), or down to -(t - 1)
        (n = s + t - 1) where queries also look ahead.
      content_bias: u. None is 0.
      relative_bias: β, in the order of `relative`. None is 0.
      mask: True = attend; None is causal where n = s and everything otherwise.

    Returns:
      Output in the dtype of `query`.

    Memory: O(t n) per head.

    Raises:
      ValueError: on shapes that do not fit together.

    Example: >>> transformer_xl_attention(q, k, v, jnp.zeros((k.shape[1], *k.shape[2:]))).shape
    """
    check_qkv("transformer_xl_attention", query, key, value)
    t, s, n = query.shape[1], key.shape[1], relative.shape[0]
    if relative.shape[1:] != key.shape[2:] or n not in (s, s + t - 1) or t > s:
        raise ValueError(
            f"transformer_xl_attention: relative must have shape [{s}, heads, width] (causal) or "
            f"[{s + t - 1}, heads, width] (both directions) for query {query.shape} and key "
            f"{key.shape}, got {relative.shape}; the queries are the last of the keys."
        )
    if mask is None and n == s:
        mask = (jnp.arange(s)[None] <= jnp.arange(t)[:, None] + (s - t))[None, None]
    content = query if content_bias is None else add_bias(query, content_bias)
    far = relative_shift(relative_products(query, relative, relative_bias), s)
    scores = qk_scores(content, key) + far
    return weighted_values(softmax_weights(scores, mask)[0], value).astype(query.dtype)


def relative_products(
    query: Float[Array, "b t h d"],
    relative: Float[Array, "n h d"],
    relative_bias: Float[Array, "n h"] | None = None,
) -> Float[Array, "b h t n"]:
    """(q_i · r_n + β_n) / sqrt(d) for all distances n."""
    dtype = tilemath.accumulator_dtype(query.dtype)
    products = jnp.einsum("bthd,nhd->bhtn", query.astype(dtype), relative.astype(dtype))
    if relative_bias is not None:
        products = products + relative_bias.astype(dtype).T[None, :, None]
    return products * jnp.asarray(query.shape[-1] ** -0.5, dtype)


def relative_shift(x: Float[Array, "b h t n"], s: int) -> Float[Array, "b h t s"]:
    """Turns columns of falling distance into columns of keys: y[i, j] = x[i, j + t - 1 - i].

    A row is one element further left than the row above, which is a reshape and no gather. Where
    the index would leave x (keys behind the query, when n = s) the result is arbitrary but finite.
    """
    b, h, t, n = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, max(s + 1 - n, 0))))
    step = x.shape[-1] - 1
    flat = x.reshape(b, h, -1)[..., t - 1 : t - 1 + t * step]
    return flat.reshape(b, h, t, step)[..., :s]


def sinusoids(distances: np.ndarray, features: int) -> np.ndarray:
    """R: [distances, features], sines of all frequencies, then cosines.

    Raises:
      ValueError: when `features` is odd.
    """
    if features % 2:
        raise ValueError(
            f"transformer_xl: sinusoids need an even width, got {features}; use encoding='learned'."
        )
    angle = distances[:, None] / 10000 ** (np.arange(0, features, 2) / features)[None]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)


def next_memory(
    memory: Float[Array, "b m f"] | None, hidden: Float[Array, "b t f"], length: int
) -> Float[Array, "b n f"]:
    """The last `length` of memory and hidden states together, without gradient."""
    if length < 0:
        raise ValueError(f"transformer_xl: a memory of {length} tokens is less than none.")
    both = hidden if memory is None else jnp.concatenate([memory.astype(hidden.dtype), hidden], 1)
    return jax.lax.stop_gradient(both[:, max(both.shape[1] - length, 0) :])


class TransformerXLAttention(SequenceMixer):
    """Multi-head `transformer_xl_attention` with segment memory.

    A call sees its own tokens; with a cache also all tokens in it; `segment` sees a memory of
    hidden states, for training on long texts. `positions` change nothing, see above.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      encoding: "sinusoid", or "learned" tables that start at 0.
      max_distance: largest distance of the learned tables, in tokens. labmlai: 4096.
      window: most recent tokens that a query sees, itself included ("same length" of the official
        code); None is all.
      residual: None gives the attention alone; "post" LayerNorm(x + y) as the official layer, "pre"
        x + attention(LayerNorm([memory; x])), its option.
      biases: u and v (with learned tables, u alone) of another layer, shared with it, as the
        official code does where `untie_r` is off; None makes new ones.
      kernel_init: Paper: normal with standard deviation 0.02.
      use_bias: of the value and output projections; queries and keys have none.
      rngs: stream `params`.
      **options: of `SequenceMixer`.
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
        encoding: Encoding = "sinusoid",
        max_distance: int = 4096,
        window: int | None = None,
        residual: Residual | None = None,
        biases: tuple[nnx.Param[jax.Array], ...] | None = None,
        kernel_init: Any = _normal,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, kernel_init=kernel_init, rngs=rngs,
            **options,
        )  # fmt: skip
        name = type(self).__name__
        if encoding not in ("sinusoid", "learned"):
            raise ValueError(
                f"{name}: encoding={encoding!r} is unknown; use 'sinusoid' or 'learned'."
            )
        if residual not in (None, "post", "pre"):
            raise ValueError(
                f"{name}: residual={residual!r} is unknown; use None, 'post' or 'pre'."
            )
        if residual is not None and self.out_features != in_features:
            raise ValueError(
                f"{name}: residual={residual!r} adds input and output, but out_features="
                f"{self.out_features} differs from in_features={in_features}."
            )
        if max_distance < 1:
            raise ValueError(f"{name}: max_distance={max_distance} must be at least 1 token.")
        if encoding == "sinusoid":
            sinusoids(np.zeros(1), in_features)
        self.encoding, self.max_distance, self.residual = encoding, max_distance, residual
        self.window = None if window is None else Window(window)
        sizes = (num_heads, self.head_dim)
        plain: dict[str, Any] = dict(use_bias=False, rngs=rngs)
        self.query, self.key = (self.projection(sizes, **plain) for _ in range(2))
        self.value = self.projection(sizes, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)
        axes = ("heads", "head_dim")
        self.relative = self.table = self.table_bias = nnx.data(None)
        count = 1
        if encoding == "learned":
            tables = (2 * max_distance, *sizes)
            self.table = self.parameter(jnp.zeros(tables), (None, *axes))
            self.table_bias = self.parameter(jnp.zeros(tables[:2]), (None, "heads"))
        else:
            self.relative = self.projection(sizes, **plain)
            count = 2
        if biases is None:
            spread = 0.0 if encoding == "learned" else 0.02
            biases = tuple(
                self.parameter(spread * jax.random.normal(rngs.params(), sizes), axes)
                for _ in range(count)
            )
        if [b.shape for b in biases] != [sizes] * count:
            raise ValueError(
                f"{name}: biases must be {count} parameter(s) of shape [heads, width] = {sizes}, "
                f"got {[b.shape for b in biases]}."
            )
        self.content_bias = biases[0]
        self.position_bias = biases[1] if count == 2 else nnx.data(None)
        self.norm = nnx.data(None)
        if residual is not None:
            self.norm = LayerNorm(
                in_features, epsilon=1e-5, use_bias=True, param_dtype=self.param_dtype
            )

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys and values."""
        return dict.fromkeys(("key", "value"), (self.num_heads, self.head_dim))

    def segment(
        self,
        x: Float[Array, "b t f"],
        memory: Float[Array, "b m f"] | None,
        *,
        memory_length: int | None = None,
        encodings: Float[Array, "n f"] | None = None,
        **options: Any,
    ) -> Any:
        """One segment of a long text, which also sees the memory of the segments before it.

        Args:
          x: [b, t, in_features].
          memory: [b, m, in_features], what the last call returned; None at the start. It gets no
            gradient, and every query sees all of it that the module's window leaves.
          memory_length: tokens to keep for the next call; None keeps m, or t at the start.
          encodings: vectors of the distances, from m + t - 1 down, that replace the sinusoids.
          options: as in a call: mask over memory and segment, edits, capture, ...

        Returns:
          (y, memory), and captured arrays as a dict last.

        Raises:
          ValueError: for a memory of another batch or width.
          NotImplementedError: for segment_ids, valid or a cache.
        """
        name = type(self).__name__
        for label in ("segment_ids", "valid", "cache"):
            if options.get(label) is not None:
                raise NotImplementedError(
                    f"{name}.segment: {label} is not supported; a memory holds the one text that "
                    "the segment goes on, the same number of tokens in every row. Pass mask over "
                    "memory and segment, or call the module itself."
                )
        if memory is not None and memory.shape[::2] != x.shape[::2]:
            raise ValueError(
                f"{name}.segment: memory must have shape [batch, tokens, features] = "
                f"[{x.shape[0]}, m, {x.shape[2]}], got {memory.shape}."
            )
        call = self.begin(x, **options)
        y = self.finish(call, self.mix(call, memory, encodings))
        if memory_length is None:
            memory_length = x.shape[1] if memory is None else memory.shape[1]
        return call.tap.result(y, next_memory(memory, call.x, memory_length))

    def project(self, call: Call, source: jax.Array) -> tuple[jax.Array, ...]:
        """Queries of the new tokens; keys and values of `source`, memory first."""
        return self.query(source[:, -call.x.shape[1] :]), self.key(source), self.value(source)

    def mix(
        self, call: Call, memory: jax.Array | None = None, encodings: jax.Array | None = None
    ) -> jax.Array:
        """Z [b, t, h, d]."""
        source, t = call.x, call.x.shape[1]
        if memory is not None:
            call = dataclasses.replace(call, start=memory.shape[1])
            old = jax.lax.stop_gradient(memory).astype(source.dtype)
            source = jnp.concatenate([old, source], axis=1)
        if self.residual == "pre":
            source = self.norm(source)  # pyright: ignore[reportOptionalCall]
        cached = call.cache is not None
        q, k, v = self.heads(call, *self.project(call, source))
        stored = call.store(key=k, value=v)
        k, v = stored["key"], stored["value"]
        s = k.shape[1]
        ahead = 0 if self.causal else t - 1
        products = self._relative(q, s - 1, -ahead, encodings)
        if cached:  # every row stands elsewhere
            query = call.start[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
            key = jnp.arange(s, dtype=jnp.int32)
            column = s - 1 - jnp.maximum(query[..., None] - key[None, None], 0)
            column = jnp.broadcast_to(column[:, None], (*products.shape[:3], s))
            far = jnp.take_along_axis(products, column, axis=3)
        else:
            far = relative_shift(products, s)
        near = qk_scores(add_bias(q, self.content_bias[...]), k)
        scores = self.edit_scores(call, near + far)
        weights = softmax_weights(scores, call.keep(s, self.window))[0]
        return weighted_values(self.edit_weights(call, weights), v).astype(q.dtype)

    def finish(self, call: Call, z: jax.Array) -> jax.Array:
        """The output, with the residual connection where there is one."""
        y = super().finish(call, z)
        if self.norm is None:
            return y
        y = call.x.astype(y.dtype) + y
        return self.norm(y) if self.residual == "post" else y

    def _relative(
        self, query: jax.Array, first: int, last: int, encodings: jax.Array | None
    ) -> jax.Array:
        """(q_i · r_n + β_n) / sqrt(d) [b, h, t, n] of the distances first, first - 1, ..., last."""
        if self.relative is None:
            farthest = max(first, 1 - last)
            if farthest > self.max_distance:
                raise ValueError(
                    f"{type(self).__name__}: {first + 1} keys are {farthest} tokens apart, the "
                    f"learned tables reach {self.max_distance}; make it with max_distance="
                    f"{farthest} or use a shorter memory or cache."
                )
            rows = slice(self.max_distance - first, self.max_distance - last + 1)
            return relative_products(query, self.table[...][rows], self.table_bias[...][rows])
        if encodings is None:
            table = sinusoids(np.arange(first, last - 1, -1), self.in_features)
            encodings = jnp.asarray(table, query.dtype)
        t, (n, d) = query.shape[1], (len(encodings), self.head_dim)
        query = add_bias(query, self.position_bias[...])
        if t * (n + d) >= n * d:
            return relative_products(query, self.relative(encodings))
        # in decoding W_r acts on the few queries, not on the distances of the whole cache
        dtype = tilemath.accumulator_dtype(query.dtype)
        kernel = self.relative.kernel[...].astype(dtype)
        query = jnp.einsum("bthd,mhd->bthm", query.astype(dtype), kernel)
        products = jnp.einsum("bthm,nm->bhtn", query, encodings.astype(dtype))
        return products * jnp.asarray(d**-0.5, dtype)


def _example() -> tuple[TransformerXLAttention, jax.Array]:
    init = nnx.initializers.lecun_normal()
    module = TransformerXLAttention(2, 16, kernel_init=init, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="transformer_xl",
    title="Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context",
    arxiv="1901.02860",
    year=2019,
    code="kimiyoung/transformer-xl",
    function=transformer_xl_attention,
    module=TransformerXLAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="einsum",
    cost="O(T (T + M)) with M tokens of memory",
    reduces_to={"content_bias = 0, relative = 0": "multi_head_attention"},
    golden=("transformer_xl_rel", "rmha_labml"),
    example=_example,
)
