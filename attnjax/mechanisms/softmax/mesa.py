"""Mesa: exact forward passes whose activations are kept for the backward pass in 8 bits.

    α = max - min, β = min of every group (a head, or a group of channels), running means of both
    code = clip(round((x - β) 255 / α + u - 1/2), 0, 255),   x̃ = code α / 255 + β

u is uniform in (0, 1) (stochastic rounding, so that x̃ is right on average) or 1/2 (nearest). Each
operation computes its output from x and its gradient from x̃: a linear map keeps x̃, a product of
activations both factors, softmax its output, GELU its input, layer norm x̃ and its exact mean and
deviation. That is a quarter of the bytes of float32, half of those of bfloat16, without computing
anything twice; gradients are exact where activations lie on the grid, else off by at most α / 255
per element of x̃.

Ranges are state, not parameters: the first training step copies them, later ones move them by a
tenth. The official kernel lets values above the running range wrap around; here they are clipped.

Reference: Pan et al., "Mesa: A Memory-saving Training Framework for Transformers", 2021,
arXiv:2111.11124; official code ziplab/Mesa.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from attnjax.cache.linear_state import state_dtype
from attnjax.checks import check_qkv
from attnjax.dense import qk_scores, softmax_weights, weighted_values
from attnjax.layers import add_bias, compute_dtype
from attnjax.mixer import Call, SequenceMixer
from attnjax.spec import Mechanism

LEVELS = 255
"""Steps of an 8-bit grid."""


@dataclasses.dataclass(frozen=True)
class QuantStats:
    """Range α and shift β of every group of an activation.

    Attributes:
      range: [n], largest minus smallest value; negative where nothing was seen yet.
      shift: [n], smallest value.
    """

    range: Any  # arrays, in whose place `jax.custom_vjp` puts others while it works
    shift: Any

    @classmethod
    def empty(cls, groups: int, dtype: Any = jnp.float32) -> QuantStats:
        """Ranges that the first update replaces."""
        return cls(jnp.full((groups,), -1, dtype), jnp.zeros((groups,), dtype))

    @classmethod
    def measure(
        cls, x: Float[Array, "..."], axis: int = 1, groups: int | None = None
    ) -> QuantStats:
        """The ranges of one array.

        Args:
          x: an activation.
          axis: the axis of heads or channels.
          groups: neighbors along `axis` share a range so that this many remain; None is one each.
        """
        axis = axis % x.ndim
        size = x.shape[axis]
        groups = size if groups is None else groups
        if groups < 1 or size % groups:
            raise ValueError(
                f"mesa: groups={groups} must divide the {size} heads or channels of axis {axis}."
            )
        wide = jax.lax.stop_gradient(x).astype(state_dtype(x.dtype))
        shape = (*x.shape[:axis], groups, size // groups, *x.shape[axis + 1 :])
        wide, others = wide.reshape(shape), tuple(i for i in range(x.ndim + 1) if i != axis)
        low = wide.min(others)
        return cls(wide.max(others) - low, low)

    def update(self, x: Float[Array, "..."], axis: int = 1, decay: float = 0.9) -> QuantStats:
        """The running ranges after one more training step; the first step copies.

        Args:
          x: the activation of the step.
          axis: the axis of heads or channels.
          decay: what the running values keep of themselves; 1 leaves ranges alone that were set
            before. Official: 0.9.
        """
        new = QuantStats.measure(x, axis, len(self.range))
        seen = self.range >= 0

        def move(old: jax.Array, now: jax.Array) -> jax.Array:
            now = now.astype(old.dtype)
            moved = old if decay == 1 else decay * old + (1 - decay) * now
            return jnp.where(seen, moved, now)

        return QuantStats(move(self.range, new.range), move(self.shift, new.shift))


jax.tree_util.register_dataclass(QuantStats, data_fields=["range", "shift"], meta_fields=[])


def mesa_quantize(
    x: Float[Array, "..."], stats: QuantStats, *, axis: int = 1, rng: Any = None
) -> UInt8[Array, "..."]:
    """Codes 0 .. 255 of x on the grid of its group; values out of range are clipped.

    Args:
      x: an activation.
      stats: ranges; their number divides the size of `axis`. A group of range 0 gets code 0.
      axis: the axis of heads or channels.
      rng: key for stochastic rounding; None rounds to the nearest.
    """
    dtype = state_dtype(x.dtype)
    alpha, beta = _along(stats, x, axis, dtype)
    flat = alpha <= 0
    place = (x.astype(dtype) - beta) * LEVELS / jnp.where(flat, 1, alpha)
    if rng is not None:
        place = place + jax.random.uniform(rng, x.shape, dtype) - 0.5
    place = jnp.where(flat, 0, jnp.round(place))
    return jnp.clip(place, 0, LEVELS).astype(jnp.uint8)


def mesa_dequantize(
    codes: UInt8[Array, "..."], stats: QuantStats, *, axis: int = 1, dtype: Any = jnp.float32
) -> Float[Array, "..."]:
    """The values x̃ that codes stand for, within α / 255 of the quantized ones."""
    wide = state_dtype(dtype)
    alpha, beta = _along(stats, codes, axis, wide)
    return (codes.astype(wide) * alpha / LEVELS + beta).astype(dtype)


def _along(stats: QuantStats, x: jax.Array, axis: int, dtype: Any) -> list[jax.Array]:
    """α and β of every head or channel, shaped to broadcast against x."""
    axis = axis % x.ndim
    size = x.shape[axis]
    shape = tuple(size if i == axis else 1 for i in range(x.ndim))
    return [
        jnp.repeat(a.astype(dtype), size // len(a), total_repeat_length=size).reshape(shape)
        for a in (stats.range, stats.shift)
    ]


# -------------------------------------------------------------------- operations that save 8 bits


@dataclasses.dataclass(frozen=True)
class _Operation:
    """An operation with an exact output, whose gradient is taken from 8-bit copies.

    Attributes:
      forward: `(arrays, exact) -> (output, saved, kept)`; of `saved` 8-bit copies are kept for the
        gradient, `kept` as it is.
      backward: `(copies, kept, dy) -> (gradients of arrays, gradients of exact)`.
      axes: of heads or channels in every saved activation.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    axes: tuple[int, ...]

    @classmethod
    def plain(cls, function: Callable[..., Any], *axes: int) -> _Operation:
        """function(*arrays, *exact), which saves the arrays and differentiates at the copies."""

        def forward(arrays: Any, exact: Any) -> Any:
            return function(*arrays, *exact), arrays, exact

        def backward(copies: Any, exact: Any, dy: Any) -> Any:
            grads = jax.vjp(function, *copies, *exact)[1](dy)
            return grads[: len(copies)], grads[len(copies) :]

        return cls(forward, backward, axes)


