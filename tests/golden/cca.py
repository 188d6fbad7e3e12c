"""Position ids and mask of concentric causal attention against xing0047/cca-llava."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.softmax.cca import concentric_mask, concentric_positions
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Positions and visible keys of every sub-case; both are integers and must be equal."""
    for prefix in sorted({name[: name.rfind("/") + 1] for name in data}):
        side, start, length = (int(n) for n in data[prefix + "cfg"])
        index = jnp.arange(length, dtype=jnp.int32)[None]
        positions = concentric_positions(index, start, side)[0]
        yield Compare(prefix + "position_ids", positions, data[prefix + "position_ids"], 0.0)
        packed = data[prefix + "allowed"]
        allowed = np.unpackbits(packed, axis=-1, count=length).astype(bool)
        visible = concentric_mask(start, side).dense(length)[0, 0]
        yield Compare(prefix + "allowed", visible, allowed, 0.0)
