"""One layer of a decoder: x ← x + mixer(norm(x)); x ← x + mlp(norm(x))."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from attnjax.layers import default_kernel_init
from attnjax.mechanisms.linear.lightning_attention import LightningAttention, lightning_slopes
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.mechanisms.sparse.longgen import BlockStrideAttention
from attnjax.models import registry
from attnjax.models.layers import MLPS, NORMS
from attnjax.models.pattern import Mixer
from attnjax.taps import BLOCK_SITES, Edits, Tap

SAVED_NAMES = ("mixer_out", "mlp_out")
"""Names of the activations that the rematerialization policy "names" keeps."""


class Block(nnx.Module):
    """Mixer and MLP with pre-norm residuals.

    Args:
      config: `LanguageModelConfig`.
      mixer: which mixer the layer has.
      rngs: stream `params`.
    """

    def __init__(self, config: Any, mixer: Mixer, *, rngs: nnx.Rngs):
        norm = NORMS[config.norm]
        options: dict[str, Any] = dict(
            dtype=config.dtype, param_dtype=config.param_dtype, rngs=rngs
        )
        self.mixer_norm = norm(config.width, param_dtype=config.param_dtype)
        self.mixer = make_mixer(config, mixer, **options)
        self.mlp_norm = norm(config.width, param_dtype=config.param_dtype)
        self.mlp = MLPS[config.mlp](
            config.width, config.hidden_width, out_kernel_init=_small(config.num_layers), **options
        )
        self.dropout_rate = config.dropout_rate

    def __call__(
        self,
        x: jax.Array,
        slopes: jax.Array | None,
        cache: Any,
        edits: Edits | None,
        key: Any,
        *,
        positions: Any,
        segment_ids: Any,
        valid: Any,
        capture: frozenset[str],
        mixer_inputs: Mapping[str, Any] | None = None,
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """One layer.

        Args:
          x: residual stream [b, t, m].
          slopes: decay by head [h] of a lightning layer, else None.
          cache: the layer's cache, or None.
          edits: the layer's edits, or None.
          key: key for dropout, or None where there is none.
          positions, segment_ids, valid: as in the mixers.
          capture: sites; those that the layer does not have are left out of the result.
          mixer_inputs: further arguments by name, for mixers that take them.

        Returns:
          (x, cache or None, captured arrays by site).
        """
        tap = Tap(edits and edits.only(BLOCK_SITES), capture.intersection(BLOCK_SITES))
        inside = capture.intersection(self.mixer.sites)
        keys = (None, None) if key is None else jax.random.split(key)
        options: dict[str, Any] = {} if slopes is None else {"slopes": slopes}
        taken = self.mixer_arguments
        options |= {n: value for n, value in (mixer_inputs or {}).items() if n in taken}
        x = tap("resid_pre", x)
        result = self.mixer(
            self.mixer_norm(x),
            positions=positions,
            segment_ids=segment_ids,
            cache=cache,
            valid=valid,
            edits=edits and edits.only(self.mixer.sites),
            capture=inside,
            **options,
        )
        parts = [*result] if isinstance(result, tuple) else [result]
        y, cache = parts[0], parts[1] if cache is not None else None
        captured = dict(parts[-1]) if inside else {}
        x = tap("resid_mid", x + self._dropout(checkpoint_name(y, "mixer_out"), keys[0]))
        y = tap("mlp_out", self.mlp(self.mlp_norm(x)))
        x = tap("resid_post", x + self._dropout(checkpoint_name(y, "mlp_out"), keys[1]))
        return x, cache, captured | tap.captured

    @property
    def mixer_arguments(self) -> set[str]:
        """Inputs that the mixer's call takes beyond those of every mixer, from the caller."""
        taken: tuple[str, ...] = getattr(self.mixer, "further", ())
        return set(taken) - {"slopes"}  # which the model sets

    def _dropout(self, y: jax.Array, key: Any) -> jax.Array:
        if key is None:
            return y
        keep = jax.random.bernoulli(key, 1.0 - self.dropout_rate, y.shape)
        return jnp.where(keep, y / (1.0 - self.dropout_rate), jnp.zeros_like(y))


def make_mixer(config: Any, mixer: Mixer, *, dtype: Any, param_dtype: Any, rngs: nnx.Rngs) -> Any:
    """The module of a mixer, sized by the model's config."""
    options: dict[str, Any] = dict(
        qkv_features=config.num_heads * config.width_per_head,
        use_bias=False,
        dtype=dtype,
        param_dtype=param_dtype,
        out_kernel_init=_small(config.num_layers),
        rngs=rngs,
    )
    if mixer.kind not in ("softmax", "window", "strided", "lightning"):
        del options["use_bias"]
        return registry.build(registry.find(mixer.kind), config, dict(mixer.options), **options)
    if mixer.kind == "lightning":
        return LightningAttention(config.num_heads, config.width, lrpe=mixer.lrpe, **options)
    options |= dict(
        num_kv_heads=config.num_kv_heads,
        causal=True,
        rope_base=config.rope_base,
        rope_scaling=config.rope_scaling,
        qk_norm="rms" if config.qk_norm else None,
    )
    if mixer.kind == "strided":
        return BlockStrideAttention(
            config.num_heads,
            config.width,
            block=mixer.block,
            stride=mixer.stride,
            local_blocks=mixer.local,
            offset=mixer.offset,
            **options,
        )
    return MultiHeadAttention(
        config.num_heads, config.width, window=mixer.window, sinks=mixer.sinks, **options
    )


def layer_slopes(config: Any, mixers: list[Mixer]) -> list[jax.Array | None]:
    """Decay by head of each lightning layer, which depends on its place in the whole model."""
    return [
        jnp.asarray(lightning_slopes(config.num_heads, i, config.num_layers))
        if mixer.kind == "lightning"
        else None
        for i, mixer in enumerate(mixers)
    ]


@functools.cache
def _small(num_layers: int) -> Any:
    """Initializer of what is added to the residual stream, whose variance must not grow.

    The same function each time: modules keep it, and equal models must have equal graphs.
    """

    def init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        return default_kernel_init(key, shape, dtype) * jnp.asarray((2 * num_layers) ** -0.5, dtype)

    return init
