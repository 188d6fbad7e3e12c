"""epfml/landmark-attention's language model, fed in chunks with retrieval of blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.mechanisms.sparse.landmark_attention import LandmarkAttention, insert_landmarks
from tests.golden.compare import Compare, assign

EPS = 1e-5


def norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """LayerNorm without bias."""
    centered = x - x.mean(-1, keepdims=True)
    scaled = centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + EPS)
    return scaled * weight[None, None]


def attention_of(
    data: Mapping[str, np.ndarray], layer: str, block: int, base: float
) -> LandmarkAttention:
    """The attention of one layer; rows of c_attn are queries, keys, values."""
    rows = data[f"{layer}.attn.c_attn.weight"]
    width, heads = rows.shape[1], int(data["n_head"])
    module = LandmarkAttention(
        heads, width, rows.shape[0] // 3, block=block, rope_base=base, param_dtype=rows.dtype,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    parts = dict(zip(("query", "key", "value"), np.split(rows, 3), strict=True))
    parts["out"] = data[f"{layer}.attn.c_proj.weight"]
    assign(module, {f"{name}.kernel": kernel.T for name, kernel in parts.items()})
    return module


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Logits of the ordinary tokens."""
    ids, mem_freq = data["ids"], int(data["mem_freq"])
    embedding = data["transformer.wte.weight"]
    wide = embedding.dtype == np.float64
    heads, freqs = int(data["n_head"]), data["transformer.wpe.freqs"]
    planes = len(freqs)
    # freqs_i = base^(-i / planes); the last one tells the base most precisely
    base = float(freqs[-1]) ** (-planes / (planes - 1)) if planes > 1 else 1e4
    count = len({k.split(".")[2] for k in data if k.startswith("transformer.h.")})
    layers = [f"transformer.h.{i}" for i in range(count)]
    options = {"select": str(data["selection"])}
    sizes = (len(ids), int(data["cache_blocks"]), int(data["top_k"]))
    with jax.enable_x64(wide):
        modules = [attention_of(data, layer, mem_freq + 1, base) for layer in layers]
        np.testing.assert_allclose(freqs, base ** (-np.arange(planes) / planes), rtol=1e-6)
        assert modules[0].head_dim == embedding.shape[1] // heads
        arrays = {name: jnp.asarray(data[name]) for name in data if name.endswith(".weight")}

        def run(tokens, caches):
            x = arrays["transformer.wte.weight"][tokens]
            new = []
            for layer, module, cache in zip(layers, modules, caches, strict=True):
                y, cache = module(norm(x, arrays[f"{layer}.ln_1.weight"]), cache=cache)
                x = x + y
                hidden = norm(x, arrays[f"{layer}.ln_2.weight"])
                hidden = jnp.einsum("btm,nm->btn", hidden, arrays[f"{layer}.mlp.c_fc.weight"])
                hidden = jax.nn.gelu(hidden, approximate=False)
                x = x + jnp.einsum("btn,mn->btm", hidden, arrays[f"{layer}.mlp.c_proj.weight"])
                new.append(cache)
            x = norm(x, arrays["transformer.ln_f.weight"])
            return jnp.einsum("btm,vm->btv", x, arrays["lm_head.weight"]), new

        run = jax.jit(run)
        caches = [m.init_retrieval(*sizes, **options) for m in modules]
        logits, at = [], 0
        for chunk in data["chunks"]:
            ordinary = jnp.asarray(ids[:, at : at + int(chunk)])
            pending = at % mem_freq
            tokens = insert_landmarks(ordinary, mem_freq, int(data["landmark_id"]), pending=pending)
            out, caches = run(tokens, caches)
            place = (np.arange(tokens.shape[1]) + pending) % (mem_freq + 1)
            logits.append(out[:, place < mem_freq])
            at += int(chunk)
        got = jnp.concatenate(logits, axis=1)
        yield Compare("logits", got, data["logits"][:, :at], 1e-8 if wide else 1e-5)
