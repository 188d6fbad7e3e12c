"""LongGen: full attention in a third of the layers, static sparse attention in the others.

A pretrained decoder is fine-tuned on longer texts with full causal attention in the middle third
of its layers; the layers at both ends see a window and the first tokens ("sink"), or near blocks
and every s-th block ("block"), so that two thirds of the key/value memory shrinks to a few
percent. Nothing is learned in addition: all weights come from the dense model.

    sink:   j <= i and (j < n or i - j < w)
    block:  j <= i and (I - J < l or J mod s = 0),   I = ⌊i / c⌋, J = ⌊j / c⌋

Positions stay the original ones. The abstract of the paper gives the shares (a third of the layers
full, 62 % less memory at 128k tokens, which needs about 7 % of the keys in sparse layers); block
size, stride and window are choices of this library. 1.55x training speed is reported there.

Reference: Ge et al., "A Little Goes a Long Way: Efficient Long Context Training and Inference with
Partial Contexts", 2024, arXiv:2410.01485. No official code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax.cache import DenseCache, RingCache, StridedCache
from attnjax.masks import Strided
from attnjax.mechanisms.softmax.multi_head_attention import MultiHeadAttention
from attnjax.spec import Mechanism

PLACEMENTS = ("middle", "interleaved", "first", "last")


def layer_kinds(
    num_layers: int, full_fraction: float = 1 / 3, placement: str = "middle"
) -> list[bool]:
    """Which layers keep full attention.

    Args:
      num_layers: L.
      full_fraction: share of full layers, rounded to whole layers. Paper: 1/3.
      placement: "middle" (the paper), "first" or "last" for one contiguous block, "interleaved" for
        layers spread evenly, the last of each stretch being full.

    Returns:
      One boolean per layer, True for full attention.

    Raises:
      ValueError: for a fraction outside of [0, 1], an unknown placement, or no layer.
    """
    if num_layers < 1:
        raise ValueError(f"longgen: num_layers must be at least 1, got {num_layers}.")
    if not 0.0 <= full_fraction <= 1.0:
        raise ValueError(f"longgen: full_fraction must be in [0, 1], got {full_fraction}.")
    if placement not in PLACEMENTS:
        raise ValueError(f"longgen: placement={placement!r} is none of {', '.join(PLACEMENTS)}.")
    full = round(num_layers * full_fraction)
    if placement == "interleaved":
        return [(i + 1) * full // num_layers > i * full // num_layers for i in range(num_layers)]
    start = {"first": 0, "middle": (num_layers - full) // 2, "last": num_layers - full}[placement]
    return [start <= i < start + full for i in range(num_layers)]


def longgen_layers(
    num_layers: int,
    full_fraction: float = 1 / 3,
    placement: str = "middle",
    *,
    sparse: str = "block",
    window: int = 1024,
    sinks: int = 64,
    block: int = 64,
    stride: int = 16,
    local: int = 16,
) -> str:
    """The pattern of mixers of a LongGen model, for `LanguageModelConfig(mixers=...)`.

    Args:
      num_layers, full_fraction, placement: see `layer_kinds`.
      sparse: what the other layers see: "block" or "sink".
      window, sinks: tokens, for "sink".
      block, stride, local: tokens per block, every how many blocks one stays, near blocks; for
        "block".

    Returns:
      A pattern of exactly `num_layers` layers.

    Raises:
      ValueError: for unknown options, or sizes out of range.

    Example: >>> longgen_layers(6, sparse="sink", window=128, sinks=4)
    'window(128)+sink(4)*2, softmax*2, window(128)+sink(4)*2'
    """
    items = {
        "sink": f"window({window})" + (f"+sink({sinks})" if sinks else ""),
        "block": f"strided(block={block},stride={stride},local={local})",
    }
    if sparse not in items:
        raise ValueError(f"longgen: sparse={sparse!r} is none of {', '.join(items)}.")
    if min(window, block, stride, local) < 1 or sinks < 0:
        raise ValueError(
            "longgen: needs window, block, stride and local of at least 1 and sinks >= 0, got "
            f"window={window}, block={block}, stride={stride}, local={local}, sinks={sinks}."
        )
    runs: list[list[Any]] = []
    for full in layer_kinds(num_layers, full_fraction, placement):
        item = "softmax" if full else items[sparse]
        if runs and runs[-1][0] == item:
            runs[-1][1] += 1
        else:
            runs.append([item, 1])
    return ", ".join(f"{item}*{count}" for item, count in runs)


def from_dense(
    model: Any,
    full_fraction: float = 1 / 3,
    placement: str = "middle",
    *,
    rope_base: float | None = None,
    max_length: int | None = None,
    **sparse: Any,
) -> Any:
    """A LongGen model with the weights of a dense one, unchanged, ready to be trained further.

    The paper's recipe: from 4k to 128k tokens in one stage of about 5 billion tokens, with a larger
    base of the rotary positions.

    Args:
      model: an `attnjax.models.LanguageModel` of softmax layers.
      full_fraction, placement: see `layer_kinds`.
      rope_base: new base of the rotary positions, larger for texts longer than those of the
        pretraining; None keeps the model's.
      max_length: new longest text in tokens; None keeps the model's.
      **sparse: further options of `longgen_layers`.

    Returns:
      A new model.

    Raises:
      ValueError: when layers of the model are no softmax layers, or rope_base is not positive.

    Example: >>> from_dense(model, rope_base=5e6, max_length=131072, block=64, stride=16, local=16)
    """
    layers = longgen_layers(model.config.num_layers, full_fraction, placement, **sparse)
    if rope_base is not None and not rope_base > 0:
        raise ValueError(f"longgen: rope_base={rope_base} must be positive.")
    new = model.with_mixers(layers)
    given = {"rope_base": rope_base, "max_length": max_length}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return new
    config = dataclasses.replace(new.config, **given)
    graph, state = nnx.split(nnx.eval_shape(lambda: type(model)(config, rngs=nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(new)))
    return nnx.merge(graph, state)


def kv_bytes(
    num_layers: int,
    max_length: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    batch: int = 1,
    dtype: Any = jnp.bfloat16,
    full_fraction: float = 1 / 3,
    sparse: str = "block",
    window: int = 1024,
    sinks: int = 64,
    block: int = 64,
    stride: int = 16,
    local: int = 16,
) -> dict[str, float]:
    """Bytes of all caches beside those of a dense model, from the caches' own shapes.

    Args:
      num_layers, full_fraction, sparse, window, sinks, block, stride, local: see `longgen_layers`.
      max_length: tokens per row.
      num_kv_heads, head_dim: of each layer.
      batch: rows.
      dtype: of keys and values.

    Returns:
      {"dense": bytes, "longgen": bytes, "full_layer": bytes, "sparse_layer": bytes,
      "saved": 1 - longgen / dense}.
    """
    sizes = (num_kv_heads, head_dim)

    def sparse_cache() -> Any:
        if sparse == "sink":
            return RingCache.create(batch, window, *sizes, dtype=dtype, sinks=sinks)
        return StridedCache.create(
            batch, max_length, *sizes, dtype=dtype, block=block, stride=stride, local_blocks=local
        )

    full = jax.eval_shape(lambda: DenseCache.create(batch, max_length, *sizes, dtype=dtype)).bytes
    small = jax.eval_shape(sparse_cache).bytes
    kinds = layer_kinds(num_layers, full_fraction)
    total = sum(full if kind else small for kind in kinds)
    dense = full * num_layers
    return {
        "dense": dense,
        "longgen": total,
        "full_layer": full,
        "sparse_layer": small,
        "saved": 1 - total / dense,
    }


class BlockStrideAttention(MultiHeadAttention):
    """Causal attention to near blocks and to every s-th block: LongGen's "block" layers.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `MultiHeadAttention`.
      block: c, tokens per block.
      stride: s, every how many blocks one stays visible; 1 is dense.
      local_blocks: l, blocks visible as a whole, counting the query's own.
      offset: which of each s blocks stays; 0 keeps the first block of the text as a sink.
      **options: of `MultiHeadAttention`, except window and sinks; causal is always True.

    Raises:
      ValueError: when block, stride or local_blocks < 1, or offset is not in [0, stride).
      NotImplementedError: for causal=False.
    """

    directions = ("causal",)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        block: int = 64,
        stride: int = 16,
        local_blocks: int = 16,
        offset: int = 0,
        **options: Any,
    ):
        for fixed in ("window", "sinks"):
            if options.get(fixed):
                raise ValueError(
                    f"BlockStrideAttention: {fixed}={options[fixed]} has no meaning here; "
                    "use local_blocks and offset."
                )
        if min(block, stride, local_blocks) < 1 or not 0 <= offset < stride:
            raise ValueError(
                "BlockStrideAttention: needs block, stride and local_blocks of at least 1 and "
                f"0 <= offset < stride, got block={block}, stride={stride}, local_blocks="
                f"{local_blocks}, offset={offset}."
            )
        options = {"causal": True, **options}
        super().__init__(num_heads, in_features, qkv_features, out_features, **options)
        self.block, self.stride = block, stride
        self.local_blocks, self.offset = local_blocks, offset

    def layout(self, is_causal: bool = False, segment_ids: Any = None) -> Any:
        """The module's own mask; its blocks count from the start of the row, packed or not.

        Args:
          is_causal, segment_ids: taken for symmetry; they change nothing here.
        """
        return Strided(self.block, self.stride, self.local_blocks, self.offset)

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """An empty cache: local ring and strided store where that is smaller than all tokens.

        Args:
          batch: rows.
          max_length: tokens per row, prompt and continuation together.
          dtype: of keys and values; None is the module's dtype, or float32.
        """
        store = -(-max_length // (self.block * self.stride)) * self.block
        if self.local_blocks * self.block + store >= max_length:
            return super().init_cache(batch, max_length, dtype)
        return StridedCache.create(
            batch, max_length, self.num_kv_heads, self.head_dim,
            dtype=self.dtype or jnp.float32 if dtype is None else dtype, block=self.block,
            stride=self.stride, local_blocks=self.local_blocks, offset=self.offset,
        )  # fmt: skip


def _example() -> tuple[BlockStrideAttention, jax.Array]:
    module = BlockStrideAttention(
        2, 8, block=2, stride=3, local_blocks=2, rope_base=1e4, rngs=nnx.Rngs(0)
    )
    return module, jax.random.normal(jax.random.key(1), (2, 17, 8))


SPEC = Mechanism(
    id="longgen",
    title="A Little Goes a Long Way: Efficient Long Context Training and Inference with "
    "Partial Contexts",
    arxiv="2410.01485",
    year=2024,
    kind="layout",
    function=longgen_layers,
    module=BlockStrideAttention,
    causal=True,
    bidirectional=False,
    cache="ring",
    segment_ids=True,
    kernel="flash",
    cost="O(T (w + T/s)) in sparse layers",
    reduces_to={
        "full_fraction=1": "multi_head_attention",
        "stride=1": "multi_head_attention",
        "window=T": "multi_head_attention",
    },
    reading="block size, stride, window and sinks, which the sources seen do not give.",
    example=_example,
)
