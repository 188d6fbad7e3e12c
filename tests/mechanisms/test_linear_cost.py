"""The claim "linear in the length", counted in the traced program: operations and largest array.

Counts, unlike wall time, are the same on every machine. The program is that of every device but
for the kernels, which a platform puts in at lowering.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from attnjax.attention import attention
from attnjax.mechanisms.linear.chela import long_convolution
from attnjax.mechanisms.linear.efficient_attention import efficient_attention
from attnjax.mechanisms.linear.fast_fastmax import fastmax
from attnjax.mechanisms.linear.gated_deltanet import gated_delta_rule
from attnjax.mechanisms.linear.gla import gated_linear_attention
from attnjax.mechanisms.linear.lightning_attention import lightning_attention
from attnjax.mechanisms.linear.mamba2 import state_space_duality
from attnjax.mechanisms.linear.retnet import retention

LENGTHS = (2048, 8192, 32768)
WIDTH = 16
"""Channels of the two heads' keys and values."""


def programs(equation):
    """Programs inside an equation: bodies of loops, branches, functions."""
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def operations(program):
    """Multiply-adds of products, elements of everything else, loops as often as they run."""
    total = 0
    for equation in program.eqns:
        name = equation.primitive.name
        inside = [operations(p) for p in programs(equation)]
        size = sum(math.prod(v.aval.shape) for v in equation.outvars)
        if name == "scan":
            total += equation.params["length"] * sum(inside)
        elif name in ("cond", "platform_index"):
            total += max(inside, default=0)
        elif name == "while":
            raise AssertionError("a loop of unknown length cannot be counted")
        elif inside:
            total += sum(inside)
        elif name == "dot_general":
            (contract, _), _ = equation.params["dimension_numbers"]
            total += size * math.prod(equation.invars[0].aval.shape[i] for i in contract)
        elif name == "fft":
            total += size * max(1, round(math.log2(math.prod(equation.params["fft_lengths"]))))
        else:
            total += size
    return total


def largest(program):
    """Elements of the largest array."""
    sizes = [math.prod(v.aval.shape) for e in program.eqns for v in e.outvars]
    return max([*sizes, *(largest(p) for e in program.eqns for p in programs(e))], default=0)


def exponent(counts):
    """Slope of log(count) over log(length)."""
    return np.polyfit(np.log(LENGTHS), np.log(counts), 1)[0]


def _slopes():
    return jnp.array([0.5, 0.25])


MECHANISMS = {
    "lightning": lambda x, g: lightning_attention(x, x, x, _slopes(), implementation="xla"),
    "efficient": lambda x, g: efficient_attention(x, x, x),
    "efficient causal": lambda x, g: efficient_attention(x, x, x, causal=True),
    "fastmax 1": lambda x, g: fastmax(x, x, x, order=1),
    "fastmax 1 causal": lambda x, g: fastmax(x, x, x, order=1, causal=True),
    "fastmax 2": lambda x, g: fastmax(x, x, x),
    "fastmax 2 causal": lambda x, g: fastmax(x, x, x, causal=True),
    "retnet": lambda x, g: retention(x, x, x, implementation="xla"),
    "gla": lambda x, g: gated_linear_attention(x, x, x, x, implementation="xla"),
    "mamba2": lambda x, g: state_space_duality(x, g, _slopes(), x, x, implementation="xla"),
    "gated deltanet": lambda x, g: gated_delta_rule(x, x, x, g, -g, implementation="xla"),
    "long convolution": lambda x, g: long_convolution(x[:, :, 0], jnp.ones((512, WIDTH))),
}


@functools.cache
def counts(name, gradient):
    call = MECHANISMS[name]

    def loss(x, g):
        return (call(x, g) ** 2).sum()

    traced = jax.make_jaxpr(jax.grad(loss) if gradient else loss)
    found = []
    for t in LENGTHS:
        x = jax.ShapeDtypeStruct((1, t, 2, WIDTH), jnp.float32)
        g = jax.ShapeDtypeStruct((1, t, 2), jnp.float32)
        program = traced(x, g).jaxpr
        found.append((operations(program), largest(program)))
    return np.array(found).T


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("name", MECHANISMS)
def test_time_and_memory_are_linear(name, gradient):
    """Claim: the log-log exponent of the operations is at most 1.1, of the largest array 1."""
    work, memory = counts(name, gradient)
    assert exponent(work) <= 1.1
    assert exponent(memory) <= 1.02


def test_softmax_attention_is_not():
    """The counter sees the square where there is one."""
    found = []
    for t in LENGTHS:
        x = jax.ShapeDtypeStruct((1, t, 2, WIDTH), jnp.float32)
        dense = functools.partial(attention, implementation="dense")
        found.append(operations(jax.make_jaxpr(dense)(x, x, x).jaxpr))
    assert exponent(found) > 1.9
