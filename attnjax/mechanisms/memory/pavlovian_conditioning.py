"""Linear attention as Pavlovian conditioning: keys and values are paired stimuli.

The key is the conditional stimulus (the bell), the value the unconditional one (the food), the
query the test stimulus. What was experienced together is associated, and recalled together:

    hebb    S_t = S_{t-1} + η v_t k_tᵀ                        o_t = S_t q_t
    decay   S_t = (1 - γ) S_{t-1} + η v_t k_tᵀ
    delta   S_t = S_{t-1} + η (v_t - S_{t-1} k_t) k_tᵀ        Rescorla-Wagner: learns from surprise

There is no normalizer. Recall of one of n associations is its value plus Σ (k_j·k) v_j of the
others, an interference of (n - 1) / d for random unit keys, so that about O(d) associations are
recalled well on average and O(sqrt(d)) in the worst case. The delta rule shows the classical
phenomena: extinction, blocking and overshadowing; Hebb's rule none of them.

Reference: Qiao, "Understanding Transformers through the Lens of Pavlovian Conditioning", 2025,
arXiv:2508.08289; no official code.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from attnjax.cache.linear_state import state_dtype
from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.mechanisms.linear.linear_mixer import LinearMixer, unit_norm
from attnjax.mixer import Call
from attnjax.spec import Mechanism

RULES = ("hebb", "decay", "delta")
PROTOCOLS = ("acquisition", "extinction", "blocking", "overshadowing")


def pavlovian_conditioning(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h e"],
    *,
    rule: str = "hebb",
    eta: Float[Array, "b t h"] | Float[Array, " h"] | float = 1.0,
    gamma: Float[Array, " h"] | float = 0.0,
    valid: Bool[Array, "b t"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_state: Float[Array, "b h d e"] | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """Causal recall of associations, each token learned before it is tested.

    Args:
      query, key, value: test, conditional and unconditional stimuli. Unit keys make η a rate.
      rule: "hebb", "decay" or "delta".
      eta: η, at least 0; for "delta" up to 1 (2 is the limit of stability). By token, by head, or
        for all.
      gamma: γ in [0, 1), for "decay", by head or for all.
      valid: True for real tokens; others leave the associations alone.
      segment_ids: documents packed in a row; each starts without associations.
      initial_state: Sᵀ before the first token; None is zero.
      return_state: also return Sᵀ after the last one.
      chunk_size: as for `linear_attention`.

    Returns:
      Output in the dtype of `value`, and the state, float32 or float64.

    Cost: O(t d e) beside chunks, as `linear_attention`.

    Raises:
      ValueError: on an unknown rule, gamma with another rule than "decay", or shapes that do not
        fit together.

    Example: >>> pavlovian_conditioning(q, k, v, rule="delta", eta=0.5).shape
    """
    name = "pavlovian_conditioning"
    _check_rule(name, rule, gamma)
    b, t, h, _ = query.shape
    dtype = state_dtype(query.dtype)
    rate = jnp.asarray(eta, dtype)
    if rate.shape not in ((), (h,), (b, t, h)):
        raise ValueError(
            f"{name}: eta must be a number or have shape {(h,)} or {(b, t, h)}, got {rate.shape}."
        )
    rate = jnp.broadcast_to(rate if rate.ndim == 3 else rate.reshape(1, 1, -1), (b, t, h))
    if valid is not None:
        rate = jnp.where(valid[:, :, None], rate, jnp.zeros_like(rate))
    decay = None
    if rule == "decay":
        decay = jnp.log1p(-jnp.broadcast_to(jnp.asarray(gamma, dtype), (h,)))
        if valid is not None:
            decay = jnp.where(valid[:, :, None], decay[None, None], jnp.zeros((1, 1, h), dtype))
    written = value if rule == "delta" else (value.astype(dtype) * rate[..., None])
    out = linear_attention(
        query, key, written, decay=decay, beta=rate if rule == "delta" else None,
        initial_state=initial_state, return_state=return_state, segment_ids=segment_ids,
        chunk_size=chunk_size, scale=1.0,
    )  # fmt: skip
    if return_state:
        return out[0].astype(value.dtype), out[1]
    return out.astype(value.dtype)  # pyright: ignore[reportAttributeAccessIssue]


def _check_rule(name: str, rule: str, gamma: Any) -> None:
    if rule not in RULES:
        raise ValueError(f"{name}: rule must be one of {RULES}, got {rule!r}.")
    if rule != "decay" and not (isinstance(gamma, int | float) and gamma == 0):
        raise ValueError(f"{name}: gamma belongs to rule='decay', got rule={rule!r}.")


# ------------------------------------------------------------------------ the experiments


def association_history(
    key: Float[Array, "n d"],
    value: Float[Array, "n e"],
    *,
    rule: str = "hebb",
    eta: float = 1.0,
    gamma: float = 0.0,
) -> Float[Array, "n e d"]:
    """S after every one of n pairings.

    Args:
      key, value: the stimuli, in order.
      rule, eta, gamma: as for `pavlovian_conditioning`.
    """
    _check_rule("association_history", rule, gamma)

    def step(state: jax.Array, pair: Any) -> tuple[jax.Array, jax.Array]:
        k, v = pair
        seen = v - state @ k if rule == "delta" else v
        state = (1 - gamma) * state + eta * seen[:, None] * k[None]
        return state, state

    start = jnp.zeros((value.shape[1], key.shape[1]), key.dtype)
    return lax.scan(step, start, (key, value))[1]


def conditioning_protocol(
    name: str, trials: int = 8, *, rule: str = "delta", eta: float = 0.5, gamma: float = 0.0
) -> Float[Array, "n 2"]:
    """Responses to the stimuli A and B after every trial of a classical experiment.

    Args:
      name: "acquisition": A with food. "extinction": A with food, then A alone. "blocking": A with
        food, then A and B together with food. "overshadowing": A and B together with food.
      trials: of each phase.
      rule, eta, gamma: as for `pavlovian_conditioning`.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"conditioning_protocol: name must be one of {PROTOCOLS}, got {name!r}.")
    alone, both = jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0])
    phases = {
        "acquisition": [(alone, 1.0)],
        "extinction": [(alone, 1.0), (alone, 0.0)],
        "blocking": [(alone, 1.0), (both, 1.0)],
        "overshadowing": [(both, 1.0)],
    }[name]
    keys = jnp.concatenate([jnp.tile(stimulus[None], (trials, 1)) for stimulus, _ in phases])
    food = jnp.repeat(jnp.array([f for _, f in phases]), trials, total_repeat_length=len(keys))
    history = association_history(keys, food[:, None], rule=rule, eta=eta, gamma=gamma)
    return history[:, 0]


