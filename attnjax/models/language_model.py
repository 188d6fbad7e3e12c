"""A decoder language model whose layers mix tokens in different ways.

    x = E[tokens];   x ← x + mixer_l(norm(x)), x ← x + mlp(norm(x)) for each layer l;
    logits = norm(x) W

The pattern of mixers is a string such as "lightning*3, window(1024)+sink(4), softmax"
(`attnjax.models.pattern`). Softmax layers rotate queries and keys (RoPE). Lightning layers have no
positions besides their decay; `lightning(lrpe=true)` adds LRPE, which the released TransNormerLLM
models have in their first layer only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.checks import check_heads, check_segments
from attnjax.layers import Projection
from attnjax.models.layers import MLPS, NORMS, Embed, wide
from attnjax.models.pattern import layer_mixers
from attnjax.models.stack import REMAT, LayerStack
from attnjax.positions import RopeScaling
from attnjax.taps import Edits


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModelConfig:
    """Sizes and choices of a `LanguageModel`.

    Attributes:
      vocab_size: number of tokens.
      width: of the residual stream, m.
      num_layers: layers.
      num_heads: query heads, h.
      num_kv_heads: key/value heads of softmax layers, g; None is `num_heads`.
      head_dim: width per head; None is width / num_heads.
      mixers: pattern of mixers, repeated over the layers.
      mlp: "swiglu" or "sglu".
      mlp_width: width inside the MLP; None is 8/3 width, rounded up to a multiple of 16.
      norm: "rmsnorm" or "srmsnorm".
      tie_embeddings: whether the output layer is the embedding table.
      rope_base: base of the rotary positions.
      rope_scaling: context extension, see `MultiHeadAttention`; None is none.
      qk_norm: RMS norm of queries and keys by head in softmax layers.
      scale_embeddings: multiply embeddings by sqrt(width) (TransNormerLLM).
      embed_std: standard deviation of the embedding table at the start. None: 1 for a table of its
        own, so that a token's vector is as large as what the mixers add to it, width^-0.5 where it
        is scaled; 0.02 for an unscaled table that also makes the logits.
      scan_layers: run repeated layers in `jax.lax.scan`; False unrolls them, same parameters.
      remat: what the backward pass keeps: "none" recomputes nothing, "full" all, "dots" keeps
        products with weights, "names" keeps what goes into the residual stream.
      dtype: of the computation; softmax, norms, states and logits are float32 at least.
      param_dtype: of the parameters.
      max_length: longest text in tokens; a bound for caches and calls, None is no bound.
      dropout_rate: of what goes into the residual stream.

    Raises:
      ValueError: when sizes do not divide, or an option or pattern is unknown.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mixers: str = "softmax"
    mlp: str = "swiglu"
    mlp_width: int | None = None
    norm: str = "rmsnorm"
    tie_embeddings: bool = True
    rope_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    qk_norm: bool = False
    scale_embeddings: bool = False
    embed_std: float | None = None
    scan_layers: bool = True
    remat: str = "none"
    dtype: str = "float32"
    param_dtype: str = "float32"
    max_length: int | None = None
    dropout_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        check_heads("LanguageModelConfig", self.num_heads, self.num_kv_heads or self.num_heads)
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"width={self.width} must be a multiple of num_heads={self.num_heads}, or set "
                "head_dim."
            )
        for name, known in (("mlp", MLPS), ("norm", NORMS), ("remat", REMAT)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {', '.join(known)}.")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate must be in [0, 1), got {self.dropout_rate}.")
        layer_mixers(self.mixers, self.num_layers)

    @property
    def width_per_head(self) -> int:
        """D."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def embedding_std(self) -> float:
        """Standard deviation of the embedding table at the start."""
        if self.embed_std is not None:
            return self.embed_std
        if self.scale_embeddings:
            return self.width**-0.5
        return 0.02 if self.tie_embeddings else 1.0

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP."""
        return -(-8 * self.width // 48) * 16 if self.mlp_width is None else self.mlp_width


class LanguageModel(nnx.Module):
    """The decoder; see the description of this module.

    Args:
      config: sizes and choices.
      mixer: pattern that replaces `config.mixers`, for example the id of a mechanism.
      rngs: stream `params`.
    """

    def __init__(self, config: LanguageModelConfig, *, mixer: str | None = None, rngs: nnx.Rngs):
        config = config if mixer is None else dataclasses.replace(config, mixers=mixer)
        self.config = config
        options: dict[str, Any] = dict(
            dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
        )
        small = nnx.initializers.normal(0.02)
        table = nnx.initializers.normal(config.embedding_std)
        self.embed = Embed(config.vocab_size, config.width, init=table, **options)
        self.layers = LayerStack(config, rngs=rngs)
        self.norm = NORMS[config.norm](config.width, param_dtype=config.param_dtype)
        self.head = nnx.data(None)
        if not config.tie_embeddings:
            self.head = Projection(
                config.width,
                config.vocab_size,
                in_axes=("embed",),
                out_axes=("vocab",),
                use_bias=False,
                kernel_init=small,
                **options,
            )

    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: Any = None,
        valid: Bool[Array, "b t"] | None = None,
        deterministic: bool | None = None,
        dropout_rng: Any = None,
        edits: Edits | None = None,
        capture: Iterable[str] = (),
        mixer_inputs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Scores of the next token at every position.

        Args:
          tokens, positions, segment_ids, cache, valid: see `hidden`.
          deterministic, dropout_rng, edits, capture, mixer_inputs: see `hidden`.

        Returns:
          logits [b, t, vocab] in float32; `(logits, cache)` with a cache; captured arrays last.
        """
        result = self.hidden(
            tokens,
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            valid=valid,
            deterministic=deterministic,
            dropout_rng=dropout_rng,
            edits=edits,
            capture=capture,
            mixer_inputs=mixer_inputs,
        )
        if isinstance(result, tuple):
            return (self.unembed(result[0]), *result[1:])
        return self.unembed(result)

    def hidden(
        self,
        tokens: Int[Array, "b t"],
        *,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: Any = None,
        valid: Bool[Array, "b t"] | None = None,
        deterministic: bool | None = None,
        dropout_rng: Any = None,
        edits: Edits | None = None,
        capture: Iterable[str] = (),
        mixer_inputs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The normalized hidden states from which `unembed` makes logits.

        Args:
          tokens: indices in [0, vocab_size).
          positions: for RoPE and LRPE; None counts on from the cache, or from 0.
          segment_ids: documents packed in a row; tokens see their own document only.
          cache: from `init_cache`.
          valid: True for real tokens, which come first in each row.
          deterministic: True turns dropout off; None is off without `dropout_rng`.
          dropout_rng: key for dropout; every layer folds in its index.
          edits: interventions, every array with a leading axis over all layers.
          capture: names of sites (`attnjax.taps.SITES`).
          mixer_inputs: further arguments of the mixers' calls by name, such as the `documents` of
            "pine" or the `image_start` of "cca"; every mixer that takes one gets it.

        Returns:
          h [b, t, m]; `(h, cache)` with a cache; captured arrays as a dict last, each
          [layers, ...] over all layers in order, NaN in layers that do not have the site.

        Raises:
          ValueError: on shapes or keys that do not fit.
          TypeError: when tokens are not integers.
        """
        config = self.config
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape [batch, length], got {tokens.shape}.")
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers, got {tokens.dtype}.")
        if config.max_length is not None and tokens.shape[1] > config.max_length:
            raise ValueError(
                f"tokens {tokens.shape} are longer than max_length={config.max_length}; cut them "
                "or "
                "make the model with a larger max_length."
            )
        if segment_ids is not None:
            check_segments("LanguageModel", segment_ids, tokens.shape[0], tokens.shape[1])
        for name, a in (("positions", positions), ("valid", valid)):
            if a is not None and a.shape != tokens.shape:
                raise ValueError(
                    f"{name} must have the shape of tokens {tokens.shape}, got {a.shape}."
                )
        if deterministic is False and config.dropout_rate > 0.0 and dropout_rng is None:
            raise ValueError(f"dropout_rate={config.dropout_rate} needs dropout_rng=key.")
        off = deterministic or config.dropout_rate == 0.0
        x = self.embed(tokens)
        if config.scale_embeddings:
            x = x * jnp.asarray(config.width**0.5, x.dtype)
        x, cache, captured = self.layers(
            x,
            cache=cache,
            edits=edits,
            dropout_key=None if off else dropout_rng,
            capture=capture,
            positions=positions,
            segment_ids=segment_ids,
            valid=valid,
            mixer_inputs=mixer_inputs,
        )
        result = (self.norm(x),)
        result += () if cache is None else (cache,)
        result += (captured,) if captured else ()
        return result[0] if len(result) == 1 else result

    @property
    def has_aux_loss(self) -> bool:
        """Whether a mixer adds to the training loss, at the site "aux_loss"."""
        return any("aux_loss" in block.mixer.sites for unit in self.layers.groups for block in unit)

    def unembed(self, hidden: Float[Array, "b t m"]) -> Float[Array, "b t v"]:
        """Logits [b, t, vocab] in float32 (float64 for float64) from `hidden`'s states."""
        if self.head is None:
            return self.embed.attend(hidden)
        kernel = self.head.kernel[...].astype(hidden.dtype)
        return jnp.einsum("btm,mv->btv", hidden, kernel, preferred_element_type=wide(hidden.dtype))

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """Empty caches of all layers for texts up to `max_length` tokens.

        Args:
          batch: rows.
          max_length: tokens per row, prompt and continuation together.
          dtype: of keys and values; None is the model's dtype. Linear states are float32.
        """
        return self.layers.init_cache(batch, max_length, dtype)

    def with_mixers(self, mixers: str) -> LanguageModel:
        """A model with another pattern and the very same weights.

        Only patterns whose layers have the same parameters can be exchanged: "softmax", "window(.)"
        and "strided(..)" among each other.

        Args:
          mixers: the new pattern.

        Raises:
          ValueError: when a layer's parameters would differ.
        """
        config = dataclasses.replace(self.config, mixers=mixers)
        new = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(new)
        old = nnx.to_pure_dict(nnx.state(self))
        target = nnx.to_pure_dict(state)
        layers = self.layers.by_layer(old["layers"])
        old["layers"] = new.layers.from_layers(layers)
        shapes = [jax.tree.map(lambda a: (a.shape, a.dtype), tree) for tree in (old, target)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"with_mixers: the layers of {mixers!r} have other parameters than those of "
                f"{self.config.mixers!r}; only softmax, window and strided layers share theirs."
            )
        nnx.replace_by_pure_dict(state, old)
        return nnx.merge(graph, state)
