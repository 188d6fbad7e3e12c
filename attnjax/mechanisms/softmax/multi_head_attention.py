"""Multi-head softmax attention with its usual options: MHA, GQA, MQA, windows, sinks, RoPE, caches.

    z_h = sum_s softmax_s(scale · q_h · k_{g(h)}) v_{g(h)},   y = sum_h z_h W_O^h + b

A drop-in for `flax.nnx.MultiHeadAttention`: same constructor and call argument names, same
parameter names and shapes, same output (`nnx.update(ours, nnx.state(theirs, nnx.Param))`). Three
things differ. Nothing of size T x T is made unless weights, scores or an array mask are asked for.
Decoding takes an explicit cache (`cache=module.init_cache(...)`) where flax keeps one inside the
module (`decode=True`). Dropout masks are drawn per batch row, not shared between rows.

Reference: Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762. Grouped heads:
Ainslie et al., 2023, arXiv:2305.13245. Window with sinks: Xiao et al., 2023, arXiv:2309.17453, at
original positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.attention import attention
from attnjax.cache import DenseCache, RingCache
from attnjax.cache.base import new_positions
from attnjax.layers import (
    LayerNorm,
    RMSNorm,
    compute_dtype,
    default_bias_init,
    default_kernel_init,
)
from attnjax.masks import Sink, Window
from attnjax.masks.keys import document_sinks
from attnjax.mixer import Call, SequenceMixer
from attnjax.positions import RopeScaling, apply_rope, rope_frequencies
from attnjax.sinks import add_extra_key
from attnjax.spec import Mechanism
from attnjax.taps import MIXER_SITES, Edits
from pallas_kernels.maskprogram import MaskProgram

SINK_KINDS = ("none", "sink_logit", "off_by_one", "kv_bias", "k_bias", "v_bias")


class MultiHeadAttention(SequenceMixer):
    """Softmax attention with projections; self-attention, cross-attention, decoding.

    Args:
      num_heads: h.
      in_features: width of the input.
      qkv_features: width of all heads together; None is `in_features`.
      out_features: width of the output; None is `in_features`.
      num_kv_heads: g, divides h; None is h (MHA), 1 is MQA.
      in_kv_features: width of `inputs_k` and `inputs_v`; None is `in_features`.
      causal: whether token t sees tokens up to t only.
      window: tokens seen to the left, counting the token itself (and as many to the right, itself
        counted, when not causal); None is no limit.
      sinks: number of first tokens that stay visible beyond the window; 0 is none.
      rope_base: base of rotary positions; None is no rotation. RoFormer: 10000.
      rope_scaling: context extension; None is none. Schemes that depend on the length (dynamic,
        longrope) take `rope_scaling.max_length` for it.
      rope_fraction: share of the head width that is rotated, from its start.
      sink: extra always visible key per query head: "none"; "sink_logit", a learned logit without
        value; "off_by_one", logit 0 without value; "kv_bias", learned key and value (not rotated);
        "k_bias", key only; "v_bias", value only. A learned logit or logit 0 is not soft-capped.
      softcap: c in c · tanh(score / c), before the mask; None is off.
      scale: factor of the scores; None is head_dim^-0.5.
      qk_norm: None, "layer" (flax's `normalize_qk`) or "rms", over each head's width.
      normalize_qk: True is `qk_norm="layer"`.
      dropout_rate: of the attention weights.
      deterministic: True turns dropout off; a call's own argument comes first.
      implementation: as in `attnjax.attention`.
      dtype: of the computation; None promotes inputs and parameters.
      param_dtype: of the parameters.
      precision: of the projections.
      kernel_init, bias_init: initializers of the projections.
      out_kernel_init, out_bias_init: of the output projection; None is the same as the others.
      use_bias: whether projections have biases.
      decode: only for its place in flax's vocabulary; must be None or False.
      rngs: stream `params`, and `dropout` when dropout_rate > 0.
      keep_rngs: whether to keep a fork of `rngs.dropout` for calls that pass no key.

    Raises:
      ValueError: when sizes do not divide, window < 1, sinks < 0, or an option is unknown.
    """

    sites = MIXER_SITES
    directions = ("causal", "bidirectional")
    grouped = masked = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        causal: bool = False,
        window: int | None = None,
        sinks: int = 0,
        rope_base: float | None = None,
        rope_scaling: RopeScaling | None = None,
        rope_fraction: float = 1.0,
        sink: str = "none",
        softcap: float | None = None,
        scale: float | None = None,
        qk_norm: str | None = None,
        normalize_qk: bool = False,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        implementation: str | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        out_kernel_init: Callable[..., Any] | None = None,
        out_bias_init: Callable[..., Any] | None = None,
        use_bias: bool = True,
        decode: bool | None = None,
        rngs: nnx.Rngs,
        keep_rngs: bool = True,
    ):
        name = type(self).__name__
        super().__init__(
            num_heads, in_features, qkv_features, out_features, num_kv_heads=num_kv_heads,
            causal=causal, rope_base=rope_base, dropout_rate=dropout_rate,
            deterministic=deterministic, dtype=dtype, param_dtype=param_dtype, precision=precision,
            kernel_init=kernel_init, bias_init=bias_init, out_kernel_init=out_kernel_init,
            use_bias=use_bias, rngs=rngs,
        )  # fmt: skip
        if window is not None and window < 1:
            raise ValueError(
                f"{name}: window={window} leaves no visible token; pass window >= 1 or None."
            )
        if sinks < 0 or (sinks and window is None):
            raise ValueError(
                f"{name}: sinks={sinks} needs a window (the first tokens are visible anyway "
                "without one) and must not be negative."
            )
        if sink not in SINK_KINDS:
            raise ValueError(f"{name}: sink={sink!r} is none of {', '.join(SINK_KINDS)}.")
        if qk_norm not in (None, "layer", "rms"):
            raise ValueError(f"{name}: qk_norm={qk_norm!r} is none of None, 'layer', 'rms'.")
        self._refuse_decode(decode)
        self.qkv_features = num_heads * self.head_dim
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.window, self.sinks, self.sink = window, sinks, sink
        self.rope_scaling, self.rope_fraction = rope_scaling, rope_fraction
        self.softcap, self.scale, self.implementation = softcap, scale, implementation
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key, self.value = (
            self.projection(
                (self.num_kv_heads, self.head_dim), ("kv_heads", "head_dim"),
                inputs=self.in_kv_features, rngs=rngs,
            )
            for _ in range(2)
        )  # fmt: skip
        self.out = self.output_projection(bias_init=out_bias_init, rngs=rngs)
        norm = {None: None, "layer": LayerNorm, "rms": RMSNorm}[
            "layer" if normalize_qk else qk_norm
        ]
        self.query_ln = self.key_ln = nnx.data(None)
        if norm is not None:
            self.query_ln = norm(self.head_dim, axis="head_dim", param_dtype=param_dtype)
            self.key_ln = norm(self.head_dim, axis="head_dim", param_dtype=param_dtype)
        self.sink_logit = self.key_bias = self.value_bias = nnx.data(None)
        small = nnx.initializers.normal(0.02)
        shape, axes = (num_heads, self.head_dim), ("heads", "head_dim")
        if sink == "sink_logit":
            self.sink_logit = nnx.Param(jnp.zeros((num_heads,), param_dtype), axes=("heads",))
        if sink in ("kv_bias", "k_bias"):
            self.key_bias = nnx.Param(small(rngs.params(), shape, param_dtype), axes=axes)
        if sink in ("kv_bias", "v_bias"):
            self.value_bias = nnx.Param(small(rngs.params(), shape, param_dtype), axes=axes)
        self.rngs = nnx.data(rngs.dropout.fork() if keep_rngs and dropout_rate > 0 else None)

    def __call__(
        self,
        inputs_q: Float[Array, "*b t m"],
        inputs_k: Float[Array, "*b s n"] | None = None,
        inputs_v: Float[Array, "*b s n"] | None = None,
        *,
        mask: Any = None,
        is_causal: bool = False,
        positions: Int[Array, "*b t"] | None = None,
        segment_ids: Int[Array, "*b t"] | None = None,
        cache: Any = None,
        valid: Bool[Array, "*b t"] | None = None,
        deterministic: bool | None = None,
        dropout_rng: Any = None,
        rngs: Any = None,
        decode: bool | None = None,
        edits: Edits | None = None,
        capture: Iterable[str] = (),
    ) -> Any:
        """Attends from `inputs_q` to `inputs_k` and `inputs_v`, by default to itself.

        Args:
          inputs_q: [*b, t, in_features].
          inputs_k: [*b, s, in_kv_features]; None is `inputs_q`.
          inputs_v: [*b, s, in_kv_features]; None is `inputs_k`.
          mask: mask algebra, or booleans broadcastable to [*b, h, t, s] (True attends), on top of
            the module's own causality and window. With a cache, s counts from the start of the
            text.
          is_causal: causal for this call even if the module is not.
          positions: for the rotary embedding; None counts on from the cache's length, or from 0.
          segment_ids: documents packed in a row; tokens see their own document only.
          cache: from `init_cache`; new tokens are stored and attend to all before them.
          valid: True for real tokens, which come first in each row. Padding is neither seen nor
            stored; the output there is meaningless.
          deterministic: True turns dropout off.
          dropout_rng: key for dropout.
          rngs: `nnx.Rngs` or stream to draw that key from, as in flax.
          decode: only for its place in flax's vocabulary; must be None or False.
          edits: interventions of this layer (`attnjax.taps.Edits`).
          capture: names of sites to return (`attnjax.taps.SITES`).

        Returns:
          y [*b, t, out_features]; `(y, cache)` with a cache; captured arrays as a dict last, with
          the batch axes merged into one.

        Raises:
          ValueError: on shapes that do not fit, or dropout without a key.
          NotImplementedError: for an option that does not go with the given cache.
        """
        self._refuse_decode(decode)
        cross = inputs_k is not None or inputs_v is not None
        x, x_k, x_v = self._inputs(inputs_q, inputs_k, inputs_v)
        lead, (b, t) = inputs_q.shape[:-2], x.shape[:2]
        rows = {"positions": positions, "segment_ids": segment_ids, "valid": valid}
        for label, a in rows.items():
            if a is not None and a.shape != inputs_q.shape[:-1]:
                raise ValueError(
                    f"{type(self).__name__}: {label} must have the shape [*batch, length] = "
                    f"{inputs_q.shape[:-1]} of inputs_q, got {a.shape}."
                )
        positions, segment_ids, valid = (
            None if a is None else a.reshape(b, t) for a in rows.values()
        )
        if cross:
            self._refuse_own(cache=cache, **rows)
        if mask is not None and not isinstance(mask, MaskProgram):
            mask = _merge_batch(mask, lead)
        stream = self.rngs if rngs is None else rngs
        stream = stream.dropout if isinstance(stream, nnx.Rngs) else stream
        call = self.begin(
            x, mask=mask, positions=positions, segment_ids=segment_ids, cache=cache, valid=valid,
            deterministic=deterministic, edits=edits, capture=capture,
            dropout_rng=stream if dropout_rng is None else dropout_rng,
        )  # fmt: skip
        call.causal = self.causal or is_causal
        inputs = (x_k, x_v) if cross else (call.x, call.x)
        z = self._attend(call, *self._project(call, *inputs))
        y = self.finish(call, z).reshape(*lead, t, self.out_features)
        return call.tap.result(y) if cache is None else call.tap.result(y, call.cache)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """An empty cache: a ring where a window keeps less than `max_length` tokens, else dense.

        Args:
          batch: rows.
          max_length: tokens per row, prompt and continuation together.
          dtype: of keys and values; None is the module's dtype, or float32.
        """
        dtype = self.dtype or jnp.float32 if dtype is None else dtype
        if self.window is not None and self.window + self.sinks < max_length:
            return RingCache.create(
                batch, self.window, self.num_kv_heads, self.head_dim, dtype=dtype, sinks=self.sinks
            )
        return DenseCache.create(batch, max_length, self.num_kv_heads, self.head_dim, dtype=dtype)

    def layout(self, is_causal: bool = False, segment_ids: Any = None) -> Any:
        """The module's own mask besides causality, or None when everything is visible.

        Args:
          is_causal: causal even where the module is not.
          segment_ids: [b, t] packed documents, each of which has sinks of its own.
        """
        if self.window is None:
            return None
        near = Window(self.window, 0 if self.causal or is_causal else self.window - 1)
        if not self.sinks:
            return near
        return near | (
            Sink(self.sinks) if segment_ids is None else document_sinks(segment_ids, self.sinks)
        )

    def _project(
        self, call: Call, x_k: jax.Array, x_v: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values by head, normalized, edited, and rotated."""
        tap, positions = call.tap, call.positions
        q, k, v = self.query(call.x), self.key(x_k), self.value(x_v)
        if self.query_ln is not None and self.key_ln is not None:
            q, k = self.query_ln(q), self.key_ln(k)
        q, k, v = self.heads(call, q, k, v)
        dtype = compute_dtype(self.dtype, q, k, v)
        q, k, v = q.astype(dtype), k.astype(dtype), v.astype(dtype)
        q_at, k_at = tap.edits.query_positions, tap.edits.key_positions
        if self.rope_base is None:
            if q_at is not None or k_at is not None:
                raise ValueError("edits: positions can be replaced only where rope_base is set.")
            return tap("q_rot", q), tap("k_rot", k), v
        k_default = positions
        if k.shape[1] != q.shape[1]:
            k_default = new_positions(jnp.zeros((k.shape[0],), jnp.int32), k.shape[1])
        if k_at is not None and k_at.ndim == 3 and k_at.shape[1] != k.shape[2]:
            # positions by query head: the shared keys take one copy per position list
            k, v = (jnp.repeat(a, k_at.shape[1] // a.shape[2], axis=2) for a in (k, v))
        q = self._rotate(q, positions if q_at is None else q_at)
        k = self._rotate(k, k_default if k_at is None else k_at)
        return tap("q_rot", q), tap("k_rot", k), v

    def _attend(self, call: Call, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Z [b, t, h, d] before `head_scale`; moves the call's cache on."""
        options = dict(scale=self.scale, softcap=self.softcap, implementation=self.implementation)
        if call.cache is None or isinstance(call.cache, DenseCache):
            layout = self.layout(call.causal, call.segment_ids)
            z, lse = self.attend(call, q, k, v, layout=layout, **options)
        else:
            self._refuse_dense(call)
            (z, lse), call.cache = call.cache.attend(q, k, v, valid=call.valid, **options)
        return z if self.sink == "none" else self._extra_key(call, q, z, lse)

    def _refuse_dense(self, call: Call) -> None:
        """Refuses what needs all keys and their scores."""
        tap, edits = call.tap, call.tap.edits
        given = {
            "mask": call.mask,
            "key_mask": edits.key_mask,
            "score_bias": edits.score_bias,
            "edits of scores": tap.score_mod(call.start),
            "edits of weights": tap.weight_edit(),
            "capture": tap.capture & {"scores", "weights"} or None,
            "dropout": call.dropout_key,
        }
        odd = [label for label, value in given.items() if value is not None]
        if odd:
            cache = type(call.cache).__name__
            raise NotImplementedError(
                f"{type(self).__name__}: {', '.join(odd)} with {cache} is not supported, since it "
                "keeps some keys only; use DenseCache.create(...) as the cache of this layer."
            )

    def _extra_key(self, call: Call, q: jax.Array, z: jax.Array, lse: jax.Array) -> jax.Array:
        """Adds the always visible key; captured weights then leave room for its weight."""
        tap = call.tap
        if (
            tap.edits.weight_edit is not None
            or tap.edits_site("weights")
            or tap.edits_site("scores")
        ):
            raise NotImplementedError(
                f"{type(self).__name__}: edits of scores or weights do not reach the extra key of "
                f"sink={self.sink!r}; use head_scale, score_bias or sink='none'."
            )
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        if self.key_bias is not None:
            key = self.key_bias[...].astype(lse.dtype)
            logits = jnp.einsum("bthd,hd->bth", q.astype(lse.dtype), key) * scale
            if self.softcap is not None:
                logits = self.softcap * jnp.tanh(logits / self.softcap)
        else:
            own = jnp.zeros((self.num_heads,)) if self.sink_logit is None else self.sink_logit[...]
            logits = jnp.broadcast_to(own.astype(lse.dtype)[None, None], lse.shape)
        value = None if self.value_bias is None else self.value_bias[...]
        z, total = add_extra_key(z, lse, logits, value)
        if "weights" in tap.captured:
            weights = tap.captured["weights"]
            left = jnp.exp(lse - total).transpose(0, 2, 1)[..., None]  # [b, h, t, 1]
            tap.captured["weights"] = weights * left.astype(weights.dtype)
        return z

    def _rotate(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotary embedding of x [b, t, h, d] at positions [b, t] or [b, h, t]."""
        assert self.rope_base is not None  # checked by the caller
        rotated = 2 * int(self.head_dim * self.rope_fraction / 2)
        scaling = self.rope_scaling
        # one length for all calls, or cached keys and new queries would turn at different speeds
        length = None if scaling is None else scaling.max_length
        inv_freq, factor = rope_frequencies(rotated, self.rope_base, scaling, length)
        return apply_rope(x, positions, inv_freq, attention_factor=factor)

    def _inputs(self, x: jax.Array, x_k: Any, x_v: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The three inputs as [b, t, m], checked."""
        name = type(self).__name__
        if x_k is None and x_v is not None:
            raise ValueError(f"{name}: inputs_v was given without inputs_k; pass inputs_k instead.")
        x_k = x if x_k is None else x_k
        x_v = x_k if x_v is None else x_v
        for label, a, width in (
            ("inputs_q", x, self.in_features),
            ("inputs_k", x_k, self.in_kv_features),
            ("inputs_v", x_v, self.in_kv_features),
        ):
            if a.ndim < 2 or a.shape[-1] != width or a.shape[:-2] != x.shape[:-2]:
                raise ValueError(
                    f"{name}: {label} must have shape [*batch, length, {width}] with the batch of "
                    f"inputs_q {x.shape}, got {a.shape}."
                )
            if not jnp.issubdtype(a.dtype, jnp.floating):
                raise TypeError(f"{name}: {label} must be floating point, got {a.dtype}.")
        if x_k.shape[-2] != x_v.shape[-2]:
            raise ValueError(
                f"{name}: inputs_k {x_k.shape} and inputs_v {x_v.shape} must have the same length."
            )
        flat = [a.reshape(-1, *a.shape[-2:]) for a in (x, x_k, x_v)]
        return flat[0], flat[1], flat[2]

    def _refuse_own(self, **given: Any) -> None:
        """Refuses what only self-attention has."""
        for label, value in given.items():
            if value is not None:
                raise NotImplementedError(
                    f"{type(self).__name__}: {label} is for self-attention; with inputs_k use "
                    "mask=, for example attnjax.masks.Lengths or attnjax.masks.Segments."
                )

    def _dropout_key(self, deterministic: bool | None, dropout_rng: Any) -> Any:
        """As in `SequenceMixer`; draws from a stream where there is no key."""
        key = super()._dropout_key(deterministic, dropout_rng)
        return key() if callable(key) else key

    def _refuse_decode(self, decode: bool | None) -> None:
        if decode:
            raise NotImplementedError(
                f"{type(self).__name__}: decode=True keeps a cache inside the module; here caches "
                "are values: cache = module.init_cache(batch, max_length); "
                "y, cache = module(x, cache=cache)."
            )


def _merge_batch(mask: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """A mask [*b, h, t, s] with all batch axes merged into one."""
    if len(lead) == 1 or mask.ndim <= 3:
        return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    return jnp.broadcast_to(mask, (*lead, *mask.shape[-3:])).reshape(-1, *mask.shape[-3:])


def _example() -> tuple[MultiHeadAttention, jax.Array]:
    module = MultiHeadAttention(4, 16, num_kv_heads=2, causal=True, rope_base=1e4, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="multi_head_attention",
    title="Attention Is All You Need",
    arxiv="1706.03762",
    year=2017,
    function=attention,
    module=MultiHeadAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    golden=("explicit_attn_bias", "rope_family"),
    kernel="flash",
    cost="O(T^2), with a window O(T w)",
    reduces_to={"window=T": "multi_head_attention without a window"},
    example=_example,
)
