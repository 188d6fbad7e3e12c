"""Devices by name: what a compiler wants to know about them, and how much fast memory they have."""

from __future__ import annotations

import dataclasses
import re

from pallas_kernels.flash.gpu_arch import compute_capability


@dataclasses.dataclass(frozen=True)
class Machine:
    """One kind of device that can be compiled for.

    Attributes:
      name: as `compile_for` takes it.
      platform: "tpu", "cuda" or "cpu".
      topology: TPU, name and shape of a small slice.
      description: GPU, how the driver calls it.
      capability: GPU, compute capability (major, minor).
      multiprocessors: GPU.
      shared_bytes: GPU, shared memory that one thread block can have.
      memory_bytes: GPU, device memory.
    """

    name: str
    platform: str
    topology: str = ""
    description: str = ""
    capability: tuple[int, int] | None = None
    multiprocessors: int = 0
    shared_bytes: int = 0
    memory_bytes: int = 0

    @property
    def gpu_description(self) -> str:
        """What XLA asks about a GPU, in its own text format."""
        major, minor = self.capability or (0, 0)
        return _GPU_DESCRIPTION.format(
            # multiprocessors that serve graphics too hold fewer threads
            threads={(7, 5): 1024, (8, 9): 1536}.get((major, minor), 2048),
            cores=self.multiprocessors,
            shared=self.shared_bytes,
            memory=self.memory_bytes,
            major=major,
            minor=minor,
            description=self.description,
        )


_MACHINES = (
    Machine("v5e", "tpu", "v5e:2x2"),
    Machine("v5p", "tpu", "v5p:2x2x1"),
    Machine("v6e", "tpu", "v6e:2x2"),
    Machine("tpu7x", "tpu", "tpu7x:2x2x1"),
    Machine("T4", "cuda", "", "Tesla T4", (7, 5), 40, 64 << 10, 16 << 30),
    Machine("A100", "cuda", "", "NVIDIA A100-SXM4-80GB", (8, 0), 108, 163 << 10, 80 << 30),
    Machine("L4", "cuda", "", "NVIDIA L4", (8, 9), 58, 99 << 10, 24 << 30),
    Machine("H100", "cuda", "", "NVIDIA H100 80GB HBM3", (9, 0), 132, 227 << 10, 80 << 30),
    Machine("H200", "cuda", "", "NVIDIA H200", (9, 0), 132, 227 << 10, 141 << 30),
    Machine("B200", "cuda", "", "NVIDIA B200", (10, 0), 148, 227 << 10, 180 << 30),
    Machine("cpu", "cpu"),
)

TARGETS: dict[str, Machine] = {machine.name: machine for machine in _MACHINES}
"""Name -> machine, everything that `compile_for` knows."""

# Bandwidth, cache and clock enter the cost model alone, so one value, near an H100's, serves all.
_GPU_DESCRIPTION = """gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32
  threads_per_core_limit: {threads}  core_count: {cores}  fpus_per_core: 128
  shared_memory_per_block: 49152  shared_memory_per_block_optin: {shared}
  shared_memory_per_core: {shared}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{description}"
"""

# VMEM in bytes of one TPU core; device kinds as JAX reports them.
_TPU_MEMORY = (
    (r"TPU v[23]", 16 << 20),
    (r"TPU v4", 16 << 20),
    (r"TPU v5 lite|TPU v5e", 128 << 20),
    (r"TPU v5", 64 << 20),
    (r"TPU v6", 128 << 20),
    (r"TPU ?7", 64 << 20),
)

# Shared memory in bytes that one thread block can have, by compute capability.
_SHARED_MEMORY = {
    (7, 0): 96 << 10,
    (7, 5): 64 << 10,
    (8, 0): 163 << 10,
    (8, 6): 99 << 10,
    (8, 7): 163 << 10,
    (8, 9): 99 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (10, 3): 227 << 10,
    (12, 0): 99 << 10,
    (12, 1): 99 << 10,
}


@dataclasses.dataclass(frozen=True)
class FastMemory:
    """Memory next to the arithmetic of one core, in bytes.

    Attributes:
      tile_bytes: TPU, VMEM of a core; GPU, shared memory that a thread block can have.
    """

    tile_bytes: int


def fast_memory(platform: str, kind: str | None) -> FastMemory | None:
    """Fast memory of a device.

    Args:
      platform: "tpu", "cuda" or another, of which nothing is known.
      kind: device kind as JAX reports it; None or an unknown one counts as the device of its
        platform with the least memory that kernels are made for.

    Example: >>> fast_memory("tpu", "TPU v6 lite").tile_bytes >> 20
    128
    """
    if platform == "tpu":
        for pattern, tile in _TPU_MEMORY:
            if kind is not None and re.match(pattern, kind):
                return FastMemory(tile)
        return FastMemory(16 << 20)
    if platform == "cuda":
        capability = compute_capability(kind)
        return FastMemory(shared_memory(capability or (8, 9)))
    return None


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one thread block can have; the least for unknown GPUs."""
    return _SHARED_MEMORY.get(capability, 99 << 10)
