"""User functions of attention scores, traced once into programs that every kernel can run.

A `score_mod(score, b, h, q, k)` or a mask's `predicate(b, h, q, k)` is traced on scalars. What it
looks up in arrays becomes a *read*: its value depends on few of the indices, so it is evaluated
outside the kernel, in plain differentiable JAX, and reaches the kernel as an operand. What is left
is elementwise, and is evaluated on whole tiles inside the kernel. Its derivative is traced on
scalars too, so that kernels need no automatic differentiation.

    kind      depends on     array                   value inside a kernel, tile [m, n]
    scalar    b, h           [nb, nh]                []
    query     b, h, q        [nb, nh, t]             [m, 1]
    key       b, h, k        [nb, nh, s]             [1, n]
    offset    b, h, q - k    [nb, nh, t + s - 1]     [m, n], the entry of (row, col) at
                                                     row - col + s - 1
    pair      b, h, q, k     the tables themselves   [m, n], in the XLA body alone

nb is 1 or the batch size, nh is 1 or the number of heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat, jaxprs
from pallas_kernels.dispatch import Unsupported

KINDS = ("scalar", "query", "key", "offset", "pair")

ELEMENTWISE = frozenset(
    "abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos cosh div eq erf "
    "erfc erf_inv exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max "
    "min mul ne neg nextafter not one_minus_square or population_count pow rem round rsqrt "
    "select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square "
    "sub tan tanh xor acos asin atan acosh asinh atanh clz reduce_precision stop_gradient "
    "broadcast_in_dim".split()
)
"""Primitives that act element by element."""

LACKING: dict[str, frozenset[str]] = {
    "tpu": frozenset(
        "atan2 cbrt cosh erf_inv erfc expm1 nextafter reduce_precision sinh tan acos asin atan "
        "acosh asinh atanh clz is_finite population_count".split()
    ),
    "triton": frozenset(
        "atan2 cbrt cosh erf_inv erfc nextafter reduce_precision sinh tan acos asin atan acosh "
        "asinh atanh clz is_finite population_count round".split()
    ),
    "mosaic_gpu": frozenset(
        "cbrt ceil cosh erf_inv erfc expm1 floor log1p nextafter pow reduce_precision sinh sqrt "
        "tan acos asin atan acosh asinh atanh is_finite population_count".split()
    ),
}
"""Elementwise primitives that the compiler of a backend does not have."""


class Read(NamedTuple):
    """One looked-up value.

    Attributes:
      kind: one of `KINDS`.
      uses: of "b", "h", those that the value depends on.
      dtype: its type where the function uses it.
      jaxpr: closed program (b, h, q, k, *tables) -> value.
    """

    kind: str
    uses: frozenset[str]
    dtype: Any
    jaxpr: Any

    @property
    def is_float(self) -> bool:
        """Whether the value has a gradient."""
        return bool(jnp.issubdtype(self.dtype, jnp.floating))


@dataclasses.dataclass(frozen=True, eq=False)
class TileProgram:
    """A traced function; hashable, equal when the code is the same whatever arrays it looks up.

    Attributes:
      reads: what it looks up, in the order of the read arrays.
      core: jaxpr (score?, b, h, q, k, *values) -> result.
      derivative: jaxpr (score, b, h, q, k, *values, ct) -> (d score, d value of each float read),
        None for predicates.
      has_score: whether there is a score argument.
      key: identity of the code.
    """

    reads: tuple[Read, ...]
    core: Any
    derivative: Any
    has_score: bool
    key: str

    def __eq__(self, other: object) -> bool:
        """Same code."""
        return isinstance(other, TileProgram) and self.key == other.key

    def __hash__(self) -> int:
        """Hash of the code."""
        return hash(self.key)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each read."""
        return tuple(r.kind for r in self.reads)

    @property
    def is_float(self) -> tuple[bool, ...]:
        """Whether each read is floating, so that it has a gradient."""
        return tuple(r.is_float for r in self.reads)

    @property
    def uses_row(self) -> bool:
        """Whether the elementwise part uses the batch index itself."""
        return self._uses(0)

    @property
    def varies(self) -> bool:
        """Whether different rows or heads may have different results."""
        return self._uses(0) or self._uses(1) or any(r.uses or r.kind == "pair" for r in self.reads)

    def _uses(self, place: int) -> bool:
        var = self.core.invars[place + self.has_score]
        return any(var is v for eqn in self.core.eqns for v in eqn.invars)

    def __call__(
        self, score: Any, b: Any, h: Any, q: Any, k: Any, values: Sequence[Any]
    ) -> jax.Array:
        """The function on a tile.

        Args:
          score: [m, n], or None for predicates.
          b, h: int32 scalars. q, k: absolute indices, [m, 1] and [1, n] (or transposed).
          values: of the reads, as the table of the module says.

        Returns:
          [m, n] (or less where the function does not depend on all of it, for predicates).
        """
        first = (score,) if self.has_score else ()
        return jaxprs.evaluate(self.core, (*first, b, h, q, k, *self._cast(values)))[0]

    def grad(
        self, score: Any, b: Any, h: Any, q: Any, k: Any, values: Sequence[Any], ct: Any
    ) -> tuple[jax.Array, list[jax.Array | None]]:
        """(d score [m, n], for each read d value [m, n] or None) of the cotangent ct [m, n]."""
        args = (score, b, h, q, k, *self._cast(values), ct)
        d_score, *floats = (
            jaxprs.spread(x, jnp.shape(ct)) for x in jaxprs.evaluate(self.derivative, args)
        )
        found = iter(floats)
        return d_score, [next(found) if f else None for f in self.is_float]

    def check(self, backend: str) -> None:
        """Raises `Unsupported` when a backend ("tpu", "triton", "mosaic_gpu") lacks something."""
        what = "score_mod" if self.has_score else "mask"
        if "pair" in self.kinds:
            raise Unsupported(
                f"{what}: it looks something up by query and key at once, which the {backend} "
                "kernel cannot do; depend on q, on k or on q - k, or use implementation='xla'."
            )
        for jaxpr in (self.core, self.derivative):
            for eqn in jaxpr.eqns if jaxpr is not None else ():
                if eqn.primitive.name in LACKING[backend]:
                    raise Unsupported(
                        f"{what}: the {backend} kernel has no '{eqn.primitive.name}'"
                        f"{_where(eqn)}; write it with other functions, or use "
                        "implementation='xla'."
                    )

    def _cast(self, values: Sequence[Any]) -> list[Any]:
        def cast(value: Any, dtype: Any) -> Any:
            return value != jnp.zeros_like(value) if dtype == jnp.bool_ else value.astype(dtype)

        return [cast(v, r.dtype) for v, r in zip(values, self.reads, strict=True)]