def _exact(
    operation: _Operation, decay: float, arrays: Any, exact: Any, stats: Any, rng: Any
) -> tuple[Any, tuple[QuantStats, ...]]:
    """The output and the ranges of what is saved: `stats` moved by `decay` (1: left alone)."""
    output, saved, _ = operation.forward(arrays, exact)
    return output, _moved(operation, decay, saved, stats)


def _moved(operation: _Operation, decay: float, saved: Any, stats: Any) -> tuple[QuantStats, ...]:
    parts = zip(saved, operation.axes, stats, strict=True)
    return tuple(old.update(x, axis, decay) for x, axis, old in parts)


def _forward(
    operation: _Operation, decay: float, arrays: Any, exact: Any, stats: Any, rng: Any
) -> Any:
    output, saved, kept = operation.forward(arrays, exact)
    stats = _moved(operation, decay, saved, stats)
    keys = [None] * len(saved) if rng is None else jax.random.split(rng, len(saved))
    parts = zip(saved, stats, operation.axes, keys, strict=True)
    codes = [mesa_quantize(x, own, axis=axis, rng=key) for x, own, axis, key in parts]
    dtypes = [jnp.zeros((0,), x.dtype) for x in saved]  # residuals are arrays
    return (output, stats), (codes, dtypes, stats, kept)


