"""Models built from mechanisms."""

from attnjax.models.generate import generate, sample
from attnjax.models.language_model import LanguageModel, LanguageModelConfig
from attnjax.models.pattern import Mixer, parse_pattern

__all__ = [
    "LanguageModel",
    "LanguageModelConfig",
    "Mixer",
    "generate",
    "parse_pattern",
    "sample",
]
