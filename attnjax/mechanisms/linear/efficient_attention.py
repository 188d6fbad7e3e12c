"""Efficient attention: keys gather the values into a small context first, queries read the context.

    E = ρ_q(Q) (ρ_k(K)^T V)
    "softmax"   ρ_q over the channels of each head, ρ_k over the tokens: rows of ρ_q ρ_k^T sum to 1
    "scaling"   ρ_q and ρ_k divide by √n, n tokens

No product of queries and keys is made: O(n) instead of O(n²). The causal form, which the paper does
not have, restricts ρ_k to the tokens up to t: with L_t = logsumexp_{s<=t} k_s per channel,

    S_t = exp(L_{t-1} - L_t) S_{t-1} + exp(k_t - L_t) v_t^T,   o_t = S_t^T ρ_q(q_t)

a linear recurrence with a decay per channel whose exponents are all <= 0; "scaling" divides by t.

Reference: Shen et al., "Efficient Attention: Attention with Linear Complexities", 2018,
arXiv:1812.01243; cmsflash/efficient-attention (the default, "softmax", with the residual inside the
module).
"""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from attnjax.cache.linear_state import state_dtype
from attnjax.checks import check_qkv
from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.mixer import Call, SequenceMixer
from attnjax.spec import Mechanism


@dataclasses.dataclass(frozen=True)
class ContextCache:
    """The context of causal efficient attention after the tokens seen so far.

    Attributes:
      state: [b, h, k, v], weighted mean ("softmax") or sum ("scaling") of the values, per channel.
      log_sum: [b, h, k], L; -inf where no token was seen.
      length: [b] int32, tokens seen so far.
    """

    state: jax.Array
    log_sum: jax.Array
    length: jax.Array

    @classmethod
    def create(
        cls, batch: int, num_heads: int, key_dim: int, value_dim: int, dtype: Any = jnp.float32
    ) -> ContextCache:
        """The cache before the first token."""
        return cls(
            jnp.zeros((batch, num_heads, key_dim, value_dim), dtype),
            jnp.full((batch, num_heads, key_dim), -jnp.inf, dtype),
            jnp.zeros((batch,), jnp.int32),
        )


jax.tree_util.register_dataclass(
    ContextCache, data_fields=["state", "log_sum", "length"], meta_fields=[]
)


def efficient_attention(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h v"],
    *,
    causal: bool = False,
    normalizer: str = "softmax",
    key_mask: Bool[Array, "b s"] | None = None,
    cache: ContextCache | None = None,
    chunk_size: int | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], ContextCache]:
    """Attention through a context of k x v numbers per head: ρ_q(Q) (ρ_k(K)^T V).

    Args:
      query, key, value: shapes as annotated; no scale is applied. Causal: s = t.
      causal: token t reads the context of the tokens up to t only.
      normalizer: "softmax" (official code) or "scaling"; see the formulas above.
      key_mask: False marks padding that is not gathered. A query that finds no key gets 0.
      cache: context of earlier tokens; causal only.
      chunk_size: tokens per chunk of the causal form; None is 64.

    Returns:
      Output in the dtype of `value`; `(output, cache)` with a cache. Softmax and context are
      float32, or float64 when an input is.

    Cost: O((t + s) h k v); causal as `linear_attention` with per-channel decay. Memory: O(t + s).

    Raises:
      ValueError: on shapes that do not fit together, an unknown normalizer, or a cache without
        causal=True.
    """
    name = "efficient_attention"
    check_qkv(name, query, key, value)
    if key.shape[2] != query.shape[2] or (causal and key.shape[1] != query.shape[1]):
        raise ValueError(
            f"{name}: query and key must have the same heads, and the same length when causal, "
            f"got query {query.shape} and key {key.shape}."
        )
    _check_normalizer(name, normalizer)
    if key_mask is not None and key_mask.shape != key.shape[:2]:
        raise ValueError(
            f"{name}: key_mask must have shape [batch, key length] = {key.shape[:2]}, "
            f"got {key_mask.shape}."
        )
    if cache is not None and not causal:
        raise ValueError(
            f"{name}: a cache needs causal=True; without it every key must be given at once."
        )
    f64 = jnp.float64 in (query.dtype, key.dtype, value.dtype)
    q, k, v = (x.astype(jnp.float64 if f64 else jnp.float32) for x in (query, key, value))
    if key_mask is not None:
        # padding may hold anything, NaN too
        k, v = (jnp.where(key_mask[..., None, None], x, jnp.zeros_like(x)) for x in (k, v))
    if causal:
        b, _, h, width = q.shape
        start = cache or ContextCache.create(b, h, width, v.shape[3], q.dtype)
        run = _causal_softmax if normalizer == "softmax" else _causal_scaling
        out, after = run(q, k, v, key_mask, start, chunk_size)
        return out.astype(value.dtype) if cache is None else (out.astype(value.dtype), after)
    if normalizer == "softmax":
        q, k = jax.nn.softmax(q, axis=-1), _token_softmax(k, key_mask)
    else:
        q, k = _token_scaling(q, k, key_mask)
    context = jnp.einsum("bshk,bshv->bhkv", k, v)
    return jnp.einsum("bthk,bhkv->bthv", q, context).astype(value.dtype)


