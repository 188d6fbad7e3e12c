"""Running the layers of a model, scanned or unrolled.

Layers of a group are stacked: every parameter has a leading axis over the repeats of the group's
unit. `jax.lax.scan` runs over that axis; the unrolled twin takes one slice after the other from the
same parameters. Whatever a layer reads or returns besides the residual stream travels as scan input
or output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax.models.block import SAVED_NAMES, Block, layer_slopes
from attnjax.models.pattern import Mixer, layer_groups, layer_mixers
from attnjax.taps import SITES, Edits, Tap

REMAT = ("none", "full", "dots", "names")


class LayerStack(nnx.Module):
    """All layers of a decoder.

    Attributes:
      groups: for each group, one stacked `Block` per place in its unit.

    Args:
      config: `LanguageModelConfig`.
      rngs: stream `params`.
    """

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.config = config
        self.mixers = tuple(layer_mixers(config.mixers, config.num_layers))
        self.shape = tuple(layer_groups(list(self.mixers)))
        self.groups = nnx.List(
            [
                nnx.List([_stacked(config, mixer, repeats, rngs) for mixer in unit])
                for unit, repeats in self.shape
            ]
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        cache: Any = None,
        edits: Edits | None = None,
        dropout_key: Any = None,
        capture: Iterable[str] = (),
        positions: Any = None,
        segment_ids: Any = None,
        valid: Any = None,
        mixer_inputs: Mapping[str, Any] | None = None,
    ) -> tuple[jax.Array, Any, dict[str, jax.Array]]:
        """Runs x [b, t, m] through all layers; see `LanguageModel.hidden` for the arguments.

        Returns:
          (x, cache or None, captured arrays [layers, ...] by site).
        """
        config = self.config
        capture = Tap(edits, capture).capture  # checks the names
        _check_layers("edits", edits, config.num_layers)
        further = dict(mixer_inputs or {})
        self._check_inputs(further)
        slopes = layer_slopes(config, list(self.mixers))
        keys = None
        if dropout_key is not None:
            # one key per layer from its absolute index, so that grouping changes no mask
            keys = jax.vmap(lambda i: jax.random.fold_in(dropout_key, i))(
                jnp.arange(config.num_layers)
            )

        def run(block: Block, x: jax.Array, rest: tuple[Any, ...]) -> tuple[jax.Array, Any, Any]:
            return block(
                x, *rest, positions=positions, segment_ids=segment_ids, valid=valid,
                capture=capture, mixer_inputs=further,
            )  # fmt: skip

        caches, captured, first = [], [], 0
        for place, (unit, repeats) in enumerate(self.shape):
            size = len(unit)
            scanned = config.scan_layers and repeats > 1
            layer = rematerialized(run, config.remat, scanned)

            def body(x: jax.Array, inputs: Any, layer: Any = layer) -> tuple[jax.Array, Any]:
                outputs = []
                for block, *rest in zip(*inputs, strict=True):
                    x, *output = layer(block, x, tuple(rest))
                    outputs.append(tuple(output))
                return x, tuple(outputs)

            def share(table: Any, first: int = first, size: int = size, n: int = repeats) -> Any:
                """This group's layers of a table, as [n, ...] for each place of the unit."""
                cut = [
                    jax.tree.map(lambda a, j=j: a[first + j : first + n * size : size], table)
                    for j in range(size)
                ]
                return tuple(cut)

            decay: list[list[Any]] = [
                slopes[first + j : first + repeats * size : size] for j in range(size)
            ]
            inputs = (
                tuple(self.groups[place]),
                tuple(None if s[0] is None else jnp.stack(s) for s in decay),
                (None,) * size if cache is None else cache[place],
                share(edits),
                share(keys),
            )
            x, outputs = (jax.lax.scan if scanned else _unrolled)(body, x, inputs)
            caches.append(tuple(output[0] for output in outputs))
            captured.append((repeats, [output[1] for output in outputs]))
            first += size * repeats
        return x, None if cache is None else tuple(caches), _in_layer_order(captured, capture)

    def _check_inputs(self, further: dict[str, Any]) -> None:
        """Every further argument must be taken by some mixer."""
        blocks = [block for unit in self.groups for block in unit]
        taken = {name for block in blocks for name in block.mixer_arguments}
        for name in further:
            if name not in taken:
                raise ValueError(
                    f"mixer_inputs: no mixer of {self.config.mixers!r} takes {name!r}; further "
                    f"arguments of its mixers are {', '.join(sorted(taken)) or 'none'}."
                )

    def init_cache(self, batch: int, max_length: int, dtype: Any = None) -> Any:
        """Empty caches: one per place of each group, stacked over the repeats."""

        def stacked(block: Block, repeats: int) -> Any:
            one = block.mixer.init_cache(batch, max_length, dtype)
            return jax.tree.map(lambda a: jnp.repeat(a[None], repeats, axis=0), one)

        return tuple(
            tuple(stacked(block, repeats) for block in blocks)
            for blocks, (_, repeats) in zip(self.groups, self.shape, strict=True)
        )

    def by_layer(self, parameters: Any) -> list[Any]:
        """Stacked parameters (a pure dict of this module) as one tree per layer, in order."""
        return [
            jax.tree.map(lambda a, r=r: a[r], parameters["groups"][place][j])
            for place, (unit, repeats) in enumerate(self.shape)
            for r in range(repeats)
            for j in range(len(unit))
        ]

    def from_layers(self, layers: list[Any]) -> dict[str, Any]:
        """The inverse of `by_layer`."""
        groups, first = {}, 0
        for place, (unit, repeats) in enumerate(self.shape):
            size = len(unit)
            own = [layers[first + j : first + size * repeats : size] for j in range(size)]
            groups[place] = {j: jax.tree.map(lambda *a: jnp.stack(a), *own[j]) for j in range(size)}
            first += size * repeats
        return {"groups": groups}


