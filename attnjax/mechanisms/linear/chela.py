"""CHELA: short and long convolutions prepare the queries and keys of linear attention.

    Z = LongConv(silu(ShortConv(X)))                     depthwise, every channel by itself
    Q = α_q ⊙ Z + μ_q,  K = α_k ⊙ Z + μ_k,  V = silu(X W_v)
    M = LinearAttention(φ(Q), φ(K), V),   O = (silu(Z W_g) ⊙ Norm(M)) W_o
    Y = O, added to the input by the block around it; or Y = ψ ⊙ O + (1 - ψ) ⊙ X, ψ = σ(Z W_ψ)

The long kernel is free under a window exp(-a_c t), a_c log-spaced over the channels. Parallel
branches of several lengths are one kernel: shorter ones are filled with zeros and added. The
convolution halves the sequence again and again, and each left half reaches its right half by one
FFT: no rounding error of a token ever reaches an earlier one or another document.

Reference: Liu et al., "Short-Long Convolutions Help Hardware-Efficient Linear Attention to Focus on
Long Sequences", 2024, arXiv:2406.08128, without official code. The convolutions, their order, and
the linear attention on their output are the paper's; the maps to Q and K, the gates and the
kernel's window are read after Mega (arXiv:2209.10655), whose moving average they replace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnjax.cache import StateCache
from attnjax.cache.linear_state import state_dtype
from attnjax.convolution import causal_conv
from attnjax.mechanisms.linear.linear_attention import linear_attention, runs
from attnjax.mechanisms.linear.linear_mixer import ACTIVATIONS, LinearMixer
from attnjax.mixer import Call
from attnjax.spec import Mechanism

DIRECT = 16
"""Taps within blocks of so many tokens are summed directly, longer reaches take the FFT."""


def long_convolution(
    x: Float[Array, "b t c"],
    kernel: Float[Array, "w _"],
    *,
    segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t c"]:
    """Causal convolution of every channel with a long kernel.

        y_t = Σ_{i < w} kernel_i ⊙ x_{t-i}

    Args:
      x: the sequence.
      kernel: taps [w, c], that of the current token first.
      segment_ids: taps do not reach back over a change of the id.

    Returns:
      y in the dtype of x; sums and FFTs are float32, or float64 for float64 inputs. Tokens after t
      change no bit of y_t.

    Cost: O(t log² min(t, w)) per channel. Memory: O(t).

    Raises:
      ValueError: when the channels differ or the kernel is empty.

    Example: >>> long_convolution(x, jnp.exp(-0.1 * jnp.arange(512.0))[:, None] * weights).shape
    """
    if kernel.ndim != 2 or kernel.shape[0] < 1 or kernel.shape[1] != x.shape[-1]:
        raise ValueError(
            f"long_convolution: kernel must be [taps, {x.shape[-1]}] for x {x.shape}, got "
            f"{kernel.shape}."
        )
    dtype = state_dtype(x.dtype)
    wide, taps = x.astype(dtype), kernel.astype(dtype)
    b, t, c = x.shape
    # a kernel of w taps reaches one block back where blocks hold w - 1 tokens
    block = max(DIRECT, _power_of_two(min(t, taps.shape[0] - 1)))
    wide = jnp.pad(wide, ((0, 0), (0, -t % block), (0, 0)))
    ids = jnp.zeros((b, t), jnp.int32) if segment_ids is None else runs(segment_ids)
    ids = jnp.pad(ids, ((0, 0), (0, -t % block)), mode="edge")

    def blocks(array: jax.Array, size: int) -> jax.Array:
        return array.reshape(b, -1, size, *array.shape[2:])

    near = blocks(wide, DIRECT).reshape(-1, DIRECT, c)
    y, _ = causal_conv(near, taps[:DIRECT][::-1], segment_ids=ids.reshape(-1, DIRECT))
    y = y.reshape(wide.shape)
    half = DIRECT
    while half < block:
        pair, pair_ids = blocks(wide, 2 * half), blocks(ids, 2 * half)
        right = _across(pair[:, :, :half], taps, pair_ids[:, :, :half], pair_ids[:, :, half:])
        y = y + jnp.pad(right, ((0, 0), (0, 0), (half, 0), (0, 0))).reshape(y.shape)
        half *= 2
    whole, whole_ids = blocks(wide, block), blocks(ids, block)
    if whole.shape[1] > 1:
        later = _across(whole[:, :-1], taps, whole_ids[:, :-1], whole_ids[:, 1:])
        y = y + jnp.pad(later, ((0, 0), (1, 0), (0, 0), (0, 0))).reshape(y.shape)
    return y[:, :t].astype(x.dtype)


def _across(left: jax.Array, taps: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
    """What blocks [b, n, m, c] give to the m tokens after them, in the document that goes on."""
    m = left.shape[2]
    last = before[:, :, -1:]
    left = jnp.where((before == last)[..., None], left, jnp.zeros_like(left))
    taps = taps[: 2 * m]
    spectrum = jnp.fft.rfft(left, 2 * m, axis=2) * jnp.fft.rfft(taps, 2 * m, axis=0)[None, None]
    right = jnp.fft.irfft(spectrum, 2 * m, axis=2)[:, :, m:]
    return jnp.where((after == last)[..., None], right, jnp.zeros_like(right))


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def merged_kernel(*kernels: Float[Array, "_ c"]) -> Float[Array, "w c"]:
    """The one kernel [taps, c] of parallel branches, whose outputs would be added.

    Args:
      *kernels: taps of each branch, that of the current token first; lengths may differ.
    """
    length = max(kernel.shape[0] for kernel in kernels)
    filled = [jnp.pad(k, ((0, length - k.shape[0]), (0, 0))) for k in kernels]
    return jnp.sum(jnp.stack(filled), axis=0)


@dataclasses.dataclass
class _Call(Call):
    """A call that also carries Z to the update gate."""

    long: Any = None


class ChelaAttention(LinearMixer):
    """The mixer of CHELA: short-long convolutions and gated linear attention.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      conv_size: taps of the short convolution, in tokens.
      kernel_length: taps of the long kernel, in tokens; the cache keeps as many. Paper: the length
        of the sequence.
      branches: taps of further parallel kernels, merged into the long one.
      qk: "affine" maps every channel of Z by itself, "linear" by a matrix.
      feature_map: "elu" (elu + 1, output divided by the sum of the weights) or "identity" (not
        divided).
      slopes: decay of the attention per token and head, h numbers >= 0; None is no decay.
      update_gate: return ψ ⊙ O + (1 - ψ) ⊙ x instead of O; then put no residual around.
      rngs: stream `params`.
      **options: of `LinearMixer` and `SequenceMixer`. causal=False convolves and attends in both
        directions, with kernels of their own.

    Raises:
      ValueError: on sizes that do not fit, or unknown options.
    """

    directions = ("causal", "bidirectional")

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        conv_size: int = 3,
        kernel_length: int = 512,
        branches: Sequence[int] = (),
        qk: str = "affine",
        feature_map: str = "elu",
        slopes: Sequence[float] | None = None,
        update_gate: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        width = num_heads * self.head_dim
        self._check_options(conv_size, (kernel_length, *branches), qk, feature_map, slopes)
        if qk == "affine" and (width != in_features or self.key_dim != self.head_dim):
            raise ValueError(
                f"ChelaAttention: qk='affine' keeps the channels, but qkv_features={width} with "
                f"keys of {self.key_dim} per head and in_features={in_features}; pass qk='linear'."
            )
        if update_gate and self.out_features != in_features:
            raise ValueError(
                f"ChelaAttention: update_gate=True mixes with the input, so out_features="
                f"{self.out_features} must be in_features={in_features}."
            )
        self.feature_map, self.qk = feature_map, qk
        self.slopes = None if slopes is None else tuple(slopes)
        sides = 1 if self.causal else 2
        self.conv_size = conv_size
        self.short = self.parameter(
            jax.random.uniform(
                rngs.params(), (sides, conv_size, in_features), jnp.float32,
                -(conv_size**-0.5), conv_size**-0.5,
            ),
            (None, None, "embed"),
        )  # fmt: skip
        self.lengths = (kernel_length, *branches)
        for i, length in enumerate(self.lengths):
            taps = jax.random.normal(rngs.params(), (sides, length, in_features)) * length**-0.5
            setattr(self, f"long_{i}", self.parameter(taps, (None, None, "embed")))
        self.query: Any = nnx.data(None)
        self.key: Any = nnx.data(None)
        self.factors, self.offsets = nnx.data(None), nnx.data(None)
        if qk == "linear":
            self.query = self.projection((num_heads, self.key_dim), rngs=rngs)
            self.key = self.projection((num_heads, self.key_dim), rngs=rngs)
        else:
            size, names = (2, num_heads, self.head_dim), (None, "heads", "head_dim")
            self.factors = self.parameter(0.02 * jax.random.normal(rngs.params(), size), names)
            self.offsets = self.parameter(jnp.zeros(size), names)
        self.value = self.projection((num_heads, self.value_dim), rngs=rngs)
        self.update = nnx.data(None)
        if update_gate:
            self.update = self.projection(in_features, ("embed",), in_axis=None, rngs=rngs)
        self.output_layers(gate=True, rngs=rngs)

    def begin(self, x: jax.Array, **options: Any) -> _Call:
        """Checks the arguments of a call; see `SequenceMixer.begin`."""
        return _Call(**vars(super().begin(x, **options)))

    def mix(self, call: _Call) -> jax.Array:
        """Z [b, t, h, e] of the output projection: the gated, normalized attention."""
        states: dict[str, jax.Array] = {}
        call.long = z = self._convolved(call, states)
        if self.qk == "linear":
            q, k = self.query(z), self.key(z)
        else:
            by_head = z.reshape(*z.shape[:2], self.num_heads, self.head_dim)
            q, k = (
                by_head * self.factors[i][None, None].astype(z.dtype)
                + self.offsets[i][None, None].astype(z.dtype)
                for i in range(2)
            )
        q, k, v = self.heads(call, q, k, jax.nn.silu(self.value(call.x)))
        act = ACTIVATIONS[self.feature_map]
        m = self._attended(call, states, act(q), act(k), v)
        return self.norm(m) * jax.nn.silu(self.gate(z)).astype(m.dtype)

    def finish(self, call: _Call, z: jax.Array) -> jax.Array:
        """The output projection, and the update gate where there is one."""
        y = super().finish(call, z)
        if self.update is None:
            return y
        share = jax.nn.sigmoid(self.update(call.long)).astype(y.dtype)
        return share * y + (1 - share) * call.x.astype(y.dtype)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one row's cache: the state, and what the convolutions reach back to."""
        more = 1 if self.feature_map == "elu" else 0
        return {
            "state": (self.num_heads, self.key_dim, self.value_dim + more),
            "short_conv": (self.conv_size - 1, self.in_features),
            "long_conv": (max(self.lengths) - 1, self.in_features),
        }

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> StateCache:
        """An empty state and the convolutions' empty past; O(kernel_length) in size.

        Args:
          batch: rows.
          max_length: unused.
          dtype: of the convolutions' tokens, see `LinearMixer.init_cache`.
        """
        return super().init_cache(batch, max_length, dtype)

    def _convolved(self, call: Call, states: dict[str, jax.Array]) -> jax.Array:
        """Z = LongConv(silu(ShortConv(x))), and in `states` what they reach back to."""
        x, ids = call.x, call.segment_ids
        short = self.short[...].astype(x.dtype)
        kernels = [self.long_kernel(i) for i in range(short.shape[0])]
        if call.cache is not None:
            old = call.cache.state
            y, states["short_conv"] = causal_conv(
                x, short[0], state=old["short_conv"], valid=call.valid
            )
            y = jax.nn.silu(y)
            if call.valid is not None:
                y = jnp.where(call.valid[..., None], y, jnp.zeros_like(y))
            past = jnp.concatenate([old["long_conv"].astype(y.dtype), y], axis=1)
            back = past.shape[1] - y.shape[1]
            where = call.count[:, None] + jnp.arange(back, dtype=jnp.int32)[None]
            states["long_conv"] = jnp.take_along_axis(past, where[..., None], axis=1)
            if y.shape[1] == 1:
                taps = kernels[0][::-1].astype(state_dtype(y.dtype))
                return jnp.einsum("bwc,wc->bc", past.astype(taps.dtype), taps)[:, None].astype(
                    y.dtype
                )
            return long_convolution(past, kernels[0])[:, back:]
        y = causal_conv(x, short[0], segment_ids=ids)[0]
        if call.causal:
            return long_convolution(jax.nn.silu(y), kernels[0], segment_ids=ids)
        flipped = None if ids is None else jnp.flip(ids, 1)
        back = causal_conv(jnp.flip(x, 1), short[1], segment_ids=flipped)[0]
        y = jax.nn.silu(y + jnp.flip(back, 1))
        if call.valid is not None:
            y = jnp.where(call.valid[..., None], y, jnp.zeros_like(y))
        late = long_convolution(jnp.flip(y, 1), kernels[1], segment_ids=flipped)
        return long_convolution(y, kernels[0], segment_ids=ids) + jnp.flip(late, 1)

    def long_kernel(self, side: int = 0) -> Float[Array, "w c"]:
        """The merged long kernel, with its window: that of earlier (0) or later (1) tokens."""
        kernels = []
        for i, length in enumerate(self.lengths):
            taps = getattr(self, f"long_{i}")[side]
            rate = np.geomspace(1 / length, 1.0, self.in_features)
            window = np.exp(-np.arange(length)[:, None] * rate[None])
            kernels.append(taps * jnp.asarray(window, taps.dtype))
        return merged_kernel(*kernels)

    def _attended(
        self, call: Call, states: dict[str, jax.Array], q: jax.Array, k: jax.Array, v: jax.Array
    ) -> jax.Array:
        """Linear attention, divided by the sum of its weights for positive features."""
        divided = self.feature_map == "elu"
        if divided:
            v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
        options: dict[str, Any] = dict(scale=1.0 if divided else None)
        if self.slopes is not None:
            options["decay"] = -jnp.asarray(self.slopes, state_dtype(q.dtype))
        if call.causal:
            o = self.recur(call, states, q, k, v, **options)
        else:
            o = self._both_ways(call, q, k, v, **options)
        if not divided:
            return o
        total = o[..., -1:]
        seen = total > 0
        return jnp.where(seen, o[..., :-1] / jnp.where(seen, total, 1), jnp.zeros_like(total))

    def _both_ways(
        self, call: Call, q: jax.Array, k: jax.Array, v: jax.Array, *, scale: Any, decay: Any = None
    ) -> jax.Array:
        """Tokens up to t, tokens from t on, and t itself once too often."""
        if call.valid is not None:
            k = jnp.where(call.valid[..., None, None], k, jnp.zeros_like(k))
        ids = call.segment_ids
        shared: dict[str, Any] = dict(scale=scale, decay=decay, chunk_size=self.chunk_size)
        early: Any = linear_attention(q, k, v, segment_ids=ids, **shared)
        back = [jnp.flip(x, 1) for x in (q, k, v)]
        late: Any = linear_attention(
            *back, segment_ids=None if ids is None else jnp.flip(ids, 1), **shared
        )
        own = jnp.einsum("bthd,bthd->bth", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        return early + jnp.flip(late, 1) - own[..., None] * v

    def _check_options(
        self, conv_size: int, lengths: tuple[int, ...], qk: str, feature_map: str, slopes: Any
    ) -> None:
        if conv_size < 1 or min(lengths) < 1:
            raise ValueError(
                f"ChelaAttention: conv_size={conv_size} and the long kernels' lengths {lengths} "
                "must be at least 1 token."
            )
        if qk not in ("affine", "linear") or feature_map not in ("elu", "identity"):
            raise ValueError(
                f"ChelaAttention: qk={qk!r} must be 'affine' or 'linear', and "
                f"feature_map={feature_map!r} 'elu' or 'identity'."
            )
        if slopes is not None and (len(slopes) != self.num_heads or min(slopes) < 0):
            raise ValueError(
                f"ChelaAttention: slopes must be num_heads={self.num_heads} numbers >= 0, got "
                f"{slopes}."
            )


def _example() -> tuple[ChelaAttention, jax.Array]:
    module = ChelaAttention(2, 12, kernel_length=24, branches=(3,), rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 17, 12))


SPEC = Mechanism(
    id="chela",
    title=(
        "Short-Long Convolutions Help Hardware-Efficient Linear Attention to Focus on Long "
        "Sequences"
    ),
    arxiv="2406.08128",
    year=2024,
    module=ChelaAttention,
    function=long_convolution,
    causal=True,
    bidirectional=True,
    cache="state",
    segment_ids=True,
    kernel="linear",
    cost="O(T log^2 W + T (C (K + V) + K V)), kernel of W taps, chunk C",
    reduces_to={"convolutions of one tap": "linear_attention"},
    reading=(
        "the maps from the convolutions to queries and keys, the gates, the feature map and the "
        "window of the long kernel; the paper's text gives the structure only"
    ),
    example=_example,
)
