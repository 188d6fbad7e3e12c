"""Merging of logits by confidence against AlibabaResearch/DAMO-ConvAI, attention-buckets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.softmax.attention_buckets import bucket_weights, merge_buckets
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Weights of the runs, merged logits, and the greedy token of every sub-case."""
    for prefix in sorted({name[: name.rfind("/") + 1] for name in data}):
        logits = data[prefix + "logits"]
        wide = logits.dtype == np.float64
        rtol = 1e-8 if wide else 1e-5
        with jax.enable_x64(wide):
            runs = jnp.asarray(logits)
            weights, merged = bucket_weights(runs), merge_buckets(runs)
            token = jnp.argmax(merged, axis=-1)
        yield Compare(prefix + "weights", weights, data[prefix + "weights"], rtol)
        yield Compare(prefix + "combined_logits", merged, data[prefix + "combined_logits"], rtol)
        if prefix + "next_token" in data:
            want = data[prefix + "next_token"]
            yield Compare(prefix + "next_token", np.reshape(token, want.shape), want, 0.0)
