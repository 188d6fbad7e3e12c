"""The import contract: train -> attnjax -> pallas_kernels, no circles, a light `import attnjax`."""

import ast
import functools
import pathlib
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("pallas_kernels", "attnjax", "train")
"""From the lowest layer up; each may import itself and what stands before it."""

KERNEL_DEPENDENCIES = {"jax", "jaxtyping", "numpy"}
LIBRARY_DEPENDENCIES = KERNEL_DEPENDENCIES | {"chex", "flax", "optax", "orbax"}
FORBIDDEN_AT_IMPORT = {"matplotlib", "rich", "tokenizers", "torch", "train", "tyro"}
MAX_IMPORT_SECONDS = 0.3


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    """Every module of the three packages: dotted name -> file."""
    found = {}
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, *, at_import_only: bool = False) -> set[str]:
    """Dotted names that a module imports; project modules as precisely as the text allows.

    Args:
      name: the module.
      at_import_only: leaves out imports inside functions and under `if TYPE_CHECKING`.
    """
    file = modules()[name]
    found = set()
    for node in _walk(ast.parse(file.read_text()), at_import_only):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
                kept = package[: len(package) - node.level + 1]
                base = ".".join([*kept, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules() else base)
    return found - {name}


def _walk(node: ast.AST, at_import_only: bool):
    for child in ast.iter_child_nodes(node):
        if at_import_only:
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
        yield child
        yield from _walk(child, at_import_only)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package):
    above = set(PACKAGES[PACKAGES.index(package) + 1 :]) | {"tests", "benchmarks"}
    wrong = [
        f"{name} imports {other}"
        for name in modules()
        if name.split(".")[0] == package
        for other in imports(name)
        if other.split(".")[0] in above
    ]
    assert not wrong


def test_no_circles():
    graph = {
        name: imports(name, at_import_only=True) & modules().keys() - {name} for name in modules()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    ("package", "allowed"),
    [("pallas_kernels", KERNEL_DEPENDENCIES), ("attnjax", LIBRARY_DEPENDENCIES)],
)
def test_only_core_dependencies_at_import(package, allowed):
    fine = allowed | set(PACKAGES) | sys.stdlib_module_names
    wrong = [
        f"{name} imports {other}"
        for name in modules()
        if name.split(".")[0] == package
        for other in imports(name, at_import_only=True)
        if other.split(".")[0] not in fine
    ]
    assert not wrong


PROBE = """
import sys, time
import jax, jax.experimental, jax.numpy, flax, flax.nnx
before = set(sys.modules)
start = time.process_time()
import attnjax
seconds = time.process_time() - start
new = {name.split(".")[0] for name in set(sys.modules) - before}
from jax._src import xla_bridge
print(seconds, xla_bridge.backends_are_initialized(), ",".join(sorted(new)))
"""


@functools.cache
def probe(repeats: int = 3) -> list[tuple[float, bool, frozenset[str]]]:
    """CPU seconds of `import attnjax` beyond jax and flax, backend started?, new top modules."""
    rows = []
    for _ in range(repeats):
        line = subprocess.run(
            [sys.executable, "-c", PROBE], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.splitlines()[-1]
        seconds, started, new = line.split(" ")
        rows.append((float(seconds), started == "True", frozenset(new.split(","))))
    return rows


def test_import_is_light():
    assert not probe()[0][2] & FORBIDDEN_AT_IMPORT


def test_import_computes_nothing():
    assert not probe()[0][1], "importing attnjax started a jax backend"


def test_import_is_quick():
    # CPU time, not wall time: other processes on a busy machine must not decide.
    seconds = statistics.median(row[0] for row in probe())
    assert seconds < MAX_IMPORT_SECONDS, f"import attnjax took {seconds:.2f} s beyond jax and flax"
