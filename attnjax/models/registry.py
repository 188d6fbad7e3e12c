"""Any causal mechanism of the table as the mixer of a model, by its id and its options."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any

from attnjax.mixer import SequenceMixer
from attnjax.spec import Mechanism, mechanisms

_SIZES = (
    "self", "num_heads", "in_features", "qkv_features", "out_features", "num_kv_heads",
    "in_kv_features", "causal", "decode", "dtype", "param_dtype", "precision", "kernel_init",
    "bias_init", "out_kernel_init", "out_bias_init", "rngs", "keep_rngs", "deterministic",
    "dropout_rate", "layer", "num_layers", "options",
)  # fmt: skip
"""Constructor arguments that the model sets itself, or that need a key in every call."""


def mixer_ids() -> list[str]:
    """Ids of all mechanisms that a decoder can use: causal, with a module for sequences."""
    return [spec.id for spec in mechanisms().values() if _mixes(spec)]


def _mixes(spec: Mechanism) -> bool:
    module = spec.module
    if not spec.causal or spec.kind != "module" or not issubclass(module or object, SequenceMixer):
        return False
    taken = inspect.signature(module.__call__).parameters
    return all(name in taken for name in ("positions", "segment_ids", "cache", "valid"))


def find(name: str, others: Iterable[str] = ()) -> Mechanism:
    """The mechanism of that id, for use as a mixer.

    Args:
      name: the id.
      others: further names that the caller knows, for the suggestion.

    Raises:
      ValueError: suggesting the nearest names, or saying why the mechanism cannot be a mixer.
    """
    table = mechanisms()
    known = mixer_ids()
    if name in known:
        return table[name]
    if name in table:
        raise ValueError(
            f"mixers: {name!r} cannot mix the tokens of a decoder: it is "
            + ("made for grids or whole models." if table[name].causal else "not causal.")
        )
    every = [*others, *known]
    near = difflib.get_close_matches(name, every, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise ValueError(
        f"mixers: unknown mixer {name!r}; {hint or 'known are ' + ', '.join(every) + '.'}"
    )


def option_names(spec: Mechanism) -> dict[str, Any]:
    """Options that a pattern may give to a mechanism: name -> default of its constructor."""
    assert spec.module is not None
    found: dict[str, Any] = {}
    for owner in spec.module.__mro__:
        init = vars(owner).get("__init__")
        if init is None:
            continue
        parameters = inspect.signature(init).parameters
        for name, parameter in parameters.items():
            if name not in _SIZES and parameter.kind is not parameter.VAR_KEYWORD:
                found.setdefault(name, parameter.default)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
            break
    assert issubclass(spec.module, SequenceMixer)
    own = {*spec.module.block_options, *(() if spec.module.rotary else ("rope_base",))}
    return {name: default for name, default in found.items() if name not in own}


def build(spec: Mechanism, config: Any, given: dict[str, Any], **options: Any) -> Any:
    """The module of a mechanism, sized by a model's config.

    Args:
      spec: the mechanism.
      config: `LanguageModelConfig`.
      given: options from the pattern.
      options: qkv_features, dtype, param_dtype, out_kernel_init and rngs.
    """
    module = spec.module
    assert module is not None and issubclass(module, SequenceMixer)  # `find` lets no other through
    options |= {"use_bias": False, "causal": True} | dict(module.block_options)
    if module.grouped:
        options["num_kv_heads"] = config.num_kv_heads
    if module.rotary:
        options["rope_base"] = config.rope_base
    return module(config.num_heads, config.width, **(options | given))
