"""Concentric causal attention (CCA): an image's tokens are counted and masked by rings.

    ring(r, c) = min(r, c, H-1-r, H-1-c)                        0 at the border, H/2-1 at the center
    position:  i before the image;  i0 + ring in it;  i - H² + H/2 after it
    visible:   an image token sees the text before it and the image keys with ring(k) <= ring(q);
               a text token sees everything before it

An image of H x H tokens spends H/2 positions where raster order spends H², so that rotary decay
hides no part of it from the question; what a token sees grows from the border to the center.

The official batch code keeps the position ids of the last sample only, allows one square image per
row, and fixes 24 x 24; here every row may start its image elsewhere, or have none, and H is any
even number. One image per row remains.

Reference: Xing et al., "Mitigating Object Hallucination via Concentric Causal Attention", 2024,
arXiv:2410.15926; official code xing0047/cca-llava.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from attnjax.attention import attention
from attnjax.cache import DenseCache
from attnjax.cache.base import cache_bytes, new_positions
from attnjax.masks import Causal, Mask, Rectangle
from attnjax.masks.arguments import of_row, size_along
from attnjax.mechanisms.softmax.masking_multihop_qa import PromptAttention
from attnjax.mixer import Call
from attnjax.positions import apply_rope, rope_frequencies
from attnjax.spec import Mechanism
from pallas_kernels.maskprogram import PARTIAL, floor_div, floor_mod, mask_node


def rings(side: int) -> Int[Array, "c c"]:
    """The ring of every token of a square image: 0 at the border, side/2 - 1 at the center."""
    _check_side("rings", side)
    line = jnp.arange(side, dtype=jnp.int32)
    line = jnp.minimum(line, side - 1 - line)
    return jnp.minimum(line[:, None], line[None, :])


def concentric_positions(
    index: Int[Array, "b t"], image_start: int | Int[Array, " b"], side: int
) -> Int[Array, "b t"]:
    """Positions of tokens when a square image is counted by rings.

        p_i = i;  i0 + ring(i - i0);  i - H² + H/2          before, in and after the image

    Args:
      index: indices of the tokens in their rows.
      image_start: i0, index of the image's first token, for all rows or by row; negative where
        there is no image.
      side: H in tokens, even. Paper: 24.

    Returns:
      int32 positions.

    Raises:
      ValueError: when `side` is odd or less than 2.
    """
    _check_side("concentric_positions", side)
    start = jnp.asarray(image_start, jnp.int32).reshape(-1, 1)
    inside = index - start
    within = (inside >= 0) & (inside < side * side)
    ring = jnp.take(rings(side).reshape(-1), jnp.clip(inside, 0, side * side - 1))
    after = index - side * side + side // 2
    counted = jnp.where(within, start + ring, jnp.where(inside < 0, index, after))
    return jnp.where(start < 0, index, counted).astype(jnp.int32)


def concentric_mask(image_start: int | Int[Array, " b"], side: int) -> Mask:
    """Which keys a token sees: rings inside the image, everything before it elsewhere.

        visible iff q, k in the image: ring(k) <= ring(q);  else: k <= q

    Args:
      image_start: index of the image's first token, for all rows or [b]; negative where there is no
        image.
      side: H in tokens, even. Paper: 24.

    Returns:
      Mask algebra: only the tiles inside the image compare rings.

    Raises:
      ValueError: when `side` is odd or less than 2.
    """
    _check_side("concentric_mask", side)
    start: Any = image_start
    if isinstance(start, int):
        if start < 0:
            return Causal()
        stop: Any = start + side * side
    else:
        start = jnp.asarray(start)
        stop = jnp.where(start < 0, start, start + side * side)
    image = Rectangle(start, stop, start, stop)
    return (Causal() & ~image) | (image & Rings(start, side))


@mask_node("start")
class Rings(Mask):
    """Inside an image, the keys of the query's ring and of all rings around it.

        visible iff ring(k - start) <= ring(q - start)

    Args:
      start: index of the image's first token, an integer for all rows or integers [b].
      side: tokens along a side of the image, even.
    """

    start: Any
    side: int

    @property
    def batch_size(self) -> int | None:
        """Rows of `start`, None when one number serves all."""
        return size_along(0, self.start)

    def predicate(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """The key's ring is the query's or one further out."""
        return self._ring(b, k) <= self._ring(b, q)

    def _ring(self, b: Any, index: Any) -> Any:
        inside, last = index - of_row(self.start, index, b), self.side - 1
        row, column = floor_div(inside, self.side), floor_mod(inside, self.side)
        return jnp.minimum(jnp.minimum(row, last - row), jnp.minimum(column, last - column))

    def _classify(self, xp, b, h, q0, q1, k0, k1):
        # an image row holds all rings up to its own, so few tiles are empty or full
        return xp.full(np.broadcast_shapes(q0.shape, k0.shape), PARTIAL, xp.int8)


def concentric_causal_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b t g d"],
    value: Float[Array, "b t g e"],
    *,
    image_start: int | Int[Array, " b"],
    side: int,
    rope_base: float = 10000.0,
    **options: Any,
) -> Any:
    """Softmax attention with the positions and the mask of concentric causal attention.

    Args:
      query, key, value: shapes as annotated, not rotated yet; h a multiple of g.
      image_start: index of the image's first token, for all rows or by row; negative where there is
        no image: causal attention with rotary positions.
      side: H in tokens, even; the image has H² tokens. Paper: 24.
      rope_base: base of rotary positions. Llama: 10000.
      **options: of `attnjax.attention`.

    Returns:
      As `attnjax.attention`: the output in the dtype of `query`.

    Memory: O(t), block-sparse.

    Raises:
      ValueError: when `side` is odd or less than 2.

    Example: >>> concentric_causal_attention(q, k, v, image_start=35, side=24).shape
    """
    b, t = query.shape[:2]
    index = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    positions = concentric_positions(index, image_start, side)
    inv_freq, _ = rope_frequencies(query.shape[-1], rope_base)
    query, key = (apply_rope(x, positions, inv_freq) for x in (query, key))
    return attention(query, key, value, mask=concentric_mask(image_start, side), **options)


@dataclasses.dataclass(frozen=True)
class ConcentricCache:
    """Keys, values, and where each row's image starts.

    Attributes:
      tokens: rotated keys, and values.
      image_start: [b] int32, -1 where there is no image.
    """

    tokens: DenseCache
    image_start: jax.Array

    @property
    def length(self) -> jax.Array:
        """[b] tokens stored so far."""
        return self.tokens.length

    @property
    def max_length(self) -> int:
        """Tokens it can hold."""
        return self.tokens.max_length

    @property
    def bytes(self) -> int:
        """Size of all its arrays, in bytes."""
        return cache_bytes(self)


jax.tree_util.register_dataclass(
    ConcentricCache, data_fields=["tokens", "image_start"], meta_fields=[]
)


class ConcentricCausalAttention(PromptAttention):
    """Multi-head `concentric_causal_attention`.

    Without an image it is causal attention with rotary positions.

    A call takes `image_start` [b], the index of each row's first image token, negative where it has
    no image; None is the module's own. A cache remembers it; the image comes in one call. Positions
    that a call gives replace those of the rings.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      image_side: H in tokens, even. Paper: 24.
      image_start: index of the image's first token in calls that do not say; None is no image.
      rope_base: base of rotary positions; None leaves the mask alone. Llama: 10000.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: when `image_side` is odd or less than 2.
    """

    further = ("image_start",)

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        image_side: int = 24,
        image_start: int | None = None,
        rope_base: float | None = 10000.0,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        options["rope_base"] = rope_base
        super().__init__(num_heads, in_features, qkv_features, out_features, rngs=rngs, **options)
        _check_side("ConcentricCausalAttention", image_side)
        self.image_side, self.image_start = image_side, image_start

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> ConcentricCache:
        """An empty cache; see `SequenceMixer.init_cache`."""
        tokens = super().init_cache(batch, max_length, dtype)
        start = -1 if self.image_start is None else self.image_start
        return ConcentricCache(tokens, jnp.full((batch,), start, jnp.int32))

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        b, t = call.x.shape[:2]
        start, before = call.further["image_start"], call.cache
        if start is None and before is not None:
            start = before.image_start
        elif start is None and self.image_start is not None:
            start = jnp.full((b,), self.image_start, jnp.int32)
        if start is None:
            return self.see(call, None)
        if start.shape != (b,):
            raise ValueError(
                f"{type(self).__name__}: image_start must have shape [batch] = {(b,)}, got "
                f"{start.shape}."
            )
        if not call.placed:
            first = jnp.broadcast_to(jnp.asarray(call.start, jnp.int32), (b,))
            call.positions = concentric_positions(new_positions(first, t), start, self.image_side)
        stop = jnp.where(start < 0, start, start + self.image_side**2)
        self.in_one_piece(call, "the image", start, stop)
        # a single new token is text: an image has at least four
        layout = None if t == 1 else concentric_mask(start, self.image_side)
        if before is None:
            return self.see(call, layout)
        call.cache = before.tokens
        z = self.see(call, layout)
        call.cache = ConcentricCache(call.cache, start.astype(jnp.int32))
        return z


def _check_side(name: str, side: int) -> None:
    if side < 2 or side % 2:
        raise ValueError(
            f"{name}: the image's side must be an even number of tokens, at least 2, got {side}; "
            "an odd side has no ring of equal width at its center."
        )


def _example() -> tuple[ConcentricCausalAttention, jax.Array]:
    module = ConcentricCausalAttention(2, 16, image_side=2, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


def _picture() -> dict[str, Any]:
    mask = concentric_mask(4, 6).dense(44)[0, 0]
    return {"4 text tokens, 6 x 6 image, text": mask.astype(jnp.float32), "rings": rings(6)}


SPEC = Mechanism(
    id="cca",
    title="Mitigating Object Hallucination via Concentric Causal Attention",
    arxiv="2410.15926",
    year=2024,
    code="xing0047/cca-llava",
    function=concentric_causal_attention,
    module=ConcentricCausalAttention,
    causal=True,
    bidirectional=False,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2)",
    reduces_to={"no image": "multi_head_attention"},
    golden=("cca",),
    reading="Sides other than 24, and an image at another place in every row.",
    picture=_picture,
    example=_example,
)
