"""Pictures of masks: tiles by class, and single elements where they are large enough to see."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pallas_kernels.blocklist import block_list
from pallas_kernels.maskprogram import EMPTY, FULL, PARTIAL, MaskProgram

# a sequential blue that stays readable in gray: nothing, hidden part of a partial tile, shown, full
_COLORS = {"empty": "#f3f5f7", "hidden": "#d6e6f2", "partial": "#5fa2ce", "full": "#1f5a8a"}
_ELEMENTS_UP_TO = 256  # tokens
_MOST_PANELS = 16


def plot_mask(
    mask: MaskProgram,
    T: int,
    S: int | None = None,
    ax: Any = None,
    *,
    block: int | tuple[int, int] | None = None,
) -> Any:
    """Draws which keys (columns) each query (row) may attend to.

    Tiles that a kernel skips are pale, tiles that need no mask are dark, and tiles in between show
    their elements when T and S are at most 256, else one middle shade. A mask that differs by head
    gives a panel per head; of a batch the first row is drawn.

    Args:
      mask: a static mask.
      T: number of queries. S: number of keys, T when None.
      ax: matplotlib Axes to draw into (panels become insets), or None for a new figure.
      block: tile size in tokens, or (queries, keys); None: about sixteen tiles per side.

    Returns:
      The Axes, or a list with the Axes of each panel.

    Raises:
      ValueError: when the mask holds traced arrays.
    """
    from matplotlib import pyplot as plt

    S = T if S is None else S
    if not mask.is_static:
        raise ValueError(f"plot: {mask!r} holds traced arrays; call it outside of jax.jit.")
    heads = min(mask.num_heads or 1, _MOST_PANELS)
    columns = math.isqrt(heads - 1) + 1 if ax is not None or heads == 9 else min(heads, 4)
    rows = -(-heads // columns)
    if ax is None:
        width, height = (4.6, 4.9) if heads == 1 else (2.6 * columns, 2.75 * rows + 0.9)
        figure, axes = plt.subplots(
            rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
        )
        panels = list(axes.ravel())
    elif heads == 1:
        figure, panels = ax.figure, [ax]
    else:
        figure, panels = ax.figure, []
        ax.set_axis_off()
        for i in range(heads):
            x, y = (i % columns) / columns, 1 - (i // columns + 1) / rows
            panels.append(ax.inset_axes((x, y, 0.86 / columns, 0.8 / rows)))
    for panel in panels[heads:]:
        panel.set_visible(False)

    block_q, block_kv = _tile_size(T, S, block)
    classes = block_list(mask, T, S, block_q=block_q, block_kv=block_kv).class_map()[0]
    for head, panel in enumerate(panels[:heads]):
        shown = classes[head % len(classes)]
        _draw_panel(panel, mask, shown, T, S, block_q, block_kv, head)
        if heads > 1:
            panel.set_title(f"head {head}", fontsize=9)
            if head % columns:
                panel.set(ylabel=None, yticklabels=[])
            if head + columns < heads:
                panel.set(xlabel=None, xticklabels=[])
    title = _wrapped(repr(mask))
    if heads == 1:
        panels[0].set_title(title, fontsize=10, family="monospace")
        _add_legend(panels[0], loc="upper center", bbox_to_anchor=(0.5, -0.14))
    elif ax is None:
        figure.suptitle(title, fontsize=10, family="monospace")
        _add_legend(figure, loc="outside lower center")
    else:
        ax.set_title(title, fontsize=10, family="monospace")
    return panels[0] if heads == 1 else panels[:heads]


def _draw_panel(ax: Any, mask: Any, classes: Any, T: int, S: int, bq: int, bk: int, head: int):
    from matplotlib.colors import ListedColormap

    if max(T, S) <= _ELEMENTS_UP_TO:
        classes = classes.repeat(bq, axis=0).repeat(bk, axis=1)[:T, :S]
        q, k = np.indices((T, S), sparse=True)
        zero = np.zeros((), q.dtype)
        visible = np.broadcast_to(np.asarray(mask.predicate(zero, zero + head, q, k)), (T, S))
        # 0 empty, 1 hidden inside a partial tile, 2 shown there, 3 full
        image = np.where(classes == FULL, 3, np.where(classes == PARTIAL, 1 + visible, 0))
    else:
        # the three classes skip the shade of hidden elements
        image = classes + (classes > EMPTY)
    ax.imshow(
        image,
        cmap=ListedColormap(list(_COLORS.values())),
        vmin=0,
        vmax=3,
        extent=(0, S, T, 0),
        interpolation="nearest",
        aspect="equal" if T == S else "auto",
    )
    if max(T / bq, S / bk) <= 64:
        lines = {"color": "white", "linewidth": 0.8}
        ax.hlines(np.arange(bq, T, bq), 0, S, **lines)
        ax.vlines(np.arange(bk, S, bk), 0, T, **lines)
    ax.set_xlabel("key (tokens)")
    ax.set_ylabel("query (tokens)")
    ax.tick_params(length=2, labelsize=8)
    for side in ax.spines.values():
        side.set_color("#9aa4ad")


def _add_legend(owner: Any, **place: Any) -> None:
    from matplotlib.patches import Patch

    label = {"empty": "skipped", "partial": "partial tile", "full": "full tile"}
    owner.legend(
        handles=[
            Patch(facecolor=_COLORS[n], edgecolor="#9aa4ad", label=t) for n, t in label.items()
        ],
        ncols=3,
        fontsize=8,
        frameon=False,
        handlelength=1.2,
        **place,
    )


def _tile_size(T: int, S: int, block: int | tuple[int, int] | None) -> tuple[int, int]:
    if block is not None:
        return (block, block) if isinstance(block, int) else block
    # the power of two that gives 9 to 16 tiles along the longer side
    size = max(1, 1 << max(0, (max(T, S) - 1).bit_length() - 4))
    return size, size


def _wrapped(text: str, width: int = 58) -> str:
    import textwrap

    lines = textwrap.wrap(text, width)
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], lines[2][: width - 4] + " ..."])
