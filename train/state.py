"""The state of a run: a plain dictionary of arrays, and where each of them lives on the mesh.

    {"params": {name: array}, "opt": optimizer state, "step": int32, "rng": PRNG key}

Parameters are flat, named by their path in the model ("layers.0.mlp.up"). The model object itself
is split once into structure and parameters; inside a step they are joined again for a moment
(`Skeleton.model`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from attnjax.models import LanguageModel, LanguageModelConfig
from train import mesh as meshes
from train import optim
from train.config import Config

VOCABULARY = 256  # bytes; byte 0 marks the beginning of a document
TrainState = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model without its numbers.

    Attributes:
      graph: structure of the model.
      variables: name -> path and abstract Variable of each parameter.
      config: the model's own configuration.
    """

    graph: Any
    variables: dict[str, tuple[tuple[Any, ...], Any]]
    config: LanguageModelConfig

    @property
    def axes(self) -> dict[str, tuple[str | None, ...]]:
        """Logical axis names of each parameter; unnamed ones are whole on every device."""
        named = {}
        for name, (_, variable) in self.variables.items():
            rank = len(variable.get_value().shape)
            named[name] = tuple(variable.get_metadata().get("axes") or (None,) * rank)
            if len(named[name]) != rank:
                raise ValueError(f"parameter {name} has {rank} axes but names {named[name]}.")
        return named

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter."""
        return {name: variable.get_value().shape for name, (_, variable) in self.variables.items()}

    def model(self, params: dict[str, jax.Array]) -> LanguageModel:
        """The model with these parameters."""
        filled = {
            path: variable.replace(params[name])
            for name, (path, variable) in self.variables.items()
        }
        return nnx.merge(self.graph, nnx.from_flat_state(filled))

    def count(self) -> int:
        """Number of parameters."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values())


def make_skeleton(config: Config) -> Skeleton:
    """Builds the model abstractly: no array is made."""
    settings = LanguageModelConfig(
        vocab_size=VOCABULARY, max_length=config.data.context, **dataclasses.asdict(config.model)
    )
    abstract = nnx.eval_shape(lambda: LanguageModel(settings, rngs=nnx.Rngs(0)))
    graph, params, rest = nnx.split(abstract, nnx.Param, ...)
    if jax.tree.leaves(rest):
        kinds = sorted({type(variable).__name__ for _, variable in nnx.to_flat_state(rest)})
        raise ValueError(
            f"the model holds state besides parameters ({', '.join(kinds)}), which a run would "
            "lose."
        )
    variables = {_name(path): (path, variable) for path, variable in nnx.to_flat_state(params)}
    return Skeleton(graph, variables, settings)


@dataclasses.dataclass(frozen=True)
class Parts:
    """What every command needs, made from a `Config` by `prepare`."""

    config: Config
    mesh: Mesh
    skeleton: Skeleton
    optimizer: optax.GradientTransformation
    fraction: optim.Fraction
    shardings: TrainState


def prepare(config: Config, devices: list[meshes.Device] | None = None) -> Parts:
    """Mesh, model structure, optimizer and shardings; computes nothing on a device."""
    mesh = meshes.make_mesh(config.mesh, devices)
    meshes.batch_sharding(mesh, config.data.batch, config.optim.accumulate)  # raises early
    skeleton = make_skeleton(config)
    optimizer = optim.make_optimizer(config.optim, skeleton.axes)
    fraction = optim.make_fraction(config.schedule, config.steps)
    return Parts(
        config, mesh, skeleton, optimizer, fraction, state_shardings(skeleton, optimizer, mesh)
    )


def state_shardings(
    skeleton: Skeleton, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The sharding of every array of the state.

    An optimizer array whose path ends in a parameter's name and that has the parameter's shape lies
    as the parameter does; everything else is on every device.
    """
    shapes, axes = skeleton.shapes, skeleton.axes
    params = {n: meshes.sharding_for(axes[n], mesh, shapes[n], f"parameter {n}") for n in shapes}
    whole = meshes.replicated(mesh)
    abstract = {n: variable.get_value() for n, (_, variable) in skeleton.variables.items()}

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        name = getattr(path[-1], "key", None) if path else None
        return params[name] if name in params and leaf.shape == shapes[name] else whole

    opt = jax.tree_util.tree_map_with_path(place, jax.eval_shape(optimizer.init, abstract))
    return {"params": params, "opt": opt, "step": whole, "rng": whole}


def init_state(parts: Parts) -> TrainState:
    """The state at step 0; every device computes its own part and none ever holds all."""
    config, settings = parts.config, parts.skeleton.config

    def build() -> TrainState:
        model = LanguageModel(settings, rngs=nnx.Rngs(config.seed))
        found = {
            _name(path): v.get_value() for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))
        }
        return {
            "params": found,
            "opt": parts.optimizer.init(found),
            "step": jnp.zeros((), jnp.int32),
            "rng": jax.random.key(config.seed),
        }

    return jax.jit(build, out_shardings=parts.shardings)()


def abstract_state(parts: Parts) -> TrainState:
    """Shapes, types and shardings of the state: what restoring and compiling ahead need."""
    params = {n: variable.get_value() for n, (_, variable) in parts.skeleton.variables.items()}
    shapes = {
        "params": params,
        "opt": jax.eval_shape(parts.optimizer.init, params),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "rng": jax.eval_shape(lambda: jax.random.key(0)),
    }
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, parts.shardings
    )


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
