"""Masks: which keys each query may attend to.

    Causal() & (Window(1024) | Sink(4))                a causal window that keeps four sink tokens
    Causal() & Segments(ids)                           packed documents
    per_head([Causal(), Causal() & Window(256)])       another mask for every head

Masks combine with `&`, `|` and `~`, are hashable pytrees, and never hold a t x s array. Indices are
absolute: query 0 faces key 0. `.dense(T)`, `.density(T)` and `.plot(T)` show what a mask does.
"""

from attnjax.masks.base import And, Mask, Not, Or
from attnjax.masks.heads import PerHead, per_head
from attnjax.masks.keys import KeptUntil, KeySet, QuerySet, document_sinks, key_set, query_set
from attnjax.masks.multihop import Documents, Rectangle, causal_within_document, prefix_lm
from attnjax.masks.neighborhood import Neighborhood
from attnjax.masks.patterns import BlockPattern, Predicate, Strided
from attnjax.masks.sequences import Lengths, Prefix, Segments
from attnjax.masks.shapes import (
    Causal,
    Chunked,
    Dilated,
    EarlierChunks,
    Full,
    SinceGroup,
    Sink,
    Window,
)

__all__ = [
    "And",
    "BlockPattern",
    "Causal",
    "Chunked",
    "Dilated",
    "Documents",
    "EarlierChunks",
    "Full",
    "KeptUntil",
    "KeySet",
    "Lengths",
    "Mask",
    "Neighborhood",
    "Not",
    "Or",
    "PerHead",
    "Predicate",
    "Prefix",
    "QuerySet",
    "Rectangle",
    "Segments",
    "SinceGroup",
    "Sink",
    "Strided",
    "Window",
    "causal_within_document",
    "document_sinks",
    "key_set",
    "per_head",
    "prefix_lm",
    "query_set",
]