def recall_quality(
    key: Float[Array, "n d"], value: Float[Array, "n e"], recall: Float[Array, "n e"]
) -> dict[str, jax.Array]:
    """How well n stored values are recalled by their own keys.

    Args:
      key, value: the stored pairs.
      recall: what was read with each key.

    Returns:
      "accuracy", the share of recalls whose best match (dot product) among the values is right;
      "interference", the mean of |recall - value|², and "expected", (n - 1) / d for unit stimuli
      at random; "snr", Σ |value|² / Σ |recall - value|².
    """
    n, d = key.shape
    error = ((recall - value) ** 2).sum(-1)
    best = (recall @ value.T).argmax(-1)
    return {
        "accuracy": (best == jnp.arange(n)).astype(recall.dtype).mean(),
        "interference": error.mean(),
        "expected": jnp.asarray((n - 1) / d, recall.dtype),
        "snr": (value**2).sum() / error.sum(),
    }


def capacity_curve(
    rng: Any,
    key_dim: int,
    loads: tuple[int, ...],
    *,
    value_dim: int = 32,
    trials: int = 8,
    read: str = "linear",
    beta: float = 16.0,
    noise: float = 0.0,
) -> Float[Array, " l"]:
    """Accuracy of recall of n random unit associations, for every n of `loads`.

    Args:
      rng: key of randomness.
      key_dim, value_dim: d and e.
      loads: numbers of associations n.
      trials: to average over.
      read: "linear", Hebb's recall; or "softmax", softmax attention at this `beta`, as control.
      beta: inverse temperature of the control.
      noise: length of the random vector that is added to each stored key to make the query; the
        query is then scaled to length 1. 0 asks with the stored keys themselves.
    """
    if read not in ("linear", "softmax"):
        raise ValueError(f"capacity_curve: read must be 'linear' or 'softmax', got {read!r}.")

    def one(rng: Any, n: int) -> jax.Array:
        k, v, error = (
            unit_norm(jax.random.normal(r, (n, d)))
            for r, d in zip(jax.random.split(rng, 3), (key_dim, value_dim, key_dim), strict=True)
        )
        scores = unit_norm(k + noise * error) @ k.T
        weights = scores if read == "linear" else jax.nn.softmax(beta * scores, axis=-1)
        return recall_quality(k, v, weights @ v)["accuracy"]

    keys = jax.random.split(rng, trials)
    return jnp.stack([jax.vmap(lambda r, n=n: one(r, n))(keys).mean() for n in loads])


