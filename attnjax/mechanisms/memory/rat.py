"""RAT: a gated recurrence inside chunks, softmax attention over the states at the chunks' ends.

    k̃_t = g_t k̃_{t-1} + (1 - g_t) k_t,   x̃_t = g_t x̃_{t-1} + (1 - g_t) x_t     anew in every chunk
    o_t = softmax mix of the x̃ at the ends of earlier chunks and of the running x̃_t,
          by q_t · k̃, all rotated by the index of their chunk
    y_t = W_o (z_t ⊙ o_t),   g = sigmoid(W_g h + b_g),   z = sigmoid(W_z h)

One chunk for the whole sequence is a gated linear recurrence; chunks of one token are softmax
attention. The cache holds one key and one value per chunk: 1 / C of attention's. Heads share few
query and key groups: head a reads group a mod n. In the paper's models a pre-norm (RMSNorm) and a
residual stand around the layer, and layers of RAT alternate with sliding windows of 1024 tokens
besides the query itself: `mixers="rat, window(1025)"`.

Reference: Wei et al., "RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling",
2025, arXiv:2507.04416; official code CLAIRE-Labo/RAT.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnjax.attention import attention
from attnjax.cache import StateCache
from attnjax.cache.base import check_room, write_rows
from attnjax.cache.linear_state import state_dtype
from attnjax.documents import document_starts
from attnjax.masks import EarlierChunks
from attnjax.merge import merge_attention
from attnjax.mixer import HEAD_SITES, Call, SequenceMixer
from attnjax.positions import apply_rope, rope_frequencies
from attnjax.spec import Mechanism

paper_kernel_init = nnx.initializers.normal(0.02)


def rat_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h d"],
    gate: Float[Array, "b t h d"],
    *,
    chunk_size: int,
    rope_base: float | None = 1e4,
    segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t h d"]:
    """Causal attention over the states of a gated recurrence that starts anew in every chunk.

    Args:
      query, key, value: shapes as annotated.
      gate: g in (0, 1): what the state keeps of itself, by channel; the rest is the new token.
      chunk_size: C in tokens; any length is allowed, the last chunk may be cut short. C >= t is a
        plain recurrence. Paper: 16.
      rope_base: base of the rotation by chunk index; None for no rotation.
      segment_ids: packed documents, which do not see each other; the chunks of each start with it.

    Returns:
      o [b, t, h, d] in the dtype of `query`. States are float32 or wider.

    Cost: O(t d) for the recurrence (log C deep) and O(t (t / C) d) for the attention.

    Raises:
      ValueError: on shapes that differ, or chunk_size < 1.

    Example: >>> rat_attention(q, k, v, jax.nn.sigmoid(g), chunk_size=16).shape
    Reference: Wei et al., 2025, arXiv:2507.04416, eq. 3.
    """
    for name, x in (("key", key), ("value", value), ("gate", gate)):
        if x.shape != query.shape:
            raise ValueError(
                f"rat_attention: {name} must have the shape of query {query.shape}, got {x.shape}."
            )
    _check_chunk("rat_attention", chunk_size)
    b, t = query.shape[:2]
    chunk = min(chunk_size, t)
    if segment_ids is None:
        index = jnp.arange(t, dtype=jnp.int32)[None]
        k, v = _chunked_states(gate, key, value, chunk)
    else:
        index = jnp.arange(t, dtype=jnp.int32)[None] - document_starts(segment_ids)
        k, v = rat_states(gate, key, value, index % chunk == 0)
    k = _rotate(k, index // chunk, rope_base)
    q = _rotate(query, index // chunk, rope_base)
    if chunk == t:  # no chunk has ended before the last token
        return v.astype(query.dtype)
    if segment_ids is None:
        whole = slice(chunk - 1, None, chunk)
        parts = (k[:, whole], v[:, whole], EarlierChunks(chunk))
    else:
        parts = _document_ends(k, v, index % chunk == chunk - 1, segment_ids, t // chunk)
    return _mix(q, k, v, *parts)


def rat_states(
    gate: Float[Array, "b t h d"],
    key: Float[Array, "b t h d"],
    value: Float[Array, "b t h d"],
    restart: Any,
    initial: tuple[Float[Array, "b h d"], Float[Array, "b h d"]] | None = None,
) -> tuple[Float[Array, "b t h d"], Float[Array, "b t h d"]]:
    """Running states s_t = g_t s_{t-1} + (1 - g_t) x_t of keys and values.

    Args:
      gate, key, value: shapes as annotated.
      restart: [1 or b, t], True where s_{t-1} counts as 0.
      initial: the states before the first token; None is 0.

    Returns:
      States of keys and of values, float32 or wider.
    """
    dtype = state_dtype(key.dtype)
    g = gate.astype(dtype)[..., None, :]
    x = (1 - g) * jnp.stack([key.astype(dtype), value.astype(dtype)], axis=-2)
    g = jnp.where(restart[:, :, None, None, None], jnp.zeros_like(g), g)
    if initial is not None:
        before = jnp.stack([a.astype(dtype) for a in initial], axis=-2)
        x = x.at[:, 0].add(g[:, 0] * before)
    states = jax.lax.associative_scan(_join, (g, x), axis=1)[1]
    return states[..., 0, :], states[..., 1, :]


def _join(first: tuple[jax.Array, ...], second: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return first[0] * second[0], second[0] * first[1] + second[1]


def _chunked_states(
    gate: jax.Array, key: jax.Array, value: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """`rat_states` of chunks that start at multiples of `chunk`: a scan of that length."""
    b, t, h, d = key.shape
    pad = -t % chunk

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0)))
        return x.reshape(b * ((t + pad) // chunk), chunk, h, d)

    never = jnp.zeros((1, chunk), bool)
    states = rat_states(split(gate), split(key), split(value), never)
    k, v = (s.reshape(b, t + pad, h, d)[:, :t] for s in states)
    return k, v


def _mix(
    q: jax.Array, k: jax.Array, v: jax.Array, keys: jax.Array, values: jax.Array, mask: Any
) -> jax.Array:
    """Attention to stored states and to each token's own running state."""
    keys, values = keys.astype(q.dtype), values.astype(q.dtype)
    past = attention(q, keys, values, mask=mask, return_residual=True)
    own = (q.astype(k.dtype) * k).sum(-1) * jnp.asarray(q.shape[-1] ** -0.5, k.dtype)
    return merge_attention([past, (v, own)])[0].astype(q.dtype)


