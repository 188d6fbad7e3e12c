"""Union of experts: each head attends among the tokens that chose it, and only among those.

    p_t = softmax(W_r x_t + b) over the heads;   token t is in the heads of its k largest p
    head h: its tokens in order, as a sequence of their own, with rotary positions 0, 1, ...
    y_t = Σ_{h of t} g_th W_o,h head_h(t)

A plain attention layer is cut into its heads, which together are the layer again: with k = h every
token is in every head. Each head sees about T k / h tokens, so attention costs (k / h)² of plain
attention. `UnionOfExpertsMLP` cuts the hidden units of an MLP in the same way.

The official code only selects by p (nothing is multiplied by it, so the router learns nothing from
the task): `gate_output=False`. Here outputs are multiplied by the gate, k p / Σ p over the chosen
heads, which is 1 on average. The official code also divides p by its sum over the batch before the
heads take their tokens and fills short heads with tokens that did not choose them; both make the
output depend on other rows and are left out. Its optional memory of an earlier segment, which the
heads read before their own tokens, is the cache here.

Reference: Yang et al., "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed
Transformer", 2025, arXiv:2503.02495; official code YujiaoYang-work/UoE (SMHA v3, UoME DS).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.attention import attention
from attnjax.cache import StateCache
from attnjax.cache.base import check_room
from attnjax.cache.linear_state import state_dtype
from attnjax.documents import document_starts
from attnjax.layers import Projection, default_kernel_init
from attnjax.masks import Causal
from attnjax.mixer import HEAD_SITES, Call, SequenceMixer
from attnjax.positions import apply_rope, rope_frequencies
from attnjax.spec import Mechanism


def selective_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h e"],
    chosen: Bool[Array, "b t h"],
    *,
    causal: bool = True,
    capacity: int | None = None,
    priority: Float[Array, "b t h"] | None = None,
    positions: str | Int[Array, "b t"] = "compact",
    rope_base: float | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    **options: Any,
) -> Float[Array, "b t h e"]:
    """Attention of every head among the tokens that chose it.

    Args:
      query, key, value: shapes as annotated.
      chosen: True where a token is in a head.
      causal: whether a token sees earlier ones only.
      capacity: tokens that a head takes per row (per document with `segment_ids`): the first
        ones when causal, else those of the largest priority; tokens that find a head full are
        skipped by it. None takes all.
      priority: who goes first when a bidirectional head is full, for example the gates.
      positions: "compact" rotates by the index within the head, 0, 1, ...; or [b, t] integers.
      rope_base: base of the rotation; None for no rotation.
      segment_ids: packed documents, which do not see each other; indices within a head start anew
        in each.
      options: of `attnjax.attention`.

    Returns:
      [b, t, h, e] in the dtype of `query`; 0 where a token is not in a head.

    Cost: O(Σ_h n_h² d) with n_h tokens in head h where tiles are skipped (block-sparse kernels).

    Raises:
      ValueError: on shapes that do not fit, capacity < 1, or a word for positions but "compact".
      NotImplementedError: for capacity with segment_ids where it is not causal.

    Example: >>> selective_attention(q, k, v, selective_gates(logits, 2)[1]).shape
    """
    b, t, h, _ = query.shape
    if chosen.shape != (b, t, h) or key.shape[:3] != (b, t, h) or value.shape[:3] != (b, t, h):
        raise ValueError(
            f"selective_attention: key, value and chosen must be [batch, length, heads, ...] = "
            f"{(b, t, h)}, got {key.shape}, {value.shape} and {chosen.shape}."
        )
    if isinstance(positions, str) and positions != "compact":
        raise ValueError(
            f"selective_attention: positions must be 'compact' or integers [batch, length], got "
            f"{positions!r}."
        )
    chosen, slot = _fill(chosen, capacity, causal, priority, segment_ids)
    full = t if capacity is None or segment_ids is not None else min(capacity, t)
    where = _within_document(slot, chosen, segment_ids) if isinstance(positions, str) else positions
    query, key = (_rotate(x, where, rope_base) for x in (query, key))
    index, count = _tokens_of_heads(chosen, slot, full)
    gathered = (_fold(jnp.take_along_axis(x, index[..., None], 1)) for x in (query, key, value))
    if segment_ids is not None:
        ids = jnp.take_along_axis(segment_ids[..., None], index.reshape(b, -1, 1), 1)
        options["segment_ids"] = _fold(ids.reshape(b, full, h, 1))[..., 0, 0]
    out = attention(*gathered, is_causal=causal, key_value_seq_lengths=count.reshape(-1), **options)
    return _spread(_unfold(out, h), chosen, slot)


def selective_gates(
    logits: Float[Array, "b t h"], top_k: int
) -> tuple[Float[Array, "b t h"], Bool[Array, "b t h"]]:
    """Gates k p / Σ p of the k largest p = softmax(logits); 0 for the other heads.

    Args:
      logits: of the router.
      top_k: k, heads per token; of equal ones the first.

    Returns:
      The gates, float32 or wider and 1 on average over the chosen heads; and the choice.

    Raises:
      ValueError: when k is no number of heads.
    """
    _check_router("selective_gates", top_k, logits.shape[-1], "heads", None)
    p = jax.nn.softmax(logits.astype(state_dtype(logits.dtype)))
    _, index = jax.lax.top_k(jax.lax.stop_gradient(p), top_k)
    chosen = jax.nn.one_hot(index, p.shape[-1], dtype=jnp.bool_).any(-2)
    gates = p * chosen.astype(p.dtype)
    return top_k * gates / gates.sum(-1, keepdims=True), chosen


def _fill(
    chosen: jax.Array, capacity: int | None, causal: bool, priority: Any, ids: Any
) -> tuple[jax.Array, jax.Array]:
    """Which tokens each head takes, and their place [b, t, h] in it; places count along a row."""
    if capacity is not None:
        if capacity < 1:
            raise ValueError(f"selective_attention: capacity must be at least 1, got {capacity}.")
        if causal:
            place = jnp.cumsum(chosen.astype(jnp.int32), 1) - 1
            chosen = chosen & (_within_document(place, chosen, ids) < capacity)
        elif ids is not None:
            raise NotImplementedError(
                "selective_attention: capacity with segment_ids is supported for causal=True "
                "only; leave capacity=None."
            )
        else:
            first = jnp.zeros(chosen.shape) if priority is None else priority
            rank = jnp.argsort(jnp.argsort(jnp.where(chosen, -first, jnp.inf), axis=1), axis=1)
            chosen = chosen & (rank < capacity)
    return chosen, jnp.cumsum(chosen.astype(jnp.int32), 1) - 1


def _within_document(slot: jax.Array, chosen: jax.Array, ids: Any) -> jax.Array:
    """The place of a token among those of its own document; [b, t, h] like `slot`."""
    if ids is None:
        return slot
    before = slot + 1 - chosen.astype(slot.dtype)
    return slot - jnp.take_along_axis(before, document_starts(ids)[..., None], axis=1)


def _tokens_of_heads(chosen: jax.Array, slot: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Tokens [b, size, h] of each head in order (0 where empty), and their number [b, h]."""
    b, t, h = chosen.shape
    rows, heads = jnp.arange(b)[:, None, None], jnp.arange(h)[None, None]
    tokens = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None, :, None], (b, t, h))
    index = jnp.zeros((b, size, h), jnp.int32)
    index = index.at[rows, jnp.where(chosen, slot, size), heads].set(tokens, mode="drop")
    return index, chosen.astype(jnp.int32).sum(1)


