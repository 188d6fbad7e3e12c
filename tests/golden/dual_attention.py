"""Dual attention with its symbol retrievers against Awni00/dual-attention.

The files hold float32 arrays that were computed in float64 from float32 inputs and weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.softmax.dual_attention_transformer import (
    DualAttention,
    RelativeSymbols,
    SymbolicAttention,
    relations,
)
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Symbols, weights, relations, output, and the gradient by the input through the symbols."""
    for case in sorted({name.partition("/")[0] for name in data if "/" in name}):
        part = {n.removeprefix(f"{case}/"): n for n in data if n.startswith(f"{case}/")}
        # float32 files round float64 results, so they are computed in float64 here as well
        rtol = 1e-8 if data[part["out"]].dtype == np.float64 else 1e-6
        with jax.enable_x64(True):
            yield from _case(case, _Part(data, part), rtol)


class _Part(Mapping[str, np.ndarray]):
    """The keys of one sub-case, without its name; reads the file as it is asked."""

    def __init__(self, data: Mapping[str, np.ndarray], names: Mapping[str, str]):
        self.data, self.names = data, names

    def __getitem__(self, name: str) -> np.ndarray:
        return self.data[self.names[name]]

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _case(case: str, data: Mapping[str, np.ndarray], rtol: float) -> Iterable[Compare]:
    x = jnp.asarray(data["x"], jnp.float64)
    causal = bool(data["causal"]) if "causal" in data else False
    module = _module(data, x.shape[-1], causal)
    graph, state = nnx.split(module)

    @jax.jit
    def run(x, cot):
        layer = nnx.merge(graph, state)
        out, pull, sites = jax.vjp(lambda x: layer(x, capture=("weights",)), x, has_aux=True)
        pairs = None
        if layer.relation_query is not None:
            key_map = layer.relation_key or layer.relation_query
            queries, keys = layer.relation_query(x), key_map(x)
            pairs = relations(queries, keys, layer.relation_activation)
        return out, pull(cot)[0], sites["weights"], pairs, _symbols(layer.retriever, x)

    cot = data["cot"] if "cot" in data else np.zeros_like(data["out"])
    out, grad, weights, pairs, symbols = run(x, jnp.asarray(cot, jnp.float64))
    if "symbols" in data:
        yield Compare(f"{case}/symbols", symbols, data["symbols"], rtol)
    if "ra_attn" in data:
        yield Compare(f"{case}/ra_attn", weights[:, module.sizes[0] :], data["ra_attn"], rtol)
    if "ra_rel" in data:
        assert pairs is not None
        yield Compare(f"{case}/ra_rel", jnp.moveaxis(pairs, 1, -1), data["ra_rel"], rtol)
    keys = "w/relational_attention.wk_rel.weight"
    if module.relation_key is None and keys in data:  # shared weights, held twice
        yield Compare(keys, data[keys.replace("wk_rel", "wq_rel")], data[keys], 0.0)
    yield Compare(f"{case}/out", out, data["out"], rtol)
    if "grad_x" in data:
        yield Compare(f"{case}/grad_x", grad, data["grad_x"], rtol)


def _symbols(retriever: Any, x: jax.Array) -> jax.Array:
    if isinstance(retriever, RelativeSymbols):
        index, far = np.arange(x.shape[1]), retriever.max_distance
        return retriever.table[...][np.clip(index[None] - index[:, None], -far, far) + far]
    return retriever(x)


def _module(data: Mapping[str, np.ndarray], width: int, causal: bool) -> DualAttention:
    sensory, relational = "w/self_attention.", "w/relational_attention."
    h_ra, d, n = data[f"{relational}wr"].shape
    rngs, wide = nnx.Rngs(0), jnp.float64
    has_sensory = f"{sensory}wq.weight" in data
    h_sa = data[f"{sensory}wq.weight"].shape[0] // d if has_sensory else 0
    symmetric = bool(data["symmetric"]) if "symmetric" in data else False
    given: dict[str, Any] = {}
    if "sw/rel_pos_enc.rel_pos_embeddings" in data:
        table = data["sw/rel_pos_enc.rel_pos_embeddings"]
        retriever: Any = RelativeSymbols(width, len(table) // 2, param_dtype=wide, rngs=rngs)
        given["retriever.table"] = table
    else:
        heads = int(data["symbol_heads"]) if "symbol_heads" in data else 2
        library = data["sw/symbol_library"]
        retriever = SymbolicAttention(width, heads, len(library), param_dtype=wide, rngs=rngs)
        given["retriever.query.kernel"] = data["sw/q_proj.weight"].T
        if "sw/q_proj.bias" in data:  # it starts at 0
            given["retriever.query.bias"] = data["sw/q_proj.bias"]
        given["retriever.template"] = data["sw/template_features"]
        given["retriever.library"] = library
    module = DualAttention(
        h_sa + h_ra, width, (h_sa + h_ra) * d, (h_sa + h_ra) * d, relational_heads=h_ra,
        num_relations=n, relation_dim=data[f"{relational}wq_rel.weight"].shape[0] // n,
        symmetric=symmetric, causal=causal, symbols=retriever,
        relation_activation=str(data["rel_act"]) if "rel_act" in data else "identity",
        relational_kv_heads=data[f"{relational}wk_attn.weight"].shape[0] // d,
        sensory_kv_heads=data[f"{sensory}wk.weight"].shape[0] // d if has_sensory else None,
        param_dtype=wide, rngs=rngs,
    )  # fmt: skip
    names = {"relation_query": "wq_rel", "symbol_value": "wv", "relational_out": "wo"}
    if not symmetric:
        names["relation_key"] = "wk_rel"
    maps = {mine: f"{relational}{theirs}" for mine, theirs in names.items()}
    if has_sensory:
        maps |= {"value": f"{sensory}wv", "out": f"{sensory}wo"}
    given |= {f"{mine}.kernel": data[f"{theirs}.weight"].T for mine, theirs in maps.items()}
    for mine, theirs in (("query", "wq"), ("key", "wk")):
        both = [f"{sensory}{theirs}.weight"] * has_sensory + [f"{relational}{theirs}_attn.weight"]
        given[f"{mine}.kernel"] = np.concatenate([data[name] for name in both]).T
    given["relation_kernel"] = data[f"{relational}wr"]
    assign(module, given)
    return module
