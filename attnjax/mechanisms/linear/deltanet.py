"""DeltaNet: a write first removes what the state already holds for that key.

    S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}^T k_t)^T,   o_t = S_t^T q_t / sqrt(k)

q, k and v pass a short convolution and silu, q and k are then divided by their lengths, and
β = σ(x w_h), or twice that, which lets the transition I - β k k^T have negative eigenvalues. The
write is one step of gradient descent, with rate β, on ‖S^T k - v‖² / 2.

Reference: Schlag et al., "Linear Transformers Are Secretly Fast Weight Programmers", 2021,
arXiv:2102.11174 (elu + 1, keys that sum to 1: `activation="elu", qk_norm="sum"`, no convolution);
Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", 2024,
arXiv:2406.06484 (the default); code fla-org/flash-linear-attention.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnjax.cache.linear_state import state_dtype
from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.mechanisms.linear.linear_mixer import ACTIVATIONS, LinearMixer, unit_norm
from attnjax.mixer import Call
from attnjax.spec import Mechanism


def delta_rule(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h v"],
    beta: Float[Array, "b t h"],
    *,
    qk_norm: str = "l2",
    **options: Any,
) -> Any:
    """Causal linear attention with the delta rule on normalized queries and keys.

        S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}^T k_t)^T,   o_t = scale S_t^T q_t

    Args:
      query, key, value: shapes as annotated.
      beta: write strength, in [0, 1], up to 2 with negative eigenvalues.
      qk_norm: "l2" divides queries and keys by their lengths, "sum" by the sums of their channels,
        which must be positive.
      **options: of `linear_attention`: initial_state, return_state, segment_ids, chunk_size, scale
        (None is k^-0.5), implementation.

    Returns:
      As `linear_attention`: the output, with return_state also the final state.

    Cost: O(t (c (c + k + v) + k v)), chunk c. Memory: O(t).

    Raises:
      ValueError: on shapes that do not fit together, or an unknown qk_norm.

    Example: >>> delta_rule(query, key, value, jax.nn.sigmoid(logits)).shape
    """
    query, key = normalized(query, qk_norm), normalized(key, qk_norm)
    return linear_attention(query, key, value, beta=beta, **options)


def normalized(x: Float[Array, "*b k"], kind: str) -> Float[Array, "*b k"]:
    """X divided over its last axis by its length ("l2") or its sum ("sum")."""
    if kind == "l2":
        return unit_norm(x)
    if kind != "sum":
        raise ValueError(f"delta_rule: qk_norm={kind!r} is unknown; pass 'l2' or 'sum'.")
    wide = x.astype(state_dtype(x.dtype))
    return (wide / jnp.sum(wide, axis=-1, keepdims=True)).astype(x.dtype)


class DeltaNet(LinearMixer):
    """The mixer of DeltaNet around `delta_rule`; always causal.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      key_factor, value_factor: widths of keys and values, as multiples of qkv_features. Paper: 1.
      conv_size: taps of the short convolutions, in tokens; None is none. Paper: 4.
      activation: of queries and keys: "silu", "relu", "elu" (elu + 1) or "identity".
      qk_norm: "l2" or "sum"; "sum" needs the positive activation "elu".
      negative_eigenvalues: β in [0, 2] instead of [0, 1].
      gate: multiply the normalized output by swish(x W). Paper: no.
      rngs: stream `params`.
      **options: of `LinearMixer` and `SequenceMixer`. Paper: no biases.

    Raises:
      ValueError: on an unknown activation or qk_norm, or "sum" with another activation than "elu".
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        key_factor: float = 1.0,
        value_factor: float = 1.0,
        conv_size: int | None = 4,
        activation: str = "silu",
        qk_norm: str = "l2",
        negative_eigenvalues: bool = False,
        gate: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, key_factor=key_factor,
            value_factor=value_factor, rngs=rngs, **options,
        )  # fmt: skip
        if activation not in ACTIVATIONS or qk_norm not in ("l2", "sum"):
            raise ValueError(
                f"DeltaNet: activation={activation!r} must be one of {sorted(ACTIVATIONS)} and "
                f"qk_norm={qk_norm!r} one of 'l2', 'sum'."
            )
        if qk_norm == "sum" and activation != "elu":
            raise ValueError(
                f"DeltaNet: qk_norm='sum' divides by the sum of a key's channels, which "
                f"activation={activation!r} lets vanish; pass activation='elu'."
            )
        self.activation, self.qk_norm = activation, qk_norm
        self.negative_eigenvalues = negative_eigenvalues
        self.query = self.projection((num_heads, self.key_dim), rngs=rngs)
        self.key = self.projection((num_heads, self.key_dim), rngs=rngs)
        self.value = self.projection((num_heads, self.value_dim), rngs=rngs)
        self.beta = self.projection(num_heads, ("heads",), use_bias=False, rngs=rngs)
        self.convolutions(conv_size, activation=activation, rngs=rngs)
        self.output_layers(gate=gate, rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, v]; the sites q and k hold what is then normalized."""
        states: dict[str, jax.Array] = {}
        q, k, v = (self.convolved(call, part, states) for part in ("query", "key", "value"))
        if self.query_conv is None:
            act = ACTIVATIONS[self.activation]
            q, k, v = act(q), act(k), jax.nn.silu(v)
        q, k, v = self.heads(call, q, k, v)
        q, k = normalized(q, self.qk_norm), normalized(k, self.qk_norm)
        beta = write_strength(self.beta(call.x), self.negative_eigenvalues)
        return self.gated(call, self.recur(call, states, q, k, v, beta=beta))


def write_strength(logits: Float[Array, "b t h"], negative: bool) -> Float[Array, "b t h"]:
    """σ(logits), or 2 σ(logits) with negative eigenvalues, at least float32."""
    beta = jax.nn.sigmoid(logits.astype(state_dtype(logits.dtype)))
    return 2 * beta if negative else beta


def _example() -> tuple[DeltaNet, jax.Array]:
    module = DeltaNet(2, 12, 16, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 12))


SPEC = Mechanism(
    id="deltanet",
    title="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    arxiv="2406.06484",
    year=2024,
    code="fla-org/flash-linear-attention",
    function=delta_rule,
    module=DeltaNet,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    kernel="linear",
    cost="O(T (C (C + K + V) + K V)), chunk C",
    reduces_to={"orthogonal keys, beta=1": "linear_attention"},
    example=_example,
)
