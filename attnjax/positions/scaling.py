"""Frequencies of rotary embeddings, and how they are stretched for longer contexts.

    w_c = base^(-2c/d)
    linear    w_c / s                                    Chen et al. 2023, arXiv:2306.15595
    ntk       base -> base s^(d/(d-2))                   bloc97 2023
    dynamic   base -> base (s L/L0 - (s-1))^(d/(d-2))    for L > L0
    yarn      a ramp over planes between w_c and w_c/s   Peng et al. 2023, arXiv:2309.00071
    llama3    a ramp over wavelengths, the same idea     Grattafiori et al. 2024, arXiv:2407.21783
    longrope  w_c / f_c, searched factors                Ding et al. 2024, arXiv:2402.13753

with s the factor, L the sequence length and L0 the length of pretraining. yarn and longrope also
multiply queries and keys by an attention factor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from attnjax.positions.angles import AnyArray, inverse_powers, module_of

Kind = Literal["default", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3"]
KINDS = ("default", "linear", "ntk", "dynamic", "yarn", "longrope", "llama3")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How to stretch rotary frequencies; hashable, so that it can be part of a configuration.

    Attributes:
      kind: the scheme, one of `KINDS`.
      factor: s, how much longer the context shall be; at least 1.
      original_max_length: L0, tokens of pretraining; needed by dynamic, yarn, llama3 and longrope.
      max_length: tokens of the extended context; longrope's s is max_length / L0 when factor is
        None.
      beta_fast, beta_slow: yarn, rotations within L0 above which a plane keeps its frequency and
        below which it is divided by s. Paper: 32 and 1.
      truncate: yarn, whether the ends of the ramp are rounded to whole planes.
      mscale, mscale_all_dim: yarn, weights of the attention factor; 0 leaves them out.
      low_freq_factor, high_freq_factor: llama3, wavelengths L0 / these bound the ramp. Paper: 1 and
        4.
      short_factor, long_factor: longrope, [c] divisors up to L0 tokens and beyond.
      attention_factor: replaces the scheme's own.
    """

    kind: Kind = "default"
    factor: Any = None
    original_max_length: Any = None
    max_length: Any = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: Any = None
    long_factor: Any = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"RopeScaling: kind must be one of {KINDS}, got {self.kind!r}.")
        need = {
            "linear": ("factor",),
            "ntk": ("factor",),
            "dynamic": ("factor", "original_max_length"),
            "yarn": ("factor", "original_max_length"),
            "llama3": ("factor", "original_max_length"),
            "longrope": ("original_max_length", "short_factor", "long_factor"),
        }
        for name in need.get(self.kind, ()):
            if getattr(self, name) is None:
                raise ValueError(f"RopeScaling: kind={self.kind!r} needs {name}, got {name}=None.")
        if self.factor is not None and self.factor < 1:
            raise ValueError(f"RopeScaling: factor must be at least 1, got factor={self.factor}.")
        for name in ("short_factor", "long_factor"):
            if getattr(self, name) is not None:
                values = tuple(float(f) for f in getattr(self, name))
                object.__setattr__(self, name, values)

    @classmethod
    def from_dict(
        cls, options: Mapping[str, Any], max_position_embeddings: int | None = None
    ) -> RopeScaling:
        """Reads the `rope_scaling` entry of a checkpoint's configuration as it is commonly written.

        Args:
          options: "rope_type" or "type", "factor", "original_max_position_embeddings", and the
            options of the scheme; unknown entries are errors.
          max_position_embeddings: the configuration's own length: L0 where the entry has none, else
            the extended length.
        """
        options = {k: v for k, v in options.items() if v is not None}
        kind = options.pop("rope_type", options.pop("type", "default"))
        options.pop("type", None)
        original = options.pop("original_max_position_embeddings", max_position_embeddings)
        known = {f.name for f in dataclasses.fields(cls)} - {"kind"}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(
                f"RopeScaling.from_dict: unknown option {unknown[0]!r}; known are "
                f"{', '.join(sorted(known))}."
            )
        options = {"original_max_length": original, "max_length": max_position_embeddings} | options
        return cls(kind=kind, **options)


