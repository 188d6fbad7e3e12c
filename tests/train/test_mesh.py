"""Meshes, sharding rules, and where the optimizer's arrays live."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tests.train.runs import change
from train import mesh as meshes
from train.config import Mesh
from train.state import init_state, prepare


def test_mesh_takes_what_is_left_and_has_auto_axes():
    mesh = meshes.make_mesh(Mesh(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert "data=2, fsdp=2, tensor=2" in meshes.describe(mesh)


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": -1, "tensor": 3}, {"data": 16}])
def test_mesh_that_does_not_divide_is_an_error(sizes):
    with pytest.raises(ValueError, match="there are 8"):
        meshes.make_mesh(Mesh(**sizes))


def test_spec_uses_a_mesh_axis_once_and_checks_lengths():
    mesh = meshes.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    assert meshes.spec_for(("embed", "heads", "head_dim"), mesh) == PartitionSpec("fsdp", "tensor")
    assert meshes.spec_for(("layers", "mlp", "embed"), mesh) == PartitionSpec(
        None, "tensor", "fsdp"
    )
    assert meshes.spec_for(("batch", "length", "embed"), mesh) == PartitionSpec(("data", "fsdp"))
    assert meshes.spec_for(("heads", "mlp"), mesh) == PartitionSpec("tensor")
    with pytest.raises(ValueError, match=r"weights with shape \(6, 5\): axis 1 \(mlp, length 5\)"):
        meshes.spec_for(("embed", "mlp"), mesh, (6, 5), "weights")
    with pytest.raises(ValueError, match="no sharding rule for axis 'rooms'"):
        meshes.spec_for(("rooms",), mesh)


def test_batch_that_does_not_divide_is_an_error():
    mesh = meshes.make_mesh(Mesh(data=4, fsdp=2))
    with pytest.raises(ValueError, match="12 rows does not divide .* multiple of 8"):
        meshes.batch_sharding(mesh, 12)
    with pytest.raises(ValueError, match="accumulate=2 slices; pass .* multiple of 16"):
        meshes.batch_sharding(mesh, 8, accumulate=2)


def test_constrain_does_nothing_without_a_mesh():
    x = jnp.arange(8.0)
    assert meshes.constrain(x, "batch", mesh=None) is x
    y = meshes.constrain(x, "batch", mesh=meshes.make_mesh(Mesh()))
    assert {s.data.shape for s in y.addressable_shards} == {(1,)}


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_optimizer_arrays_lie_as_their_parameters(config, name):
    config = change(config, optim={"name": name}, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    parts = prepare(config)
    state = init_state(parts)
    shapes = parts.skeleton.shapes
    placed = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state["opt"]):
        owner = getattr(path[-1], "key", None)
        if owner in shapes:
            assert leaf.shape == shapes[owner]
            assert leaf.sharding == state["params"][owner].sharding
            placed += 1
        else:
            assert leaf.sharding.is_fully_replicated
    assert placed >= len(shapes)
    split = [p for p in state["params"].values() if not p.sharding.is_fully_replicated]
    assert len(split) > len(shapes) / 2


def test_init_is_the_same_on_every_mesh(config):
    one = init_state(prepare(change(config, mesh={"data": 1}), jax.devices()[:1]))
    many = init_state(prepare(change(config, mesh={"data": 2, "fsdp": 2, "tensor": 2})))
    for name, x in one["params"].items():
        np.testing.assert_allclose(np.asarray(x), np.asarray(many["params"][name]), rtol=1e-6)
