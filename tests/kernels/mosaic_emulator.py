"""The operations of the Hopper kernels, emulated on the host: what a GPU may do, in any order.

Warpgroups are threads of which one runs at a time; which one, and when a copy ends, is drawn at
random. Memory that a copy is filling holds NaN until it ends, so reading too early or overwriting
too early gives wrong results. Barriers count arrivals and know the parity of their phase alone, as
the hardware's do. Every deadlock, copy without an end and phase that was missed is an error.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash.mosaic_gpu_device import GROUP, ROWS, Barriers, Kernel


class Ref:
    """A view of memory, or of an array of barriers."""

    def __init__(self, array: np.ndarray):
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def at(self) -> Any:
        return _At(self)


class _At:
    def __init__(self, ref: Ref):
        self.ref = ref

    def __getitem__(self, index: Any) -> Ref:
        index = index if isinstance(index, tuple) else (index,)
        found = []
        for i, size in zip(index, self.ref.shape, strict=False):
            if hasattr(i, "size") and hasattr(i, "start"):
                start = int(i.start)
                assert 0 <= start <= start + i.size <= size, "slice out of bounds"
                found.append(slice(start, start + i.size))
            else:
                assert 0 <= int(i) < size, "index out of bounds"
                found.append(slice(int(i), int(i) + 1))
        view = self.ref.array[tuple(found)]
        # slices first, so that the result is a view; then the axes that were indexed go
        gone = tuple(
            n for n, i in enumerate(index) if not (hasattr(i, "size") and hasattr(i, "start"))
        )
        return Ref(view.reshape(-1)[:1] if view.dtype == object else np.squeeze(view, axis=gone))


class Barrier:
    """Arrivals and bytes that are still missing in the phase, and how many phases are over."""

    def __init__(self, arrivals: int):
        self.expected = self.missing = arrivals
        self.copies = self.phases = 0
        self.waited: dict[int, int] = {}

    def check(self) -> None:
        if self.missing == 0 and self.copies == 0:
            self.phases += 1
            self.missing = self.expected

    def arrive(self) -> None:
        assert self.missing > 0, "more arrivals than the phase expects"
        self.missing -= 1


class Emulator:
    """Runs a kernel block by block.

    Args:
      seed: of the order of events.
    """

    def __init__(self, seed: int = 0):
        self.random = random.Random(seed)

    def launch(self, kernel: Kernel, inputs: Any) -> dict[str, jax.Array]:
        """Results of a kernel by name."""
        memory = {name: np.array(x) for name, x in inputs.items()}
        for name, x in kernel.outputs.items():
            memory[name] = np.full(x.shape, np.nan, x.dtype)
        for point in itertools.product(*map(range, kernel.grid.values())):
            refs = {name: Ref(x) for name, x in memory.items()}
            for name, spec in kernel.scratch.items():
                if isinstance(spec, Barriers):
                    cells = np.empty(spec.count, object)
                    cells[:] = [Barrier(spec.arrivals) for _ in range(spec.count)]
                    refs[name] = Ref(cells)
                else:
                    refs[name] = Ref(np.full(spec.shape, _poison(spec.dtype), spec.dtype))
            _Block(kernel, refs, dict(zip(kernel.grid, point, strict=True)), self.random).run()
        return {name: jnp.asarray(memory[name]) for name in kernel.outputs}


class _Block:
    """One block of the grid: the operations of `pallas_kernels.flash.mosaic_gpu_device.Hopper`."""

    def __init__(self, kernel: Kernel, refs: Any, point: dict[str, int], order: random.Random):
        self.kernel, self.refs, self.point, self.random = kernel, refs, point, order
        self.copies: list[Callable[[], None]] = []  # under way
        self.local = threading.local()
        self.turn = threading.Semaphore(0)
        n = kernel.warpgroups
        self.go = [threading.Semaphore(0) for _ in range(n)]
        self.blocked: list[Callable[[], bool] | None] = [lambda: True] * n
        self.error: BaseException | None = None
        self.dirty = [False] * n
        self.sends = [0] * n

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._warpgroup, args=(i,), daemon=True)
            for i in range(self.kernel.warpgroups)
        ]
        for thread in threads:
            thread.start()
        while self.error is None:
            ready = [i for i, c in enumerate(self.blocked) if c is not None and c()]
            choices = ready + ["copy"] * min(len(self.copies), 2)
            if not choices:
                break
            choice = self.random.choice(choices)
            if choice == "copy":
                self.copies.pop(self.random.randrange(len(self.copies)))()
            else:
                self.go[choice].release()
                self.turn.acquire()
        if self.error is not None:
            raise self.error
        if any(c is not None for c in self.blocked):
            raise AssertionError("deadlock: every warpgroup waits and no copy is under way")

    def _warpgroup(self, i: int) -> None:
        self.local.i = i
        self.go[i].acquire()
        try:
            self.kernel.body(self, self.refs)
            assert self.sends[i] == 0, "a warpgroup ended before its copies"
        except BaseException as error:
            self.error = error
        self.blocked[i] = None
        self.turn.release()

    def _pause(self, condition: Callable[[], bool] = lambda: True) -> None:
        i = self.local.i
        self.blocked[i] = condition
        self.turn.release()
        self.go[i].acquire()

    def index(self, axis: str) -> Any:
        return jnp.int32(self.local.i if axis == GROUP else self.point[axis])

    def when(self, condition: Any, then: Callable[[], None]) -> None:
        if bool(condition):
            then()

    def loop(self, start: Any, stop: Any, body: Any, carry: Any) -> Any:
        for i in range(int(start), int(stop)):
            carry = body(jnp.int32(i), carry)
        return carry

    def registers(self, count: int, action: str) -> None:
        assert 24 <= count <= 240 and count % 8 == 0

    def fetch(self, source: Ref, target: Ref, barrier: Ref) -> None:
        cell = barrier.array[0]
        assert source.shape == target.shape, (source.shape, target.shape)
        target.array[...] = _poison(target.array.dtype)
        cell.arrive()
        cell.copies += 1

        def end() -> None:
            target.array[...] = source.array
            cell.copies -= 1
            cell.check()

        self.copies.append(end)
        self._pause()

    def commit(self) -> None:
        self.dirty[self.local.i] = False

    def send(self, source: Ref, target: Ref) -> None:
        i = self.local.i
        assert not self.dirty[i], "a copy starts from memory that was not committed"
        assert source.shape == target.shape, (source.shape, target.shape)
        self.sends[i] += 1

        def end() -> None:
            target.array[...] = source.array
            source.array[...] = _poison(source.array.dtype)
            self.sends[i] -= 1

        self.copies.append(end)
        self._pause()

    def drain(self) -> None:
        i = self.local.i
        self._pause(lambda: self.sends[i] == 0)

    def wait(self, barrier: Ref) -> None:
        cell, i = barrier.array[0], self.local.i
        waited = cell.waited.get(i, 0)
        # the hardware compares parities, so a phase that was missed looks like one to come
        self._pause(lambda: (cell.phases - waited) % 2 == 1)
        assert cell.phases == waited + 1, "a phase was missed"
        cell.waited[i] = waited + 1

    def arrive(self, barrier: Ref) -> None:
        cell = barrier.array[0]
        cell.arrive()
        cell.check()
        self._pause()

    def scalar(self, ref: Ref, index: Any) -> Any:
        return jnp.array(ref.array[tuple(int(i) for i in index)])

    def read_block(self, ref: Ref) -> Any:
        return jnp.array(ref.array)

    def write_block(self, ref: Ref, value: Any) -> None:
        assert ref.shape == value.shape, (ref.shape, value.shape)
        assert np.isnan(ref.array).all(), "a tile was written twice"
        ref.array[...] = np.asarray(value)

    def vector(self, ref: Ref, axis: int) -> Any:
        return jnp.array(ref.array)

    def store(self, ref: Ref, value: Any) -> None:
        self.dirty[self.local.i] = True
        ref.array[...] = np.asarray(value)

    def spread(self, vector: Any, shape: Any, axis: int) -> Any:
        return lax.broadcast_in_dim(vector, shape, (axis,))

    def full(self, shape: Any, value: Any, dtype: Any = jnp.float32) -> Any:
        return jnp.full(shape, value, dtype)

    def iota(self, shape: Any, axis: int) -> Any:
        return lax.broadcasted_iota(jnp.int32, shape, axis)

    def products(self, *pairs: Any) -> list[Any]:
        self._pause()
        return [_dot(jnp.array(a.array), jnp.array(b.array).T) for a, b in pairs]

    def add_product(self, total: Any, a: Any, b: Any) -> Any:
        self._pause()
        assert a.shape[0] == ROWS
        return total + _dot(a, jnp.array(b.array))


def _dot(a: Any, b: Any) -> Any:
    return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)


def _poison(dtype: Any) -> Any:
    return np.nan if jnp.issubdtype(dtype, jnp.floating) else -(2**29)
