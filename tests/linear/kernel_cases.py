"""What the TPU and the Triton kernel must both reach, stepped through in interpret mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.linear import linear_attention as module
from pallas_kernels.compat import enable_x64
from pallas_kernels.linear import LinearSpec, Operands, linear_recurrence
from tests.golden import lightning, linear_family
from tests.golden.compare import GoldenFile
from tests.golden.test_golden import FOLDER
from tests.linear.naive import cast, error, problem, recurrence

SCALE = 0.4
VALUES, GRADIENTS = 2e-6, 1e-5
"""Float32, relative to the largest entry."""
RMS = 0.005
"""16-bit inputs: root mean square of the error over that of the result."""
NARROW = ("query", "key", "value")


@functools.cache
def wanted(option, dtype, t, segments, sizes):
    """Arguments rounded to a type, and float64 results of the recurrence for them, as NumPy."""
    with enable_x64(True):
        p = problem(option, t=t, **dict(sizes))
        wide = jnp.float64 if dtype == jnp.float64 else jnp.float32
        p = {n: x.astype(dtype if n in NARROW else wide) for n, x in p.items()}
        ids, rng = segment_ids(segments, *p["query"].shape[:2]), np.random.default_rng(1)
        d_out = jnp.asarray(rng.standard_normal(p["value"].shape)).astype(dtype)
        d_state = jnp.asarray(rng.standard_normal(p["initial_state"].shape)).astype(wide)

        def loss(p):
            out, state = recurrence(p, SCALE, ids)
            both = jnp.vdot(out, d_out.astype(out.dtype)) + jnp.vdot(
                state, d_state.astype(out.dtype)
            )
            return both, (out, state)

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(cast(p, jnp.float64))
        arrays = jax.tree.map(np.asarray, (p, d_out, d_state, *out, grads))
        return (*arrays, None if ids is None else np.asarray(ids))


def segment_ids(segments, b, t):
    if not segments:
        return None
    return jnp.asarray(np.cumsum(np.random.default_rng(2).random((b, t)) < 0.05, axis=1), jnp.int32)


def spec(implementation, chunk=None):
    return LinearSpec(chunk, SCALE, implementation)


def operands(p, ids=None):
    runs = None if ids is None else module.runs(jnp.asarray(ids))
    return Operands(**{n: jnp.asarray(x) for n, x in p.items()}, runs=runs)


@functools.partial(jax.jit, static_argnames="spec")
def results(x, d_out, d_state, spec):
    """Output, final state, gradients of the operands."""

    def loss(x):
        out, state = linear_recurrence(x, spec)
        both = jnp.sum(out.astype(state.dtype) * d_out.astype(state.dtype)) + jnp.sum(
            state * d_state
        )
        return both, (out, state)

    # segment numbers have no gradient
    floats = x._replace(runs=None)
    (_, out), grads = jax.value_and_grad(lambda f: loss(f._replace(runs=x.runs)), has_aux=True)(
        floats
    )
    return *out, grads


def errors(implementation, option, t, dtype=jnp.float32, *, segments=False, chunk=None, **sizes):
    """Name -> error of every result; root mean square for 16 bits."""
    p, d_out, d_state, out, state, grads, ids = wanted(
        option, dtype, t, segments, tuple(sizes.items())
    )
    with enable_x64(dtype == jnp.float64):
        got = results(
            operands(p, ids), jnp.asarray(d_out), jnp.asarray(d_state), spec(implementation, chunk)
        )
    measure = ratio if jnp.dtype(dtype).itemsize == 2 else error
    found = {"out": measure(got[0], out), "state": measure(got[1], state)}
    return found | {n: measure(getattr(got[2], n), g) for n, g in grads.items()}


def ratio(got, want):
    difference = np.asarray(got, np.float64) - want
    return float(np.sqrt(np.mean(difference**2) / np.mean(want**2)))


def check(implementation, option, t, dtype=jnp.float32, **options):
    found = errors(implementation, option, t, dtype, **options)
    values, gradients = (
        (RMS, RMS) if jnp.dtype(dtype).itemsize == 2
        else (1e-12, 1e-9) if dtype == jnp.float64
        else (VALUES, GRADIENTS)
    )  # fmt: skip
    for name, size in found.items():
        allowed = values if name in ("out", "state") else gradients
        assert size <= allowed, (name, found)


def check_hand_over(implementation, option, splits):
    t = max(splits) + 9
    p = {n: np.asarray(x, np.float32) for n, x in problem(option, t=t).items()}
    whole, last = linear_recurrence(operands(p), spec(implementation))
    for split in splits:
        state, parts = p["initial_state"], []
        for piece in (slice(0, split), slice(split, None)):
            part = {n: x[:, piece] if x.shape[:2] == (2, t) else x for n, x in p.items()}
            out, state = linear_recurrence(
                operands(part | {"initial_state": state}), spec(implementation)
            )
            parts.append(out)
        assert error(jnp.concatenate(parts, axis=1), whole) < VALUES
        assert error(state, last) < VALUES


def check_constant_strong_decay(implementation):
    """Decays of -8 leave gradients of about 1e-4 of what cancels in them."""
    with enable_x64(True):
        p = problem("token", b=1, t=140, h=1)
        p["decay"] = jnp.full_like(p["decay"], -8.0)
        want = jax.grad(lambda p: recurrence(p, SCALE)[0].sum())(p)["decay"]
    got = jax.grad(lambda x: linear_recurrence(x, spec(implementation))[0].sum())(
        operands(cast(p, jnp.float32))
    ).decay
    assert error(got, want) < 1e-4


def check_bitwise(implementation):
    p, d_out, d_state, *_, ids = wanted("token", jnp.float32, 130, True, ())
    runs = [
        results(operands(p, ids), jnp.asarray(d_out), jnp.asarray(d_state), spec(implementation))
        for _ in range(2)
    ]
    assert all(
        np.array_equal(a, b) for a, b in zip(*(jax.tree.leaves(x) for x in runs), strict=True)
    )


def check_vmap(implementation, option):
    """The mapped axis is folded into the heads; the gradient of a decay per head too."""
    p = {n: np.asarray(x, np.float32) for n, x in problem(option, b=1, t=20).items()}
    stacked = {n: np.stack([x, 0.5 * x]) for n, x in p.items() if n != "value"}

    def loss(part):
        x = operands(part | {"value": p["value"]})
        return jnp.sum(linear_recurrence(x, spec(implementation))[0] ** 2)

    got = jax.vmap(jax.grad(loss))(stacked)
    for i in range(2):
        want = jax.grad(loss)({n: x[i] for n, x in stacked.items()})
        assert max(error(got[n][i], want[n]) for n in want) < VALUES


def check_golden(implementation, monkeypatch, case):
    """Golden data through the kernel; options that it lacks go through XLA as ever."""

    def run(x, given):
        lacks = x.beta is not None or x.bonus is not None
        lacks = lacks or (x.decay is not None and x.decay.ndim == 4)
        name = None if lacks else implementation
        used.append(name)
        return linear_recurrence(x, LinearSpec(given.chunk_size, given.scale, name))

    used = []
    monkeypatch.setattr(module, "linear_recurrence", run)
    adapter = {"lightning": lightning, "linear_family": linear_family}[case]
    for path in sorted(FOLDER.glob(f"{case}_*.npz")):
        for compare in adapter.check(GoldenFile(path)):
            assert compare.error() <= compare.rtol, (compare.name, compare.error())
    assert implementation in used
