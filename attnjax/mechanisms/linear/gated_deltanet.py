"""Gated DeltaNet: the state decays as Mamba-2's and is written by the delta rule.

    S_t = α_t (I - β_t k_t k_t^T) S_{t-1} + β_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(k)
    α_t = exp(-e^A_h softplus(x_t w_h + b_h)),   β_t = σ(x_t u_h)
    z = norm(o) ⊙ swish(x W_G),   y = z W_O

q, k and v pass a short convolution and silu, q and k are then divided by their lengths.

Reference: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule", 2024,
arXiv:2412.06464; code NVlabs/GatedDeltaNet and fla-org/flash-linear-attention.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnjax.cache.linear_state import state_dtype
from attnjax.mechanisms.linear.deltanet import write_strength
from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.mechanisms.linear.linear_mixer import LinearMixer, step_bias, step_decay, unit_norm
from attnjax.mixer import Call
from attnjax.spec import Mechanism


def gated_delta_rule(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h v"],
    beta: Float[Array, "b t h"],
    decay: Float[Array, "b t h"] | Float[Array, "b t h k"],
    **options: Any,
) -> Any:
    """Causal linear attention with decay and delta rule on unit queries and keys.

        S_t = S' + β_t k_t (v_t - S'^T k_t)^T,   S' = exp(decay_t) S_{t-1},   o_t = scale S_t^T q_t

    Args:
      query, key, value: shapes as annotated; queries and keys are divided by their lengths here.
      beta: write strength, in [0, 1], up to 2 with negative eigenvalues.
      decay: log decay per token and head, at most 0; [b, t, h, k] decays the channels by themselves
        (Kimi Delta Attention).
      **options: of `linear_attention`: initial_state, return_state, segment_ids, chunk_size, scale
        (None is k^-0.5), implementation.

    Returns:
      As `linear_attention`: the output, with return_state also the final state.

    Cost: O(t (c (c + k + v) + k v)), chunk c. Memory: O(t).

    Raises:
      ValueError: on shapes that do not fit together.

    Example: >>> gated_delta_rule(query, key, value, beta, decay).shape
    """
    query, key = unit_norm(query), unit_norm(key)
    return linear_attention(query, key, value, beta=beta, decay=decay, **options)


class GatedDeltaNet(LinearMixer):
    """The mixer of Gated DeltaNet around `gated_delta_rule`; always causal.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      key_factor, value_factor: widths of keys and values, as multiples of qkv_features. Paper: 0.75
        and 1.5, which with the gate gives six matrices of the size of in_features².
      conv_size: taps of the short convolutions, in tokens; None is none. Paper: 4.
      negative_eigenvalues: β in [0, 2] instead of [0, 1].
      gate: multiply the normalized output by swish(x W_G).
      rngs: stream `params`.
      **options: of `LinearMixer` and `SequenceMixer`. Paper: no biases.

    Raises:
      ValueError: when a factor gives a fraction of a channel.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        key_factor: float = 0.75,
        value_factor: float = 1.5,
        conv_size: int | None = 4,
        negative_eigenvalues: bool = False,
        gate: bool = True,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, key_factor=key_factor,
            value_factor=value_factor, rngs=rngs, **options,
        )  # fmt: skip
        self.negative_eigenvalues = negative_eigenvalues
        self.query = self.projection((num_heads, self.key_dim), rngs=rngs)
        self.key = self.projection((num_heads, self.key_dim), rngs=rngs)
        self.value = self.projection((num_heads, self.value_dim), rngs=rngs)
        self.beta = self.projection(num_heads, ("heads",), use_bias=False, rngs=rngs)
        self.step = self.projection(num_heads, ("heads",), use_bias=False, rngs=rngs)
        # uniform in (0, 16], so that the logarithm is finite
        rate = 16.0 - jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, 0.0, 16.0)
        self.log_rate = self.parameter(jnp.log(rate), ("heads",))
        self.step_bias = self.parameter(step_bias(rngs, num_heads), ("heads",))
        self.convolutions(conv_size, rngs=rngs)
        self.output_layers(gate=gate, rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, v]; the sites q and k hold what is then normalized."""
        states: dict[str, jax.Array] = {}
        q, k, v = (self.convolved(call, part, states) for part in ("query", "key", "value"))
        if self.query_conv is None:
            q, k, v = jax.nn.silu(q), jax.nn.silu(k), jax.nn.silu(v)
        q, k, v = self.heads(call, q, k, v)
        beta = write_strength(self.beta(call.x), self.negative_eigenvalues)
        decay = self.decay(call.x)
        o = self.recur(call, states, unit_norm(q), unit_norm(k), v, beta=beta, decay=decay)
        return self.gated(call, o)

    def decay(self, x: Float[Array, "b t m"]) -> Float[Array, "b t h"]:
        """Log decay -e^A softplus(x w + b) of every token and head."""
        logits = self.step(x)
        wide = logits.astype(state_dtype(logits.dtype))
        step = jax.nn.softplus(wide + self.step_bias[...].astype(wide.dtype)[None, None])
        return step_decay(step, self.log_rate[...])


def _example() -> tuple[GatedDeltaNet, jax.Array]:
    module = GatedDeltaNet(2, 12, 16, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 12))


SPEC = Mechanism(
    id="gated_deltanet",
    title="Gated Delta Networks: Improving Mamba2 with Delta Rule",
    arxiv="2412.06464",
    year=2024,
    code="NVlabs/GatedDeltaNet",
    function=gated_delta_rule,
    module=GatedDeltaNet,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    kernel="linear",
    cost="O(T (C (C + K + V) + K V)), chunk C",
    reduces_to={"decay=0": "deltanet"},
    example=_example,
)