def rope_frequencies(
    head_dim: int,
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
    seq_len: Any = None,
) -> tuple[Float[AnyArray, "c"], Any]:
    """Frequencies and attention factor of a rotary embedding.

    Args:
      head_dim: d, number of rotated channels; even.
      base: the largest wavelength is about 2 pi base. Paper: 10000.
      scaling: how to stretch them, None for not at all.
      seq_len: L in tokens, an integer or a traced scalar; used by dynamic and longrope only. None:
        L0.

    Returns:
      (inv_freq [d/2], attention_factor): NumPy float64 where `seq_len` is not traced, for
      `apply_rope`.

    Raises:
      ValueError: on an odd or empty head_dim, or factors of another length than d / 2.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rope_frequencies: head_dim must be even and at least 2, got {head_dim}.")
    if not base > 0:
        raise ValueError(f"rope_frequencies: base must be positive, got {base}.")
    scaling = scaling or RopeScaling()
    inv_freq, attention_factor = _SCHEMES[scaling.kind](head_dim, base, scaling, seq_len)
    if scaling.attention_factor is not None:
        attention_factor = scaling.attention_factor
    return inv_freq, attention_factor


def _default(d: int, base: float, _: RopeScaling, seq_len: Any):
    return inverse_powers(base, d), 1.0


def _linear(d: int, base: float, scaling: RopeScaling, seq_len: Any):
    return inverse_powers(base, d) / scaling.factor, 1.0


def _ntk(d: int, base: float, scaling: RopeScaling, seq_len: Any):
    return inverse_powers(base * scaling.factor ** _ntk_exponent(d), d), 1.0


def _dynamic(d: int, base: float, scaling: RopeScaling, seq_len: Any):
    trained, s = scaling.original_max_length, scaling.factor
    xp = module_of(seq_len)
    length = trained if seq_len is None else seq_len
    ratio = xp.maximum(xp.asarray(length, xp.float32 if xp is not np else None), trained) / trained
    stretched = base * (s * ratio - (s - 1)) ** _ntk_exponent(d)
    exponents = xp.asarray(np.arange(0, d, 2) / d, stretched.dtype)
    return stretched**-exponents, 1.0


def _ntk_exponent(d: int) -> float:
    # with a single plane there is nothing between the fastest and the slowest to stretch
    return d / (d - 2) if d > 2 else 0.0


def _yarn(d: int, base: float, scaling: RopeScaling, seq_len: Any):
    inv_freq, s, trained = inverse_powers(base, d), scaling.factor, scaling.original_max_length

    def plane(rotations: float) -> float:
        """Index of the plane that turns this often within the trained length."""
        return d * math.log(trained / (2 * math.pi * rotations)) / (2 * math.log(base))

    low, high = plane(scaling.beta_fast), plane(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    high += 0.001 * (high == low)
    ramp = np.clip((np.arange(d // 2) - low) / (high - low), 0, 1)
    if scaling.mscale and scaling.mscale_all_dim:
        factor = _yarn_factor(s, scaling.mscale) / _yarn_factor(s, scaling.mscale_all_dim)
    else:
        factor = _yarn_factor(s, 1.0)
    return inv_freq * (1 - ramp) + inv_freq / s * ramp, factor


def _yarn_factor(s: float, weight: float) -> float:
    return 0.1 * weight * math.log(s) + 1.0 if s > 1 else 1.0


def _llama3(d: int, base: float, scaling: RopeScaling, seq_len: Any):
    inv_freq, low, high = inverse_powers(base, d), scaling.low_freq_factor, scaling.high_freq_factor
    # rotations within the trained length: few of them mean a long wave, which is stretched
    rotations = scaling.original_max_length * inv_freq / (2 * math.pi)
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return inv_freq * keep + inv_freq / scaling.factor * (1 - keep), 1.0


def _longrope(d: int, base: float, scaling: RopeScaling, seq_len: Any):
    trained = scaling.original_max_length
    for name in ("short_factor", "long_factor"):
        if len(getattr(scaling, name)) != d // 2:
            raise ValueError(
                f"rope_frequencies: {name} must have head_dim / 2 = {d // 2} entries, got "
                f"{len(getattr(scaling, name))}."
            )
    xp = module_of(seq_len)
    length = trained if seq_len is None else seq_len
    short, long = (
        xp.asarray(inverse_powers(base, d) / np.asarray(f))
        for f in (scaling.short_factor, scaling.long_factor)
    )
    s = scaling.factor or (scaling.max_length or trained) / trained
    factor = math.sqrt(1 + math.log(s) / math.log(trained)) if s > 1 else 1.0
    return xp.where(xp.asarray(length) > trained, long, short), factor


_SCHEMES = {
    "default": _default,
    "linear": _linear,
    "ntk": _ntk,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
