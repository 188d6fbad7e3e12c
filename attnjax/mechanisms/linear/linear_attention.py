"""Linear attention: a recurrence over a matrix state, computed in chunks.

S is [k, v] per batch row and head, g the log decay (at most 0), and o_t = scale * S_t^T q_t.

    decay None          S_t = S_{t-1} + k_t v_t^T                      plain linear attention
    decay [h]           S_t = exp(g_h) S_{t-1} + k_t v_t^T             Lightning, RetNet
    decay [b,t,h]       S_t = exp(g_t) S_{t-1} + k_t v_t^T             Mamba-2, gated RetNet
    decay [b,t,h,k]     S_t = Diag(exp(g_t)) S_{t-1} + k_t v_t^T       GLA, HGRN2
    beta [b,t,h]        S_t = S' + beta_t k_t (v_t - S'^T k_t)^T       DeltaNet; with decay gated
                        where S' is the decayed S_{t-1}                DeltaNet, per channel KDA
    bonus [h,k]         o_t = scale * (S_{t-1} + Diag(u) k_t v_t^T)^T q_t   RWKV-6

Feature maps, normalizers (an extra column of ones in `value`) and gates live above.

Reference: Katharopoulos et al., "Transformers are RNNs", 2020, arXiv:2006.16236; the gated forms:
Yang et al., 2023, arXiv:2312.06635, and 2024, arXiv:2406.06484. Same values as the naive
definitions of fla-org/flash-linear-attention.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from attnjax.checks import check_qkv, check_segments
from attnjax.spec import Mechanism
from pallas_kernels.dispatch import check_implementation
from pallas_kernels.linear import LinearSpec, Operands, linear_recurrence, linear_step


def linear_attention(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h v"],
    *,
    decay: Float[Array, " h"] | Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    beta: Float[Array, "b t h"] | None = None,
    bonus: Float[Array, "h k"] | None = None,
    initial_state: Float[Array, "b h k v"] | None = None,
    return_state: bool = False,
    segment_ids: Int[Array, "b t"] | None = None,
    chunk_size: int | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Causal linear attention with optional decay, delta rule and bonus; the table is above.

    Args:
      query, key, value: shapes as annotated; every head has its own key and value.
      decay: log decay, at most 0 (a positive one grows without bound); its rank tells the kind.
        None: no decay.
      beta: write strength of the delta rule, in [0, 1] (up to 2 allows negative eigenvalues); keys
        must then have length <= 1, or the recurrence explodes. None: no delta rule.
      bonus: u, weight of the current token, which queries then see before it is written. None:
        queries see the current token as written. Not with `beta`.
      initial_state: S_0; None is zero.
      return_state: also return the final state.
      segment_ids: the state restarts where the id changes from one token to the next. The initial
        state goes to the first segment, the final state is the last segment's.
      chunk_size: tokens per chunk; None is 128 on TPUs and 64 elsewhere. Changes speed and rounding
        only. Kernels round it up to what the hardware multiplies, per-channel decays to a multiple
        of 16.
      scale: factor on the output; None is k^-0.5.
      implementation: None runs the kernel of the platform where it has the options (no, per-head or
        per-token decay; neither beta nor bonus) and XLA otherwise; "xla" forces XLA, "pallas" the
        kernel; further names are those of `pallas_kernels.dispatch`.

    Returns:
      Output in the dtype of `value`; with `return_state` also the final state in float32 (float64
      when an input is float64), which is the type of all decay and state arithmetic. Everything
      floating has a gradient, `initial_state` and the returned state too.

    Cost: O(t (c (k + v) + k v)) with chunk c. Memory: O(t); the backward pass saves its inputs
      only.

    Raises:
      ValueError: on shapes that do not fit together, chunk_size < 1, beta together with bonus, or
        an unknown implementation.
      TypeError: on inputs that are not floating point, or segment ids that are not integers.
      NotImplementedError: when the named implementation lacks an option.

    Example: >>> linear_attention(query, key, value, decay=gates, beta=beta).shape  # gated DeltaNet
    """
    name = "linear_attention"
    _check_sequences(name, query, key, value)
    b, t, h, k = query.shape
    _check_decay(name, decay, {1: (h,), 3: (b, t, h), 4: (b, t, h, k)})
    _check_array(name, "beta", beta, (b, t, h))
    _check_array(name, "bonus", bonus, (h, k))
    _check_array(name, "initial_state", initial_state, (b, h, k, value.shape[3]))
    _check_options(name, beta, bonus, chunk_size, implementation)
    if segment_ids is not None:
        check_segments(name, segment_ids, b, t)
    operands = Operands(
        query, key, value, decay, beta, bonus, initial_state,
        None if segment_ids is None else runs(segment_ids),
    )  # fmt: skip
    factor = k**-0.5 if scale is None else float(scale)
    spec = LinearSpec(chunk_size=chunk_size, scale=factor, implementation=implementation)
    out, state = linear_recurrence(operands, spec)
    return (out, state) if return_state else out


