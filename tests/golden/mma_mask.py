"""The mask of modality-mutual attention against sony/aki."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from attnjax.masks.keys import key_set
from attnjax.mechanisms.softmax.aki_mma import modality_mutual_mask
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Visible keys of every sub-case, padding included; they must be equal."""
    for prefix in sorted({name[: name.rfind("/") + 1] for name in data}):
        real = np.atleast_2d(data[prefix + "attention_mask"]) > 0
        mask = modality_mutual_mask(data[prefix + "span"]) & key_set(jnp.asarray(real))
        want = data[prefix + "mask"]
        visible = mask.dense(real.shape[1], batch=real.shape[0])
        yield Compare(prefix + "mask", visible.reshape(want.shape), want.astype(bool), 0.0)
