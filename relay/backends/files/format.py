"""How events become lines of a file, and where the sound part of a file ends after a crash."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

from relay.backends.files.options import FileFormat
from relay.errors import ConfigurationError, MessageUndecodable
from relay.message import RelayMessage
from relay.wire import LOWER, EncodeBodies, bodies_encoder, is_json

SPELLING = LOWER
CSV_COLUMNS = (
    "dedup_key",
    "key",
    "subject",
    "op",
    "is_full_refresh",
    "stream_table",
    "outbox_id",
    "refresh_id",
    "created_at",
    "headers",
    "payload",
)

_CHUNK_BYTES = 1024 * 1024
_LINE_BREAK = re.compile(rb"[\r\n]")
_SPECIAL = re.compile(r'[",\r\n]')


_T = TypeVar("_T")

Line = bytes | MessageUndecodable
"""An event as it is written; or why it can't be."""


class End(msgspec.Struct, frozen=True):
    """What to do with the end of a file: keep so many bytes, then append these."""

    keep_bytes: int
    append: bytes = b""


class Format(Protocol):
    """One file format; every file begins with ``header``."""

    @property
    def header(self) -> bytes:
        """What stands once at the beginning of a file."""

    def encode(self, messages: Sequence[RelayMessage]) -> list[Line]:
        """Each event with its terminator; for one that can't be written, why."""

    def sound_end(self, file: int, size_bytes: int) -> End:
        """Where the last complete event ends. Raises `ConfigurationError` for a foreign file."""


def file_format(name: FileFormat, content: str, namespace: str) -> Format:
    """The format of that name; ``content`` is one of `relay.wire.CONTENT_TYPES`."""
    if name == "csv":
        return Csv()
    encode = bodies_encoder(content, namespace=namespace)
    return JsonLines(encode) if name == "jsonl" else PrettyJson(encode)


class JsonLines:
    """One JSON document a line."""

    header = b""

    def __init__(self, encode: EncodeBodies) -> None:
        self._encode = encode

    def encode(self, messages: Sequence[RelayMessage]) -> list[Line]:
        """See `Format`."""
        return [
            # Nearly all lines are whole as they are, which is found out without a call for each.
            body + b"\n"
            if message.is_json and isinstance(body, bytes) and not (b"\n" in body or b"\r" in body)
            else _written(_one_line, message, body)
            for message, body in zip(messages, self._encode(messages), strict=True)
        ]

    def sound_end(self, file: int, size_bytes: int) -> End:
        """Behind the last line break; a last line that only lacks its break is given one."""
        keep = _behind_last(b"\n", file, size_bytes)
        return _with_tail(file, keep, size_bytes, terminator=b"\n")


class PrettyJson:
    """Indented documents, an empty line after each.

    JSON escapes line breaks inside strings and the indentation leaves no line empty, so that an
    empty line can only be the end of a document.
    """

    header = b""

    def __init__(self, encode: EncodeBodies) -> None:
        self._encode = encode

    def encode(self, messages: Sequence[RelayMessage]) -> list[Line]:
        """See `Format`."""
        return [
            _written(_indented, message, body)
            for message, body in zip(messages, self._encode(messages), strict=True)
        ]

    def sound_end(self, file: int, size_bytes: int) -> End:
        """Behind the last empty line; a complete document that lacks it is given one."""
        keep = _behind_last(b"\n\n", file, size_bytes)
        tail = os.pread(file, size_bytes - keep, keep)
        if re.search(rb"\n[^\s}\]]", tail):
            raise ConfigurationError(
                "the file holds something else than indented JSON documents",
                remedy="choose another output, or the format that the file has",
            )
        return _with_tail(file, keep, size_bytes, terminator=b"\n\n")


