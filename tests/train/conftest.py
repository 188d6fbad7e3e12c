"""Fixtures of the trainer's tests: small runs in folders of their own."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from train.config import Config, Data
from train.presets import tiny


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve small documents."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        lines = [f"def function_{i}_{j}(x):\n    return x + {i * j}\n" for j in range(3 + 2 * i)]
        (folder / f"part_{i:02d}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def config(texts: Path, tmp_path: Path) -> Config:
    """The tiny preset on the small documents, in a folder of its own."""
    base = tiny()
    return dataclasses.replace(
        base,
        out=str(tmp_path / "run"),
        data=Data(source=str(texts), context=64, batch=8),
        log=dataclasses.replace(base.log, console="plain"),
    )


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests of a session, and their child processes, share compiled programs."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="package", autouse=True)
def reuse_compiled_programs(compile_cache: Path) -> Iterator[None]:
    """Many tests run the same step: each is compiled once."""
    settings = {
        "jax_compilation_cache_dir": str(compile_cache),
        "jax_persistent_cache_min_compile_time_secs": 0.5,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