def _rotate(x: jax.Array, positions: jax.Array, base: float | None) -> jax.Array:
    """Rotation at positions [b, t] or, by head, [b, t, h]."""
    if base is None:
        return x
    inv_freq, factor = rope_frequencies(x.shape[-1], base, None, None)
    where = positions.transpose(0, 2, 1) if positions.ndim == 3 else positions
    return apply_rope(x, where, inv_freq, attention_factor=factor)


def _fold(x: jax.Array) -> jax.Array:
    """[b, n, h, d] -> [b h, n, 1, d]: each head is a row of its own."""
    b, n, h, d = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b * h, n, 1, d)


def _unfold(x: jax.Array, h: int) -> jax.Array:
    """[b h, n, 1, d] -> [b, n, h, d]."""
    return x.reshape(-1, h, x.shape[1], x.shape[3]).transpose(0, 2, 1, 3)


def _spread(x: jax.Array, chosen: jax.Array, slot: jax.Array) -> jax.Array:
    """[b, n, h, d] in the order of the heads -> [b, t, h, d] in that of the tokens."""
    place = jnp.clip(slot, 0, x.shape[1] - 1)[..., None]
    found = jnp.take_along_axis(x, place, axis=1)
    return jnp.where(chosen[..., None], found, jnp.zeros_like(found))


