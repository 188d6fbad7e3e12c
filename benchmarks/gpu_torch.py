"""PyTorch's peers of `benchmarks.gpu`: FlexAttention, SDPA and flash-linear-attention."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from attnjax.mechanisms.linear.lightning_attention import lightning_slopes
from benchmarks.gpu_problems import Problem, token_order

Call = Callable[..., Any]


def candidates(p: Problem) -> dict[str, Call | str]:
    """Peers for a problem: name -> function of (q, k, v), or why there is none.

    Functions take and return PyTorch's own layout, [b, h, t, d]; [b, t, h, d] for linear ones.
    """
    names = ("torch Flex", "torch SDPA", "fla")
    if importlib.util.find_spec("torch") is None:
        return dict.fromkeys(names, "PyTorch is not installed")
    if p.kernel == "linear":
        return {"fla": _fla(p)}
    if p.kernel == "neighborhood":
        return {
            "torch Flex": _attempt(lambda: _flex(p, tiled=False)),
            "torch Flex, tile order": _attempt(lambda: _flex(p, tiled=True)),
        }
    return {
        "torch Flex": _attempt(lambda: _flex(p, tiled=False)),
        "torch SDPA": _attempt(lambda: _sdpa(p)),
    }


def _attempt(make: Callable[[], Call | str]) -> Call | str:
    try:
        return make()
    except Exception as problem:  # what is supported differs from release to release
        return f"failed: {' '.join(str(problem).split())[:200]}"


def device() -> str:
    """Where PyTorch computes: "cuda" where it can."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _sdpa(p: Problem) -> Call | str:
    import torch
    import torch.nn.functional as F

    if p.mask in ("causal", "full"):
        causal = p.mask == "causal"
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    if p.length > 16384:
        return "needs the whole boolean mask; not run beyond 16k tokens"
    i = torch.arange(p.length, device=device())
    ids = torch.from_numpy(p.document_ids).to(device())
    mask = (i[:, None] >= i) & (ids[:, None] == ids)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _flex(p: Problem, *, tiled: bool) -> Call | str:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask = None
    if p.mask != "full":
        mask_mod = _neighborhood_mask(p, tiled) if p.mask == "neighborhood" else _mask(p)
        block_mask = create_block_mask(
            mask_mod, None, None, p.length, p.length, device=device(), _compile=device() == "cuda"
        )
    run = flex_attention
    if device() == "cuda":  # on CPUs compiling takes minutes, and only --smoke comes here
        torch._dynamo.reset()
        run = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: run(q, k, v, block_mask=block_mask)


def _mask(p: Problem) -> Callable[..., Any]:
    import torch

    if p.mask == "causal":
        return lambda b, h, q, k: q >= k
    ids = torch.from_numpy(p.document_ids).to(device())
    return lambda b, h, q, k: (q >= k) & (ids[q] == ids[k])


def _neighborhood_mask(p: Problem, tiled: bool) -> Callable[..., Any]:
    """Windows of w keys around the query's group of s, moved inwards at the borders."""
    import torch

    order = token_order(p) if tiled else np.indices(p.shape).reshape(len(p.shape), -1)
    at = [torch.from_numpy(np.ascontiguousarray(x)).to(device()) for x in order]

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen = None
        for x, n, w, s in zip(at, p.shape, p.window, p.stride, strict=True):
            leader = torch.clamp((x[q] // s) * s + s // 2, max=n - 1)
            left, right = w // 2, w // 2 - 1 + w % 2
            center = torch.clamp(leader, left, n - 1 - right)
            inside = (x[k] - center >= -left) & (x[k] - center <= right)
            seen = inside if seen is None else seen & inside
        return seen

    return mask_mod


def _fla(p: Problem) -> Call | str:
    import torch

    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed"
    try:
        from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]
    except Exception as problem:
        return f"flash-linear-attention does not load: {problem}"
    gamma = torch.from_numpy(-np.asarray(lightning_slopes(p.heads), np.float32)).to(device())
    return lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=gamma, scale=p.width**-0.5)[0]


def timed(p: Problem, run: Call, passes: str, steps: int, dtype: str) -> Callable[[], float]:
    """A function that runs `steps` calls and gives the seconds of one of them."""
    import torch

    where = torch.device(device())
    rng = torch.Generator(device=where).manual_seed(0)

    def draw(tokens: int) -> Any:
        shape = (p.batch, p.heads, tokens, p.width)
        if p.kernel == "linear":
            shape = (p.batch, tokens, p.heads, p.width)
        x = torch.randn(shape, generator=rng, device=where, dtype=torch.float32)
        return x.to(getattr(torch, dtype))

    queries = p.queries or p.length
    q, k, v, cotangent = draw(queries), draw(p.length), draw(p.length), draw(queries)

    def once() -> None:
        if passes == "forward":
            with torch.no_grad():
                run(q, k, v)
            return
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(run(*inputs), inputs, cotangent)

    def measure() -> float:
        if where.type == "cpu":
            start = time.perf_counter()
            for _ in range(steps):
                once()
            return (time.perf_counter() - start) / steps
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(steps):
            once()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / steps

    measure()
    return measure