def _rotate(x: jax.Array, positions: jax.Array, base: float | None) -> jax.Array:
    if base is None:
        return x
    inv_freq, factor = rope_frequencies(x.shape[-1], base, None, None)
    return apply_rope(x, positions, inv_freq, attention_factor=factor)


def _document_ends(
    k: jax.Array, v: jax.Array, ends: jax.Array, ids: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """States at the ends of whole chunks [b, count, ...], and who sees them [b, 1, t, count]."""
    b, t = ids.shape
    slot = jnp.where(ends, jnp.cumsum(ends.astype(jnp.int32), axis=1) - 1, count)
    tokens = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    at = write_rows(jnp.full((b, count), t, jnp.int32), slot, tokens, None)  # t: an empty slot
    found = jnp.minimum(at, t - 1)
    same = ids[:, :, None] == jnp.take_along_axis(ids, found, axis=1)[:, None]
    seen = same & (at[:, None] < tokens[:, :, None])
    k, v = (jnp.take_along_axis(s, found[..., None, None], axis=1) for s in (k, v))
    return k, v, seen[:, None]


def _check_chunk(name: str, chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"{name}: chunk_size must be at least 1 token, got {chunk_size}.")


class RATAttention(SequenceMixer):
    """The layer around `rat_attention`: projections, gates, output.

    Positions given by the caller do not matter: chunks count the tokens of a document.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      chunk_size: C in tokens. Paper: 16.
      groups: n, query and key groups that the heads share; divides num_heads. Paper: 2.
      rope_base: of the rotation by chunk index. Paper: 10000.
      kernel_init: of the projections. Paper: normal(0, 0.02).
      **options: of `SequenceMixer`; the gates' bias starts at ln of uniform(1, C - 1).

    Raises:
      ValueError: when chunk_size < 1 or groups do not divide the heads.
      NotImplementedError: for dropout.
    """

    sites = HEAD_SITES
    directions = ("causal",)
    rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        chunk_size: int = 16,
        groups: int = 2,
        rope_base: float | None = 1e4,
        kernel_init: Callable[..., Any] = paper_kernel_init,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, rope_base=rope_base,
            kernel_init=kernel_init, rngs=rngs, **options,
        )  # fmt: skip
        _check_chunk("RATAttention", chunk_size)
        if groups < 1 or num_heads % groups:
            raise ValueError(
                f"RATAttention: num_heads={num_heads} must be a multiple of groups={groups}."
            )
        if self.dropout_rate:
            raise NotImplementedError(
                "RATAttention: dropout_rate is not supported, the running state has no weight to "
                "drop; leave dropout_rate=0."
            )
        self.chunk_size, self.groups = chunk_size, groups
        sizes = (num_heads, self.head_dim)
        self.query, self.key = (
            self.projection((groups, self.head_dim), (None, "head_dim"), rngs=rngs)
            for _ in range(2)
        )
        self.value, self.forget, self.gate = (self.projection(sizes, rngs=rngs) for _ in range(3))
        top = max(chunk_size - 1, 1)
        spread = jax.random.uniform(rngs.params(), sizes, minval=1.0, maxval=float(top))
        start = jnp.log(spread) if top > 1 else jnp.zeros(sizes)
        self.gate_bias = self.parameter(start, ("heads", "head_dim"))
        self.out = self.output_projection(rngs=rngs)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> StateCache:
        """An empty cache: a key and a value per chunk, and the running states."""
        self._require_decoding()
        dtype = (self.dtype or self.param_dtype) if dtype is None else dtype
        one = (self.num_heads, self.head_dim)
        slots = (-(-max_length // self.chunk_size), *one)
        shapes = {"key": slots, "value": slots, "last_key": one, "last_value": one}
        running = state_dtype(dtype)
        kinds = {"key": dtype, "value": dtype, "last_key": running, "last_value": running}
        return StateCache.create(batch, shapes, kinds)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d], gated."""
        x, repeat = call.x, self.num_heads // self.groups
        q, k = (jnp.tile(a, (1, 1, repeat, 1)) for a in (self.query(x), self.key(x)))
        q, k, v = self.heads(call, q, k, self.value(x))
        wide = state_dtype(q.dtype)
        keep = jax.nn.sigmoid(
            self.forget(x).astype(wide) + self.gate_bias[...].astype(wide)[None, None]
        )
        if call.cache is None:
            o = rat_attention(
                q, k, v, keep, chunk_size=self.chunk_size, rope_base=self.rope_base,
                segment_ids=call.segment_ids,
            )  # fmt: skip
        else:
            o = self._decode(call, q, k, v, keep)
        return o * jax.nn.sigmoid(self.gate(x).astype(wide)).astype(o.dtype)

    def _decode(
        self, call: Call, q: jax.Array, k: jax.Array, v: jax.Array, keep: jax.Array
    ) -> jax.Array:
        """The new tokens behind the cache's; every chunk has a slot, the last one overwritten."""
        old, chunk, t = call.cache.state, self.chunk_size, q.shape[1]
        slots = old["key"].shape[1]
        check_room("RATAttention cache", call.start, call.count, slots * chunk)
        index = call.start[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
        place = index // chunk
        before = (old["last_key"], old["last_value"])
        k, v = rat_states(keep, k, v, index % chunk == 0, before)
        # state number `count` is the one after the last real token
        last = call.count[:, None, None, None]
        running = [
            jnp.take_along_axis(jnp.concatenate([a[:, None].astype(s.dtype), s], 1), last, 1)[:, 0]
            for a, s in zip(before, (k, v))
        ]
        rotated = _rotate(k, place, self.rope_base)
        i = jnp.arange(t, dtype=jnp.int32)[None]
        final = (i == call.count[:, None] - 1) | (index % chunk == chunk - 1)
        write = final & (i < call.count[:, None])
        keys = write_rows(old["key"], place, rotated, write)
        values = write_rows(old["value"], place, v, write)
        seen = jnp.arange(slots, dtype=jnp.int32)[None, None] < place[:, :, None]
        call.cache = call.cache.next(
            call.count, key=keys, value=values, last_key=running[0], last_value=running[1]
        )
        q = _rotate(q, place, self.rope_base)
        return _mix(q, rotated, v, keys, values, seen[:, None])


def _example() -> tuple[RATAttention, jax.Array]:
    init = nnx.initializers.lecun_normal()
    module = RATAttention(4, 16, chunk_size=3, kernel_init=init, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 11, 16))


def _picture() -> dict[str, jax.Array]:
    """Which chunk states (columns) each token (rows) attends to, beside its own running state."""
    return {"earlier chunks of 4": EarlierChunks(4).dense(24, 6)[0, 0]}


SPEC = Mechanism(
    id="rat",
    title="RAT: Bridging RNN Efficiency and Attention Accuracy in Language Modeling",
    arxiv="2507.04416",
    year=2025,
    code="CLAIRE-Labo/RAT",
    function=rat_attention,
    module=RATAttention,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    kernel="flash",
    cost="O(T + T^2 / C), chunk C",
    reduces_to={"chunk_size=1, gates 0": "multi_head_attention"},
    picture=_picture,
    golden=("rat",),
    example=_example,
)
