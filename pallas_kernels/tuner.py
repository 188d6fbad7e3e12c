"""Measures tile sizes on the device at hand and writes them where `pallas_kernels.tune` finds them.

    result = tune_flash(query, key, value, mask=mask)
    result.save("my_tuning.json")          # then ATTNJAX_TUNING=my_tuning.json, or tune.load(...)

Every candidate is compiled and timed on the arrays given; those that the kernel or the compiler
refuses are left out, with the reason.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import tune
from pallas_kernels.decode import DecodeConfig, decode_attention
from pallas_kernels.flash import FlashConfig, flash_attention
from pallas_kernels.linear import LinearSpec, Operands, linear_recurrence
from pallas_kernels.machines import fast_memory
from pallas_kernels.maskprogram import MaskProgram
from pallas_kernels.tune import Entry

STEPS = 10
"""Calls inside one timed program, so that the host's part does not count."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What tuning one call found.

    Attributes:
      device: device kind.
      entry: the best choice.
      timed: (what was timed, config, milliseconds) of every candidate; the first of each kind
        leaves the sizes to the body.
      refused: (config, reason) of those that did not compile.
    """

    device: str
    entry: Entry
    timed: tuple[tuple[str, Mapping[str, Any], float], ...]
    refused: tuple[tuple[Mapping[str, Any], str], ...]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Adds the entry to a tuning file, in place of one of the same class."""
        about = {"jax": jax.__version__, "measured": datetime.date.today().isoformat()}
        tune.write(pathlib.Path(path), self.device, [self.entry], about)


def device_loop(function: Callable[..., Any], steps: int) -> Callable[..., jax.Array]:
    """A jitted function that calls `function` a number of times and gives something to wait for.

    One entry of a call's first argument depends on the result before it, so that none is left out.
    """

    @jax.jit
    def loop(first: jax.Array, *rest: Any) -> jax.Array:
        def step(_: Any, x: jax.Array) -> jax.Array:
            # the barrier keeps the compiler from computing the one entry that is read, alone
            leaves = jax.lax.optimization_barrier(jax.tree.leaves(function(x, *rest)))
            read = jnp.stack([leaf.reshape(-1)[0].astype(jnp.float32) for leaf in leaves])
            # zero, but the compiler cannot know
            zero = jnp.where(jnp.isfinite(read).all(), 0.0, 1.0).astype(x.dtype)
            return x.at[(0,) * x.ndim].add(zero)

        return jax.lax.fori_loop(0, steps, step, first)

    return loop


def milliseconds(function: Callable[..., Any], args: Sequence[Any], repeats: int = 5) -> float:
    """Median time of one call on the device, of `repeats` rounds of `STEPS` calls."""
    loop = device_loop(function, STEPS)
    jax.block_until_ready(loop(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(loop(*args))
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds) / STEPS


def tune_flash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: MaskProgram,
    implementation: str | None = None,
    candidates: Iterable[FlashConfig] | None = None,
    backward: bool = True,
    repeats: int = 5,
    **options: Any,
) -> Result:
    """Best tile sizes of `flash_attention`, forward first, then dq and dkv one after the other.

    Args:
      query, key, value, mask: of a typical call.
      implementation: body to tune; None is the platform's.
      candidates: configs to try (block_q, block_kv, options count); None makes a list that fits the
        device's memory.
      backward: whether to tune the backward kernels too.
      repeats: timed rounds.
      **options: other arguments of `flash_attention`.
    """
    options = {"scale": query.shape[3] ** -0.5} | options
    body = _body(implementation)
    tried = list(candidates or flash_candidates(body, query, value))
    args = (query, key, value)

    def forward(config: FlashConfig) -> Callable[..., Any]:
        return lambda q, k, v: flash_attention(
            q, k, v, mask=mask, config=config, implementation=implementation, **options
        )[0]

    def both(config: FlashConfig) -> Callable[..., Any]:
        run = forward(config)
        return jax.grad(lambda *x: jnp.sum(run(*x).astype(jnp.float32)), argnums=(0, 1, 2))

    search = _Search(args, repeats)
    best = search.best("forward", tried, forward, FlashConfig())
    if backward:
        for name in ("dq", "dkv"):

            def placed(c: FlashConfig, name: str = name, base: FlashConfig = best) -> FlashConfig:
                sizes = {f"block_q_{name}": c.block_q, f"block_kv_{name}": c.block_kv}
                return dataclasses.replace(base, **sizes)

            best = search.best(f"backward {name}", tried, both, best, placed)
    config = _fields(best)
    return search.result("flash", body, query, key, value, config)


