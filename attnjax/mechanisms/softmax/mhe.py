"""Multi-head attention from one shared head and head embeddings (MHE).

    MHE-Add   q_h = x W_q + e^q_h          MHE-Mul   q_h = (x W_q) ⊙ (e^q_h + 1)
    k_h and v_h alike;   o_h = softmax(q_h k_h^T / sqrt(d)) v_h,   y = [o_1, ..., o_n] W_O

W_q, W_k, W_v map to one head's width d, so n heads cost 3 n d parameters more than one head, where
multi-head attention costs 3 (n - 1) n d² more.

The cache holds one head's keys and values. Heads act on the query and on the output alone: in Mul
(e^k_h + 1) folds into the query and (e^v_h + 1) scales the output; in Add e^v_h is added to the
output, as weights sum to 1, and q · e^k_h is the same for every key of a row, so e^k cannot change
any output of MHE-Add (its gradient is 0).

Reference: Xue and Aletras, "Pit One Against Many: Leveraging Attention-head Embeddings for
Parameter-efficient Multi-head Attention", Findings of EMNLP 2023, arXiv:2310.07911; official
repository HUIYINXUE/simpleMHE (no code yet).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnjax.attention import attention
from attnjax.cache import DenseCache
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism

COMBINE = ("add", "mul")


def mhe(
    query: Float[Array, "b t d"],
    key: Float[Array, "b s d"],
    value: Float[Array, "b s d"],
    embeddings: Float[Array, "3 h d"],
    *,
    combine: str = "mul",
    **options: Any,
) -> Float[Array, "b t h d"]:
    """Attention of h heads that share one projection and differ by their embeddings.

    Args:
      query, key, value: the shared head, shapes as annotated.
      embeddings: e^q, e^k, e^v of every head.
      combine: "add" for x + e, "mul" for x ⊙ (e + 1).
      options: of `attnjax.attention` (mask, is_causal, segment_ids, ...), not those that return
        more than the output. Dropout needs `expand` and `attention`.

    Returns:
      Output by head in the dtype of `query`. A row without keys gives 0.

    Memory: as `attention` with one key/value head; heads are never spelled out.

    Raises:
      ValueError: on shapes that do not fit together, or another `combine`.

    Example: >>> mhe(q, k, v, embeddings, combine="add", is_causal=True).shape
    """
    _check(query, key, value, embeddings, combine)
    query, key, value = query[:, :, None], key[:, :, None], value[:, :, None]
    query = _queries(query, embeddings, combine)
    out, lse = attention(query, key, value, return_residual=True, **options)
    return _outputs(out, lse, embeddings, combine)


def expand(
    x: Float[Array, "b t d"], embedding: Float[Array, "h d"], combine: str = "mul"
) -> Float[Array, "b t h d"]:
    """The heads of a shared query, key or value: x + e_h, or x ⊙ (e_h + 1)."""
    e = embedding.astype(x.dtype)[None, None]
    return x[:, :, None] + e if combine == "add" else x[:, :, None] * (e + 1)


def _queries(query: jax.Array, embeddings: jax.Array, combine: str) -> jax.Array:
    """Queries of all heads [b, t, h, d] for shared keys."""
    query = expand(query[:, :, 0], embeddings[0], combine)
    if combine == "add":
        return query
    return query * (embeddings[1] + 1).astype(query.dtype)[None, None]


def _outputs(out: jax.Array, lse: jax.Array, embeddings: jax.Array, combine: str) -> jax.Array:
    """The value embeddings applied to outputs [b, t, h, d] over shared values."""
    e = embeddings[2].astype(out.dtype)[None, None]
    if combine == "mul":
        return out * (e + 1)
    # weights of a row sum to 1, or to 0 where it sees no key
    return jnp.where(jnp.isneginf(lse)[..., None], out, out + e)


def _check(
    query: jax.Array, key: jax.Array, value: jax.Array, embeddings: jax.Array, combine: str
) -> None:
    _check_combine("mhe", combine)
    shapes = [x.shape for x in (query, key, value)]
    flat = all(len(shape) == 3 for shape in shapes)
    if not flat or embeddings.shape[::2] != (3, query.shape[-1]):
        raise ValueError(
            "mhe: query, key and value must be [batch, length, d] and embeddings [3, heads, d], "
            f"got {shapes} and {embeddings.shape}."
        )


def _check_combine(name: str, combine: str) -> None:
    if combine not in COMBINE:
        raise ValueError(f"{name}: combine={combine!r} must be 'add' or 'mul'.")


class MHEAttention(SequenceMixer):
    """Multi-head attention with head embeddings, `mhe`, with projections.

    Captures of "q", "k" and "v" show the shared head, [b, t, 1, d]; `Edits.q_add` and `k_add` with
    shape [1, d] reach it before the embeddings. Scores of MHE-Add lack the constant q · e^k.

    Args:
      num_heads: n.
      in_features, out_features: as in `SequenceMixer`.
      qkv_features: n d, the width of all heads together; None is `in_features`.
      combine: "mul" (the better one of the paper) or "add".
      **options: of `SequenceMixer`. Heads' embeddings start from N(0, 0.02²).

    Raises:
      ValueError: for another `combine`.
    """

    sites = SCORE_SITES
    directions = ("causal", "bidirectional")
    masked = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        combine: str = "mul",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        _check_combine("MHEAttention", combine)
        self.combine, self.num_kv_heads = combine, 1
        one = (1, self.head_dim)
        axes = (None, "head_dim")
        self.query, self.key, self.value = (self.projection(one, axes, rngs=rngs) for _ in range(3))
        shape = (3, num_heads, self.head_dim)
        small = nnx.initializers.normal(0.02)(rngs.params(), shape, self.param_dtype)
        self.head_embeddings = self.parameter(small, (None, "heads", "head_dim"))
        self.out = self.output_projection(rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x, combine = call.x, self.combine
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        e = self.head_embeddings[...]
        q = _queries(q, e, combine)
        edits = call.tap.weight_edit() is not None or call.dropout_key is not None
        if not edits:
            z, lse = self.attend(call, q, k, v)
            return _outputs(z, lse, e, combine)
        # rows of edited weights may have any sum, so that e^v must be inside
        cache: Any = call.cache
        if cache is not None:
            assert isinstance(cache, DenseCache)
            cache = cache.append(k, v, call.valid)
            k, v = cache.key.astype(q.dtype), cache.value.astype(q.dtype)
            call.cache = None
        v = expand(v[:, :, 0], e[2], combine)
        k = jnp.broadcast_to(k, v.shape)
        z, _ = self.attend(call, q, k, v, q_offset=call.start)
        call.cache = cache
        return z


def _example() -> tuple[MHEAttention, jax.Array]:
    module = MHEAttention(4, 16, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="mhe",
    title="Pit One Against Many: Leveraging Attention-head Embeddings for Parameter-efficient "
    "Multi-head Attention",
    arxiv="2310.07911",
    year=2023,
    code="HUIYINXUE/simpleMHE",
    function=mhe,
    module=MHEAttention,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2)",
    reduces_to={"head embeddings 0": "multi_head_attention with one head, repeated"},
    golden=("mhe",),
    reading="The repository holds no code: the 1 in e + 1 of MHE-Mul, the initial N(0, 0.02^2) of "
    "the embeddings, and biases before the embeddings are recalled from the paper.",
    example=_example,
)
