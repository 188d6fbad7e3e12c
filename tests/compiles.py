"""Counts compilations by JAX's own monitoring events."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """A list that grows by one entry per program that XLA compiles inside the block."""
    found: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == _EVENT:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
