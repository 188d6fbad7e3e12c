"""Running and rewriting jaxprs of scalar functions, whole or in part, and running them on tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import compat

CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "checkpoint", "remat2")
"""Primitives that call another jaxpr and nothing more."""

CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
"""Calls with a derivative of their own: stepped into only after differentiation."""


def needed_variables(jaxpr: Any, stops: set[Any]) -> set[Any]:
    """Variables that the outputs need, not looking behind `stops`."""
    makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    needed: set[Any] = set()
    stack = [v for v in jaxpr.outvars if not isinstance(v, compat.Literal)]
    while stack:
        var = stack.pop()
        if var in needed:
            continue
        needed.add(var)
        if var not in stops and var in makers:
            eqn = makers[var]
            stack += [v for v in eqn.invars if not isinstance(v, compat.Literal)]
    return needed


def part(jaxpr: Any, inputs: list[Any], outputs: list[Any], known: dict[Any, Any]) -> Any:
    """The jaxpr from given variables to others; `known` ones are constants."""
    start = [*inputs, *known]

    def between(*values: Any) -> list[Any]:
        return run(jaxpr, (), (*values, *known.values()), (), start=start, stop=outputs)

    return jax.make_jaxpr(between)(*[aval_of(v) for v in inputs])


def inline(jaxpr: Any) -> Any:
    """The jaxpr without calls."""

    def flat(*values: Any) -> list[Any]:
        return run(jaxpr, (), values, (*CALLS, *CUSTOM))

    return jax.make_jaxpr(flat)(*[aval_of(v) for v in jaxpr.invars]).jaxpr


def run(
    jaxpr: Any,
    consts: Any,
    args: Any,
    inline: tuple[str, ...],
    *,
    start: Any = None,
    stop: Any = None,
) -> list[Any]:
    """What is needed of a jaxpr's results, stepping into the calls named in `inline`."""
    start = jaxpr.invars if start is None else start
    stop = jaxpr.outvars if stop is None else stop
    env: dict[Any, Any] = dict(zip(start, args, strict=True))
    env.update(zip(jaxpr.constvars, consts, strict=True))
    makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    wanted: set[int] = set()
    stack = [v for v in stop if not isinstance(v, compat.Literal)]
    while stack:
        var = stack.pop()
        if var in env or id(makers[var]) in wanted:
            continue
        wanted.add(id(makers[var]))
        stack += [v for v in makers[var].invars if not isinstance(v, compat.Literal)]

    def value(v: Any) -> Any:
        return literal(v) if isinstance(v, compat.Literal) else env[v]

    for eqn in jaxpr.eqns:
        if id(eqn) not in wanted:
            continue
        values = [value(v) for v in eqn.invars]
        name = eqn.primitive.name
        inner = _called(eqn) if name in inline else None
        if inner is not None:
            out = run(inner.jaxpr, inner.consts, values, inline)
        elif name == "reshard" or (name == "reduce_sum" and not eqn.params["axes"]):
            out = values  # derivatives traced inside a mesh do this to scalars
        else:
            out = compat.bind_equation(eqn, values)
        for var, x in zip(eqn.outvars, out, strict=True):
            if var not in env:
                env[var] = x
    return [value(v) for v in stop]


def literal(v: Any) -> Any:
    """A constant in its own type; JAX may hold it as a Python number."""
    return np.asarray(v.val, v.aval.dtype) if v.aval.shape == () else v.val


def _called(eqn: Any) -> Any:
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            inner = eqn.params[name]
            return inner if hasattr(inner, "consts") else compat.ClosedJaxpr(inner, [])
    return None


def aval_of(v: Any) -> jax.ShapeDtypeStruct:
    """Shape and type of a variable."""
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)


def spread(x: Any, shape: tuple[int, ...]) -> jax.Array:
    """The value broadcast to a shape, itself where it has it."""
    return x if jnp.shape(x) == shape else jnp.broadcast_to(x, shape)


def evaluate(jaxpr: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluates a flat scalar jaxpr on tiles: values of different shapes broadcast."""
    env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))

    def value(v: Any) -> Any:
        return literal(v) if isinstance(v, compat.Literal) else env[v]

    for eqn in jaxpr.eqns:
        values = [value(v) for v in eqn.invars]
        env[eqn.outvars[0]] = _apply(eqn, values)
    return [jnp.asarray(value(v)) for v in jaxpr.outvars]


def _apply(eqn: Any, values: list[Any]) -> Any:
    """One elementwise primitive, in a form that every kernel compiler accepts."""
    name = eqn.primitive.name
    if name in ("broadcast_in_dim", "copy", "stop_gradient"):
        return values[0]
    shape = np.broadcast_shapes(*map(jnp.shape, values))
    if name == "convert_element_type":
        return jnp.asarray(values[0]).astype(eqn.params["new_dtype"])
    values = [spread(x, shape) if jnp.shape(x) != shape else x for x in values]
    if name == "one_minus_square":  # newer JAX's derivative of tanh; no kernel compiler knows it
        x = jnp.asarray(values[0])
        return jnp.ones_like(x) - x * x
    if name == "add_any":
        return lax.add(*map(jnp.asarray, values))
    if name == "select_n" and values[1].dtype == jnp.bool_ and values[0].dtype == jnp.bool_:
        # a select between booleans does not compile for TPUs
        which, no, yes = values
        return (which & yes) | (~jnp.asarray(which) & no)
    if name == "sign" and jnp.issubdtype(values[0].dtype, jnp.integer):
        # the rule of `sign` asks for the default device's generation
        (x,) = values
        zero = jnp.zeros_like(x)
        return (x > zero).astype(x.dtype) - (x < zero).astype(x.dtype)
    return eqn.primitive.bind(*values, **eqn.params)
