"""PyTorch's attention functions as candidates of `benchmarks.attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.problems import MAX_TEMPORARY_BYTES, Candidate, Problem, visible


def sdpa(p: Problem, passes: str) -> Candidate | str:
    """`scaled_dot_product_attention` with `is_causal` or a boolean mask."""
    if p.case in ("causal", "full"):
        options: dict[str, Any] = {"is_causal": p.case == "causal"}
    else:
        # The mask is kept as booleans and turned into float32 inside.
        needed = 5 * p.length**2
        if needed > MAX_TEMPORARY_BYTES:
            return f"needs {needed / 1e9:.0f} GB"
        i = np.arange(p.length)
        mask = visible(p.case, i[:, None], i[None, :], p.segment_ids[0])
        options = {"attn_mask": torch.from_numpy(mask)}
    return _candidate(
        "torch SDPA",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options),
        p,
        passes,
    )


def flex(p: Problem, passes: str) -> Candidate | str:
    """`flex_attention`, compiled, with its block mask made beforehand."""
    block_mask = None
    if p.case != "full":
        ids = torch.from_numpy(p.segment_ids[0])

        def mask_mod(b, h, q, k):
            return visible(p.case, q, k, ids)

        block_mask = create_block_mask(mask_mod, None, None, p.length, p.length, device="cpu")
    # Each case is its own program; without the reset the limit of recompilations is soon reached.
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    try:
        candidate = _candidate(
            "torch Flex", lambda q, k, v: compiled(q, k, v, block_mask=block_mask), p, passes
        )
        candidate.call()
    except Exception as error:  # what it supports on CPU differs from release to release
        reason = str(error).strip().split(". ")[0].splitlines()
        return f"not supported ({reason[0] if reason else type(error).__name__})"
    return candidate


def _candidate(
    name: str, function: Callable[..., torch.Tensor], p: Problem, passes: str
) -> Candidate:
    # [b, t, h, d] -> PyTorch's own [b, h, t, d], contiguous
    q, k, v, cotangent = (
        torch.from_numpy(x).transpose(1, 2).contiguous()
        for x in (p.query, p.key, p.value, p.cotangent)
    )

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (function(q, k, v),)

    def both() -> tuple[torch.Tensor, ...]:
        inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
        out = function(*inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, cotangent))

    call = forward if passes == "forward" else both
    return Candidate(name, call, lambda: [x.transpose(1, 2).numpy() for x in call()])