class Csv:
    """RFC 4180 (https://www.rfc-editor.org/rfc/rfc4180) with a header line.

    An absent value is an empty field, an empty text a quoted one.
    """

    header = ",".join(CSV_COLUMNS).encode() + b"\r\n"

    def encode(self, messages: Sequence[RelayMessage]) -> list[Line]:
        """See `Format`."""
        return [_written(_csv_record, message, message) for message in messages]

    def sound_end(self, file: int, size_bytes: int) -> End:
        """Behind the last line break outside of quotes."""
        beginning = os.pread(file, len(self.header), 0)
        if beginning != self.header:
            if self.header.startswith(beginning) and size_bytes < len(self.header):
                return End(0)
            raise ConfigurationError(
                "the file does not begin with the header line of our CSV columns",
                remedy="choose another output, or the format that the file has",
            )
        return End(_behind_last_record(file, size_bytes))


def _written(
    write: Callable[[_T], bytes], message: RelayMessage, what: _T | MessageUndecodable
) -> Line:
    if isinstance(what, MessageUndecodable):
        return what
    if not message.is_json and not is_json(message.payload):
        return MessageUndecodable("the payload is not JSON")
    try:
        return write(what)
    except (UnicodeError, msgspec.MsgspecError, RecursionError) as error:
        return MessageUndecodable(f"the message can't be written as text: {error}")


def _one_line(body: bytes) -> bytes:
    # Inside strings JSON escapes line breaks, so these can only stand between tokens.
    return _LINE_BREAK.sub(b" ", body) + b"\n"


def _indented(body: bytes) -> bytes:
    return msgspec.json.format(body, indent=2) + b"\n\n"


def _csv_record(message: RelayMessage) -> bytes:
    fields = (
        message.dedup_key,
        message.key,
        message.subject,
        message.op,
        "true" if message.is_full_refresh else "false",
        message.stream_table,
        None if message.outbox_id is None else str(message.outbox_id),
        message.refresh_id,
        None if message.created_at is None else message.created_at.isoformat(),
        msgspec.json.encode(message.headers).decode(),
        _LINE_BREAK.sub(b" ", message.payload).decode(),
    )
    return (",".join(_csv_field(field) for field in fields) + "\r\n").encode()


def _csv_field(text: str | None) -> str:
    if text is None:
        return ""
    if text and not _SPECIAL.search(text):
        return text
    return '"' + text.replace('"', '""') + '"'


def _behind_last(terminator: bytes, file: int, size_bytes: int) -> int:
    """The offset behind the last terminator, 0 where there is none; reads backwards."""
    end = size_bytes
    following = b""
    while end > 0:
        start = max(0, end - _CHUNK_BYTES)
        chunk = os.pread(file, end - start, start) + following
        found = chunk.rfind(terminator)
        if found >= 0:
            return start + found + len(terminator)
        following = chunk[: len(terminator) - 1]
        end = start
    return 0


def _with_tail(file: int, keep: int, size_bytes: int, *, terminator: bytes) -> End:
    """Keep a tail that is a whole document without its terminator: somebody else wrote it so.

    No beginning of an object, an array or a string is one itself, so a torn one is never kept.
    """
    tail = os.pread(file, size_bytes - keep, keep)
    if tail.rstrip().endswith((b"}", b"]", b'"')) and is_json(tail):
        missing = terminator[1:] if tail.endswith(b"\n") else terminator
        return End(size_bytes, missing)
    return End(keep)


def _behind_last_record(file: int, size_bytes: int) -> int:
    """The offset behind the last CRLF that has an even number of quotes before it."""
    is_quoted_at_start: list[bool] = []
    is_quoted = False
    for start in range(0, size_bytes, _CHUNK_BYTES):
        is_quoted_at_start.append(is_quoted)
        is_quoted ^= os.pread(file, _CHUNK_BYTES, start).count(b'"') % 2 == 1
    for number in range(len(is_quoted_at_start) - 1, -1, -1):
        start = number * _CHUNK_BYTES
        # One byte more on the left: a CRLF may lie across two chunks.
        overlap = min(start, 1)
        chunk = os.pread(file, _CHUNK_BYTES + overlap, start - overlap)
        end = len(chunk)
        while (found := chunk.rfind(b"\r\n", 0, end)) >= 0:
            if is_quoted_at_start[number] == (chunk.count(b'"', overlap, found) % 2 == 1):
                return start - overlap + found + 2
            end = found + 1
    return 0
