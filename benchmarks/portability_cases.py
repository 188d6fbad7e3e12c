"""The kernel cases that `benchmarks.portability` compiles for every machine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from attnjax import masks
from pallas_kernels.machines import Machine

BATCH, LENGTH, HEADS, KV_HEADS, WIDTH = 2, 1024, 4, 2, 128
LEAST_CAPABILITY = (8, 0)
"""GPUs before it have no kernel route."""

Abstract = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of a public function.

    Attributes:
      name: unique.
      kernel: "flash", "decode", "neighborhood" or "linear".
      make: `make(implementation) -> (function, abstract arguments)`.
      calls: least number of kernels in the compiled program where a kernel is expected.
      implementation: None for the default; a name for a body that is not chosen unasked.
    """

    name: str
    kernel: str
    make: Callable[[str | None], tuple[Callable[..., Any], tuple[Any, ...]]]
    calls: int
    implementation: str | None = None

    def expected(self, machine: Machine) -> str | None:
        """Route that must be in the program; "xla" for none, None where the case has no meaning."""
        if self.implementation == "mosaic_gpu":
            return "mosaic_gpu" if machine.capability == (9, 0) else None
        if machine.platform == "tpu":
            return "mosaic_tpu"
        if machine.platform == "cuda" and (machine.capability or (0, 0)) >= LEAST_CAPABILITY:
            return "triton"
        return "xla"


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> Abstract:
    return Abstract(shape, dtype)


def _qkv(kv_heads: int = HEADS, dtype: Any = jnp.bfloat16) -> tuple[Abstract, ...]:
    q = _array(BATCH, LENGTH, HEADS, WIDTH, dtype=dtype)
    kv = _array(BATCH, LENGTH, kv_heads, WIDTH, dtype=dtype)
    return q, kv, kv


