"""Checks of arguments that many mechanisms share: one place each, errors that say how to fix it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def check_qkv(name: str, query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Checks query [b, t, h, d], key [b, s, g, d], value [b, s, g, e] with h a multiple of g.

    Raises:
      ValueError: on a wrong rank, batch, length, width or number of heads.
      TypeError: when an input is not floating point.
    """
    for label, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 4:
            raise ValueError(
                f"{name}: {label} must have rank 4, [batch, length, heads, width], got shape "
                f"{x.shape}; add the missing axis with x[None] or reshape."
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(
                f"{name}: {label} must be floating point, got {x.dtype}; convert it with "
                ".astype(jnp.float32)."
            )
    b, _, h, d = query.shape
    _, s, g, _ = key.shape
    if key.shape[0] != b or value.shape[0] != b:
        raise ValueError(
            f"{name}: query, key and value must share the batch size, got query {query.shape}, "
            f"key {key.shape}, value {value.shape}."
        )
    if value.shape[1] != s:
        raise ValueError(
            f"{name}: key and value must have the same length, got key {key.shape} and value "
            f"{value.shape}."
        )
    if key.shape[3] != d:
        raise ValueError(
            f"{name}: query and key must have the same width, got query {query.shape} and key "
            f"{key.shape}."
        )
    if value.shape[2] != g:
        raise ValueError(
            f"{name}: key and value must have the same number of heads, got key {key.shape} and "
            f"value {value.shape}."
        )
    if g == 0 or h % g:
        raise ValueError(
            f"{name}: the number of query heads must be a multiple of the key/value heads, got "
            f"query heads {h} (query {query.shape}) and key/value heads {g} (key {key.shape})."
        )


def check_segments(
    name: str, segment_ids: Any, batch: int, length: int, label: str = "segment_ids"
) -> None:
    """Checks segment ids: integers of shape [batch, length].

    Raises:
      ValueError: on a wrong shape.
      TypeError: when they are not integers.
    """
    if segment_ids.shape != (batch, length):
        raise ValueError(
            f"{name}: {label} must have shape [batch, length] = {(batch, length)}, got "
            f"{segment_ids.shape}."
        )
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"{name}: {label} must be integers, got {segment_ids.dtype}.")


def check_heads(name: str, num_heads: int, num_kv_heads: int) -> None:
    """Checks that `num_kv_heads` divides `num_heads`.

    Raises:
      ValueError: otherwise.
    """
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"{name}: num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}; "
            f"use one of {[g for g in range(1, num_heads + 1) if num_heads % g == 0]}."
        )


def check_no_scores(name: str, call: Any, where: str, instead: str) -> None:
    """Refuses what a call asks of scores and weights, where not all of them exist.

    Args:
      name: the mechanism.
      call: an `attnjax.mixer.Call`.
      where: what keeps only some of the scores, as "with S2Cache".
      instead: why, and what is supported.

    Raises:
      NotImplementedError: naming every option of the call that needs all scores.
    """
    tap, edits = call.tap, call.tap.edits
    given = {
        "mask": call.mask, "key_mask": edits.key_mask, "score_bias": edits.score_bias,
        "weight_edit": edits.weight_edit, "dropout": call.dropout_key,
    }  # fmt: skip
    asked = [option for option, value in given.items() if value is not None]
    for site in ("scores", "weights"):
        asked += [f"capture={site!r}"] if site in tap.capture else []
        asked += [f"edits of {site}"] if tap.edits_site(site) else []
    if asked:
        raise NotImplementedError(
            f"{name}: {', '.join(asked)} {where} is not supported, {instead}."
        )
