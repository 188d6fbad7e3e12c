"""Neural attention: the score of a query and a key comes from a small network, not a dot product.

    q'_t = W_a q_t + b_a,   k'_j = W_c k_j + b_c                         to p numbers per head
    s_tj = L3 relu(L2 relu(L1 [q'_t; k'_j])),   o_t = Σ_j softmax_j(s_tj) v_j

There is no 1/sqrt(d). Both down-projections and the network are shared by all heads of a layer. The
first layer splits, L1 [q'; k'] = U q' + W k' + b, so the pairs are never concatenated.

The paper has one hidden layer, s = a · relu(W_h [q; k] + b_h) + b_a (`hidden_layers=1`); its code
has two of p and p/2 units, which is the default. The code's default p is head_dim // 32, which is 0
for narrow heads; here it is at least 2. In the code causality replaces a given mask; here both
hold. The language models of the paper use it in the first block only: "neural_attention, softmax".

Reference: "Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer
Models", 2025, arXiv:2502.17206; official code awayfromzel/neural-attention-research.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from attnjax.attention import DENSE_SCORES
from attnjax.checks import check_qkv
from attnjax.dense import softmax_weights, weighted_values
from attnjax.layers import Projection
from attnjax.masks import Mask
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels import tilemath

Network = Sequence[tuple[jax.Array, jax.Array]]
"""Layers (kernel [in, out], bias [out]): the first takes 2p inputs, the last gives 1."""

CHUNK = 64
"""Tokens per side of a tile: its hidden units are the largest array that the tiled form makes."""


def neural_attention(
    query: Float[Array, "b t h p"],
    key: Float[Array, "b s h p"],
    value: Float[Array, "b s h e"],
    network: Network,
    *,
    mask: Any = None,
    q_offset: Any = 0,
    chunk_size: int | None = None,
) -> Float[Array, "b t h e"]:
    """Attention whose scores are a network of the pair: o_t = Σ_j softmax_j(f(q'_t, k'_j)) v_j.

    Args:
      query, key: the down-projected q' and k', p numbers each. Paper: p = 2 to 8.
      value: as annotated.
      network: layers of f, relu between them; the first p inputs are the query's.
      mask: a mask of `attnjax.masks`, or booleans broadcastable to [b, h, t, s], True = attend;
        None attends everywhere. A row without keys gives 0.
      q_offset: absolute index of the first query, an integer or [b]; keys are at 0 .. s-1.
      chunk_size: tokens per side of a tile; None takes all pairs at once while t s <= 65536 and
        tiles of 64 x 64 beyond.

    Returns:
      Output in the dtype of `query`; scores and softmax are float32, float64 for float64.

    Memory: O(t + s) in tiles, forward and backward; O(t s p) at once.
    Cost: O(t s p^2); tiles that the mask leaves empty are skipped.

    Raises:
      ValueError: on shapes that do not fit together, or chunk_size < 1.

    Example: >>> neural_attention(q, k, v, network, mask=attnjax.masks.Causal()).shape
    """
    name = "neural_attention"
    check_qkv(name, query, key, value)
    _check_network(name, query, key, network)
    b, t, h, _ = query.shape
    s = key.shape[1]
    if chunk_size is None:
        chunk_size = None if t * s <= DENSE_SCORES else CHUNK
    elif chunk_size < 1:
        raise ValueError(f"{name}: chunk_size={chunk_size} must be at least 1 token, or None.")
    if not (mask is None or isinstance(mask, Mask)):
        mask = jnp.broadcast_to(mask, (*mask.shape[:-2], t, s))
    if chunk_size is None or chunk_size >= max(t, s):
        keep = mask.dense(t, s, q_offset=q_offset) if isinstance(mask, Mask) else mask
        weights, _ = softmax_weights(neural_scores(query, key, network), keep)
        return weighted_values(weights, value).astype(query.dtype)
    return _tiled(query, key, value, network, mask, q_offset, chunk_size)


def neural_scores(
    query: Float[Array, "b t h p"], key: Float[Array, "b s h p"], network: Network
) -> Float[Array, "b h t s"]:
    """Scores f(q'_t, k'_j) of all pairs, in float32 or wider. Memory: O(t s p)."""
    return _pairs(*_first_layer(query, key, network), network)


def _first_layer(query: jax.Array, key: jax.Array, network: Network) -> tuple[jax.Array, jax.Array]:
    """The query's and the key's share of the first layer, whose sum it is."""
    dtype = tilemath.accumulator_dtype(query.dtype)
    kernel, bias = (x.astype(dtype) for x in network[0])
    p = query.shape[-1]
    of_key = key.astype(dtype) @ kernel[p:] + bias[None, None, None]
    return query.astype(dtype) @ kernel[:p], of_key


def _pairs(of_query: jax.Array, of_key: jax.Array, network: Network) -> jax.Array:
    """Scores [b, h, t, s] from the two shares [b, t, h, n], [b, s, h, n] of the first layer."""
    x = of_query[:, :, None] + of_key[:, None]  # [b, t, s, h, n]
    for kernel, bias in network[1:]:
        bias = bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + bias.shape)
        x = jax.nn.relu(x) @ kernel.astype(x.dtype) + bias
    return x[..., 0].transpose(0, 3, 1, 2)


def _tiled(
    query: jax.Array, key: jax.Array, value: jax.Array, network: Network, mask: Any, q_offset: Any,
    c: int,
) -> jax.Array:  # fmt: skip
    """Online softmax over tiles of c x c pairs, which the backward pass makes again."""
    b, t, h, _ = query.shape
    s, e = key.shape[1], value.shape[3]
    u, w = _first_layer(query, key, network)
    dtype = u.dtype
    u, w, v = (_chunks(x, c) for x in (u, w, value.astype(dtype)))
    start = jnp.asarray(q_offset, jnp.int32).reshape(-1, 1, 1, 1)
    if mask is not None and not isinstance(mask, Mask):
        sides = ((0, u.shape[0] * c - t), (0, w.shape[0] * c - s))
        mask = jnp.pad(mask, ((0, 0),) * (mask.ndim - 2) + sides)
    rows, heads = jnp.arange(b).reshape(-1, 1, 1, 1), jnp.arange(h).reshape(1, -1, 1, 1)

    def visible(i: jax.Array, j: jax.Array) -> jax.Array:
        q = (i * c + jnp.arange(c, dtype=jnp.int32)).reshape(1, 1, -1, 1)
        k = (j * c + jnp.arange(c, dtype=jnp.int32)).reshape(1, 1, 1, -1)
        real = k < s
        if mask is None:
            return real
        if isinstance(mask, Mask):
            return real & mask.predicate(rows, heads, q + start, k)
        lead = (jnp.zeros_like(i),) * (mask.ndim - 2)
        part = lax.dynamic_slice(mask, (*lead, i * c, j * c), (*mask.shape[:-2], c, c))
        return real & part.reshape((1,) * (4 - part.ndim) + part.shape)

    @jax.checkpoint
    def of_queries(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        i, u_i = args

        def tile(carry: Any, w_j: jax.Array, v_j: jax.Array, keep: jax.Array) -> Any:
            top, total, out = carry
            scores = jnp.where(keep, _pairs(u_i, w_j, network), -jnp.inf)
            new = jnp.maximum(top, lax.stop_gradient(scores.max(-1)))
            safe = jnp.where(jnp.isneginf(new), jnp.zeros_like(new), new)
            old, p = jnp.exp(top - safe), jnp.exp(scores - safe[..., None])
            added = jnp.einsum("bhts,bshe->bhte", p, v_j)
            return new, total * old + p.sum(-1), out * old[..., None] + added

        @jax.checkpoint
        def step(carry: Any, inputs: Any) -> tuple[Any, None]:
            j, w_j, v_j = inputs
            keep = visible(i, j)
            return lax.cond(keep.any(), tile, lambda carry, *_: carry, carry, w_j, v_j, keep), None

        empty = jnp.full((b, h, c), -jnp.inf, dtype), jnp.zeros((b, h, c), dtype)
        carry = (*empty, jnp.zeros((b, h, c, e), dtype))
        (_, total, out), _ = lax.scan(step, carry, (jnp.arange(len(w), dtype=jnp.int32), w, v))
        return out / jnp.where(total == 0, jnp.ones_like(total), total)[..., None]

    out = lax.map(of_queries, (jnp.arange(len(u), dtype=jnp.int32), u))  # [n, b, h, c, e]
    out = out.transpose(1, 0, 3, 2, 4).reshape(b, -1, h, e)
    return out[:, :t].astype(query.dtype)


def _chunks(x: jax.Array, c: int) -> jax.Array:
    """Chunks of c tokens: x [b, t, ...] as [n, b, c, ...], with zeros behind."""
    b, t = x.shape[:2]
    x = jnp.pad(x, ((0, 0), (0, -t % c)) + ((0, 0),) * (x.ndim - 2))
    return x.reshape(b, -1, c, *x.shape[2:]).swapaxes(0, 1)


def _check_network(name: str, query: jax.Array, key: jax.Array, network: Network) -> None:
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{name}: query and key must have the same heads, got query {query.shape} and key "
            f"{key.shape}; repeat the heads of grouped keys."
        )
    widths = [kernel.shape[1] for kernel, _ in network]
    sizes = [2 * query.shape[3], *widths]
    fits = len(network) > 1 and sizes[-1] == 1
    for (kernel, bias), pair in zip(network, itertools.pairwise(sizes), strict=True):
        fits &= kernel.shape == pair and bias.shape == pair[1:]
    if not fits:
        raise ValueError(
            f"{name}: network must be two or more layers (kernel [in, out], bias [out]) from 2 p = "
            f"{2 * query.shape[3]} inputs to 1 output, got kernels "
            f"{[kernel.shape for kernel, _ in network]} and biases {[x.shape for _, x in network]}."
        )


class NeuralAttention(SequenceMixer):
    """Multi-head `neural_attention`; a drop-in for a self-attention layer.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      projection_dim: p, to which queries and keys are projected; None is head_dim / 32, at least 2.
        With a p this small every ReLU of a pair may be off, which makes its row uniform: raise p
        where attention stays flat.
      hidden_layers: 2 (code: p and p/2 units) or 1 (paper: p units).
      chunk_size: as in `neural_attention`.
      **options: of `SequenceMixer`. Code: no biases outside of the score network.

    Raises:
      ValueError: when projection_dim or hidden_layers is out of range.
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
        projection_dim: int | None = None,
        hidden_layers: int = 2,
        chunk_size: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        p = max(2, self.head_dim // 32) if projection_dim is None else projection_dim
        if hidden_layers not in (1, 2):
            raise ValueError(
                f"NeuralAttention: hidden_layers={hidden_layers} must be 1 (paper) or 2 (code)."
            )
        if p < hidden_layers:
            raise ValueError(
                f"NeuralAttention: projection_dim={p} leaves a hidden layer of p // 2 = 0 units; "
                f"pass projection_dim >= {hidden_layers}."
            )
        self.projection_dim, self.chunk_size = p, chunk_size
        heads = (num_heads, self.head_dim)
        self.query, self.key, self.value = (self.projection(heads, rngs=rngs) for _ in range(3))
        self.query_down = self._linear(self.head_dim, p, "head_dim", rngs)
        self.key_down = self._linear(self.head_dim, p, "head_dim", rngs)
        sizes = (2 * p, p, p // 2, 1) if hidden_layers == 2 else (2 * p, p, 1)
        self.network = nnx.List(
            [self._linear(ins, outs, None, rngs) for ins, outs in itertools.pairwise(sizes)]
        )
        self.out = self.output_projection(rngs=rngs)

    def _linear(self, ins: int, outs: int, axis: str | None, rngs: nnx.Rngs) -> Projection:
        """A layer with bias; both are uniform in ±1/sqrt(inputs), as in the code."""
        initial = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

        def bias(key: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jax.random.uniform(key, shape, dtype, -(ins**-0.5), ins**-0.5)

        return Projection(
            ins, outs, in_axes=(axis,), out_axes=(None,), kernel_init=initial, bias_init=bias,
            dtype=self.dtype, param_dtype=self.param_dtype, precision=self.precision, rngs=rngs,
        )  # fmt: skip

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Down-projected keys, and values: p + d numbers per head and token instead of 2 d."""
        key, value = (self.num_heads, self.projection_dim), (self.num_heads, self.head_dim)
        return {"key": key, "value": value}

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        q, k = self.query_down(q), self.key_down(k)
        stored = call.store(key=k, value=v)
        k, v = stored["key"], stored["value"]
        network = [(layer.kernel[...], layer.bias[...]) for layer in self.network]
        if not call.wants_scores:
            return neural_attention(
                q, k, v, network, mask=call.visible(k.shape[1]), q_offset=call.start,
                chunk_size=self.chunk_size,
            )  # fmt: skip
        scores = self.edit_scores(call, neural_scores(q, k, network))
        weights, _ = softmax_weights(scores, call.keep(k.shape[1]))
        return weighted_values(self.edit_weights(call, weights), v).astype(q.dtype)


def _example() -> tuple[NeuralAttention, jax.Array]:
    module = NeuralAttention(2, 16, projection_dim=4, chunk_size=4, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="neural_attention",
    title="Neural Attention: A Novel Mechanism for Enhanced Expressive Power in Transformer Models",
    arxiv="2502.17206",
    year=2025,
    code="awayfromzel/neural-attention-research",
    function=neural_attention,
    module=NeuralAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="einsum",
    cost="O(T^2 p^2), in tiles O(T) memory",
    reduces_to={"last layer 0": "the mean of the visible values"},
    golden=("neural_attention",),
    example=_example,
)
