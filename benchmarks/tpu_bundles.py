"""Reads the instruction bundles that the TPU compiler schedules, on a machine without a TPU.

libtpu compiles a function ahead of time for a named topology and writes the final bundles of every
kernel, with the number of slots of each functional unit that every bundle fills. A bundle issues in
one cycle when nothing stalls: counts are exact and repeatable, but see neither stalls nor copies.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PRODUCTS_PER_CYCLE = {"v5e": 4 * 128 * 128, "v6e": 2 * 256 * 256}
"""Multiply-adds that the matrix units of a core do in a cycle, by generation."""

_DUMP = pathlib.Path(tempfile.gettempdir()) / f"tpu_bundles_{os.getpid()}"
_LINE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+(?P<mark>LH|LB|LE|PB|PF|CT)?\s*:\s*(?P<depth>>*)")
_LISTING = re.compile(r"(?P<key>\d+-(?P<kernel>[^<].*?))-\d+-final_bundles\.txt$")


@dataclasses.dataclass
class Region:
    """Bundles between two targets of jumps.

    Attributes:
      depth: number of loops around it.
      bundles: how many.
      used: unit -> slots filled. room: unit -> slots of one bundle.
    """

    depth: int
    room: dict[str, int]
    bundles: int = 0
    used: dict[str, int] = dataclasses.field(default_factory=dict)

    def share(self, unit: str) -> float:
        """Share of a unit's slots that are filled."""
        slots = self.room.get(unit, 0) * self.bundles
        return self.used.get(unit, 0) / slots if slots else 0.0

    @property
    def spills(self) -> int:
        """Registers stored to memory and loaded back for want of registers."""
        return self.used.get("VLOAD:FILL", 0) + self.used.get("VSTORE:SPILL", 0)


def prepare_environment() -> None:
    """Sets what libtpu reads when it is loaded; call it before JAX is imported."""
    _DUMP.mkdir(exist_ok=True)
    flags = f"--xla_jf_dump_to={_DUMP} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")


def kernels(
    topology: str, function: Callable[..., Any], *arguments: Any
) -> dict[str, list[Region]]:
    """Regions of every kernel of a compiled function, by the kernel's name.

    Args:
      topology: as libtpu names it, such as "v6e:2x2".
      function: what to compile, for one device.
      arguments: `jax.ShapeDtypeStruct`s.
    """
    import jax
    from jax.experimental import topologies

    mesh = jax.sharding.Mesh(topologies.get_topology_desc(topology, "tpu").devices[:1], "x")
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed) for x in arguments]
    for path in _files("*"):
        path.unlink()
    jax.jit(function).lower(*structs).compile()
    found = {}
    for path in _files("*-final_bundles.txt"):
        match = _LISTING.match(path.name)
        if match is None:
            continue
        slots = _files(f"{match['key']}-*-final_hlo-static-per-bundle-utilization.txt")
        if slots:
            found[match["kernel"]] = list(_regions(path, slots[0]))
    return found


def hot_regions(regions: Sequence[Region]) -> list[Region]:
    """The regions that do the matrix products, those with the fewest vector operations first.

    A kernel with a region for full tiles and one for partial ones gives them in this order.
    """
    most = max((r.used.get("MATMUL", 0) for r in regions), default=0)
    hot = [r for r in regions if r.used.get("MATMUL", 0) > most / 2]
    return sorted(hot, key=lambda r: r.used.get("VALU", 0))


def _files(pattern: str) -> list[pathlib.Path]:
    return [pathlib.Path(p) for p in sorted(glob.glob(str(_DUMP / pattern)))]


def _regions(listing: pathlib.Path, slots: pathlib.Path) -> Iterator[Region]:
    text = [line for line in slots.read_text().splitlines() if line.strip()]
    units = [name.strip() for name in text[1].split(",")]
    room = dict(zip(units, map(int, text[2].split()), strict=True))
    filled = iter(text[4:])
    region = None
    for line in listing.read_text().splitlines():
        match = _LINE.match(line)
        if match is None or "{" not in line:
            continue
        depth = len(match["depth"])
        if region is None or match["mark"] or depth != region.depth:
            if region is not None:
                yield region
            region = Region(depth, room)
        region.bundles += 1
        for unit, count in zip(units, map(int, next(filled, "").split()), strict=False):
            region.used[unit] = region.used.get(unit, 0) + count
    if region is not None:
        yield region