def _backward(operation: _Operation, decay: float, residuals: Any, dy: Any) -> Any:
    codes, dtypes, stats, kept = residuals
    copies = tuple(
        mesa_dequantize(code, own, axis=axis, dtype=like.dtype)
        for code, own, axis, like in zip(codes, stats, operation.axes, dtypes, strict=True)
    )
    return *operation.backward(copies, kept, dy[0]), None, None


_run = jax.custom_vjp(_exact, nondiff_argnums=(0, 1))
_run.defvjp(_forward, _backward)


def _empty(x: jax.Array, groups: int) -> QuantStats:
    """Ranges that those of x itself replace."""
    return QuantStats.empty(groups, state_dtype(x.dtype))


def _products(x: jax.Array, *kernels: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jax.lax.dot_general(x, w, (((x.ndim - 1,), (0,)), ((), ()))) for w in kernels)


_LINEAR = _Operation.plain(_products, -1)
_GELU = _Operation.plain(functools.partial(jax.nn.gelu, approximate=False), -1)


def mesa_linear(
    x: Float[Array, "*b c"],
    *kernels: Float[Array, "c _"],
    stats: QuantStats | None = None,
    groups: int = 1,
    rng: Any = None,
) -> tuple[Float[Array, "*b _"], ...]:
    """Linear maps x W of one input, of which x is saved once, in 8 bits.

    Args:
      x: any leading axes.
      kernels: matrices, saved as they are (they are parameters).
      stats: ranges of x's channels; None takes those of x itself.
      groups: channel groups where `stats` is None; 1 is one range for all channels.
      rng: key for stochastic rounding; None rounds to the nearest.

    Returns:
      One output per kernel.
    """
    return _run(_LINEAR, 1.0, (x,), kernels, (stats or _empty(x, groups),), rng)[0]


def mesa_matmul(
    a: Float[Array, "*b t c"],
    b: Float[Array, "*b c s"],
    *,
    stats: tuple[QuantStats, QuantStats] | None = None,
    axis: int = 1,
    rng: Any = None,
) -> Float[Array, "*b t s"]:
    """The product a b of two activations, both saved in 8 bits.

    Args:
      a, b: any equal leading axes.
      stats: ranges of a and of b; None takes those of the arrays, one per entry of `axis`.
      axis: the axis of heads in both.
      rng: as in `mesa_linear`.
    """
    known = stats or (_empty(a, a.shape[axis]), _empty(b, b.shape[axis]))
    return _run(_Operation.plain(jnp.matmul, axis, axis), 1.0, (a, b), (), known, rng)[0]


def mesa_gelu(
    x: Float[Array, "*b c"],
    *,
    stats: QuantStats | None = None,
    groups: int = 1,
    rng: Any = None,
) -> Float[Array, "*b c"]:
    """GELU (with erf) whose input is saved in 8 bits; arguments as in `mesa_linear`."""
    return _run(_GELU, 1.0, (x,), (), (stats or _empty(x, groups),), rng)[0]


def mesa_softmax(
    scores: Float[Array, "b h t s"],
    keep: Bool[Array, "#b #h t s"] | None = None,
    stats: QuantStats | None = None,
    rng: Any = None,
) -> Float[Array, "b h t s"]:
    """Softmax over the visible keys, whose output is saved in 8 bits, and its mask exactly.

        dx = ỹ (dy - Σ ỹ dy)

    Args:
      scores: float32 or wider.
      keep: True = attend; a row without keys gives 0.
      stats: ranges by head of the output; None takes its own.
      rng: as in `mesa_linear`.
    """
    known = stats or _empty(scores, scores.shape[1])
    return _run(_SOFTMAX, 1.0, (scores,), (keep,), (known,), rng)[0]


def _softmax(arrays: Any, exact: Any) -> Any:
    weights = softmax_weights(*arrays, *exact)[0]
    return weights, (weights,), exact