class SelectiveMultiHeadAttention(SequenceMixer):
    """Multi-head attention whose heads are experts of some tokens each (`selective_attention`).

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      top_k: k, heads per token; None is half of them. Paper: half.
      capacity: tokens that a head takes per row, see `selective_attention`; None takes all, as the
        official code does. With a capacity a cache holds that many tokens per head.
      positions: "compact", rotation by the index within a head (official), or "original".
      gate_output: multiply a head's output by its gate, so that the router learns; False is the
        official code.
      rope_base: of the rotation. Paper: 10000.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: when top_k is no number of heads, or capacity < 1.
    """

    sites = HEAD_SITES
    directions = ("causal", "bidirectional")
    rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        top_k: int | None = None,
        capacity: int | None = None,
        positions: str = "compact",
        gate_output: bool = True,
        rope_base: float | None = 1e4,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, rope_base=rope_base, rngs=rngs,
            **options,
        )  # fmt: skip
        top_k = max(1, num_heads // 2) if top_k is None else top_k
        _check_router("SelectiveMultiHeadAttention", top_k, num_heads, "num_heads", capacity)
        if positions not in ("compact", "original"):
            raise ValueError(
                "SelectiveMultiHeadAttention: positions must be 'compact' or 'original', got "
                f"{positions!r}."
            )
        self.top_k, self.capacity = top_k, capacity
        self.positions, self.gate_output = positions, gate_output
        self.query, self.key, self.value = (
            self.projection((num_heads, self.head_dim), rngs=rngs) for _ in range(3)
        )
        self.route = self.projection(num_heads, ("heads",), use_bias=True, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> StateCache:
        """An empty cache: keys and values of the tokens of each head, and their number.

        Memory: `capacity` tokens per head, or `max_length` where that is None.
        """
        self._require_decoding()
        dtype = (self.dtype or self.param_dtype) if dtype is None else dtype
        size = max_length if self.capacity is None else min(self.capacity, max_length)
        slots = (size, self.num_heads, self.head_dim)
        shapes = {"key": slots, "value": slots, "filled": (self.num_heads,)}
        return StateCache.create(batch, shapes, {"key": dtype, "value": dtype, "filled": jnp.int32})

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]; 0 where a token is not in a head."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        gates, chosen = selective_gates(self.route(x), self.top_k)
        if call.valid is not None:
            chosen = chosen & call.valid[..., None]
        options: dict[str, Any] = {}
        if call.dropout_key is not None:
            options |= dict(dropout_rate=self.dropout_rate, dropout_rng=call.dropout_key)
        if call.cache is None:
            z = selective_attention(
                q, k, v, chosen, causal=call.causal, capacity=self.capacity, priority=gates,
                positions="compact" if self.positions == "compact" else call.positions,
                rope_base=self.rope_base, segment_ids=call.segment_ids, **options,
            )  # fmt: skip
        else:
            z = self._decode(call, q, k, v, chosen, options)
        return z * gates[..., None].astype(z.dtype) if self.gate_output else z

    def _decode(
        self, call: Call, q: jax.Array, k: jax.Array, v: jax.Array, chosen: jax.Array,
        options: dict[str, Any],
    ) -> jax.Array:  # fmt: skip
        """New tokens enter the caches of their heads; each attends to its head's up to itself."""
        old = call.cache.state
        size = old["key"].shape[1]
        slot = old["filled"][:, None] + jnp.cumsum(chosen.astype(jnp.int32), 1) - 1
        if self.capacity is None:
            check_room("SelectiveMultiHeadAttention cache", call.start, call.count, size)
        else:
            chosen = chosen & (slot < self.capacity)
        where = slot if self.positions == "compact" else call.positions
        q, k = (_rotate(x, where, self.rope_base) for x in (q, k))
        b, t, h, _ = q.shape
        rows, heads = jnp.arange(b)[:, None, None], jnp.arange(h)[None, None]
        at = (rows, jnp.where(chosen, slot, size), heads)
        keys, values = (
            old[name].at[at].set(x.astype(old[name].dtype), mode="drop")
            for name, x in (("key", k), ("value", v))
        )
        filled = old["filled"] + chosen.astype(jnp.int32).sum(1)
        call.cache = call.cache.next(call.count, key=keys, value=values, filled=filled)
        # the new tokens of each head, closed up, stand behind those that it has
        place = slot - old["filled"][:, None]
        index, _ = _tokens_of_heads(chosen, place, t)
        q = jnp.take_along_axis(q, index[..., None], axis=1)
        out = attention(
            _fold(q), _fold(keys.astype(q.dtype)), _fold(values.astype(q.dtype)), mask=Causal(),
            q_offset=old["filled"].reshape(-1), **options,
        )  # fmt: skip
        return _spread(_unfold(out, h), chosen, place)


class UnionOfExpertsMLP(nnx.Module):
    """An MLP whose hidden units are cut into experts; each token uses k of them.

        y = Σ_{e of t} g_te act(x W_e) V_e

    With k = n and a router of zeros it is the whole MLP.

    Args:
      num_experts: n, divides hidden_features.
      in_features: width m of input and output.
      hidden_features: hidden units of all experts together.
      top_k: experts per token; None is half of them.
      capacity: tokens that an expert takes per row, the first that chose it; others skip it. None
        takes all, and computes every expert for every token.
      gate_output: multiply by the gates, so that the router learns; False is the official code.
      activation: of the hidden units.
      use_bias, dtype, param_dtype, kernel_init, rngs: as in `SequenceMixer`.

    Raises:
      ValueError: when sizes do not divide, or top_k is no number of experts.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        *,
        top_k: int | None = None,
        capacity: int | None = None,
        gate_output: bool = True,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        top_k = max(1, num_experts // 2) if top_k is None else top_k
        _check_router("UnionOfExpertsMLP", top_k, num_experts, "num_experts", capacity)
        if hidden_features % num_experts:
            raise ValueError(
                f"UnionOfExpertsMLP: hidden_features={hidden_features} must be a multiple of "
                f"num_experts={num_experts}."
            )
        self.top_k, self.capacity, self.gate_output = top_k, capacity, gate_output
        self.activation = activation
        units = (num_experts, hidden_features // num_experts)

        def linear(outs: Any, names: tuple[str | None, ...], bias: bool) -> Projection:
            return Projection(
                in_features, outs, in_axes=("embed",), out_axes=names, use_bias=bias, dtype=dtype,
                param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs,
            )  # fmt: skip

        self.route = linear(num_experts, (None,), True)
        self.up = linear(units, (None, "mlp"), use_bias)
        self.down = Projection(
            units, in_features, in_axes=(None, "mlp"), out_axes=("embed",), use_bias=use_bias,
            dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self, x: Float[Array, "b t m"], *, valid: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b t m"]:
        """The output of the chosen experts, summed.

        Args:
          x: [b, t, m].
          valid: True for real tokens; padding takes no place in an expert.
        """
        gates, chosen = selective_gates(self.route(x), self.top_k)
        chosen = chosen if valid is None else chosen & valid[..., None]
        factor = gates.astype(x.dtype) if self.gate_output else jnp.ones((), x.dtype)
        if self.capacity is None or self.capacity >= x.shape[1]:
            hidden = self.activation(self.up(x))
            weight = jnp.where(chosen, factor, 0)
            return self.down(hidden * weight[..., None].astype(hidden.dtype))
        chosen, slot = _fill(chosen, self.capacity, True, None, None)
        index, _ = _tokens_of_heads(chosen, slot, self.capacity)  # [b, n, experts]
        b, n, experts = index.shape
        tokens = jnp.take_along_axis(x, index.reshape(b, -1, 1), 1).reshape(b, n, experts, -1)
        kernel, down = (p.kernel[...].astype(x.dtype) for p in (self.up, self.down))
        hidden = jnp.einsum("bnem,mec->bnec", tokens, kernel)
        if self.up.bias is not None:
            hidden = hidden + self.up.bias[...].astype(hidden.dtype)[None, None]
        parts = jnp.einsum("bnec,ecm->bnem", self.activation(hidden), down)
        weight = jnp.where(chosen, factor, 0)[..., None]
        y = (_spread(parts, chosen, slot) * weight).sum(2)
        return y if self.down.bias is None else y + self.down.bias[...].astype(y.dtype)[None, None]


def _check_router(name: str, top_k: int, size: int, label: str, capacity: int | None) -> None:
    if not 1 <= top_k <= size:
        raise ValueError(f"{name}: top_k={top_k} must be at least 1 and at most {label}={size}.")
    if capacity is not None and capacity < 1:
        raise ValueError(f"{name}: capacity must be at least 1 token, got {capacity}.")


def _example() -> tuple[SelectiveMultiHeadAttention, jax.Array]:
    module = SelectiveMultiHeadAttention(4, 16, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 11, 16))


def _picture() -> dict[str, jax.Array]:
    """Which tokens see each other in each head, in the order of the sequence."""
    logits = jax.random.normal(jax.random.key(0), (1, 16, 4))
    chosen = selective_gates(logits, 2)[1][0]
    causal = jnp.tril(jnp.ones((16, 16), bool))
    return {f"head {i}": c[:, None] & c[None] & causal for i, c in enumerate(chosen.T)}


SPEC = Mechanism(
    id="union_of_experts",
    title=(
        "Union of Experts: Adapting Hierarchical Routing to Equivalently Decomposed Transformer"
    ),
    arxiv="2503.02495",
    year=2025,
    code="YujiaoYang-work/UoE",
    function=selective_attention,
    module=SelectiveMultiHeadAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2 (k / h)^2) per head with block-sparse kernels; projections O(T)",
    reduces_to={"top_k=num_heads, gate_output=False": "multi_head_attention"},
    picture=_picture,
    reading=(
        "gate_output=True (the official router gets no gradient), capacity for causal rows by "
        "order, and gates without the official division over the batch."
    ),
    example=_example,
)
