"""The Mosaic GPU operations that the Hopper kernels are written in, and nothing more.

The kernels take this layer as an argument, so that a test can run them on an emulation of it:
asynchronous copies, barriers with phases and warpgroups in any order, on a host without a GPU.

A warpgroup is 128 threads that execute one program. A tile of 64 rows lies in the registers of
one warpgroup in the layout of `wgmma`'s accumulator; one value per row or per column of a tile is
a vector in the same layout reduced along the other axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat

ROWS = 64
"""Rows of a warpgroup's tile: those of one wgmma."""

GROUP = "warpgroup"


class Shared(NamedTuple):
    """A shared-memory buffer. `tiled` is the form that wgmma reads: 8 x 64 tiles, 128 B swizzle."""

    shape: tuple[int, ...]
    dtype: Any
    tiled: bool = False

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        size = jnp.dtype(self.dtype).itemsize
        for n in self.shape:
            size *= n
        return size


class Barriers(NamedTuple):
    """`count` barriers; each opens once `arrivals` warpgroups or copies have arrived."""

    count: int
    arrivals: int


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel to launch.

    Attributes:
      body: `body(hw, refs)`, refs by name: inputs, outputs and scratch.
      outputs: name -> `jax.ShapeDtypeStruct`.
      scratch: name -> `Shared` or `Barriers`.
      grid: name -> size of each axis of the grid, the last one changing fastest.
      warpgroups: per block of the grid.
      approximate: whether exp2, log2 and division may be the fast instructions.
      name: shown in profiles.
    """

    body: Callable[[Any, dict[str, Any]], None]
    outputs: Mapping[str, jax.ShapeDtypeStruct]
    scratch: Mapping[str, Shared | Barriers]
    grid: Mapping[str, int]
    warpgroups: int
    approximate: bool
    name: str


class Hopper:
    """The operations on the hardware."""

    rows = ROWS

    def launch(self, kernel: Kernel, inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Results of a kernel by name."""
        names = (*inputs, *kernel.outputs, *kernel.scratch)

        def body(*refs: Any) -> None:
            kernel.body(self, dict(zip(names, refs, strict=True)))

        body.__name__ = kernel.name
        out = plgpu.kernel(
            body,
            out_type=list(kernel.outputs.values()),
            scratch_types=[_scratch(s) for s in kernel.scratch.values()],
            grid=tuple(kernel.grid.values()),
            grid_names=tuple(kernel.grid),
            num_threads=kernel.warpgroups,
            thread_name=GROUP,
            compiler_params=plgpu.CompilerParams(approx_math=kernel.approximate),
        )(*inputs.values())
        return dict(zip(kernel.outputs, out, strict=True))

    def index(self, axis: str) -> jax.Array:
        """Index of this block on an axis of the grid, or of this warpgroup (`GROUP`)."""
        return lax.axis_index(axis)

    def when(self, condition: Any, then: Callable[[], None]) -> None:
        """Runs `then` where the condition holds."""
        pl.when(condition)(then)

    def loop(self, start: Any, stop: Any, body: Callable[[Any, Any], Any], carry: Any) -> Any:
        """Repeats carry = body(i, carry) for i = start .. stop - 1."""
        return lax.fori_loop(start, stop, body, carry)

    def registers(self, count: int, action: Literal["increase", "decrease"]) -> None:
        """Gives registers back ("decrease") or takes them ("increase"); 24 to 240 per thread."""
        plgpu.set_max_registers(count, action=action)

    def fetch(self, source: Any, target: Any, barrier: Any) -> None:
        """Starts a copy from global to shared memory; its end is one arrival at the barrier."""
        plgpu.copy_gmem_to_smem(source, target, barrier)

    def commit(self) -> None:
        """Makes this warpgroup's writes to shared memory visible to copies that start after it."""
        plgpu.commit_smem()

    def send(self, source: Any, target: Any) -> None:
        """Starts a copy from shared to global memory."""
        plgpu.copy_smem_to_gmem(source, target)

    def drain(self) -> None:
        """Waits until this warpgroup's `send`s have ended."""
        plgpu.wait_smem_to_gmem(0)

    def wait(self, barrier: Any) -> None:
        """Waits for the barrier's next phase; every waiting warpgroup must wait for each phase."""
        plgpu.barrier_wait(barrier)

    def arrive(self, barrier: Any) -> None:
        """One arrival of this warpgroup."""
        plgpu.barrier_arrive(barrier)

    def scalar(self, ref: Any, index: tuple[Any, ...]) -> jax.Array:
        """One element of an array in global memory."""
        return ref[index]

    def read_block(self, ref: Any) -> jax.Array:
        """A tile straight from global memory; every thread loads the entries that it holds."""
        return plgpu.layout_cast(compat.mosaic_gpu_load(ref), plgpu.Layout.WGMMA)

    def write_block(self, ref: Any, value: jax.Array) -> None:
        """Writes a tile straight to global memory."""
        ref[...] = value

    def vector(self, ref: Any, axis: int) -> jax.Array:
        """A vector in shared memory: of rows (axis 0) or of columns (axis 1) of a tile."""
        return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(1 - axis))

    def store(self, ref: Any, value: jax.Array) -> None:
        """Writes a tile or a vector to shared memory."""
        ref[...] = value

    def spread(self, vector: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
        """The tile whose entries are those of a vector of its rows (axis 0) or columns (1)."""
        return plgpu.layout_cast(lax.broadcast_in_dim(vector, shape, (axis,)), plgpu.Layout.WGMMA)

    def full(self, shape: tuple[int, ...], value: Any, dtype: Any = jnp.float32) -> jax.Array:
        """A tile, or a vector of rows, of one value."""
        layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
        return plgpu.layout_cast(jnp.full(shape, value, dtype), layout)

    def iota(self, shape: tuple[int, int], axis: int) -> jax.Array:
        """int32 tile of the indices along an axis."""
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    def products(self, *pairs: tuple[Any, Any]) -> list[jax.Array]:
        """Products a bᵀ for pairs of shared-memory tiles a [64, k], b [n, k], issued together."""

        def run(*accumulators: Any) -> list[jax.Array]:
            for accumulator, (a, b) in zip(accumulators, pairs, strict=True):
                plgpu.wgmma(accumulator, a, b.transpose((1, 0)))
            # reading an accumulator waits until no product is under way, so after this both
            # operands may be overwritten
            return [accumulator[...] for accumulator in accumulators]

        shapes = [(a.shape[0], b.shape[0]) for a, b in pairs]
        return pl.run_scoped(run, *[plgpu.WGMMAAccumulatorRef(s, jnp.float32) for s in shapes])

    def add_product(self, total: jax.Array, a: jax.Array, b: Any) -> jax.Array:
        """The sum total + a b for a tile a [64, k] in registers and b [k, n] in shared memory."""
        run: Any = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))
        return run(plgpu.WGMMAAccumulatorRef.init(total))


def _scratch(spec: Shared | Barriers) -> Any:
    if isinstance(spec, Barriers):
        return plgpu.Barrier(num_barriers=spec.count, num_arrivals=spec.arrivals)
    transforms = ()
    if spec.tiled:
        lanes = 128 // jnp.dtype(spec.dtype).itemsize
        transforms = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(spec.shape, spec.dtype, transforms=transforms)
