"""Adaptive filter attention: keys are carried to the query's time by a noisy linear system.

Channels are complex, each head is a stable system dx = (μ + iω) x dt + noise, μ < 0. A key is
evidence about the state at the query's time, Δ = |t_i - t_j| later, when it has turned, decayed
and become uncertain:

    E_ij = e^(μΔ),   V_ij = σ² (1 - e^(2μΔ)) / (-2μ) + η² e^(2μΔ) + γ²       propagated variance
    q̃ = e^(-iωt) q, k̃ and ṽ alike,   R_ij = |q_i|² + E² |k_j|² - 2 E Re(q̃_i* k̃_j)    residual
    L_ij = τ² [B_ij - ln(1 + R_ij / S_ij)]       robust, or   τ² [B_ij - R_ij / S_ij]    Gaussian
    A = softmax(L),   o_i = e^(iωt_i) Σ_j A_ij E_ij ṽ_j

with B = -ln V and S = ν d V by default. E multiplies after the softmax; with L' = L + μΔ the output
is softmax(L') ṽ · e^(lse' - lse), two calls of block-sparse attention and no t x t array.

Complex numbers are pairs of real arrays, all real parts before all imaginary parts.

Reference: Racioppo, "Attention as an Adaptive Filter", 2025, arXiv:2509.04154, with the author's
torch code (isotropic form), whose behavior is the default: softmax over the past, and inner
residuals and norms off.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Num

from attnjax.attention import DENSE_SCORES, attention
from attnjax.checks import check_qkv
from attnjax.dense import qk_scores, softmax_weights, weighted_values
from attnjax.masks import Mask
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.positions.rope import rotate
from attnjax.spec import Mechanism
from pallas_kernels.maskprogram import look_up
from pallas_kernels.tilemath import accumulator_dtype

BIASES = ("none", "variance", "linear")
NOISES = ("constant", "variance", "linear")
EXPONENT = 80.0
"""Exponents μΔ are kept above -80, inside of float32."""


class Dynamics(NamedTuple):
    """The linear system of every head.

    Attributes:
      decay: μ [h], below 0, per unit of time.
      frequency: ω [h, d], radians per unit of time.
      process, measurement, anchor: variances σ², η² and γ² [h].
    """

    decay: jax.Array
    frequency: jax.Array
    process: jax.Array
    measurement: jax.Array
    anchor: jax.Array


@dataclasses.dataclass(frozen=True)
class FilterOptions:
    """How residuals and variances become scores.

    Attributes:
      bias: B: "none" 0, "variance" -ln V, "linear" -νΔ.
      noise: S: "constant" d, "variance" ν d V, "linear" ν d Δ.
      robust: the logarithm above, as of Student's t; False is the Gaussian form.
      full_residual: False leaves R = -2 E Re(q̃* k̃), dot-product attention; not with `robust`.
      epsilon: added to V in its logarithm. Code: 1e-6.
    """

    bias: str = "variance"
    noise: str = "variance"
    robust: bool = True
    full_residual: bool = True
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        for name, value, known in (("bias", self.bias, BIASES), ("noise", self.noise, NOISES)):
            if value not in known:
                raise ValueError(f"FilterOptions: {name} must be one of {known}, got {value!r}.")
        if self.robust and not self.full_residual:
            raise ValueError(
                "FilterOptions: robust=True needs full_residual=True, ln(1 + R / S) is not defined "
                "for negative R; set robust=False."
            )


def adaptive_filter_attention(
    query: Float[Array, "b t h d2"],
    key: Float[Array, "b s h d2"],
    value: Float[Array, "b s h e2"],
    dynamics: Dynamics,
    *,
    threshold: Float[Array, " h"],
    temperature: Float[Array, " h"],
    key_dynamics: Dynamics | None = None,
    times: Num[Array, "b t"] | None = None,
    key_times: Num[Array, "b s"] | None = None,
    mask: Mask | Bool[Array, "#b #h #t #s"] | None = None,
    options: FilterOptions = FilterOptions(),  # noqa: B008
    implementation: str | None = None,
) -> Float[Array, "b t h e2"]:
    """Attention by the precision of carried keys; the formulas are above.

    Args:
      query, key, value: complex vectors as real arrays, real parts first: d2 = 2 d.
      dynamics: of values, and of queries and keys too where `key_dynamics` is None.
      threshold: ν, positive.
      temperature: τ.
      key_dynamics: of queries and keys: their rotation, E in R, and V in S.
      times: of the queries, increasing or not, in any unit; None is 0, 1, ....
      key_times: None is `times`.
      mask: a mask of `attnjax.masks`, or booleans, True = attend; None attends everywhere. Code:
        causal. A row without keys gives 0.
      options: B, S and the form of the scores.
      implementation: "dense" holds all scores; "block_sparse" runs `attnjax.attention` twice; None
        is "dense" for up to 2^16 scores per head.

    Returns:
      Output in the dtype of `query`.

    Cost: O(t s d). Memory: O(t + s) block-sparse, O(t s) dense.

    Raises:
      ValueError: on shapes that do not fit together, or an unknown option.

    Example: >>> adaptive_filter_attention(q, k, v, system, threshold=nu, temperature=tau).shape
    """
    name = "adaptive_filter_attention"
    check_qkv(name, query, key, value)
    if implementation not in (None, "dense", "block_sparse"):
        raise ValueError(
            f"{name}: implementation must be 'dense', 'block_sparse' or None, got "
            f"{implementation!r}."
        )
    b, t, h, _ = query.shape
    s = key.shape[1]
    times = _indices(b, t) if times is None else times
    key_times = (times if s == t else _indices(b, s)) if key_times is None else key_times
    own = dynamics if key_dynamics is None else key_dynamics
    if key.shape[2] != h:
        raise ValueError(
            f"{name}: every head has its own keys and values; query has {h} heads, key "
            f"{key.shape[2]}; repeat shared ones with jnp.repeat(key, groups, axis=2)."
        )
    wanted = {"times": (times, (b, t)), "key_times": (key_times, (b, s))}
    wanted |= {"threshold": (threshold, (h,)), "temperature": (temperature, (h,))}
    for label, (array, shape) in wanted.items():
        if array.shape != shape:
            raise ValueError(f"{name}: {label} must have shape {shape}, got {array.shape}.")
    system = System(dynamics, own, threshold, temperature, options)
    q, k = turn(query, times, own.frequency, -1), turn(key, key_times, own.frequency, -1)
    v = turn(value, key_times, dynamics.frequency, -1)
    if implementation == "dense" or (implementation is None and t * s <= DENSE_SCORES):
        scores = filter_scores(system, q, k, times, key_times)
        keep = mask.dense(t, s) if isinstance(mask, Mask) else mask
        weights, _ = softmax_weights(scores, keep)
        out = weighted_values(weights * filter_decay(system, times, key_times, weights.dtype), v)
    else:

        def attend(value: jax.Array, score_mod: Any) -> tuple[jax.Array, jax.Array]:
            given: dict[str, Any] = dict(mask=mask, implementation="block_sparse", scale=1.0)
            return attention(q, k, value, score_mod=score_mod, return_residual=True, **given)

        out, _ = filter_by_blocks(system, attend, q, k, v, times, key_times)
    return turn(out.astype(query.dtype), times, dynamics.frequency, 1)


class System(NamedTuple):
    """All that scores depend on besides queries and keys; fields as the function's arguments."""

    values: Dynamics
    keys: Dynamics
    threshold: jax.Array
    temperature: jax.Array
    options: FilterOptions


