"""Mamba-2: a selective state space model in its dual form, linear attention with scalar decays.

    S_t = exp(-Δ_t e^A_h) S_{t-1} + B_t (Δ_t x_t)^T,   y_t = S_t^T C_t + D_h x_t
    Δ_t = softplus(u_t w_h + b_h);   x, B and C are short convolutions of maps of the input u
    z = RMSNorm(y ⊙ silu(u W_z)),   out = z W_O

C are the queries, B the keys and Δ x the values. B and C are shared by the heads of a group; the
norm runs over all heads of a group together, after the gate.

Reference: Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through
Structured State Space Duality", 2024, arXiv:2405.21060; code state-spaces/mamba.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnjax.cache.linear_state import state_dtype
from attnjax.layers import simple_rms_norm
from attnjax.mechanisms.linear.linear_attention import linear_attention
from attnjax.mechanisms.linear.linear_mixer import LinearMixer, step_bias, step_decay
from attnjax.mixer import Call
from attnjax.spec import Mechanism


def state_space_duality(
    x: Float[Array, "b t h p"],
    step: Float[Array, "b t h"],
    log_rate: Float[Array, " h"],
    key: Float[Array, "b t g n"],
    query: Float[Array, "b t g n"],
    *,
    skip: Float[Array, " h"] | None = None,
    **options: Any,
) -> Any:
    """The state space model of Mamba-2, computed as linear attention.

        S_t = exp(-Δ_t e^A) S_{t-1} + B_t (Δ_t x_t)^T,   y_t = S_t^T C_t + D x_t

    Args:
      x: input of every head.
      step: Δ, positive.
      log_rate: A, the logarithm of the rate.
      key, query: B and C; g divides h, a group's heads share them.
      skip: D; None is 0.
      **options: of `linear_attention`: initial_state [b, h, n, p], return_state, segment_ids,
        chunk_size, scale (None is 1), implementation.

    Returns:
      y [b, t, h, p], with return_state also the final state [b, h, n, p].

    Cost: O(t (c (n + p) + n p)), chunk c. Memory: O(t).

    Raises:
      ValueError: on shapes that do not fit together.

    Example: >>> state_space_duality(x, step, log_rate, b, c, skip=d).shape
    """
    heads, groups = x.shape[2], key.shape[2]
    if key.shape != query.shape or groups == 0 or heads % groups:
        raise ValueError(
            f"state_space_duality: key and query must be [batch, length, groups, n], with groups "
            f"dividing the {heads} heads of x, got {key.shape} and {query.shape}."
        )
    query, key = shared_heads(query, heads), shared_heads(key, heads)
    value = x * step[..., None].astype(x.dtype)
    options = {"scale": 1.0} | options
    result = linear_attention(query, key, value, decay=step_decay(step, log_rate), **options)
    if skip is None:
        return result
    out, *rest = result if isinstance(result, tuple) else (result,)
    out = out + x * skip[None, None, :, None].astype(x.dtype)
    return (out, *rest) if rest else out


def shared_heads(x: Float[Array, "b t g n"], heads: int) -> Float[Array, "b t h n"]:
    """Every group's vector, once for each of its heads."""
    return jnp.repeat(x, heads // x.shape[2], axis=2)


class Mamba2(LinearMixer):
    """The mixer of Mamba-2 around `state_space_duality`; always causal.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      value_factor: width of x, as a multiple of qkv_features. Paper: 2, in heads of 64.
      state_size: n, width of B and C. Paper: 128.
      groups: of heads that share B and C; divides num_heads. Paper: 1.
      conv_size: taps of the short convolutions, in tokens; None is none. Paper: 4.
      norm_before_gate: RMSNorm(y) ⊙ silu(..) instead of RMSNorm(y ⊙ silu(..)).
      rngs: stream `params`.
      **options: of `LinearMixer` and `SequenceMixer`. Paper: no biases but those of the
        convolutions.

    Raises:
      ValueError: when groups do not divide the heads, or state_size < 1.
      NotImplementedError: for a key_factor.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        value_factor: float = 2.0,
        state_size: int = 128,
        groups: int = 1,
        conv_size: int | None = 4,
        norm_before_gate: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, value_factor=value_factor,
            rngs=rngs, **options,
        )  # fmt: skip
        if groups < 1 or num_heads % groups or state_size < 1:
            raise ValueError(
                f"Mamba2: groups={groups} must divide num_heads={num_heads}, and "
                f"state_size={state_size} be at least 1."
            )
        if self.key_dim != self.head_dim:
            raise NotImplementedError(
                "Mamba2: key_factor is not supported, the width of B and C is "
                f"state_size={state_size}."
            )
        self.groups, self.norm_before_gate = groups, norm_before_gate
        self.key_dim = state_size
        shared = (groups, state_size)
        self.value = self.projection((num_heads, self.value_dim), rngs=rngs)
        self.key = self.projection(shared, (None, None), rngs=rngs)
        self.query = self.projection(shared, (None, None), rngs=rngs)
        self.gate = self.projection((num_heads, self.value_dim), rngs=rngs)
        self.step = self.projection(num_heads, ("heads",), use_bias=False, rngs=rngs)
        self.convolutions(conv_size, {"query": shared, "key": shared}, use_bias=True, rngs=rngs)
        rate = jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, 1.0, 16.0)
        self.log_rate = self.parameter(jnp.log(rate), ("heads",))
        self.step_bias = self.parameter(step_bias(rngs, num_heads), ("heads",))
        self.skip = self.parameter(jnp.ones((num_heads,)), ("heads",))
        self.scale = self.parameter(jnp.ones((num_heads, self.value_dim)), ("heads", "head_dim"))
        self.out = self.output_projection(self.value_dim, rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, p]; the sites q, k and v hold C, B (by head) and x."""
        states: dict[str, jax.Array] = {}
        c, b, x = (self.convolved(call, part, states) for part in ("query", "key", "value"))
        if self.query_conv is None:
            c, b, x = jax.nn.silu(c), jax.nn.silu(b), jax.nn.silu(x)
        c, b = shared_heads(c, self.num_heads), shared_heads(b, self.num_heads)
        c, b, x = self.heads(call, c, b, x)
        logits = self.step(call.x)
        wide = logits.astype(state_dtype(logits.dtype))
        step = jax.nn.softplus(wide + self.step_bias[...].astype(wide.dtype)[None, None])
        value, decay = x * step[..., None].astype(x.dtype), step_decay(step, self.log_rate[...])
        y = self.recur(call, states, c, b, value, decay=decay, scale=1.0)
        y = y + x * self.skip[...][None, None, :, None].astype(x.dtype)
        return self._normalized(y, self.gate(call.x))

    def _normalized(self, y: jax.Array, gate: jax.Array) -> jax.Array:
        """RMS norm over each group of heads and the gate, in the order of the options."""
        dtype = state_dtype(y.dtype)
        wide, factor = y.astype(dtype), jax.nn.silu(gate.astype(dtype))
        if not self.norm_before_gate:
            wide = wide * factor
        grouped = wide.reshape(*wide.shape[:2], self.groups, -1)
        wide = simple_rms_norm(grouped, 1e-5).reshape(wide.shape)
        wide = wide * self.scale[...].astype(dtype)[None, None]
        return (wide * factor if self.norm_before_gate else wide).astype(y.dtype)


def _example() -> tuple[Mamba2, jax.Array]:
    module = Mamba2(4, 12, 8, state_size=6, groups=2, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 12))


SPEC = Mechanism(
    id="mamba2",
    title=(
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured "
        "State Space Duality"
    ),
    arxiv="2405.21060",
    year=2024,
    code="state-spaces/mamba",
    function=state_space_duality,
    module=Mamba2,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    kernel="linear",
    cost="O(T (C (N + P) + N P)), chunk C",
    reduces_to={"step=1, log_rate=log slope": "lightning_attention"},
    example=_example,
)
