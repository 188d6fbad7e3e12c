"""Attention Buckets: one prompt under several rotary bases at once, joined by confidence.

    l_j = logits of the run with base_j,   w = softmax_j(max_v l_jv),   merged = Σ_j w_j l_j

Under one base, attention to some distances is in a trough; other bases have their troughs
elsewhere. Each run has a cache of its own, the token drawn from the merged logits is fed to all of
them. The paper speaks of merging distributions by confidence, its code merges logits: the code's
way is the default, `merge="probs"` the other.

Runs are rows of the batch here: rows j·b, ..., (j+1)·b - 1 are turned with base j. So any language
model whose mixers are `attention_buckets` runs all bases in one batch, with one stacked cache, and
`BucketModel` makes of it a model of the merged logits for `attnjax.models.generate`.

Reference: Chen et al., "Fortify the Shortest Stave in Attention: Enhancing Context Awareness of
Large Language Models for Effective Tool Use", 2023, arXiv:2312.04455; official code
AlibabaResearch/DAMO-ConvAI (attention-buckets).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.positions import apply_rope, rope_frequencies
from attnjax.spec import Mechanism
from pallas_kernels.tilemath import accumulator_dtype

PRESETS = {
    "tool": (10000.0, 17500.0, 18000.0, 19000.0, 20000.0, 25000.0),
    "rag": tuple(float(n) for n in range(10000, 28001, 3000)),
}
"""The paper's bases for tool use and for retrieval-augmented generation."""

MERGES = ("logits", "probs")


def bucket_weights(logits: Float[Array, "j *b v"]) -> Float[Array, "j *b"]:
    """Confidence of each run: w = softmax_j(max_v l_jv), in float32 or wider."""
    wide = logits.astype(accumulator_dtype(logits.dtype))
    return jax.nn.softmax(wide.max(-1), axis=0)


def merge_buckets(logits: Float[Array, "j *b v"], merge: str = "logits") -> Float[Array, "*b v"]:
    """One prediction from the logits of all runs.

        "logits": Σ_j w_j l_j,  w = softmax_j(max_v l_jv)
        "probs":  ln Σ_j w_j p_j,  p_j = softmax(l_j),  w_j = max_v p_jv / Σ_i max_v p_iv

    Args:
      logits: of each run, runs first.
      merge: "logits", as the official code does, or "probs".

    Returns:
      Merged logits, in float32 or wider.

    Raises:
      ValueError: for an unknown merge.
    """
    if merge not in MERGES:
        raise ValueError(f"merge_buckets: merge={merge!r} is none of {', '.join(MERGES)}.")
    if merge == "logits":
        weights = bucket_weights(logits)
        return (weights[..., None] * logits.astype(weights.dtype)).sum(0)
    log_p = jax.nn.log_softmax(logits.astype(accumulator_dtype(logits.dtype)), axis=-1)
    log_w = jax.nn.log_softmax(log_p.max(-1), axis=0)
    return jax.nn.logsumexp(log_w[..., None] + log_p, axis=0)


def attention_waveform(
    base: float, length: int, head_dim: int = 128
) -> Float[np.ndarray, "length"]:
    """How strongly a rotary head can attend to each distance: (2/d) Σ_c cos(n base^(-2c/d)).

    Args:
      base: of the rotary positions.
      length: distances 0 .. length-1, in tokens.
      head_dim: d. Llama: 128.
    """
    frequencies, _ = rope_frequencies(head_dim, base)
    return np.cos(np.arange(length)[:, None] * np.asarray(frequencies)[None]).mean(1)


def complementary_bases(
    candidates: Sequence[float], count: int, length: int, head_dim: int = 128
) -> list[float]:
    """Bases whose attention troughs are filled by the peaks of the others, chosen greedily.

    Starts with the first candidate and adds the one that most raises Σ_n max_j waveform_j(n).

    Args:
      candidates: bases to choose from. Paper: 10000 .. 30000 in steps.
      count: how many to choose.
      length: distances that matter, in tokens.
      head_dim: width of a head.

    Returns:
      The chosen bases in the order of the choice.

    Raises:
      ValueError: when there are fewer candidates than bases to choose.
    """
    if not 1 <= count <= len(candidates):
        raise ValueError(
            f"complementary_bases: cannot choose {count} of {len(candidates)} candidates."
        )
    waves = np.stack([attention_waveform(base, length, head_dim) for base in candidates])
    chosen = [0]
    while len(chosen) < count:
        covered = np.maximum(waves, waves[chosen].max(0)).sum(1)
        covered[chosen] = -np.inf
        chosen.append(int(covered.argmax()))
    return [float(candidates[i]) for i in chosen]