def flash_candidates(body: str, query: Any, value: Any) -> list[FlashConfig]:
    """Tile sizes worth trying for a body: those whose tiles fit the memory next to the arithmetic.

    Args:
      body: "tpu", "triton", "mosaic_gpu" or "xla".
      query, value: of the call.
    """
    sizes: Sequence[int]
    knobs: list[dict[str, int]] = [{}]
    if body == "tpu":
        sizes = (128, 256, 512, 1024, 2048)
    elif body == "triton":
        sizes = (32, 64, 128)
        knobs = [{"num_warps": w, "num_stages": s} for w in (4, 8) for s in (2, 3)]
    elif body == "mosaic_gpu":
        sizes = (64, 128)
    else:
        sizes = (64, 128, 256)
    d, e, item = query.shape[3], value.shape[3], jnp.dtype(query.dtype).itemsize
    device = jax.devices()[0]
    platform = "cuda" if device.platform == "gpu" else device.platform
    memory = fast_memory(platform, device.device_kind)
    found = []
    for block_q, block_kv, knob in itertools.product(sizes, sizes, knobs):
        buffers = knob.get("num_stages", 2)
        need = item * (block_q * d + buffers * block_kv * (d + e))
        if body == "tpu":  # windows of outputs, scores and weights in float32, a copy of them
            need += item * block_q * e + 4 * block_q * (3 * block_kv + e)
        if memory is None or need <= memory.tile_bytes:
            found.append(FlashConfig(block_q, block_kv, options=tuple(sorted(knob.items()))))
    return found


def tune_decode(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    implementation: str | None = None,
    candidates: Iterable[DecodeConfig] | None = None,
    repeats: int = 5,
    **options: Any,
) -> Result:
    """Best sizes of `decode_attention`; arguments as `tune_flash`."""
    if candidates is None:
        blocks, splits = (64, 128, 256, 512), (1, 2, 4, 8, 16, 32)
        candidates = [DecodeConfig(b, n) for b, n in itertools.product(blocks, splits)]

    def forward(config: DecodeConfig) -> Callable[..., Any]:
        return lambda q, k, v: decode_attention(
            q, k, v, config=config, implementation=implementation, **options
        )

    search = _Search((query, key, value), repeats)
    best = search.best("forward", list(candidates), forward, DecodeConfig())
    body = _body(implementation)
    return search.result("decode", body, query, key, value, _fields(best))


def tune_linear(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    decay: jax.Array | None = None,
    *,
    implementation: str | None = None,
    candidates: Iterable[int] = (32, 64, 128, 256),
    repeats: int = 5,
) -> Result:
    """Best chunk size of `linear_recurrence`, forward and backward together."""

    def both(chunk: int | None) -> Callable[..., Any]:
        spec = LinearSpec(chunk, query.shape[3] ** -0.5, implementation)

        def loss(q: Any, k: Any, v: Any) -> jax.Array:
            return jnp.sum(linear_recurrence(Operands(q, k, v, decay), spec)[0].astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2))

    search = _Search((query, key, value), repeats)
    best = search.best("backward", list(candidates), both, None)
    body = _body(implementation)
    return search.result("linear", body, query, key, value, _fields(best))


class _Search:
    """Times candidates and keeps the record."""

    def __init__(self, args: Sequence[Any], repeats: int):
        self.args, self.repeats = args, repeats
        self.timed: list[tuple[str, Mapping[str, Any], float]] = []
        self.refused: list[tuple[Mapping[str, Any], str]] = []
        self.best_times: dict[str, float] = {}

    def time(
        self, what: str, config: Any, make: Callable[[Any], Any], shown: Mapping[str, Any]
    ) -> float:
        """Milliseconds of one candidate, infinite for one that is refused."""
        try:
            found = milliseconds(make(config), self.args, self.repeats)
        except Exception as problem:  # compilers refuse tiles in their own ways
            self.refused.append((shown, " ".join(str(problem).split())[:300]))
            return float("inf")
        self.timed.append((what, shown, found))
        return found

    def best(
        self,
        what: str,
        candidates: Sequence[Any],
        make: Callable[[Any], Any],
        base: Any,
        place: Callable[[Any], Any] = lambda c: c,
    ) -> Any:
        """The config with the least time: `base`, or a candidate made whole by `place`."""
        configs = [base, *map(place, candidates)]
        times = [self.time(what, c, make, _fields(c)) for c in configs]
        if not times or min(times) == float("inf"):
            reasons = "; ".join(reason for _, reason in self.refused[-3:])
            raise RuntimeError(f"tuner: no candidate ran for {what}: {reasons or 'none given'}.")
        self.best_times[what] = min(times)
        return configs[times.index(min(times))]

    def result(
        self,
        kernel: str,
        body: str,
        query: Any,
        key: Any,
        value: Any,
        config: Mapping[str, Any],
    ) -> Result:
        """The finished record."""
        width = tune.width_class(query.shape[3], value.shape[3])
        entry = Entry(
            kernel, body, str(key.dtype), width, key.shape[1], config, dict(self.best_times)
        )
        kind = jax.devices()[0].device_kind
        return Result(kind, entry, tuple(self.timed), tuple(self.refused))


def _fields(config: Any) -> dict[str, Any]:
    """A config as a mapping of its fields that are set."""
    if not dataclasses.is_dataclass(config):
        return {} if config is None else {"chunk_size": config}
    found = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    if "options" in found:
        found["options"] = dict(found["options"])
    return {name: x for name, x in found.items() if x not in (None, {})}


def _body(implementation: str | None) -> str:
    """Body that an implementation name means on the device at hand."""
    if implementation not in (None, "pallas"):
        return {"interpret": "tpu", "interpret_triton": "triton"}.get(
            implementation, implementation
        )
    return {"tpu": "tpu", "gpu": "triton"}.get(jax.devices()[0].platform, "xla")