def _softmax_slope(copies: Any, exact: Any, dy: jax.Array) -> Any:
    (weights,), (keep,) = copies, exact
    if keep is not None:  # also where the grid has no 0: no gradient leaks to hidden keys
        weights = jnp.where(keep, weights, jnp.zeros_like(weights))
    return (weights * (dy - (weights * dy).sum(-1, keepdims=True)),), None


_SOFTMAX = _Operation(_softmax, _softmax_slope, (1,))


def mesa_layer_norm(
    x: Float[Array, "*b c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    epsilon: float = 1e-6,
    stats: QuantStats | None = None,
    rng: Any = None,
) -> Float[Array, "*b c"]:
    """Layer norm that saves x in 8 bits, its mean and 1 / deviation exactly.

    Args:
      x: any leading axes.
      scale, bias: by channel.
      epsilon: added to the variance.
      stats, rng: as in `mesa_linear`.
    """
    norm = _Operation(functools.partial(_norm, epsilon), _norm_slope, (-1,))
    return _run(norm, 1.0, (x,), (scale, bias), (stats or _empty(x, 1),), rng)[0]


def _norm(epsilon: float, arrays: Any, exact: Any) -> Any:
    (x,), (scale, bias) = arrays, exact
    wide = x.astype(state_dtype(x.dtype))
    mean = wide.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(wide - mean).mean(-1, keepdims=True) + epsilon)
    y = add_bias((wide - mean) * rstd * _row(scale, wide), bias).astype(x.dtype)
    return y, arrays, (mean, rstd, scale, bias)


def _norm_slope(copies: Any, kept: Any, dy: jax.Array) -> Any:
    (x,), (mean, rstd, scale, bias) = copies, kept
    normal = (x.astype(mean.dtype) - mean) * rstd
    wide, rows = dy.astype(mean.dtype), tuple(range(dy.ndim - 1))
    inner = wide * _row(scale, wide)
    straight = inner - inner.mean(-1, keepdims=True)
    dx = rstd * (straight - normal * (inner * normal).mean(-1, keepdims=True))
    dscale = (wide * normal).sum(rows).astype(scale.dtype)
    return (dx.astype(dy.dtype),), (dscale, wide.sum(rows).astype(bias.dtype))


def _row(scale: jax.Array, like: jax.Array) -> jax.Array:
    return scale.reshape((1,) * (like.ndim - 1) + scale.shape).astype(like.dtype)


def mesa_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    *,
    mask: Bool[Array, "#b #h t s"] | None = None,
    scale: float | None = None,
    stats: Mapping[str, QuantStats] | None = None,
    decay: float | None = None,
    rng: Any = None,
) -> Any:
    """Softmax attention that saves query, key, value and weights in 8 bits for its gradient.

        o = softmax(scale q kᵀ) v exactly;   gradients from q̃, k̃, ṽ and w̃

    Args:
      query, key, value: shapes as annotated; h a multiple of g.
      mask: True = attend; None attends everywhere. A row without keys gives 0.
      scale: None is d^-0.5.
      stats: ranges by head of "query", "key", "value" and "weights"; those of the arrays
        themselves where one is absent or empty.
      decay: of a training step, which moves the ranges; None leaves them alone.
      rng: key for stochastic rounding; None rounds to the nearest.

    Returns:
      Output in the dtype of `query`, equal to that of plain attention; with `decay` also the new
      stats.

    Memory: t s bytes per head, and d per token and head, a quarter of float32's.

    Raises:
      ValueError: on shapes that do not fit together, or unknown names in `stats`.

    Example: >>> mesa_attention(q, k, v, rng=jax.random.key(0)).shape
    Reference: Pan et al., 2021, arXiv:2111.11124, section 3.
    """
    check_qkv("mesa_attention", query, key, value)
    sizes = dict(query=query, key=key, value=value, weights=query)
    given = dict(stats or {})
    unknown = sorted(set(given) - set(sizes))
    if unknown:
        raise ValueError(
            f"mesa_attention: stats must be of query, key, value and weights, got {unknown}."
        )
    known = tuple(given.get(name) or _empty(x, x.shape[2]) for name, x in sizes.items())
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    attend = _Operation(
        functools.partial(_attend, factor), functools.partial(_attend_slope, factor), (2, 2, 2, 1)
    )
    arrays = (query, key, value)
    out, new = _run(attend, 1.0 if decay is None else decay, arrays, (mask,), known, rng)
    return out if decay is None else (out, dict(zip(sizes, new, strict=True)))


