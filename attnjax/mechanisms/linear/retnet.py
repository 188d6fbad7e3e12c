"""Retention: linear attention with a fixed decay per head and rotated queries and keys.

    S_n = γ_h S_{n-1} + k_n v_n^T,   o_n = S_n^T q_n / sqrt(d),   γ_h = 1 - 2^(-5-h)
    z = norm(o) ⊙ swish(x W_G),   y = z W_O

The norm runs over each head by itself, so the factors with which the paper's parallel form scales
its score rows cancel.

Reference: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models",
2023, arXiv:2307.08621. The paper calls the norm GroupNorm; the code of microsoft/torchscale and of
fla-org/flash-linear-attention is an RMS norm per head (the default). torchscale spreads the angles
as base^(-linspace(0, 1)), both ends included (the default); flash-linear-attention takes those of
RoPE.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnjax.cache.linear_state import state_dtype
from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.mechanisms.linear.linear_mixer import LinearMixer
from attnjax.mixer import Call
from attnjax.positions import apply_rope, rope_frequencies
from attnjax.spec import Mechanism


def retention(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h v"],
    *,
    decay: Float[Array, " h"] | None = None,
    **options: Any,
) -> Any:
    """Causal linear attention whose weights fall with the distance: γ_h^(n-m) q_n · k_m.

        o_n = scale Σ_{m <= n} γ_h^(n-m) (q_n · k_m) v_m

    Args:
      query, key, value: shapes as annotated, already rotated.
      decay: log γ by head; None is `retention_decay(h)`.
      **options: of `linear_attention`: initial_state, return_state, segment_ids, chunk_size, scale
        (None is k^-0.5), implementation.

    Returns:
      As `linear_attention`: the output, with return_state also the final state.

    Cost: O(t (c (k + v) + k v)), chunk c. Memory: O(t).

    Raises:
      ValueError: on shapes that do not fit together.

    Example: >>> retention(query, key, value, segment_ids=ids).shape
    """
    if decay is None:
        decay = jnp.asarray(retention_decay(query.shape[2]), state_dtype(query.dtype))
    return linear_attention(query, key, value, decay=decay, **options)


def retention_decay(num_heads: int) -> np.ndarray:
    """Log decay per token of every head: log(1 - 2^(-5-h)), h from 0."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(num_heads))))


class MultiScaleRetention(LinearMixer):
    """The mixer of RetNet around `retention`: rotation, norm by head, swish gate; always causal.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      value_factor: width of a head's values, as a multiple of that of its keys. Paper: 2.
      frequencies: "official" (base^(-c / (d/2 - 1))) or "rope" (base^(-c / (d/2))).
      norm: of a head's values, "rms" (code) or "layer" (paper).
      gate: multiply by swish(x W_G).
      rope_base: base of the angles; None is no rotation. Paper: 10000.
      rngs: stream `params`.
      **options: of `LinearMixer` and `SequenceMixer`. Paper: no biases.

    Raises:
      ValueError: on unknown frequencies or norm, or an odd width with a rotation.
    """

    rotary = True
    rope_layout = "interleaved"

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        value_factor: float = 2.0,
        frequencies: str = "official",
        norm: str = "rms",
        gate: bool = True,
        rope_base: float | None = 10000.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, value_factor=value_factor,
            rope_base=rope_base, rngs=rngs, **options,
        )  # fmt: skip
        if frequencies not in ("official", "rope"):
            raise ValueError(
                f"MultiScaleRetention: frequencies={frequencies!r} is unknown; pass 'official' or "
                "'rope'."
            )
        if rope_base is not None and self.key_dim % 2:
            raise ValueError(
                f"MultiScaleRetention: a rotation needs an even width per head, got {self.key_dim};"
                " change qkv_features, or pass rope_base=None."
            )
        self.frequencies = frequencies
        self.query = self.projection((num_heads, self.key_dim), rngs=rngs)
        self.key = self.projection((num_heads, self.key_dim), rngs=rngs)
        self.value = self.projection((num_heads, self.value_dim), rngs=rngs)
        self.output_layers(gate=gate, norm=norm, rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, v]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        q, k = self.rotate(call, q, k)
        decay = jnp.asarray(retention_decay(self.num_heads), state_dtype(q.dtype))
        return self.gated(call, self.recur(call, {}, q, k, v, decay=decay))

    def rotate(self, call: Call, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both rotated by their positions."""
        if self.rope_base is None:
            return query, key
        planes = self.key_dim // 2
        if self.frequencies == "official":
            angles = self.rope_base ** -np.linspace(0.0, 1.0, planes)
        else:
            angles = rope_frequencies(self.key_dim, self.rope_base, None, None)[0]

        def turn(x: jax.Array) -> jax.Array:
            return apply_rope(x, call.positions, angles, layout=self.rope_layout)

        return turn(query), turn(key)


def _example() -> tuple[MultiScaleRetention, jax.Array]:
    module = MultiScaleRetention(2, 12, 8, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 12))


SPEC = Mechanism(
    id="retnet",
    title="Retentive Network: A Successor to Transformer for Large Language Models",
    arxiv="2307.08621",
    year=2023,
    code="microsoft/torchscale",
    function=retention,
    module=MultiScaleRetention,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    kernel="linear",
    cost="O(T (C (K + V) + K V)), chunk C",
    reduces_to={
        "decay=-slopes, scale=1": "lightning_attention",
        "decay=0": "linear_attention",
    },
    example=_example,
)
