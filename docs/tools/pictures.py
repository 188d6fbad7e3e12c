"""Pictures made by code: the masks, and for each mechanism who attends to whom."""

from __future__ import annotations

import io
import pathlib
from typing import Any

import matplotlib
import numpy as np

import attnjax as aj
from attnjax.gallery import draw, panels
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
        draw(axis, np.asarray(mask.dense(LENGTH))[0, 0], text)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def mechanism(spec: Mechanism) -> bytes | None:
    """A PNG of what a mechanism computes, or None where there is nothing to draw."""
    found = panels(spec, LENGTH)
    if not found:
        return None
    size = (3.4 * len(found), 3.4)
    figure, axes = plt.subplots(1, len(found), figsize=size, squeeze=False, layout="constrained")
    for axis, (title, picture) in zip(axes[0], found.items(), strict=True):
        draw(axis, picture, title)
        axis.set(xlabel="s", ylabel="t")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    plt.close(figure)
    return buffer.getvalue()
