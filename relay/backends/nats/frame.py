"""What a server sends, read with two short ways around the client library's parser.

The library awaits a coroutine for each message and moves all that is buffered behind it. So
acceptances are counted in bulk (`relay.backends.nats.acceptance`), and messages to subscriptions
with a handler of ours are cut out of what arrives as they are. All else, and whatever is not
spelled as servers spell it, is left to the library's parser
(https://docs.nats.io/reference/reference-protocols/nats-protocol).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nats.protocol.parser import AWAITING_CONTROL_LINE, MAX_CONTROL_LINE_SIZE, Parser

from relay.backends.nats.acceptance import Acceptances

# Called with subject, reply subject, body and header block of what arrives; must not raise.
Handler = Callable[[bytes, bytes, bytes, bytes | None], None]

_LINE_END = b"\r\n"
# What is kept is copied with each piece that follows; the library's buffer grows in place.
_MOST_KEPT_BYTES = 1024 * 1024
# Words of a line without and with a reply subject.
_WORDS_OF_MSG = (4, 5)
_WORDS_OF_HMSG = (5, 6)


class FrameParser(Parser):
    """nats-py's parser; only where it waits for a frame to begin are the short ways taken.

    ``handlers``: by subscription, and always those of this moment.
    """

    def __init__(self, client: object, handlers: Mapping[int, Handler]) -> None:
        self.acceptances: Acceptances | None = None
        self._handlers = handlers
        super().__init__(client)

    def reset(self) -> None:
        """Part of the library's parser: a connection begins or ends."""
        self._begun = b""
        super().reset()

    async def parse(self, data: bytes = b"") -> None:
        """Part of the library's parser: handle what has arrived."""
        if self.state == AWAITING_CONTROL_LINE and not self.buf:
            data = self._begun + data
            self._begun = b""
            if self.acceptances is not None:
                data = self.acceptances.feed(data)
            data = data[self._handled(data) :]
            if not data:
                return
        await super().parse(data)

    def _handled(self, data: bytes) -> int:
        """Hand messages in front to their handlers; how many bytes that was.

        The beginning of one that is not whole yet is kept for the next time, and counts.
        """
        at = 0
        handlers = self._handlers
        while True:
            line_end = data.find(_LINE_END, at)
            if line_end < 0:
                return self._kept(data, at, MAX_CONTROL_LINE_SIZE)
            words = data[at:line_end].split(b" ")
            verb, count = words[0], len(words)
            if verb == b"MSG" and count in _WORDS_OF_MSG:
                head_size, has_reply = b"0", count == _WORDS_OF_MSG[1]
            elif verb == b"HMSG" and count in _WORDS_OF_HMSG:
                head_size, has_reply = words[-2], count == _WORDS_OF_HMSG[1]
            else:
                return at
            size = words[-1]
            if not (words[2].isdigit() and head_size.isdigit() and size.isdigit()):
                return at
            handler = handlers.get(int(words[2]))
            if handler is None or b"" in words:
                return at
            start = line_end + 2
            body, end = start + int(head_size), start + int(size)
            if end + 2 > len(data):
                return self._kept(data, at, min(end + 2 - at, _MOST_KEPT_BYTES))
            handler(
                words[1],
                words[3] if has_reply else b"",
                data[body:end],
                data[start:body] if body > start else None,
            )
            at = end + 2

    def _kept(self, data: bytes, at: int, limit: int) -> int:
        """Keep what stands from here on, if that is less than the limit; how much is handled."""
        if len(data) - at >= limit:
            return at
        self._begun = data[at:]
        return len(data)