def trace_score_mod(
    score_mod: Callable[..., jax.Array], dtype: Any
) -> tuple[TileProgram, list[jax.Array]]:
    """Traces `score_mod(score, b, h, q, k) -> score`.

    Args:
      score_mod: the function; it sees scalars, so it must treat every pair (q, k) alike.
      dtype: of the scores.

    Returns:
      The program, and the arrays that the function closes over.

    Raises:
      ValueError: when the result is not one floating number, or the function does something that is
        not elementwise with the score.
    """
    index = jax.ShapeDtypeStruct((), jnp.int32)
    score = jax.ShapeDtypeStruct((), dtype)
    closed = jax.make_jaxpr(score_mod)(score, index, index, index, index)
    avals = closed.out_avals
    if len(avals) != 1 or avals[0].shape != () or not jnp.issubdtype(avals[0].dtype, jnp.floating):
        raise ValueError(
            "score_mod: must return one floating score for score, b, h, q and k, all of them "
            f"scalars, got {[f'{a.dtype}{list(a.shape)}' for a in avals]}; kernels apply it to "
            "whole tiles."
        )
    consts = [jnp.asarray(c) for c in closed.consts]
    flat, tables = _flatten(
        lambda *xs: jaxprs.run(closed.jaxpr, xs[5:], xs[:5], jaxprs.CALLS), 5, consts, dtype
    )
    return _build(flat, has_score=True, what="score_mod"), tables