def _attend(scale: float, arrays: Any, exact: Any) -> Any:
    q, k, v = arrays
    weights = softmax_weights(qk_scores(q, k, scale), *exact)[0]
    return weighted_values(weights, v).astype(q.dtype), (q, k, v, weights), exact


def _attend_slope(scale: float, copies: Any, exact: Any, dy: jax.Array) -> Any:
    q, k, v, weights = copies
    if exact[0] is not None:
        weights = jnp.where(exact[0], weights, jnp.zeros_like(weights))
    dw, dv = jax.vjp(weighted_values, weights, v)[1](dy.astype(weights.dtype))
    (ds,), _ = _softmax_slope((weights,), exact, dw)
    dq, dk = jax.vjp(lambda q, k: qk_scores(q, k, scale), q, k)[1](ds)
    return (dq, dk, dv), None


# ---------------------------------------------------------------------------------- the module


class RunningRange(nnx.Variable):
    """Running α and β [2, n] of one activation; state of training, no parameter."""


@dataclasses.dataclass
class _MesaCall(Call):
    """A call that also knows whether it is a training step, which moves the ranges."""

    training: bool = False


class MesaAttention(SequenceMixer):
    """Multi-head attention that saves its activations in 8 bits: input, q, k, v, weights and z.

    A call with `deterministic=False` is a training step and moves the running ranges. Before the
    first one, and in calls of other kinds, gradients use the ranges of the arrays themselves where
    there are no running ones yet. Evaluation and decoding are exact attention.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      rounding: "stochastic" (official) or "nearest". The noise is drawn from a key that is a hash
        of the input, so that no random state is needed.
      decay: of the running ranges, official: 0.9; None has none of them and takes the ranges of
        the arrays themselves, so that the module holds parameters alone.
      **options: of `SequenceMixer`.

    Raises:
      NotImplementedError: for dropout.
    """

    sites = ("q", "k", "v", "z", "attn_out")
    directions = ("causal", "bidirectional")
    grouped = masked = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        rounding: str = "stochastic",
        decay: float | None = 0.9,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(
                f"MesaAttention: rounding must be 'stochastic' or 'nearest', got {rounding!r}."
            )
        if decay is not None and not 0.0 <= decay < 1.0:
            raise ValueError(f"MesaAttention: decay must be in [0, 1) or None, got {decay}.")
        if self.dropout_rate:
            raise NotImplementedError(
                "MesaAttention: dropout_rate is not supported; leave dropout_rate=0."
            )
        self.rounding, self.decay = rounding, decay
        kv = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(kv, rngs=rngs)
        self.value = self.projection(kv, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)

        def ranges(groups: int) -> Any:
            if decay is None:
                return nnx.data(None)
            start = QuantStats.empty(groups)
            return RunningRange(jnp.stack([start.range, start.shift]))

        self.x_range = ranges(math.gcd(num_heads, in_features))
        self.query_range, self.key_range = ranges(num_heads), ranges(self.num_kv_heads)
        self.value_range, self.weights_range = ranges(self.num_kv_heads), ranges(num_heads)
        self.z_range = ranges(num_heads)

    def begin(self, x: jax.Array, *, deterministic: bool | None = None, **options: Any) -> Call:
        """Checks the arguments of a call; see `SequenceMixer.__call__`."""
        call = super().begin(x, deterministic=deterministic, **options)
        mode = self.deterministic if deterministic is None else deterministic
        return _MesaCall(**vars(call), training=mode is False)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        parts = (self.query, self.key, self.value)
        q, k, v = self.heads(call, *self._project(call, call.x, self.x_range, parts, 0))
        q, k = self.rotate(call, q, k)
        if call.cache is not None:
            return self.attend(call, q, k, v)[0]
        ranges = {
            "query": self.query_range, "key": self.key_range, "value": self.value_range,
            "weights": self.weights_range,
        }  # fmt: skip
        z, new = mesa_attention(
            q, k, v, mask=call.keep(k.shape[1]), decay=self._decay(call), rng=self._noise(call, 1),
            stats={n: QuantStats(*kept[...]) for n, kept in ranges.items() if kept is not None},
        )  # fmt: skip
        for name, kept in ranges.items():
            self._keep(call, kept, new[name])
        return z

    def finish(self, call: Call, z: jax.Array) -> jax.Array:
        """The output [b, t, out_features] of z, which is saved in 8 bits."""
        z = call.tap.heads(z)
        flat = z.reshape(*z.shape[:2], -1)
        return call.tap("attn_out", self._project(call, flat, self.z_range, (self.out,), 2)[0])

    def _project(
        self, call: Call, x: jax.Array, kept: Any, parts: tuple[Any, ...], place: int
    ) -> list[jax.Array]:
        """The projections of x [b, t, c], which is saved once for all of them."""
        kernels = [part.kernel[...] for part in parts]
        dtype = compute_dtype(self.dtype, x, *kernels)
        flat = tuple(kernel.astype(dtype).reshape(x.shape[-1], -1) for kernel in kernels)
        own = _empty(x, math.gcd(self.num_heads, x.shape[-1]))
        stats = own if kept is None else QuantStats(*kept[...])
        outputs, (new,) = _run(
            _LINEAR, self._decay(call), (x.astype(dtype),), flat, (stats,), self._noise(call, place)
        )
        self._keep(call, kept, new)
        outputs = [
            y.reshape(*y.shape[:-1], *kernel.shape[part.rank :])
            for y, kernel, part in zip(outputs, kernels, parts, strict=True)
        ]
        return [
            y if part.bias is None else add_bias(y, part.bias[...])
            for y, part in zip(outputs, parts, strict=True)
        ]

    def _decay(self, call: Call) -> float:
        """1 leaves ranges that were ever set alone."""
        training = isinstance(call, _MesaCall) and call.training
        return self.decay if training and self.decay is not None else 1.0

    def _keep(self, call: Call, kept: Any, stats: QuantStats) -> None:
        if kept is not None and isinstance(call, _MesaCall) and call.training:
            kept[...] = jnp.stack([stats.range, stats.shift]).astype(kept[...].dtype)

    def _noise(self, call: Call, place: int) -> Any:
        """Key for the noise of one saved activation: a hash of the input; None for nearest."""
        if self.rounding == "nearest":
            return None
        total = jax.lax.stop_gradient(call.x).astype(jnp.float32).sum()
        bits = jax.lax.bitcast_convert_type(total, jnp.uint32)
        return jax.random.fold_in(jax.random.key(place), bits)


