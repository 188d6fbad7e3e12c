"""The parts of a language model that are not attention: embedding, gated MLPs, norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from attnjax.layers import Projection, RMSNorm, SRMSNorm, default_kernel_init

__all__ = ["MLPS", "NORMS", "SGLU", "Embed", "RMSNorm", "SRMSNorm", "SwiGLU"]


class Embed(nnx.Module):
    """A table of token vectors, also usable as the output layer.

    Args:
      vocab_size: rows.
      features: width of a vector.
      dtype: of the vectors that are returned.
      param_dtype: of the table.
      init: initializer of the table.
      rngs: stream `params`.
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        init: Callable[..., Any] = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        table = init(rngs.params(), (vocab_size, features), param_dtype)
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))
        self.dtype = dtype

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t m"]:
        """The vectors of the tokens; indices must be in [0, vocab_size)."""
        return jnp.take(self.embedding[...], tokens, axis=0).astype(self.dtype)

    def attend(self, x: Float[Array, "b t m"]) -> Float[Array, "b t v"]:
        """Scores of x against every row of the table, in float32."""
        table = self.embedding[...].astype(x.dtype)
        return jnp.einsum("btm,vm->btv", x, table, preferred_element_type=wide(x.dtype))


class _GatedMLP(nnx.Module):
    """act(x W_gate) ⊙ (x W_up) W_down, without biases."""

    def __init__(
        self,
        features: int,
        hidden: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = default_kernel_init,
        out_kernel_init: Callable[..., Any] | None = None,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = dict(
            use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        up: dict[str, Any] = dict(in_axes=("embed",), out_axes=("mlp",), kernel_init=kernel_init)
        self.gate = Projection(features, hidden, **up, **options)
        self.up = Projection(features, hidden, **up, **options)
        init = out_kernel_init or kernel_init
        self.down = Projection(
            hidden, features, in_axes=("mlp",), out_axes=("embed",), kernel_init=init, **options
        )

    def __call__(self, x: Float[Array, "b t m"]) -> Float[Array, "b t m"]:
        return self.down(self._activation(self.gate(x)) * self.up(x))

    def _activation(self, x: jax.Array) -> jax.Array:
        return x


class SwiGLU(_GatedMLP):
    """(silu(x W_gate) ⊙ x W_up) W_down (Shazeer, 2020, arXiv:2002.05202).

    Args:
      features: width of input and output.
      hidden: width inside.
      dtype, param_dtype, kernel_init: as in `Projection`.
      out_kernel_init: initializer of W_down; None is `kernel_init`.
      rngs: stream `params`.
    """

    def _activation(self, x: jax.Array) -> jax.Array:
        return jax.nn.silu(x)


class SGLU(_GatedMLP):
    """(x W_gate ⊙ x W_up) W_down, without activation (TransNormerLLM, arXiv:2307.14995).

    Args:
      features: width of input and output.
      hidden: width inside.
      dtype, param_dtype, kernel_init: as in `Projection`.
      out_kernel_init: initializer of W_down; None is `kernel_init`.
      rngs: stream `params`.
    """


def wide(dtype: Any) -> Any:
    """Float32, or float64 for float64: the dtype of logits and statistics."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


NORMS = {"rmsnorm": RMSNorm, "srmsnorm": SRMSNorm}
MLPS = {"swiglu": SwiGLU, "sglu": SGLU}
