"""MDHA: a short causal convolution behind every query, key and value projection.

    q ← conv(x W_q),  k ← conv(x W_k),  v ← conv(x W_v),   conv(y)_t = b + Σ_{i<w} a_i ⊙ y_{t-w+1+i}

Then ordinary attention. The convolution is depthwise, w = 3 tokens wide, and sees zeros before the
first token. Kernels belong to a channel and are shared by the heads ("per_dim": the authors' code
and labmlai's), to a head and a channel ("per_head"), or are one for all ("shared"). The authors'
code has no biases and starts at 0.5 for the current token and 0.5 / w for earlier ones; labmlai's
has biases and starts as a convolution does. Primer also squares the ReLU of the MLP, which is no
part of the attention.

Reference: So et al., "Primer: Searching for Efficient Transformers for Language Modeling", 2021,
arXiv:2109.08668; equal to labmlai/annotated_deep_learning_paper_implementations (primer_ez).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from attnjax.cache.base import cache_bytes
from attnjax.convolution import causal_conv
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism

Sharing = Literal["per_head", "per_dim", "shared"]
KernelInit = Literal["primer", "uniform", "identity"]
_NAMES = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class ConvolutionCache:
    """A cache of attention, and the last tokens of q, k and v before their convolutions.

    Attributes:
      inner: the cache of what comes behind the convolutions.
      taps: "query", "key" and "value" -> [b, w - 1, heads, d].
    """

    inner: Any
    taps: dict[str, jax.Array]

    @property
    def length(self) -> jax.Array:
        """[b] tokens stored so far."""
        return self.inner.length

    @property
    def max_length(self) -> int:
        """Tokens it can hold."""
        return self.inner.max_length

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)

    @property
    def tokens(self) -> dict[str, jax.Array]:
        """The arrays of a `TokenCache` inside."""
        return self.inner.tokens

    def append(self, new: Mapping[str, jax.Array], valid: Any = None) -> ConvolutionCache:
        """As `TokenCache.append`."""
        return ConvolutionCache(self.inner.append(new, valid), self.taps)

    def attend(self, *arrays: jax.Array, **options: Any) -> tuple[Any, ConvolutionCache]:
        """As `DenseCache.attend`."""
        outputs, inner = self.inner.attend(*arrays, **options)
        return outputs, ConvolutionCache(inner, self.taps)


jax.tree_util.register_dataclass(ConvolutionCache, data_fields=["inner", "taps"], meta_fields=[])


class HeadConvolutions(nnx.Module):
    """The depthwise causal convolutions of queries, keys and values.

    Args:
      heads: of queries, keys and values.
      head_dim: d.
      width: w, in tokens, counts the current one. Paper: 3.
      sharing: "per_head" kernels [w, h, d], "per_dim" [w, 1, d] or "shared" [w, 1, 1].
      use_bias: whether there are biases, shared as the kernels.
      init: "primer" (0.5 for the current token, 0.5 / w for others, biases 0), "uniform" in
        ±w^-0.5 (kernels and biases), or "identity".
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: when an option is out of range.
    """

    def __init__(
        self,
        heads: tuple[int, int, int],
        head_dim: int,
        *,
        width: int = 3,
        sharing: Sharing = "per_dim",
        use_bias: bool = False,
        init: KernelInit = "primer",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width < 1:
            raise ValueError(f"convolution of heads: width={width} must be at least 1 token.")
        if sharing not in ("per_head", "per_dim", "shared"):
            raise ValueError(
                f"convolution of heads: sharing={sharing!r} is unknown; use 'per_head', 'per_dim' "
                "or 'shared'."
            )
        if init not in ("primer", "uniform", "identity"):
            raise ValueError(
                f"convolution of heads: init={init!r} is unknown; use 'primer', 'uniform' or "
                "'identity'."
            )
        bound = width**-0.5

        def draw(shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(rngs.params(), shape, param_dtype, -bound, bound)

        for name, h in zip(_NAMES, heads, strict=True):
            shape = (h if sharing == "per_head" else 1, 1 if sharing == "shared" else head_dim)
            axes = ("heads" if shape[0] == h else None, "head_dim" if shape[1] > 1 else None)
            if init == "uniform":
                kernel, bias = draw((width, *shape)), draw(shape)
            else:
                now, before = (1.0, 0.0) if init == "identity" else (0.5, 0.5 / width)
                kernel = jnp.full((width, *shape), before, param_dtype).at[-1].set(now)
                bias = jnp.zeros(shape, param_dtype)
            setattr(self, name, nnx.Param(kernel, axes=(None, *axes)))
            offset = nnx.Param(bias, axes=axes) if use_bias else nnx.data(None)
            setattr(self, f"{name}_bias", offset)
        self.heads, self.head_dim, self.width = heads, head_dim, width

    def init_taps(self, batch: int, dtype: Any) -> dict[str, jax.Array]:
        """What lies before the first token: zeros."""
        return {
            name: jnp.zeros((batch, self.width - 1, h, self.head_dim), dtype)
            for name, h in zip(_NAMES, self.heads, strict=True)
        }

    def __call__(
        self,
        call: Call,
        *arrays: Float[Array, "b s _ d"],
    ) -> list[Float[Array, "b s _ d"]]:
        """Queries, keys and values after their convolutions; advances the taps of `call.cache`."""
        cache, outputs, taps = call.cache, [], {}
        for name, array in zip(_NAMES, arrays, strict=True):
            kernel, bias = getattr(self, name)[...], getattr(self, f"{name}_bias")
            y, after = causal_conv(
                array,
                jnp.broadcast_to(kernel, (self.width, *array.shape[2:])),
                None if bias is None else jnp.broadcast_to(bias[...], array.shape[2:]),
                state=None if cache is None else cache.taps[name],
                segment_ids=call.segment_ids,
                valid=None if cache is None else call.valid,
            )
            outputs.append(y)
            taps[name] = after if cache is None else after.astype(cache.taps[name].dtype)
        if cache is not None:
            call.cache = ConvolutionCache(cache.inner, taps)
        return outputs


class MDHA(SequenceMixer):
    """Multi-DConv-head attention.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      width: w, in tokens, counts the current one. Paper: 3.
      sharing: "per_head", "per_dim" or "shared" kernels, see `HeadConvolutions`.
      conv_bias: whether the convolutions have biases.
      init: "primer" as in the authors' code, "uniform", or "identity", which starts as plain
        attention.
      rngs: stream `params`.
      **options: of `SequenceMixer`. Without causality only the attention sees both sides.
    """

    sites = SCORE_SITES
    directions = ("causal", "bidirectional")
    grouped = masked = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        width: int = 3,
        sharing: Sharing = "per_dim",
        conv_bias: bool = False,
        init: KernelInit = "primer",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.convolutions = HeadConvolutions(
            (num_heads, self.num_kv_heads, self.num_kv_heads), self.head_dim, width=width,
            sharing=sharing, use_bias=conv_bias, init=init, param_dtype=self.param_dtype, rngs=rngs,
        )  # fmt: skip
        self.out = self.output_projection(rngs=rngs)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> ConvolutionCache:
        """Keys and values behind the convolutions, and w - 1 tokens of q, k and v before them."""
        inner = super().init_cache(batch, max_length, dtype)
        return ConvolutionCache(inner, self.convolutions.init_taps(batch, inner.key.dtype))

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.convolutions(call, self.query(x), self.key(x), self.value(x))
        q, k, v = self.heads(call, q, k, v)
        q, k = self.rotate(call, q, k)
        return self.attend(call, q, k, v)[0]


def _example() -> tuple[MDHA, jax.Array]:
    module = MDHA(
        2, 16, num_kv_heads=1, rope_base=1e4, init="uniform", conv_bias=True, rngs=nnx.Rngs(0)
    )
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="mdha",
    title="Primer: Searching for Efficient Transformers for Language Modeling",
    arxiv="2109.08668",
    year=2021,
    code="google-research/google-research",
    module=MDHA,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2)",
    reduces_to={"init = identity": "multi_head_attention"},
    golden=("mdha",),
    example=_example,
)
