"""What compiled programs say about their kernels: custom calls, memory, registers, spills.

Three sources are read: the text of the optimized program, the PTX that compilers of NVIDIA kernels
write, and the listing of scheduled instructions that the TPU compiler writes.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence

ROUTES = {
    "tpu_custom_call": "mosaic_tpu",
    "__gpu$xla.gpu.triton": "triton",
    "triton_kernel_call": "triton",
    "triton_kernel_call_ffi": "triton",
    "mosaic_gpu_v2": "mosaic_gpu",
}
"""Custom call in the program -> the compiler of kernels that it belongs to."""


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One kernel of a compiled program; None where the compiler does not tell.

    Attributes:
      name: of the kernel; TPU names end in the number of the instruction.
      route: "mosaic_tpu", "triton" or "mosaic_gpu".
      vmem_bytes: TPU, VMEM of its windows, scratch and spills.
      smem_bytes: TPU, scalar memory of prefetched operands and scratch; GPU, shared memory of a
        thread block.
      registers: GPU, of one thread.
      spills: TPU, vector registers stored and filled in the listing; GPU, bytes stored and loaded
        by one thread.
      matrix_instructions: GPU, number of matrix instructions in the listing, by kind.
      bundles: TPU, instruction bundles in the listing.
    """

    name: str
    route: str
    vmem_bytes: int | None = None
    smem_bytes: int | None = None
    registers: int | None = None
    spills: int | None = None
    matrix_instructions: dict[str, int] | None = None
    bundles: int | None = None


def custom_calls(program: str) -> list[tuple[str, str, str]]:
    """Kernels in the text of an optimized program: [(route, name, line of the program)]."""
    found = []
    for line in program.splitlines():
        target = re.search(r'custom_call_target="([^"]+)"', line)
        if target is None or target[1] not in ROUTES:
            continue
        instruction = re.search(r"%?([\w.\-]+) = ", line)
        given = re.search(r'\bname = "([^"]+)"', line)
        name = given or instruction
        found.append((ROUTES[target[1]], name[1] if name else "?", line))
    return found


def tpu_kernel(name: str, line: str, listing: Sequence[pathlib.Path]) -> KernelReport:
    """Report of one TPU kernel.

    Args:
      name: of its instruction.
      line: the instruction in the optimized program.
      listing: files that the compiler wrote about the program, none when it was not asked to.
    """
    # memory space 1 is VMEM; "used_" is what the kernel took, not what it may take
    used = re.search(r'"used_scoped_memory_configs":\[([^\]]*)\]', line)
    sizes = re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used[1] if used else "")
    mine = [p for p in listing if re.match(rf"\d+-{re.escape(name)}-\d+-", p.name)]
    spills, bundles = _spills(mine)
    return KernelReport(
        name=name,
        route="mosaic_tpu",
        vmem_bytes=sum(map(int, sizes)) if sizes else None,
        smem_bytes=_scalar_memory(mine),
        spills=spills,
        bundles=bundles,
    )


def _spills(listing: Iterable[pathlib.Path]) -> tuple[int | None, int | None]:
    """Spilled vector registers and number of bundles from the table of units per bundle."""
    for path in listing:
        if not path.name.endswith("final_hlo-static-per-bundle-utilization.txt"):
            continue
        lines = [line for line in path.read_text().splitlines() if line.strip()]
        units = [unit.strip() for unit in lines[1].split(",")]
        rows = [line.split() for line in lines[4:]]
        columns = [i for i, unit in enumerate(units) if unit in ("VLOAD:FILL", "VSTORE:SPILL")]
        return sum(int(row[i]) for row in rows for i in columns), len(rows)
    return None, None


def _scalar_memory(listing: Iterable[pathlib.Path]) -> int | None:
    for path in listing:
        if path.name.endswith("-original.txt"):
            lines = [x for x in path.read_text().splitlines() if "#allocation" in x]
            lines = [x for x in lines if "space=smem" in x and "fixed_abs" not in x]
            sizes = [re.search(r"size = (0x[0-9a-f]+)", x) for x in lines]
            return sum(int(size[1], 16) for size in sizes if size)
    return None


