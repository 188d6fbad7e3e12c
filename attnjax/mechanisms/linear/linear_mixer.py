"""What the modules around `linear_attention` share: short convolutions, the state, the gated norm.

A mixer of this family projects the input, convolves what it projected with a few taps, runs the
recurrence of `linear_attention`, and normalizes and gates what it reads, head by head. Its cache is
a `StateCache`: the state of the recurrence, float32 or wider, and the last tokens of every
convolution.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnjax.cache import StateCache
from attnjax.cache.linear_state import state_dtype
from attnjax.convolution import causal_conv
from attnjax.layers import LayerNorm, RMSNorm
from attnjax.mechanisms.linear.linear_attention import (
    linear_attention,
    linear_attention_step,
    runs,
)
from attnjax.mixer import Call, SequenceMixer

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "elu": lambda x: jax.nn.elu(x) + jnp.ones((), x.dtype),
    "identity": lambda x: x,
}
"""Activations of queries and keys by name; "elu" is elu(x) + 1, which is positive."""


class ShortConvolution(nnx.Module):
    """A causal convolution of every channel by itself, then an activation.

    Args:
      features: sizes of the channel axes.
      width: taps, in tokens; the last one is the current token.
      axes: logical names of the channel axes.
      activation: a name of `ACTIVATIONS`.
      use_bias: whether every channel has a bias.
      param_dtype: of the parameters; taps start uniform in ±width^-0.5.
      rngs: stream `params`.

    Raises:
      ValueError: when width < 1.
    """

    def __init__(
        self,
        features: tuple[int, ...],
        width: int,
        *,
        axes: tuple[str | None, ...],
        activation: str = "silu",
        use_bias: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width < 1:
            raise ValueError(f"ShortConvolution: width={width} must be at least 1 token.")
        bound = width**-0.5
        taps = jax.random.uniform(rngs.params(), (width, *features), param_dtype, -bound, bound)
        self.kernel = nnx.Param(taps, axes=(None, *axes))
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(features, param_dtype), axes=axes)
        self.features, self.width, self.activation = features, width, activation

    def __call__(
        self, x: Float[Array, "b t *c"], call: Call, state: Float[Array, "b w1 *c"] | None
    ) -> tuple[Float[Array, "b t *c"], Float[Array, "b w1 *c"]]:
        """The convolved x, and its last width - 1 tokens."""
        bias = None if self.bias is None else self.bias[...].astype(x.dtype)
        y, tail = causal_conv(
            x, self.kernel[...].astype(x.dtype), bias, state=state, segment_ids=call.segment_ids,
            valid=call.valid,
        )  # fmt: skip
        return ACTIVATIONS[self.activation](y), tail


class LinearMixer(SequenceMixer):
    """Base class of the mixers around a recurrence such as `linear_attention`; always causal.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      key_factor, value_factor: widths of a head's keys and values, as multiples of
        qkv_features / num_heads.
      chunk_size: tokens per chunk; None chooses by device. Changes speed and rounding only.
      rngs: stream `params`.
      **options: of `SequenceMixer`; there is no dropout.

    Raises:
      ValueError: when a factor gives a fraction of a channel, or chunk_size < 1.
      NotImplementedError: for dropout_rate > 0, as there are no weights to drop.
    """

    drops = False

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        key_factor: float = 1.0,
        value_factor: float = 1.0,
        chunk_size: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        name = type(self).__name__
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"{name}: chunk_size={chunk_size} must be at least 1 token, or None.")
        self.key_dim, self.value_dim = (
            _width(name, label, self.head_dim, factor)
            for label, factor in (("key_factor", key_factor), ("value_factor", value_factor))
        )
        self.chunk_size = chunk_size
        self.query_conv = nnx.data(None)
        self.key_conv = nnx.data(None)
        self.value_conv = nnx.data(None)
        self.gate: Any = nnx.data(None)

    # ------------------------------------------------------------------ for subclasses: building

    def convolutions(
        self,
        width: int | None,
        features: dict[str, tuple[int, ...]] | None = None,
        *,
        activation: str = "silu",
        value_activation: str = "silu",
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the short convolutions of queries, keys and values.

        Args:
          width: taps, in tokens; None makes none.
          features: "query", "key", "value" -> sizes of the channel axes; None is by head.
          activation: after the convolutions of queries and keys, a name of `ACTIVATIONS`.
          value_activation: after that of values.
          use_bias: whether every channel has a bias.
          rngs: stream `params`.
        """
        if width is None:
            return
        h = self.num_heads
        sizes = {"query": (h, self.key_dim), "key": (h, self.key_dim), "value": (h, self.value_dim)}
        for part, size in (sizes | (features or {})).items():
            names = ("heads", "head_dim") if size[0] == h else (None, None)
            conv = ShortConvolution(
                size, width, axes=names, use_bias=use_bias, param_dtype=self.param_dtype,
                activation=value_activation if part == "value" else activation, rngs=rngs,
            )  # fmt: skip
            setattr(self, f"{part}_conv", conv)

    def output_layers(
        self, *, gate: bool, norm: str = "rms", epsilon: float = 1e-5, rngs: nnx.Rngs
    ) -> None:
        """Makes the norm over a head's values, the gate and the output projection.

        Args:
          gate: whether z = norm(o) silu(x W); without it z = norm(o).
          norm: "rms" or "layer".
          epsilon: of the norm.
          rngs: stream `params`.
        """
        kinds = {"rms": RMSNorm, "layer": LayerNorm}
        if norm not in kinds:
            raise ValueError(
                f"{type(self).__name__}: norm={norm!r} is unknown; pass one of {sorted(kinds)}."
            )
        self.norm = kinds[norm](
            self.value_dim, epsilon=epsilon, axis="head_dim", param_dtype=self.param_dtype
        )
        if gate:
            self.gate = self.projection((self.num_heads, self.value_dim), rngs=rngs)
        self.out = self.output_projection(self.value_dim, rngs=rngs)

    # ------------------------------------------------------------------- for subclasses: calling

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what one row's cache holds: the state, and the tails of the convolutions.

        Names that end in `_conv` hold tokens, in the module's dtype; others are states.
        """
        shapes: dict[str, tuple[int, ...]] = {
            "state": (self.num_heads, self.key_dim, self.value_dim)
        }
        for part in ("query", "key", "value"):
            conv = getattr(self, f"{part}_conv")
            if conv is not None:
                shapes[f"{part}_conv"] = (conv.width - 1, *conv.features)
        return shapes

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> StateCache:
        """An empty state.

        Args:
          batch: rows.
          max_length: unused; the state is as large for any length.
          dtype: of the convolutions' tokens; None is the module's dtype, or that of the
            parameters. States are float32, or float64 where this is.
        """
        del max_length
        self._require_decoding()
        dtype = (self.dtype or self.param_dtype) if dtype is None else dtype
        shapes = self.state_shapes()
        wide = state_dtype(dtype)
        kinds = {name: dtype if name.endswith("_conv") else wide for name in shapes}
        return StateCache.create(batch, shapes, kinds)

    def begin(self, x: jax.Array, **options: Any) -> Call:
        """Checks the arguments of a call; see `SequenceMixer.begin`."""
        call = super().begin(x, **options)
        if call.segment_ids is not None:
            call.segment_ids = runs(call.segment_ids)
        if call.cache is None:
            return call
        have = {name: array.shape[1:] for name, array in call.cache.state.items()}
        if have != self.state_shapes():
            raise ValueError(
                f"{type(self).__name__}: the cache holds {have}, needed is {self.state_shapes()}; "
                "make it with init_cache of the same module."
            )
        return call

    def convolved(self, call: Call, part: str, states: dict[str, jax.Array]) -> jax.Array:
        """The projection `part` of the input after its convolution, if it has one.

        Args:
          call: the call.
          part: "query", "key" or "value".
          states: takes the convolution's new tail.
        """
        x = getattr(self, part)(call.x)
        conv = getattr(self, f"{part}_conv")
        if conv is None:
            return x
        name = f"{part}_conv"
        old = None if call.cache is None else call.cache.state[name]
        y, states[name] = conv(x, call, old)
        return y

    def recur(
        self,
        call: Call,
        states: dict[str, jax.Array],
        query: Float[Array, "b t h k"],
        key: Float[Array, "b t h k"],
        value: Float[Array, "b t h v"],
        *,
        decay: Float[Array, " h"] | Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
        beta: Float[Array, "b t h"] | None = None,
        scale: float | None = None,
    ) -> Float[Array, "b t h v"]:
        """`linear_attention` from the call's state on; moves the call's cache on.

        Padding neither writes nor decays the state, and documents start from an empty one.

        Args:
          call: the call.
          states: further states of the cache after this call.
          query, key, value: shapes as annotated.
          decay, beta, scale: as in `linear_attention`.
        """
        if call.valid is not None:
            real = call.valid
            key = jnp.where(real[..., None, None], key, jnp.zeros_like(key))
            if decay is not None:
                decay = decay[None, None] if decay.ndim == 1 else decay
                mask = real.reshape(*real.shape, *(1,) * (decay.ndim - 2))
                decay = decay * mask.astype(decay.dtype)
            if beta is not None:
                beta = beta * real[..., None].astype(beta.dtype)
        if call.cache is None:
            only: Any = linear_attention(
                query, key, value, decay=decay, beta=beta, scale=scale,
                segment_ids=call.segment_ids, chunk_size=self.chunk_size,
            )  # fmt: skip
            return only
        old = call.cache.state["state"]
        if query.shape[1] == 1:
            if decay is not None and decay.ndim > 1:
                decay = decay[:, 0]
            out, new = linear_attention_step(
                query[:, 0], key[:, 0], value[:, 0], old, decay=decay, scale=scale,
                beta=None if beta is None else beta[:, 0],
            )  # fmt: skip
            out = out[:, None]
        else:
            out, new = linear_attention(
                query, key, value, decay=decay, beta=beta, scale=scale, initial_state=old,
                return_state=True, chunk_size=self.chunk_size,
            )  # fmt: skip
        call.cache = call.cache.next(call.count, state=new, **states)
        return out

    def gated(self, call: Call, o: Float[Array, "b t h v"]) -> Float[Array, "b t h v"]:
        """Z: what was read, normalized by head and gated where the mixer has a gate."""
        z = self.norm(o)
        return z if self.gate is None else z * jax.nn.silu(self.gate(call.x)).astype(z.dtype)


def unit_norm(x: Float[Array, "*b d"], epsilon: float = 1e-6) -> Float[Array, "*b d"]:
    """X · rsqrt(sum(x²) + epsilon) over the last axis, at least float32 inside."""
    wide = x.astype(state_dtype(x.dtype))
    length = jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * length).astype(x.dtype)


def step_bias(
    rngs: nnx.Rngs, heads: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4
) -> Float[Array, " h"]:
    """Biases whose softplus is log-uniform in [low, high]: the first steps of Mamba's states."""
    drawn = jax.random.uniform(rngs.params(), (heads,), jnp.float32, math.log(low), math.log(high))
    step = jnp.maximum(jnp.exp(drawn), floor)
    return step + jnp.log(-jnp.expm1(-step))


def step_decay(step: Float[Array, "b t h"], log_rate: Float[Array, " h"]) -> Float[Array, "b t h"]:
    """Log decay -exp(log_rate) · step of every token and head, in the dtype of the states."""
    dtype = state_dtype(step.dtype)
    return -jnp.exp(log_rate.astype(dtype))[None, None] * step.astype(dtype)


def _width(name: str, label: str, head_dim: int, factor: float) -> int:
    width = head_dim * factor
    if width < 1 or abs(width - round(width)) > 1e-6:
        raise ValueError(
            f"{name}: {label}={factor} of {head_dim} channels per head is {width:g}, not a whole "
            f"number of channels; change {label} or qkv_features."
        )
    return round(width)