def trace_predicate(mask: Any) -> tuple[TileProgram, list[Any]]:
    """Traces a mask program's predicate: the program, and the mask's array leaves."""
    leaves, tree = jax.tree.flatten(mask)

    def predicate(b: Any, h: Any, q: Any, k: Any, *leaves: Any) -> Any:
        return jnp.asarray(jax.tree.unflatten(tree, leaves).predicate(b, h, q, k))

    index = jax.ShapeDtypeStruct((), jnp.int32)
    closed = jax.make_jaxpr(predicate)(*[index] * 4, *leaves)
    consts = [*leaves, *closed.consts]
    n = len(leaves)

    def run(*xs: Any) -> Any:
        return jaxprs.run(closed.jaxpr, xs[4 + n :], xs[: 4 + n], (*jaxprs.CALLS, *jaxprs.CUSTOM))

    flat, tables = _flatten(run, 4, consts, None)
    return _build(flat, has_score=False, what="mask"), tables


def evaluate_reads(
    program: TileProgram,
    tables: Sequence[Any],
    *,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    q_offset: Any,
) -> list[Any]:
    """The read arrays of a program, in plain differentiable JAX.

    Args:
      program: from `trace_score_mod` or `trace_predicate`.
      tables: the arrays returned with it.
      batch, heads, q_len, kv_len: sizes, in rows, heads and tokens.
      q_offset: absolute index of the first query, an integer or an array [1] or [batch].

    Returns:
      For each read an array as the table of the module says: floating (at least float32) or int32;
      for "pair" a list of tables.
    """
    offset = jnp.asarray(q_offset, jnp.int32).reshape(-1)
    return [
        list(tables)
        if read.kind == "pair"
        else _evaluate_read(read, tables, (batch, heads, q_len, kv_len), offset)
        for read in program.reads
    ]


def pair_values(read: Read, tables: Sequence[Any], b: Any, h: Any, q: Any, k: Any) -> jax.Array:
    """Values of a "pair" read on a tile: q and k broadcast against each other."""
    shape = np.broadcast_shapes(jnp.shape(q), jnp.shape(k))
    q, k = (jaxprs.spread(x, shape).reshape(-1) for x in (q, k))
    values = jax.vmap(lambda q, k: _value(read, b, h, q, k, tables))(q, k)
    return values.reshape(shape)


def _evaluate_read(read: Read, tables: Any, sizes: tuple[int, ...], offset: jax.Array) -> jax.Array:
    batch, heads, t, s = sizes
    rows = batch if "b" in read.uses else 1
    if read.kind in ("query", "offset") and offset.shape[0] > 1:
        rows = batch
    b = jnp.arange(rows, dtype=jnp.int32)
    h = jnp.arange(heads if "h" in read.uses else 1, dtype=jnp.int32)
    offset = jnp.broadcast_to(offset, (rows,)) if offset.shape[0] == 1 else offset[:rows]
    zero = jnp.zeros((), jnp.int32)

    def at(b: Any, h: Any, first: Any) -> Any:
        def by_query(q: Any) -> Any:
            return _value(read, b, h, q, zero, tables)

        if read.kind == "scalar":
            return by_query(zero)
        if read.kind == "key":
            keys = jnp.arange(s, dtype=jnp.int32)
            return jax.vmap(lambda k: _value(read, b, h, zero, k, tables))(keys)
        if read.kind == "query":
            return jax.vmap(by_query)(jnp.arange(t, dtype=jnp.int32) + first)
        return jax.vmap(by_query)(jnp.arange(1 - s, t, dtype=jnp.int32) + first)

    over_heads = jax.vmap(at, in_axes=(None, 0, None))
    return jax.vmap(over_heads, in_axes=(0, None, 0))(b, h, offset)


