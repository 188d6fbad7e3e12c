"""Gated linear attention: every channel of the state decays at a rate that the token chooses.

    S_t = Diag(α_t) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t / sqrt(k)
    α_t = σ(x_t W_1 W_2 + b)^(1/16)        a rank of 16 between W_1 and W_2
    z = norm(o) ⊙ swish(x W_r),   y = z W_O

Simple GLA has one decay per head instead, σ(x_t w_h + b_h)^(1/16).

Reference: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training",
2023, arXiv:2312.06635; code fla-org/flash-linear-attention. The paper writes a layer norm, the code
has an RMS norm per head (the default).
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from attnjax.cache.linear_state import state_dtype
from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.mechanisms.linear.linear_mixer import LinearMixer
from attnjax.mixer import Call
from attnjax.spec import Mechanism


def gated_linear_attention(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h v"],
    gate: Float[Array, "b t h k"] | Float[Array, "b t h"],
    *,
    normalizer: float = 16.0,
    **options: Any,
) -> Any:
    """Causal linear attention with a decay σ(gate)^(1/normalizer) per token and channel, or head.

        S_t = Diag(α_t) S_{t-1} + k_t v_t^T,   o_t = scale S_t^T q_t,   α = σ(gate)^(1/normalizer)

    Args:
      query, key, value: shapes as annotated.
      gate: logits, [b, t, h, k], or [b, t, h] for one decay per head (simple GLA).
      normalizer: τ; a larger one forgets more slowly. Paper: 16.
      **options: of `linear_attention`: initial_state, return_state, segment_ids, chunk_size, scale
        (None is k^-0.5), implementation.

    Returns:
      As `linear_attention`: the output, with return_state also the final state.

    Cost: O(t (c (k + v) + k v)), chunk c. Memory: O(t).

    Raises:
      ValueError: on shapes that do not fit together, or normalizer <= 0.

    Example: >>> gated_linear_attention(query, key, value, gate).shape
    """
    decay = gate_decay(gate, normalizer)
    return linear_attention(query, key, value, decay=decay, **options)


def gate_decay(gate: Float[Array, "..."], normalizer: float = 16.0) -> Float[Array, "..."]:
    """Log decay log σ(gate) / normalizer, at least float32."""
    if normalizer <= 0:
        raise ValueError(
            f"gated_linear_attention: normalizer={normalizer} must be positive. Paper: 16."
        )
    return jax.nn.log_sigmoid(gate.astype(state_dtype(gate.dtype))) / normalizer


class GatedLinearAttention(LinearMixer):
    """The mixer of GLA around `gated_linear_attention`; always causal.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      key_factor, value_factor: widths of keys and values, as multiples of qkv_features. Paper: 0.5
        and 1.
      per_head: one decay per head (simple GLA) instead of one per channel.
      gate_rank: width between the two maps that give the decays of the channels. Paper: 16.
      normalizer: τ of the decay. Paper: 16.
      conv_size: taps of a short convolution with silu on queries, keys and values, in tokens; None
        is none. Paper: none.
      norm: of a head's values, "rms" (code) or "layer" (paper).
      gate: multiply by swish(x W_r).
      rngs: stream `params`.
      **options: of `LinearMixer` and `SequenceMixer`. Code: no biases but that of the decay.

    Raises:
      ValueError: when sizes do not divide, gate_rank < 1 or normalizer <= 0.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        key_factor: float = 0.5,
        value_factor: float = 1.0,
        per_head: bool = False,
        gate_rank: int = 16,
        normalizer: float = 16.0,
        conv_size: int | None = None,
        norm: str = "rms",
        gate: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, key_factor=key_factor,
            value_factor=value_factor, rngs=rngs, **options,
        )  # fmt: skip
        if gate_rank < 1 or normalizer <= 0:
            raise ValueError(
                f"GatedLinearAttention: need gate_rank >= 1 and normalizer > 0, got {gate_rank} "
                f"and {normalizer}. Paper: 16 and 16."
            )
        self.normalizer, self.per_head = normalizer, per_head
        self.query = self.projection((num_heads, self.key_dim), rngs=rngs)
        self.key = self.projection((num_heads, self.key_dim), rngs=rngs)
        self.value = self.projection((num_heads, self.value_dim), rngs=rngs)
        self.convolutions(conv_size, rngs=rngs)
        self.decay_in = nnx.data(None)
        if per_head:
            self.decay = self.projection(num_heads, ("heads",), use_bias=True, rngs=rngs)
        else:
            self.decay_in = self.projection(gate_rank, (None,), use_bias=False, rngs=rngs)
            self.decay = self.projection(
                (num_heads, self.key_dim), inputs=gate_rank, in_axis=None, use_bias=True, rngs=rngs
            )
        self.output_layers(gate=gate, norm=norm, rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, v]."""
        states: dict[str, jax.Array] = {}
        q, k, v = (self.convolved(call, part, states) for part in ("query", "key", "value"))
        q, k, v = self.heads(call, q, k, v)
        logits = self.decay(call.x if self.decay_in is None else self.decay_in(call.x))
        decay = gate_decay(logits, self.normalizer)
        return self.gated(call, self.recur(call, states, q, k, v, decay=decay))


def _example() -> tuple[GatedLinearAttention, jax.Array]:
    module = GatedLinearAttention(2, 12, 16, conv_size=3, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 12))


SPEC = Mechanism(
    id="gla",
    title="Gated Linear Attention Transformers with Hardware-Efficient Training",
    arxiv="2312.06635",
    year=2023,
    code="fla-org/flash-linear-attention",
    function=gated_linear_attention,
    module=GatedLinearAttention,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    kernel="linear",
    cost="O(T (C (K + V) + K V)), chunk C",
    reduces_to={"gate -> inf": "linear_attention", "per_head=True": "mamba2"},
    example=_example,
)
