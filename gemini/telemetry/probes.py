"""Looking at what changes by itself, once a second."""

import time
from collections.abc import Callable, Mapping

from gemini.telemetry.records import Fields

PROBE_SECONDS = 1.0
UNCHANGED_SECONDS = 30.0
"""A probe that says what it said before is written this often all the same."""


class Probes:
    """Asks the probes once a second, and passes on what is new."""

    def __init__(self, probes: Mapping[str, Callable[[], Fields | None]]) -> None:
        self._probes = probes
        self._last: dict[str, tuple[float, Fields]] = {}
        self._next = time.monotonic()

    def due(self, is_last: bool = False) -> list[tuple[str, Fields]]:
        """Record types and fields to write now; of ``is_last`` whatever is new, also before the second is over."""
        now = time.monotonic()
        if now < self._next and not is_last:
            return []
        self._next = now + PROBE_SECONDS
        found = []
        for kind, probe in self._probes.items():
            fields = probe()
            if fields is None:
                continue
            when, before = self._last.get(kind, (float("-inf"), None))
            if fields != before or now - when >= UNCHANGED_SECONDS:
                self._last[kind] = (now, fields)
                found.append((kind, fields))
        return found
