"""Traced score functions and predicates: kinds of look-ups, values, derivatives, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attnjax as aj
from attnjax.masks import Causal, Lengths, Segments, Sink, Window, per_head
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.modtrace import evaluate_reads, trace_predicate, trace_score_mod

B, H, T, S = 2, 3, 5, 7
SIZES = {"batch": B, "heads": H, "q_len": T, "kv_len": S}


def table(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


SLOPES, PER_QUERY, PER_KEY = table(H), table(B, 40), table(H, 40)
OFFSETS, PAIRS = table(H, 80), table(40, 40)

MODS = {
    "plain": (lambda s, b, h, q, k: jnp.tanh(s) * 2.0, []),
    "scalar": (lambda s, b, h, q, k: s + SLOPES[h] * (q - k).astype(s.dtype), ["scalar"]),
    "made inside": (lambda s, b, h, q, k: s * jnp.arange(1.0, 9.0)[h] + jnp.cos(2.0), ["scalar"]),
    "called": (lambda s, b, h, q, k: s + jax.jit(lambda i: SLOPES[i])(h), ["scalar"]),
    "from the head alone": (lambda s, b, h, q, k: s * 2.0 ** -h.astype(s.dtype), ["scalar"]),
    "query": (lambda s, b, h, q, k: s * PER_QUERY[b, q], ["query"]),
    "key": (lambda s, b, h, q, k: s + PER_KEY[h, k // 2], ["key"]),
    "offset": (lambda s, b, h, q, k: s + OFFSETS[h, q - k + 40], ["offset"]),
    "clipped offset": (
        lambda s, b, h, q, k: s + OFFSETS[0, jnp.clip(k - q, -3, 3) + 3],
        ["offset"],
    ),
    "pair": (lambda s, b, h, q, k: s + PAIRS[q, k], ["pair"]),
    "branches": (
        lambda s, b, h, q, k: jnp.where((q % 3 == 0) | (k > 4), jax.nn.relu(s), -s),
        [],
    ),
    "booleans": (
        lambda s, b, h, q, k: jnp.where(jnp.where(q > k, k % 2 == 0, q == k), s, s * s),
        [],
    ),
    "several": (
        lambda s, b, h, q, k: s * SLOPES[h] + PER_QUERY[b, q] * OFFSETS[h, q - k + 40],
        ["scalar", "query", "offset"],
    ),
}


def tile_values(program, reads, b, h, rows, columns):
    """What a kernel would hold for one (row, head): the whole matrix as one tile."""
    values = []
    for read, x in zip(program.reads, reads, strict=True):
        x = np.asarray(x)[b if x.shape[0] > 1 else 0, h if x.shape[1] > 1 else 0]
        i, j = np.arange(rows)[:, None], np.arange(columns)[None]
        shaped = {
            "scalar": lambda x=x: x,
            "query": lambda x=x: x[:, None],
            "key": lambda x=x: x[None],
            "offset": lambda x=x, i=i, j=j: x[i - j + columns - 1],
        }[read.kind]()
        values.append(jnp.asarray(shaped))
    return values


@pytest.mark.parametrize("name", [n for n in MODS if n != "pair"])
@pytest.mark.parametrize("offset", [0, 9])
def test_programs_agree_with_the_function(name, offset):
    mod, kinds = MODS[name]
    program, tables = trace_score_mod(mod, jnp.float32)
    assert sorted(program.kinds) == sorted(kinds)
    reads = evaluate_reads(program, tables, q_offset=offset, **SIZES)
    score = table(T, S)
    for b, h in ((0, 0), (1, 2)):
        q = jnp.arange(T, dtype=jnp.int32)[:, None] + offset
        k = jnp.arange(S, dtype=jnp.int32)[None]
        at = (jnp.int32(b), jnp.int32(h), q, k)
        values = tile_values(program, reads, b, h, T, S)

        def scalar(score, q, k, at=at):
            return mod(score, at[0], at[1], q, k)

        full = [jnp.broadcast_to(x, score.shape) for x in (q, k)]
        want = jax.vmap(jax.vmap(scalar))(score, *full)
        np.testing.assert_allclose(program(score, *at, values), want, rtol=2e-6, atol=1e-6)
        ct = table(T, S, 1)[..., 0]
        d_score, _ = program.grad(score, *at, values, ct)
        slope = jax.vmap(jax.vmap(jax.grad(scalar)))(score, *full)
        np.testing.assert_allclose(d_score, slope * ct, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in MODS if n not in ("plain", "branches", "booleans")])
def test_gradients_of_looked_up_arrays(name):
    """Through the whole stack, against the dense path."""
    mod, _ = MODS[name]
    x = jax.random.normal(jax.random.key(0), (B, 33, H, 4))

    def loss(weights, implementation):
        def scaled(s, b, h, q, k):
            return mod(s, b, h, q, k) * weights[h, q - k + 40] + weights[0, q]

        out = aj.attention(
            x, x, x, mask=Causal(), score_mod=scaled, implementation=implementation,
            block_sizes=(16, 8) if implementation != "dense" else None,
        )  # fmt: skip
        return (out**3).sum()

    got, want = (jax.grad(loss)(table(H, 80), name) for name in ("block_sparse", "dense"))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_predicates_look_up_by_query_and_by_key():
    ids = jnp.zeros((B, T), jnp.int32)
    masks = {
        (): Causal() & (Window(3) | Sink(1)),
        ("key", "query"): Segments(ids),
        ("scalar",): Lengths(jnp.array([3, 4])),
        ("scalar", "scalar"): per_head([Causal(), Window(2), Causal()]),
    }
    for kinds, mask in masks.items():
        program, _ = trace_predicate(mask)
        assert tuple(sorted(program.kinds)) == kinds, mask
        assert program.varies == bool(kinds)


def test_programs_are_equal_when_only_arrays_differ():
    def program(slopes):
        return trace_score_mod(lambda s, b, h, q, k: s * slopes[h], jnp.float32)[0]

    first, second = program(table(H)), program(table(H) + 1)
    assert first == second and hash(first) == hash(second)
    assert first != trace_score_mod(lambda s, b, h, q, k: s * 2, jnp.float32)[0]


@pytest.mark.parametrize(
    ("mod", "sentence"),
    [
        (lambda s, b, h, q, k: PAIRS[q, s.astype(jnp.int32)], "uses the score to look something"),
        (lambda s, b, h, q, k: s > 0, "must return one floating score"),
        (lambda s, b, h, q, k: jnp.stack([s, s]), "must return one floating score"),
        (lambda s, b, h, q, k: jnp.sort(s[None])[0], "uses the score to look something"),
    ],
)
def test_functions_that_are_not_elementwise_are_named(mod, sentence):
    with pytest.raises(ValueError, match=sentence):
        trace_score_mod(mod, jnp.float32)


def test_kernels_name_the_function_they_lack():
    program, _ = trace_score_mod(lambda s, b, h, q, k: jnp.sinh(s), jnp.float32)
    with pytest.raises(Unsupported, match=r"no 'sinh' \(.*test_modtrace"):
        program.check("tpu")
    program, _ = trace_score_mod(MODS["pair"][0], jnp.float32)
    with pytest.raises(Unsupported, match="by query and key at once"):
        program.check("triton")
