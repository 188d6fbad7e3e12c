"""Sparse distributed memory, and attention as its approximation.

Neurons lie at random addresses of a space of n bits. A pattern is written to all neurons within
Hamming distance d of its address, a query reads all neurons within d of its own: a pattern counts
as often as both circles share a neuron, which depends on their distance δ alone:

    I(δ) = r / 2^n Σ_{a, c} C(n - δ, a) C(δ, c),   n - a - c <= d,  n - a - (δ - c) <= d
    o = Σ_j I(δ(q, k_j)) v_j / Σ_j I(δ(q, k_j))

I falls almost exponentially, so with unit vectors and δ = n (1 - cos) / 2 this is close to softmax
attention, I ≈ e^(bias + β cos), where β follows from n and d. `weights` chooses: "fitted" is that
exponential, "binary" looks I up, "cap" is the continuous version, the intersection of two caps of
the sphere. A lookup has no derivative: "binary" takes that of β cos.

Reference: Bricken and Pehlevan, "Attention Approximates Sparse Distributed Memory", 2021,
arXiv:2111.05498 (NeurIPS 2021); official code TrentBrick/attention-approximates-sdm, which adds 2
where the logarithm of 2 is meant in the volume of caps: the default, and a constant factor that
normalized weights do not see.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from attnjax.attention import attention
from attnjax.checks import check_qkv
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels import tilemath

WEIGHTS = ("fitted", "binary", "cap")
GRID = 257
"""Cosines at which the cap intersection is tabulated."""


def circle_intersection(bits: int, radius: int, distance: int) -> int:
    """Addresses within `radius` of both of two points at a Hamming distance: 2^n I(δ) / r, exact.

    Args:
      bits: n, dimension of the space.
      radius: d.
      distance: δ, between the two points.
    """
    _check_space("circle_intersection", bits, radius)
    return _circle_counts(bits, radius)[distance]


@functools.lru_cache(maxsize=128)
def _circle_counts(bits: int, radius: int) -> tuple[int, ...]:
    """Addresses in both circles for δ = 0 .. n: one circle less what every second step loses."""
    count = sum(math.comb(bits, i) for i in range(radius + 1))
    counts = [count]
    for distance in range(1, bits + 1):
        half, odd = divmod(distance - 1, 2)
        if not odd and half <= radius:
            count -= math.comb(2 * half, half) * math.comb(bits - distance, radius - half)
        counts.append(count)
    return tuple(counts)


def intersection_table(bits: int, radius: int, neurons: float = 1.0) -> np.ndarray:
    """I(δ) for δ = 0 .. n: expected number of neurons in both circles, [n + 1] float64.

    Args:
      bits, radius: n and d.
      neurons: r.
    """
    _check_space("intersection_table", bits, radius)
    counts = _circle_counts(bits, radius)
    # integers of any size: the quotient is rounded once
    return np.array([float(neurons) * (count / 2**bits) for count in counts])


def fit_beta(
    bits: int, radius: int, neurons: float = 1e6, distances: Iterable[int] | None = None
) -> tuple[float, float]:
    """β and bias of the least-squares fit ln I(δ) ≈ bias + β cos, cos = 1 - 2 δ / n.

    Distances without a common neuron are left out. The slope is the official code's, a covariance
    with n - 1 by a variance with n: larger than the usual one by n / (n - 1).

    Args:
      bits, radius, neurons: n, d and r; r enters the bias only.
      distances: δ of the fit; None is 0 .. n / 2, cosines from 1 to 0.

    Raises:
      ValueError: when fewer than two distances have common neurons.
    """
    given = np.arange(bits // 2 + 1) if distances is None else np.array(list(distances))
    counts = [circle_intersection(bits, radius, int(delta)) for delta in given]
    some = np.array([count > 0 for count in counts])
    # logarithms of integers: nothing underflows in a space of 1000 bits
    y = np.array([math.log(count) - bits * math.log(2) for count in counts if count])
    x, y = (1 - 2 * given / bits)[some], y + math.log(neurons)
    if len(x) < 2:
        raise ValueError(
            "fit_beta: circles of this radius meet at fewer than two distances; pass a larger "
            "radius."
        )
    beta = float(np.cov(x, y)[0, 1] / np.var(x))
    return beta, float(y.mean() - beta * x.mean())


def log_cap_intersection(
    cosine: float, bits: int, radius: float, neurons: float = 1.0, *, log_two: float = 2.0
) -> float:
    """Ln of the expected number of neurons in two caps of the sphere whose axes have this cosine.

    Args:
      cosine: of the angle φ between the axes.
      bits: n, dimension of the space around the sphere.
      radius: d, below n / 2: the caps have the angle θ = arccos(1 - 2 d / n).
      neurons: r.
      log_two: logarithm of the factor 2 of the formula; 2.0 as the official code has it, ln 2 is
        the geometric value.

    Returns:
      -inf where the caps do not meet, φ >= 2 θ.
    """
    from scipy import integrate, special

    _check_space("log_cap_intersection", bits, radius)
    if not 0 < 2 * radius < bits:
        raise ValueError(f"log_cap_intersection: needs 0 < radius < bits / 2, got {radius}, {bits}")
    theta, phi = math.acos(1 - 2 * radius / bits), math.acos(min(max(cosine, -1.0), 1.0))
    if phi >= 2 * theta:
        return -math.inf
    low = phi / 2  # the angle at which both caps have the same edge
    top = (bits - 2) * math.log(math.sin(theta))  # keeps the integrand inside of float64

    def slice_of(x: float) -> float:
        z = 1 - (math.tan(low) / math.tan(x)) ** 2
        ring = math.exp((bits - 2) * math.log(math.sin(x)) - top) if x > 0 else 0.0
        return ring * special.betainc((bits - 2) / 2, 0.5, min(max(z, 0.0), 1.0))

    area = integrate.quad(slice_of, low, theta, epsabs=0, epsrel=1e-11, limit=200)[0]
    if area <= 0:
        return -math.inf
    ring = (bits - 1) / 2 * math.log(math.pi) - math.lgamma((bits - 1) / 2)
    sphere = math.log(2) + bits / 2 * math.log(math.pi) - math.lgamma(bits / 2)
    return math.log(area) + top + ring + log_two + math.log(neurons) - sphere


def snr_radius(bits: int, neurons: float, patterns: float) -> int:
    """The radius with the best ratio of signal to noise for so many random patterns.

    The smallest d whose circle holds a share (2 m r)^(-1/3) of all addresses.

    Args:
      bits: n.
      neurons: r.
      patterns: m, stored patterns.
    """
    share = (2 * patterns * neurons) ** (-1 / 3)
    total = 0
    for radius in range(bits + 1):
        total += math.comb(bits, radius)
        if total / 2**bits >= share:
            return radius
    return bits


def matching_radius(beta: float, bits: int) -> int:
    """The Hamming radius whose fitted β is nearest to that of a trained head.

    Args:
      beta: for example a mean of `effective_beta`.
      bits: n.
    """
    found = {d: fit_beta(bits, d)[0] for d in range(1, bits // 2)}
    return min(found, key=lambda d: abs(found[d] - beta))


def effective_beta(
    query: Float[Array, "b t h d"], key: Float[Array, "b s g d"], scale: float | None = None
) -> Float[Array, "b h t s"]:
    """The β at which softmax attention reads each pair: |q| |k| scale, as scores are β cos.

    Args:
      query, key: shapes as annotated; h a multiple of g.
      scale: of the attention; None is d^-0.5.
    """
    dtype = tilemath.accumulator_dtype(query.dtype)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    q, k = (jnp.linalg.norm(x.astype(dtype), axis=-1).swapaxes(1, 2) for x in (query, key))
    k = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return q[..., None] * k[:, :, None] * factor


def attention_sdm(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    *,
    mask: Any = None,
    weights: str = "fitted",
    bits: int = 64,
    radius: int = 22,
    beta: float | Float[Array, " h"] | None = None,
) -> Float[Array, "b t h e"]:
    """A read of sparse distributed memory by the cosine of query and keys.

    Args:
      query, key, value: shapes as annotated, of any length; h a multiple of g.
      mask: as for `attnjax.attention`.
      weights: "fitted", "binary" or "cap", as above. Far keys have weight 0 with the last two; a
        row without near keys gives 0.
      bits, radius: n and d. Paper: n = 64 with d = 11 .. 27, and n = 1000.
      beta: for "fitted", instead of `fit_beta(bits, radius)`, for all heads or by head.

    Returns:
      Output in the dtype of `query`.

    Cost: as `attnjax.attention`.

    Raises:
      ValueError: on shapes that do not fit, or an option out of range.

    Example: >>> attention_sdm(q, k, v, mask=attnjax.masks.Causal(), weights="binary").shape
    """
    check_qkv("attention_sdm", query, key, value)
    options = _score_options("attention_sdm", weights, bits, radius, beta)
    return attention(
        normalize(query), normalize(key), value, mask=mask, **options(query.shape[2], query.dtype)
    )


def normalize(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """X by its length over the last axis; the length is at least 1e-6."""
    wide = x.astype(tilemath.accumulator_dtype(x.dtype))
    return (wide * lax.rsqrt((wide * wide).sum(-1, keepdims=True) + 1e-12)).astype(x.dtype)


def _check_space(name: str, bits: int, radius: float) -> None:
    if bits < 2 or not 0 <= radius <= bits:
        raise ValueError(f"{name}: needs bits >= 2 and 0 <= radius <= bits, got {bits}, {radius}.")


@functools.lru_cache(maxsize=32)
def _cap_table(bits: int, radius: int) -> tuple[float, np.ndarray]:
    """The smallest cosine of caps that meet, and ln I on a grid from there to 1."""
    edge = math.cos(min(2 * math.acos(1 - 2 * radius / bits), math.pi))
    grid = np.linspace(edge, 1.0, GRID)[1:]  # at the edge itself it is -inf
    table = np.array([log_cap_intersection(c, bits, radius) for c in grid])
    return float(grid[0]), table - table.max()


def _score_options(name: str, weights: str, bits: int, radius: int, beta: Any) -> Any:
    """Options of `attention` on unit vectors, given the number of heads and the dtype."""
    if weights not in WEIGHTS:
        raise ValueError(f"{name}: weights must be one of {WEIGHTS}, got {weights!r}.")
    if not 1 <= radius < bits / 2:
        raise ValueError(
            f"{name}: radius must be in 1 .. bits / 2 - 1, got {radius} of {bits} bits."
        )
    if beta is not None and weights != "fitted":
        raise ValueError(f"{name}: beta belongs to weights='fitted', got weights={weights!r}.")

    def options(heads: int, dtype: Any) -> dict[str, Any]:
        dtype = tilemath.accumulator_dtype(dtype)
        if weights == "fitted":
            if beta is None:
                return dict(scale=fit_beta(bits, radius)[0])
            slope = jnp.broadcast_to(jnp.asarray(beta, dtype), (heads,))
            return dict(scale=1.0, score_mod=lambda s, b, h, q, k: s * slope[h])
        if weights == "binary":
            counts = _circle_counts(bits, radius)
            logs = [math.log(c) - math.log(counts[0]) if c else -math.inf for c in counts]
            table = jnp.asarray(logs, dtype)
            fitted = fit_beta(bits, radius)[0]

            def look_up(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
                # rounding must not move cosines at the edge of a bin, least of all cos = 1
                distance = jnp.floor(bits * (1 - s) / 2 + 1e-5).astype(jnp.int32)
                value = table[jnp.clip(distance, 0, bits)]
                return lax.stop_gradient(value - fitted * s) + fitted * s

            return dict(scale=1.0, score_mod=look_up)
        first, logs = _cap_table(bits, radius)
        table, step = jnp.asarray(logs, dtype), (1 - first) / (len(logs) - 1)

        def interpolate(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            place = jnp.clip((s - first) / step, 0, len(logs) - 1)
            below = jnp.minimum(place.astype(jnp.int32), len(logs) - 2)
            part = place - below.astype(place.dtype)
            value = table[below] * (1 - part) + table[below + 1] * part
            return jnp.where(s < first, jnp.full_like(value, -jnp.inf), value)

        return dict(scale=1.0, score_mod=interpolate)

    return options


class AttentionSDM(SequenceMixer):
    """Multi-head `attention_sdm`: cosine attention whose weights are those of an SDM.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      weights, bits, radius: as for `attention_sdm`.
      learn_beta: for "fitted": every head learns its β, from the fit on, as the networks of the
        paper with normalized queries and keys do.
      rngs: stream `params`.
      **options: of `SequenceMixer`.
    """

    sites = SCORE_SITES
    directions = ("causal", "bidirectional")
    grouped = masked = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        weights: str = "fitted",
        bits: int = 64,
        radius: int = 22,
        learn_beta: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        _score_options("AttentionSDM", weights, bits, radius, None)
        if learn_beta and weights != "fitted":
            raise ValueError(
                f"AttentionSDM: learn_beta needs weights='fitted', got weights={weights!r}."
            )
        self.weights, self.bits, self.radius = weights, bits, radius
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)
        self.beta = nnx.data(None)
        if learn_beta:
            start = jnp.full((num_heads,), fit_beta(bits, radius)[0], jnp.float32)
            self.beta = self.parameter(start, ("heads",))

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        beta = None if self.beta is None else self.beta[...]
        if beta is not None:
            beta = beta.astype(tilemath.accumulator_dtype(x.dtype))
        options = _score_options("AttentionSDM", self.weights, self.bits, self.radius, beta)
        given = options(self.num_heads, q.dtype)
        return self.attend(call, normalize(q), normalize(k), v, **given)[0]


def _example() -> tuple[AttentionSDM, jax.Array]:
    module = AttentionSDM(2, 16, learn_beta=True, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


def _picture() -> Mapping[str, np.ndarray]:
    """Weights of keys around a circle, for the exact read and the fitted softmax."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    cosine = np.cos(angle[:, None] - angle[None])
    table = intersection_table(64, 22)
    exact = table[np.clip(np.floor(64 * (1 - cosine) / 2 + 1e-9).astype(int), 0, 64)]
    fitted = np.exp(fit_beta(64, 22)[0] * cosine)
    panels = {"circles, n = 64, d = 22": exact, "fitted softmax": fitted}
    return {name: x / x.sum(-1, keepdims=True) for name, x in panels.items()}


SPEC = Mechanism(
    id="attention_sdm",
    title="Attention Approximates Sparse Distributed Memory",
    arxiv="2111.05498",
    year=2021,
    code="TrentBrick/attention-approximates-sdm",
    function=attention_sdm,
    module=AttentionSDM,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2)",
    reduces_to={"weights='fitted', unit queries and keys": "multi_head_attention"},
    picture=_picture,
    golden=("sdm",),
    example=_example,
)
