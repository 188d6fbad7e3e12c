"""Selective multi-head attention by loops over heads; capacity, reductions, decoding; the MLP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

from attnjax.attention import attention
from attnjax.mechanisms.gates.union_of_experts import (
    SelectiveMultiHeadAttention,
    UnionOfExpertsMLP,
    selective_attention,
    selective_gates,
)
from attnjax.positions import apply_rope, rope_frequencies


def naive(q, k, v, chosen, *, causal, capacity=None, priority=None, base=None):
    """One row [t, h, d]: every head gathers its tokens and attends among them."""
    out = np.zeros_like(v)
    for h in range(q.shape[1]):
        tokens = np.flatnonzero(chosen[:, h])
        if capacity is not None and not causal:
            tokens = np.sort(tokens[np.argsort(-priority[tokens, h], kind="stable")[:capacity]])
        tokens = tokens[:capacity]
        n = len(tokens)
        parts = [a[tokens, h] for a in (q, k, v)]
        if base is not None:
            freq, _ = rope_frequencies(q.shape[-1], base, None, None)
            for i in range(2):
                turned = apply_rope(jnp.asarray(parts[i])[None, :, None], jnp.arange(n), freq)
                parts[i] = np.asarray(turned)[0, :, 0]
        s = parts[0] @ parts[1].T / np.sqrt(q.shape[-1])
        s = np.where(np.tril(np.ones((n, n))) > 0, s, -np.inf) if causal else s
        w = np.exp(s - s.max(-1, keepdims=True))
        out[tokens, h] = w / w.sum(-1, keepdims=True) @ parts[2]
    return out


@pytest.fixture
def parts(key):
    keys = jax.random.split(key, 4)
    q, k, v = (jax.random.normal(s, (1, 12, 4, 4)) for s in keys[:3])
    gates, chosen = selective_gates(jax.random.normal(keys[3], (1, 12, 4)), 2)
    return q, k, v, chosen, gates


@pytest.mark.parametrize(
    ("causal", "capacity", "base"), [(True, None, 1e4), (True, 3, None), (False, 3, 1e4)]
)
def test_values_by_the_definition(parts, causal, capacity, base):
    q, k, v, chosen, gates = parts
    got = jax.jit(
        lambda *a: selective_attention(
            *a, causal=causal, capacity=capacity, priority=gates, rope_base=base
        )
    )(q, k, v, chosen)
    arrays = (np.asarray(a)[0] for a in (q, k, v, chosen))
    want = naive(
        *arrays, causal=causal, capacity=capacity, priority=np.asarray(gates)[0], base=base
    )
    assert_allclose(got[0], want, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_masked_attention(parts):
    """Without rotation a head is attention whose hidden pairs are masked."""
    q, k, v, chosen, _ = parts
    by_head = chosen.transpose(0, 2, 1)
    mask = by_head[..., None] & by_head[:, :, None]

    def masked(q, k, v):
        return attention(q, k, v, mask=mask, is_causal=True)

    @jax.jit
    def both(q, k, v):
        ct = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
        results = [
            jax.vjp(f, q, k, v) for f in (lambda *a: selective_attention(*a, chosen), masked)
        ]
        return [pull(ct) for _, pull in results]

    for got, want in zip(*both(q, k, v)):
        assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_all_heads_for_all_tokens_is_plain_attention(key):
    x = jax.random.normal(key, (2, 9, 8))
    module = SelectiveMultiHeadAttention(4, 8, top_k=4, rngs=nnx.Rngs(0))
    module.route.kernel[...] = jnp.zeros_like(module.route.kernel[...])
    z, captured = jax.jit(lambda x: module(x, capture=("z", "q", "k", "v")))(x)
    freq, _ = rope_frequencies(2, 1e4, None, None)
    q, k = (apply_rope(captured[n], jnp.arange(9), freq) for n in ("q", "k"))
    want = attention(q, k, captured["v"], is_causal=True)
    assert_allclose(captured["z"], want, rtol=1e-5, atol=1e-6)


def test_each_token_is_in_top_k_heads_and_gates_average_one(key):
    gates, chosen = selective_gates(jax.random.normal(key, (2, 7, 6)), 3)
    assert_array_equal(chosen.sum(-1), 3)
    assert_allclose(gates.sum(-1), 3, rtol=1e-5)
    assert_array_equal(gates > 0, chosen)
    ties = selective_gates(jnp.zeros((1, 1, 4)), 2)[1]
    assert_array_equal(ties[0, 0], [True, True, False, False])


def test_the_router_learns_only_through_gated_outputs(key):
    x = jax.random.normal(key, (1, 9, 8))
    module = SelectiveMultiHeadAttention(4, 8, rngs=nnx.Rngs(0))
    for gated in (True, False):
        module.gate_output = gated
        graph, state = nnx.split(module)
        grad = jax.jit(jax.grad(lambda s, g=graph: (nnx.merge(g, s)(x) ** 2).sum()))(state)
        assert (np.abs(grad["route"].kernel[...]).max() > 1e-4) == gated


def test_decoding_with_capacity_and_documents_with_capacity(key):
    """Heads take the first tokens, of each document; the cache is as long as the capacity."""
    x = jax.random.normal(key, (2, 9, 8))
    module = SelectiveMultiHeadAttention(4, 8, capacity=3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(module)
    call = jax.jit(lambda state, x, **options: nnx.merge(graph, state)(x, **options))
    want = call(state, x)
    cache = module.init_cache(2, 20)
    assert cache.state["key"].shape == (2, 3, 4, 2)
    first, cache = call(state, x[:, :4], cache=cache)
    rest, cache = call(state, x[:, 4:], cache=cache)
    assert_allclose(jnp.concatenate([first, rest], 1), want, rtol=1e-5, atol=1e-6)
    assert cache.state["filled"].max() <= 3
    ids = jnp.broadcast_to((jnp.arange(9)[None] >= 4).astype(jnp.int32), (2, 9))
    packed = call(state, x, segment_ids=ids)
    assert_allclose(packed[:, 4:], call(state, x[:, 4:]), rtol=1e-5, atol=1e-6)


def test_dropout_acts_on_weights_with_and_without_a_cache(key):
    x = jax.random.normal(key, (2, 6, 8))
    module = SelectiveMultiHeadAttention(4, 8, dropout_rate=0.5, rngs=nnx.Rngs(0))
    cache = module.init_cache(2, 6)

    @jax.jit
    def run(x, key):
        still, _ = module(x, cache=cache, deterministic=True)
        options = {"deterministic": False, "dropout_rng": key}
        return still, module(x, **options), module(x, cache=cache, **options)[0]

    still, whole, cached = run(x, key)
    assert np.abs(whole - still).max() > 1e-3
    assert np.abs(cached - still).max() > 1e-3


def test_mlp(key):
    """All experts and a router of zeros: the whole MLP. Capacity for all: the same as None."""
    x = jax.random.normal(key, (2, 5, 8))
    module = UnionOfExpertsMLP(4, 8, 16, top_k=4, rngs=nnx.Rngs(0))
    learned = module.route.kernel[...]
    module.route.kernel[...] = jnp.zeros_like(learned)
    up, down = (p.kernel[...] for p in (module.up, module.down))
    want = jax.nn.gelu(x @ up.reshape(8, 16)) @ down.reshape(16, 8)
    assert_allclose(jax.jit(lambda x: module(x))(x), want, rtol=1e-5, atol=1e-6)
    module.route.kernel[...], module.top_k = learned, 2

    @jax.jit
    def of_experts(x):
        gates, chosen = selective_gates(module.route(x), 2)
        parts = jnp.einsum("btm,mec->btec", x, up)
        parts = jnp.einsum("btec,ecm->btem", jax.nn.gelu(parts), down) * gates[..., None]
        taken = chosen & (jnp.cumsum(chosen.astype(jnp.int32), 1) <= 2)
        return parts.sum(2), jnp.where(taken[..., None], parts, 0).sum(2)

    every, first = of_experts(x)
    assert_allclose(jax.jit(lambda x: module(x))(x), every, rtol=1e-4, atol=1e-5)
    module.capacity = 2
    assert_allclose(jax.jit(lambda x: module(x))(x), first, rtol=1e-4, atol=1e-5)
    assert np.abs(every - first).max() > 1e-3


def test_bad_input(parts):
    q, k, v, chosen, _ = parts
    make = SelectiveMultiHeadAttention
    with pytest.raises(ValueError, match="top_k=5 must be at least 1"):
        make(4, 8, top_k=5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        make(4, 8, capacity=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="positions must be"):
        make(4, 8, positions="none", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="selective_gates: top_k=5"):
        selective_gates(jnp.zeros((1, 2, 4)), 5)
    with pytest.raises(ValueError, match="'compact' or integers"):
        selective_attention(q, k, v, chosen, positions="original")
    with pytest.raises(ValueError, match="multiple of num_experts"):
        UnionOfExpertsMLP(3, 8, 16, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must be .batch, length, heads"):
        selective_attention(q, k, v, chosen[..., :2])
    with pytest.raises(NotImplementedError, match="causal=True only"):
        ids = jnp.zeros(q.shape[:2], jnp.int32)
        selective_attention(q, k, v, chosen, capacity=2, causal=False, segment_ids=ids)
