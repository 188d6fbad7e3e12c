"""Pictures of mechanisms: who attends to whom, and what each output depends on.

    for title, picture in gallery.panels(aj.mechanisms()["cog_attention"]).items():
        gallery.draw(plt.gca(), picture, title)

The documentation and the notebooks draw every mechanism with this.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.spec import Mechanism


def panels(spec: Mechanism, length: int = 32) -> dict[str, np.ndarray]:
    """What there is to see of a mechanism: title -> array [t, s].

    The mechanism's own panels (`SPEC.picture`) come first. Of `SPEC.example`, one panel shows how
    strongly each output token depends on each input token, and another the attention weights,
    averaged over heads, where the module can give them.

    Args:
      spec: the record, as in `attnjax.mechanisms()[id]`.
      length: tokens of the random input.
    """
    found = dict(spec.picture()) if spec.picture else {}
    module, x = spec.example() if spec.example else (None, None)
    if x is not None and callable(module) and jnp.issubdtype(x.dtype, jnp.floating):
        if spec.nd == 1:
            x = jax.random.normal(jax.random.key(0), (1, length, x.shape[-1]), x.dtype)
        found["influence of input s on output t"] = influence(module, x)
        weights = captured_weights(module, x)
        if weights is not None:
            found["attention weights, mean over heads"] = weights
    return found


def influence(module: Any, x: jax.Array) -> np.ndarray:
    """|d y_t / d x_s| for one example of the batch, along a fixed random direction of y: [t, s].

    The square root of its share of a row, so that weak dependencies can be seen.
    """
    x = x[:1]
    channels = x.shape[-1]

    def flat(x):
        y = module(x)
        return y.reshape(-1, y.shape[-1])

    y, pull = jax.vjp(flat, x)
    direction = jax.random.normal(jax.random.key(0), y.shape[-1:], y.dtype)
    one_token = jnp.eye(y.shape[0], dtype=y.dtype)[:, :, None] * direction[None, None, :]
    (gradients,) = jax.vmap(pull)(one_token)
    strength = jnp.linalg.norm(gradients.reshape(y.shape[0], -1, channels), axis=-1)
    share = strength / jnp.maximum(strength.max(axis=-1, keepdims=True), 1e-30)
    return np.asarray(jnp.sqrt(share))


def captured_weights(module: Any, x: jax.Array) -> np.ndarray | None:
    """Attention weights [t, s] of the first example, or None where the module captures none."""
    try:
        *_, captured = module(x[:1], capture=("weights",))
    except (NotImplementedError, TypeError, ValueError):
        return None
    if not isinstance(captured, dict) or "weights" not in captured:
        return None
    return np.asarray(captured["weights"][0].mean(axis=0))


def draw(axis: Any, picture: Any, title: str) -> None:
    """Draws an array [t, s] on a matplotlib axis: white is zero, red is negative."""
    picture = np.asarray(picture, np.float32)
    if picture.min() < 0:
        top = np.abs(picture).max()
        axis.imshow(picture, cmap="RdBu", vmin=-top, vmax=top, interpolation="nearest")
    else:
        axis.imshow(picture, cmap="Blues", vmin=0, interpolation="nearest")
    axis.set_title(title, fontsize=7, family="monospace" if "(" in title else None)
    axis.set(xticks=[], yticks=[])
