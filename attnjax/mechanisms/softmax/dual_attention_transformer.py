"""Dual attention: some heads carry what tokens are, others how tokens relate.

    sensory heads      o_i = Σ_j α_ij W_v x_j
    relational heads   o_i = Σ_j α_ij (W_r r_ij + W_s s_j),   r_ij[l] = φ(q^l_i · k^l_j / sqrt(r))

α is softmax attention of each head. r_ij holds the relations of a pair: products of one further
query and key for each relation, shared by all relational heads, of width r = d h_ra / n, behind an
activation φ (the identity). s_j is a symbol: it says which token is meant without saying what is in
it. Symbols come from a small library by attention (symbolic attention), from positions, or from
distances. Each kind of heads has its own output projection; the two outputs are concatenated.

The sum over relations is taken first, Σ_j α_ij r_ij [t, h, n], so W_r r_ij is never stored by pair.

In the official blocks symbols are retrieved from the block's input before its norm, and one
retriever serves all layers. A module alone sees only its own input and retrieves from it; a call
takes symbols from elsewhere, and the module's retriever may be another layer's.

Reference: Altabaa and Lafferty, "Disentangling and Integrating Relational and Sensory Information
in Transformer Architectures", 2024, arXiv:2405.16727; official code Awni00/dual-attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.checks import check_qkv
from attnjax.dense import qk_scores, softmax_weights, weighted_values
from attnjax.layers import Projection, default_bias_init, default_kernel_init
from attnjax.mixer import Call, SequenceMixer
from attnjax.spec import Mechanism

Form = Literal["relational", "rca", "disentangled_rca"]
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x, "relu": jax.nn.relu, "tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu, "silu": jax.nn.silu, "elu": jax.nn.elu, "softplus": jax.nn.softplus,
}  # fmt: skip
"""What may stand behind the relations, by name."""


def relational_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    relation_query: Float[Array, "b t n r"],
    relation_key: Float[Array, "b s n r"],
    symbols: Float[Array, "b s g e"],
    relation_kernel: Float[Array, "h e n"],
    *,
    mask: Bool[Array, "#b #h #t #s"] | None = None,
    activation: str = "identity",
) -> Float[Array, "b t h e"]:
    """Relational attention heads.

        o_i = Σ_j softmax_j(q_i · k_j / sqrt(d)) (W_r r_ij + s_j),   r_ij = φ(rq_i · rk_j / sqrt(r))

    Args:
      query, key: shapes as annotated; h a multiple of g.
      relation_query, relation_key: n of them, shared by all heads.
      symbols: s, values of the symbols by key/value head.
      relation_kernel: W_r, by head.
      mask: True = attend; None attends everywhere.
      activation: φ, one of `ACTIVATIONS`.

    Returns:
      Output in the dtype of `query`.

    Memory: O(t s (h + n)).

    Raises:
      ValueError: on shapes that do not fit together, or an unknown activation.

    Example: >>> relational_attention(q, k, rq, rk, symbols, jnp.zeros((h, d, n))).shape
    """
    check_qkv("relational_attention", query, key, symbols)
    weights = softmax_weights(qk_scores(query, key), mask)[0]
    pairs = relations(relation_query, relation_key, activation)
    out = attended_relations(weights, pairs, relation_kernel) + weighted_values(weights, symbols)
    return out.astype(query.dtype)


def relations(
    query: Float[Array, "b t n r"], key: Float[Array, "b s n r"], activation: str = "identity"
) -> Float[Array, "b n t s"]:
    """φ(q · k / sqrt(r)), the n relations of all pairs, in float32 or wider.

    Raises:
      ValueError: on an unknown activation.
    """
    return _activation(activation)(qk_scores(query, key))


def _activation(name: str) -> Callable[[jax.Array], jax.Array]:
    if name not in ACTIVATIONS:
        raise ValueError(
            f"dual attention: activation={name!r} is unknown; use one of {sorted(ACTIVATIONS)}."
        )
    return ACTIVATIONS[name]


def attended_relations(
    weights: Float[Array, "b h t s"],
    pairs: Float[Array, "b n t s"],
    kernel: Float[Array, "h e n"],
) -> Float[Array, "b t h e"]:
    """W_r Σ_j α_ij r_ij, in the dtype of the weights."""
    attended = jnp.einsum("bhts,bnts->bhtn", weights, pairs)
    return jnp.einsum("bhtn,hen->bthe", attended, kernel.astype(weights.dtype))


class SymbolicAttention(nnx.Module):
    """Symbols of tokens: attention of the tokens to a small learned library.

        s_j = concat over heads of softmax(q_j F^T / sqrt(d)) S,   q = x W + b

    Args:
      features: width of tokens and symbols.
      num_heads: of this attention; divides `features`.
      num_symbols: rows of features F and library S, both drawn from a normal distribution.
      library: S of another retriever, shared with it; None makes a new one.
      dtype, param_dtype: of the computation and of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: when sizes do not fit.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        num_symbols: int,
        *,
        library: nnx.Param[jax.Array] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_symbols < 1 or features % num_heads:
            raise ValueError(
                f"SymbolicAttention: num_symbols={num_symbols} must be at least 1 and num_heads="
                f"{num_heads} must divide the width {features}."
            )
        shape, axes = (num_symbols, features), (None, "embed")
        self.query = Projection(
            features, (num_heads, features // num_heads), in_axes=("embed",),
            out_axes=("heads", "head_dim"), dtype=dtype, param_dtype=param_dtype, rngs=rngs,
            kernel_init=default_kernel_init, bias_init=default_bias_init,
        )  # fmt: skip
        draw = jax.random.normal
        self.template = nnx.Param(draw(rngs.params(), shape, param_dtype), axes=axes)
        if library is None:
            library = nnx.Param(draw(rngs.params(), shape, param_dtype), axes=axes)
        self.library, self.num_heads = library, num_heads

    def __call__(self, x: Float[Array, "b t f"], positions: Any = None) -> Float[Array, "b t f"]:
        """A symbol for each token."""
        q = self.query(x)
        key, value = (
            table[...].astype(q.dtype).reshape(1, -1, self.num_heads, q.shape[-1])
            for table in (self.template, self.library)
        )
        shape = (x.shape[0], *key.shape[1:])
        scores = qk_scores(q, jnp.broadcast_to(key, shape))
        out = weighted_values(softmax_weights(scores)[0], jnp.broadcast_to(value, shape))
        return out.astype(q.dtype).reshape(x.shape)


class PositionalSymbols(nnx.Module):
    """Symbols by position: a learned table; positions beyond it share the last row.

    Args:
      features: width of a symbol.
      num_symbols: positions.
      param_dtype: of the table.
      rngs: stream `params`.
    """

    def __init__(
        self, features: int, num_symbols: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        if num_symbols < 1:
            raise ValueError(f"PositionalSymbols: num_symbols={num_symbols} must be at least 1.")
        table = jax.random.normal(rngs.params(), (num_symbols, features), param_dtype)
        self.table = nnx.Param(table, axes=(None, "embed"))

    def __call__(
        self, x: Float[Array, "b t f"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t f"]:
        """A symbol for each token."""
        table = self.table[...]
        return table[jnp.clip(positions, 0, len(table) - 1)].astype(x.dtype)


class RelativeSymbols(nnx.Module):
    """Symbols s_ij of pairs by distance: row clip(j - i, ±max) + max of a learned table.

    Args:
      features: width of a symbol.
      max_distance: in tokens; larger ones share the last row of their side.
      param_dtype: of the table [2 max + 1, features].
      rngs: stream `params`.
    """

    def __init__(
        self, features: int, max_distance: int, *, param_dtype: Any = jnp.float32, rngs: nnx.Rngs
    ):
        if max_distance < 1:
            raise ValueError(f"RelativeSymbols: max_distance={max_distance} must be at least 1.")
        shape = (2 * max_distance + 1, features)
        init = nnx.initializers.glorot_uniform()
        self.table = nnx.Param(init(rngs.params(), shape, param_dtype), axes=(None, "embed"))
        self.max_distance = max_distance

    def collect(
        self, weights: Float[Array, "b h t s"], query_index: Int[Array, "#b t"]
    ) -> Float[Array, "b h t n"]:
        """The weight that falls on each row of the table, without an array over pairs and rows.

        Args:
          weights: attention weights on keys 0, 1, ..., s - 1.
          query_index: index of each query among the keys.
        """
        m, s = self.max_distance, weights.shape[-1]
        near = jnp.arange(1 - m, m, dtype=jnp.int32)
        at = query_index[:, None, :, None] + near[None, None, None]
        inside = (at >= 0) & (at < s)
        at = jnp.broadcast_to(jnp.clip(at, 0, s - 1), (*weights.shape[:3], len(near)))
        middle = jnp.take_along_axis(weights, at, axis=3)
        middle = jnp.where(inside, middle, jnp.zeros_like(middle))
        distance = jnp.arange(s, dtype=jnp.int32)[None, None, None] - query_index[:, None, :, None]

        def beyond(far: jax.Array) -> jax.Array:
            return jnp.where(far, weights, jnp.zeros_like(weights)).sum(-1, keepdims=True)

        return jnp.concatenate([beyond(distance <= -m), middle, beyond(distance >= m)], axis=-1)


Retriever = SymbolicAttention | PositionalSymbols | RelativeSymbols


class DualAttention(SequenceMixer):
    """Sensory and relational heads side by side.

    The first heads are sensory. The output is `qkv_features` wide.

    A call takes `symbols` [b, t, in_features], such as those retrieved from a block's input before
    its norm; None retrieves them from x.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      relational_heads: h_ra, 0 to num_heads; None is half of them.
      num_relations: n; None is h_ra.
      relation_dim: r, width of a relation's queries and keys; None is d h_ra / n, which n then must
        divide. The authors' file with everything in one has d.
      relation_activation: φ, one of `ACTIVATIONS`. Paper: "identity".
      symmetric: whether r_ij = r_ji, queries and keys of the relations being the same.
      tie_scores: whether both kinds of heads share the queries and keys of α.
      form: "relational"; or the ablations "rca" (o_i = Σ_j α_ij s_j) and "disentangled_rca"
        (o_i = Σ_j α_ij r_ij[h] s_j, one relation for each head).
      symbols: "symbolic", "positional" or "relative"; or a retriever, perhaps of another layer.
      num_symbols: rows of the library, positions of the table, or the largest distance.
      relational_kv_heads, sensory_kv_heads: of either part; None keeps the ratio of num_kv_heads to
        num_heads.
      rngs: stream `params`.
      **options: of `SequenceMixer`. Rotary positions turn the queries and keys of α alone.

    Raises:
      ValueError: when sizes do not fit together.
    """

    sites = ("q", "k", "v", "scores", "weights", "z", "attn_out")
    directions = ("causal", "bidirectional")
    further = ("symbols",)
    grouped = masked = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        relational_heads: int | None = None,
        num_relations: int | None = None,
        relation_dim: int | None = None,
        relation_activation: str = "identity",
        symmetric: bool = False,
        tie_scores: bool = False,
        form: Form = "relational",
        symbols: str | Retriever = "symbolic",
        num_symbols: int = 64,
        relational_kv_heads: int | None = None,
        sensory_kv_heads: int | None = None,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        h_ra = num_heads - num_heads // 2 if relational_heads is None else relational_heads
        if not 0 <= h_ra <= num_heads:
            raise ValueError(
                f"DualAttention: relational_heads={h_ra} must be between 0 and {num_heads}."
            )
        h_sa, d = num_heads - h_ra, self.head_dim
        if out_features not in (None, num_heads * d) or self.out_features != num_heads * d:
            raise ValueError(
                f"DualAttention: the output is num_heads * head width = {num_heads * d} wide, got "
                f"out_features={self.out_features}; its two parts are concatenated, not mixed."
            )
        if form not in ("relational", "rca", "disentangled_rca"):
            raise ValueError(
                f"DualAttention: form={form!r} is unknown; use 'relational', 'rca' or "
                "'disentangled_rca'."
            )
        n = h_ra if num_relations is None else num_relations
        if h_ra and (n < 1 or (relation_dim is None and d * h_ra % n)):
            raise ValueError(
                f"DualAttention: num_relations={n} must divide head width * relational_heads = "
                f"{d * h_ra}, or be given with relation_dim."
            )
        if relation_dim is not None and relation_dim < 1:
            raise ValueError(f"DualAttention: relation_dim={relation_dim} must be at least 1.")
        if form == "disentangled_rca" and n != h_ra:
            raise ValueError(
                f"DualAttention: form='disentangled_rca' has one relation for each of the {h_ra} "
                f"relational heads, got num_relations={n}."
            )
        _activation(relation_activation)  # raises where it is unknown
        self.sizes = (h_sa, h_ra)
        self.relation_sizes = (n, d * h_ra // max(n, 1) if relation_dim is None else relation_dim)
        self.kv_sizes = (
            self._kv_heads("sensory", sensory_kv_heads, h_sa),
            self._kv_heads("relational", relational_kv_heads, h_ra),
        )
        if tie_scores and (h_sa != h_ra or self.kv_sizes[0] != self.kv_sizes[1]):
            raise ValueError(
                f"DualAttention: tie_scores needs as many sensory as relational heads, got "
                f"{self.sizes} with {self.kv_sizes} key/value heads."
            )
        self.form, self.relation_activation, self.tie_scores = form, relation_activation, tie_scores
        self.query = self.projection((h_sa if tie_scores else num_heads, d), rngs=rngs)
        keys = self.kv_sizes[:1] if tie_scores else self.kv_sizes
        self.key = self.projection((sum(keys), d), rngs=rngs)
        for name in ("value", "out", "symbol_value", "relational_out", "retriever"):
            setattr(self, name, nnx.data(None))
        for name in ("relation_query", "relation_key", "relation_kernel"):
            setattr(self, name, nnx.data(None))
        if h_sa:
            self.value = self.projection((self.kv_sizes[0], d), rngs=rngs)
            self.out = self._output(h_sa, rngs)
        if h_ra:
            self.symbol_value = self.projection((self.kv_sizes[1], d), rngs=rngs)
            if form != "rca":
                pair: dict[str, Any] = dict(axes=(None, "head_dim"), use_bias=False, rngs=rngs)
                self.relation_query = self.projection(self.relation_sizes, **pair)
                if not symmetric:
                    self.relation_key = self.projection(self.relation_sizes, **pair)
            if form == "relational":
                bound = (d * n) ** -0.5  # Kaiming's uniform with slope sqrt(5)
                shape = (h_ra, d, n)
                kernel = jax.random.uniform(rngs.params(), shape, self.param_dtype, -bound, bound)
                self.relation_kernel = self.parameter(kernel, ("heads", "head_dim", None))
            self.relational_out = self._output(h_ra, rngs)
            self.retriever = self._make(symbols, num_symbols, rngs)

    def token_shapes(self) -> dict[str, tuple[int, ...]]:
        """Keys of both kinds of heads, values and symbols, and keys of the relations."""
        (g_sa, g_ra), d = self.kv_sizes, self.head_dim
        values = g_sa if isinstance(self.retriever, RelativeSymbols) else g_sa + g_ra
        shapes: dict[str, tuple[int, ...]] = {"key": (g_sa + g_ra, d), "value": (values, d)}
        if self.relation_query is not None:
            shapes["relation_key"] = self.relation_sizes
        return shapes

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d], sensory heads first."""
        x, (h_sa, h_ra), (g_sa, _) = call.x, self.sizes, self.kv_sizes
        q, k = self.query(x), self.key(x)
        if self.tie_scores:
            q, k = (jnp.concatenate([a, a], axis=2) for a in (q, k))
        values = [self.value(x)] if h_sa else []
        symbols = self._symbols(call)
        if symbols is not None:
            values.append(self.symbol_value(symbols))
        v = jnp.concatenate([*values, k[:, :, :0]], axis=2)  # relative symbols have none by token
        q, k, v = self.heads(call, q, k, v)
        q, k = self.rotate(call, q, k)
        tokens, rq = {"key": k, "value": v}, None
        if self.relation_query is not None:
            rq = self.relation_query(x)
            tokens["relation_key"] = rq if self.relation_key is None else self.relation_key(x)
        stored = call.store(**tokens)
        k, v = stored["key"], stored["value"]
        parts = ((q[:, :, :h_sa], k[:, :, :g_sa]), (q[:, :, h_sa:], k[:, :, g_sa:]))
        scores = [qk_scores(*part) for part in parts if part[0].shape[2]]
        scores = self.edit_scores(call, jnp.concatenate(scores, axis=1))
        weights = softmax_weights(scores, call.keep(k.shape[1]))[0]
        weights = self.edit_weights(call, weights)
        outputs = [weighted_values(weights[:, :h_sa], v[:, :, :g_sa])] if h_sa else []
        if h_ra:
            pairs = None if rq is None else (rq, stored["relation_key"])
            outputs.append(self._relate(call, weights[:, h_sa:], v[:, :, g_sa:], pairs))
        return jnp.concatenate(outputs, axis=2).astype(q.dtype)

    def finish(self, call: Call, z: jax.Array) -> jax.Array:
        """The outputs of both kinds of heads, one behind the other."""
        z = call.tap.heads(z)
        h_sa = self.sizes[0]
        parts = ((self.out, z[:, :, :h_sa]), (self.relational_out, z[:, :, h_sa:]))
        y = [out(part) for out, part in parts if out is not None]
        return call.tap("attn_out", jnp.concatenate(y, axis=-1))

    def _symbols(self, call: Call) -> jax.Array | None:
        """Symbols [b, t, in_features] by token, given or retrieved; None where there are none."""
        given = call.further["symbols"]
        if self.retriever is None or isinstance(self.retriever, RelativeSymbols):
            if given is not None:
                raise ValueError(
                    "DualAttention: this module has no symbols by token; make it with relational "
                    "heads and symbols='symbolic' or 'positional', or leave symbols=None."
                )
            return None
        if given is None:
            given = self.retriever(call.x, call.positions)
        if given.shape != call.x.shape:
            raise ValueError(
                f"DualAttention: symbols must have the shape of x, {call.x.shape}, got "
                f"{given.shape}."
            )
        if call.valid is None:
            return given
        return jnp.where(call.valid[..., None], given, jnp.zeros_like(given))

    def _relate(self, call: Call, weights: jax.Array, symbols: jax.Array, pairs: Any) -> jax.Array:
        """Outputs of the relational heads, from their weights [b, h_ra, t, s]."""
        r, on_symbols = None, weights
        if pairs is not None:
            r = relations(pairs[0], pairs[1], self.relation_activation)
            on_symbols = weights * r if self.form == "disentangled_rca" else weights
        if isinstance(self.retriever, RelativeSymbols):
            start = jnp.asarray(call.start, jnp.int32).reshape(-1, 1)
            index = start + jnp.arange(weights.shape[2], dtype=jnp.int32)[None]
            shares = self.retriever.collect(on_symbols, index)
            table = self.symbol_value(self.retriever.table[...].astype(call.x.dtype))
            table = jnp.broadcast_to(table[None], (weights.shape[0], *table.shape))
            out = weighted_values(shares, table)
        else:
            out = weighted_values(on_symbols, symbols)
        if self.relation_kernel is not None:
            assert r is not None
            out = out + attended_relations(weights, r, self.relation_kernel[...])
        return out

    def _kv_heads(self, name: str, given: int | None, heads: int) -> int:
        if heads == 0:
            return 0
        count = heads * self.num_kv_heads / self.num_heads if given is None else given
        if count < 1 or count % 1 or heads % count:
            raise ValueError(
                f"DualAttention: {heads} {name} heads cannot share {count:g} key/value heads; pass "
                f"{name}_kv_heads, one of {[g for g in range(1, heads + 1) if heads % g == 0]}."
            )
        return int(count)

    def _output(self, heads: int, rngs: nnx.Rngs) -> Projection:
        return Projection(
            (heads, self.head_dim), heads * self.head_dim, in_axes=("heads", "head_dim"),
            out_axes=("embed",), use_bias=self.use_bias, kernel_init=self.out_kernel_init,
            bias_init=self.bias_init, dtype=self.dtype, param_dtype=self.param_dtype,
            precision=self.precision, rngs=rngs,
        )  # fmt: skip

    def _make(self, symbols: str | Retriever, count: int, rngs: nnx.Rngs) -> Any:
        if not isinstance(symbols, str):
            return symbols
        options: dict[str, Any] = dict(param_dtype=self.param_dtype, rngs=rngs)
        if symbols == "symbolic":
            heads = self.num_heads if self.in_features % self.num_heads == 0 else 1
            return SymbolicAttention(self.in_features, heads, count, dtype=self.dtype, **options)
        if symbols == "positional":
            return PositionalSymbols(self.in_features, count, **options)
        if symbols == "relative":
            return RelativeSymbols(self.in_features, count, **options)
        raise ValueError(
            f"DualAttention: symbols={symbols!r} is unknown; use 'symbolic', 'positional', "
            "'relative' or a retriever."
        )


def _example() -> tuple[DualAttention, jax.Array]:
    module = DualAttention(
        4, 16, num_kv_heads=2, relational_heads=2, num_relations=4, num_symbols=5, rope_base=1e4,
        relation_activation="tanh", rngs=nnx.Rngs(0),
    )  # fmt: skip
    return module, jax.random.normal(jax.random.key(1), (2, 11, 16))


SPEC = Mechanism(
    id="dual_attention_transformer",
    title="Disentangling and Integrating Relational and Sensory Information in Transformer "
    "Architectures",
    arxiv="2405.16727",
    year=2024,
    code="Awni00/dual-attention",
    function=relational_attention,
    module=DualAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="einsum",
    cost="O(T^2 (h + n)) with n relations",
    reduces_to={"relational_heads = 0": "multi_head_attention"},
    golden=("dual_attention",),
    reading="As a mixer it retrieves symbols from its own (normalized) input where a call brings "
    "none; the official blocks do from the input before the norm.",
    example=_example,
)
