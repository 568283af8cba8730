"""Stop strings in a stream of text pieces, found across token boundaries.

Text that might be the beginning of a stop string is held back until it is clear; the stop string itself is never shown.
Test: pytest tests/test_llm_generate.py
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    """Passes text on until one of `stops` appears.

    >>> finder = StopFinder(["END"])
    >>> finder.push("some E"), finder.push("N"), finder.push("T, E"), finder.push("ND more"), finder.found
    ('some ', '', 'ENT, ', '', 'END')
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = tuple(stops)
        self.found: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """The text that may be shown now. After a stop string was found (`found`) nothing more comes."""
        if self.found is not None or not self.stops:
            return "" if self.found is not None else text
        text = self._held + text
        hits = [(at, -len(stop), stop) for stop in self.stops if (at := text.find(stop)) >= 0]
        if hits:
            at, _, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = max(_overlap(text, stop) for stop in self.stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The held text, at the end of a generation."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` (and is not all of it)."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