def _value(read: Read, b: Any, h: Any, q: Any, k: Any, tables: Sequence[Any]) -> jax.Array:
    closed = read.jaxpr
    value = jaxprs.run(closed.jaxpr, closed.consts, (b, h, q, k, *map(jnp.asarray, tables)), ())[0]
    if not read.is_float:
        return value.astype(jnp.int32)
    return value if value.dtype == jnp.float64 else value.astype(jnp.float32)


class _Dependence(NamedTuple):
    """What a scalar depends on: letters, and its coefficients of q and k where it is affine."""

    letters: frozenset[str]
    affine: tuple[int, int] | None


_CONSTANT = _Dependence(frozenset(), (0, 0))
_TABLE = _Dependence(frozenset({"table"}), None)


def _build(jaxpr: Any, *, has_score: bool, what: str) -> TileProgram:
    """Splits a flat scalar jaxpr (score?, b, h, q, k, *tables) into reads and a core."""
    lead = 5 if has_score else 4
    names = ("score", "b", "h", "q", "k")[5 - lead :]
    depends: dict[Any, _Dependence] = {}
    for var, name in zip(jaxpr.invars, names, strict=False):
        affine = {"q": (1, 0), "k": (0, 1), "score": None}.get(name, (0, 0))
        depends[var] = _Dependence(frozenset((name,)), affine)
    tables = set(jaxpr.invars[lead:])
    depends.update({var: _TABLE for var in tables})
    known: dict[Any, Any] = {}  # what depends on nothing
    cut: list[Any] = []  # scalars to read instead of compute
    for eqn in jaxpr.eqns:
        inputs = [v for v in eqn.invars if not isinstance(v, compat.Literal)]
        scalar = all(v.aval.shape == () for v in (*inputs, *eqn.outvars))
        _check_elementwise(eqn, scalar, depends, inputs, what)
        found = _dependence(eqn, depends)
        depends.update({out: found for out in eqn.outvars})
        if not found.letters:
            with jax.ensure_compile_time_eval():
                values = [v.val if isinstance(v, compat.Literal) else known[v] for v in eqn.invars]
                avals = [v.aval for v in eqn.invars]
                values = [jnp.asarray(x, a.dtype) for x, a in zip(values, avals, strict=True)]
                results = map(np.asarray, compat.bind_equation(eqn, values))
            known.update(zip(eqn.outvars, results, strict=True))
            continue
        for out in eqn.outvars:
            if out.aval.shape == () and (not scalar or not found.letters - {"b", "h", "table"}):
                cut.append(out)
    core_inputs = jaxpr.invars[:lead]
    wanted = jaxprs.needed_variables(jaxpr, set(cut) | tables)
    reads = [v for v in (*jaxpr.invars[lead:], *cut) if v in wanted]
    core = jaxprs.part(jaxpr, [*core_inputs, *reads], jaxpr.outvars, known).jaxpr
    found_reads = tuple(
        Read(
            _kind(depends[v]),
            depends[v].letters & {"b", "h"},
            v.aval.dtype,
            jaxprs.part(jaxpr, [*jaxpr.invars[lead - 4 :]], [v], known),
        )
        for v in reads
    )
    derivative = None
    if has_score:
        derivative = _derivative(core, [r.is_float for r in found_reads])
    core = jaxprs.inline(core)
    for part in (core, derivative):
        _check_flat(part, what)
    code = [(r.kind, sorted(r.uses), str(r.jaxpr), _bytes(r.jaxpr.consts)) for r in found_reads]
    key = repr((core, derivative, code))
    return TileProgram(found_reads, core, derivative, has_score, key)


def _bytes(consts: Sequence[Any]) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in consts]