class AttentionBuckets(SequenceMixer):
    """Multi-head attention whose batch rows are turned with different rotary bases.

    Its parameters are those of `MultiHeadAttention`: it takes the weights of a trained model.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      bases: base_1, ..., base_J, as numbers, as a text like "10000/17500", or as the name of a
        preset ("tool", "rag"). The batch then holds J equal parts, part j turned with base j. None
        is `rope_base` alone, ordinary attention.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: for an unknown preset, no bases, or a base that is not positive.
    """

    sites = SCORE_SITES
    directions = ("causal", "bidirectional")
    grouped = masked = rotary = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        bases: Sequence[float] | str | None = None,
        rope_base: float | None = 10000.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        options["rope_base"] = rope_base
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        if isinstance(bases, str):
            bases = _named(bases)
        if bases is None:
            if rope_base is None:
                raise ValueError("AttentionBuckets: needs bases or rope_base, got None for both.")
            bases = (rope_base,)
        if not len(bases) or not all(base > 0 for base in bases):
            raise ValueError(f"AttentionBuckets: bases must be positive numbers, got {bases}.")
        self.bases = tuple(float(base) for base in bases)
        shared = (self.num_kv_heads, self.head_dim)
        self.query = self.projection((num_heads, self.head_dim), rngs=rngs)
        self.key = self.projection(shared, rngs=rngs)
        self.value = self.projection(shared, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x = call.x
        q, k, v = self.heads(call, self.query(x), self.key(x), self.value(x))
        q, k = self.rotate(call, q, k)
        return self.attend(call, q, k, v)[0]

    def rotate(self, call: Call, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys turned with the base of their row's part of the batch."""
        rows, runs = query.shape[0], len(self.bases)
        if rows % runs:
            raise ValueError(
                f"AttentionBuckets: the batch holds one part for each of {runs} bases, so its "
                f"{rows} rows must be a multiple of {runs}; repeat the prompts with "
                f"jnp.tile(x, ({runs}, 1, 1)) or use BucketModel."
            )
        table = np.stack([rope_frequencies(self.head_dim, base)[0] for base in self.bases])
        frequencies = jnp.asarray(np.repeat(table, rows // runs, axis=0))  # [b, c]

        def turn(x: jax.Array) -> jax.Array:
            def row(x: jax.Array, at: jax.Array, inv_freq: jax.Array) -> jax.Array:
                return apply_rope(x[None], at, inv_freq, layout=self.rope_layout)[0]

            return jax.vmap(row)(x, call.positions, frequencies)

        return turn(query), turn(key)


class BucketModel(nnx.Module):
    """A language model run under several rotary bases, as one model of their merged logits.

        merged = BucketModel(model.with_mixers("attention_buckets(bases=tool)"), 6)
        generate(merged, prompt, max_new_tokens=32, temperature=0)

    Args:
      model: a `LanguageModel` whose mixers are `attention_buckets` with `num_bases` bases.
      num_bases: J, how many runs every prompt gets. 1 is the model itself.
      merge: "logits" or "probs", see `merge_buckets`.

    Raises:
      ValueError: for num_bases < 1 or an unknown merge.
    """

    def __init__(self, model: Any, num_bases: int, *, merge: str = "logits"):
        if num_bases < 1 or merge not in MERGES:
            raise ValueError(
                f"BucketModel: needs num_bases >= 1 and merge in {MERGES}, got {num_bases} and "
                f"{merge!r}."
            )
        self.model, self.num_bases, self.merge = model, num_bases, merge

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """Caches of all runs, for `batch` prompts."""
        return self.model.init_cache(self.num_bases * batch, max_length, dtype)

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: Any = None,
        valid: Bool[Array, "b t"] | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """Hidden states of all runs side by side, [b, t, J m], and the cache where one is given.

        Args:
          tokens: indices in the vocabulary.
          positions, segment_ids, valid, deterministic: as in `LanguageModel`.
          cache: from `init_cache`, or of an earlier call.
        """
        rows = dict(tokens=tokens, positions=positions, segment_ids=segment_ids, valid=valid)
        rows = jax.tree.map(lambda x: jnp.tile(x, (self.num_bases, 1)), rows)
        result = self.model.hidden(**rows, cache=cache, deterministic=deterministic)
        states = result if cache is None else result[0]
        b, t = tokens.shape
        states = states.reshape(self.num_bases, b, t, -1).transpose(1, 2, 0, 3).reshape(b, t, -1)
        return states if cache is None else (states, result[1])

    def unembed(self, hidden: Float[Array, "b t n"]) -> Float[Array, "b t v"]:
        """Merged logits of the states of all runs."""
        b, t = hidden.shape[:2]
        runs = hidden.reshape(b, t, self.num_bases, -1).transpose(2, 0, 1, 3)
        logits = self.model.unembed(runs.reshape(self.num_bases * b, t, -1))
        return merge_buckets(logits.reshape(self.num_bases, b, t, -1), self.merge)

    def __call__(self, tokens: Int[Array, "b t"], *, cache: Any = None, **options: Any) -> Any:
        """Merged logits [b, t, v], and the cache where one is given; options as in `hidden`."""
        result = self.hidden(tokens, cache=cache, **options)
        return self.unembed(result) if cache is None else (self.unembed(result[0]), result[1])


def _named(bases: str) -> tuple[float, ...]:
    """The bases of a preset, or of a text of numbers."""
    if bases in PRESETS:
        return PRESETS[bases]
    try:
        return tuple(float(base) for base in bases.split("/"))
    except ValueError:
        raise ValueError(
            f"AttentionBuckets: bases={bases!r} is none of {', '.join(PRESETS)} and no list of "
            "numbers like '10000/17500'."
        ) from None


def _example() -> tuple[AttentionBuckets, jax.Array]:
    module = AttentionBuckets(4, 16, num_kv_heads=2, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


def _picture() -> dict[str, Any]:
    """Rows are the bases for tool use, columns distances of 0 .. 4095 tokens in steps of 32."""
    waves = np.stack([attention_waveform(base, 4096)[::32] for base in PRESETS["tool"]])
    return {"attention by distance, six bases": waves}


SPEC = Mechanism(
    id="attention_buckets",
    title="Fortify the Shortest Stave in Attention: Enhancing Context Awareness of Large Language "
    "Models for Effective Tool Use",
    arxiv="2312.04455",
    year=2023,
    code="AlibabaResearch/DAMO-ConvAI",
    function=merge_buckets,
    module=AttentionBuckets,
    causal=True,
    bidirectional=True,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(J T^2) for J bases",
    reduces_to={"one base": "multi_head_attention"},
    golden=("attention_buckets",),
    reading="The waveform and the greedy criterion of `complementary_bases`, and the weights of "
    'merge="probs".',
    picture=_picture,
    example=_example,
)
