"""Scheduled bundles of our TPU kernels beside JAX's splash_attention and flash_attention.

Everything is compiled in the same run, for one causal head in bfloat16, on a machine without a TPU.
A row is a kernel's hot region: what runs for one tile of scores. `bundles` and `spills` are means
over the tiles that a causal mask lists, `full` and `partial` those of each kind. `bound` is the
share of the time that the matrix units need at least; the products counted are those that the
kernel needs (forward 2, dq 3, dk and dv 4, all three at once 5, each tile x head width).

Bundles are no times: a `bound` above 100 % says that the units need longer than the bundles that
feed them take to issue. Compare kernels by bundles, and see in `MXU` how full the slots are.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import measure, tpu_bundles

WIDTH = 128
PARTIAL_COST = 1.25
"""Most bundles that a tile with a mask may take, relative to one without."""

MISSED = "MISSED"
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "fused": 5}
UNITS = {"MXU": "MATMUL", "VALU": "VALU", "EUP": "EUP", "load": "VLOAD", "store": "VSTORE"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A function that runs one or more kernels.

    Attributes:
      package: whose it is.
      function, arguments: what to compile.
      kernels: part of a kernel's name -> role, one of `PRODUCTS`.
      note: options worth a mention.
    """

    package: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernels: dict[str, str]
    note: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `python -m benchmarks tpu-static`."""
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v6e:2x2"])
    parser.add_argument("--tiles", type=int, nargs="+", default=[512, 1024], help="tokens")
    parser.add_argument("--length", type=int, default=8192, help="tokens (8192)")
    parser.add_argument("--only", nargs="+", default=["attnjax", "splash", "flash"])
    parser.add_argument("--out", type=pathlib.Path, help="folder for tpu_static.json (none)")


def run(
    *,
    topologies: Sequence[str],
    tiles: Sequence[int],
    length: int,
    only: Sequence[str],
    out: pathlib.Path | None = None,
) -> int:
    """Compiles every case and prints a table per topology; 1 when a kernel misses a goal.

    Args:
      topologies: as "v6e:2x2".
      tiles: sides of the tiles, in tokens.
      length: of the causal sequence, in tokens.
      only: libraries to compile.
      out: folder for all figures.
    """
    tpu_bundles.prepare_environment()
    rows, good = [], True
    for topology in topologies:
        found = []
        for tile in tiles:
            candidates = [c for c in _cases(tile, length) if c.package in only]
            for case in candidates:
                found += _measure(case, topology, tile, length)
        rows += found
        print(f"\n{topology}: causal, {length} tokens, width {WIDTH}, bfloat16\n")
        print(_table(found))
        verdict = _verdict(found)
        print(verdict)
        good = good and MISSED not in verdict
    print(_window_line())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "tpu_static.json").write_text(json.dumps(rows, indent=1))
    return 0 if good else 1


def _measure(case: Case, topology: str, tile: int, length: int) -> Iterator[dict[str, Any]]:
    generation = topology.split(":")[0]
    peak = tpu_bundles.PRODUCTS_PER_CYCLE.get(generation)
    blocks = length // tile
    partial_share = 2 / (blocks + 1)  # of the tiles that a causal mask lists
    for kernel, regions in tpu_bundles.kernels(topology, case.function, *case.arguments).items():
        role = next((r for part, r in case.kernels.items() if part in kernel), None)
        hot = tpu_bundles.hot_regions(regions)
        if role is None or not hot:
            continue
        full, partial = hot[0], hot[-1]
        mean = full.bundles * (1 - partial_share) + partial.bundles * partial_share
        needed = PRODUCTS[role] * tile * tile * WIDTH
        yield {
            "topology": topology,
            "tile": tile,
            "package": case.package,
            "note": case.note,
            "role": role,
            "full": full.bundles,
            "partial": partial.bundles,
            "mean": mean,
            "bound": needed / peak / mean if peak else None,
            "spills": full.spills * (1 - partial_share) + partial.spills * partial_share,
            "loop": sum(r.bundles for r in regions if r.depth),
            **{name: full.share(unit) for name, unit in UNITS.items()},
        }


def _cases(tile: int, length: int) -> Iterator[Case]:
    yield from _ours(tile, length)
    parts = [n for n in (256, 512, 1024) if n <= tile]
    for part in parts:
        yield from _splash(tile, length, part)
    yield from _flash(tile, length)


def _ours(tile: int, length: int) -> Iterator[Case]:
    import jax
    import jax.numpy as jnp

    from attnjax.masks import Causal
    from pallas_kernels.flash import flash_attention
    from pallas_kernels.flash.spec import FlashConfig

    x = jax.ShapeDtypeStruct((1, length, 1, WIDTH), jnp.bfloat16)

    def attend(q: Any, k: Any, v: Any, fused: bool = False) -> Any:
        config = FlashConfig(tile, tile, options=(("fused", fused),))
        return flash_attention(
            q, k, v, mask=Causal(), scale=WIDTH**-0.5, config=config, implementation="tpu"
        )[0]

    def gradients(q: Any, k: Any, v: Any, do: Any, fused: bool) -> Any:
        return jax.vjp(functools.partial(attend, fused=fused), q, k, v)[1](do)

    names = {"flash_forward": "forward", "flash_dqkv": "fused", "flash_dq": "dq"}
    names["flash_dkv"] = "dkv"
    yield Case("attnjax", attend, (x,) * 3, names)
    backward = {n: role for n, role in names.items() if role != "forward"}
    for fused in (False, True):
        yield Case("attnjax", functools.partial(gradients, fused=fused), (x,) * 4, backward)


def _splash(tile: int, length: int, part: int) -> Iterator[Case]:
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    x = jax.ShapeDtypeStruct((1, length, WIDTH), jnp.bfloat16)
    names = {"dkv": "dkv", "dq": "dq"}
    for fused in (None, False, True):
        sizes: dict[str, Any] = {"block_q": tile, "block_kv": tile, "block_kv_compute": part}
        sizes |= {"block_q_dkv": tile, "block_kv_dkv": tile, "block_kv_dkv_compute": part}
        if fused:
            sizes["use_fused_bwd_kernel"] = True
        else:
            sizes |= {"block_q_dq": tile, "block_kv_dq": tile}
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([masks.CausalMask((length, length))]),
            block_sizes=splash.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
        )

        def gradients(q: Any, k: Any, v: Any, do: Any, kernel: Any = kernel) -> Any:
            return jax.vjp(lambda *xs: kernel(*xs), q, k, v)[1](do)

        note = f"compute {part}"
        if fused is None:
            yield Case("splash", lambda *xs, f=kernel: f(*xs), (x,) * 3, {"fwd": "forward"}, note)
        else:
            roles = {"dkv": "fused"} if fused else names
            yield Case("splash", gradients, (x,) * 4, roles, note)


def _flash(tile: int, length: int) -> Iterator[Case]:
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    x = jax.ShapeDtypeStruct((1, 1, length, WIDTH), jnp.bfloat16)
    sizes = flash.BlockSizes(
        block_q=tile, block_k_major=tile, block_k=tile, block_b=1, block_q_major_dkv=tile,
        block_k_major_dkv=tile, block_k_dkv=tile, block_q_dkv=tile, block_k_major_dq=tile,
        block_k_dq=tile, block_q_dq=tile,
    )  # fmt: skip
    attend = functools.partial(
        flash.flash_attention, causal=True, sm_scale=WIDTH**-0.5, block_sizes=sizes
    )

    def gradients(q: Any, k: Any, v: Any, do: Any) -> Any:
        return jax.vjp(attend, q, k, v)[1](do)

    yield Case("flash", attend, (x,) * 3, {"": "forward"})
    yield Case("flash", gradients, (x,) * 4, {"dkv": "dkv", "dq": "dq"})


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["tile", "kernel", "package", "bundles", "full", "partial", "bound", *UNITS, "spills"]
    lines = [
        [
            str(r["tile"]),
            r["role"],
            f"{r['package']} {r['note']}".strip(),
            f"{r['mean']:.0f}",
            str(r["full"]),
            str(r["partial"]),
            "" if r["bound"] is None else f"{100 * r['bound']:.1f} %",
            *(f"{100 * r[unit]:.0f} %" for unit in UNITS),
            f"{r['spills']:.0f}",
        ]
        for r in sorted(rows, key=lambda r: (r["tile"], list(PRODUCTS).index(r["role"])))
    ]
    return measure.table(header, lines)


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Our bundles for a visited tile beside the best of splash_attention, and partial / full."""
    lines = []
    for tile in sorted({r["tile"] for r in rows}):
        for role in PRODUCTS:
            ours, theirs = (
                [r for r in rows if (r["tile"], r["role"], r["package"]) == (tile, role, package)]
                for package in ("attnjax", "splash")
            )
            if not ours or not theirs:
                continue
            best = min(theirs, key=lambda r: r["mean"])
            mine = ours[0]
            ratio, masked = mine["mean"] / best["mean"], mine["partial"] / mine["full"]
            met = ratio <= 1 and masked <= PARTIAL_COST and mine["spills"] <= best["spills"]
            lines.append(
                [
                    str(tile), role, f"{ratio:.3f}", f"{masked:.3f}",
                    f"{mine['spills']:.0f} / {best['spills']:.0f}", "met" if met else MISSED,
                ]
            )  # fmt: skip
    header = ["tile", "kernel", "bundles / best splash", "partial / full", "spills / its", "goals"]
    return "\n" + measure.table(header, lines) if lines else ""


def _window_line(length: int = 32768, window: int = 1024) -> str:
    """Tiles visited under a causal window, beside the fewest that hold every visible pair."""
    from attnjax.masks import Causal, Window
    from pallas_kernels.blocklist import block_list
    from pallas_kernels.flash.tpu_lists import make_walk

    parts = []
    for tile in (256, 512, 1024):
        lists = block_list(Causal() & Window(window), length, length, block_q=tile, block_kv=tile)
        ideal = sum(min(i, -(-(window - 1) // tile)) + 1 for i in range(length // tile))
        parts.append(f"{make_walk(lists.class_map()).steps} of {ideal} at {tile}")
    return f"\nwindow {window} at {length} tokens, tiles visited: " + ", ".join(parts)
