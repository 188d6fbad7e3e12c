"""PINE's prefill and decoding against wzq016/PINE, with the order and shifts of documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.softmax.pine import (
    Documents,
    PineAttention,
    document_importance,
    document_shifts,
)
from tests.golden.compare import Compare, assign


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Prefill and decoded outputs, base positions, and the order of documents for every query.

    The official code computes in float32 throughout, whatever the dtype of the file.
    """
    x, rtol = data["x"], 1e-5
    with jax.enable_x64(x.dtype == np.float64):
        b, prefix = x.shape[0], int(data["prefix_len"])
        lengths, suffix = data["doc_lens"].reshape(-1), int(data["suffix_len"])
        h, g, d = (int(data[name]) for name in ("heads", "kv_heads", "head_dim"))
        length = prefix + int(lengths.sum()) + suffix
        documents = Documents.create(prefix, lengths, b)
        module = PineAttention(
            h, x.shape[-1], h * d, data["o_proj.weight"].shape[0], num_kv_heads=g,
            rope_base=float(data["rope_theta"].reshape(-1)[0]), max_documents=len(lengths),
            param_dtype=x.dtype, rngs=nnx.Rngs(0),
        )  # fmt: skip
        names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
        assign(module, {f"{part}.kernel": data[f"{name}.weight"].T for part, name in names.items()})
        index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (b, length))
        positions = data["all_position_ids"]
        got = documents.positions(index)
        yield Compare("all_position_ids", got if positions.ndim > 1 else got[0], positions, 0.0)
        call = jax.jit(module)
        yield Compare("out", call(jnp.asarray(x), documents=documents), data["out"], rtol)

        if "x_decode" in data:
            steps = jnp.asarray(data["x_decode"])
            cache = module.init_cache(b, length + steps.shape[1])
            _, cache = call(jnp.asarray(x), documents=documents, cache=cache)
            outputs = []
            for i in range(steps.shape[1]):
                y, cache = call(steps[:, i : i + 1], cache=cache)
                outputs.append(y)
            yield Compare("out_decode", jnp.concatenate(outputs, 1), data["out_decode"], rtol)

        q, k = module.query(jnp.asarray(x)), module.key(jnp.asarray(x))
        importance = np.asarray(jax.jit(document_importance)(q, k, documents))[0]  # [t, h, n]
        order = np.argsort(-importance, axis=-1, kind="stable").transpose(1, 0, 2)
        shift = np.asarray(jax.jit(document_shifts)(q, k, documents))[0].transpose(1, 0, 2)
        first = prefix + np.cumsum(lengths) - lengths
        after = slice(length - suffix, length)
        # orders have axes [query's document, rank], shifts [query's document, document]
        found = {
            "doc_order": order[:, first], "doc_shift": shift[:, first],
            "suffix_order": order[:, after], "suffix_shift": shift[:, after],
        }  # fmt: skip
        for name, got in found.items():
            if name in data:
                yield Compare(name, got, data[name], 0.0)
