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

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.cache.linear_state import LinearCache, state_dtype
from attnjax.checks import check_segments
from attnjax.layers import (
    Projection,
    add_bias,
    default_bias_init,
    default_kernel_init,
    simple_rms_norm,
)
from attnjax.mechanisms.linear.linear_attention import linear_attention, linear_attention_step
from attnjax.positions import LRPE, alibi_slopes
from attnjax.spec import Mechanism
from attnjax.taps import Edits, Tap


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


class LightningAttention(nnx.Module):
    """The mixer of TransNormerLLM around `lightning_attention`; always causal.

    Args:
      num_heads: h.
      in_features: width of the input.
      qkv_features: width of all heads together; None is `in_features`.
      out_features: width of the output; None is `in_features`.
      num_kv_heads: None or `num_heads`: every head has its own key and value.
      slopes: "alibi", "paper", the slopes themselves (h numbers >= 0), or None for no decay.
      layer, num_layers: place in the model, which "alibi" and "paper" slopes depend on.
      lrpe: learned cosine positions on queries and keys; doubles the key width of the state.
        Released
        models: first layer only.
      norm: SRMS over the merged heads before the gate.
      gate: multiply by u, a linear map of the input, before the output projection.
      chunk_size: tokens per chunk; None chooses by device.
      dtype: of the computation; None promotes inputs and parameters.
      param_dtype: of the parameters.
      precision: of the projections.
      kernel_init, bias_init: initializers of the projections.
      out_kernel_init: of the output projection; None is `kernel_init`.
      use_bias: whether projections have biases. Released models: no.
      rngs: stream `params`.

    Raises:
      ValueError: when sizes do not divide, or slopes are not h numbers >= 0.
      NotImplementedError: for num_kv_heads other than num_heads.
    """

    sites = ("q", "k", "v", "q_rot", "k_rot", "z", "head_out", "attn_out")

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        num_kv_heads: int | None = None,
        slopes: str | Sequence[float] | None = "alibi",
        layer: int = 0,
        num_layers: int = 1,
        lrpe: bool = False,
        norm: bool = True,
        gate: bool = True,
        chunk_size: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        out_kernel_init: Callable[..., Any] | None = None,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        name = type(self).__name__
        qkv_features = in_features if qkv_features is None else qkv_features
        out_features = in_features if out_features is None else out_features
        if qkv_features % num_heads:
            raise ValueError(
                f"{name}: qkv_features={qkv_features} must be a multiple of num_heads={num_heads}."
            )
        if num_kv_heads not in (None, num_heads):
            raise NotImplementedError(
                f"{name}: num_kv_heads={num_kv_heads} is not supported; every head has its own "
                f"key and value, num_kv_heads={num_heads}."
            )
        self.num_heads, self.head_dim = num_heads, qkv_features // num_heads
        self.in_features, self.out_features = in_features, out_features
        self.norm, self.gate, self.chunk_size = norm, gate, chunk_size
        self.dtype, self.param_dtype = dtype, param_dtype
        decay: Sequence[float] | None = (
            lightning_slopes(num_heads, layer, num_layers, slopes).tolist()
            if isinstance(slopes, str)
            else slopes
        )
        if decay is not None and (len(decay) != num_heads or any(s < 0 for s in decay)):
            raise ValueError(
                f"{name}: slopes must be num_heads={num_heads} numbers >= 0, got {decay}."
            )
        self.slopes = None if decay is None else tuple(decay)

        shared: dict[str, Any] = dict(
            use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, bias_init=bias_init,
            precision=precision, rngs=rngs,
        )  # fmt: skip
        parts = 4 if gate else 3
        self.qkvu = Projection(
            in_features,
            (parts, num_heads, self.head_dim),
            in_axes=("embed",),
            out_axes=(None, "heads", "head_dim"),
            kernel_init=kernel_init,
            **shared,
        )
        self.out = Projection(
            (num_heads, self.head_dim),
            out_features,
            in_axes=("heads", "head_dim"),
            out_axes=("embed",),
            kernel_init=out_kernel_init or kernel_init,
            **shared,
        )
        self.lrpe = nnx.data(None)
        if lrpe:
            self.lrpe = LRPE(num_heads, self.head_dim, param_dtype=param_dtype)

    def __call__(
        self,
        x: Float[Array, "b t m"],
        *,
        mask: None = None,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: LinearCache | None = None,
        valid: Bool[Array, "b t"] | None = None,
        deterministic: bool | None = None,
        dropout_rng: Any = None,
        slopes: Float[Array, " h"] | None = None,
        edits: Edits | None = None,
        capture: Iterable[str] = (),
    ) -> Any:
        """Mixes the tokens of x, each with those before it.

        Args:
          x: [b, t, in_features].
          mask: must be None: which tokens are seen is decided by decay, segments and `valid`.
          positions: for LRPE; None counts on from the cache's length, or from 0.
          segment_ids: documents packed in a row; the state restarts between them.
          cache: from `init_cache`, or of an earlier call; its state goes to the first segment.
          valid: True for real tokens, which come first in each row. Padding leaves the cache alone;
            the output there is meaningless.
          deterministic, dropout_rng: unused, there is no dropout.
          slopes: [h], instead of the module's own: layers that share one compiled body differ in
            them.
          edits: interventions of this layer (`attnjax.taps.Edits`).
          capture: names of sites to return. q and k are taken after silu, z before the output
            projection.

        Returns:
          y [b, t, out_features]; `(y, cache)` with a cache; captured arrays as a dict last, with
          the
          heads axis before the width: q, k, v, z [b, t, h, d], head_out [b, t, h, m].
        """
        del deterministic, dropout_rng
        name = type(self).__name__
        self._check(x, mask, positions, segment_ids, valid)
        tap = Tap(edits, capture, sites=self.sites, name=name)
        if valid is not None:
            # padding may hold anything, NaN too: 0 there keeps state and gradients clean
            x = jnp.where(valid[..., None], x, jnp.zeros_like(x))
        own = None if self.slopes is None else jnp.asarray(self.slopes, state_dtype(x.dtype))
        slopes = own if slopes is None else slopes
        q, k, v, u = self._project(tap, x)
        q, k = self._positions(tap, q, k, positions, cache)
        o, cache = self._mix(q, k, v, slopes, segment_ids, cache, valid)
        z = o
        if self.norm:
            merged = o.astype(state_dtype(o.dtype)).reshape(*o.shape[:2], -1)
            z = simple_rms_norm(merged).reshape(o.shape).astype(o.dtype)
        y = self._output(tap, tap.heads(z if u is None else u * z))
        return tap.result(y) if cache is None else tap.result(y, cache)

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
        width = self.head_dim * (1 if self.lrpe is None else 2)
        return LinearCache.create(batch, self.num_heads, width, self.head_dim, dtype)

    def _project(self, tap: Tap, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        """Queries, keys, values and gate by head, with activation and edits."""
        parts = self.qkvu(x)  # [b, t, 4, h, d]
        q, k, v = jax.nn.silu(parts[:, :, 0]), jax.nn.silu(parts[:, :, 1]), parts[:, :, 2]
        if tap.edits.q_add is not None:
            q = add_bias(q, tap.edits.q_add)
        if tap.edits.k_add is not None:
            k = add_bias(k, tap.edits.k_add)
        u = parts[:, :, 3] if self.gate else None
        return tap("q", q), tap("k", k), tap("v", v), u

    def _positions(
        self, tap: Tap, q: jax.Array, k: jax.Array, positions: Any, cache: LinearCache | None
    ) -> tuple[jax.Array, jax.Array]:
        """LRPE where it is on."""
        q_at, k_at = tap.edits.query_positions, tap.edits.key_positions
        if self.lrpe is None:
            if q_at is not None or k_at is not None:
                raise ValueError("edits: positions can be replaced only where lrpe=True is set.")
            return tap("q_rot", q), tap("k_rot", k)
        if positions is None:
            start = jnp.zeros((q.shape[0],), jnp.int32) if cache is None else cache.length
            positions = start[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None]
        q = self.lrpe(q, positions if q_at is None else q_at)
        k = self.lrpe(k, positions if k_at is None else k_at)
        return tap("q_rot", q), tap("k_rot", k)

    def _mix(
        self, q: jax.Array, k: jax.Array, v: jax.Array, slopes: Any, segment_ids: Any,
        cache: LinearCache | None, valid: Any,
    ) -> tuple[jax.Array, LinearCache | None]:  # fmt: skip
        """Output by head [b, t, h, d], and the cache after these tokens."""
        if cache is None:
            options: dict[str, Any] = dict(segment_ids=segment_ids, chunk_size=self.chunk_size)
            only: Any = lightning_attention(q, k, v, slopes, valid=valid, **options)
            return only, None
        if cache.state.shape != (q.shape[0], self.num_heads, q.shape[3], v.shape[3]):
            raise ValueError(
                f"{type(self).__name__}: cache holds a state of shape {cache.state.shape}, x needs "
                f"{(q.shape[0], self.num_heads, q.shape[3], v.shape[3])}; make it with "
                "init_cache of the same module and batch size."
            )
        count = jnp.full_like(cache.length, q.shape[1])
        if valid is not None:
            count = jnp.sum(valid, axis=1, dtype=cache.length.dtype)
        if q.shape[1] == 1:
            out, state = lightning_attention_step(q[:, 0], k[:, 0], v[:, 0], cache.state, slopes)
            if valid is not None:
                state = jnp.where(valid[:, :, None, None], state, cache.state)
            return out[:, None], LinearCache(state, cache.length + count)
        out, state = lightning_attention(
            q, k, v, slopes, initial_state=cache.state, return_state=True, segment_ids=segment_ids,
            valid=valid, chunk_size=self.chunk_size,
        )  # fmt: skip
        return out, LinearCache(state.astype(cache.state.dtype), cache.length + count)

    def _output(self, tap: Tap, z: jax.Array) -> jax.Array:
        """The output projection, with the sites "head_out" and "attn_out"."""
        y = self.out(z)
        edited = tap.edits_site("head_out")
        if edited or "head_out" in tap.capture:
            heads = jnp.einsum(
                "bthd,hdm->bthm", z.astype(y.dtype), self.out.kernel[...].astype(y.dtype)
            )
            new = tap("head_out", heads)
            if edited:
                y = y + (new - heads).sum(2)
        return tap("attn_out", y)

    def _check(self, x: jax.Array, mask: Any, positions: Any, segment_ids: Any, valid: Any) -> None:
        name = type(self).__name__
        if x.ndim != 3 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{name}: x must have shape [batch, length, {self.in_features}], got {x.shape}."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name}: x must be floating point, got {x.dtype}.")
        if mask is not None:
            raise NotImplementedError(
                f"{name}: mask is not supported, there are no scores to mask; use segment_ids "
                "for packed documents and valid for padding."
            )
        if positions is not None and positions.shape != x.shape[:2]:
            raise ValueError(
                f"{name}: positions must have shape [batch, length] = {x.shape[:2]}, "
                f"got {positions.shape}."
            )
        if segment_ids is not None:
            check_segments(name, segment_ids, x.shape[0], x.shape[1])
        if valid is not None:
            _check_valid(name, valid, x.shape[:2])


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
