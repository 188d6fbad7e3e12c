"""Factored attention, whose weights depend on positions alone, and a wave function made of it.

    y_i = Σ_j α^h_ij v_j,   v = x W_V + b        α free, real, without softmax or normalization
    translation invariant: α^h_ij = α^h_((i - j) mod grid), n numbers per head instead of n²

On lattices of spins, queries and keys learn maps that do not depend on the input, and leaving them
out loses nothing. The wave function cuts σ ∈ {±1}^(L x L) into patches, runs pre-norm blocks, sums
the tokens, z = LN(Σ_i x_i), and gives ln ψ = Σ_a ln cosh(LN(z A)_a + i LN(z B)_a). There are no
position embeddings; in the translation invariant form, shifts of σ by whole patches leave ψ as it
is, exactly.

Reference: Rende and Viteritti, "Are queries and keys always relevant? A case study on Transformer
wave functions", 2024, arXiv:2405.18874; code by the authors in a tutorial of netket/netket
(docs/tutorials/ViT-wave-function). Its sizes, L = 10, width 60, 10 heads, 4 layers, give 155,620
parameters. Hamiltonian and optimizer: `attnjax.tasks.spin_lattice`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float, Num

from attnjax.dense import qk_scores, softmax_weights, weighted_values
from attnjax.layers import LayerNorm, Projection
from attnjax.mixer import SCORE_SITES, Call, SequenceMixer
from attnjax.spec import Mechanism
from pallas_kernels import tilemath

WEIGHTS = ("position_ti", "position", "content", "content+position", "content+position_ti")
XAVIER = nnx.initializers.xavier_uniform()


def factored_attention(
    value: Float[Array, "b s h e"], alpha: Float[Array, "h t s"]
) -> Float[Array, "b t h e"]:
    """Values mixed by weights that are parameters: y_i = Σ_j α^h_ij v_j.

    Args:
      value: as annotated.
      alpha: weights of any sign; `circulant` makes them from those of a grid.

    Returns:
      Output in the dtype of `value`, summed in float32 or wider. Cost: O(t s e) per head.

    Raises:
      ValueError: on shapes that do not fit together.

    Example: >>> factored_attention(v, circulant(alpha, grid=(5, 5))).shape
    """
    if alpha.ndim != 3 or alpha.shape[::2] != (value.shape[2], value.shape[1]):
        raise ValueError(
            f"factored_attention: alpha must be [heads, t, s] for value [b, s, heads, e] = "
            f"{value.shape}, got {alpha.shape}."
        )
    dtype = tilemath.accumulator_dtype(value.dtype)
    out = jnp.einsum("hts,bshe->bthe", alpha.astype(dtype), value.astype(dtype))
    return out.astype(value.dtype)


def circulant(alpha: Float[Array, "h n"], grid: tuple[int, ...]) -> Float[Array, "h n n"]:
    """Weights α_ij = α_((i - j) mod grid) of all pairs of places on a periodic grid.

    Args:
      alpha: weights by displacement, with places in row-major order; displacement 0 is first.
      grid: sizes of the axes; their product is n.

    Raises:
      ValueError: when the grid has another number of places.
    """
    if math.prod(grid) != alpha.shape[-1]:
        raise ValueError(
            f"circulant: grid={grid} has {math.prod(grid)} places, alpha {alpha.shape} has weights "
            f"for {alpha.shape[-1]}."
        )
    places = np.indices(grid).reshape(len(grid), -1)
    moved = (places[:, :, None] - places[:, None, :]) % np.array(grid)[:, None, None]
    return alpha[:, np.ravel_multi_index(tuple(moved), grid)]


class FactoredAttention(SequenceMixer):
    """Attention by position, by content, or both, with or without softmax, over n places.

    Args:
      num_heads, in_features, qkv_features, out_features: as in `SequenceMixer`.
      grid: sizes of the lattice, whose places are the tokens in row-major order; fewer tokens are
        its first places. An integer is a chain.
      weights: "position_ti" or "position" (factored attention); "content" (q · k / sqrt(d)); or
        "content+position", "content+position_ti", their sum.
      softmax: whether weights are normalized. Paper: not in factored attention.
      causal: must be False.
      use_bias, kernel_init: source: biases, Xavier uniform everywhere.
      **options: of `SequenceMixer`.

    Raises:
      ValueError: for other weights or an empty grid.
    """

    sites = SCORE_SITES
    directions = ("bidirectional",)
    packed = decodes = False
    masked = True

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        *,
        grid: int | tuple[int, ...],
        weights: str = "position_ti",
        softmax: bool = False,
        causal: bool = False,
        use_bias: bool = True,
        kernel_init: Any = XAVIER,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(
            num_heads, in_features, qkv_features, out_features, causal=causal, use_bias=use_bias,
            kernel_init=kernel_init, rngs=rngs, **options,
        )  # fmt: skip
        name = type(self).__name__
        self.grid = (grid,) if isinstance(grid, int) else tuple(grid)
        places = math.prod(self.grid)
        if weights not in WEIGHTS:
            raise ValueError(f"{name}: weights={weights!r} is none of {', '.join(WEIGHTS)}.")
        if places < 1:
            raise ValueError(f"{name}: grid={grid} has no places.")
        self.weights, self.softmax = weights, softmax
        heads = (num_heads, self.head_dim)
        self.query = self.key = self.alpha = nnx.data(None)
        if "content" in weights:
            self.query, self.key = (self.projection(heads, rngs=rngs) for _ in range(2))
        self.value = self.projection(heads, rngs=rngs)
        self.out = self.output_projection(rngs=rngs)
        if weights.endswith("position_ti"):
            alpha = XAVIER(rngs.params(), (num_heads, places), self.param_dtype)
            self.alpha = self.parameter(alpha, ("heads", None))
        elif weights.endswith("position"):
            initial = nnx.initializers.xavier_uniform(batch_axis=0)
            alpha = initial(rngs.params(), (num_heads, places, places), self.param_dtype)
            self.alpha = self.parameter(alpha, ("heads", None, None))

    def by_position(self, length: int | None = None) -> Float[Array, "h t t"]:
        """The position part of the weights of the first `length` places (None: of all).

        Raises:
          ValueError: for more tokens than places, or weights="content".
        """
        places = math.prod(self.grid)
        length = places if length is None else length
        if self.alpha is None or length > places:
            raise ValueError(
                f"{type(self).__name__}: weights={self.weights!r} over the {places} places of grid="
                f"{self.grid} do not cover {length} tokens."
            )
        alpha = self.alpha[...]
        alpha = circulant(alpha, self.grid) if alpha.ndim == 2 else alpha
        return alpha[:, :length, :length]

    def mix(self, call: Call) -> jax.Array:
        """Z [b, t, h, d]."""
        x, v = call.x, self.value(call.x)
        b, t = x.shape[:2]
        keep = call.keep(t)
        if self.query is not None and self.key is not None:
            q, k, v = self.heads(call, self.query(x), self.key(x), v)
            scores = qk_scores(q, k)
            if self.alpha is not None:
                scores = scores + self.by_position(t)[None].astype(scores.dtype)
        else:
            self._refuse_qk(call)
            v = call.tap("v", v)
            if not self.softmax and keep is None and not call.wants_scores:
                return factored_attention(v, self.by_position(t))
            scores = self.by_position(t)[None].astype(tilemath.accumulator_dtype(v.dtype))
            scores = jnp.broadcast_to(scores, (b, *scores.shape[1:]))
        scores = self.edit_scores(call, scores)
        if self.softmax:
            weights, _ = softmax_weights(scores, keep)
        else:
            weights = scores if keep is None else jnp.where(keep, scores, jnp.zeros_like(scores))
        return weighted_values(self.edit_weights(call, weights), v).astype(v.dtype)

    def _refuse_qk(self, call: Call) -> None:
        tap = call.tap
        used = [site for site in ("q", "k") if site in tap.capture or tap.edits_site(site)]
        used += [name for name in ("q_add", "k_add") if getattr(tap.edits, name) is not None]
        if used:
            raise NotImplementedError(
                f"{type(self).__name__}: weights={self.weights!r} have no queries and keys for "
                f"{', '.join(used)}; use weights='content' or 'content+position'."
            )


class WaveFunction(nnx.Module):
    """Complex amplitudes of spin configurations on an L x L lattice by a Transformer.

    Args:
      side: L in sites, a multiple of `patch`.
      patch: width of a patch in sites. Paper: 2.
      width: m. Source: 60.
      num_heads: Source: 10.
      num_layers: Source: 4.
      weights, softmax: of `FactoredAttention`.
      param_dtype: Source: float64.
      rngs: stream `params`.

    Raises:
      ValueError: when patch does not divide side.
    """

    def __init__(
        self,
        side: int,
        *,
        patch: int = 2,
        width: int = 60,
        num_heads: int = 10,
        num_layers: int = 4,
        weights: str = "position_ti",
        softmax: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if side % patch:
            raise ValueError(f"WaveFunction: side={side} must be a multiple of patch={patch}.")
        self.side, self.patch = side, patch
        grid = (side // patch, side // patch)

        def dense(ins: int, outs: int) -> Projection:
            return Projection(
                ins, outs, in_axes=("embed",), out_axes=("mlp",), kernel_init=XAVIER,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        def norm() -> LayerNorm:
            return LayerNorm(width, use_bias=True, param_dtype=param_dtype)

        self.embed = dense(patch * patch, width)
        self.mixers = nnx.List(
            [
                FactoredAttention(
                    num_heads, width, grid=grid, weights=weights, softmax=softmax,
                    param_dtype=param_dtype, rngs=rngs,
                )
                for _ in range(num_layers)
            ]
        )  # fmt: skip
        layers = range(num_layers)
        self.mixer_norms = nnx.List([norm() for _ in layers])
        self.mlp_norms = nnx.List([norm() for _ in layers])
        self.up = nnx.List([dense(width, 4 * width) for _ in layers])
        self.down = nnx.List([dense(4 * width, width) for _ in layers])
        self.final_norm, self.real_norm, self.imag_norm = norm(), norm(), norm()
        self.real, self.imag = dense(width, width), dense(width, width)

    def __call__(self, spins: Num[Array, "b l l"]) -> Complex[Array, " b"]:
        """Gives ln ψ(σ) of configurations of ±1, shape [b].

        Raises:
          ValueError: for another shape.
        """
        side, p = self.side, self.patch
        if spins.ndim != 3 or spins.shape[1:] != (side, side):
            raise ValueError(
                f"WaveFunction: spins must have shape [batch, {side}, {side}], got {spins.shape}."
            )
        patches = spins.reshape(-1, side // p, p, side // p, p).swapaxes(2, 3)
        x = self.embed(patches.reshape(len(spins), -1, p * p).astype(self.embed.kernel[...].dtype))
        for layer, mixer in enumerate(self.mixers):
            x = x + mixer(self.mixer_norms[layer](x))
            x = x + self.down[layer](jax.nn.gelu(self.up[layer](self.mlp_norms[layer](x))))
        z = self.final_norm(x.sum(1))
        out = jax.lax.complex(self.real_norm(self.real(z)), self.imag_norm(self.imag(z)))
        return log_cosh(out).sum(-1)


def log_cosh(z: Complex[Array, " ..."]) -> Complex[Array, " ..."]:
    """Ln cosh z, without overflow for a large real part."""
    z = jnp.where(z.real < 0, -z, z)
    return z + jnp.log((1 + jnp.exp(-2 * z)) / 2)


def _example() -> tuple[FactoredAttention, jax.Array]:
    module = FactoredAttention(2, 16, grid=(4, 8), rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 32, 16))


SPEC = Mechanism(
    id="transformer_wavefunction",
    title="Are queries and keys always relevant? A case study on Transformer wave functions",
    arxiv="2405.18874",
    year=2024,
    code="netket/netket",
    function=factored_attention,
    module=FactoredAttention,
    causal=False,
    bidirectional=True,
    kernel="einsum",
    cost="O(T^2), weights of the input not needed",
    reduces_to={"weights=content, softmax=True": "multi_head_attention"},
    reading="Of the forms compared with factored attention only the wording is followed: content "
    "plus position adds the weights to the scores, without softmax too.",
    example=_example,
)