def rematerialized(run: Callable[..., Any], policy: str, scanned: bool) -> Callable[..., Any]:
    """A layer function whose backward pass recomputes what the policy does not keep.

    Args:
      run: function of one layer.
      policy: "none" keeps everything; "full" keeps the layer's input; "dots" also keeps products
        with weights; "names" also keeps what goes into the residual stream.
      scanned: whether it is the body of a scan, where nothing can be merged back by the compiler.

    Raises:
      ValueError: for an unknown policy.
    """
    policies = jax.checkpoint_policies
    if policy == "none":
        return run
    kept = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "names": policies.save_only_these_names(*SAVED_NAMES),
    }
    if policy not in kept:
        raise ValueError(f"remat={policy!r} is none of {', '.join(REMAT)}.")
    return jax.checkpoint(run, policy=kept[policy], prevent_cse=not scanned)


def _stacked(config: Any, mixer: Mixer, repeats: int, rngs: nnx.Rngs) -> Block:
    """`repeats` blocks in one, with "layers" as the first axis of every parameter."""

    @nnx.split_rngs(splits=repeats)
    @nnx.vmap(
        in_axes=0,
        out_axes=0,
        axis_size=repeats,
        transform_metadata={nnx.PARTITION_NAME: "layers", "axes": "layers"},
    )
    def build(rngs: nnx.Rngs) -> Block:
        return Block(config, mixer, rngs=rngs)

    return build(rngs)


def _unrolled(body: Callable[..., Any], x: jax.Array, inputs: Any) -> tuple[jax.Array, Any]:
    """`jax.lax.scan` as a Python loop."""
    count = jax.tree.leaves(inputs)[0].shape[0]
    outputs = []
    for i in range(count):
        x, output = body(x, jax.tree.map(lambda a, i=i: a[i], inputs))
        outputs.append(output)
    return x, jax.tree.map(lambda *a: jnp.stack(a), *outputs)


def _in_layer_order(
    captured: list[tuple[int, list[dict[str, jax.Array]]]], capture: frozenset[str]
) -> dict[str, jax.Array]:
    """Captured arrays [layers, ...] from the groups' [repeats, ...]; NaN where there is no site."""
    result = {}
    for site in sorted(capture, key=SITES.index):
        found = [table[site] for _, unit in captured for table in unit if site in table]
        if not found:
            raise NotImplementedError(f"capture: no layer of this model has the site {site!r}.")
        shapes = {a.shape[1:] for a in found}
        if len(shapes) > 1:
            raise NotImplementedError(
                f"capture: layers differ in the shape of {site!r}: {sorted(shapes)}; capture it "
                "from the layers' own modules instead."
            )
        like = found[0]
        groups = []
        for repeats, unit in captured:
            absent = jnp.full((repeats, *like.shape[1:]), jnp.nan, like.dtype)
            column = jnp.stack([table.get(site, absent) for table in unit], axis=1)
            groups.append(column.reshape(-1, *like.shape[1:]))
        result[site] = jnp.concatenate(groups)
    return result


def _check_layers(name: str, tree: Any, num_layers: int) -> None:
    """Every array must have a leading axis over layers."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.ndim == 0 or leaf.shape[0] != num_layers:
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must have a leading axis over the "
                f"{num_layers} layers, got shape {leaf.shape}; stack one array per layer."
            )
