"""How long to wait before the next attempt."""

from __future__ import annotations

import random
from collections.abc import Callable

# What a destination asks for may be a mistake: nobody waits longer than this for its sake.
LONGEST_ASKED_WAIT_S = 3600.0


class Backoff:
    """Exponential back-off with full-width jitter: each wait is 50 % to 100 % of its ceiling.

    The ceiling doubles from ``initial_s`` up to ``max_s``; `reset` after a success starts over.
    """

    def __init__(
        self,
        initial_s: float = 1.0,
        max_s: float = 60.0,
        *,
        chance: Callable[[], float] = random.random,
    ) -> None:
        if not 0 < initial_s <= max_s:
            raise ValueError("back-off needs 0 < initial_s <= max_s")
        self._initial_s = initial_s
        self._max_s = max_s
        self._chance = chance
        self._attempt = 0

    @property
    def attempt(self) -> int:
        """How many waits were taken since the last success."""
        return self._attempt

    def next_s(self, asked_s: float | None = None) -> float:
        """The next wait in seconds; at least ``asked_s``, which the destination asked for.

        Of that no more than `LONGEST_ASKED_WAIT_S` is granted.
        """
        ceiling = self._max_s
        if self._attempt < 63:
            ceiling = min(self._max_s, self._initial_s * 2**self._attempt)
        self._attempt += 1
        wait_s = ceiling * (0.5 + self._chance() / 2)
        return max(wait_s, min(asked_s or 0.0, LONGEST_ASKED_WAIT_S))

    def reset(self) -> None:
        """Start over: the last attempt succeeded."""
        self._attempt = 0