def error_propagation(
    rng: Any, *, layers: int, heads: int, error: float, width: int = 64, trials: int = 64
) -> tuple[jax.Array, jax.Array]:
    """Relative error of a residual network whose heads are noisy, measured and expected.

    Every layer adds the mean of m redundant heads to the stream; the heads agree but for
    independent noise of relative size ε. The errors of L layers add up at random: ε sqrt(L / m),
    in units of one layer's contribution.

    Args:
      rng: key of randomness.
      layers: L.
      heads: m.
      error: ε.
      width: of the stream.
      trials: to average over.

    Returns:
      Root mean square of the error at the output over the size of a layer's contribution; and
      ε sqrt(L / m).
    """
    maps, stream, noise = jax.random.split(rng, 3)
    # orthogonal maps: each contribution is as large as the stream's start
    weights = jnp.linalg.qr(jax.random.normal(maps, (layers, width, width)))[0]
    x = unit_norm(jax.random.normal(stream, (trials, width)))
    drawn = unit_norm(jax.random.normal(noise, (layers, trials, heads, width)))

    def layer(carry: Any, given: Any) -> Any:
        clean, noisy = carry
        weight, bad = given
        update = unit_norm(clean @ weight)
        return (clean + update, noisy + update + error * bad.mean(1)), None

    (clean, noisy), _ = lax.scan(layer, (x, x), (weights, drawn))
    measured = jnp.sqrt(((noisy - clean) ** 2).sum(-1).mean())
    return measured, jnp.asarray(error * math.sqrt(layers / heads), measured.dtype)


class PavlovianConditioning(LinearMixer):
    """Multi-head `pavlovian_conditioning` with unit queries and keys.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      rule: "hebb", "decay" or "delta".
      eta: η in (0, 1), where every head's rate starts.
      gamma: γ in (0, 1), likewise, for "decay".
      gated: η by token, times the sigmoid of a linear map of the input: how salient it is.
      rngs: stream `params`.
      **options: of `LinearMixer` and `SequenceMixer`.

    Raises:
      ValueError: on an unknown rule, or a rate outside of (0, 1).
    """

    rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        rule: str = "hebb",
        eta: float = 0.5,
        gamma: float = 0.1,
        gated: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        _check_rule("PavlovianConditioning", rule, 0)
        for label, rate in (("eta", eta), ("gamma", gamma)):
            if not 0 < rate < 1:
                raise ValueError(
                    f"PavlovianConditioning: {label} must be between 0 and 1, got {rate}."
                )
        self.rule = rule
        self.query, self.key = (
            self.projection((num_heads, self.key_dim), rngs=rngs) for _ in range(2)
        )
        self.value = self.projection((num_heads, self.value_dim), rngs=rngs)
        self.out = self.output_projection(self.value_dim, rngs=rngs)
        # logits of the rates
        self.eta = self.parameter(jnp.full((num_heads,), math.log(eta / (1 - eta))), ("heads",))
        self.gamma, self.salience = nnx.data(None), nnx.data(None)
        if rule == "decay":
            start = math.log(gamma / (1 - gamma))
            self.gamma = self.parameter(jnp.full((num_heads,), start), ("heads",))
        if gated:
            self.salience = self.projection(num_heads, ("heads",), rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, e]."""
        x, cache = call.x, call.cache
        dtype = state_dtype(x.dtype)
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        q, k = (unit_norm(y) for y in self.rotate(call, q, k))
        eta = jax.nn.sigmoid(self.eta[...].astype(dtype))
        if self.salience is not None:
            eta = eta[None, None] * jax.nn.sigmoid(self.salience(x).astype(dtype))
        gamma = 0.0 if self.gamma is None else jax.nn.sigmoid(self.gamma[...].astype(dtype))
        out = pavlovian_conditioning(
            q, k, v, rule=self.rule, eta=eta, gamma=gamma, valid=call.valid,
            segment_ids=call.segment_ids, chunk_size=self.chunk_size,
            initial_state=None if cache is None else cache.state["state"],
            return_state=cache is not None,
        )  # fmt: skip
        if cache is None:
            return out
        z, state = out
        call.cache = cache.next(call.count, state=state)
        return z


def _example() -> tuple[PavlovianConditioning, jax.Array]:
    module = PavlovianConditioning(2, 8, rule="delta", gated=True, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 8))


SPEC = Mechanism(
    id="pavlovian_conditioning",
    title="Understanding Transformers through the Lens of Pavlovian Conditioning",
    arxiv="2508.08289",
    year=2025,
    function=pavlovian_conditioning,
    module=PavlovianConditioning,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    kernel="linear",
    cost="O(T (C (K + V) + K V)), chunk C",
    reduces_to={"rule='hebb', eta=1": "linear_attention", "rule='delta'": "deltanet"},
    golden=("pavlovian_conditioning",),
    reading="Learned rates and the gate of the module, and the network in which errors propagate: "
    "the paper has no official code.",
    example=_example,
)
