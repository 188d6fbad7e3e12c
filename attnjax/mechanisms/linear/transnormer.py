"""The layer of TransNormerLLM: lightning attention and a gated MLP, each behind a plain norm.

    x ← x + Mixer(SRMS(x))        Mixer: `LightningAttention`
    x ← x + SGLU(SRMS(x))         SGLU(x) = (x W_1 ⊙ x W_2) W_3, no activation
    SRMS(x) = x · rsqrt(mean(x²) + 1e-6)

Reference: Qin et al., "TransNormerLLM: A Faster and Better Large Language Model with Improved
TransNormer", 2023, arXiv:2307.14995; block and sizes as in the released models of
OpenNLPLab/TransnormerLLM (the paper divides by ‖x‖₂/√d, which is the same up to the 1e-6). A model
of such layers ends with one more SRMS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from attnjax.cache.linear_state import LinearCache
from attnjax.layers import Projection, SRMSNorm, default_kernel_init
from attnjax.mechanisms.linear.lightning_attention import LightningAttention
from attnjax.spec import Mechanism
from attnjax.taps import BLOCK_SITES, Edits, Tap


class TransNormerBlock(nnx.Module):
    """One layer of TransNormerLLM; always causal.

    Args:
      num_heads: h.
      in_features: width m of the residual stream.
      mlp_features: width inside the MLP.
      qkv_features: width of all heads together; None is `in_features`.
      slopes, layer, num_layers, lrpe, chunk_size: of the mixer, see `LightningAttention`.
      dtype: of the computation; None promotes inputs and parameters.
      param_dtype: of the parameters.
      kernel_init: initializer of all projections. Released models: normal(0, init_std).
      rngs: stream `params`.
    """

    sites = LightningAttention.sites + BLOCK_SITES

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        mlp_features: int,
        *,
        qkv_features: int | None = None,
        slopes: str | Sequence[float] | None = "alibi",
        layer: int = 0,
        num_layers: int = 1,
        lrpe: bool = False,
        chunk_size: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable[..., Any] = default_kernel_init,
        rngs: nnx.Rngs,
    ):
        shared: dict[str, Any] = dict(
            dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, rngs=rngs
        )
        self.norm = SRMSNorm(in_features)
        self.mixer = LightningAttention(
            num_heads, in_features, qkv_features, slopes=slopes, layer=layer, num_layers=num_layers,
            lrpe=lrpe, chunk_size=chunk_size, **shared,
        )  # fmt: skip

        def linear(ins: int, outs: int, in_axis: str, out_axis: str) -> Projection:
            return Projection(
                ins, outs, in_axes=(in_axis,), out_axes=(out_axis,), use_bias=False, **shared
            )

        self.gate = linear(in_features, mlp_features, "embed", "mlp")
        self.up = linear(in_features, mlp_features, "embed", "mlp")
        self.down = linear(mlp_features, in_features, "mlp", "embed")

    def __call__(
        self,
        x: Float[Array, "b t m"],
        *,
        mask: None = None,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
        cache: LinearCache | None = None,
        valid: Bool[Array, "b t"] | None = None,
        deterministic: bool | None = None,
        edits: Edits | None = None,
        capture: Iterable[str] = (),
    ) -> Any:
        """One layer; the arguments are those of `LightningAttention`.

        Returns:
          x [b, t, m]; `(x, cache)` with a cache; captured arrays as a dict last.
        """
        capture = frozenset([capture] if isinstance(capture, str) else capture)
        Tap(edits, capture, sites=self.sites, name=type(self).__name__)
        tap = Tap(edits and edits.only(BLOCK_SITES), capture.intersection(BLOCK_SITES))
        inside = capture.intersection(self.mixer.sites)
        if valid is not None:
            # padding may hold anything, NaN too: it must not reach the MLP's gradients either
            x = jnp.where(valid[..., None], x, jnp.zeros_like(x))
        x = tap("resid_pre", x)
        result = self.mixer(
            self.norm(x), mask=mask, positions=positions, segment_ids=segment_ids, cache=cache,
            valid=valid, deterministic=deterministic, edits=edits and edits.only(self.mixer.sites),
            capture=inside,
        )  # fmt: skip
        parts = [*result] if isinstance(result, tuple) else [result]
        x = tap("resid_mid", x + parts[0])
        y = self.norm(x)
        y = tap("mlp_out", self.down(self.gate(y) * self.up(y)))
        x = tap("resid_post", x + y)
        tap.captured |= dict(parts[-1]) if inside else {}
        tap.capture |= inside
        return tap.result(x) if cache is None else tap.result(x, parts[1])

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> LinearCache:
        """An empty state; see `LightningAttention.init_cache`."""
        return self.mixer.init_cache(batch, max_length, dtype)


def _example() -> tuple[TransNormerBlock, jax.Array]:
    module = TransNormerBlock(4, 16, 24, lrpe=True, rngs=nnx.Rngs(0))
    return module, jax.random.normal(jax.random.key(1), (2, 9, 16))


SPEC = Mechanism(
    id="transnormer",
    title="TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
    arxiv="2307.14995",
    year=2023,
    kind="model",
    code="OpenNLPLab/TransnormerLLM",
    module=TransNormerBlock,
    causal=True,
    bidirectional=False,
    cache="state",
    segment_ids=True,
    golden=("tnl",),
    kernel="linear",
    cost="O(T (C (K + V) + K V)), chunk C",
    example=_example,
)
