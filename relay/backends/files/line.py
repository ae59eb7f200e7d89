"""From bytes to lines, and from a line to a message."""

from __future__ import annotations

import msgspec

from relay.backends.files.format import SPELLING
from relay.backends.files.options import LineContent
from relay.contracts import Rejected
from relay.errors import MessageRejected, MessageTooLarge, MessageUndecodable
from relay.message import RelayMessage, op_named
from relay.wire import ENVELOPE_VERSION, Envelope, is_json, restore

SAMPLE_BYTES = 64 * 1024
"""How much of a line that is too long is kept."""

_OURS = b'"pgtrickleop"'
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(msgspec.Struct, frozen=True, gc=False):
    """One line without its terminator: where it begins, and where the next one does.

    A line above the limit holds its beginning only, and ``is_too_long``.
    """

    offset: int
    end: int
    body: bytes
    is_too_long: bool = False


class LineBuffer:
    """Cuts a stream of bytes into lines. Lines without anything in them are left out.

    ``offset``: where in its file the stream begins. Holds at most the limit and one chunk.
    """

    def __init__(self, offset: int, max_line_bytes: int) -> None:
        self.max_line_bytes = max_line_bytes
        self._offset = offset
        self._held = b""
        self._start = 0
        self._searched = 0
        self._sample: bytes | None = None
        self._sample_offset = 0

    @property
    def end(self) -> int:
        """The offset behind everything that was fed."""
        return self._offset + len(self._held)

    @property
    def has_part_of_a_line(self) -> bool:
        """True where bytes are held that no terminator has followed yet."""
        return self._sample is not None or self._start < len(self._held)

    def feed(self, chunk: bytes) -> None:
        """Add what was read next."""
        self._offset += self._start
        self._searched = max(0, self._searched - self._start)
        self._held = self._held[self._start :] + chunk
        self._start = 0

    def next(self) -> Line | None:
        """The next complete line, or None until more is fed."""
        while True:
            found = self._held.find(b"\n", self._searched)
            if found < 0:
                self._searched = len(self._held)
                self._drop_what_is_too_long()
                return None
            line = self._cut(found, found + 1)
            if line is not None:
                return line

    def finish(self) -> Line | None:
        """The last line, which has no terminator; None where there is none."""
        return self._cut(len(self._held), len(self._held)) if self.has_part_of_a_line else None

    def _cut(self, found: int, following: int) -> Line | None:
        body = self._held[self._start : found]
        offset = self._offset + self._start
        end = self._offset + following
        self._start = self._searched = following
        if self._sample is not None:
            sample, self._sample = self._sample, None
            return Line(self._sample_offset, end, sample, is_too_long=True)
        if len(body) > self.max_line_bytes:
            return Line(offset, end, body[:SAMPLE_BYTES], is_too_long=True)
        if offset == 0:
            body = body.removeprefix(_BYTE_ORDER_MARK)
        body = body.removesuffix(b"\r")
        return Line(offset, end, body) if body.strip() else None

    def _drop_what_is_too_long(self) -> None:
        if self._sample is None:
            if len(self._held) - self._start <= self.max_line_bytes:
                return
            self._sample = self._held[self._start : self._start + SAMPLE_BYTES]
            self._sample_offset = self._offset + self._start
        self._offset += len(self._held)
        self._held = b""
        self._start = self._searched = 0


Entry = RelayMessage | Rejected


class _ExactEnvelope(Envelope, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    """Our envelope with nothing missing and nothing added."""


class _Keyed(msgspec.Struct, frozen=True, gc=False):
    dedup_key: str | int | None = None


_exact_envelope = msgspec.json.Decoder(_ExactEnvelope)
_keyed = msgspec.json.Decoder(_Keyed)
_DECODING = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode_line(
    line: Line, content: LineContent, fallback_key: str, subject: str, max_line_bytes: int
) -> Entry:
    """The message on a line, or why there is none.

    ``fallback_key``: the dedup key where the line has none. ``subject``: of plain payloads.
    """
    try:
        if line.is_too_long:
            raise MessageTooLarge(f"the line is longer than max_line_bytes, {max_line_bytes}")
        if content in ("envelope", "cloudevents"):
            marked = _marked(line.body, content)
            if content == "envelope" or _OURS in line.body:
                return marked
            # A CloudEvent of somebody else is taken apart where those of all sources are.
            return RelayMessage(dedup_key=fallback_key, subject=subject, payload=line.body)
        if content == "auto" and _is_our_envelope(line.body):
            return _marked(line.body, "envelope")
        return _plain(line.body, fallback_key, subject)
    except MessageRejected as error:
        message = RelayMessage(dedup_key=fallback_key, subject=subject, payload=line.body)
        return Rejected(message, error)


def _is_our_envelope(body: bytes) -> bool:
    """A file has no place for a mark, so the line itself must be exactly what our sink writes."""
    try:
        envelope = _exact_envelope.decode(body)
    except _DECODING:
        return False
    return envelope.v == ENVELOPE_VERSION and op_named(envelope.op) == envelope.op


def _marked(body: bytes, content: str) -> RelayMessage:
    message = restore(body, {SPELLING.format: content}, SPELLING)
    if message is None or not is_json(message.payload):
        raise MessageUndecodable(f"the line is not of format {content}")
    return message


def _plain(body: bytes, fallback_key: str, subject: str) -> RelayMessage:
    if not is_json(body):
        raise MessageUndecodable("the line is not JSON")
    return RelayMessage(dedup_key=_dedup_key(body) or fallback_key, subject=subject, payload=body)


def _dedup_key(body: bytes) -> str:
    """The ``dedup_key`` of an object, where it is a text or a whole number."""
    try:
        found = _keyed.decode(body).dedup_key
    except _DECODING:
        return ""
    return "" if found is None else str(found)
