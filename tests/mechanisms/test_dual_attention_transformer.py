"""Dual attention against its definition in NumPy, its symbols, and its ablations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.attention import attention
from attnjax.mechanisms.softmax.dual_attention_transformer import (
    DualAttention,
    RelativeSymbols,
    SymbolicAttention,
    relational_attention,
)

B, T, C = 2, 6, 8


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(7), (B, T, C))


def make(heads=4, **options) -> Any:
    return DualAttention(heads, C, **(dict(num_symbols=5, rngs=nnx.Rngs(0)) | options))


def test_equals_the_definition():
    """Pair by pair, with W_r applied to every r_ij."""
    h, g, d, n, r = 4, 2, 3, 5, 2
    rng = np.random.default_rng(0)
    sizes = ((T, h, d), (T, g, d), (T, n, r), (T, n, r), (T, g, d))
    q, k, rq, rk, s = (rng.normal(size=(1, *size)) for size in sizes)
    w = rng.normal(size=(h, d, n))
    mask = np.tril(np.ones((T, T), bool))[None, None]
    with jax.enable_x64(True):
        given = [jnp.asarray(a) for a in (q, k, rq, rk, s, w)]
        got = relational_attention(*given, mask=jnp.asarray(mask), activation="tanh")
    pairs = np.tanh(np.einsum("inr,jnr->ijn", rq[0], rk[0]) / np.sqrt(r))
    for i, m in np.ndindex(T, h):
        a = np.exp(k[0, : i + 1, m // 2] @ q[0, i, m] / np.sqrt(d))
        values = pairs[i, : i + 1] @ w[m].T + s[0, : i + 1, m // 2]
        assert_allclose(got[0, i, m], a @ values / a.sum(), rtol=1e-10)


def test_without_relations_it_attends_to_symbols(x):
    module = make(relational_heads=4)
    module.relation_kernel[...] = jnp.zeros_like(module.relation_kernel[...])

    @jax.jit
    def run(x):
        symbols = module.retriever(x)
        q, k = module.query(x), module.key(x)
        z = attention(q, k, module.symbol_value(symbols), is_causal=True)
        same = jnp.broadcast_to(symbols[:1, :1], symbols.shape)
        constant = module(x, symbols=same, capture=("z",))[1]
        return module(x), module.relational_out(z), constant

    got, want, sites = run(x)
    assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    first = jnp.broadcast_to(sites["z"][:, :1], sites["z"].shape)
    assert_allclose(sites["z"], first, rtol=1e-5, atol=1e-5)


def test_without_relational_heads_it_is_self_attention(x):
    module = make(relational_heads=0, rope_base=None)
    q, k, v = (getattr(module, name)(x) for name in ("query", "key", "value"))
    assert_allclose(module(x), module.out(attention(q, k, v, is_causal=True)), rtol=1e-5, atol=1e-5)


def test_the_heads_do_not_mix(x):
    """The first half of the output is of the sensory heads alone, the second of the relational."""
    module = make(relational_heads=2)
    call = nnx.jit(lambda module, x: module(x))
    y = call(module, x)
    module.relational_out.kernel[...] = jnp.zeros_like(module.relational_out.kernel[...])
    half = call(module, x)
    assert_array_equal(half[..., : C // 2], y[..., : C // 2])
    assert_array_equal(half[..., C // 2 :], jnp.zeros_like(half[..., C // 2 :]))


@pytest.mark.parametrize("causal", [True, False])
def test_relative_symbols_equal_the_dense_sum(x, causal):
    module = make(relational_heads=4, symbols="relative", num_symbols=2, causal=causal)
    module.relation_kernel[...] = jnp.zeros_like(module.relation_kernel[...])
    y, sites = module(x, capture=("weights",))
    index = np.arange(T)
    symbols = module.retriever.table[...][np.clip(index[None] - index[:, None], -2, 2) + 2]
    values = jnp.einsum("tsm,mhd->tshd", symbols, module.symbol_value.kernel[...])
    z = jnp.einsum("bhts,tshd->bthd", sites["weights"], values)
    assert_allclose(y, module.relational_out(z), rtol=1e-5, atol=1e-5)
    assert len(module.retriever.table[...]) == 5


def test_relative_symbols_decode(x):
    module = make(symbols="relative", num_symbols=2)
    step = jax.jit(lambda x, cache: module(x, cache=cache))
    cache, outputs = module.init_cache(B, T + 2), []
    for t in range(T):
        y, cache = step(x[:, t : t + 1], cache)
        outputs.append(y)
    assert_allclose(jnp.concatenate(outputs, 1), module(x), rtol=1e-5, atol=1e-5)


def test_symmetric_relations_and_tied_scores(x):
    module = make(symmetric=True, tie_scores=True, causal=False)
    assert module.relation_key is None and module.query.kernel.shape == (C, 2, C // 4)
    _, sites = module(x, capture=("weights",))
    assert_array_equal(sites["weights"][:, :2], sites["weights"][:, 2:])


def test_ablations(x):
    names = [n for n in ("relation_query", "relation_kernel") if getattr(make(form="rca"), n)]
    assert names == []
    module = make(relational_heads=4, form="disentangled_rca", causal=False)
    assert module.relation_kernel is None
    y, sites = module(x, capture=("weights",))
    rq, rk = module.relation_query(x), module.relation_key(x)
    r = jnp.einsum("bthd,bshd->bhts", rq, rk) * (C // 4) ** -0.5
    values = module.symbol_value(module.retriever(x))
    z = jnp.einsum("bhts,bshd->bthd", sites["weights"] * r, values)
    assert_allclose(y, module.relational_out(z), rtol=1e-5, atol=1e-5)


def test_retrievers_are_shared_between_layers(x):
    first = make()
    second = make(symbols=first.retriever, rngs=nnx.Rngs(1))
    assert second.retriever is first.retriever
    library = SymbolicAttention(C, 2, 5, library=first.retriever.library, rngs=nnx.Rngs(2))
    assert library.library is first.retriever.library
    symbols = first.retriever(x)
    assert_allclose(second(x, symbols=symbols), second(x), rtol=1e-6)
    by_position = make(symbols="positional", num_symbols=4)
    far = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    rows = by_position.retriever(x, far)
    assert_array_equal(rows[0, 4], rows[0, 3])


def test_each_kind_of_heads_has_its_own_key_value_heads(x):
    module = DualAttention(
        6, 12, relational_heads=4, relational_kv_heads=2, sensory_kv_heads=1, num_relations=8,
        num_symbols=3, rngs=nnx.Rngs(0),
    )  # fmt: skip
    wide = make(num_relations=3, relation_dim=5)
    assert wide.relation_query.kernel.shape == (C, 3, 5)
    assert wide.token_shapes()["relation_key"] == (3, 5)
    assert module.kv_sizes == (1, 2) and module.relation_query.kernel.shape == (12, 8, 1)
    assert jax.eval_shape(module, jnp.ones((1, 3, 12))).shape == (1, 3, 12)


def test_bad_options_are_named(x):
    for options, message in (
        (dict(relational_heads=5), "relational_heads=5"),
        (dict(num_relations=3), "num_relations=3 must divide"),
        (dict(relation_dim=0), "relation_dim=0"),
        (dict(relation_activation="x"), "activation='x'"),
        (dict(form="x"), "form='x'"),
        (dict(form="disentangled_rca", num_relations=1), "one relation for each"),
        (dict(symbols="x"), "symbols='x'"),
        (dict(relational_heads=3, tie_scores=True), "tie_scores needs"),
        (dict(relational_heads=3, num_kv_heads=2), "1 sensory heads cannot share 0.5"),
        (dict(out_features=3), "out_features=3"),
        (dict(num_symbols=0), "num_symbols=0"),
        (dict(symbols="relative", num_symbols=0), "max_distance=0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    module = make(symbols=RelativeSymbols(C, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="no symbols by token"):
        module(x, symbols=x)
    with pytest.raises(ValueError, match="shape of x"):
        make()(x, symbols=x[:, 1:])
