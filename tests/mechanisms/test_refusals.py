"""What a mechanism does not support raises, naming the mechanism, the option and what is there."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import attnjax
from attnjax.mixer import SequenceMixer

MIXERS: dict[str, Any] = {
    name: spec
    for name, spec in attnjax.mechanisms().items()
    if spec.module is not None
    and issubclass(spec.module, SequenceMixer)
    and spec.example
    # those of grids have calls of their own
    and "mask" in inspect.signature(spec.module.__call__).parameters
}
NEEDED = {"transformer_wavefunction": {"grid": (4,)}}
"""Arguments without which a module cannot be made."""


def without(feature):
    """Mechanisms that lack a feature of `SequenceMixer`."""
    return [name for name, spec in MIXERS.items() if not getattr(spec.module, feature)]


def refused(name, option, make):
    with pytest.raises(NotImplementedError, match=f"{MIXERS[name].module.__name__}: .*{option}"):
        jax.eval_shape(make)


def new(name, **options):
    """Traces the making of a module."""

    def run():
        cls = MIXERS[name].module
        return cls(4, 16, **NEEDED.get(name, {}), **options, rngs=nnx.Rngs(0)).in_features

    return run


def call(name, **options):
    """Traces a call of the example with options made from its input."""

    def run():
        module, x = MIXERS[name].example()
        return module(x, **{k: make(x) for k, make in options.items()})

    return run


@pytest.mark.parametrize("name", [n for n, s in MIXERS.items() if len(s.module.directions) == 1])
def test_other_direction(name):
    causal = MIXERS[name].module.directions == ("bidirectional",)
    refused(name, f"causal={causal}", new(name, causal=causal))


@pytest.mark.parametrize("name", without("grouped"))
def test_shared_key_heads(name):
    refused(name, "num_kv_heads=2", new(name, num_kv_heads=2))


@pytest.mark.parametrize("name", without("rotary"))
def test_rotary_positions(name):
    refused(name, "rope_base", new(name, rope_base=1e4))


@pytest.mark.parametrize("name", without("drops"))
def test_dropout(name):
    refused(name, "dropout_rate=0.5", new(name, dropout_rate=0.5))


@pytest.mark.parametrize("name", without("masked"))
def test_masks(name):
    refused(name, "mask", call(name, mask=lambda x: jnp.ones((1, 1, 1, x.shape[1]), bool)))


@pytest.mark.parametrize("name", without("packed"))
def test_packed_documents(name):
    refused(name, "segment_ids", call(name, segment_ids=lambda x: jnp.zeros(x.shape[:2], "int32")))


@pytest.mark.parametrize("name", without("decodes"))
def test_caches(name):
    refused(name, "cache", lambda: MIXERS[name].example()[0].init_cache(1, 8))


@pytest.mark.parametrize("name", MIXERS)
def test_unknown_arguments(name):
    with pytest.raises(TypeError, match="nonsense"):
        jax.eval_shape(call(name, nonsense=lambda x: x))
