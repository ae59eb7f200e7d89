"""What JetStream says of messages that it has stored, read many at a time.

An acceptance is a small ``MSG`` frame whose subject ends in the number of the message and whose
body is ``{"stream":"…","seq":N}``, with ``"duplicate": true`` for what was there before
(https://docs.nats.io/reference/reference-protocols/nats_api_reference). Only frames that look
exactly so are read here; all else that a server sends is left to the ordinary parser.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

# Called with how often each number was accepted, and how often as what was there before; must not
# raise.
Accepted = Callable[[Mapping[int, int], Mapping[int, int]], None]

# An acceptance is shorter; what is longer is none.
_LONGEST_FRAME_BYTES = 1024

_NUMBER, _SIZE = rb"\d{1,18}", rb"\d{1,4}"
_BODY = (
    rb'\{"stream":"[^"\\\r\n]+", ?(?:"domain":"[^"\\\r\n]+", ?)?"seq":\d+(?:%b)?\}'
    % b',"duplicate": ?true'
)
_IS_DUPLICATE = b'"duplicate"'
_LINE_ENDS = b"\r\n"


class Acceptances:
    """Reads the acceptances that one subscription gets from what one connection receives."""

    def __init__(self, prefix: str, subscription: int, accepted: Accepted) -> None:
        """``prefix``: the reply subjects up to the number."""
        self._head = f"MSG {prefix}".encode()
        head = re.escape(self._head)
        self._opening = re.compile(rb"%b%b %d (%b)\r\n" % (head, _NUMBER, subscription, _SIZE))
        self._frame = re.compile(
            rb"(%b%b %d (%b))\r\n(%b)\r\n" % (head, _NUMBER, subscription, _SIZE, _BODY)
        )
        self._frames = re.compile(
            rb"(?:%b%b %d %b\r\n%b\r\n)*" % (head, _NUMBER, subscription, _SIZE, _BODY)
        )
        self._accepted = accepted
        self._begun = b""

    def feed(self, data: bytes) -> bytes:
        """Hand on the acceptances in front; what comes behind them is given back.

        The beginning of a frame that may become an acceptance is kept for the next time. To be
        called only where a frame begins, or with what follows such a beginning.
        """
        if self._begun:
            data = self._begun + data
        run = self._frames.match(data)
        end = 0 if run is None else run.end()
        lines = data[:end].split(_LINE_ENDS)
        heads, bodies = lines[:-1:2], lines[1::2]
        counts = self._counted(heads, bodies)
        if counts is None:
            # Something that is longer than it looks: only what stands before it is clear.
            heads, bodies, end = self._sound(data)
            counts = self._counted(heads, bodies)
        if counts:
            duplicates = self._duplicates(heads, bodies) if _IS_DUPLICATE in data else Counter()
            self._accepted(counts - duplicates, duplicates)
        rest = data[end:]
        if rest and self._may_become_one(rest):
            self._begun, rest = rest, b""
        else:
            self._begun = b""
        return rest

    def _counted(self, heads: Sequence[bytes], bodies: Sequence[bytes]) -> Counter[int] | None:
        """How often each number comes; None where a body is not as long as its head says.

        The heads of one chunk are alike but for the size, so that few are looked at singly.
        """
        counts: Counter[int] = Counter()
        alike = Counter(zip(heads, map(len, bodies), strict=True))
        for (head, length), count in alike.items():
            number, _, size = head[len(self._head) :].split(b" ")
            if int(size) != length:
                return None
            counts[int(number)] += count
        return counts

    def _duplicates(self, heads: Sequence[bytes], bodies: Sequence[bytes]) -> Counter[int]:
        return Counter(
            int(head[len(self._head) :].split(b" ")[0])
            for head, body in zip(heads, bodies, strict=True)
            if _IS_DUPLICATE in body[-20:]
        )

    def _sound(self, data: bytes) -> tuple[list[bytes], list[bytes], int]:
        """Heads and bodies of the frames in front that are as long as they say, and their end."""
        heads: list[bytes] = []
        bodies: list[bytes] = []
        end = 0
        for found in self._frame.finditer(data):
            head, size, body = found.groups()
            if found.start() != end or int(size) != len(body):
                break
            end = found.end()
            heads.append(head)
            bodies.append(body)
        return heads, bodies, end

    def _may_become_one(self, rest: bytes) -> bool:
        if len(rest) > _LONGEST_FRAME_BYTES or rest[: len(self._head)] != self._head[: len(rest)]:
            return False
        opening = self._opening.match(rest)
        if opening is None:
            return b"\n" not in rest
        return len(rest) < opening.end() + int(opening[1]) + len(b"\r\n")
