"""Tile sizes that were measured: looked up by device, kernel and class of shape.

A choice comes from the first of these that makes it:

    config=        what the caller asks for; nothing measured is mixed with it
    load(path)     files given by the program, the last one first
    ATTNJAX_TUNING files named in the environment, separated by os.pathsep
    tuned/*.json   what comes with the package
    the body       its own `default_config`, made for the memory of the device

Files are read when they are first needed. A choice is made when a call is lowered: programs that
were compiled before `load` keep their tile sizes. `pallas_kernels.tuner` measures and writes files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:  # the kernels' own modules import this one
    from pallas_kernels.decode.spec import DecodeConfig
    from pallas_kernels.dispatch import Target
    from pallas_kernels.flash.spec import FlashConfig

VARIABLE = "ATTNJAX_TUNING"
PACKAGED = pathlib.Path(__file__).with_name("tuned")

Config = TypeVar("Config", "FlashConfig", "DecodeConfig")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measured choice.

    Attributes:
      kernel: "flash", "decode" or "linear".
      body: "tpu", "triton", "mosaic_gpu" or "xla".
      dtype: of queries, keys and values.
      width: class of the wider of the two head widths, see `width_class`.
      length: keys of the measured call, in tokens.
      config: field -> value; `options` is a mapping.
      milliseconds: what was timed -> its median.
    """

    kernel: str
    body: str
    dtype: str
    width: int
    length: int
    config: Mapping[str, Any]
    milliseconds: Mapping[str, float] = dataclasses.field(default_factory=dict)


def width_class(*widths: int) -> int:
    """The widest head, rounded up to a power of two of at least 32."""
    return max(32, 1 << (max(widths) - 1).bit_length())


def flash_config(
    body: str, target: Target, query: Any, key: Any, value: Any, asked: FlashConfig | None = None
) -> FlashConfig:
    """Tile sizes of a flash call: what was asked for, else what was measured.

    Args:
      body: "tpu", "triton", "mosaic_gpu" or "xla".
      target: device that the call is lowered for.
      query, key, value: the arrays, or anything with their shapes and dtypes.
      asked: the caller's choice.

    Returns:
      A config; fields that are None are left to the body.
    """
    from pallas_kernels.flash.spec import FlashConfig

    widths = (query.shape[3], value.shape[3])
    entry = lookup("flash", body, target.kind, str(query.dtype), widths, key.shape[1])
    return merged(asked or FlashConfig(), entry)


def decode_config(
    body: str, target: Target, query: Any, key: Any, value: Any, asked: DecodeConfig | None = None
) -> DecodeConfig:
    """Sizes of a decode call, as `flash_config`; `key.shape[1]` is the length of the cache."""
    from pallas_kernels.decode.spec import DecodeConfig

    widths = (query.shape[3], value.shape[3])
    entry = lookup("decode", body, target.kind, str(key.dtype), widths, key.shape[1])
    return merged(asked or DecodeConfig(), entry)


def linear_chunk(
    body: str, target: Target, key: Any, value: Any, asked: int | None = None
) -> int | None:
    """Tokens per chunk of a linear recurrence: asked for, measured, or None for the body's."""
    if asked is not None:
        return asked
    widths = (key.shape[3], value.shape[3])
    entry = lookup("linear", body, target.kind, str(key.dtype), widths, key.shape[1])
    return None if entry is None else entry.config.get("chunk_size")


def merged(asked: Config, entry: Entry | None) -> Config:
    """The asked-for config, or that of an entry where no tile size or knob was asked for."""
    own = {f.name: getattr(asked, f.name) for f in dataclasses.fields(asked)}
    if entry is None or any(x for name, x in own.items() if name != "max_blocks"):
        return asked
    measured = {name: x for name, x in entry.config.items() if name in own}
    if "options" in measured:
        measured["options"] = tuple(sorted(measured["options"].items()))
    return dataclasses.replace(asked, **measured)


def lookup(
    kernel: str, body: str, kind: str | None, dtype: str, widths: tuple[int, ...], length: int
) -> Entry | None:
    """The entry of the same device, kernel, dtype and width whose length is nearest.

    Args:
      kernel, body, dtype: as in `Entry`.
      kind: device kind as JAX reports it.
      widths: of heads.
      length: keys in tokens; nearness counts in factors of two, and within one file.
    """
    if kind is None:
        return None
    wanted = (kernel, body, dtype, width_class(*widths))
    for tables in (_given, *_environment(os.environ.get(VARIABLE, "")), _packaged()):
        found = [e for e in tables.get(kind, ()) if (e.kernel, e.body, e.dtype, e.width) == wanted]
        if found:
            return min(found, key=lambda e: abs(math.log2(e.length / max(length, 1))))
    return None


_given: dict[str, list[Entry]] = {}


def load(path: str | os.PathLike[str]) -> None:
    """Takes the measured choices of a file; they precede those that were there.

    Raises:
      ValueError: for a file that is not one of `pallas_kernels.tuner`.
    """
    for kind, entries in read(pathlib.Path(path)).items():
        replaced = {_key(e) for e in entries}
        kept = [e for e in _given.get(kind, []) if _key(e) not in replaced]
        _given[kind] = [*entries, *kept]


def unload() -> None:
    """Forgets all files given to `load`."""
    _given.clear()


def read(path: pathlib.Path) -> dict[str, list[Entry]]:
    """Device kind -> entries of one file."""
    try:
        content = json.loads(path.read_text())
        return {content["device"]: [Entry(**entry) for entry in content["entries"]]}
    except (json.JSONDecodeError, KeyError, TypeError) as problem:
        raise ValueError(
            f"tune: {path} is no tuning file ({type(problem).__name__}: {problem}); write one with "
            "`python -m benchmarks tune`."
        ) from problem


def _key(entry: Entry) -> tuple[Any, ...]:
    return entry.kernel, entry.body, entry.dtype, entry.width, entry.length


@functools.lru_cache(maxsize=8)
def _environment(paths: str) -> tuple[dict[str, list[Entry]], ...]:
    return tuple(read(pathlib.Path(path)) for path in paths.split(os.pathsep) if path)


@functools.cache
def _packaged() -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for path in sorted(PACKAGED.glob("*.json")):
        for kind, entries in read(path).items():
            found.setdefault(kind, []).extend(entries)
    return found


def write(path: pathlib.Path, kind: str, entries: list[Entry], about: Mapping[str, Any]) -> None:
    """Writes entries of one device, in place of those of the same class in the file.

    Args:
      path: file; its folder is made.
      kind: device kind.
      entries: new ones.
      about: what else to record: versions, date, command.
    """
    old = read(path).get(kind, []) if path.exists() else []
    replaced = {_key(e) for e in entries}
    kept = [e for e in old if _key(e) not in replaced]
    everything = sorted([*kept, *entries], key=_key)
    content = {"device": kind, "about": dict(about)}
    content["entries"] = [dataclasses.asdict(e) for e in everything]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def file_name(kind: str) -> str:
    """Name of a device's file: "NVIDIA H200" -> "nvidia_h200.json"."""
    return "_".join(kind.lower().split()).replace("/", "_") + ".json"
