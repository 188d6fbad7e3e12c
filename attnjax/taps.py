"""Edits and captures: reading and changing what happens inside attention, without touching a model.

`Edits` is a pytree of arrays, so that its values may change under `jax.jit` without recompiling;
which fields are set is static. `None` costs nothing and changes no bit. Inside a model every array
has a leading axis over layers; `Edits.layer(i)` gives one layer's share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.maskprogram import look_up

SITES = (
    "q", "k", "v", "q_rot", "k_rot", "scores", "weights", "z", "head_out", "attn_out", "mlp_out",
    "resid_pre", "resid_mid", "resid_post", "aux_loss",
)  # fmt: skip
"""Names of the places that can be captured or patched.

q, k, v: projections by head before positions [b, t, h, d]. q_rot, k_rot: after them. scores,
  weights:
[b, h, t, s], before and after the softmax (dense path only). z: output by head [b, t, h, d], after
`head_scale` and `head_bias`. head_out: z through its slice of the output projection [b, t, h, m].
attn_out, mlp_out: what is added to the residual stream [b, t, m]. resid_pre, resid_mid,
  resid_post: the
residual stream before attention, between attention and MLP, and after the MLP. aux_loss: what the
layer adds to the training loss, a float32 scalar that already holds its coefficient.
"""


@dataclasses.dataclass(frozen=True)
class Patch:
    """Replaces a site's activation where `mask` is True: `where(mask, value, activation)`.

    Both arrays broadcast to the activation's shape.
    """

    value: jax.Array
    mask: jax.Array


@dataclasses.dataclass(frozen=True)
class Edits:
    """Interventions on one attention layer, or on a whole model with a leading layer axis.

    Attributes:
      head_scale: [h] (or broadcastable to [b, t, h, 1]), multiplies z; 0 removes a head.
      head_bias: [h, e], added to z.
      q_add, k_add: [h, d] and [g, d], added to queries and keys before positions are applied.
      score_bias: broadcastable to [b, h, t, s], added before the softmax.
      key_mask: [b, s] boolean, False hides a key from every query.
      query_positions, key_positions: [b, t] or [b, h, t] integers that replace the positions.
      residual_add: site name ("resid_pre", "attn_out" or "mlp_out") -> array added there.
      patch: site name -> `Patch`.
      weight_edit: static function weights [b, h, t, s] -> weights; selects the dense path.
    """

    head_scale: jax.Array | None = None
    head_bias: jax.Array | None = None
    q_add: jax.Array | None = None
    k_add: jax.Array | None = None
    score_bias: jax.Array | None = None
    key_mask: jax.Array | None = None
    query_positions: jax.Array | None = None
    key_positions: jax.Array | None = None
    residual_add: Mapping[str, jax.Array] | None = None
    patch: Mapping[str, Patch] | None = None
    weight_edit: Callable[[jax.Array], jax.Array] | None = None

    def layer(self, index: Any) -> Edits:
        """The edits of one layer: every array loses its leading layer axis."""
        return jax.tree.map(lambda x: x[index], self)

    def only(self, sites: Container[str]) -> Edits:
        """These edits without the patches and residual additions at other sites."""

        def keep(table: Mapping[str, Any] | None) -> dict[str, Any] | None:
            return {k: v for k, v in table.items() if k in sites} if table else None

        return dataclasses.replace(
            self, patch=keep(self.patch), residual_add=keep(self.residual_add)
        )


_ARRAYS = [f.name for f in dataclasses.fields(Edits) if f.name != "weight_edit"]
jax.tree_util.register_dataclass(Edits, data_fields=_ARRAYS, meta_fields=["weight_edit"])
jax.tree_util.register_dataclass(Patch, data_fields=["value", "mask"], meta_fields=[])


FIELD_SITES = {
    "head_scale": "z", "head_bias": "z", "q_add": "q", "k_add": "k", "query_positions": "q_rot",
    "key_positions": "k_rot", "score_bias": "scores", "weight_edit": "weights",
    "key_mask": "scores",
}  # fmt: skip
"""The site at which each field of `Edits` acts: a module without that site cannot honor the
field."""

MIXER_SITES = ("q", "k", "v", "q_rot", "k_rot", "scores", "weights", "z", "head_out", "attn_out")
"""The sites inside an attention module; the others belong to the block around it."""

BLOCK_SITES = ("resid_pre", "resid_mid", "mlp_out", "resid_post")
"""The sites of the block around an attention module."""


class Tap:
    """Reads and edits sites while one layer runs.

        tap = Tap(edits, capture)
        q = tap("q", q)                  # patched and captured
        ...
        return tap.result(y)             # y, or (y, {site: array}) when something is captured

    Args:
      edits: the layer's `Edits`, or None.
      capture: static names out of `SITES`.
      sites: the sites that the caller has; None for all of them.
      name: the caller's name, for messages.

    Raises:
      ValueError: for a name that is no site at all.
      NotImplementedError: for a site, or a field of `Edits`, that the caller does not have.
    """

    def __init__(
        self,
        edits: Edits | None,
        capture: Iterable[str] = (),
        *,
        sites: tuple[str, ...] | None = None,
        name: str = "this module",
    ):
        self.edits, self.captured = Edits() if edits is None else edits, {}
        self.capture = frozenset([capture] if isinstance(capture, str) else capture)
        patched = (*(self.edits.patch or ()), *(self.edits.residual_add or ()))
        for label, names in (("capture", sorted(self.capture)), ("edits", patched)):
            for site in names:
                if site not in SITES:
                    raise ValueError(
                        f"{label}: unknown site {site!r}; the sites are {', '.join(SITES)}."
                    )
                if sites is not None and site not in sites:
                    raise NotImplementedError(
                        f"{label}: {name} has no site {site!r}; it has {', '.join(sites)}."
                    )
        for field, site in FIELD_SITES.items():
            if sites is not None and site not in sites and getattr(self.edits, field) is not None:
                raise NotImplementedError(
                    f"edits: {name} cannot apply {field}, which acts at the site {site!r}; "
                    f"it has {', '.join(sites)}."
                )

    def __call__(self, site: str, value: jax.Array) -> jax.Array:
        """The activation at a site after additions and patches; remembers it when captured."""
        value = self.edit(site, value)
        if site in self.capture:
            self.captured[site] = value
        return value

    def edits_site(self, site: str) -> bool:
        """Whether there is a patch or an addition at the site."""
        return site in (*(self.edits.patch or ()), *(self.edits.residual_add or ()))

    def edit(self, site: str, value: jax.Array) -> jax.Array:
        """The activation at a site after additions and patches."""
        added = (self.edits.residual_add or {}).get(site)
        if added is not None:
            value = value + _match(added, value.ndim).astype(value.dtype)
        patch = (self.edits.patch or {}).get(site)
        if patch is not None:
            new = _match(patch.value, value.ndim).astype(value.dtype)
            value = jnp.where(_match(patch.mask, value.ndim), new, value)
        return value

    def score_mod(self, start: Any) -> Callable[..., jax.Array] | None:
        """Additions and patches at the site "scores", as a `score_mod` for `attnjax.attention`.

        Args:
          start: absolute index of the first query, 0 or [b]: edits count queries from there.

        Returns:
          The function, or None where the site is not edited.
        """
        if not self.edits_site("scores"):
            return None
        added = (self.edits.residual_add or {}).get("scores")
        patch = (self.edits.patch or {}).get("scores")

        def modify(score: jax.Array, b: Any, h: Any, q: Any, k: Any) -> jax.Array:
            row = q - (start if jnp.ndim(start) == 0 else start[b])

            def at(table: Any) -> jax.Array:
                return jnp.broadcast_to(look_up(_match(table, 4), b, h, row, k), score.shape)

            if added is not None:
                score = score + at(added).astype(score.dtype)
            if patch is not None:
                score = jnp.where(at(patch.mask), at(patch.value).astype(score.dtype), score)
            return score

        return modify

    def weight_edit(self) -> Callable[[jax.Array], jax.Array] | None:
        """`Edits.weight_edit`, then additions and patches at the site "weights", or None."""
        edit = self.edits.weight_edit
        if not self.edits_site("weights"):
            return edit
        return lambda weights: self.edit("weights", weights if edit is None else edit(weights))

    def heads(self, z: jax.Array) -> jax.Array:
        """Applies `head_scale` and `head_bias` to z [b, t, h, e], then the site "z"."""
        scale, bias = self.edits.head_scale, self.edits.head_bias
        if scale is not None:
            scale = scale[:, None] if scale.ndim == 1 else scale  # [h] -> [h, 1]
            z = z * _match(scale, z.ndim).astype(z.dtype)
        if bias is not None:
            z = z + _match(bias, z.ndim).astype(z.dtype)
        return self("z", z)

    def result(self, *outputs: Any) -> Any:
        """The outputs, with the captured arrays last when anything was asked for."""
        outputs = outputs + (self.captured,) if self.capture else outputs
        return outputs[0] if len(outputs) == 1 else outputs


def _match(x: Any, ndim: int) -> jax.Array:
    """`x` with leading axes of size 1 up to rank `ndim`; ranks are never promoted."""
    x = jnp.asarray(x)
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)