def linear_attention_step(
    query: Float[Array, "b h k"],
    key: Float[Array, "b h k"],
    value: Float[Array, "b h v"],
    state: Float[Array, "b h k v"],
    *,
    decay: Float[Array, " h"] | Float[Array, "b h"] | Float[Array, "b h k"] | None = None,
    beta: Float[Array, "b h"] | None = None,
    bonus: Float[Array, "h k"] | None = None,
    scale: float | None = None,
) -> tuple[Float[Array, "b h v"], Float[Array, "b h k v"]]:
    """One token of `linear_attention`, for decoding.

    Args:
      query, key, value: the token, shapes as annotated.
      state: the state before the token; its dtype is that of the arithmetic, float32 or wider.
      decay: log decay, None, [h], [b, h] or [b, h, k].
      beta, bonus, scale: as for `linear_attention`.

    Returns:
      Output in the dtype of `value`, and the next state.

    Raises:
      ValueError: on shapes that do not fit together, or beta together with bonus.
    """
    name = "linear_attention_step"
    if query.ndim != 3 or key.shape != query.shape or value.shape[:-1] != query.shape[:-1]:
        raise ValueError(
            f"{name}: query and key must be [b, h, k] and value [b, h, v], got query "
            f"{query.shape}, key {key.shape}, value {value.shape}; "
            "a step takes one token, without a length axis."
        )
    b, h, k = query.shape
    _check_decay(name, decay, {1: (h,), 2: (b, h), 3: (b, h, k)})
    _check_array(name, "beta", beta, (b, h))
    _check_array(name, "bonus", bonus, (h, k))
    _check_array(name, "state", state, (b, h, k, value.shape[2]))
    _check_options(name, beta, bonus, None, None)
    return linear_step(
        query, key, value, state, decay=decay, beta=beta, bonus=bonus,
        scale=k**-0.5 if scale is None else float(scale),
    )  # fmt: skip


def runs(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Numbers from 0 that go up wherever the id changes: a recurrence restarts there."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), ((0, 0), (1, 0)))


def _check_sequences(name: str, query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    check_qkv(name, query, key, value)
    if key.shape != query.shape:
        raise ValueError(
            f"{name}: query and key must have the same shape [b, t, h, k], got query "
            f"{query.shape} and key {key.shape}; "
            "repeat shared key/value heads with jnp.repeat(key, groups, axis=2)."
        )


def _check_decay(name: str, decay: jax.Array | None, shapes: dict[int, tuple[int, ...]]) -> None:
    if decay is not None and shapes.get(decay.ndim) != decay.shape:
        wanted = ", ".join(str(s) for s in shapes.values())
        raise ValueError(
            f"{name}: decay must have one of the shapes {wanted} (per head, token or channel), got "
            f"{decay.shape}."
        )
    _check_array(name, "decay", decay, None if decay is None else decay.shape)


def _check_array(name: str, label: str, x: jax.Array | None, shape: tuple[int, ...] | None) -> None:
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"{name}: {label} must have shape {shape}, got {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name}: {label} must be floating point, got {x.dtype}.")


def _check_options(
    name: str, beta: object, bonus: object, chunk_size: int | None, implementation: str | None
) -> None:
    if beta is not None and bonus is not None:
        raise ValueError(
            f"{name}: beta (delta rule) and bonus (exclusive read) exclude each other; "
            "pass one of them."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(
            f"{name}: chunk_size={chunk_size} must be at least 1, or None for the default."
        )
    check_implementation(name, implementation)


SPEC = Mechanism(
    id="linear_attention",
    title="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    arxiv="2006.16236",
    year=2020,
    code="fla-org/flash-linear-attention",
    kind="function",
    function=linear_attention,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    golden=("linear_family",),
    kernel="linear",
    cost="O(T (C (K + V) + K V)), chunk C",
    reduces_to={"decay=[h], scale=1": "lightning_attention"},
)