def gpu_kernels(calls: Sequence[tuple[str, str, str]], folder: pathlib.Path) -> list[KernelReport]:
    """Reports of the NVIDIA kernels of a program.

    Args:
      calls: from `custom_calls`.
      folder: where XLA wrote what it compiled, and Mosaic into the folder `mosaic` in it.
    """
    shared: dict[str, int] = {}
    for path in folder.glob("*thunk_sequence.txt"):
        pairs = re.findall(r"(\S+) grid: .*shared_memory: (\d+) bytes", path.read_text())
        shared |= {name: int(size) for name, size in pairs}
    triton = {r.name: r for p in sorted(folder.glob("*.ptx")) for r in _listed(p, "triton")}
    mosaic = [r for p in sorted(folder.glob("mosaic/*.ptx")) for r in _listed(p, "mosaic_gpu")]
    reports = []
    for route, name, line in calls:
        if route == "triton":
            found = triton.get(name, KernelReport(name, route))
            reports.append(dataclasses.replace(found, smem_bytes=shared.get(name)))
        else:
            reports.append(_mosaic_kernel(line, mosaic))
    return reports


_mosaic_seen: dict[str, KernelReport] = {}


def _mosaic_kernel(line: str, listed: list[KernelReport]) -> KernelReport:
    """Report of one Mosaic call; takes it out of `listed`.

    Mosaic compiles, and lists, a kernel once per process: reports are kept by the kernel's hash.
    """
    key = re.search(r'kernel_hash = "([^"]+)"', line)
    if key and key[1] in _mosaic_seen:
        return _mosaic_seen[key[1]]
    # the last part of the path is the primitive, the one before it the kernel's name
    path = re.search(r'op_name="(?:[^"]*/)?([^"/]+)/[^"/]+"', line)
    name = path[1] if path else "?"
    found = next((r for r in listed if r.name == name), None)
    if found is None:
        return KernelReport(name, "mosaic_gpu")
    listed.remove(found)
    if key:
        _mosaic_seen[key[1]] = found
    return found


def _listed(path: pathlib.Path, route: str) -> list[KernelReport]:
    """Kernels of one PTX file, without the shared memory that Triton asks for at launch."""
    text = path.read_text()
    usage = ptxas_usage(path, text)
    found = []
    for name, body in _entries(text):
        registers, spills = usage.get(name, (None, None))
        report = KernelReport(
            name=name.removesuffix("_mosaic_gpu_kernel"),
            route=route,
            smem_bytes=_mosaic_shared_memory(path) if route == "mosaic_gpu" else None,
            registers=registers,
            spills=spills,
            matrix_instructions=_matrix_instructions(body),
        )
        found.append(report)
    return found


def ptxas_usage(path: pathlib.Path, text: str) -> dict[str, tuple[int | None, int]]:
    """Registers per thread and bytes of spills of each kernel in a PTX file, {} without ptxas."""
    target = re.search(r"^\.target (\S+)", text, re.MULTILINE)
    ptxas = shutil.which("ptxas")
    if ptxas is None or target is None:
        return {}
    command = [ptxas, "-v", f"-arch={target[1].rstrip(',')}", str(path), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True)
    usage = {}
    for part in re.split(r"(?=Compiling entry function)", done.stderr)[1:]:
        name = re.search(r"Compiling entry function '([^']+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        spilled = re.findall(r"(\d+) bytes spill", part)
        if name:
            usage[name[1]] = (int(registers[1]) if registers else None, sum(map(int, spilled)))
    return usage


def _entries(text: str) -> list[tuple[str, str]]:
    """Kernels of a PTX file and the text of each."""
    parts = re.split(r"\.entry\s+", text)[1:]
    return [(re.split(r"[\s(]", part, maxsplit=1)[0], part) for part in parts]


def _matrix_instructions(text: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for kind in re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|wmma\.mma)\b", text):
        counts[kind] = counts.get(kind, 0) + 1
    return counts


def _mosaic_shared_memory(listing: pathlib.Path) -> int | None:
    """Shared memory that a Mosaic kernel asks for when it is launched."""
    passes = listing.with_name(listing.stem + ".mlir-passes.log")
    text = passes.read_text() if passes.exists() else ""
    launch = re.search(r"dynamic_shared_memory_size (%\w+)", text)
    if launch is None:
        return None
    values = re.findall(rf"{launch[1]} = arith\.constant (\d+) : i32", text[: launch.start()])
    return int(values[-1]) if values else None