def _flash(
    implementation: str | None,
    *,
    mask: Any,
    kv_heads: int = HEADS,
    dtype: Any = jnp.bfloat16,
    **options: Any,
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from pallas_kernels.flash import flash_attention

    def run(q: Any, k: Any, v: Any) -> Any:
        return flash_attention(
            q, k, v, mask=mask, scale=WIDTH**-0.5, implementation=implementation, **options
        )[0]

    return run, _qkv(kv_heads, dtype)


def _flash_segments(implementation: str | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from pallas_kernels.flash import flash_attention

    def run(q: Any, k: Any, v: Any, ids: Any) -> Any:
        mask = masks.Causal() & masks.Segments(ids, ids)
        return flash_attention(
            q, k, v, mask=mask, scale=WIDTH**-0.5, implementation=implementation
        )[0]

    return run, (*_qkv(), _array(BATCH, LENGTH, dtype=jnp.int32))


def _flash_bias(implementation: str | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from pallas_kernels.flash import flash_attention

    def run(q: Any, k: Any, v: Any, bias: Any) -> Any:
        return flash_attention(
            q, k, v, mask=masks.Causal(), bias=bias, scale=WIDTH**-0.5,
            implementation=implementation,
        )[0]  # fmt: skip

    return run, (*_qkv(), _array(1, HEADS, LENGTH, LENGTH, dtype=jnp.float32))


def _flash_score_mod(implementation: str | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Softcap, slopes per head and a table of relative offsets, all with gradients."""
    from pallas_kernels.flash import flash_attention

    def run(q: Any, k: Any, v: Any, slopes: Any, table: Any) -> Any:
        def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            distance = jnp.clip(i - j, 0, table.shape[0] - 1)
            biased = score - slopes[h] * (i - j).astype(jnp.float32) + table[distance]
            return 30.0 * jnp.tanh(biased / 30.0)

        return flash_attention(
            q, k, v, mask=masks.Causal(), score_mod=score_mod, scale=WIDTH**-0.5,
            implementation=implementation,
        )[0]  # fmt: skip

    tables = (_array(HEADS, dtype=jnp.float32), _array(LENGTH, dtype=jnp.float32))
    return run, (*_qkv(KV_HEADS), *tables)


def _flash_everything(implementation: str | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Sinks, dropout, odd lengths, and values of another width."""
    from pallas_kernels.flash import flash_attention

    def run(q: Any, k: Any, v: Any, sinks: Any, seed: Any) -> Any:
        return flash_attention(
            q, k, v, mask=masks.Causal() & masks.Window(300), sinks=sinks, softcap=30.0,
            dropout_rate=0.1, dropout_seed=seed, scale=WIDTH**-0.5, implementation=implementation,
        )[0]  # fmt: skip

    q = _array(BATCH, 777, HEADS, 96)
    k = _array(BATCH, 777, KV_HEADS, 96)
    v = _array(BATCH, 777, KV_HEADS, 64)
    return run, (q, k, v, _array(HEADS, dtype=jnp.float32), _array(2, dtype=jnp.uint32))


def _decode(
    implementation: str | None, *, dtype: Any = jnp.bfloat16, **options: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from pallas_kernels.decode import decode_attention

    def run(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        return decode_attention(q, k, v, lengths=lengths, implementation=implementation, **options)

    cache = _array(BATCH, 4096, KV_HEADS, WIDTH, dtype=dtype)
    q = _array(BATCH, 1, 8, WIDTH, dtype=dtype)
    return run, (q, cache, cache, _array(BATCH, dtype=jnp.int32))


def _decode_paged(implementation: str | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from pallas_kernels.decode import decode_attention

    def run(q: Any, k: Any, v: Any, lengths: Any, pages: Any) -> Any:
        return decode_attention(
            q, k, v, lengths=lengths, page_table=pages, implementation=implementation
        )

    pool = _array(64, 128, KV_HEADS, WIDTH)
    table = _array(BATCH, 32, dtype=jnp.int32)
    q = _array(BATCH, 1, 8, WIDTH)
    return run, (q, pool, pool, _array(BATCH, dtype=jnp.int32), table)


def _neighborhood(
    implementation: str | None, *, shape: tuple[int, ...], **options: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from pallas_kernels.neighborhood import neighborhood_attention

    def run(q: Any, k: Any, v: Any) -> Any:
        out = neighborhood_attention(q, k, v, implementation=implementation, **options)
        return out[0] if isinstance(out, tuple) else out

    x = _array(1, *shape, KV_HEADS, WIDTH)
    return run, (x, x, x)


def _linear(
    implementation: str | None, *, decay: str | None, dtype: Any = jnp.bfloat16
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    from pallas_kernels.linear import LinearSpec, Operands, linear_recurrence

    spec = LinearSpec(chunk_size=None, scale=WIDTH**-0.5, implementation=implementation)

    def run(q: Any, k: Any, v: Any, state: Any, *decays: Any) -> Any:
        g = decays[0] if decays else None
        return linear_recurrence(Operands(q, k, v, decay=g, initial_state=state), spec)

    shapes = {None: (), "head": ((HEADS,),), "token": ((BATCH, LENGTH, HEADS),)}
    extra = tuple(_array(*shape, dtype=jnp.float32) for shape in shapes[decay])
    state = _array(BATCH, HEADS, WIDTH, WIDTH, dtype=jnp.float32)
    return run, (*_qkv(HEADS, dtype), state, *extra)


def _backward(make: Callable[..., Any]) -> Callable[..., Any]:
    """The same call, with the gradients of all its floating arguments."""

    def made(implementation: str | None) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        run, args = make(implementation)
        floating = [i for i, x in enumerate(args) if jnp.issubdtype(x.dtype, jnp.floating)]

        def loss(*xs: Any) -> jax.Array:
            outs = [jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(run(*xs))]
            return functools.reduce(jnp.add, outs)

        return jax.grad(loss, argnums=tuple(floating)), args

    return made


def cases() -> dict[str, Case]:
    """All cases by name, in the order of the table."""
    made: list[Case] = []

    def both(kernel: str, name: str, make: Callable[..., Any], route: str | None = None) -> None:
        made.append(Case(f"{name}, forward", kernel, make, 1, route))
        made.append(Case(f"{name}, backward", kernel, _backward(make), 2, route))

    causal, window = masks.Causal(), masks.Causal() & masks.Window(256)
    both("flash", "flash full", functools.partial(_flash, mask=masks.Full()))
    both("flash", "flash causal", functools.partial(_flash, mask=causal))
    both("flash", "flash causal float32", functools.partial(_flash, mask=causal, dtype=jnp.float32))
    both("flash", "flash window GQA", functools.partial(_flash, mask=window, kv_heads=KV_HEADS))
    both("flash", "flash segments", _flash_segments)
    both("flash", "flash score_mod GQA", _flash_score_mod)
    both("flash", "flash bias", _flash_bias)
    both("flash", "flash sinks dropout odd sizes", _flash_everything)
    mosaic = functools.partial(_flash, mask=causal, kv_heads=KV_HEADS)
    both("flash", "flash causal GQA mosaic_gpu", mosaic, "mosaic_gpu")
    made.append(Case("decode GQA", "decode", _decode, 1))
    made.append(Case("decode window", "decode", functools.partial(_decode, window=512), 1))
    made.append(Case("decode paged", "decode", _decode_paged, 1))
    square = functools.partial(_neighborhood, shape=(64, 64), kernel_size=(15, 15))
    both("neighborhood", "neighborhood 2-D", square)
    strided = functools.partial(_neighborhood, shape=(64, 64), kernel_size=(16, 16), stride=8)
    both("neighborhood", "neighborhood 2-D stride", strided)
    for decay, label in ((None, "none"), ("head", "head"), ("token", "token")):
        both("linear", f"linear decay {label}", functools.partial(_linear, decay=decay))
    return {case.name: case for case in made}
