"""RCMHA: convolutions on queries, keys and values, then scores of content and distance.

    q, k, v ← conv(x W)  as in MDHA,   s_ij = ((q_i + u) · k_j + q_i · r_{i-j} + β_{i-j}) / sqrt(d)

A composition of two mechanisms: the short causal convolutions of `mdha` behind the projections, and
the relative scores of `transformer_xl`, with learned tables unless told otherwise.

Only the abstract could be read, so which form of either part the authors use is our reading.

Reference: "RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
2023, arXiv:2308.03429. No official code was found.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax.mechanisms.softmax.mdha import (
    ConvolutionCache,
    HeadConvolutions,
    KernelInit,
    Sharing,
)
from attnjax.mechanisms.softmax.transformer_xl import Encoding, TransformerXLAttention
from attnjax.mixer import Call
from attnjax.spec import Mechanism


class RCMHA(TransformerXLAttention):
    """Relative convolutional multi-head attention.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      width: of the convolutions, in tokens, counts the current one. Primer: 3.
      sharing, conv_bias, init: of the convolutions, see `HeadConvolutions`.
      encoding: "learned" tables, or "sinusoid".
      rngs: stream `params`.
      **options: of `TransformerXLAttention`: max_distance, window, residual, biases, ... A memory
        of `segment` is convolved together with the segment.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        width: int = 3,
        sharing: Sharing = "per_dim",
        conv_bias: bool = True,
        init: KernelInit = "uniform",
        encoding: Encoding = "learned",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, encoding=encoding, rngs=rngs,
            **options,
        )  # fmt: skip
        self.convolutions = HeadConvolutions(
            (num_heads, num_heads, num_heads), self.head_dim, width=width, sharing=sharing,
            use_bias=conv_bias, init=init, param_dtype=self.param_dtype, rngs=rngs,
        )  # fmt: skip

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> ConvolutionCache:
        """Keys and values behind the convolutions, and w - 1 tokens of q, k and v before them."""
        inner = super().init_cache(batch, max_length, dtype)
        taps = self.convolutions.init_taps(batch, inner.tokens["key"].dtype)
        return ConvolutionCache(inner, taps)

    def project(self, call: Call, source: jax.Array) -> tuple[jax.Array, ...]:
        """Convolved queries of the new tokens; convolved keys and values of `source`."""
        arrays = (self.query(source), self.key(source), self.value(source))
        q, k, v = self.convolutions(call, *arrays)
        return q[:, -call.x.shape[1] :], k, v


def _example() -> tuple[RCMHA, jax.Array]:
    module = RCMHA(
        2, 16, max_distance=64, kernel_init=nnx.initializers.lecun_normal(), rngs=nnx.Rngs(0)
    )
    parameters = (module.table, module.table_bias, module.content_bias)
    for seed, parameter in enumerate(parameters):
        assert parameter is not None
        parameter[...] = 0.5 * jax.random.normal(jax.random.key(seed), jnp.shape(parameter[...]))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="rcmha",
    title="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
    arxiv="2308.03429",
    year=2023,
    module=RCMHA,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="einsum",
    cost="O(T (T + M)) with M tokens of memory",
    reduces_to={
        "init = identity, conv_bias = False": "transformer_xl",
        "tables = 0 (their start)": "mdha",
    },
    reading="The abstract alone could be read: a composition of MDHA's convolutions and the "
    "relative score with learned tables.",
    example=_example,
)
