"""The device mesh, and the rules that turn names of array axes into places on it.

Parameters carry logical axis names ("embed", "heads", ...) as metadata; `RULES` says over which
mesh axis each of them is split. Axes are always `AxisType.Auto`: the compiler propagates shardings,
and code that knows nothing of meshes runs unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from train.config import AXES
from train.config import Mesh as MeshConfig

RULES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    "layers": (),
}
"""Logical axis name -> mesh axes it is split over. Names that are missing here are an error."""

Device = Any
"""A `jax.Device`; JAX declares that name as a variable, which annotations cannot use."""


def make_mesh(config: MeshConfig, devices: Sequence[Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with the axes data, fsdp, tensor and context.

    Args:
      config: sizes; one may be -1 and takes the devices that are left.
      devices: the devices to use; None: all of this process.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    shown = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    fixed = math.prod(size for size in sizes if size != -1)
    if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
        raise ValueError(
            f"the mesh ({shown}) needs {'a multiple of ' if -1 in sizes else ''}{fixed} devices, "
            "but there are "
            f"{len(devices)}; choose sizes whose product is {len(devices)}, or set one of them to "
            "-1."
        )
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def spec_for(
    axes: Sequence[str | None],
    mesh: jax.sharding.Mesh,
    shape: Sequence[int] | None = None,
    name: str = "array",
) -> PartitionSpec:
    """The partition of an array whose axes have these logical names.

    A mesh axis is used once per array, by the first name that asks for it.

    Args:
      axes: one logical name, or None (whole), per array axis.
      mesh: the mesh.
      shape: lengths of the array axes; when given, they must be divisible by the mesh axes.
      name: how an error calls the array.

    Raises:
      ValueError: an unknown name, or a length that the mesh does not divide.
    """
    used: set[str] = set()
    entries: list[Any] = []
    for i, logical in enumerate(axes):
        if logical is not None and logical not in RULES:
            raise ValueError(
                f"{name}: no sharding rule for axis {logical!r}; known are {', '.join(RULES)}."
            )
        names = [a for a in RULES.get(logical or "", ()) if a not in used and mesh.shape[a] > 1]
        used.update(names)
        parts = math.prod(mesh.shape[a] for a in names)
        if shape is not None and shape[i] % parts:
            over = " x ".join(f"{a}={mesh.shape[a]}" for a in names)
            raise ValueError(
                f"{name} with shape {tuple(shape)}: axis {i} ({logical}, length {shape[i]}) is "
                "not divisible by "
                f"the mesh ({over}); choose a mesh size that divides {shape[i]}."
            )
        entries.append(tuple(names) if len(names) > 1 else names[0] if names else None)
    while (
        entries and entries[-1] is None
    ):  # P() and P(None) are the same partition but different keys
        entries.pop()
    return PartitionSpec(*entries)


def sharding_for(
    axes: Sequence[str | None],
    mesh: jax.sharding.Mesh,
    shape: Sequence[int] | None = None,
    name: str = "array",
) -> NamedSharding:
    """`spec_for` as a sharding on `mesh`."""
    return NamedSharding(mesh, spec_for(axes, mesh, shape, name))


def batch_sharding(mesh: jax.sharding.Mesh, rows: int, accumulate: int = 1) -> NamedSharding:
    """The sharding of a batch [rows, length] over data and fsdp.

    Raises:
      ValueError: a slice of the batch does not divide over the devices.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (parts * accumulate):
        slices = f" in each of optim.accumulate={accumulate} slices" if accumulate > 1 else ""
        raise ValueError(
            f"a batch of {rows} rows does not divide over the mesh (data={mesh.shape['data']} x "
            f"fsdp={mesh.shape['fsdp']}){slices}; pass a number of rows that is a multiple of "
            f"{parts * accumulate}."
        )
    return sharding_for(("batch", "length"), mesh)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None, mesh: jax.sharding.Mesh | None) -> jax.Array:
    """Asks the compiler to lay `x` out by logical names; does nothing without a mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding_for(axes, mesh, x.shape))


def describe(mesh: jax.sharding.Mesh) -> str:
    """One line: device kind and the size of each axis."""
    device = mesh.devices.flat[0]
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    return f"{mesh.devices.size} x {device.device_kind} ({device.platform}); {axes}"
