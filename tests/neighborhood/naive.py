"""Neighborhood attention as its text says it, in NumPy: loops and dense matrices, float64."""

from __future__ import annotations

import functools

import numpy as np


def axis_mask(length, window, stride, dilation, causal):
    """Who sees whom along one axis, [length, length] booleans: groups, leaders, windows."""
    sees = np.zeros((length, length), bool)
    for group in range(dilation):
        members = list(range(group, length, dilation))
        n = len(members)
        for p, position in enumerate(members):
            if causal:
                leader = min(p // stride * stride + stride - 1, n - 1)
                keys = range(max(leader - window + 1, 0), p + 1)
            else:
                leader = min(p // stride * stride + stride // 2, n - 1)
                start = min(max(leader - window // 2, 0), n - window)
                keys = range(start, start + window)
            for key in keys:
                sees[position, members[key]] = True
    return sees


def dense_mask(shape, kernel_size, stride=1, dilation=1, is_causal=False):
    """The whole mask [n, n] for tokens in row-major order: the product of the axes."""
    rank = len(shape)
    options = [
        x if isinstance(x, tuple | list | np.ndarray) else (x,) * rank
        for x in (kernel_size, stride, dilation, is_causal)
    ]
    axes = [axis_mask(*arguments) for arguments in zip(shape, *options, strict=True)]
    return functools.reduce(lambda a, b: np.kron(a, b).astype(bool), axes)


def relative_bias(shape, kernel_size, dilation, table):
    """The bias [h, n, n] from a table [h, 2 w - 1, ...]; 0 where a pair is outside of it."""
    at = np.indices(shape).reshape(len(shape), -1)
    group = at % np.array(dilation)[:, None]
    at = at // np.array(dilation)[:, None]
    index = at[:, None, :] - at[:, :, None] + (np.array(kernel_size) - 1)[:, None, None]
    sizes = np.array(table.shape[1:])[:, None, None]
    inside = ((index >= 0) & (index < sizes)).all(0)
    inside &= (group[:, None, :] == group[:, :, None]).all(0)
    index = np.where(inside, index, 0)
    return np.where(inside, table[(slice(None), *index)], 0)


def attention(q, k, v, mask, *, ak=None, av=None, scale=None, bias=None, softcap=None, cot=None):
    """Output and lse of [b, *shape, h, d] arrays, and with a cotangent the gradients by name.

    `mask` [n, n] holds for the tokens; additional keys are seen by every query.
    """
    lead, (h, d), e = q.shape[:-2], q.shape[-2:], v.shape[-1]
    b, g = q.shape[0], k.shape[-2]
    q, k, v = (x.reshape(b, -1, *x.shape[-2:]).astype(np.float64) for x in (q, k, v))
    n = k.shape[1]
    if ak is not None:
        k, v = np.concatenate([k, ak], 1), np.concatenate([v, av], 1)
        mask = np.concatenate([mask, np.ones((len(mask), ak.shape[1]), bool)], 1)
    scale = d**-0.5 if scale is None else scale
    kh, vh = (np.repeat(x, h // g, axis=2) for x in (k, v))
    s = np.einsum("bthd,bshd->bhts", q, kh) * scale
    if bias is not None:
        s[..., :n] += bias
    slope = 1.0
    if softcap is not None:
        slope = 1 - np.tanh(s / softcap) ** 2
        s = softcap * np.tanh(s / softcap)
    s = np.where(mask, s, -np.inf)
    top = s.max(-1, keepdims=True)
    lse = top + np.log(np.exp(s - top).sum(-1, keepdims=True))
    p = np.exp(s - lse)
    out = np.einsum("bhts,bshe->bthe", p, vh)
    found = {
        "out": out.reshape(*lead, h, e),
        "lse": lse[..., 0].transpose(0, 2, 1).reshape(*lead, h),
    }
    if cot is None:
        return found
    cot = cot.reshape(b, -1, h, e).astype(np.float64)
    dp = np.einsum("bthe,bshe->bhts", cot, vh)
    ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * slope
    dq = np.einsum("bhts,bshd->bthd", ds, kh) * scale
    dk = np.einsum("bhts,bthd->bshd", ds, q) * scale
    dv = np.einsum("bhts,bthe->bshe", p, cot)
    dk, dv = (x.reshape(b, -1, g, h // g, x.shape[-1]).sum(3) for x in (dk, dv))
    shape = lead[1:]
    found |= {
        "dq": dq.reshape(*lead, h, d),
        "dk": dk[:, :n].reshape(b, *shape, g, d),
        "dv": dv[:, :n].reshape(b, *shape, g, e),
        "dak": dk[:, n:],
        "dav": dv[:, n:],
        "dscores": ds[..., :n],
    }
    return found


def random_case(rng, rank, *, tokens=200):
    """Random shape and windows: {shape, kernel_size, stride, dilation, is_causal}."""
    most = {1: 60, 2: 16, 3: 8}[rank]
    shape = tuple(int(n) for n in rng.integers(2, most, rank))
    while np.prod(shape) > tokens:
        shape = tuple(max(2, n - 1) for n in shape)
    dilation = tuple(int(rng.integers(1, max(2, n // 2 + 1))) for n in shape)
    window = tuple(int(rng.integers(1, n // d + 1)) for n, d in zip(shape, dilation))
    stride = tuple(int(rng.integers(1, w + 1)) for w in window)
    causal = tuple(bool(x) for x in rng.random(rank) < 0.3)
    return dict(shape=shape, kernel_size=window, stride=stride, dilation=dilation, is_causal=causal)
