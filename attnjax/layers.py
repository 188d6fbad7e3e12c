"""Small layers that mechanisms and models share: projections and norms.

Every parameter names its axes in its own metadata key `axes`, as in `("embed", "heads",
"head_dim")`. The names are plain data: one module runs on one device or on a pod, and whoever
trains it maps them to mesh axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()


def compute_dtype(dtype: Any, *arrays: Any) -> Any:
    """`dtype`, or the dtype that the arrays promote to where it is None, as in flax.nnx."""
    if dtype is not None:
        return jnp.dtype(dtype)
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*[a.dtype for a in arrays])


class Projection(nnx.Module):
    """A linear map between groups of axes.

        y[..., out] = sum_in x[..., in] kernel[in, out] + bias[out]

    The parameters have the names and shapes of `flax.nnx.LinearGeneral`.

    Args:
      in_features: size, or sizes, of the contracted last axes.
      out_features: size, or sizes, of the new axes.
      in_axes, out_axes: logical names of these axes.
      use_bias: whether there is a bias.
      dtype: of the computation; None promotes input and kernel.
      param_dtype: of the parameters.
      kernel_init, bias_init: initializers; the kernel is drawn as a matrix [prod(in), prod(out)].
      precision: as in `jax.lax.dot_general`.
      rngs: stream `params`.
    """

    def __init__(
        self,
        in_features: int | tuple[int, ...],
        out_features: int | tuple[int, ...],
        *,
        in_axes: tuple[str | None, ...],
        out_axes: tuple[str | None, ...],
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = default_kernel_init,
        bias_init: Callable[..., Any] = default_bias_init,
        precision: Any = None,
        rngs: nnx.Rngs,
    ):
        ins = (in_features,) if isinstance(in_features, int) else tuple(in_features)
        outs = (out_features,) if isinstance(out_features, int) else tuple(out_features)
        matrix = kernel_init(rngs.params(), (math.prod(ins), math.prod(outs)), param_dtype)
        self.kernel = nnx.Param(matrix.reshape(ins + outs), axes=tuple(in_axes) + tuple(out_axes))
        self.bias = nnx.data(None)
        if use_bias:
            bias = bias_init(rngs.params(), (math.prod(outs),), param_dtype)
            self.bias = nnx.Param(bias.reshape(outs), axes=tuple(out_axes))
        self.rank, self.dtype, self.precision = len(ins), dtype, precision

    def __call__(self, x: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """Contracts the last `rank` axes of x."""
        kernel = self.kernel[...]
        dtype = compute_dtype(self.dtype, x, kernel)
        first = x.ndim - self.rank
        y = jax.lax.dot_general(
            x.astype(dtype),
            kernel.astype(dtype),
            ((tuple(range(first, x.ndim)), tuple(range(self.rank))), ((), ())),
            precision=self.precision,
        )
        return y if self.bias is None else add_bias(y, self.bias[...])


def add_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """`y + bias` with the bias along the last axes of y, in the dtype of y."""
    return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape).astype(y.dtype)


class RMSNorm(nnx.Module):
    """x · rsqrt(mean(x²) + epsilon) · scale over the last axis, in float32 inside.

    Args:
      features: size of the last axis.
      epsilon: added to the mean square.
      axis: logical name of the last axis.
      param_dtype: of the scale, which starts at 1.
      rngs: not drawn from; taken so that norms are interchangeable.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-6,
        axis: str | None = "embed",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype), axes=(axis,))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """The normalized x in the dtype of x."""
        y = simple_rms_norm(_wide(x), self.epsilon)
        return (y * _row(self.scale[...], y)).astype(x.dtype)


class SRMSNorm(nnx.Module):
    """x · rsqrt(mean(x²) + epsilon) over the last axis, without parameters.

    Reference: TransNormerLLM, arXiv:2307.14995.

    Args:
      features: size of the last axis; kept for symmetry with `RMSNorm`.
      epsilon: added to the mean square.
      axis, param_dtype, rngs: unused; taken so that norms are interchangeable.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-6,
        axis: str | None = "embed",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """The normalized x in the dtype of x."""
        return simple_rms_norm(_wide(x), self.epsilon).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) · rsqrt(var + epsilon) · scale + bias over the last axis, in float32 inside.

    Args:
      features: size of the last axis.
      epsilon: added to the variance.
      axis: logical name of the last axis.
      use_bias: whether there is a bias, which starts at 0. The QK-norm of flax.nnx has none.
      param_dtype: of scale and bias; the scale starts at 1.
      rngs: not drawn from; taken so that norms are interchangeable.
    """

    def __init__(
        self,
        features: int,
        *,
        epsilon: float = 1e-6,
        axis: str | None = "embed",
        use_bias: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype), axes=(axis,))
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((features,), param_dtype), axes=(axis,))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, " ..."]) -> Float[Array, " ..."]:
        """The normalized x in the dtype of x."""
        wide = _wide(x)
        centered = wide - wide.mean(-1, keepdims=True)
        y = simple_rms_norm(centered, self.epsilon)
        y = y * _row(self.scale[...], y)
        return (y if self.bias is None else add_bias(y, self.bias[...])).astype(x.dtype)


def simple_rms_norm(x: Float[Array, " ..."], epsilon: float = 1e-6) -> Float[Array, " ..."]:
    """X · rsqrt(mean(x²) + epsilon) over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


def _wide(x: jax.Array) -> jax.Array:
    """At least float32: the statistics of a norm are never taken in 16 bits."""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x


def _row(scale: jax.Array, like: jax.Array) -> jax.Array:
    return scale.reshape((1,) * (like.ndim - 1) + scale.shape).astype(like.dtype)
