"""Lightning attention: causal linear attention with a fixed decay per head; the TransNormer mixer.

    o_t = sum_{s <= t} exp(-slope_h (t - s)) (q_t · k_s) v_s          no scale, no normalizer
    S_t = exp(-slope_h) S_{t-1} + k_t v_t^T,   o_t = S_t^T q_t        the same as a recurrence

The mixer:  [q, k, v, u] = x W,  q = silu(q),  k = silu(k),  y = (u ⊙ SRMS(o)) W_O, where the norm
is taken over all heads together. LRPE, where it is on, makes q_t · k_s a sum of q_c k_c cos((t - s)
θ_c) with learned θ.

Reference: Qin et al., "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning
Attention", 2024, arXiv:2405.17381; "Lightning Attention-2", 2024, arXiv:2401.04658 (the tiling,
equal in value); "TransNormerLLM", 2023, arXiv:2307.14995. The papers write the slopes as (8h/H)(1 -
l/L), the released models take ALiBi's times (1 - l/(L-1) + 1e-5): the models' are the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.cache.linear_state import LinearCache, state_dtype
from attnjax.layers import simple_rms_norm
from attnjax.mechanisms.linear.linear_attention import linear_attention, linear_attention_step
from attnjax.mixer import HEAD_SITES, Call, SequenceMixer
from attnjax.positions import LRPE, alibi_slopes
from attnjax.spec import Mechanism


def lightning_attention(
    query: Float[Array, "b t h k"],
    key: Float[Array, "b t h k"],
    value: Float[Array, "b t h v"],
    slopes: Float[Array, " h"] | None,
    *,
    initial_state: Float[Array, "b h k v"] | None = None,
    return_state: bool = False,
    segment_ids: Int[Array, "b t"] | None = None,
    valid: Bool[Array, "b t"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h k v"]]:
    """Causal linear attention with a fixed exponential decay per head.

        o_t = sum_{s <= t} exp(-slope_h (t - s)) (q_t · k_s) v_s

    Args:
      query, key, value: shapes as annotated; k and v may differ.
      slopes: decay per token and head, at least 0, as `lightning_slopes` gives them. None: no
        decay.
      initial_state: state before the first token; None is zero.
      return_state: also return the state after the last token, sum_s exp(-slope (T-1-s)) k_s v_s^T.
      segment_ids: packed documents; see `linear_attention`.
      valid: False marks padding: it is not written and does not decay the state; the output there
        is meaningless.
      chunk_size: tokens per chunk; None chooses by device. Changes speed and rounding only. Paper:
        64 to 256.
      implementation: None chooses by platform; "xla", "pallas" or a kernel by name.

    Returns:
      Output in the dtype of `value`; with `return_state` also the state, float32 or wider. The
      gradient reaches the slopes too, which the official kernels leave out.

    Cost: O(t (c (k + v) + k v)), chunk c. Memory: O(t).

    Raises:
      ValueError: on shapes that do not fit together.

    Example: >>> lightning_attention(q, k, v, lightning_slopes(4, layer=0, num_layers=12)).shape
    """
    decay = None if slopes is None else -_slope_array("lightning_attention", slopes, query)
    if valid is not None:
        _check_valid("lightning_attention", valid, query.shape[:2])
        key = jnp.where(valid[..., None, None], key, jnp.zeros_like(key))
        if decay is not None:
            decay = decay[None, None] * valid.astype(decay.dtype)[..., None]
    return linear_attention(
        query, key, value, decay=decay, initial_state=initial_state, return_state=return_state,
        segment_ids=segment_ids, chunk_size=chunk_size, scale=1.0,
        implementation=implementation,
    )  # fmt: skip


def lightning_attention_step(
    query: Float[Array, "b h k"],
    key: Float[Array, "b h k"],
    value: Float[Array, "b h v"],
    state: Float[Array, "b h k v"],
    slopes: Float[Array, " h"] | None,
) -> tuple[Float[Array, "b h v"], Float[Array, "b h k v"]]:
    """One token of `lightning_attention`: S ← exp(-slope) S + k v^T, o = S^T q.

    Returns:
      Output [b, h, v] and the next state.
    """
    decay = None if slopes is None else -_slope_array("lightning_attention_step", slopes, query)
    return linear_attention_step(query, key, value, state, decay=decay, scale=1.0)


def lightning_slopes(
    num_heads: int, layer: int = 0, num_layers: int = 1, kind: str = "alibi"
) -> np.ndarray:
    """Decay per token of each head of one layer: [h].

        "alibi"   ALiBi's slopes, times 1 - l/(L-1) + 1e-5    released models
        "paper"   (8h/H) (1 - l/L), h from 0                  papers

    Args:
      num_heads: h.
      layer: l, from 0.
      num_layers: L; with 1 the factor is 1.
      kind: "alibi" or "paper".

    Raises:
      ValueError: on an unknown kind, or a layer that is not one of the `num_layers`.
    """
    if num_heads < 1 or not 0 <= layer < num_layers:
        raise ValueError(
            f"lightning_slopes: need num_heads >= 1 and 0 <= layer < num_layers, got "
            f"num_heads={num_heads}, layer={layer}, num_layers={num_layers}."
        )
    if kind == "paper":
        return 8.0 * np.arange(num_heads) / num_heads * (1 - layer / num_layers)
    if kind != "alibi":
        raise ValueError(f"lightning_slopes: kind={kind!r} is unknown; pass 'alibi' or 'paper'.")
    return alibi_slopes(num_heads) * (
        1.0 if num_layers == 1 else 1 - layer / (num_layers - 1) + 1e-5
    )


def _slope_array(name: str, slopes: Any, query: jax.Array) -> jax.Array:
    heads = query.shape[-2]
    if np.shape(slopes) != (heads,):
        raise ValueError(
            f"{name}: slopes must have shape [heads] = {(heads,)}, got {np.shape(slopes)}; "
            "flatten slopes of shape [h, 1, 1] with slopes.reshape(-1)."
        )
    return jnp.asarray(slopes, state_dtype(query.dtype))


def _check_valid(name: str, valid: jax.Array, shape: tuple[int, ...]) -> None:
    if valid.shape != shape or valid.dtype != jnp.bool_:
        raise ValueError(
            f"{name}: valid must be boolean of shape [batch, length] = {shape}, got {valid.dtype} "
            f"{valid.shape}."
        )


class LightningAttention(SequenceMixer):
    """The mixer of TransNormerLLM around `lightning_attention`; always causal.

    The sites q and k are taken after silu, z after norm and gate. A call takes `slopes` [h] in
    place of the module's own: layers that share one compiled body differ in them. `positions` are
    for LRPE, and the state of a cache goes to the first segment of a call.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      slopes: "alibi", "paper", the slopes themselves (h numbers >= 0), or None for no decay.
      layer, num_layers: place in the model, which "alibi" and "paper" slopes depend on.
      lrpe: learned cosine positions on queries and keys; doubles the key width of the state.
        Released models: first layer only.
      norm: SRMS over the merged heads before the gate.
      gate: multiply by u, a linear map of the input, before the output projection.
      chunk_size: tokens per chunk; None chooses by device.
      **options: of `SequenceMixer`. Released models: use_bias=False.

    Raises:
      ValueError: when slopes are not h numbers >= 0.
    """

    sites = (*HEAD_SITES, "q_rot", "k_rot")
    resumes = True
    drops = False
    further = ("slopes",)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        slopes: str | Sequence[float] | None = "alibi",
        layer: int = 0,
        num_layers: int = 1,
        lrpe: bool = False,
        norm: bool = True,
        gate: bool = True,
        chunk_size: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        decay: Sequence[float] | None = (
            lightning_slopes(num_heads, layer, num_layers, slopes).tolist()
            if isinstance(slopes, str)
            else slopes
        )
        if decay is not None and (len(decay) != num_heads or any(s < 0 for s in decay)):
            raise ValueError(
                f"{type(self).__name__}: slopes must be num_heads={num_heads} numbers >= 0, got "
                f"{decay}."
            )
        self.slopes = None if decay is None else tuple(decay)
        self.norm, self.gate, self.chunk_size = norm, gate, chunk_size
        shape = (4 if gate else 3, num_heads, self.head_dim)
        self.qkvu = self.projection(shape, (None, "heads", "head_dim"), rngs=rngs)
        self.out = self.output_projection(rngs=rngs)
        self.lrpe = nnx.data(None)
        if lrpe:
            self.lrpe = LRPE(num_heads, self.head_dim, param_dtype=self.param_dtype)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> LinearCache:
        """An empty state.

        Args:
          batch: rows.
          max_length: unused; the state is as large for any length.
          dtype: of the state; None is float32, or float64 where the parameters are. 16 bits drift
            and are widened to float32.
        """
        del max_length
        dtype = state_dtype(self.param_dtype if dtype is None else dtype)
        return LinearCache.create(batch, *self._state_shape, dtype)

    @property
    def _state_shape(self) -> tuple[int, int, int]:
        width = self.head_dim * (1 if self.lrpe is None else 2)
        return self.num_heads, width, self.head_dim

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]: what was read, normalized and gated."""
        parts = self.qkvu(call.x)  # [b, t, 4, h, d]
        q, k = jax.nn.silu(parts[:, :, 0]), jax.nn.silu(parts[:, :, 1])
        q, k, v = self.heads(call, q, k, parts[:, :, 2])
        o = self._recur(call, *self._place(call, q, k), v)
        if self.norm:
            merged = o.astype(state_dtype(o.dtype)).reshape(*o.shape[:2], -1)
            o = simple_rms_norm(merged).reshape(o.shape).astype(o.dtype)
        return parts[:, :, 3] * o if self.gate else o

    def _place(self, call: Call, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """LRPE where it is on."""
        tap = call.tap
        q_at, k_at = tap.edits.query_positions, tap.edits.key_positions
        if self.lrpe is not None:
            q = self.lrpe(q, call.positions if q_at is None else q_at)
            k = self.lrpe(k, call.positions if k_at is None else k_at)
        elif q_at is not None or k_at is not None:
            raise ValueError("edits: positions can be replaced only where lrpe=True is set.")
        return tap("q_rot", q), tap("k_rot", k)

    def _recur(self, call: Call, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Output by head [b, t, h, d]; moves the call's cache on."""
        cache, valid, slopes = call.cache, call.valid, call.further["slopes"]
        if slopes is None and self.slopes is not None:
            slopes = jnp.asarray(self.slopes, state_dtype(q.dtype))
        if cache is not None and cache.state.shape[1:] != self._state_shape:
            raise ValueError(
                f"{type(self).__name__}: the cache holds a state of shape {cache.state.shape[1:]}, "
                f"needed is {self._state_shape}; make it with init_cache of the same module."
            )
        if cache is not None and q.shape[1] == 1:
            out, state = lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], cache.state, slopes)
            if valid is not None:
                state = jnp.where(valid[:, :, None, None], state, cache.state)
            call.cache = LinearCache(state, cache.length + call.count)
            return out[:, None]
        result: Any = lightning_attention(
            q, k, v, slopes, segment_ids=call.segment_ids, valid=valid, chunk_size=self.chunk_size,
            initial_state=None if cache is None else cache.state, return_state=cache is not None,
        )  # fmt: skip
        if cache is None:
            return result
        out, state = result
        call.cache = LinearCache(state.astype(cache.state.dtype), cache.length + call.count)
        return out


def _example() -> tuple[LightningAttention, jax.Array]:
    module = LightningAttention(4, 16, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="lightning_attention",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    arxiv="2405.17381",
    year=2024,
    code="OpenNLPLab/lightning-attention",
    function=lightning_attention,
    module=LightningAttention,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    golden=("lightning",),
    kernel="linear",
    cost="O(T (C (K + V) + K V)), chunk C",
    reduces_to={"slopes=None": "linear_attention"},
    example=_example,
)