def _dependence(eqn: Any, depends: dict[Any, _Dependence]) -> _Dependence:
    parts = [_CONSTANT if isinstance(v, compat.Literal) else depends[v] for v in eqn.invars]
    affine = None
    name = eqn.primitive.name
    coefficients = [p.affine for p in parts if p.affine is not None]
    all_affine = len(coefficients) == len(parts)
    if name in ("add", "sub") and all_affine:
        sign = 1 if name == "add" else -1
        (a, b), (c, d) = coefficients
        affine = (a + sign * c, b + sign * d)
    elif name == "neg" and all_affine:
        affine = (-coefficients[0][0], -coefficients[0][1])
    elif all_affine and name in (
        "convert_element_type",
        "copy",
        "broadcast_in_dim",
        "squeeze",
        "reshape",
    ):
        if jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.signedinteger):
            affine = coefficients[0]
    letters = frozenset().union(*(p.letters for p in parts))
    if affine is not None:
        if affine[0] == -affine[1] != 0:  # a function of q - k
            letters = letters - {"q", "k"} | {"r"}
        return _Dependence(letters, affine)
    if not letters & {"q", "k", "r"}:
        affine = (0, 0)
    return _Dependence(letters, affine)


def _kind(found: _Dependence) -> str:
    of = found.letters & {"q", "k", "r"}
    if not of:
        return "scalar"
    return {"q": "query", "k": "key", "r": "offset"}.get("".join(sorted(of)), "pair")


def _check_elementwise(eqn: Any, scalar: bool, depends: Any, inputs: Any, what: str) -> None:
    touches = any("score" in depends[v].letters for v in inputs)
    if touches and not scalar:
        raise ValueError(
            f"{what}: '{eqn.primitive.name}'{_where(eqn)} uses the score to look something up or "
            "to make an array; only elementwise functions of the score are supported."
        )


def _check_flat(jaxpr: Any, what: str) -> None:
    for eqn in jaxpr.eqns if jaxpr is not None else ():
        if eqn.primitive.name not in ELEMENTWISE:
            raise ValueError(
                f"{what}: '{eqn.primitive.name}'{_where(eqn)} is not elementwise; allowed are "
                "arithmetic, comparisons, logic and functions such as exp or tanh."
            )


def _where(eqn: Any) -> str:
    line = compat.source_line(eqn)
    return f" ({line})" if line else ""


def _derivative(core: Any, is_float: list[bool]) -> Any:
    """(score, b, h, q, k, *values, ct) -> (d score, d of each float value)."""

    def run(*args: Any) -> list[Any]:
        *given, ct = args

        def varied(score: Any, floats: list[Any]) -> Any:
            found = iter(floats)
            values = [next(found) if f else v for f, v in zip(is_float, given[5:], strict=True)]
            return jaxprs.run(core, (), (score, *given[1:5], *values), ())[0]

        floats = [v for f, v in zip(is_float, given[5:], strict=True) if f]
        _, pull = jax.vjp(varied, given[0], floats)
        d_score, d_floats = pull(ct)
        return [d_score, *d_floats]

    avals = [jaxprs.aval_of(v) for v in (*core.invars, core.outvars[0])]
    return jaxprs.inline(jax.make_jaxpr(run)(*avals).jaxpr)


def _flatten(run: Any, lead: int, tables: list[Any], score_dtype: Any) -> tuple[Any, list[Any]]:
    """(flat jaxpr with all arrays as arguments, the arrays): functions called inside may have some.

    Args:
      run: function of `lead` scalars and the tables.
      lead: 5 with a score, 4 without.
      tables: arrays known so far.
      score_dtype: of the score, or None.
    """
    index = jax.ShapeDtypeStruct((), jnp.int32)
    avals = [index] * lead
    if score_dtype is not None:
        avals[0] = jax.ShapeDtypeStruct((), score_dtype)
    closed = jax.make_jaxpr(run)(*avals, *tables)
    if not closed.consts:
        return closed.jaxpr, tables
    found, n = closed.jaxpr, lead + len(tables)
    tables = [*tables, *map(jnp.asarray, closed.consts)]
    return _flatten(lambda *xs: jaxprs.run(found, xs[n:], xs[:n], ()), lead, tables, score_dtype)
