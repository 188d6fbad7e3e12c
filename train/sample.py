"""Text from a trained byte model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.models.generate import generate
from train.data import MARK
from train.state import Parts


def sample_text(
    parts: Parts,
    params: Any,
    prompt: str | None = None,
    length: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
) -> str:
    """Continues a prompt by bytes; those that are no UTF-8 show as the replacement character.

    Args:
      parts: of the run.
      params: its weights.
      prompt: text at the beginning of a document; None: `eval.prompt`.
      length: bytes to add; None: `eval.sample_bytes`.
      temperature: 0 always takes the likeliest byte; None: `eval.temperature`.
      seed: of the drawing.

    Raises:
      ValueError: prompt and continuation do not fit into the context.
    """
    settings, context = parts.config.eval, parts.config.data.context
    prompt = settings.prompt if prompt is None else prompt
    length = settings.sample_bytes if length is None else length
    temperature = settings.temperature if temperature is None else temperature
    tokens = np.frombuffer(bytes([MARK]) + prompt.encode(), np.uint8).astype(np.int32)
    if length < 1 or len(tokens) + length > context:
        raise ValueError(
            f"a sample needs 1 to {context - len(tokens)} bytes after a prompt of "
            f"{len(tokens) - 1} bytes, because the "
            f"context is {context}; got length={length}."
        )
    out = generate(
        parts.skeleton.model(params),
        jnp.asarray(tokens)[None],
        max_new_tokens=length,
        temperature=temperature,
        top_k=settings.top_k,
        rng=jax.random.key(seed),
    )
    text = bytes(np.asarray(out)[0, -length:].astype(np.uint8).tolist())
    return prompt + text.decode("utf-8", errors="replace")