def _example() -> tuple[MesaAttention, jax.Array]:
    module = MesaAttention(4, 16, num_kv_heads=2, rope_base=1e4, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


def _picture() -> dict[str, jax.Array]:
    """Causal weights, and how far their 8-bit copies are off, in units of 1e-3."""
    scores = 2 * jax.random.normal(jax.random.key(0), (1, 1, 16, 16))
    keep = jnp.tril(jnp.ones((1, 1, 16, 16), bool))
    weights = softmax_weights(scores, keep)[0]
    stats = QuantStats.measure(weights)
    off = mesa_dequantize(mesa_quantize(weights, stats), stats) - weights
    return {"weights": weights[0, 0], "error of 8 bits, 1e-3": 1e3 * off[0, 0]}


SPEC = Mechanism(
    id="mesa",
    title="Mesa: A Memory-saving Training Framework for Transformers",
    arxiv="2111.11124",
    year=2021,
    code="ziplab/Mesa",
    function=mesa_attention,
    module=MesaAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="einsum",
    cost="O(T^2), T^2 bytes saved per head",
    reduces_to={"no gradient taken": "multi_head_attention"},
    picture=_picture,
    golden=("mesa_quant",),
    reading="The hash that seeds the rounding; values out of range are clipped, not wrapped.",
    example=_example,
)
