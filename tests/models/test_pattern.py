"""The pattern language of mixers."""

from __future__ import annotations

import pytest

from attnjax.models import Mixer, parse_pattern
from attnjax.models.pattern import layer_groups, layer_mixers


def test_reads_the_whole_grammar():
    text = (
        "lightning(lrpe=true), lightning*2, window(8), window( 1024 ) + sink(4) , "
        "strided(block=64, stride=16, local=4)*2, strided(64,16,4,offset=3), softmax"
    )
    assert parse_pattern(text) == [
        Mixer("lightning", lrpe=True),
        Mixer("lightning"),
        Mixer("lightning"),
        Mixer("window", window=8),
        Mixer("window", window=1024, sinks=4),
        Mixer("strided", block=64, stride=16, local=4),
        Mixer("strided", block=64, stride=16, local=4),
        Mixer("strided", block=64, stride=16, local=4, offset=3),
        Mixer("softmax"),
    ]
    assert parse_pattern(", ".join(map(str, parse_pattern(text)))) == parse_pattern(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty item"),
        ("softmax,,softmax", "empty item"),
        ("attention", "unknown mixer 'attention'"),
        ("softmx", "did you mean 'softmax'"),
        ("cog_atention", "did you mean 'cog_attention'"),
        ("cog_attention(heads=3)", "cog_attention takes .*rope_base.*got 'heads'"),
        ("fna", "cannot mix the tokens of a decoder"),
        ("sink(4)", "after window"),
        ("softmax+sink(4)", "only window"),
        ("window", "needs window"),
        ("window(0)", "at least 1"),
        ("window(a)", "an integer"),
        ("window(3", "cannot read"),
        ("window(3)+sink(1)+sink(2)", "only one sink"),
        ("softmax*0", "1 or more"),
        ("softmax(3)", "takes nothing"),
        ("strided(block=4)", "needs stride, local"),
        ("strided(block=4,stride=2,local=1,width=3)", "got 'width'"),
        ("strided(block=4,stride=2,local=1,offset=2)", "less than stride"),
        ("lightning(lrpe=2)", "true or false"),
    ],
)
def test_says_what_is_wrong(text, words):
    with pytest.raises(ValueError, match=words):
        parse_pattern(text)


def test_any_causal_mechanism_by_its_id():
    text = "cog_attention(rope_base=500.0,use_bias=true), softmax"
    mixers = parse_pattern(text)
    assert mixers[0] == Mixer("cog_attention", options=(("rope_base", 500.0), ("use_bias", True)))
    assert parse_pattern(", ".join(map(str, mixers))) == mixers


def test_repeats_over_the_layers():
    assert [m.kind for m in layer_mixers("lightning*2, softmax", 5)] == [
        "lightning", "lightning", "softmax", "lightning", "lightning",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="more than num_layers=2"):
        layer_mixers("lightning*2, softmax", 2)


@pytest.mark.parametrize(
    ("text", "layers", "want"),
    [
        ("softmax", 4, [(1, 4)]),
        ("lightning*2, softmax", 6, [(3, 2)]),
        ("lightning*2, softmax", 3, [(1, 2), (1, 1)]),
        ("lightning*2, softmax", 5, [(1, 2), (1, 1), (1, 2)]),
        ("window(3), softmax, window(3), softmax", 4, [(2, 2)]),
        ("softmax", 1, [(1, 1)]),
    ],
)
def test_groups(text, layers, want):
    mixers = layer_mixers(text, layers)
    groups = layer_groups(mixers)
    assert [(len(unit), repeats) for unit, repeats in groups] == want
    assert [m for unit, repeats in groups for m in unit * repeats] == mixers
