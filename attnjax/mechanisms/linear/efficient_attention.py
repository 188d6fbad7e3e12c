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
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from attnjax.cache.linear_state import state_dtype
from attnjax.checks import check_qkv
from attnjax.layers import Projection, add_bias, default_bias_init, default_kernel_init
from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.spec import Mechanism
from attnjax.taps import Edits, Tap


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
    if normalizer not in ("softmax", "scaling"):
        raise ValueError(
            f"{name}: normalizer={normalizer!r} is unknown; pass 'softmax' or 'scaling'."
        )
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


class EfficientAttention(nnx.Module):
    """Efficient attention over sequences, images or volumes, with projections and residual.

    Args:
      num_heads: h.
      in_features: width of the input, which is also the width of the output.
      qkv_features: width of all queries together, and of all keys; None is `in_features`.
      out_features: None or `in_features` while there is a residual.
      num_kv_heads: None or `num_heads`.
      value_features: width of all values together; None is `qkv_features`.
      causal: token t sees tokens up to t; sequences only. Not in the paper.
      normalizer: "softmax" or "scaling".
      residual: add the input to the output. Official code: yes, inside the module.
      dtype: of the computation; None promotes inputs and parameters.
      param_dtype: of the parameters.
      kernel_init, bias_init: initializers of the projections.
      use_bias: whether projections have biases. Official code: yes.
      rngs: stream `params`.

    Raises:
      ValueError: when sizes do not divide.
      NotImplementedError: for num_kv_heads other than num_heads.
    """

    sites = ("q", "k", "v", "q_rot", "k_rot", "z", "head_out", "attn_out")

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        num_kv_heads: int | None = None,
        value_features: int | None = None,
        causal: bool = False,
        normalizer: str = "softmax",
        residual: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        use_bias: bool = True,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        qkv_features = in_features if qkv_features is None else qkv_features
        value_features = qkv_features if value_features is None else value_features
        out_features = in_features if out_features is None else out_features
        if qkv_features % num_heads or value_features % num_heads:
            raise ValueError(
                f"{name}: qkv_features={qkv_features} and value_features={value_features} must be "
                f"multiples of num_heads={num_heads}."
            )
        if residual and out_features != in_features:
            raise ValueError(
                f"{name}: out_features={out_features} must equal in_features={in_features} while "
                "residual=True; pass residual=False."
            )
        if num_kv_heads not in (None, num_heads):
            raise NotImplementedError(
                f"{name}: num_kv_heads={num_kv_heads} is not supported; every head has its own "
                f"key and value, num_kv_heads={num_heads}."
            )
        self.num_heads, self.in_features = num_heads, in_features
        self.key_dim, self.value_dim = qkv_features // num_heads, value_features // num_heads
        self.causal, self.normalizer, self.residual = causal, normalizer, residual
        self.param_dtype = param_dtype
        shared: dict[str, Any] = dict(
            use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init,
            bias_init=bias_init, rngs=rngs,
        )  # fmt: skip

        def project(width: int) -> Projection:
            return Projection(
                in_features,
                (num_heads, width),
                in_axes=("embed",),
                out_axes=("heads", "head_dim"),
                **shared,
            )

        self.query, self.key = project(self.key_dim), project(self.key_dim)
        self.value = project(self.value_dim)
        self.out = Projection(
            (num_heads, self.value_dim), out_features, in_axes=("heads", "head_dim"),
            out_axes=("embed",), **shared,
        )  # fmt: skip

    def __call__(
        self,
        x: Float[Array, "b *t m"],
        *,
        mask: None = None,
        positions: None = None,
        segment_ids: None = None,
        cache: ContextCache | None = None,
        valid: Bool[Array, "b *t"] | None = None,
        deterministic: bool | None = None,
        dropout_rng: Any = None,
        edits: Edits | None = None,
        capture: Iterable[str] = (),
    ) -> Any:
        """Mixes all tokens of x.

        Args:
          x: [b, t, m], or [b, *spatial, m] when not causal.
          mask, segment_ids: must be None; use `valid` for padding.
          positions: unused, the mechanism knows no positions.
          cache: from `init_cache`; causal only.
          valid: False marks padding, which is not gathered; the output there is meaningless.
          deterministic, dropout_rng: unused, there is no dropout.
          edits: interventions of this layer (`attnjax.taps.Edits`).
          capture: names of sites to return; tokens of all spatial axes in one. "attn_out" is taken
            before the residual.

        Returns:
          y shaped like x; `(y, cache)` with a cache; captured arrays as a dict last.
        """
        del positions, deterministic, dropout_rng
        name = type(self).__name__
        if x.ndim < 3 or x.shape[-1] != self.in_features or (self.causal and x.ndim != 3):
            raise ValueError(
                f"{name}: x must have shape [batch, {'length' if self.causal else '*spatial'}, "
                f"{self.in_features}], got {x.shape}."
            )
        if mask is not None or segment_ids is not None:
            raise NotImplementedError(
                f"{name}: mask and segment_ids are not supported, all tokens share one context; "
                "use valid for padding and one document per row."
            )
        if valid is not None and valid.shape != x.shape[:-1]:
            raise ValueError(f"{name}: valid must have shape {x.shape[:-1]}, got {valid.shape}.")
        tap = Tap(edits, capture, sites=self.sites, name=name)
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        valid = None if valid is None else valid.reshape(tokens.shape[:2])
        if valid is not None:
            # padding may hold anything, NaN too
            tokens = jnp.where(valid[..., None], tokens, jnp.zeros_like(tokens))
        q, k, v = self._project(tap, tokens)
        result = efficient_attention(
            q, k, v, causal=self.causal, normalizer=self.normalizer, key_mask=valid, cache=cache
        )
        z, cache = result if isinstance(result, tuple) else (result, None)
        y = self._output(tap, tap.heads(z))
        if self.residual:
            y = y + tokens.astype(y.dtype)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return tap.result(y) if cache is None else tap.result(y, cache)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> ContextCache:
        """The context before the first token; as large for any length.

        Args:
          batch: rows.
          max_length: unused.
          dtype: of the context; None is float32, or float64 where the parameters are.
        """
        del max_length
        dtype = state_dtype(self.param_dtype if dtype is None else dtype)
        return ContextCache.create(batch, self.num_heads, self.key_dim, self.value_dim, dtype)

    def _project(self, tap: Tap, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        if tap.edits.query_positions is not None or tap.edits.key_positions is not None:
            raise ValueError("edits: EfficientAttention has no positions that could be replaced.")
        q, k, v = self.query(x), self.key(x), self.value(x)
        if tap.edits.q_add is not None:
            q = add_bias(q, tap.edits.q_add)
        if tap.edits.k_add is not None:
            k = add_bias(k, tap.edits.k_add)
        q, k = tap("q_rot", tap("q", q)), tap("k_rot", tap("k", k))
        return q, k, tap("v", v)

    def _output(self, tap: Tap, z: jax.Array) -> jax.Array:
        """The output projection, with the sites "head_out" and "attn_out"."""
        y = self.out(z)
        edited = tap.edits_site("head_out")
        if edited or "head_out" in tap.capture:
            heads = jnp.einsum(
                "bthd,hdm->bthm", z.astype(y.dtype), self.out.kernel[...].astype(y.dtype)
            )
            new = tap("head_out", heads)
            if edited:
                y = y + (new - heads).sum(2)
        return tap("attn_out", y)


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