def _check_normalizer(name: str, normalizer: str) -> None:
    if normalizer not in ("softmax", "scaling"):
        raise ValueError(
            f"{name}: normalizer={normalizer!r} is unknown; pass 'softmax' or 'scaling'."
        )


def _token_softmax(k: jax.Array, key_mask: jax.Array | None) -> jax.Array:
    """Softmax over the tokens that are not padding; 0 where there are none."""
    if key_mask is None:
        return jax.nn.softmax(k, axis=1)
    mask = key_mask[..., None, None]
    top = jnp.max(jnp.where(mask, k, -jnp.inf), axis=1, keepdims=True)
    top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, k - top, 0.0)), 0.0)
    total = jnp.sum(weights, axis=1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def _token_scaling(
    q: jax.Array, k: jax.Array, key_mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Both divided by √n, n the tokens that are not padding."""
    if key_mask is None:
        root = jnp.asarray(math.sqrt(max(1, k.shape[1])), q.dtype)
        return q / root, k / root
    count = jnp.maximum(jnp.sum(key_mask, axis=1, dtype=jnp.int32), 1)
    root = jnp.sqrt(count.astype(q.dtype))[:, None, None, None]
    return q / root, k / root


def _causal_softmax(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: Any,
    start: ContextCache,
    chunk_size: int | None,
) -> tuple[jax.Array, ContextCache]:
    """The recurrence over normalized contexts; `start` is the context before the first token."""
    dtype = q.dtype
    real = jnp.ones(k.shape[:2], bool) if key_mask is None else key_mask
    before = start.log_sum.astype(dtype)[:, None]
    # A finite stand-in for log 0, below any key and without effect on a sum with one.
    low = jnp.asarray(-1e30, dtype)
    logits = jnp.where(real[..., None, None], k, low)
    first = jnp.maximum(before, low)
    log_sum = lax.cumlogsumexp(jnp.concatenate([first, logits], axis=1), axis=1)
    drop = log_sum[:, :-1] - log_sum[:, 1:]
    # While nothing was seen the context is 0 and needs no decay; low itself must not enter the
    # sums.
    decay = jnp.where(log_sum[:, :-1] > low / 2, drop, 0.0)
    weights = jnp.where(real[..., None, None], jnp.exp(logits - log_sum[:, 1:]), 0.0)
    out, state = linear_attention(
        jax.nn.softmax(q, axis=-1), weights, v, decay=decay, scale=1.0, return_state=True,
        initial_state=start.state.astype(dtype), chunk_size=chunk_size,
    )  # fmt: skip
    last = log_sum[:, -1]
    last = jnp.where(last > low / 2, last, -jnp.inf)
    return out, _advanced(start, state, last, real)


def _causal_scaling(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    key_mask: Any,
    start: ContextCache,
    chunk_size: int | None,
) -> tuple[jax.Array, ContextCache]:
    """Sums of k v^T, divided by the number of tokens so far."""
    real = jnp.ones(k.shape[:2], bool) if key_mask is None else key_mask
    count = start.length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32)
    q = q / jnp.maximum(count, 1).astype(q.dtype)[..., None, None]
    out, state = linear_attention(
        q, k, v, scale=1.0, initial_state=start.state.astype(q.dtype), return_state=True,
        chunk_size=chunk_size,
    )  # fmt: skip
    return out, _advanced(start, state, start.log_sum, real)


def _advanced(
    start: ContextCache, state: jax.Array, log_sum: jax.Array, real: jax.Array
) -> ContextCache:
    length = start.length + jnp.sum(real, axis=1, dtype=start.length.dtype)
    return ContextCache(
        state.astype(start.state.dtype), log_sum.astype(start.log_sum.dtype), length
    )


class EfficientAttention(SequenceMixer):
    """Efficient attention over sequences, images or volumes, with projections and residual.

    Without causality x may be [b, *spatial, m]. The site "attn_out" is taken before the residual.

    Args:
      num_heads, in_features: as in `SequenceMixer`.
      qkv_features: width of all queries together, and of all keys; None is `in_features`.
      out_features: None or `in_features` while there is a residual.
      value_features: width of all values together; None is `qkv_features`.
      causal: token t sees tokens up to t; sequences only. Not in the paper.
      normalizer: "softmax" or "scaling".
      residual: add the input to the output. Official code: yes, inside the module.
      use_bias: whether projections have biases. Official code: yes.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: when sizes do not divide or do not fit the residual, or for an unknown normalizer.
    """

    directions = ("causal", "bidirectional")
    packed = False
    drops = False
    spatial = True
    block_options = MappingProxyType({"residual": False})

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        value_features: int | None = None,
        causal: bool = False,
        normalizer: str = "softmax",
        residual: bool = True,
        use_bias: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        options |= dict(causal=causal, use_bias=use_bias)
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        name = type(self).__name__
        value_features = num_heads * self.head_dim if value_features is None else value_features
        if value_features % num_heads:
            raise ValueError(
                f"{name}: value_features={value_features} must be a multiple of "
                f"num_heads={num_heads}."
            )
        if residual and self.out_features != in_features:
            raise ValueError(
                f"{name}: out_features={out_features} must equal in_features={in_features} while "
                "residual=True; pass residual=False."
            )
        _check_normalizer(name, normalizer)
        self.value_dim, self.normalizer, self.residual = (
            value_features // num_heads, normalizer, residual,
        )  # fmt: skip
        keys = (num_heads, self.head_dim)
        self.query, self.key = (self.projection(keys, rngs=rngs) for _ in range(2))
        self.value = self.projection((num_heads, self.value_dim), rngs=rngs)
        self.out = self.output_projection(self.value_dim, rngs=rngs)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> ContextCache:
        """The context before the first token; as large for any length.

        Args:
          batch: rows.
          max_length: unused.
          dtype: of the context; None is float32, or float64 where the parameters are.
        """
        del max_length
        self._require_decoding()
        dtype = state_dtype(self.param_dtype if dtype is None else dtype)
        return ContextCache.create(batch, self.num_heads, self.head_dim, self.value_dim, dtype)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, v]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        result: Any = efficient_attention(
            q, k, v, causal=self.causal, normalizer=self.normalizer, key_mask=call.valid,
            cache=call.cache,
        )  # fmt: skip
        if call.cache is None:
            return result
        z, call.cache = result
        return z

    def finish(self, call: Call, z: jax.Array) -> jax.Array:
        """The output of z, with the input where there is a residual."""
        y = super().finish(call, z)
        return y + call.x.astype(y.dtype) if self.residual else y


def _example() -> tuple[EfficientAttention, jax.Array]:
    module = EfficientAttention(2, 12, 8, value_features=16, causal=True, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 12))


SPEC = Mechanism(
    id="efficient_attention",
    title="Efficient Attention: Attention with Linear Complexities",
    arxiv="1812.01243",
    year=2018,
    code="cmsflash/efficient-attention",
    function=efficient_attention,
    module=EfficientAttention,
    causal=True,
    bidirectional=True,
    nd=3,
    cache="state",
    golden=("efficient_attention",),
    kernel="linear",
    cost="O(T K V)",
    example=_example,
)
