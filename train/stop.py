"""Stop signals: a run that is asked to end saves its state first."""

from __future__ import annotations

import signal
from typing import Any


class StopSignal:
    """Remembers SIGTERM or SIGINT instead of dying; a second one acts as usual."""

    def __init__(self) -> None:
        """No signal yet."""
        self.number: int | None = None

    def __enter__(self) -> StopSignal:
        """Takes the two signals over."""
        self._before = {
            s: signal.signal(s, self._remember) for s in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    def _remember(self, number: int, _: Any) -> None:
        self.number = number
        for s, handler in self._before.items():
            signal.signal(s, handler)
