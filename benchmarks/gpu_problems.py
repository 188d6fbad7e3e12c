"""The problems of `benchmarks.gpu`: shapes, who sees whom, our function, and the work in it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax import masks
from attnjax.mechanisms.linear.lightning_attention import lightning_slopes
from pallas_kernels.decode import decode_attention
from pallas_kernels.flash import flash_attention
from pallas_kernels.linear import LinearSpec, Operands, linear_recurrence
from pallas_kernels.neighborhood import NeighborhoodSpec, neighborhood_attention


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem at one size.

    Attributes:
      name: unique.
      kernel: "flash", "neighborhood", "decode" or "linear".
      mask: "causal", "documents", "neighborhood", "full", or "" for linear attention.
      batch, heads, width: of the arrays.
      shape: tokens along each axis; one axis but for maps.
      window, stride: of a neighborhood, per axis.
      documents: number of packed documents.
      queries: of a decode step; None means as many as keys.
    """

    name: str
    kernel: str
    mask: str
    batch: int
    heads: int
    width: int
    shape: tuple[int, ...]
    window: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    documents: int = 0
    queries: int | None = None

    @property
    def length(self) -> int:
        """Tokens."""
        return math.prod(self.shape)

    @functools.cached_property
    def document_ids(self) -> np.ndarray:
        """[t] int32: documents of unequal lengths, the same in every run."""
        rng = np.random.default_rng(1)
        ends = np.sort(rng.choice(np.arange(1, self.length), self.documents - 1, replace=False))
        return np.searchsorted(ends, np.arange(self.length), side="right").astype(np.int32)

    def arrays(self, dtype: Any) -> list[jax.Array]:
        """Query, key, value and the gradient of the output, [b, *shape, h, d], normal."""
        kv = (self.batch, *self.shape, self.heads, self.width)
        q = kv if self.queries is None else (self.batch, self.queries, *kv[2:])
        keys = jax.random.split(jax.random.key(0), 4)
        draws = zip(keys, (q, kv, kv, q), strict=True)
        return [jax.random.normal(k, shape, jnp.float32).astype(dtype) for k, shape in draws]

    def visible_pairs(self) -> float:
        """Visible (query, key) pairs of one head of one row."""
        n = self.length
        if self.mask == "causal":
            return n * (n + 1) / 2
        if self.mask == "documents":
            sizes = np.bincount(self.document_ids).astype(float)
            return float((sizes * (sizes + 1) / 2).sum())
        if self.mask == "neighborhood":
            return float(n * math.prod(self.window))
        return float(n * (self.queries or n))

    def operations(self, passes: str) -> float:
        """Floating point operations on visible pairs alone; the chunked form's for linear ones."""
        rows = self.batch * self.heads
        if self.kernel == "linear":
            chunk = 64  # within a chunk pairs, between chunks the state
            forward = 2 * rows * self.length * (2 * chunk * self.width + 2 * self.width**2)
            return forward * (1 if passes == "forward" else 3.5)
        # two products forward, five more backward
        return 4 * rows * self.width * self.visible_pairs() * (1 if passes == "forward" else 3.5)


def ours(p: Problem, implementation: str | None) -> Callable[..., jax.Array]:
    """Our function of (query, key, value) for a problem."""
    scale = p.width**-0.5
    if p.kernel == "linear":
        slopes = jnp.asarray(-lightning_slopes(p.heads), jnp.float32)
        spec = LinearSpec(chunk_size=None, scale=scale, implementation=implementation)
        return lambda q, k, v: linear_recurrence(Operands(q, k, v, decay=slopes), spec)[0]
    if p.kernel == "decode":
        return lambda q, k, v: decode_attention(q, k, v, implementation=implementation)
    if p.kernel == "neighborhood":
        return lambda q, k, v: neighborhood_attention(
            q, k, v, kernel_size=p.window, stride=p.stride, implementation=implementation
        )
    mask: Any = {"causal": masks.Causal(), "full": masks.Full()}.get(p.mask)
    if p.mask == "documents":
        ids = p.document_ids[None]
        mask = masks.Causal() & masks.Segments(ids, ids)
    return lambda q, k, v: flash_attention(
        q, k, v, mask=mask, scale=scale, implementation=implementation
    )[0]


