"""Tries the built wheel outside the checkout: `python tests/installed_wheel.py DIST_FOLDER`.

Run from the folder into which the wheel was unpacked, with that folder first on PYTHONPATH.
"""

import pathlib
import sys
import zipfile

SHIPPED = {"attnjax", "pallas_kernels"}


def check_contents(wheel: pathlib.Path) -> None:
    """The wheel holds the two packages, their type marker and the license, nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if top != SHIPPED:
        raise SystemExit(f"{wheel.name} ships {sorted(top)}, expected {sorted(SHIPPED)}.")
    for wanted in ("attnjax/py.typed", "dist-info/licenses/LICENSE"):
        if not any(name.endswith(wanted) for name in names):
            raise SystemExit(f"{wheel.name} lacks {wanted}.")


def check_use() -> int:
    """The installed package, and not the checkout, finds its mechanisms and computes."""
    import jax.numpy as jnp

    import attnjax as aj

    here = pathlib.Path.cwd().resolve()
    file = pathlib.Path(str(aj.__file__)).resolve()
    if here not in file.parents:
        raise SystemExit(f"imported {file}, not the wheel unpacked in {here}.")
    ones = jnp.ones((1, 8, 2, 4))
    out = aj.attention(ones, ones, ones, mask=aj.masks.Causal())
    if out.shape != ones.shape or not bool(jnp.allclose(out, 1.0)):
        raise SystemExit("attention over equal values must return them.")
    if not aj.mechanisms():
        raise SystemExit("the installed package finds no mechanism.")
    return len(aj.mechanisms())


if __name__ == "__main__":
    (built,) = pathlib.Path(sys.argv[1]).glob("attnjax-*.whl")
    check_contents(built)
    print(f"{built.name}: {check_use()} mechanisms, imported from the wheel")
