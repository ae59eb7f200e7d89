"""What JetStream says of messages that it has stored, read many at a time.

An acceptance is a small ``MSG`` frame whose subject ends in the number of the message and whose
body is ``{"stream":"…","seq":N}``, with ``"duplicate": true`` for what was there before
(https://docs.nats.io/reference/reference-protocols/nats_api_reference). Only frames that look
exactly so are read here; all else that a server sends is left to the ordinary parser.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# Called with the numbers of what was accepted, and of what was there before; must not raise.
Accepted = Callable[[Sequence[int], Sequence[int]], None]

# An acceptance is shorter; what is longer is none.
_LONGEST_FRAME_BYTES = 1024

_BODY = (
    rb'\{"stream":"[^"\\\r\n]+", ?(?:"domain":"[^"\\\r\n]+", ?)?"seq":\d+(,"duplicate": ?true)?\}'
)


class Acceptances:
    """Reads the acceptances that one subscription gets from what one connection receives."""

    def __init__(self, prefix: str, subscription: int, accepted: Accepted) -> None:
        """``prefix``: the reply subjects up to the number."""
        self._head = f"MSG {prefix}".encode()
        opening = rb"%b(\d{1,18}) %d (\d{1,4})\r\n" % (re.escape(self._head), subscription)
        self._frame = re.compile(rb"%b(%b)\r\n" % (opening, _BODY))
        self._opening = re.compile(opening)
        self._accepted = accepted
        self._begun = b""

    def feed(self, data: bytes) -> bytes:
        """Hand on the acceptances in front; what comes behind them is given back.

        The beginning of a frame that may become an acceptance is kept for the next time. To be
        called only where a frame begins, or with what follows such a beginning.
        """
        if self._begun:
            data = self._begun + data
        accepted: list[int] = []
        duplicates: list[int] = []
        end = 0
        for frame in self._frame.finditer(data):
            number, size, body, duplicate = frame.groups()
            if frame.start() != end or int(size) != len(body):
                break
            end = frame.end()
            (duplicates if duplicate else accepted).append(int(number))
        rest = data[end:]
        if rest and self._may_become_one(rest):
            self._begun, rest = rest, b""
        else:
            self._begun = b""
        if end:
            self._accepted(accepted, duplicates)
        return rest

    def _may_become_one(self, rest: bytes) -> bool:
        if len(rest) > _LONGEST_FRAME_BYTES or rest[: len(self._head)] != self._head[: len(rest)]:
            return False
        opening = self._opening.match(rest)
        if opening is None:
            return b"\n" not in rest
        return len(rest) < opening.end() + int(opening[2]) + len(b"\r\n")
