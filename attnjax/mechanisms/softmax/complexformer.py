"""ComplexFormer: channel pairs as complex numbers, whose angle each head adapts before attention.

    x_c = λ_c e^{iθ_c}  (channels 2c and 2c + 1)
    query angle δ_hc θ_c + m w_c + b_hc,   key angle δ_hc θ_c + n w_c
    s_mn = Σ_c λ^q_c λ^k_c cos(δ_hc (θ^q_c - θ^k_c) + b_hc + (m - n) w_c) / sqrt(d)

w_c = base^(-2c/d). δ (starts at 1) and b (starts at 0) are learned by head and plane: how much the
angle between meanings counts beside the angle between positions. The score factorizes into a
product of turned queries and turned keys, so everything that speeds up attention applies.

The angle is taken in (-π, π], so the map jumps at the negative real axis where δ is not an integer.

This is a reconstruction. The paper was withdrawn by its authors and its text could not be read; its
abstract gives the form exp[i(Adapt(angle of meanings) + Δ(positions))] by head, and EulerFormer,
on which it builds, gives the rest. EulerFormer itself has one δ and one b for a layer, with
frequencies over the whole model width: `euler_rotation`.

Reference: "ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific
Complex Vector Attention", 2025, arXiv:2505.10222; Tian et al., "EulerFormer", 2024,
arXiv:2403.17729, official code RUCAIBox/EulerFormer.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Num

from attnjax.attention import attention
from attnjax.checks import check_qkv
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.positions.angles import angles, inverse_powers, token_positions
from attnjax.positions.rope import rotate
from attnjax.spec import Mechanism


def complexformer_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s h d"],
    value: Float[Array, "b s h e"],
    delta: Float[Array, "h c"],
    bias: Float[Array, "h c"],
    *,
    positions: Num[Array, "..."] | None = None,
    key_positions: Num[Array, "..."] | None = None,
    rope_base: float | None = 10000.0,
    **options: Any,
) -> Any:
    """Attention with adapted angles.

        s_mn = Σ_c λ^q_c λ^k_c cos(δ_hc (θ^q_c - θ^k_c) + b_hc + (m - n) w_c) / sqrt(d)

    Args:
      query, key, value: shapes as annotated, d = 2c even; every head has its own key, because δ
        turns it.
      delta: δ, factor of the angles; 1 leaves them, 0 drops them (magnitudes and positions stay).
      bias: b in radians, added to the query's angles.
      positions, key_positions: [t] or [b, t], in tokens; None counts from 0.
      rope_base: of the frequencies; None is no positions.
      options: of `attnjax.attention`: is_causal, mask, segment_ids, ...

    Returns:
      What `attention` returns for the turned queries and keys.

    Raises:
      ValueError: on an odd width, or shapes that do not fit together.

    Example: >>> complexformer_attention(q, k, v, jnp.ones((2, 4)), jnp.zeros((2, 4))).shape
    """
    check_qkv("complexformer_attention", query, key, value)

    def counted(given: Any, x: jax.Array) -> jax.Array:
        return jnp.arange(x.shape[1], dtype=jnp.int32) if given is None else given

    at, key_at = counted(positions, query), counted(key_positions, key)
    query = adapt_angles(query, at, delta, bias, rope_base=rope_base)
    key = adapt_angles(key, key_at, delta, rope_base=rope_base)
    return attention(query, key, value, **options)


def adapt_angles(
    x: Float[Array, "b t h d"],
    positions: Num[Array, "..."],
    delta: Float[Array, "h c"],
    bias: Float[Array, "h c"] | None = None,
    *,
    rope_base: float | None = 10000.0,
) -> Float[Array, "b t h d"]:
    """X with the angle θ of every pair of channels replaced by δ θ + position w + b.

    Turning x by (δ - 1) θ + position w + b is the same, keeps magnitudes without a root, and is
    exactly RoPE at δ = 1, b = 0. Where a pair is 0 its angle is 0, without gradient.

    Args:
      x: queries or keys, d = 2c even; channels 2c and 2c + 1 form a pair.
      positions: [t] or [b, t], in tokens.
      delta: δ.
      bias: b in radians; None is 0.
      rope_base: w_c = base^(-2c/d); None is no positions.

    Returns:
      The shape and dtype of x; angles are float32 or wider.

    Raises:
      ValueError: on an odd width, or δ or b of another shape than [heads, width / 2].
    """
    h, d = x.shape[-2:]
    if d % 2:
        raise ValueError(f"complexformer: the head width must be even to form pairs, got {d}.")
    for name, array in (("delta", delta), ("bias", bias)):
        if array is not None and array.shape != (h, d // 2):
            raise ValueError(
                f"complexformer: {name} must have shape [heads, width / 2] = {(h, d // 2)}, got "
                f"{array.shape}; every head has its own keys, and angles."
            )
    if rope_base is None:
        token_positions("complexformer", positions, x)
        frequencies = jnp.zeros((d // 2,))
    else:
        frequencies = inverse_powers(rope_base, d)
    turn = angles("complexformer", positions, frequencies, x)
    wide = x.astype(turn.dtype)
    first, second = wide[..., 0::2], wide[..., 1::2]
    zero = (first == 0) & (second == 0)
    theta = jnp.arctan2(second, jnp.where(zero, jnp.ones_like(first), first))
    turn = turn + (delta.astype(turn.dtype) - 1)[None, None] * theta
    if bias is not None:
        turn = turn + bias.astype(turn.dtype)[None, None]
    return rotate(wide, jnp.cos(turn), jnp.sin(turn), "interleaved").astype(x.dtype)


def euler_rotation(
    x: Float[Array, "b t m"],
    delta: Float[Array, ""],
    bias: Float[Array, ""] | None = None,
    *,
    positions: Num[Array, "..."] | None = None,
    rope_base: float = 10000.0,
) -> Float[Array, "b t m"]:
    """EulerFormer's map of queries (with b) or keys (without), before they are split into heads.

    Args:
      x: all heads together; frequencies run over the whole width m.
      delta, bias: one number for the layer.
      positions: [t] or [b, t]; None counts from 0.
      rope_base: of the frequencies.
    """
    at = jnp.arange(x.shape[1], dtype=jnp.int32) if positions is None else positions
    shape = (1, x.shape[-1] // 2)
    shift = None if bias is None else jnp.broadcast_to(bias, shape)
    factor = jnp.broadcast_to(delta, shape)
    return adapt_angles(x[:, :, None], at, factor, shift, rope_base=rope_base)[:, :, 0]


class ComplexFormer(SequenceMixer):
    """Multi-head `complexformer_attention`, with δ and b learned by head and plane.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      delta_init: δ at the start. 1 starts as RoPE.
      rope_base: of the frequencies; None is no positions.
      rngs: stream `params`.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: on an odd head width.
    """

    sites = SCORE_SITES
    directions = ("causal", "bidirectional")
    masked = rotary = True
    rope_layout = "interleaved"

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        delta_init: float = 1.0,
        rope_base: float | None = 10000.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, rope_base=rope_base, rngs=rngs,
            **options,
        )  # fmt: skip
        if self.head_dim % 2:
            raise ValueError(
                f"ComplexFormer: qkv_features / num_heads = {self.head_dim} must be even, channels "
                "form pairs."
            )
        sizes, planes = (num_heads, self.head_dim), (num_heads, self.head_dim // 2)
        self.query, self.key, self.value = (self.projection(sizes, rngs=rngs) for _ in range(3))
        axes = ("heads", "head_dim")
        self.delta = self.parameter(jnp.full(planes, delta_init), axes)
        self.bias = self.parameter(jnp.zeros(planes), axes)
        self.out = self.output_projection(rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        delta, base = self.delta[...], self.rope_base
        q = adapt_angles(q, call.positions, delta, self.bias[...], rope_base=base)
        k = adapt_angles(k, call.positions, delta, rope_base=base)
        return self.attend(call, q, k, v)[0]


def _example() -> tuple[ComplexFormer, jax.Array]:
    module = ComplexFormer(2, 16, rngs=nnx.Rngs(0))
    for parameter, seed in ((module.delta, 2), (module.bias, 3)):
        noise = jax.random.normal(jax.random.key(seed), parameter.shape)
        parameter[...] = parameter[...] + 0.2 * noise
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


def _picture() -> dict[str, Any]:
    """Scores of one query plane with every angle and every distance, for three δ."""
    angle = jnp.linspace(-3.1, 3.1, 32)
    key = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)[None, :, None]
    query = jnp.asarray([1.0, 0.0]).reshape(1, 1, 1, 2)

    def scores(delta: float) -> jax.Array:
        factor = jnp.full((1, 1), delta)
        turned = adapt_angles(key, jnp.zeros((32,), jnp.int32), factor)
        rows = [
            adapt_angles(query, jnp.asarray([0.2 * m]), factor)[0, 0, 0] @ turned[0, :, 0].T
            for m in range(16)
        ]
        return jnp.stack(rows)

    return {f"score by distance and angle, δ = {delta}": scores(delta) for delta in (0.0, 0.5, 1.0)}


SPEC = Mechanism(
    id="complexformer",
    title="ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific "
    "Complex Vector Attention",
    arxiv="2505.10222",
    year=2025,
    function=complexformer_attention,
    module=ComplexFormer,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2)",
    reduces_to={"delta = 1, bias = 0": "multi_head_attention"},
    golden=("complexformer", "eulerformer_rotation"),
    reading="The paper was withdrawn and could not be read: a reconstruction from its abstract and "
    "from EulerFormer's code.",
    picture=_picture,
    example=_example,
)