def turn(x: jax.Array, times: jax.Array, frequency: jax.Array, sign: int) -> jax.Array:
    """E^(± iωt) x for complex x [b, t, h, 2d], times [b, t] and ω [h, d]."""
    if frequency.shape != (x.shape[2], x.shape[3] // 2):
        raise ValueError(
            f"adaptive_filter_attention: frequency must have shape [heads, width / 2] = "
            f"{(x.shape[2], x.shape[3] // 2)}, got {frequency.shape}."
        )
    dtype = accumulator_dtype(x.dtype)
    angle = times.astype(dtype)[:, :, None, None] * frequency.astype(dtype)[None, None]
    return rotate(x.astype(dtype), jnp.cos(angle), sign * jnp.sin(angle), "half").astype(x.dtype)


def propagated_variance(dynamics: Dynamics, gap: Float[Array, "#h *n"]) -> Float[Array, "h *n"]:
    """V after a time Δ, for every head; σ² Δ + η² + γ² where μ vanishes.

    Args:
      dynamics: μ, σ², η² and γ².
      gap: Δ, at least 0, with a leading axis for heads.
    """
    shape = (-1, *(1,) * (gap.ndim - 1))
    rates = [x.astype(gap.dtype).reshape(shape) for x in (dynamics.decay, *dynamics[2:])]
    return _variance(rates, gap)


def _variance(rates: Sequence[Any], gap: Any) -> jax.Array:
    """V of (μ, σ², η², γ²) and Δ."""
    mu, process, measurement, anchor = rates
    exponent = _exponent(mu, gap)
    still = jnp.abs(mu) < 1e-5
    safe = jnp.where(still, -jnp.ones_like(mu), mu)
    spread = jnp.where(still, gap, jnp.expm1(2 * exponent) / (2 * safe))
    return process * spread + measurement * jnp.exp(2 * exponent) + anchor


def _exponent(mu: Any, gap: Any) -> jax.Array:
    return jnp.maximum(mu * gap, -EXPONENT)


def _scores(
    options: FilterOptions, channels: int, values: Any, keys: Any, nu: Any, tau: Any,
    product: jax.Array, gap: jax.Array, q2: jax.Array, k2: jax.Array,
) -> jax.Array:  # fmt: skip
    """L of Re(q̃* k̃), Δ, |q|² and |k|², with (μ, σ², η², γ²) of values and of keys."""
    kept = jnp.exp(_exponent(keys[0], gap))
    residual = -2 * kept * product
    if options.full_residual:
        # its parts nearly cancel for near keys
        residual = jnp.maximum(q2 + kept * kept * k2 + residual, 0)
    bias = jnp.zeros_like(product)
    if options.bias == "variance":
        bias = -jnp.log(_variance(values, gap) + options.epsilon)
    elif options.bias == "linear":
        bias = -nu * gap
    spread = jnp.full_like(gap, channels)
    if options.noise == "variance":
        spread = channels * nu * _variance(keys, gap)
    elif options.noise == "linear":
        spread = jnp.maximum(channels * nu * gap, options.epsilon)
    share = residual / spread
    return tau * tau * (bias - (jnp.log1p(share) if options.robust else share))


def filter_scores(
    system: System, query: jax.Array, key: jax.Array, times: jax.Array, key_times: jax.Array
) -> Float[Array, "b h t s"]:
    """All scores L of turned queries [b, t, h, 2d] and keys."""
    product = qk_scores(query, key, 1.0)
    dtype = product.dtype

    def by_head(x: jax.Array) -> jax.Array:
        return x.astype(dtype).reshape(1, -1, 1, 1)

    def squares(x: jax.Array) -> jax.Array:
        return (x.astype(dtype) ** 2).sum(-1).swapaxes(1, 2)

    values, keys = ([by_head(x) for x in (d.decay, *d[2:])] for d in (system.values, system.keys))
    return _scores(
        system.options, query.shape[-1] // 2, values, keys, by_head(system.threshold),
        by_head(system.temperature), product, _gaps(times, key_times, dtype),
        squares(query)[..., None], squares(key)[:, :, None],
    )  # fmt: skip


def filter_decay(
    system: System, times: jax.Array, key_times: jax.Array, dtype: Any
) -> Float[Array, "b h t s"]:
    """E, which multiplies the weights of values."""
    mu = system.values.decay.astype(dtype).reshape(1, -1, 1, 1)
    return jnp.exp(_exponent(mu, _gaps(times, key_times, dtype)))


def _gaps(times: jax.Array, key_times: jax.Array, dtype: Any) -> jax.Array:
    return jnp.abs(times[:, None, :, None] - key_times[:, None, None, :]).astype(dtype)


def filter_by_blocks(
    system: System, attend: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]],
    query: jax.Array, key: jax.Array, value: jax.Array, times: jax.Array, key_times: jax.Array,
    start: Any = 0,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Σ_j A_ij E_ij ṽ_j and ln Σ_j e^L_ij, with scores made tile by tile.

    Args:
      system: dynamics and options.
      attend: `(value, score_mod) -> (output, lse)`, softmax attention of the turned queries and
        keys with scale 1.
      query, key, value: turned.
      times, key_times: [b, t] and [b, s].
      start: absolute index of the first query, 0 or [b].
    """
    dtype, channels = accumulator_dtype(query.dtype), query.shape[-1] // 2
    q2, k2 = ((x.astype(dtype) ** 2).sum(-1) for x in (query, key))  # [b, t, h]
    parts = [*(x for d in (system.values, system.keys) for x in (d.decay, *d[2:]))]
    parts = [x.astype(dtype) for x in (*parts, system.threshold, system.temperature)]

    def score_mod(decayed: bool, s: jax.Array, b: Any, h: Any, q: Any, k: Any) -> jax.Array:
        row = q - (start if jnp.ndim(start) == 0 else look_up(start, b))
        gap = jnp.abs(look_up(times, b, row) - look_up(key_times, b, k)).astype(dtype)
        found = [look_up(x, h) for x in parts]
        scores = _scores(
            system.options, channels, found[:4], found[4:8], found[8], found[9], s.astype(dtype),
            gap, look_up(q2, b, row, h), look_up(k2, b, k, h),
        )  # fmt: skip
        return scores + _exponent(found[0], gap) if decayed else scores

    _, lse = attend(value[..., :1], functools.partial(score_mod, False))
    out, lse_decayed = attend(value, functools.partial(score_mod, True))
    seen = jnp.isfinite(lse)
    zero = jnp.zeros_like(lse)
    share = jnp.where(seen, jnp.exp(jnp.where(seen, lse_decayed - lse, zero)), zero)
    return out.astype(dtype) * share[..., None].astype(dtype), lse


def _indices(b: int, t: int) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))


class AdaptiveFilterAttention(SequenceMixer):
    """Multi-head `adaptive_filter_attention`; queries, keys and values have 2 d real channels.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`; qkv_features
        counts complex channels.
      bias, noise, robust, full_residual: as in `FilterOptions`.
      separate: own dynamics for queries and keys.
      learn_frequency: ω learned, from N(0, 1); otherwise those of rotary positions, 10000^(-c/d).
      horizon: tokens of a training sequence: μ lies in (-5 / horizon, 0). Code: its length.
      norm: complex RMS norm of "none", "qk" or "qkv".
      residual: what is added to the estimate, before another norm: "none"; "add" the value; or a
        mean of both, by the estimate's total precision P = Σ_j e^L_ij, "precision", with the share
        sigmoid(a² ln P - ln(b² + 1e-6)), or by a learned gate, "learned". The code starts a and b
        at 0, where their squares have no gradient; here they start at 1.
      predict: carry the output one step further, times e^(μ + iω).
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
        bias: str = "variance",
        noise: str = "variance",
        robust: bool = True,
        full_residual: bool = True,
        separate: bool = False,
        learn_frequency: bool = False,
        horizon: int = 128,
        norm: str = "none",
        residual: str = "none",
        predict: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        self.filter = FilterOptions(bias, noise, robust, full_residual)
        for label, given, known in (
            ("norm", norm, ("none", "qk", "qkv")),
            ("residual", residual, ("none", "add", "precision", "learned")),
        ):
            if given not in known:
                raise ValueError(
                    f"AdaptiveFilterAttention: {label} must be one of {known}, got {given!r}."
                )
        if horizon < 1:
            raise ValueError(f"AdaptiveFilterAttention: horizon must be positive, got {horizon}.")
        self.separate, self.horizon, self.predict, self.residual = (
            separate, horizon, predict, residual,
        )  # fmt: skip
        wide = 2 * self.head_dim
        self.query, self.key, self.value = (
            self.projection((num_heads, wide), rngs=rngs) for _ in range(3)
        )
        self.out = self.output_projection(wide, rngs=rngs)
        # rows: μ, σ², η², γ² before their maps
        self.noise = self.parameter(
            jax.random.normal(rngs.params(), (1 + separate, 4, num_heads)), (None, None, "heads")
        )
        self.frequency = nnx.data(None)
        by_channel = (num_heads, self.head_dim)
        if learn_frequency:
            drawn = jax.random.normal(rngs.params(), (1 + separate, *by_channel))
            self.frequency = self.parameter(drawn, (None, "heads", "head_dim"))
        ones = jnp.ones((num_heads,))
        self.temperature = self.parameter(ones, ("heads",))
        self.threshold = self.parameter(ones, ("heads",))
        names = ("heads", "head_dim")
        self.scales = nnx.data({})
        places = ("" if norm == "none" else norm) + ("" if residual == "none" else "o")
        for name in places:
            self.scales[name] = self.parameter(jnp.ones(by_channel), names)
        self.gate = nnx.data(None)
        if residual in ("precision", "learned"):
            # g = P / (P + 1) at first, or 1/2
            start = jnp.ones((2, *by_channel)) if residual == "precision" else jnp.zeros(by_channel)
            self.gate = self.parameter(start.reshape(-1, *by_channel), (None, *names))

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Turned keys and values, and times."""
        wide = (self.num_heads, 2 * self.head_dim)
        return {"key": wide, "value": wide, "time": ()}

    def token_dtypes(self, dtype: Any) -> dict[str, Any]:
        """Times are integers whatever the cache's dtype."""
        del dtype
        return {"time": jnp.int32}

    def dynamics(self, dtype: Any) -> list[Dynamics]:
        """Those of values, and with `separate` those of keys."""
        frequency: Any = None if self.frequency is None else self.frequency[...].astype(dtype)
        if frequency is None:
            line = 10000.0 ** (-jnp.arange(self.head_dim, dtype=dtype) / self.head_dim)
            shape = (1 + self.separate, self.num_heads, self.head_dim)
            frequency = jnp.broadcast_to(line[None, None], shape)
        found = []
        for rows, omega in zip(self.noise[...].astype(dtype), frequency):
            decay = -jax.nn.sigmoid(-rows[0]) * (5.0 / self.horizon) - 1e-5
            process, measurement, anchor = jax.nn.softplus(rows[1:])
            found.append(Dynamics(decay, omega, process, measurement + 1e-6, anchor + 1e-6))
        return found

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, 2d]."""
        x, times = call.x, call.positions
        dtype = accumulator_dtype(x.dtype)
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        raw = v
        q, k, v = (self._normalized(name, y) for name, y in (("q", q), ("k", k), ("v", v)))
        own = self.dynamics(dtype)
        threshold = jax.nn.softplus(self.threshold[...].astype(dtype)) + 1e-6
        temperature = self.temperature[...].astype(dtype)
        system = System(own[0], own[-1], threshold, temperature, self.filter)
        q, k = (turn(y, times, own[-1].frequency, -1) for y in (q, k))
        stored = call.store(key=k, value=turn(v, times, own[0].frequency, -1), time=times)
        estimate, lse = self._estimate(call, system, q, stored, times)
        z = turn(estimate.astype(dtype), times, own[0].frequency, 1)
        if self.residual != "none":
            z = self._normalized("o", self._joined(z, raw.astype(dtype), lse))
        if self.predict:
            step = jnp.ones(times.shape, dtype)
            z = turn(z, step, own[0].frequency, 1) * jnp.exp(own[0].decay)[None, None, :, None]
        return z.astype(q.dtype)

    def _estimate(
        self, call: Call, system: System, q: jax.Array, stored: Any, times: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Σ_j A_ij E_ij ṽ_j [b, t, h, 2d] and lse [b, t, h]."""
        k, v, key_times = stored["key"], stored["value"], stored["time"]
        if call.wants_scores or q.shape[1] * k.shape[1] <= DENSE_SCORES:
            scores = self.edit_scores(call, filter_scores(system, q, k, times, key_times))
            weights, lse = softmax_weights(scores, call.keep(k.shape[1]))
            weights = self.edit_weights(call, weights)
            decayed = weights * filter_decay(system, times, key_times, weights.dtype)
            return weighted_values(decayed, v), lse.swapaxes(1, 2)
        plain = dataclasses.replace(call, cache=None)

        def attend(value: jax.Array, score_mod: Any) -> tuple[jax.Array, jax.Array]:
            return self.attend(
                plain, q, k, value, score_mod=score_mod, scale=1.0, q_offset=call.start
            )

        return filter_by_blocks(system, attend, q, k, v, times, key_times, call.start)

    def _normalized(self, name: str, x: jax.Array) -> jax.Array:
        """X by the root of its mean squared modulus, where this norm is on."""
        if name not in self.scales:
            return x
        wide = x.astype(accumulator_dtype(x.dtype))
        size = 2 * (wide * wide).mean(-1, keepdims=True)
        scale = jnp.tile(self.scales[name][...].astype(wide.dtype), (1, 2))
        return (wide * lax.rsqrt(size + 1e-6) * scale[None, None]).astype(x.dtype)

    def _joined(self, estimate: jax.Array, value: jax.Array, lse: jax.Array) -> jax.Array:
        if self.gate is None:
            return estimate + value
        rows = jnp.tile(self.gate[...].astype(estimate.dtype), (1, 1, 2))[:, None, None]
        g = rows[0]
        if self.residual == "precision":
            # an empty row, of padding, has no precision at all
            precision = jnp.maximum(lse, math.log(1e-30)).astype(g.dtype)[..., None]
            g = precision * rows[0] ** 2 - jnp.log(rows[1] ** 2 + 1e-6)
        g = jax.nn.sigmoid(g)
        return g * estimate + (1 - g) * value


def _example() -> tuple[AdaptiveFilterAttention, jax.Array]:
    module = AdaptiveFilterAttention(2, 8, norm="qk", residual="precision", rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 8))


SPEC = Mechanism(
    id="adaptive_filter_attention",
    title="Attention as an Adaptive Filter",
    arxiv="2509.04154",
    year=2025,
    function=adaptive_filter_attention,
    module=AdaptiveFilterAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2)",
    reduces_to={
        "mu = 0, sigma² = 0, Gaussian, constant S, unit queries and keys": "multi_head_attention"
    },
    golden=("afa",),
    example=_example,
)
