"""Mixture-of-head attention: heads are experts; some are always on, each token picks the others.

    p = softmax(W_r x) over the routed heads,   m = top-k of p
    g_routed = k p m / Σ p m,   g_shared = n softmax(W_s x),   w = 2 softmax(W_0 x)
    y_t = W_o concat_h(g_th head_h(t)),   g = concat(w_0 g_shared, w_1 g_routed)

n heads are shared, k of the others are routed to a token. The factors n, k and 2 are the official
code's: gates are 1 on average, so that a trained model survives the change. The paper has neither
these factors nor the division by Σ p m: `normalize="paper"`. Keys and values of every head are
needed whatever a token picks; decoding with `skip_heads` computes the picked heads only.

Models that continue from trained weights use `router="norm"`, which has no parameters: the score of
a head is ‖q_h‖ before rotation, over its standard deviation across the token's routed heads, and
the gates are 0 or 1.

Reference: Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", 2024,
arXiv:2410.11842; official code SkyworkAI/MoH (DiT, ViT and LLaMA forms).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnjax.attention import attention
from attnjax.cache.linear_state import state_dtype
from attnjax.checks import check_no_scores
from attnjax.layers import LayerNorm
from attnjax.masks import Causal
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism


def moh_gates(
    routed: Float[Array, "*b r"] | None,
    shared: Float[Array, "*b n"] | None = None,
    balance: Float[Array, "*b 2"] | None = None,
    *,
    top_k: int,
    num_shared: int = 0,
    normalize: str = "code",
) -> Float[Array, "*b h"]:
    """Gates of all heads, shared heads first, from the logits of the router.

    Args:
      routed: W_r x, of the heads that tokens choose from; None where all are shared.
      shared: W_s x; None gives every shared head the same gate.
      balance: W_0 x, shared against routed; None leaves both as they are.
      top_k: k, routed heads per token.
      num_shared: n.
      normalize: "code" for gates that are 1 on average; "paper" for plain softmax weights.

    Returns:
      [*b, n + r], float32 or wider; the gates of heads that a token did not choose are 0. Where
      scores tie, the first heads are chosen. Gradients reach the router through p alone.

    Raises:
      ValueError: when k is no number of routed heads, or there is no head at all.

    Example: >>> moh_gates(jnp.zeros((2, 5, 4)), top_k=2).shape
    Reference: Jin et al., 2024, arXiv:2410.11842, eq. 5 to 7.
    """
    if normalize not in ("code", "paper"):
        raise ValueError(f"moh_gates: normalize must be 'code' or 'paper', got {normalize!r}.")
    code = normalize == "code"
    first = routed if routed is not None else shared
    if first is None:
        raise ValueError("moh_gates: pass the logits of routed heads, of shared heads, or both.")
    dtype = state_dtype(first.dtype)
    parts = []
    if num_shared:
        if shared is None:
            even = 1.0 if code else 1 / num_shared
            parts.append(jnp.full((*first.shape[:-1], num_shared), even, dtype))
        else:
            parts.append(jax.nn.softmax(shared.astype(dtype)) * (num_shared if code else 1))
    if routed is not None:
        p = jax.nn.softmax(routed.astype(dtype))
        chosen = p * moh_selection(p, top_k).astype(dtype)
        if code:
            total = jnp.maximum(chosen.sum(-1, keepdims=True), jnp.finfo(dtype).eps)
            chosen = top_k * chosen / total
        parts.append(chosen)
    if balance is not None and len(parts) == 2:
        w = jax.nn.softmax(balance.astype(dtype)) * (2 if code else 1)
        parts = [part * w[..., i : i + 1] for i, part in enumerate(parts)]
    return jnp.concatenate(parts, -1)


def moh_selection(scores: Float[Array, "*b r"], top_k: int) -> Bool[Array, "*b r"]:
    """True at the `top_k` largest scores of each token; of equal ones the first."""
    r = scores.shape[-1]
    if not 1 <= top_k <= r:
        raise ValueError(f"MoH: top_k={top_k} must be at least 1 and at most the {r} routed heads.")
    _, index = jax.lax.top_k(jax.lax.stop_gradient(scores), top_k)
    return jax.nn.one_hot(index, r, dtype=jnp.bool_).any(-2)


def moh_norm_router(query: Float[Array, "*b r d"]) -> Float[Array, "*b r"]:
    """Probabilities of routed heads by the lengths of their queries: softmax(‖q_h‖ / std_h ‖q_h‖).

    Args:
      query: queries of the r >= 2 routed heads, before rotation.

    Returns:
      [*b, r], float32 or wider. The standard deviation is the unbiased one over the heads.
    """
    squares = jnp.square(query.astype(state_dtype(query.dtype))).sum(-1)
    positive = squares > 0  # the root has no slope at 0, where padding is
    norms = jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1)), 0)
    centered = norms - norms.mean(-1, keepdims=True)
    variance = jnp.square(centered).sum(-1, keepdims=True) / (query.shape[-2] - 1)
    spread = variance > 0
    std = jnp.where(spread, jnp.sqrt(jnp.where(spread, variance, 1)), 1)
    return jax.nn.softmax(norms / std)


def moh_balance_loss(
    probabilities: Float[Array, "b t r"],
    chosen: Bool[Array, "b t r"],
    valid: Bool[Array, "b t"] | None = None,
) -> Float[Array, ""]:
    """Load balance r Σ_h P_h f_h; k where all routed heads are chosen equally often.

    Args:
      probabilities: p; P_h is its mean over all real tokens.
      chosen: which heads each token chose; f_h is the fraction of tokens that chose h.
      valid: True for real tokens; None for all.

    Returns:
      A scalar without coefficient. Gradients flow through P.
    """
    r, dtype = probabilities.shape[-1], probabilities.dtype
    real = jnp.ones(probabilities.shape[:-1], dtype) if valid is None else valid.astype(dtype)
    count = jnp.maximum(real.sum(), 1)
    mean = (probabilities * real[..., None]).sum((0, 1)) / count
    fraction = (chosen.astype(dtype) * real[..., None]).sum((0, 1)) / count
    return r * (mean * fraction).sum()


class MoHAttention(SequenceMixer):
    """Multi-head attention whose heads are gated token by token (`moh_gates`).

    Adds `aux_coefficient` times `moh_balance_loss` to the training loss, at the site "aux_loss".

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`; heads may be wider
        or narrower than in_features / num_heads (`qkv_features`).
      num_shared: n, heads that are always on; the first ones. None is half of them, 0 for none.
      top_k: k, routed heads per token; None is a quarter of all heads, at least 1. Unused where
        all heads are shared. Paper: 50 % to 90 % of all heads active, shared ones included.
      router: "learned", or "norm" without parameters and with gates of 0 and 1.
      normalize: "code" or "paper", see `moh_gates`.
      straight_through: the gates of router="norm" pass gradients on as if they were the
        probabilities. The released LLaMA code has none (False).
      qk_norm: layer norm of queries and keys over the width of a head, shared by the heads.
      aux_coefficient: of the load-balance loss. Paper: 0.01.
      skip_heads: with a cache and one new token, attend with its own heads only; the same output
        for (n + k) / h of the operations. Masks, dropout, and scores to edit or show are then not
        supported.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: when n or k do not fit the number of heads, or options contradict each other.
    """

    sites = (*SCORE_SITES, "aux_loss")
    directions = ("causal", "bidirectional")
    grouped = masked = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        num_shared: int | None = None,
        top_k: int | None = None,
        router: str = "learned",
        normalize: str = "code",
        straight_through: bool = False,
        qk_norm: bool = False,
        aux_coefficient: float = 0.01,
        skip_heads: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        n = num_heads // 2 if num_shared is None else num_shared
        k = max(1, num_heads // 4) if top_k is None else top_k
        routed = num_heads - n
        if not 0 <= n <= num_heads:
            raise ValueError(f"MoHAttention: num_shared={n} must be 0 to num_heads={num_heads}.")
        if routed and not 1 <= k <= routed:
            raise ValueError(
                f"MoHAttention: top_k={k} must be at least 1 and at most the {routed} routed heads "
                f"(num_heads={num_heads}, num_shared={n})."
            )
        for label, value, known in (
            ("router", router, ("learned", "norm")),
            ("normalize", normalize, ("code", "paper")),
        ):
            if value not in known:
                raise ValueError(f"MoHAttention: {label} must be one of {known}, got {value!r}.")
        if router == "norm" and routed < 2:
            raise ValueError(
                f"MoHAttention: router='norm' compares at least 2 routed heads, got {routed}; "
                "lower num_shared or use router='learned'."
            )
        if router == "norm" and normalize != "code":
            raise ValueError(
                f"MoHAttention: normalize={normalize!r} has no meaning with router='norm', whose "
                "gates are 0 and 1."
            )
        if router == "learned" and straight_through:
            raise ValueError(
                "MoHAttention: straight_through=True is for router='norm'; the gates of "
                "router='learned' have gradients of their own."
            )
        self.num_shared, self.top_k, self.num_routed = n, k, routed
        self.router, self.normalize, self.straight_through = router, normalize, straight_through
        self.aux_coefficient, self.skip_heads = aux_coefficient, skip_heads
        kv = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(kv, rngs=rngs)
        self.value = self.projection(kv, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)
        self.query_ln = self.key_ln = nnx.data(None)
        if qk_norm:
            norm = functools.partial(
                LayerNorm, self.head_dim, epsilon=1e-5, axis="head_dim", use_bias=True,
                param_dtype=self.param_dtype,
            )  # fmt: skip
            self.query_ln, self.key_ln = norm(), norm()

        def gate(features: int, name: str | None, wanted: bool) -> Any:
            if not wanted or router == "norm":
                return nnx.data(None)
            return self.projection(features, (name,), use_bias=False, rngs=rngs)

        self.route = gate(routed, "heads", routed > 0)
        self.share = gate(n, "heads", n > 1)
        self.balance = gate(2, None, n > 0 and routed > 0)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d], every head times its gate."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        gates = self.gates(call, x, q)
        if self.query_ln is not None and self.key_ln is not None:
            q, k = self.query_ln(q), self.key_ln(k)
        q, k = self.rotate(call, q, k)
        if self.skip_heads and call.cache is not None and x.shape[1] == 1:
            z = self._attend_chosen(call, q, k, v, gates)
        else:
            z, _ = self.attend(call, q, k, v)
        return z * gates[..., None].astype(z.dtype)

    def gates(self, call: Call, x: jax.Array, query: jax.Array) -> jax.Array:
        """Gates [b, t, h] of x [b, t, m] and its queries before rotation; taps the balance loss."""
        if self.router == "norm":
            p = moh_norm_router(query[..., self.num_shared :, :])
            chosen = moh_selection(p, self.top_k).astype(p.dtype)
            if self.straight_through:
                chosen = chosen + (p - jax.lax.stop_gradient(p))
            call.tap("aux_loss", jnp.zeros((), p.dtype))
            return jnp.concatenate(
                [jnp.ones((*x.shape[:2], self.num_shared), p.dtype), chosen], axis=-1
            )
        logits = [None if g is None else g(x) for g in (self.route, self.share, self.balance)]
        loss = jnp.zeros((), state_dtype(x.dtype))
        if logits[0] is not None:
            p = jax.nn.softmax(logits[0].astype(state_dtype(logits[0].dtype)))
            loss = moh_balance_loss(p, moh_selection(p, self.top_k), call.valid)
        call.tap("aux_loss", self.aux_coefficient * loss)
        if logits[0] is None and logits[1] is None:  # one head, which is shared
            return jnp.ones((*x.shape[:2], 1), loss.dtype)
        return moh_gates(
            *logits, top_k=self.top_k, num_shared=self.num_shared, normalize=self.normalize
        )

    def _attend_chosen(
        self, call: Call, q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array
    ) -> jax.Array:
        """Z [b, 1, h, d] of one new token; heads that it did not choose are not computed."""
        check_no_scores(
            "MoHAttention", call, "with skip_heads=True",
            "which leaves heads out; set skip_heads=False",
        )  # fmt: skip
        before, call.cache = call.cache.length, call.cache.append(k, v, call.valid)
        b, _, h, d = q.shape
        count = self.num_shared + (self.top_k if self.num_routed else 0)
        always = jnp.arange(h) < self.num_shared
        rank = jnp.where(always[None], jnp.inf, gates[:, 0])  # a shared gate may be tiny
        _, index = jax.lax.top_k(rank, count)  # [b, n + k]
        picked = jnp.take_along_axis(q, index[:, None, :, None], axis=2)
        group = (index // (h // self.num_kv_heads))[:, None, :, None]
        keys, values = (
            jnp.take_along_axis(a.astype(q.dtype), group, axis=2)
            for a in (call.cache.key, call.cache.value)
        )
        z = attention(picked, keys, values, mask=Causal(), q_offset=before)
        rows = jnp.arange(b)[:, None]
        return jnp.zeros((b, 1, h, d), z.dtype).at[rows, 0, index].set(z[:, 0])


def _example() -> tuple[MoHAttention, jax.Array]:
    module = MoHAttention(
        4, 16, num_kv_heads=2, num_shared=2, top_k=1, rope_base=1e4, rngs=nnx.Rngs(0)
    )
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


def _picture() -> dict[str, jax.Array]:
    """Gates of every token (rows) over the heads (columns), for eight heads."""
    key = jax.random.key(0)
    routed = 2 * jax.random.normal(key, (12, 6))
    even = jnp.zeros((12, 2))
    return {"gates by head": moh_gates(routed, even, even, top_k=2, num_shared=2)}


SPEC = Mechanism(
    id="moh",
    title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
    arxiv="2410.11842",
    year=2024,
    code="SkyworkAI/MoH",
    function=moh_gates,
    module=MoHAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2); a decoding step with skip_heads (n + k) / h of it",
    reduces_to={
        "all routed heads chosen, router weights 0": "multi_head_attention",
    },
    picture=_picture,
    golden=("moh", "moh_llama"),
    reading="straight_through=True: the estimator's form is ours, the released code has none.",
    example=_example,
)
