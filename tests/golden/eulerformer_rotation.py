"""EulerFormer's map of queries and keys against RUCAIBox/EulerFormer, in float32."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.mechanisms.softmax.complexformer import euler_rotation
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Queries, which have the bias, and keys, which have not."""
    wide = data["v"].dtype == np.float64
    rtol = 1e-8 if wide and data["out_query"].dtype == np.float64 else 1e-5
    with jax.enable_x64(wide):
        v = jnp.asarray(data["v"])
        # numbers, perhaps held in arrays of one element
        delta, bias = (jnp.asarray(data[n], v.dtype).reshape(()) for n in ("delta", "bias"))
        yield Compare("out_query", euler_rotation(v, delta, bias), data["out_query"], rtol)
        yield Compare("out_key", euler_rotation(v, delta), data["out_key"], rtol)
