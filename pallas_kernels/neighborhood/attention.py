"""`neighborhood_attention`: N-D windows through the block-sparse kernel, in tile order.

Tokens are permuted so that every tile is a box of the map, dilation groups become batch rows, and
the same kernel as for sequences visits the key tiles that a query tile's windows meet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash import FlashConfig, flash_attention
from pallas_kernels.neighborhood.layout import TokenLayout, permute_tokens, unpermute_tokens
from pallas_kernels.neighborhood.relative import check_bias, relative_score
from pallas_kernels.neighborhood.spec import NeighborhoodSpec

HeadGroups = Sequence[tuple[int, Mapping[str, Any]]]
"""(number of query heads, options of their windows) of consecutive groups of heads."""

LEAST_BLOCK = 256
"""Smallest tile of the kernel that a neighborhood asks for, in tokens."""

OVERHEAD = (1.15, 1.6)
"""Computed pairs per visible pair that larger tiles may cost, with a stride and without."""

WINDOW_OPTIONS = ("kernel_size", "stride", "dilation", "is_causal", "rel_bias", "q_tile", "kv_tile")
"""Options that may differ by group of heads."""


def neighborhood_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    kernel_size: Any = None,
    stride: Any = 1,
    dilation: Any = 1,
    is_causal: Any = False,
    scale: float | None = None,
    softcap: float | None = None,
    additional_keys: jax.Array | None = None,
    additional_values: jax.Array | None = None,
    rel_bias: jax.Array | None = None,
    head_groups: HeadGroups | None = None,
    q_tile: Any = None,
    kv_tile: Any = None,
    pre_permuted: TokenLayout | None = None,
    return_residual: bool = False,
    precision: Any = None,
    implementation: str | None = None,
    config: FlashConfig | None = None,
) -> Any:
    """Softmax attention of every token to a window of keys around it, on 1 to 3 token axes.

        o_i = Σ_j softmax_j(scale q_i·k_j + rel_bias[p_j - p_i]) v_j,   j in the window of i

    The window of `pallas_kernels.neighborhood.windows`: w keys along each axis, shifted at the
    borders and never cut (causal axes are cut). The arguments that describe it are one value for
    all axes or one per axis.

    Args:
      query, key, value: [b, *shape, h, d], [b, *shape, g, d], [b, *shape, g, e], h a multiple of g.
      kernel_size: w, in keys; even windows have one key more on the left.
      stride: queries that share a window, at most w; w is blocked attention.
      dilation: distance between the keys of a window; w * dilation must fit the axis.
      is_causal: whether a query sees keys up to its own index only.
      scale: factor of q·k; None is d^-0.5.
      softcap: c in c tanh(s / c), after the bias; None is off.
      additional_keys, additional_values: [b, a, g, d], [b, a, g, e], seen by every query, in the
        same softmax.
      rel_bias: [h, 2 w - 1, ...], added to the scaled score by in-group distance; has a gradient.
        Odd windows without causal axes.
      head_groups: [(query heads, {"kernel_size": ..., "dilation": ...}), ...]: other windows for
        other heads; options left out are those of the call. A group's own "rel_bias" has its heads
        only.
      q_tile, kv_tile: tile shapes that the kernel is to use, in tokens; None orders the tokens so
        that blocks of several sizes are boxes, and leaves the choice of a size to the kernel.
      pre_permuted: the arrays are in this tile order already, [b, layout.length, h, d], and so are
        the results; see `token_layout`.
      return_residual: also return lse.
      precision, implementation, config: of the kernel, see `pallas_kernels.flash.flash_attention`.

    Returns:
      o [b, *shape, h, e] in the query's dtype; with `return_residual` also the natural-log lse
      [b, *shape, h]. Padding of a pre-permuted result is 0, its lse -inf.

    Raises:
      ValueError: on shapes that do not fit, windows larger than the map, strides larger than the
        window.
      NotImplementedError: for rel_bias with causal axes or even windows.

    Memory: O(tokens). Time: visited tiles, see `NeighborhoodSpec.efficiency`.
    """
    arguments: dict[str, Any] = dict(
        kernel_size=kernel_size, stride=stride, dilation=dilation, is_causal=is_causal,
        rel_bias=rel_bias, q_tile=q_tile, kv_tile=kv_tile,
    )  # fmt: skip
    common: dict[str, Any] = dict(
        scale=query.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap,
        precision=precision, implementation=implementation, config=config,
    )  # fmt: skip
    layout = pre_permuted
    check_arrays(query, key, value, additional_keys, additional_values, layout)
    extra = (additional_keys, additional_values)
    if head_groups is None:
        o, lse = _one_group(query, key, value, *extra, layout=layout, **arguments, **common)
        return (o, lse) if return_residual else o
    results = []
    for q_heads, kv_heads, options in split_heads(head_groups, arguments, query, key):
        kv: list[Any] = [None if x is None else x[..., kv_heads, :] for x in (key, value, *extra)]
        q = query[..., q_heads, :]
        options = {**options, "rel_bias": _bias_of(options["rel_bias"], rel_bias, q_heads)}
        results.append(_one_group(q, *kv, layout=layout, **options, **common))
    o = jnp.concatenate([o for o, _ in results], axis=-2)
    lse = jnp.concatenate([lse for _, lse in results], axis=-1)
    return (o, lse) if return_residual else o


def token_layout(shape: Sequence[int], **window: Any) -> TokenLayout:
    """The tile order for arrays that stay permuted over several layers.

    Args:
      shape: tokens along each axis.
      **window: as for `NeighborhoodSpec`: kernel_size, stride, dilation, is_causal, q_tile.

    Returns:
      A layout for `permute_tokens`, `neighborhood_attention(pre_permuted=layout)` and
      `unpermute_tokens`. Layers in between must have the same dilation; windows and strides may
      differ.
    """
    return NeighborhoodSpec(tuple(shape), **window, alike=True).q_layout


def split_heads(
    head_groups: HeadGroups, arguments: Mapping[str, Any], query: Any, key: Any
) -> list[tuple[slice, slice, dict[str, Any]]]:
    """(query heads, key/value heads, window options) of every group of heads.

    Raises:
      ValueError: when the groups do not add up, cut through shared heads, or name unknown options.
    """
    h, g = query.shape[-2], key.shape[-2]
    if sum(n for n, _ in head_groups) != h or any(n < 1 or n * g % h for n, _ in head_groups):
        raise ValueError(
            "neighborhood_attention: the heads of head_groups, "
            f"{[n for n, _ in head_groups]}, must add up to {h} query heads, each a multiple of "
            f"the {h // g} that share a key/value head."
        )
    found, start = [], 0
    for n, options in head_groups:
        odd = sorted(set(options) - set(WINDOW_OPTIONS))
        if odd:
            raise ValueError(
                f"neighborhood_attention: head_groups has unknown options {odd}; a group may have "
                f"{', '.join(WINDOW_OPTIONS)}."
            )
        stop = start + n
        heads = slice(start, stop), slice(start * g // h, stop * g // h)
        found.append((*heads, {**arguments, **options}))
        start = stop
    return found


def _bias_of(own: Any, common: Any, heads: slice) -> Any:
    """The table of a group: its own, or its heads of the common one."""
    return common[heads] if own is common and common is not None else own


def _one_group(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    additional_keys: jax.Array | None,
    additional_values: jax.Array | None,
    *,
    layout: TokenLayout | None,
    rel_bias: jax.Array | None,
    softcap: float | None,
    config: FlashConfig | None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """(o, lse) of heads that share their windows."""
    names = ("kernel_size", "stride", "dilation", "is_causal", "q_tile", "kv_tile")
    spec = _spec(query, layout, **{name: options.pop(name) for name in names})
    additional = 0 if additional_keys is None else additional_keys.shape[1]
    q, k, v = query, key, value
    if layout is None:
        q = permute_tokens(q, spec.q_layout)
        k, v = (permute_tokens(x, spec.kv_layout) for x in (k, v))
    elif not layout.is_token().all():  # what earlier layers left in the padding must not matter
        real = layout.is_token().reshape(1, -1, 1, 1)
        q, k, v = (jnp.where(real, x, jnp.zeros_like(x)) for x in (q, k, v))
    b, groups = query.shape[0], spec.q_layout.groups
    q, k, v = (x.reshape(b * groups, -1, *x.shape[2:]) for x in (q, k, v))
    if additional:
        k, v = (
            jnp.concatenate([x, jnp.repeat(more.astype(x.dtype), groups, axis=0)], axis=1)
            for x, more in ((k, additional_keys), (v, additional_values))
        )
    score_mod = None
    if rel_bias is not None:
        check_bias(spec, rel_bias, query.shape[-2])
        score_mod, softcap = relative_score(spec, rel_bias, additional, softcap), None
    o, lse = flash_attention(
        q, k, v, mask=spec.mask(b, additional), score_mod=score_mod, softcap=softcap,
        config=_config(config, spec), **options,
    )  # fmt: skip
    o, lse = (x.reshape(b, -1, *x.shape[2:]) for x in (o, lse))
    if layout is None:
        o, lse = (unpermute_tokens(x, spec.q_layout) for x in (o, lse))
    return o, lse


def _config(config: FlashConfig | None, spec: NeighborhoodSpec) -> FlashConfig | None:
    """Tiles of the kernel: those that were asked for, else its own choice of no more than needed.

    Larger tiles take fewer steps, but windows fill them badly.
    """
    config = config or FlashConfig()
    if not spec.fixed:
        if spec.is_full or config.block_q or config.block_kv or config.options:
            return config
        largest = _largest_block(spec)
        return dataclasses.replace(config, options=(("largest_block", largest),))
    block_q, block_kv = spec.block_sizes
    return dataclasses.replace(
        config, block_q=config.block_q or block_q, block_kv=config.block_kv or block_kv
    )


def _largest_block(spec: NeighborhoodSpec) -> int:
    sizes = [n for n in spec.box_sizes if n >= LEAST_BLOCK]
    found = {n: spec.efficiency(n, n).overhead for n in sizes}
    most = OVERHEAD[0] if max(spec.stride) > 1 else OVERHEAD[1]
    return max((n for n, overhead in found.items() if overhead <= most), default=LEAST_BLOCK)


def _spec(query: jax.Array, layout: TokenLayout | None, **window: Any) -> NeighborhoodSpec:
    """The neighborhood of a call; a full window needs no boxes, so its tile is the whole group."""
    if window["kernel_size"] is None:
        raise ValueError(
            "neighborhood_attention: kernel_size is missing; give it to the call, or to every "
            "member of head_groups."
        )
    if layout is not None:
        return NeighborhoodSpec(layout.shape, order=layout, **window)
    shape = query.shape[1:-2]
    spec = NeighborhoodSpec(shape, **window)
    if spec.is_full:
        whole = TokenLayout(shape, tuple(axis.longest for axis in spec.axes), spec.dilation)
        spec = dataclasses.replace(spec, order=whole)
    return spec


def check_arrays(
    query: Any, key: Any, value: Any, more_keys: Any, more_values: Any, layout: TokenLayout | None
) -> None:
    """Checks the shapes of a call.

    Raises:
      ValueError: naming the array and what it should be.
    """
    name = "neighborhood_attention"
    if layout is None and not 4 <= query.ndim <= 6:
        raise ValueError(
            f"{name}: query must have shape [batch, *shape, heads, width] with 1 to 3 token axes, "
            f"got {query.shape}."
        )
    if layout is not None and (query.ndim != 4 or query.shape[1] != layout.length):
        raise ValueError(
            f"{name}: with pre_permuted, query must have shape [batch, {layout.length}, heads, "
            f"width], got {query.shape}; use permute_tokens(x, layout)."
        )
    for label, x in (("key", key), ("value", value)):
        if x.ndim != query.ndim or x.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"{name}: {label} must have the batch and token axes of query {query.shape}, got "
                f"{x.shape}."
            )
    h, g = query.shape[-2], key.shape[-2]
    if value.shape[-2] != g or g == 0 or h % g or key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"{name}: query {query.shape} and key {key.shape} must have the same width, key and "
            f"value {value.shape} the same heads, and these must divide those of query."
        )
    if (more_keys is None) != (more_values is None):
        raise ValueError(f"{name}: additional_keys and additional_values must be given together.")
    for label, x, like in (
        ("additional_keys", more_keys, key),
        ("additional_values", more_values, value),
    ):
        if x is not None and (
            x.ndim != 4 or x.shape[0] != query.shape[0] or x.shape[2:] != like.shape[-2:]
            or x.shape[1] != more_keys.shape[1]
        ):  # fmt: skip
            raise ValueError(
                f"{name}: {label} must have shape [{query.shape[0]}, number, *{like.shape[-2:]}], "
                f"as many of both, got {x.shape}."
            )
