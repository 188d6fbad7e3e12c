"""QAdA's moments, log masses and shares against an independent NumPy implementation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.attention import attention
from attnjax.mechanisms.sparse.query_adaptive_heads import (
    gaussian_log_mass,
    key_moments,
    local_share,
)
from tests.golden.compare import Compare


def check(data: Mapping[str, np.ndarray]) -> Iterable[Compare]:
    """Queries that see all keys; the first and the last keys are local for all of them."""
    wide = data["q"].dtype == np.float64
    rtol = 1e-8 if wide else 1e-5
    with jax.enable_x64(wide):
        q, k = (jnp.asarray(data[name]).swapaxes(0, 1)[None] for name in "qk")
        count = k.shape[1] - int(data["sink"]) - int(data["local"])
        at = np.arange(k.shape[1])
        rest = (at >= int(data["sink"])) & (at < int(data["sink"]) + count)
        moments = key_moments(k, jnp.asarray(rest)[None])
        yield Compare("mu", moments.mean[0], data["mu"], rtol)
        yield Compare("sigma", moments.covariance[0], data["sigma"], rtol)
        log_local, log_rest = (
            attention(q, k, k, mask=seen, return_residual=True)[1] for seen in (~rest, rest)
        )
        estimate = gaussian_log_mass(q, moments, count)
        for name, got in (
            ("log_local", log_local),
            ("log_bulk_true", log_rest),
            ("log_bulk_est", estimate),
            ("local_mass_oracle", local_share(log_local, log_rest)),
            ("local_mass_est", local_share(log_local, estimate)),
        ):
            yield Compare(name, got[0].swapaxes(0, 1), data[name], rtol)
