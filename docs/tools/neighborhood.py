"""Picture and table of docs/neighborhood.md; `python -m docs.tools.neighborhood` writes them."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib
import numpy as np

from attnjax.masks import Neighborhood
from docs.tools import tables
from pallas_kernels.blocklist import block_list
from pallas_kernels.neighborhood import NeighborhoodSpec

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import ListedColormap, to_rgb  # noqa: E402

PAGE = tables.ROOT / "docs/neighborhood.md"
PICTURE = tables.ROOT / "docs/assets/neighborhood.png"
SIDE = 11
"""Tokens along each axis of the small maps."""

COLORS = ("#2166ac", "#b2182b", "#1b7837")

CASES: list[tuple[tuple[int, ...], Any, Any]] = [
    ((256, 256), 80, 1),
    ((256, 256), 80, 16),
    ((256, 256), 84, 16),
    ((512, 512), 64, 1),
    ((512, 512), 64, 16),
    ((512, 512), 48, 16),
    ((30, 48, 80), (18, 24, 24), 1),
    ((30, 48, 80), (18, 24, 24), (16, 8, 8)),
    ((32768,), 2048, 1),
    ((32768,), 2048, 256),
]
"""Maps, windows and strides of the table."""


def windows() -> dict[str, tuple[dict[str, Any], list[tuple[int, int]]]]:
    """Title -> (arguments of the mask, queries to show)."""
    return {
        "kernel_size=5: shifted at borders": (dict(kernel_size=5), [(5, 4), (0, 10), (9, 1)]),
        "kernel_size=4: one more on the left": (dict(kernel_size=4), [(5, 5)]),
        "kernel_size=3, dilation=3": (dict(kernel_size=3, dilation=3), [(4, 4), (0, 8)]),
        "kernel_size=6, stride=3: windows shared": (
            dict(kernel_size=6, stride=3),
            [(3, 3), (5, 4), (8, 9)],
        ),
        "kernel_size=5, is_causal=(True, False)": (
            dict(kernel_size=5, is_causal=(True, False)),
            [(6, 3), (1, 9)],
        ),
    }


def save_picture(path: pathlib.Path) -> None:
    """Draws windows on small maps, and the tiles that a block of queries visits."""
    panels = windows()
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.3), layout="constrained")
    for axis, (title, (options, queries)) in zip(axes.flat, panels.items()):
        mask = np.asarray(Neighborhood((SIDE, SIDE), **options).dense(SIDE**2))[0, 0]
        picture = np.ones((SIDE, SIDE, 3))
        shown: list[bytes] = []
        for color, query in zip(COLORS, queries):
            seen = mask[query[0] * SIDE + query[1]].reshape(SIDE, SIDE)
            if seen.tobytes() in shown:  # shared windows are shaded once
                continue
            shown.append(seen.tobytes())
            shade = np.array(to_rgb(color))
            picture[seen] *= 1 - 0.45 * (1 - shade)
        for color, query in zip(COLORS, queries):
            picture[query] = to_rgb(color)
        axis.imshow(picture, interpolation="nearest")
        _grid(axis, SIDE, 1)
        axis.set_title(title, fontsize=8, family="monospace")
    _visited(axes.flat[-1])
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def _visited(axis: Any) -> None:
    """Key tiles on a map of 64 x 64 tokens that one query tile meets."""
    spec = NeighborhoodSpec((64, 64), 32, q_tile=8, kv_tile=8)
    t = spec.q_layout.group_length
    lists = block_list(spec.mask(), t, t, block_q=64, block_kv=64)
    query = 8 * 3 + 4
    classes = lists.class_map()[0, 0, query].reshape(8, 8)
    classes[divmod(query, 8)] = 3
    shades = ListedColormap(["#ffffff", "#fdd49e", "#fc8d59", "#2166ac"])
    axis.imshow(np.repeat(np.repeat(classes, 8, 0), 8, 1), cmap=shades, vmin=0, vmax=3)
    _grid(axis, 64, 8)
    axis.set_title("64x64 map, kernel_size=32: key tiles of\none query tile: full, partial, empty",
                   fontsize=8)  # fmt: skip


def _grid(axis: Any, side: int, step: int) -> None:
    axis.set(xticks=np.arange(-0.5, side, step), yticks=np.arange(-0.5, side, step))
    axis.tick_params(length=0, labelbottom=False, labelleft=False)
    axis.grid(color="#cccccc", linewidth=0.5)


def table() -> str:
    """Pairs computed per visible pair, by block size, and tiles without a mask."""
    lines = [
        "| map | kernel_size | stride | visible | 128 x 128 | without a mask | 256 x 256 | "
        "without a mask |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, window, stride in CASES:
        spec = NeighborhoodSpec(shape, window, stride)
        cells = [" x ".join(map(str, shape)), str(window), str(stride)]
        cells.append(f"{spec.efficiency().ideal:.1%}")
        for size in (128, 256):
            found = spec.efficiency(size, size)
            cells += [f"{found.overhead:.2f}", f"{found.full:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the picture, and the table between its markers."""
    text = PAGE.read_text()
    head, tail = tables.around(text, "efficiency")
    PAGE.write_text(head + table() + tail)
    save_picture(PICTURE)


if __name__ == "__main__":
    main()
