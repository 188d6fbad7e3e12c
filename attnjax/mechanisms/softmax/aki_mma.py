"""Modality-mutual attention (AKI): image tokens see the question that follows them.

    q sees k  iff  k <= q,  or  q in the image [i0, t0) and k in its text [t0, t1)

In a causal decoder an image that comes first knows nothing of the question. Here its tokens also
see the text of the question, but not the answer [t1, ...); among themselves they stay causal, as
the text does, and positions do not change. Generated tokens are causal, so a cache works as ever,
but an image's keys depend on its question and cannot be shared between questions.

The official loop over several images hands each image's mask on wrongly; here every image of a row
sees its own text, by the "or" of their masks.

Reference: Wang et al., "Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual
Attention for Multimodal LLMs", 2025, arXiv:2503.02597; official code sony/aki.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float

from attnjax.attention import attention
from attnjax.masks import Causal, Mask, Rectangle
from attnjax.mechanisms.softmax.masking_multihop_qa import PromptAttention
from attnjax.mixer import Call
from attnjax.spec import Mechanism


def modality_mutual_mask(spans: Any) -> Mask:
    """Causal, and images see the text of their question.

        visible iff k <= q  or  i0 <= q < t0 <= k < t1   for any image

    Args:
      spans: (i0, t0, t1) of the images, in indices of tokens: integers [3] or [n, 3] for all rows,
        or [b, n, 3]. The image is [i0, t0), its text [t0, t1). i0 = t0 or t0 = t1 is no image.

    Returns:
      Mask algebra; without images `Causal()`. Add `& attnjax.masks.keys.key_set(real)` where keys
      are padding.

    Raises:
      ValueError: on another shape, or (where the numbers are known) ends that are not in order.
    """
    spans = _spans("modality_mutual_mask", spans)
    mask: Mask = Causal()
    for i in range(spans.shape[1]):
        first, text, stop = (spans[:, i, j] for j in range(3))
        mask = mask | Rectangle(first, text, text, stop)
    return mask


def modality_mutual_attention(
    query: Float[Array, "b t h d"],
    key: Float[Array, "b s g d"],
    value: Float[Array, "b s g e"],
    *,
    spans: Any,
    **options: Any,
) -> Any:
    """Softmax attention under `modality_mutual_mask`.

        o_q = Σ_k softmax_k(q · k / sqrt(d)) v_k   over the visible k

    Args:
      query, key, value: shapes as annotated, rotated already; h a multiple of g.
      spans: as in `modality_mutual_mask`.
      **options: of `attnjax.attention`.

    Returns:
      As `attnjax.attention`: the output in the dtype of `query`.

    Memory: O(t + s), block-sparse.

    Raises:
      ValueError: on spans of another shape or order.

    Example: >>> modality_mutual_attention(q, k, v, spans=[1, 5, 10]).shape
    """
    return attention(query, key, value, mask=modality_mutual_mask(spans), **options)


class ModalityMutualAttention(PromptAttention):
    """Multi-head `modality_mutual_attention` with rotary positions.

    Without spans it is causal attention.

    A call takes `spans` [b, n, 3] as in `modality_mutual_mask`; None is text alone. With a cache,
    an image and its text come in one call, and later calls need not name them.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      **options: of `SequenceMixer`.
    """

    further = ("spans",)

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        spans = call.further["spans"]
        if spans is None:
            return self.see(call, None)
        if spans.ndim != 3 or spans.shape[0] != call.x.shape[0]:
            raise ValueError(
                f"{type(self).__name__}: spans must have shape [batch, images, 3] with batch "
                f"{call.x.shape[0]}, got {spans.shape}."
            )
        layout = modality_mutual_mask(spans)
        for i in range(spans.shape[1] if call.cache is not None else 0):
            first, text, stop = (spans[:, i, j] for j in range(3))
            some = (first < text) & (text < stop)
            self.in_one_piece(call, "an image and its text", first, jnp.where(some, stop, first))
        return self.see(call, layout)


def _spans(name: str, spans: Any) -> Any:
    """Spans as [b or 1, n, 3], checked where their numbers are known."""
    spans = spans if isinstance(spans, jax.Array) else np.asarray(spans)
    if spans.ndim not in (1, 2, 3) or spans.shape[-1] != 3:
        raise ValueError(
            f"{name}: spans must have shape [3], [images, 3] or [batch, images, 3], each (image, "
            f"text, end of text), got {spans.shape}."
        )
    if not isinstance(spans, Tracer) and (np.diff(np.asarray(spans, int)) < 0).any():
        raise ValueError(
            f"{name}: each span must be in order, image <= text <= end, got {spans.tolist()}."
        )
    return spans.reshape((1,) * (3 - spans.ndim) + spans.shape)


def _example() -> tuple[ModalityMutualAttention, jax.Array]:
    module = ModalityMutualAttention(2, 16, rope_base=1e4, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


def _picture() -> dict[str, Any]:
    mask = modality_mutual_mask([2, 9, 13]).dense(18)[0, 0]
    return {"image 2-8, question 9-12, answer 13-17": mask.astype(jnp.float32)}


SPEC = Mechanism(
    id="aki_mma",
    title="Seeing is Understanding: Unlocking Causal Attention into Modality-Mutual Attention for "
    "Multimodal LLMs",
    arxiv="2503.02597",
    year=2025,
    code="sony/aki",
    function=modality_mutual_attention,
    module=ModalityMutualAttention,
    causal=True,
    bidirectional=False,
    cache="dense",
    segment_ids=True,
    kernel="flash",
    cost="O(T^2)",
    reduces_to={"i0 = t0 or t0 = t1": "multi_head_attention"},
    golden=("mma_mask",),
    reading="Several images: each sees its own text.",
    picture=_picture,
    example=_example,
)
