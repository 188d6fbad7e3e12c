"""Pictures made by code: the masks, and for each mechanism who attends to whom."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import attnjax as aj
from attnjax.spec import Mechanism

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LENGTH = 32
"""Tokens in the pictures."""


def catalogue() -> dict[str, Any]:
    """Masks worth a picture: the expression as one writes it -> mask."""
    m = aj.masks
    documents = np.repeat([[0, 1, 2]], [10, 14, 8], axis=1)
    tiles = np.array([[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1]]], bool)
    return {
        "Causal()": m.Causal(),
        "Causal() & Window(8)": m.Causal() & m.Window(8),
        "Window(6, 5)": m.Window(6, 5),
        "Causal() & (Window(8) | Sink(3))": m.Causal() & (m.Window(8) | m.Sink(3)),
        "Causal() | Prefix(10)": m.Causal() | m.Prefix(10),
        "Causal() & Segments(ids)": m.Causal() & m.Segments(documents),
        "Causal() & Dilated(3)": m.Causal() & m.Dilated(3),
        "Causal() & Chunked(8)": m.Causal() & m.Chunked(8),
        "BlockPattern(tiles, 8, 8)": m.BlockPattern(tiles, 8, 8),
        "~Window(4, 3)": ~m.Window(4, 3),
    }


def save_catalogue(path: pathlib.Path) -> None:
    """Draws all masks of the catalogue into one small PNG: queries down, keys to the right."""
    found = catalogue()
    columns = 5
    rows = -(-len(found) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(10, 2.25 * rows), layout="constrained")
    for axis, (text, mask) in zip(axes.flat, found.items(), strict=True):
        _show(axis, np.asarray(mask.dense(LENGTH))[0, 0], text)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def mechanism(spec: Mechanism) -> bytes | None:
    """A PNG of what a mechanism computes, or None where there is nothing to draw.

    The mechanism's own panels (`SPEC.picture`) come first. Of `SPEC.example`, one panel shows how
    strongly each output token depends on each input token, and another the attention weights,
    averaged over heads, where the module can give them.
    """
    panels = dict(spec.picture()) if spec.picture else {}
    module, x = spec.example() if spec.example else (None, None)
    if x is not None and callable(module) and jnp.issubdtype(x.dtype, jnp.floating):
        if spec.nd == 1:
            x = jax.random.normal(jax.random.key(0), (1, LENGTH, x.shape[-1]), x.dtype)
        panels["influence of input s on output t"] = influence(module, x)
        weights = captured_weights(module, x)
        if weights is not None:
            panels["attention weights, mean over heads"] = weights
    if not panels:
        return None
    size = (3.4 * len(panels), 3.4)
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, picture) in zip(axes[0], panels.items(), strict=True):
        _show(axis, picture, title)
        axis.set(xlabel="s", ylabel="t")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()


def influence(module: Any, x: jax.Array) -> np.ndarray:
    """|d y_t / d x_s| for one example of the batch, along a fixed random direction of y: [t, s].

    The square root of its share of a row, so that weak dependencies can be seen.
    """
    x = x[:1]
    channels = x.shape[-1]

    def flat(x):
        y = module(x)
        return y.reshape(-1, y.shape[-1])

    y, pull = jax.vjp(flat, x)
    direction = jax.random.normal(jax.random.key(0), y.shape[-1:], y.dtype)
    one_token = jnp.eye(y.shape[0], dtype=y.dtype)[:, :, None] * direction[None, None, :]
    (gradients,) = jax.vmap(pull)(one_token)
    strength = jnp.linalg.norm(gradients.reshape(y.shape[0], -1, channels), axis=-1)
    share = strength / jnp.maximum(strength.max(axis=-1, keepdims=True), 1e-30)
    return np.asarray(jnp.sqrt(share))


def captured_weights(module: Any, x: jax.Array) -> np.ndarray | None:
    """Attention weights [t, s] of the first example, or None where the module captures none."""
    try:
        *_, captured = module(x[:1], capture=("weights",))
    except (NotImplementedError, TypeError, ValueError):
        return None
    if not isinstance(captured, dict) or "weights" not in captured:
        return None
    return np.asarray(captured["weights"][0].mean(axis=0))


def _show(axis: Any, picture: np.ndarray, title: str) -> None:
    picture = np.asarray(picture, np.float32)
    if picture.min() < 0:  # signed weights: white is zero
        top = np.abs(picture).max()
        axis.imshow(picture, cmap="RdBu", vmin=-top, vmax=top, interpolation="nearest")
    else:
        axis.imshow(picture, cmap="Blues", vmin=0, interpolation="nearest")
    axis.set_title(title, fontsize=7, family="monospace" if "(" in title else None)
    axis.set(xticks=[], yticks=[])
