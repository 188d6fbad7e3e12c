"""Dynamic mask attention: a bias computed from the values decides which keys stay visible.

    δ_j = softplus(W [v_j])       a number for each key/value head, from the values of all of them
    β_j = A δ_j  ("linear")       or exp(A δ_j)  ("exp")
    K_i = the w keys j <= i with the largest β_j
    o_i = Σ_{j∈K_i} softmax_j(q_i·k_j / √d + β_j) v_j

The bias enters the scores, so it learns although the choice itself has no gradient. It does not
depend on the query: a key that has fallen behind w stronger ones never returns. The mask is
therefore one number for each key, the query at which it drops out, and decoding needs w slots and
no more; both are exact. Equal biases are settled in favor of the earlier key, so the initial A = 0
shows the first w keys of a longer text, as the definition says.

The official repository adds A δ ("the same up to exp, more stable"), the Doge model of
huggingface/transformers and the paper exp(A δ): these are different models. "linear" is the default
here, "exp" loads Doge weights. Without a mask of its own the repository's wrapper chooses the w
keys over the whole text, the future included; that leak is not offered.

Reference: Shi et al., "Trainable Dynamic Mask Sparse Attention", 2025, arXiv:2508.02124; official
code SmallDoges/flash-dmattn.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from attnjax.attention import attention
from attnjax.cache.base import cache_bytes, check_room, valid_count
from attnjax.checks import check_no_scores, check_qkv, check_segments
from attnjax.layers import RMSNorm
from attnjax.masks import Causal, Chunked, Full, KeptUntil, Mask, SinceGroup, query_set
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels.tilemath import accumulator_dtype

BIAS_FORMS = ("linear", "exp")
SELECTIONS = ("topk", "relu")


def dynamic_mask(
    bias: Float[Array, "b s g"],
    *,
    window: int = 2048,
    select: str = "topk",
    block_size: int = 1,
    segment_ids: Int[Array, "b s"] | None = None,
    num_heads: int | None = None,
) -> Mask:
    """The mask of dynamic mask attention, to be combined with `Causal()`.

    Args:
      bias: of each key. Its gradient is not taken.
      window: w, keys that a query keeps, among those up to itself. Doge: 2048.
      select: "topk", or "relu" for the keys with a positive bias, however many.
      block_size: c; above 1 each run of c keys (the last one may be shorter) is shown as a whole
        where a query keeps more than half of it, else hidden. Runs may reach into the future.
      segment_ids: packed documents, runs of equal ids; keys compete within their document.
      num_heads: h, query heads to spell the mask out for; None is g.

    Returns:
      A mask over [b, h]. Memory: O(s), with block_size c O(s c) while it is made.

    Raises:
      ValueError: when window or block_size < 1, or `select` is unknown.
      NotImplementedError: for block_size > 1 together with segment_ids.
    """
    name = "dynamic_mask"
    _check_options(name, window, select, block_size)
    b, s, g = bias.shape
    bias = lax.stop_gradient(bias).transpose(0, 2, 1)
    groups = 1 if num_heads is None else num_heads // g
    if segment_ids is not None:
        check_segments(name, segment_ids, b, s)
        if block_size > 1:
            raise NotImplementedError(
                f"{name}: segment_ids with block_size={block_size} are not supported, since runs "
                "would cross documents; use block_size=1 or one document per row."
            )
    if select == "relu":
        end = jnp.where(bias > 0, s, 0)
    elif window >= s:
        end = jnp.full(bias.shape, s, jnp.int32)
    else:
        runs = None
        if segment_ids is not None:
            changes = segment_ids[:, 1:] != segment_ids[:, :-1]
            runs = jnp.pad(jnp.cumsum(changes, 1, dtype=jnp.int32), ((0, 0), (1, 0)))
            runs = jnp.broadcast_to(runs[:, None], bias.shape)
        end, _ = _survival(_strength(bias, runs), 0, window)
    end = jnp.repeat(end.astype(jnp.int32), groups, axis=1)
    if block_size == 1:
        return Full() if select == "topk" and window >= s else KeptUntil(end)
    return _whole_runs(end, block_size)


def dynamic_mask_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t g d"],
    value: Float[Array, "b t g e"],
    bias: Float[Array, "b t g"],
    *,
    window: int = 2048,
    select: str = "topk",
    block_size: int = 1,
    segment_ids: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t h e"]:
    """Causal attention to the w keys of largest bias so far, the bias added to the scores.

        o_i = Σ_{j in K_i} softmax_j(scale q_i·k_j + bias_j) v_j,   K_i = top w of j <= i

    Args:
      query, key, value: shapes as annotated; h a multiple of g.
      bias: of each key, by key/value head; see `value_bias`.
      window, select, block_size: see `dynamic_mask`.
      segment_ids: packed documents, runs of equal ids.
      scale: None is d^-0.5.
      implementation: as in `attnjax.attention`.

    Returns:
      Output in the dtype of `query`. Queries that keep no key give 0.

    Cost: O(t (w + c)) for the choice, in chunks of c = 128 tokens; attention visits the tiles that
    hold a kept key.

    Raises:
      ValueError: on shapes that do not fit or options out of range.
      NotImplementedError: for block_size > 1 together with segment_ids.
    """
    name = "dynamic_mask_attention"
    check_qkv(name, query, key, value)
    if bias.shape != key.shape[:3]:
        raise ValueError(
            f"{name}: bias must have the shape [b, t, g] = {key.shape[:3]} of the keys, got "
            f"{bias.shape}."
        )
    heads = query.shape[2]
    mask = dynamic_mask(
        bias, window=window, select=select, block_size=block_size, segment_ids=segment_ids,
        num_heads=heads,
    )  # fmt: skip
    return attention(
        query, key, value, _by_head(bias, heads), Causal() & mask, scale=scale,
        segment_ids=segment_ids, implementation=implementation,
    )  # fmt: skip


def value_bias(
    value: Float[Array, "b t g d"],
    kernel: Float[Array, "n g"],
    decay: Float[Array, " g"],
    form: str = "linear",
) -> Float[Array, "b t g"]:
    """The bias of each key: A softplus(W [v]), or its exponential.

    Args:
      value: of all key/value heads, which are concatenated: n = g d.
      kernel: W.
      decay: A.
      form: "linear" or "exp".

    Returns:
      float32, or float64 for float64 values.
    """
    dtype = accumulator_dtype(value.dtype)
    flat = value.reshape(*value.shape[:2], -1).astype(dtype)
    delta = jax.nn.softplus(jnp.einsum("btn,ng->btg", flat, kernel.astype(dtype)))
    bias = decay.astype(dtype)[None, None] * delta
    return jnp.exp(bias) if form == "exp" else bias


@dataclasses.dataclass(frozen=True)
class KeptCache:
    """The w keys of largest bias of each key/value head, strongest first.

    Attributes:
      key: [b, w, g, d], value: [b, w, g, e], bias: [b, w, g].
      length: [b] int32, tokens seen so far; slot n is filled iff n < length.
      max_length: tokens it may see, or None where older ones may be forgotten. Static.

    Memory: O(w). Shardable by b and g.
    """

    key: jax.Array
    value: jax.Array
    bias: jax.Array
    length: jax.Array
    max_length: int | None

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)


jax.tree_util.register_dataclass(
    KeptCache, data_fields=["key", "value", "bias", "length"], meta_fields=["max_length"]
)


class DynamicMaskAttention(SequenceMixer):
    """Multi-head `dynamic_mask_attention` with normalized, rotated queries and keys.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      window: w, keys that a query keeps. Doge: 2048.
      bias_form: "linear", A δ, or "exp", exp(A δ) as in Doge.
      select: "topk", or "relu" for all keys of positive bias.
      block_size: see `dynamic_mask`; 1 is off. Causality is applied again after it.
      **options: of `SequenceMixer`. Doge: rope_base=10000.

    Raises:
      ValueError: when window or block_size < 1, or an option is unknown.
      NotImplementedError: for a cache with block_size > 1, which needs keys that were dropped.
    """

    sites = SCORE_SITES
    directions = ("causal",)
    grouped = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        window: int = 2048,
        bias_form: str = "linear",
        select: str = "topk",
        block_size: int = 1,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        _check_options("DynamicMaskAttention", window, select, block_size)
        if bias_form not in BIAS_FORMS:
            raise ValueError(
                f"DynamicMaskAttention: bias_form={bias_form!r} is none of {', '.join(BIAS_FORMS)}."
            )
        self.window, self.bias_form = window, bias_form
        self.select, self.block_size = select, block_size
        g, d = self.num_kv_heads, self.head_dim
        self.query = self.projection((num_heads, d), rngs=rngs)
        self.key = self.projection((g, d), rngs=rngs)
        self.value = self.projection((g, d), rngs=rngs)
        self.query_norm = RMSNorm(d, axis="head_dim", param_dtype=self.param_dtype)
        self.key_norm = RMSNorm(d, axis="head_dim", param_dtype=self.param_dtype)
        self.delta = self.projection(
            g, ("heads",), inputs=g * d, in_axis=None, use_bias=False, rngs=rngs
        )
        self.decay = self.parameter(jnp.zeros((g,)), ("heads",))
        self.out = self.output_projection(rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k = self.query_norm(self.query(x)), self.key_norm(self.key(x))
        q, k, v = self.heads(call, q, k, self.value(x))
        q, k = self.rotate(call, q, k)
        bias = value_bias(v, self.delta.kernel[...], self.decay[...], self.bias_form)
        if call.cache is not None:
            return self._step(call, q, k, v, bias)
        mask = dynamic_mask(
            bias, window=self.window, select=self.select, block_size=self.block_size,
            segment_ids=call.segment_ids, num_heads=self.num_heads,
        )  # fmt: skip
        return self.attend(call, q, k, v, layout=mask, bias=_by_head(bias, self.num_heads))[0]

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> KeptCache:
        """An empty cache: `window` slots where that is less than `max_length`, else `max_length`.

        Args:
          batch: rows.
          max_length: tokens per row, prompt and continuation together.
          dtype: of keys and values; None is the module's dtype, or that of the parameters.
        """
        self._require_decoding()
        if self.block_size > 1:
            raise NotImplementedError(
                f"DynamicMaskAttention: a cache with block_size={self.block_size} is not "
                "supported, since runs bring dropped keys back; use block_size=1."
            )
        dtype = (self.dtype or self.param_dtype) if dtype is None else dtype
        forgets = self.select == "topk" and self.window < max_length
        slots = self.window if forgets else max_length
        shape = (batch, slots, self.num_kv_heads)
        key, value = (jnp.zeros((*shape, self.head_dim), dtype) for _ in range(2))
        bias = jnp.zeros(shape, accumulator_dtype(dtype))
        length = jnp.zeros((batch,), jnp.int32)
        return KeptCache(key, value, bias, length, None if forgets else max_length)

    def _step(
        self, call: Call, q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array
    ) -> jax.Array:
        """Attention of new tokens to the kept and the new, and the cache of the next call."""
        cache: KeptCache = call.cache
        check_no_scores(
            "DynamicMaskAttention", dataclasses.replace(call, dropout_key=None), "with a cache",
            "since it holds some keys only; call the module on the whole text",
        )  # fmt: skip
        b, t = q.shape[:2]
        slots = cache.key.shape[1]
        count = valid_count(call.valid, call.positions).astype(jnp.int32)
        if cache.max_length is not None:
            check_room("DynamicMaskAttention", cache.length, count, cache.max_length)
        keys, values, biases = (
            jnp.concatenate([old, new.astype(old.dtype)], axis=1)
            for old, new in ((cache.key, k), (cache.value, v), (cache.bias, bias))
        )
        at = jnp.arange(slots + t, dtype=jnp.int32)[None]
        filled = at < jnp.minimum(cache.length, slots)[:, None]
        real = jnp.where(at < slots, filled, at - slots < count[:, None])[:, None]  # [b, 1, n]
        strength = _strength(lax.stop_gradient(biases).transpose(0, 2, 1), None)
        end, kept = _survival(jnp.where(real, strength, -1), slots, slots)
        if self.select == "relu":
            end = jnp.where(biases.transpose(0, 2, 1) > 0, t, 0)
        end = jnp.where(real, end, 0).astype(jnp.int32)
        # slots come before the new tokens and are visible to all of them, until they drop out
        mask = Causal(slots) & KeptUntil(jnp.repeat(end, self.num_heads // end.shape[1], axis=1))
        inner = dataclasses.replace(call, cache=None, causal=False, valid=None)
        z, _ = self.attend(
            inner, q, keys.astype(q.dtype), values.astype(q.dtype), layout=mask,
            bias=_by_head(biases.astype(bias.dtype), self.num_heads),
        )  # fmt: skip
        kept = kept.transpose(0, 2, 1)  # [b, w, g]
        call.cache = dataclasses.replace(
            cache,
            key=jnp.take_along_axis(keys, kept[..., None], axis=1),
            value=jnp.take_along_axis(values, kept[..., None], axis=1),
            bias=jnp.take_along_axis(biases, kept, axis=1),
            length=cache.length + count,
        )
        return z


def _strength(bias: jax.Array, runs: jax.Array | None) -> Int[Array, "b g n"]:
    """Ranks of keys [b, g, n] as distinct integers: later document, larger bias, earlier key."""
    index = lax.broadcasted_iota(jnp.int32, bias.shape, bias.ndim - 1)
    keys = (-index, bias) if runs is None else (-index, bias, runs)
    return jnp.argsort(jnp.lexsort(keys, axis=-1), axis=-1).astype(jnp.int32)


def _survival(
    strength: Int[Array, "b g n"], old: int, window: int, chunk: int = 128
) -> tuple[Int[Array, "b g n"], Int[Array, "b g w"]]:
    """When each key falls behind `window` stronger ones, as the new keys arrive one by one.

    A key once behind stays there and is beaten by all that stay in front, so comparing the `window`
    strongest with the next chunk of new keys is exact.

    Args:
      strength: of the kept keys, strongest first (at most `window`), then the new ones in order;
        distinct, -1 for keys that do not count.
      old: how many were kept before.
      window: w.
      chunk: new keys compared at a time.

    Returns:
      The new key, counted from 0, with whose arrival it drops out, or their number; and the indices
      of those kept in the end, strongest first.
    """
    b, g, n = strength.shape
    new, rows = n - old, b * g
    window, chunk = min(window, n), max(1, min(chunk, new))
    flat = strength.reshape(rows, n)
    pad = -new % chunk
    index = jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32)[None], (rows, n))
    # places without a key point behind the end, where nothing is stored
    state = (
        jnp.pad(flat[:, :old], ((0, 0), (0, window - old)), constant_values=-1),
        jnp.pad(index[:, :old], ((0, 0), (0, window - old)), constant_values=n),
        jnp.full((rows, n), new, jnp.int32),
    )

    def chunks(x: jax.Array, fill: int) -> jax.Array:
        x = jnp.pad(x[:, old:], ((0, 0), (0, pad)), constant_values=fill)
        return x.reshape(rows, -1, chunk).swapaxes(0, 1)

    def step(carry: Any, xs: Any) -> Any:
        front, where, end = carry
        coming, places, first = xs
        rivals = jnp.concatenate([front, coming], axis=1)
        where = jnp.concatenate([where, places], axis=1)
        order = jnp.broadcast_to(jnp.arange(window, dtype=jnp.int32)[None], front.shape)
        before = (front[:, None, :] > coming[:, :, None]).sum(-1, dtype=jnp.int32)
        beaten = coming[:, None, :] > rivals[:, :, None]
        count = jnp.cumsum(beaten, axis=2, dtype=jnp.int32)
        count = count + jnp.concatenate([order, before], axis=1)[..., None]
        stays = (count < window).sum(-1, dtype=jnp.int32)
        stays = jnp.where(stays < chunk, first + stays, new)
        row = jnp.arange(rows, dtype=jnp.int32)[:, None]
        end = end.at[row, where].min(stays, mode="drop")
        front, best = lax.top_k(rivals, window)
        return (front, jnp.take_along_axis(where, best, axis=1), end), None

    starts = jnp.arange(-(-new // chunk), dtype=jnp.int32) * chunk
    (_, where, end), _ = lax.scan(step, state, (chunks(flat, -1), chunks(index, n), starts))
    kept = jnp.minimum(where, n - 1)
    return end.reshape(b, g, n), kept.reshape(b, g, window)


def _whole_runs(end: Int[Array, "b h s"], size: int) -> Mask:
    """Runs of `size` keys, shown where more than half of the run is kept and not in the future.

    Keys only ever drop out, so that a run behind the query's is shown until its majority is gone:
    one number for each run. The run of the query itself is counted query by query.
    """
    b, h, s = end.shape
    runs = jnp.pad(end, ((0, 0), (0, 0), (0, -s % size))).reshape(b, h, -1, size)
    first = jnp.arange(runs.shape[2], dtype=jnp.int32) * size
    majority = jnp.minimum(s - first, size) // 2 + 1
    lasting = -jnp.sort(-runs, axis=-1)
    lasting = jnp.take_along_axis(lasting, (majority - 1)[None, None, :, None], axis=-1)
    lasting = jnp.repeat(lasting[..., 0], size, axis=-1)[..., :s]
    place = jnp.arange(size, dtype=jnp.int32)
    at = (first[:, None] + place[None])[None, None, ..., None]
    kept = (place[None] <= place[:, None])[None, None, None] & (runs[:, :, :, None] > at)
    own = kept.sum(-1, dtype=jnp.int32) >= majority[None, None, :, None]  # [b, h, runs, size]
    own = own.reshape(b, h, -1)[..., :s].swapaxes(1, 2)
    return (Chunked(size) & query_set(own)) | (~SinceGroup(size) & KeptUntil(lasting))


def _by_head(bias: jax.Array, heads: int) -> jax.Array:
    """Bias [b, s, g] as [b, h, 1, s]."""
    return jnp.repeat(bias.transpose(0, 2, 1), heads // bias.shape[2], axis=1)[:, :, None]


def _check_options(name: str, window: int, select: str, block_size: int) -> None:
    if select not in SELECTIONS:
        raise ValueError(f"{name}: select={select!r} is none of {', '.join(SELECTIONS)}.")
    for label, size in (("window", window), ("block_size", block_size)):
        if size < 1:
            raise ValueError(f"{name}: {label} must be at least 1 token, got {label}={size}.")


def _example() -> tuple[DynamicMaskAttention, jax.Array]:
    module = DynamicMaskAttention(4, 16, num_kv_heads=2, window=5, rope_base=1e4, rngs=nnx.Rngs(0))
    module.decay[...] = jnp.array([1.5, -0.5])
    return module, jax.random.normal(jax.random.key(1), (2, 13, 16))


SPEC = Mechanism(
    id="dynamic_mask_attention",
    title="Trainable Dynamic Mask Sparse Attention",
    arxiv="2508.02124",
    year=2025,
    code="SmallDoges/flash-dmattn",
    function=dynamic_mask_attention,
    module=DynamicMaskAttention,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    kernel="flash",
    cost="O(T w), in tiles that hold a kept key; decoding O(w)",
    reduces_to={"window=T, A=0": "multi_head_attention with qk_norm"},
    golden=("dma",),
    example=_example,
)
