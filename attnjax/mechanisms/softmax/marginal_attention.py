"""Attention as marginal probability: which key explains the query is a latent variable.

    p(φ = j | q) = p(φ = j) ψ_j(q) / Σ_j' p(φ = j') ψ_j'(q),   o = Σ_j p(φ = j | q) v_j

The prior says which connections are likely before anything is seen, the potential ψ how well a key
explains the query. A uniform prior with ψ = exp(q · k / sqrt(d)) is softmax attention, and
ln Σ_j p(φ = j) ψ_j its log-sum-exp less the log of the number of keys. Other choices:

    prior      learned bias; relative bias such as ALiBi, a geometric prior; a graph or causal mask
    potential  "dot", or "gaussian": exp(-|q - k|² / (2 σ²)), without its normalizing constant
    readout    "soft", the expectation; "map", the value of the most probable key; "sample"
    repeated   q ← E[k] (`mean_field_steps`, a Hopfield network), or every key is explained by one
               query (`slot_steps`, slot attention)

Heads are several independent latent variables, whose readouts are added by the output projection.

Reference: Singh and Buckley, "Attention: Marginal Probability is All You Need?", 2023,
arXiv:2304.04556; no official code.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from attnjax.attention import attention
from attnjax.checks import check_qkv
from attnjax.dense import qk_scores, softmax_weights, weighted_values
from attnjax.masks import Causal, Mask
from attnjax.positions.alibi import alibi_bias
from attnjax.spec import Mechanism
from pallas_kernels import tilemath

LIKELIHOODS = ("dot", "gaussian")
MODES = ("soft", "map", "sample")


class Marginal(NamedTuple):
    """What `marginal_attention` returns: the readout, and ln Σ_j p(φ = j) ψ_j(q)."""

    output: Float[Array, "b t h e"]
    log_marginal: Float[Array, "b t h"]


class Posterior(NamedTuple):
    """Probabilities of the connections, ln Σ_j p(φ = j) ψ_j(q), and the entropy in nats."""

    weights: Float[Array, "b h t s"]
    log_marginal: Float[Array, "b t h"]
    entropy: Float[Array, "b t h"]


def marginal_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    *,
    log_prior: Float[Array, "#b #h #t #s"] | None = None,
    likelihood: str = "dot",
    scale: float | None = None,
    sigma: float = 1.0,
    mask: Any = None,
    mode: str = "soft",
    straight_through: bool = True,
    rng: Any = None,
) -> Marginal:
    """Values under the posterior over which key explains the query.

    Args:
      query, key, value: shapes as annotated; h a multiple of g.
      log_prior: ln p(φ = j), used as it is: if it is not normalized, neither is the marginal.
        None is uniform over the visible keys.
      likelihood: "dot" or "gaussian".
      scale: of "dot"; None is d^-0.5.
      sigma: of "gaussian".
      mask: connections of prior probability 0: a mask of `attnjax.masks`, or booleans broadcastable
        to [b, h, t, s], True = possible.
      mode: "soft", "map", or "sample" (needs `rng`).
      straight_through: gradients of "map" and "sample" are those of "soft"; False: of the chosen
        value alone.
      rng: key of the samples.

    Returns:
      `Marginal(output, log_marginal)`; a query without possible keys gives 0 and -inf.

    Memory: O(t + s) for "soft" without `log_prior`, else O(t s) per head.

    Raises:
      ValueError: on an unknown mode or likelihood, a sample without `rng`, or sigma <= 0.

    Example: >>> marginal_attention(q, k, v, likelihood="gaussian", sigma=0.5).output.shape
    """
    name = "marginal_attention"
    check_qkv(name, query, key, value)
    if mode not in MODES:
        raise ValueError(f"{name}: mode={mode!r} is none of {', '.join(MODES)}.")
    if (mode == "sample") != (rng is not None):
        raise ValueError(f"{name}: mode='sample' needs rng=key, other modes take none; got {mode}.")
    if mode == "soft":
        q, k, factor, offset = _potential(query, key, likelihood, scale, sigma)
        out, lse = attention(
            q, k, value.astype(q.dtype), bias=log_prior, mask=mask, scale=factor,
            return_residual=True,
        )  # fmt: skip
        if log_prior is None:
            lse = lse - _log_count(query, key, mask)
        return Marginal(out.astype(query.dtype), lse if offset is None else lse + offset)
    posterior = connection_posterior(
        query, key, log_prior=log_prior, likelihood=likelihood, scale=scale, sigma=sigma, mask=mask
    )
    soft, logits = posterior.weights, jnp.log(posterior.weights)
    if rng is not None:
        logits = logits + jax.random.gumbel(rng, logits.shape, logits.dtype)
    weights = jax.nn.one_hot(logits.argmax(-1), soft.shape[-1], dtype=soft.dtype)
    weights = jnp.where(jnp.isneginf(logits), jnp.zeros_like(weights), weights)
    if straight_through:
        weights = soft + jax.lax.stop_gradient(weights - soft)
    out = weighted_values(weights, value).astype(query.dtype)
    return Marginal(out, posterior.log_marginal)


def connection_posterior(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    *,
    log_prior: Float[Array, "#b #h #t #s"] | None = None,
    likelihood: str = "dot",
    scale: float | None = None,
    sigma: float = 1.0,
    mask: Any = None,
) -> Posterior:
    """Posterior over the connections with its evidence and entropy; arguments as above.

    Returns:
      `Posterior(weights, log_marginal, entropy)`. Memory: O(t s) per head.
    """
    q, k, factor, offset = _potential(query, key, likelihood, scale, sigma)
    scores = qk_scores(q, k, factor)
    keep = _booleans(mask, *scores.shape[2:])
    if log_prior is not None:
        scores = scores + log_prior.astype(scores.dtype)
    weights, lse = softmax_weights(scores, keep)
    possible = weights > 0
    log = jnp.log(jnp.where(possible, weights, jnp.ones_like(weights)))
    entropy = -(weights * log).sum(-1).transpose(0, 2, 1)
    lse = lse.transpose(0, 2, 1)
    if log_prior is None:
        lse = lse - _log_count(query, key, mask)
    return Posterior(weights, lse if offset is None else lse + offset, entropy)


def mean_field_steps(
    query: Float[Array, "b t h d"], key: Float[Array, "b s g d"], steps: int = 1, **options: Any
) -> Float[Array, "n b t h d"]:
    """The queries after 1, 2, ..., `steps` readouts q ← E[k]: a modern Hopfield network.

    Args:
      query, key: shapes as annotated.
      steps: n.
      options: of `marginal_attention`.
    """

    def step(q: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        q = marginal_attention(q, key, key, **options).output
        return q, q

    return jax.lax.scan(step, query, None, length=steps)[1]


def slot_steps(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    steps: int = 1,
    *,
    mask: Any = None,
    scale: float | None = None,
) -> Float[Array, "n b t h d"]:
    """The queries after 1, 2, ..., `steps` updates in which every key chooses among the queries.

        a_tj = softmax_t(scale q_t · k_j),   q_t ← Σ_j (a_tj / Σ_j' a_tj') k_j

    One M-step for the means of a mixture per update: slot attention without its learned parts.

    Args:
      query, key: shapes as annotated.
      steps: n.
      mask: as in `marginal_attention`, True = the query may explain the key.
      scale: None is d^-0.5.
    """
    keep = _booleans(mask, query.shape[1], key.shape[1])
    keep = None if keep is None else keep.swapaxes(-2, -1)

    def step(q: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
        share, _ = softmax_weights(qk_scores(q, key, scale).swapaxes(-2, -1), keep)
        share = share.swapaxes(-2, -1)
        total = share.sum(-1, keepdims=True)
        weights = share / jnp.where(total == 0, jnp.ones_like(total), total)
        q = weighted_values(weights, key).astype(q.dtype)
        return q, q

    return jax.lax.scan(step, query, None, length=steps)[1]


def _potential(
    query: jax.Array, key: jax.Array, likelihood: str, scale: float | None, sigma: float
) -> tuple[jax.Array, jax.Array, float, jax.Array | None]:
    """Queries, keys and a scale whose products are ln ψ, up to an offset [b, t, h] of the query."""
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"marginal_attention: likelihood={likelihood!r} is none of {', '.join(LIKELIHOODS)}."
        )
    if likelihood == "dot":
        return query, key, query.shape[-1] ** -0.5 if scale is None else scale, None
    if sigma <= 0 or scale is not None:
        raise ValueError(
            f"marginal_attention: likelihood='gaussian' has sigma > 0 instead of scale, got sigma="
            f"{sigma}, scale={scale}."
        )
    # -|q - k|² / 2 = [q, 1] · [k, -|k|² / 2] - |q|² / 2
    dtype = tilemath.accumulator_dtype(query.dtype)
    q, k = query.astype(dtype), key.astype(dtype)
    half = [(x * x).sum(-1, keepdims=True) / 2 for x in (q, k)]
    q, k = jnp.concatenate([q, jnp.ones_like(half[0])], -1), jnp.concatenate([k, -half[1]], -1)
    return q, k, sigma**-2, -half[0][..., 0] * sigma**-2


def _booleans(mask: Any, t: int, s: int) -> jax.Array | None:
    """A mask as booleans of rank 4."""
    if mask is None:
        return None
    keep = mask.dense(t, s) if isinstance(mask, Mask) else mask
    return keep.reshape((1,) * (4 - keep.ndim) + keep.shape)


def _log_count(query: jax.Array, key: jax.Array, mask: Any) -> jax.Array:
    """Log of how many keys each query may see, [b, t, h]; 0 where there is none."""
    dtype = tilemath.accumulator_dtype(query.dtype)
    b, t, h, _ = query.shape
    s = key.shape[1]
    if mask is None:
        return jnp.full((1, 1, 1), math.log(s), dtype)
    # the evidence of equal potentials, without an array of t x s
    zeros = jnp.zeros((b, max(t, s), h, 1), dtype)
    _, lse = attention(zeros[:, :t], zeros[:, :s], zeros[:, :s], mask=mask, return_residual=True)
    return jnp.where(jnp.isneginf(lse), jnp.zeros_like(lse), lse)


def _picture() -> dict[str, jax.Array]:
    """Posteriors of the same queries and keys under different priors and potentials."""
    shape = (1, 24, 1, 4)
    q, k = (jax.random.normal(jax.random.key(i), shape) for i in range(2))
    index = jnp.arange(24)
    alibi = alibi_bias(jnp.array([0.5]), index, index, symmetric=True)
    options: dict[str, dict[str, Any]] = {
        "uniform prior": {},
        "geometric prior": {"log_prior": alibi},
        "causal graph": {"mask": Causal()},
        "Gaussian potential": {"likelihood": "gaussian", "sigma": 0.7},
    }
    return {
        title: connection_posterior(q, k, **given).weights[0, 0] for title, given in options.items()
    }


SPEC = Mechanism(
    id="marginal_attention",
    title="Attention: Marginal Probability is All You Need?",
    arxiv="2304.04556",
    year=2023,
    kind="function",
    function=marginal_attention,
    causal=True,
    bidirectional=True,
    kernel="flash",
    cost="O(T^2)",
    reduces_to={
        "uniform prior, likelihood=dot, mode=soft": "multi_head_attention without projections",
        "mean_field_steps": "a modern Hopfield network",
        "slot_steps": "slot attention without its learned parts",
    },
    golden=("marginal_attention",),
    reading="There is no official code: which priors, potentials and readouts are offered is ours, "
    "and so is that log_prior is used without normalizing it.",
    picture=_picture,
)