def definition(p: Problem) -> Callable[..., jax.Array]:
    """The dense formula of a problem, with all pairs of tokens in memory."""
    scale = p.width**-0.5
    if p.kernel == "linear":
        i = np.arange(p.length)
        distance = jnp.asarray(i[:, None] - i, jnp.float32)
        slopes = jnp.asarray(lightning_slopes(p.heads), jnp.float32)[:, None, None]
        decay = jnp.where(distance >= 0, jnp.exp(-slopes * jnp.maximum(distance, 0)), 0.0)

        def linear(q: Any, k: Any, v: Any) -> jax.Array:
            scores = scale * jnp.einsum("bihd,bjhd->bhij", q, k).astype(jnp.float32)
            return jnp.einsum("bhij,bjhe->bihe", (scores * decay).astype(v.dtype), v)

        return linear
    seen = jnp.asarray(visible(p)) if p.queries is None else None

    def attention(q: Any, k: Any, v: Any) -> jax.Array:
        shape = q.shape
        q, k, v = (x.reshape(p.batch, -1, p.heads, p.width) for x in (q, k, v))
        scores = scale * jnp.einsum("bihd,bjhd->bhij", q, k).astype(jnp.float32)
        if seen is not None:
            scores = jnp.where(seen, scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bhij,bjhe->bihe", weights, v).reshape(shape)

    return attention


def visible(p: Problem) -> np.ndarray:
    """[t, t] booleans, tokens of a map in row-major order."""
    i = np.arange(p.length)
    if p.mask == "full":
        return np.ones((p.length, p.length), bool)
    if p.mask != "neighborhood":
        ids = p.document_ids if p.mask == "documents" else np.zeros(p.length, np.int32)
        return (i[:, None] >= i) & (ids[:, None] == ids)
    seen = np.ones((p.length, p.length), bool)
    order = np.indices(p.shape).reshape(len(p.shape), -1)
    for x, n, w, s in zip(order, p.shape, p.window, p.stride, strict=True):
        leader = np.minimum(x // s * s + s // 2, n - 1)  # the query whose window the group shares
        left, right = w // 2, w // 2 - 1 + w % 2
        center = np.clip(leader, left, n - 1 - right)[:, None]
        seen &= (x - center >= -left) & (x - center <= right)
    return seen


def token_order(p: Problem) -> np.ndarray:
    """Coordinates [axes, t] of the tokens of a map, in the tile order of our own kernel."""
    spec = NeighborhoodSpec(p.shape, p.window, p.stride, alike=True)
    layout = spec.q_layout
    return layout.coordinates()[:, layout.is_token()]


def problems(smoke: bool) -> list[Problem]:
    """All problems; with `smoke` the same ones, tiny."""
    if smoke:
        return [
            Problem("causal 128", "flash", "causal", 1, 2, 32, (128,)),
            Problem("documents 128", "flash", "documents", 1, 2, 32, (128,), documents=4),
            *_neighborhoods("1-D 96", 1, 32, (96,), (16,), [(1,), (16,)]),
            *_neighborhoods("2-D 12x12", 2, 32, (12, 12), (5, 5), [(1, 1)]),
            *_neighborhoods("3-D 6x6x6", 2, 32, (6, 6, 6), (3, 3, 3), [(1, 1, 1)]),
            Problem("decode 256", "decode", "full", 2, 2, 32, (256,), queries=1),
            Problem("lightning 128", "linear", "", 2, 2, 32, (128,)),
        ]
    causal = [
        Problem(f"causal {n >> 10}k", "flash", "causal", 1, 16, 128, (n,))
        for n in (4096, 16384, 32768)
    ]
    lightning = [
        Problem(f"lightning {n}", "linear", "", 4, 32, 128, (512 << i,))
        for i in range(7)
        for n in (512 << i,)
    ]
    return [
        *causal,
        Problem("documents 32k", "flash", "documents", 1, 16, 128, (32768,), documents=16),
        *_neighborhoods("1-D 32k", 1, 128, (32768,), (2048,), [(1,), (256,), (2048,)]),
        *_neighborhoods("FLUX 2-D 256x256", 24, 128, (256, 256), (80, 80), [(1, 1), (16, 16)]),
        *_neighborhoods(
            "Hunyuan 3-D 30x48x80", 24, 128, (30, 48, 80), (18, 24, 24), [(1, 1, 1), (16, 8, 8)]
        ),
        Problem("decode 32k", "decode", "full", 8, 32, 128, (32768,), queries=1),
        *lightning,
    ]


def _neighborhoods(
    name: str,
    heads: int,
    width: int,
    shape: tuple[int, ...],
    window: tuple[int, ...],
    strides: list[tuple[int, ...]],
) -> list[Problem]:
    def label(x: tuple[int, ...]) -> str:
        return "x".join(map(str, x))

    return [
        Problem(
            f"{name} window {label(window)} stride {label(stride)}", "neighborhood",
            "neighborhood", 1, heads, width, shape, window, stride,
        )
        for stride in strides
    ]  # fmt: skip


def small(p: Problem) -> Problem:
    """A problem of the same kind whose exact result is quickly computed."""
    if p.kernel == "neighborhood":
        shape = {1: (512,), 2: (24, 32), 3: (8, 12, 10)}[len(p.shape)]
        shape = tuple(min(n, full) for n, full in zip(shape, p.shape, strict=True))
        window = tuple(max(2, n // 3) for n in shape)
        stride = tuple(min(w, s) for w, s in zip(window, p.stride, strict=True))
        return dataclasses.replace(p, shape=shape, window=window, stride=stride, heads=2)
    length = min(p.length, 1000)
    documents = min(p.documents, 4)
    return dataclasses.replace(p, shape=(length,), heads=2, batch=1, documents=documents)
