"""Neighborhood attention: every token of a sequence, image or video attends to a window around it.

    o_i = Σ_j softmax_j(scale q_i·k_j + rel_bias[p_j - p_i]) v_j,   j in the window of i

Along each axis the window holds w keys; at a border it is shifted inwards, not cut. `dilation`
spreads its keys (DiNAT), `stride` lets neighboring queries share one window (GNA), a causal axis
ends at the query. Axes are independent, so the window is a box.

Tokens are put into tile order, in which every tile of the score matrix belongs to two boxes of the
map, and the block-sparse kernel visits the tiles that windows meet (`NeighborhoodSpec.efficiency`).

Reference: Hassani et al., "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self
Attention at the Threadblock Level", 2024, arXiv:2403.04690; "Neighborhood Attention Transformer",
2022, arXiv:2204.07143; "Dilated Neighborhood Attention Transformer", 2022, arXiv:2209.15001;
"Generalized Neighborhood Attention", 2025, arXiv:2504.16922. Differs from SHI-Labs/NATTEN: a window
of 1 is allowed, additional keys share one softmax instead of merging two, and the relative position
bias (dropped there in 0.20) works with every tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from attnjax.attention import DENSE_SCORES, attention
from attnjax.masks import Neighborhood, per_head
from attnjax.masks.keys import key_set
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.spec import Mechanism
from attnjax.taps import Edits, Tap
from pallas_kernels import neighborhood as kernels
from pallas_kernels.flash import FlashConfig
from pallas_kernels.neighborhood import NeighborhoodSpec, TokenLayout
from pallas_kernels.neighborhood.attention import HeadGroups, check_arrays, split_heads
from pallas_kernels.neighborhood.relative import bias_table_shape, check_bias

WINDOW = ("kernel_size", "stride", "dilation", "is_causal")


def neighborhood_attention(
    query: Float[Array, "b *shape h d"],
    key: Float[Array, "b *shape g d"],
    value: Float[Array, "b *shape g e"],
    *,
    kernel_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    softcap: float | None = None,
    additional_keys: Float[Array, "b a g d"] | None = None,
    additional_values: Float[Array, "b a g e"] | None = None,
    rel_bias: Any = None,
    head_groups: HeadGroups | None = None,
    q_tile: int | Sequence[int] | None = None,
    kv_tile: int | Sequence[int] | None = None,
    pre_permuted: TokenLayout | None = None,
    return_residual: bool = False,
    precision: Any = None,
    implementation: str | None = None,
    config: FlashConfig | None = None,
) -> Any:
    """Softmax attention of every token to a window of keys around it, on 1 to 3 token axes.

    Names and meanings are NATTEN's. What describes the window is one value for all axes or one for
    each.

    Args:
      query, key, value: shapes as annotated, heads last, h a multiple of g.
      kernel_size: w, in keys; even windows have one key more on the left. Papers: 3 to 13 in vision
        backbones, 80 x 80 in image generation.
      stride: queries that share a window, at most w; w is blocked attention.
      dilation: distance between the keys of a window; w * dilation must fit the axis.
      is_causal: whether a query sees keys up to its own index only.
      scale: factor of q·k; None is d^-0.5.
      softcap: c in c tanh(s / c), after the bias; None is off.
      additional_keys, additional_values: keys that every query sees besides its window (text,
        registers), in the same softmax. Causality does not apply to them.
      rel_bias: [h, 2 w - 1, ...], added to the scaled score by distance inside the dilation group;
        has a gradient. Odd windows without causal axes. With head_groups, each group may have its
        own.
      head_groups: [(query heads, {"kernel_size": ..., "dilation": ...}), ...]: other windows for
        other heads; options left out are those of the call.
      q_tile, kv_tile: tile shapes that the kernel is to use, in tokens; None leaves the choice to
        it.
      pre_permuted: the arrays are in this tile order already, [b, length, h, d], and so are the
        results: see `pallas_kernels.neighborhood.token_layout`.
      return_residual: also return the natural-log lse.
      precision: of the matrix products.
      implementation: None chooses; "dense", "block_sparse", or a kernel, as for
        `attnjax.attention`.
      config: further choices of the kernel.

    Returns:
      Output [b, *shape, h, e] in the query's dtype, or (output, lse [b, *shape, h]).

    Raises:
      ValueError: on shapes that do not fit, windows larger than the map, strides larger than the
        window.
      NotImplementedError: for rel_bias with causal axes or even windows, or what the forced
        implementation lacks.

    Memory: O(tokens); dense O(tokens^2).

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((1, 20, 30, 2, 8))
      >>> neighborhood_attention(x, x, x, kernel_size=(7, 9), dilation=(1, 2)).shape
      (1, 20, 30, 2, 8)
    """
    window: dict[str, Any] = dict(
        kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal,
        rel_bias=rel_bias,
    )  # fmt: skip
    common: dict[str, Any] = dict(
        scale=scale, softcap=softcap, precision=precision, return_residual=return_residual
    )
    extra: dict[str, Any] = dict(
        additional_keys=additional_keys, additional_values=additional_values
    )
    if _takes_dense(query, additional_keys, implementation, pre_permuted):
        return _dense(query, key, value, head_groups=head_groups, **window, **extra, **common)
    return kernels.neighborhood_attention(
        query, key, value, head_groups=head_groups, q_tile=q_tile, kv_tile=kv_tile,
        pre_permuted=pre_permuted, config=config,
        implementation=None if implementation == "block_sparse" else implementation,
        **window, **extra, **common,
    )  # fmt: skip


def _takes_dense(query: Any, more: Any, implementation: str | None, layout: Any) -> bool:
    """Whether all pairs are computed: small maps, where that is as fast and compiles faster."""
    if implementation == "dense" and layout is not None:
        raise NotImplementedError(
            "neighborhood_attention: implementation='dense' takes tokens in their own order; call "
            "unpermute_tokens first, or leave implementation to None."
        )
    tokens = math.prod(query.shape[1:-2])
    small = tokens * (tokens + (0 if more is None else more.shape[1])) <= DENSE_SCORES
    return implementation == "dense" or (implementation is None and layout is None and small)


def _dense(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    head_groups: HeadGroups | None,
    additional_keys: jax.Array | None,
    additional_values: jax.Array | None,
    rel_bias: Any,
    key_mask: jax.Array | None = None,
    score_bias: jax.Array | None = None,
    capture: tuple[str, ...] = (),
    return_residual: bool = False,
    **options: Any,
) -> Any:
    """The definition: all pairs, in row-major order. `options` may hold those of `attention`."""
    check_arrays(query, key, value, additional_keys, additional_values, None)
    window = {name: options.pop(name) for name in WINDOW} | {"rel_bias": rel_bias}
    shape, tokens = query.shape[1:-2], math.prod(query.shape[1:-2])
    additional = 0 if additional_keys is None else additional_keys.shape[1]
    groups = [(query.shape[-2], {})] if head_groups is None else head_groups
    masks, biases = [], []
    for heads, _, own in split_heads(groups, window, query, key):
        spec = NeighborhoodSpec(shape, **{name: own[name] for name in WINDOW})
        mask: Any = Neighborhood(
            shape, spec.kernel_size, spec.stride, spec.dilation, spec.is_causal, additional
        )
        masks += [mask] * (heads.stop - heads.start)
        table = own["rel_bias"]
        table = table[heads] if table is not None and table is rel_bias else table
        biases.append(_dense_bias(spec, table, heads.stop - heads.start, additional))
    bias = score_bias
    if any(x is not None for x in biases):
        # [1, h, t, s], zero where a group has none
        whole = (1, 1, tokens, tokens + additional)
        counts = [n for n, _ in groups]
        filled = [jnp.zeros(whole) if x is None else x for x in biases]
        dtype = jnp.result_type(*(x.dtype for x in biases if x is not None))
        rows = [jnp.broadcast_to(x, (1, n, *whole[2:])) for x, n in zip(filled, counts)]
        own_bias = jnp.concatenate([x.astype(dtype) for x in rows], axis=1)
        bias = own_bias if bias is None else own_bias + bias.astype(dtype)
    mask = masks[0] if all(m == masks[0] for m in masks) else per_head(masks)
    if key_mask is not None:
        mask = mask & key_set(key_mask)
    q, k, v = (x.reshape(x.shape[0], tokens, *x.shape[-2:]) for x in (query, key, value))
    if additional:
        k = jnp.concatenate([k, additional_keys.astype(k.dtype)], axis=1)
        v = jnp.concatenate([v, additional_values.astype(v.dtype)], axis=1)
    options = {name: x for name, x in options.items() if x is not None}
    o, lse, *captured = attention(
        q, k, v, bias, mask, return_residual=True, implementation="dense", capture=capture,
        **options,
    )  # fmt: skip
    o, lse = (x.reshape(x.shape[0], *shape, *x.shape[2:]) for x in (o, lse))
    return (o, lse, *captured) if return_residual else o


def _dense_bias(
    spec: NeighborhoodSpec, table: Any, heads: int, additional: int
) -> jax.Array | None:
    """rel_bias for all pairs, [1, h, t, t + additional]; arbitrary outside of the windows."""
    if table is None:
        return None
    check_bias(spec, table, heads)
    at = np.indices(spec.shape).reshape(len(spec.shape), -1) // np.array(spec.dilation)[:, None]
    index = at[:, None, :] - at[:, :, None] + (np.array(spec.kernel_size) - 1)[:, None, None]
    sizes = bias_table_shape(spec.kernel_size)
    flat = np.ravel_multi_index(tuple(index), sizes, mode="clip")
    bias = table.reshape(heads, -1)[:, flat]
    return jnp.pad(bias, ((0, 0), (0, 0), (0, additional)))[None]


class NeighborhoodAttention(MultiHeadAttention):
    """Neighborhood attention with projections, on sequences, images and videos.

    Parameters have the names and shapes of `flax.nnx.MultiHeadAttention`. NATTEN's modules join the
    first three: columns of their `qkv.weight.T` are ordered (query | key | value, head, width).

    Args:
      num_heads: h.
      in_features: width of the input.
      qkv_features: width of all heads together; None is `in_features`.
      out_features: width of the output; None is `in_features`.
      num_kv_heads: g, divides h; None is h.
      kernel_size: keys of a window along an axis; one value, or one per axis like all that follows.
        NAT: 7.
      stride: queries that share a window.
      dilation: distance between the keys of a window. DiNAT alternates 1 and as much as fits.
      is_causal: whether a query sees keys up to its own index only.
      head_groups: other windows for other heads, see `neighborhood_attention`.
      rel_bias: learn a bias for every distance, [h, 2 w - 1, ...]. Needs `kernel_size` by axis. NAT
        and DiNAT have it.
      auto_pad: pad maps that are smaller than kernel_size * dilation with zeros behind their end,
        which are then seen like tokens, as NATTEN did before 0.17; otherwise they are refused.
      **options: of `MultiHeadAttention`: softcap, scale, qk_norm, implementation, dtype,
        param_dtype, precision, initializers, use_bias, rngs.

    Raises:
      ValueError: for sizes that do not fit, or options without meaning on maps.
    """

    packed = masked = rotary = decodes = drops = False

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        *,
        kernel_size: int | Sequence[int] | None = None,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        is_causal: bool | Sequence[bool] = False,
        head_groups: HeadGroups | None = None,
        rel_bias: bool = False,
        auto_pad: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        for name in ("causal", "window", "sinks", "sink", "rope_base", "dropout_rate", "decode"):
            if options.get(name):
                raise ValueError(
                    f"NeighborhoodAttention: {name}={options[name]!r} has no meaning here; the "
                    "window is given by kernel_size, stride, dilation and is_causal."
                )
        super().__init__(
            num_heads, in_features, qkv_features, out_features, num_kv_heads, rngs=rngs, **options
        )
        if kernel_size is None and head_groups is None:
            raise ValueError(
                "NeighborhoodAttention: pass kernel_size, or head_groups with one each."
            )
        self.kernel_size, self.stride, self.dilation, self.is_causal = (
            tuple(x) if isinstance(x, Sequence) else x
            for x in (kernel_size, stride, dilation, is_causal)
        )
        self.head_groups = None
        if head_groups is not None:
            self.head_groups = tuple((n, tuple(sorted(own.items()))) for n, own in head_groups)
        self.auto_pad = auto_pad
        self.rel_bias = nnx.data(None)
        if rel_bias:
            if not isinstance(self.kernel_size, tuple) or head_groups is not None:
                raise ValueError(
                    "NeighborhoodAttention: rel_bias=True needs kernel_size with one entry per "
                    f"axis, for all heads alike; got kernel_size={kernel_size} and "
                    f"head_groups={head_groups}."
                )
            sizes = (num_heads, *bias_table_shape(self.kernel_size))
            table = nnx.initializers.normal(0.02)(rngs.params(), sizes, self.param_dtype)
            self.rel_bias = nnx.Param(table, axes=("heads",) + (None,) * (len(sizes) - 1))

    def __call__(
        self,
        x: Float[Array, "b *shape m"],
        *,
        additional_keys: Float[Array, "b a g d"] | None = None,
        additional_values: Float[Array, "b a g d"] | None = None,
        pre_permuted: TokenLayout | None = None,
        edits: Edits | None = None,
        capture: Iterable[str] = (),
    ) -> Any:
        """Attends within the map.

        Args:
          x: [b, *shape, in_features] with 1 to 3 token axes.
          additional_keys, additional_values: keys by head that every token sees besides its window.
          pre_permuted: x is [b, length, in_features] in this tile order, and so is the result.
          edits: interventions of this layer (`attnjax.taps.Edits`); tokens count in row-major
            order.
          capture: names of sites to return (`attnjax.taps.SITES`).

        Returns:
          y [b, *shape, out_features]; (y, captured) with a capture, activations as [b, t, ...].

        Raises:
          ValueError: on shapes that do not fit.
          NotImplementedError: for edits of scores or weights of pre-permuted tokens.
        """
        name = type(self).__name__
        axes = 1 if pre_permuted is not None else x.ndim - 2
        if not 1 <= axes <= 3 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{name}: x must have shape [batch, *shape, {self.in_features}] with 1 to 3 token "
                f"axes, got {x.shape}."
            )
        given = x.shape[1:-1]
        if self.auto_pad and pre_permuted is None:
            x = self._padded(x)
        b, shape = x.shape[0], x.shape[1:-1]
        flat = x.reshape(b, -1, self.in_features)
        call = self.begin(flat, edits=edits, capture=capture)
        tap = call.tap
        q, k, v = self._project(call, flat, flat)
        q, k, v = (a.reshape(b, *shape, *a.shape[2:]) for a in (q, k, v))
        z = self._windows(tap, q, k, v, additional_keys, additional_values, pre_permuted)
        y = self.finish(call, z.reshape(b, -1, *z.shape[-2:]))
        y = y.reshape(b, *shape, self.out_features)
        return tap.result(y[(slice(None), *(slice(n) for n in given))])

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """Refuses: maps come as a whole.

        Raises:
          NotImplementedError: always; causal sequences have `MultiHeadAttention(window=...)`.
        """
        raise NotImplementedError(
            f"{type(self).__name__}: has no cache; for causal sequences use "
            "MultiHeadAttention(causal=True, window=...), which sees the same keys."
        )

    def _windows(
        self, tap: Tap, q: jax.Array, k: jax.Array, v: jax.Array, more_k: Any, more_v: Any,
        layout: TokenLayout | None,
    ) -> jax.Array:  # fmt: skip
        """Z by head, [b, *shape, h, d], before `head_scale`; scores and weights where captured."""
        groups = self.head_groups
        options: dict[str, Any] = dict(
            **{name: getattr(self, name) for name in WINDOW},
            head_groups=None if groups is None else [(n, dict(own)) for n, own in groups],
            rel_bias=None if self.rel_bias is None else self.rel_bias[...],
            additional_keys=more_k, additional_values=more_v,
            scale=self.scale, softcap=self.softcap,
        )  # fmt: skip
        wanted = tuple(site for site in ("scores", "weights") if site in tap.capture)
        inside = {
            "score_bias": tap.edits.score_bias,
            "key_mask": tap.edits.key_mask,
            "weight_edit": tap.weight_edit(),
            "score_mod": tap.score_mod(0),
        }
        inside = {name: x for name, x in inside.items() if x is not None}
        if not (wanted or inside):
            return neighborhood_attention(
                q, k, v, pre_permuted=layout, implementation=self.implementation, **options
            )
        if layout is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: edits and captures of scores and weights count tokens in "
                "row-major order; unpermute them, and leave pre_permuted out."
            )
        z, _, *captured = _dense(q, k, v, capture=wanted, return_residual=True, **inside, **options)
        if wanted:
            tap.captured.update(captured[0])
        return z

    def _padded(self, x: jax.Array) -> jax.Array:
        """X with zeros behind each axis that is shorter than the largest window on it."""
        axes = x.ndim - 2
        own = [dict(own) for _, own in self.head_groups or ((0, ()),)]
        shape = x.shape[1:-1]
        for options in own:
            w, d = (
                np.broadcast_to(options.get(name, getattr(self, name)), (axes,))
                for name in ("kernel_size", "dilation")
            )
            shape = tuple(max(n, int(m)) for n, m in zip(shape, w * d))
        pads = [(0, m - n) for n, m in zip(x.shape[1:-1], shape)]
        return jnp.pad(x, ((0, 0), *pads, (0, 0))) if shape != x.shape[1:-1] else x


def _example() -> tuple[NeighborhoodAttention, jax.Array]:
    module = NeighborhoodAttention(
        2, 8, kernel_size=(3, 3), dilation=(1, 2), rel_bias=True, rngs=nnx.Rngs(0)
    )
    return module, jax.random.normal(jax.random.key(1), (2, 5, 7, 8))


SPEC = Mechanism(
    id="fna",
    title="Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the "
    "Threadblock Level",
    arxiv="2403.04690",
    year=2024,
    code="SHI-Labs/NATTEN",
    function=neighborhood_attention,
    module=NeighborhoodAttention,
    causal=True,
    bidirectional=True,
    nd=3,
    golden=("natten", "natten_rpb"),
    kernel="neighborhood",
    cost="O(T prod(w))",
    reduces_to={
        "kernel_size=T": "multi_head_attention",
        "stride=kernel_size": "attention within blocks",
    },
    example=_example,
)
