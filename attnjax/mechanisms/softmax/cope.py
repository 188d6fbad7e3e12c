"""CoPE: positions that count what the head decides to count.

    g_ij = sigmoid(q_i · k_j / sqrt(d))                    0 for masked keys
    p_ij = min(Σ_{j <= l <= i} g_il, P - 1)                fractional position of key j
    s_ij = (q_i · k_j + z_i[p_ij]) / sqrt(d),   z_i = q_i E,   E [d, P] learned

z_i[p] between two positions is interpolated linearly. A head whose gates open at the ends of
sentences counts sentences; with all gates open it counts tokens. E starts at 0.

The paper's main text writes the gate without 1/sqrt(d) (`scale_gates=False`), its appendix and the
official code divide, which is the default here. The code divides the position logit as well; the
appendix does not (`divide_positions=False`).

Reference: Golovneva et al., "Contextual Position Encoding: Learning to Count What's Important",
2024, arXiv:2405.18719; official code facebookresearch/RAM, folder projects/cope.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from attnjax.checks import check_qkv
from attnjax.dense import qk_scores, softmax_weights, weighted_values
from attnjax.masks import Causal
from attnjax.merge import merge_attention
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels import tilemath

Gate = Literal["key", "separate", "value"]


def cope_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    table: Float[Array, "d n"],
    *,
    gate_key: Float[Array, "b s g d"] | None = None,
    mask: Bool[Array, "#b #h t s"] | None = None,
    bias: Float[Array, "#b #h t s"] | None = None,
    gate_scale: float | None = None,
    divide_positions: bool = True,
    chunk: int | None = None,
) -> Float[Array, "b t h e"]:
    """Causal attention with contextual positions.

        g = sigmoid(q · k) ⊙ mask,   p_ij = min(Σ_{l >= j} g_il, n - 1),   s = q · k + (q E)[p]

    Args:
      query, key, value: shapes as annotated; h a multiple of g.
      table: E, one column per position, shared by all heads. Paper: n = 64 at 1024 tokens.
      gate_key: keys of the gates; None is `key`.
      mask: True = attend; it must be causal where positions are to count backwards. None is causal,
        with query i at key i. A row without keys gives 0.
      bias: added to the scores.
      gate_scale: factor of q · k inside the gate; None is d^-0.5.
      divide_positions: whether the position logit has the factor d^-0.5 too.
      chunk: keys that are scored at once, from the last to the first, so that memory is
        O(t chunk); None is all keys at once.

    Returns:
      Output in the dtype of `query`; gates, positions and softmax are kept in float32 or wider.

    Memory: O(t s) per head, or O(t chunk) beside `mask` and `bias`.

    Raises:
      ValueError: on shapes that do not fit together.

    Example: >>> cope_attention(q, k, v, jnp.zeros((q.shape[-1], 64))).shape
    """
    check_qkv("cope_attention", query, key, value)
    d, s = query.shape[-1], key.shape[1]
    if table.shape[0] != d:
        raise ValueError(
            f"cope_attention: table must have shape [head width, positions] = ({d}, n), got "
            f"{table.shape}."
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"cope_attention: chunk={chunk} must be at least 1 key, or None.")
    if mask is None:
        mask = Causal().dense(query.shape[1], s)
    gate_key = key if gate_key is None else gate_key
    logits = position_logits(query, table, divide_positions)
    if chunk is None:
        gates = cope_gates(query, gate_key, mask, gate_scale)
        scores = qk_scores(query, key) + interpolate(logits, count_from_right(gates))
        scores = scores if bias is None else scores + bias.astype(scores.dtype)
        return weighted_values(softmax_weights(scores, mask)[0], value).astype(query.dtype)
    count = -(-s // chunk)
    pad = count * chunk - s

    def blocks(x: jax.Array, axis: int) -> jax.Array:
        """[count, ..., chunk, ...]; what is padded is masked."""
        width = [(0, pad if i == axis else 0) for i in range(x.ndim)]
        shape = (*x.shape[:axis], count, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(jnp.pad(x, width).reshape(shape), axis, 0)

    mask = jnp.broadcast_to(mask, (*mask.shape[:3], s))
    parts = [blocks(x, 1) for x in (key, gate_key, value)] + [blocks(mask, 3)]
    if bias is not None:
        parts.append(blocks(bias, 3))

    @jax.checkpoint
    def step(carry: Any, block: Any) -> tuple[Any, None]:
        seen, out, lse = carry
        k, gate_k, v, keep, *more = block
        within = count_from_right(cope_gates(query, gate_k, keep, gate_scale))
        scores = qk_scores(query, k) + interpolate(logits, within + seen)
        for extra in more:
            scores = scores + extra.astype(scores.dtype)
        weights, part = softmax_weights(scores, keep)
        new = (weighted_values(weights, v), part.transpose(0, 2, 1))
        # the first key of the block has counted all of its gates
        return (seen + within[..., :1], *merge_attention([(out, lse), new])), None

    b, t, h, _ = query.shape
    empty = (
        jnp.zeros((b, h, t, 1), logits.dtype),
        jnp.zeros((b, t, h, value.shape[-1]), logits.dtype),
        jnp.full((b, t, h), -jnp.inf, logits.dtype),
    )
    (_, out, _), _ = jax.lax.scan(step, empty, tuple(parts), reverse=True)
    return out.astype(query.dtype)


def cope_gates(
    query: Float[Array, "b t h d"],
    gate_key: Float[Array, "b s g d"],
    mask: Bool[Array, "#b #h #t s"] | None,
    scale: float | None = None,
) -> Float[Array, "b h t s"]:
    """How much each key counts for each query: sigmoid(scale q · k), 0 where masked."""
    gates = jax.nn.sigmoid(qk_scores(query, gate_key, scale))
    return gates if mask is None else jnp.where(mask, gates, jnp.zeros_like(gates))


def count_from_right(gates: Float[Array, "b h t s"]) -> Float[Array, "b h t s"]:
    """p_ij = Σ_{l >= j} g_il: masked keys have gate 0, so this counts from the query back to j."""
    return jax.lax.cumsum(gates, axis=3, reverse=True)


def position_logits(
    query: Float[Array, "b t h d"], table: Float[Array, "d n"], divide: bool = True
) -> Float[Array, "b h t n"]:
    """Logits z_i = q_i E of the n integer positions, times d^-0.5 where `divide`."""
    dtype = tilemath.accumulator_dtype(query.dtype)
    logits = jnp.einsum("bthd,dn->bhtn", query.astype(dtype), table.astype(dtype))
    return logits * jnp.asarray(query.shape[-1] ** -0.5, dtype) if divide else logits


def interpolate(
    logits: Float[Array, "b h t n"], positions: Float[Array, "#b #h t s"]
) -> Float[Array, "b h t s"]:
    """Logits at fractional positions >= 0, linear between integers, constant from n - 1 on."""
    last = logits.shape[-1] - 1
    positions = jnp.minimum(positions, jnp.asarray(last, positions.dtype))
    low = jnp.floor(positions)
    share = positions - jax.lax.stop_gradient(low)
    shape = jnp.broadcast_shapes(positions.shape[:2], logits.shape[:2]) + positions.shape[2:]

    def at(index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(logits, jnp.broadcast_to(index, shape).astype(jnp.int32), axis=3)

    return at(jnp.ceil(positions)) * share + at(low) * (1 - share)


class CoPE(SequenceMixer):
    """Multi-head `cope_attention`.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      num_positions: P, largest count + 1. Paper: 64 for language models at 1024 tokens; the
        official code's own default is the block length + 1, which never clamps.
      gate: what opens the gates: "key", "separate" (a second projection of the keys, with a bias)
        or "value".
      scale_gates: whether the gate's logit has the factor d^-0.5.
      divide_positions: whether the position logit has it too. True as in the code, False as in the
        paper's appendix.
      num_relative: distances of an ordinary learned relative embedding that is added ("CoPE +
        relative"); further ones share the last. 0 is none.
      chunk: keys that are scored at once, see `cope_attention`; captures and edits of scores or
        weights, and dropout, take all keys at once. None is always all.
      table: E of another layer [head width, P], shared with it; None makes a new one.
      rngs: stream `params`.
      **options: of `SequenceMixer`.
    """

    sites = SCORE_SITES
    grouped = masked = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        num_positions: int = 64,
        gate: Gate = "key",
        scale_gates: bool = True,
        divide_positions: bool = True,
        num_relative: int = 0,
        chunk: int | None = None,
        table: nnx.Param[jax.Array] | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        if gate not in ("key", "separate", "value"):
            raise ValueError(f"CoPE: gate={gate!r} is unknown; use 'key', 'separate' or 'value'.")
        for label, size, least in (
            ("num_positions", num_positions, 1),
            ("num_relative", num_relative, 0),
            ("chunk", 1 if chunk is None else chunk, 1),
        ):
            if size < least:
                raise ValueError(f"CoPE: {label}={size} must be at least {least}.")
        shape = (self.head_dim, num_positions)
        if table is not None and table.shape != shape:
            raise ValueError(
                f"CoPE: table must have shape [head width, num_positions] = {shape}, got "
                f"{table.shape}; layers that share it need equal sizes."
            )
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.gate_key = nnx.data(None)
        if gate == "separate":
            self.gate_key = self.projection(shared, use_bias=True, rngs=rngs)
        axes = ("head_dim", None)
        self.table = self.parameter(jnp.zeros(shape), axes) if table is None else table
        self.relative = nnx.data(None)
        if num_relative:
            self.relative = self.parameter(jnp.zeros((self.head_dim, num_relative)), axes)
        self.out = self.output_projection(rngs=rngs)
        self.gate, self.divide_positions, self.chunk = gate, divide_positions, chunk
        self.gate_scale = None if scale_gates else 1.0

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys and values, and the keys of the gates where they are separate."""
        names = ("key", "value") + ("gate_key",) * (self.gate == "separate")
        return dict.fromkeys(names, (self.num_kv_heads, self.head_dim))

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        tokens = {"key": k, "value": v}
        if self.gate_key is not None:
            tokens["gate_key"] = self.gate_key(x).astype(k.dtype)
        stored = call.store(**tokens)
        k, v = stored["key"], stored["value"]
        gate_key = {"key": k, "value": v}.get(self.gate, stored.get("gate_key"))
        assert gate_key is not None
        keep = call.keep(k.shape[1])
        assert keep is not None  # it is causal
        keep = jnp.broadcast_to(keep, (*keep.shape[:2], q.shape[1], k.shape[1]))
        bias = self._relative_bias(call, q, k.shape[1])
        if self.chunk is not None and not call.wants_scores:
            return cope_attention(
                q, k, v, self.table[...], gate_key=gate_key, mask=keep, bias=bias,
                gate_scale=self.gate_scale, divide_positions=self.divide_positions,
                chunk=self.chunk,
            )  # fmt: skip
        positions = count_from_right(cope_gates(q, gate_key, keep, self.gate_scale))
        logits = position_logits(q, self.table[...], self.divide_positions)
        scores = qk_scores(q, k) + interpolate(logits, positions)
        scores = self.edit_scores(call, scores if bias is None else scores + bias)
        weights = self.edit_weights(call, softmax_weights(scores, keep)[0])
        return weighted_values(weights, v).astype(q.dtype)

    def _relative_bias(self, call: Call, q: jax.Array, s: int) -> jax.Array | None:
        """The score q · E_rel[i - j] / sqrt(d) of an ordinary relative embedding, or None."""
        if self.relative is None:
            return None
        logits = position_logits(q, self.relative[...])
        start = jnp.asarray(call.start, jnp.int32).reshape(-1, 1, 1, 1)
        query = start + jnp.arange(q.shape[1], dtype=jnp.int32)[None, None, :, None]
        distance = query - jnp.arange(s, dtype=jnp.int32)[None, None, None]
        return interpolate(logits, jnp.maximum(distance, 0).astype(logits.dtype))


def _example() -> tuple[CoPE, jax.Array]:
    module = CoPE(2, 16, num_positions=6, gate="separate", rngs=nnx.Rngs(0))
    table = jax.random.normal(jax.random.key(2), module.table.shape)
    module.table[...] = table
    return module, jax.random.normal(jax.random.key(1), (2, 13, 16))


def _picture() -> dict[str, Any]:
    """Positions of a head that counts every fourth token, and the weights of a table on them."""
    t = 32
    query = jnp.ones((1, t, 1, 1))
    opens = (jnp.arange(t) % 4 == 0).astype(jnp.float32)
    keys = (opens * 20 - 10).reshape(1, t, 1, 1)
    mask = Causal().dense(t, t)
    positions = count_from_right(cope_gates(query, keys, mask, 1.0))
    logits = jnp.asarray([0.0, 4.0, 0.0, 2.0, 0.0]).reshape(1, 1, 1, 5)
    scores = interpolate(jnp.broadcast_to(logits, (1, 1, t, 5)), positions)
    weights = softmax_weights(scores, mask)[0]
    shown = jnp.where(mask, positions, jnp.zeros_like(positions))
    return {"position (groups of 4 tokens)": shown[0, 0], "weights": weights[0, 0]}


SPEC = Mechanism(
    id="cope",
    title="Contextual Position Encoding: Learning to Count What's Important",
    arxiv="2405.18719",
    year=2024,
    code="facebookresearch/RAM",
    function=cope_attention,
    module=CoPE,
    causal=True,
    bidirectional=False,
    cache="dense",
    segment_ids=True,
    kernel="einsum",
    cost="O(T^2 + T P)",
    reduces_to={"table = 0": "multi_head_attention"},
    golden=("cope",),
    picture=_picture,
    example=_example,
)
