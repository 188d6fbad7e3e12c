"""The pattern language: which mixer each layer of a model has.

pattern = item, item, ...          repeated until all layers have one
item    = mixer [* n]              n layers of the same kind
mixer   = softmax
        | window(w) [+ sink(n)]    the last w tokens, and the first n
        | strided(block=c, stride=s, local=l [, offset=o])
        | lightning [(lrpe=true)]
        | id [(option=value, ...)] any causal mechanism of `attnjax.mechanisms()`, with options of
                                   its module: integers, numbers, true, false, none or words

"lightning*3, window(1024)+sink(4), softmax"
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from attnjax.models import registry

_ARGUMENTS = {
    "softmax": {},
    "window": {"window": int},
    "strided": {"block": int, "stride": int, "local": int, "offset": int},
    "lightning": {"lrpe": bool},
}
_REQUIRED = {
    "softmax": (),
    "window": ("window",),
    "strided": ("block", "stride", "local"),
    "lightning": (),
}


@dataclasses.dataclass(frozen=True)
class Mixer:
    """What one layer uses to mix tokens.

    Attributes:
      kind: "softmax", "window", "strided", "lightning", or the id of a mechanism.
      window: tokens, counting the query itself; kind "window".
      sinks: first tokens that stay visible; kind "window".
      block, stride, local, offset: kind "strided"; see `attnjax.masks.Strided`.
      lrpe: learned relative positions; kind "lightning".
      options: (name, value) pairs for the module of a mechanism named by its id.
    """

    kind: str
    window: int | None = None
    sinks: int = 0
    block: int = 0
    stride: int = 0
    local: int = 0
    offset: int = 0
    lrpe: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        """The item of a pattern that makes this mixer."""
        if self.kind == "window":
            return f"window({self.window})" + (f"+sink({self.sinks})" if self.sinks else "")
        if self.kind == "strided":
            offset = f",offset={self.offset}" if self.offset else ""
            return f"strided(block={self.block},stride={self.stride},local={self.local}{offset})"
        if self.options:
            shown = (f"{name}={str(value).lower()}" for name, value in self.options)
            return f"{self.kind}({','.join(shown)})"
        return self.kind + ("(lrpe=true)" if self.lrpe else "")


def parse_pattern(text: str) -> list[Mixer]:
    """Reads a pattern into one `Mixer` per layer of one period.

    Args:
      text: as in the description of this module.

    Returns:
      The mixers of one period, `*n` written out.

    Raises:
      ValueError: naming the item that cannot be read, and what is known.

    Example: >>> [str(m) for m in parse_pattern("lightning*2, softmax")]
    ['lightning', 'lightning', 'softmax']
    """
    mixers = []
    for item in re.split(r",(?![^(]*\))", text):
        repeat = re.fullmatch(r"(.*?)\s*(?:\*\s*(\d+))?\s*", item.strip(), re.DOTALL)
        if repeat is None or not repeat[1]:
            raise ValueError(f"mixers: empty item in {text!r}; write items such as 'softmax*2'.")
        count = 1 if repeat[2] is None else int(repeat[2])
        if count < 1:
            raise ValueError(f"mixers: {item.strip()!r} repeats {count} times; use 1 or more.")
        mixers += [_mixer(repeat[1], text)] * count
    return mixers


def layer_mixers(text: str, num_layers: int) -> list[Mixer]:
    """The mixer of each layer: the pattern repeated, the last period cut where need be.

    Raises:
      ValueError: when the pattern cannot be read, or is longer than the model.
    """
    period = parse_pattern(text)
    if len(period) > num_layers:
        raise ValueError(
            f"mixers: the pattern {text!r} has {len(period)} layers, more than "
            f"num_layers={num_layers}."
        )
    return [period[i % len(period)] for i in range(num_layers)]


def layer_groups(mixers: list[Mixer]) -> list[tuple[tuple[Mixer, ...], int]]:
    """Groups of layers that run as one scan: (the unit's mixers, how often the unit repeats).

    A sequence that is a whole number of periods (at least two) is one group with the period as its
    unit; any other sequence is cut into runs of equal layers.

    Example: >>> [(len(unit), n) for unit, n in layer_groups(parse_pattern("lightning*3, softmax"))]
    [(1, 3), (1, 1)]
    """
    count = len(mixers)
    for size in range(1, count // 2 + 1):
        if count % size == 0 and mixers == mixers[:size] * (count // size):
            return [(tuple(mixers[:size]), count // size)]
    groups: list[tuple[tuple[Mixer, ...], int]] = []
    for mixer in mixers:
        if groups and groups[-1][0] == (mixer,):
            groups[-1] = ((mixer,), groups[-1][1] + 1)
        else:
            groups.append(((mixer,), 1))
    return groups


def _mixer(item: str, text: str) -> Mixer:
    """One mixer from its text."""
    head, *tails = [part.strip() for part in item.split("+")]
    name, values = _call(head, text)
    if name == "sink":
        raise ValueError(f"mixers: {item!r}: sink(n) stands after window(w), as in window(8)+sink.")
    if name not in _ARGUMENTS:
        return _mechanism(name, values, tails, item)
    known = _ARGUMENTS[name]
    options: dict[str, Any] = {}
    for place, (key, value) in enumerate(values):
        key = key or (list(known)[place] if place < len(known) else "")
        if key not in known or key in options:
            takes = ", ".join(known) or "nothing"
            raise ValueError(f"mixers: {item!r}: {name} takes {takes}, got {key or value!r}.")
        options[key] = _value(value, known[key], item)
    missing = [key for key in _REQUIRED[name] if key not in options]
    if missing:
        raise ValueError(
            f"mixers: {item!r}: {name} needs {', '.join(missing)}, as in {_EXAMPLES[name]!r}."
        )
    for tail in tails:
        tail_name, tail_values = _call(tail, text)
        if name != "window" or tail_name != "sink" or len(tail_values) != 1 or "sinks" in options:
            raise ValueError(f"mixers: {item!r}: only one sink(n) can follow, and only window(w).")
        options["sinks"] = _value(tail_values[0][1], int, item)
    for key, least in (("window", 1), ("sinks", 0), ("block", 1), ("stride", 1), ("local", 1)):
        if options.get(key, least) < least:
            raise ValueError(
                f"mixers: {item!r}: {key} must be at least {least}, got {options[key]}."
            )
    if not 0 <= options.get("offset", 0) < options.get("stride", 1):
        raise ValueError(f"mixers: {item!r}: offset must be at least 0 and less than stride.")
    return Mixer(name, **options)


def _mechanism(name: str, values: list[tuple[str, str]], tails: list[str], item: str) -> Mixer:
    """A mixer that is named by the id of a mechanism."""
    spec = registry.find(name, _ARGUMENTS)
    known = registry.option_names(spec)
    if tails:
        raise ValueError(f"mixers: {item!r}: only one sink(n) can follow, and only window(w).")
    options: dict[str, Any] = {}
    for key, value in values:
        if not key or key not in known or key in options:
            takes = ", ".join(known) or "no options"
            raise ValueError(
                f"mixers: {item!r}: {name} takes {takes}, each as option=value; got "
                f"{key or value!r}."
            )
        options[key] = _any_value(value)
    return Mixer(name, options=tuple(sorted(options.items())))


def _any_value(text: str) -> Any:
    """A truth value, none, integer, number or word."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


_EXAMPLES = {"window": "window(1024)", "strided": "strided(block=64,stride=16,local=16)"}


def _call(text: str, whole: str) -> tuple[str, list[tuple[str, str]]]:
    """`name(a, key=b)` as the name and its (key, value) pairs."""
    match = re.fullmatch(r"(\w+)\s*(?:\((.*)\))?", text)
    if match is None:
        raise ValueError(f"mixers: cannot read {text!r} in {whole!r}; write name or name(value).")
    parts = [p.strip() for p in (match[2] or "").split(",") if p.strip()]
    pairs = [tuple(x.strip() for x in p.split("=", 1)) if "=" in p else ("", p) for p in parts]
    return match[1], [(pair[0], pair[1]) for pair in pairs]


def _value(text: str, kind: type, item: str) -> Any:
    """An integer or a truth value."""
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if kind is int and re.fullmatch(r"-?\d+", text):
        return int(text)
    wanted = "true or false" if kind is bool else "an integer"
    raise ValueError(f"mixers: {item!r}: expected {wanted}, got {text!r}.")
