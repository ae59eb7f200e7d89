"""The NATS JetStream sink: see the package for what it promises."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Self

import msgspec
from msgspec import structs

from relay import wire
from relay.backends.nats import headers as wire_headers
from relay.backends.nats import jetstream
from relay.backends.nats.connection import Connection, connect
from relay.backends.nats.errors import ApiError, of_jetstream, of_server_text
from relay.backends.nats.options import NatsSinkOptions, check_connection, check_name
from relay.backends.nats.subject import (
    check_subject,
    check_template,
    covering,
    escape,
    filter_of,
)
from relay.context import BackendContext
from relay.contracts import PublishResult
from relay.errors import (
    ConfigurationError,
    DestinationMissing,
    MessageRejected,
    MessageTooLarge,
    MessageUndecodable,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.flight import Chunk, Flight
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import Render, compile_routing

ORDERINGS = ("strict", "pipelined")

# JetStream keeps the length of a header block in 16 bits.
_MAX_HEADER_BYTES = 65535
_CHUNK_BYTES = 128 * 1024
_CHUNK_MESSAGES = 256
_MAX_BYTES_UNDER_WAY = 32 * 1024 * 1024
_NO_RESPONDERS = 503
# No stream's name has a blank, so that this is nowhere else in a block of ours.
_KEY_MARK = "< dedup key >"


class _Acknowledgement(msgspec.Struct, frozen=True, gc=False):
    stream: str = ""
    duplicate: bool = False
    error: ApiError | None = None


_acknowledgement = msgspec.json.Decoder(_Acknowledgement)


class NatsSink:
    """Publishes to JetStream, many messages at a time, and waits for every acknowledgement."""

    def __init__(
        self,
        options: NatsSinkOptions,
        *,
        render: Render,
        bodies: wire.EncodeBodies,
        ordering: str,
        name: str,
    ) -> None:
        self._options = options
        self._render = render
        self._bodies = bodies
        self._headers_of = wire.headers_encoder(options.format, wire.TITLE)
        self._has_few_headers = options.format in wire.FEW_HEADERS
        # Header blocks by op and full-refresh mark, cut where the dedup key stands.
        self._blocks: dict[tuple[str, bool], list[bytes]] = {}
        self._is_strict = ordering == "strict"
        self._name = name
        self._fixed_headers = (
            ""
            if options.stream is None
            else f"{wire_headers.EXPECTED_STREAM}: {options.stream}\r\n"
        )
        self._ack_timeout_s = options.ack_timeout_ms / 1000
        self._connection: Connection | None = None
        self._reply_prefix = ""
        self._flight: Flight | None = None
        # Replies carry a number that never repeats, so that a late one finds no other chunk.
        self._next_number = 0
        self._chunks: dict[int, Chunk] = {}
        self._wake = asyncio.Event()

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``sink`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, NatsSinkOptions, path="sink")
        check_connection(parsed, "sink")
        _check(parsed)
        ordering = context.ordering or "strict"
        if ordering not in ORDERINGS:
            raise ConfigurationError(
                f"ordering {ordering!r} is unknown to the nats sink",
                remedy=f"use one of {', '.join(ORDERINGS)}",
            )
        return cls(
            parsed,
            render=compile_routing(
                parsed.subject_template, parsed.routing, escape=escape, check=check_subject
            ),
            bodies=wire.bodies_encoder(parsed.format, namespace=context.dedup_namespace),
            ordering=ordering,
            name=f"pgtrickle-relay {context.pipeline}",
        )

    async def connect(self) -> None:
        """Open anew; find or make the stream where one is named.

        Raises `DestinationMissing` where it is neither there nor ours to make.
        """
        await self.aclose()
        connection = await connect(self._options, name=self._name, path="sink")
        try:
            await self._find_stream(connection)
            inbox = connection.new_inbox()
            connection.listen_for_acceptances(f"{inbox}.", self._on_reply, self._on_accepted)
            await connection.flush()
            if connection.denied:
                raise of_server_text(connection.denied[-1], "receiving acknowledgements")
        except BaseException:
            await connection.aclose()
            raise
        self._reply_prefix = f"{inbox}."
        connection.on_trouble = self._wake.set
        self._connection = connection

    async def describe(self) -> dict[str, str]:
        """What there is to know about the far side: server, streams and duplicate windows."""
        connection = self._open()
        if self._options.stream is not None:
            streams = [await jetstream.stream_info(connection, self._options.stream)]
        else:
            templates = (self._options.subject_template, *self._options.routing.values())
            found = [
                stream
                for one in dict.fromkeys(map(filter_of, templates))
                for stream in await jetstream.streams_on(connection, one)
            ]
            streams = list({stream.config.name: stream for stream in found}.values())
        described = {"server": connection.address}
        for stream in streams:
            window_s = stream.config.duplicate_window / jetstream.NANOSECONDS
            described[f"stream {stream.config.name}"] = f"duplicate window {window_s:g} s"
        if not streams:
            described["stream"] = f"none listens on {self._options.subject_template} yet"
        return described

    def subject_of(self, message: RelayMessage) -> str:
        """The subject by template or routing. Raises `MessageRejected` for one NATS refuses."""
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Publish all; see the package for order and for what counts as accepted.

        A connection that is lost, or silent for ``ack_timeout_ms``, fails what was under way as
        unknown and what was not sent; it is not used again.
        """
        connection = self._open()
        flight = Flight(messages, is_strict=self._is_strict, window=self._options.max_in_flight)
        denied_before = len(connection.denied)
        self._flight = flight
        try:
            while True:
                await self._send(connection, flight)
                if flight.is_over:
                    break
                await self._await_replies(connection, flight)
                if connection.loss is not None:
                    flight.fail_all(connection.loss)
                _fail_denied(flight, connection.denied[denied_before:])
        finally:
            self._flight = None
            self._chunks.clear()
        return PublishResult(failures=flight.failures(), duplicates=flight.duplicates)

    async def is_healthy(self) -> bool:
        """True when the server answers a ping within seconds."""
        connection = self._connection
        return connection is not None and await connection.is_healthy()

    async def aclose(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()

    def _open(self) -> Connection:
        if self._connection is None:
            raise NotConnected("the nats sink is not connected")
        if self._connection.loss is not None:
            raise self._connection.loss
        return self._connection

    async def _find_stream(self, connection: Connection) -> None:
        options = self._options
        if options.stream is None:
            await jetstream.check_enabled(connection)
            return
        try:
            await jetstream.stream_info(connection, options.stream)
        except DestinationMissing:
            if not options.create_stream:
                raise DestinationMissing(
                    f"there is no stream {options.stream!r} on {connection.address}",
                    remedy=f"set create_stream, or run: nats stream add {options.stream}",
                ) from None
            await jetstream.create_stream(
                connection,
                jetstream.StreamConfig(
                    name=options.stream,
                    subjects=covering((options.subject_template, *options.routing.values())),
                    duplicate_window=options.duplicate_window_s * jetstream.NANOSECONDS,
                ),
            )

    async def _send(self, connection: Connection, flight: Flight) -> None:
        """Send what may go, a chunk at a time, letting acknowledgements in between."""
        try:
            while flight.bytes_under_way < _MAX_BYTES_UNDER_WAY:
                chunk = Chunk()
                lines = self._taken(flight, chunk, connection.max_payload)
                if not chunk.indices:
                    break
                # What is written may be answered at once.
                self._chunks[self._next_number] = chunk
                self._next_number += 1
                connection.write(b"".join(lines))
                await connection.drain(self._ack_timeout_s)
                await asyncio.sleep(0)
        except Outage as error:
            connection.abort(error)
            flight.fail_all(error)

    def _taken(self, flight: Flight, chunk: Chunk, max_payload: int) -> list[bytes]:
        """The lines of the next chunk, with one reply subject for all of its messages.

        A subject that comes for the first time costs the server more than a message.
        """
        lines: list[bytes] = []
        sent, subject_of, block_of = chunk.indices, self._subject, self._block
        reply = f"{self._reply_prefix}{self._next_number}"
        indices = self._bounded(flight, flight.take_chunk(_CHUNK_MESSAGES))
        messages = [flight.messages[index] for index in indices]
        for index, message, body in zip(indices, messages, self._bodies(messages), strict=True):
            try:
                if isinstance(body, MessageUndecodable):
                    raise body
                subject = subject_of(message)
                block = block_of(message, len(body), max_payload)
            except MessageRejected as error:
                flight.fail(index, error)
                continue
            head = len(block)
            total = head + len(body)
            lines += (f"HPUB {subject} {reply} {head} {total}\r\n".encode(), block, body, b"\r\n")
            sent.append(index)
            flight.weigh(index, total)
        return lines

    def _bounded(self, flight: Flight, taken: Sequence[int]) -> Sequence[int]:
        """As many of these as make one chunk by their bytes; the others are put back."""
        size = 0
        for place, index in enumerate(taken, 1):
            size += len(flight.messages[index].payload)
            if size >= _CHUNK_BYTES:
                flight.put_back(taken[place:])
                return taken[:place]
        return taken

    async def _await_replies(self, connection: Connection, flight: Flight) -> None:
        """Return when there is something to do; give up on a connection that has gone silent."""
        # Others get their turn, whatever happens here.
        await asyncio.sleep(0)
        while connection.loss is None and not flight.wants_sender:
            heard = flight.settled
            self._wake.clear()
            try:
                async with asyncio.timeout(self._ack_timeout_s):
                    await self._wake.wait()
                return
            except TimeoutError:
                if flight.settled == heard:
                    connection.abort(
                        TimedOut(
                            f"no acknowledgement from {connection.address} within"
                            f" {self._options.ack_timeout_ms} ms"
                        )
                    )

    def _subject(self, message: RelayMessage) -> str:
        return check_subject(message.subject or self._render(message))

    def _block(self, message: RelayMessage, body_bytes: int, max_payload: int) -> bytes:
        """The header block. Raises `MessageUndecodable`, `MessageTooLarge`."""
        try:
            key = message.dedup_key
            if self._has_few_headers and not message.headers and wire_headers.is_plain(key):
                parts = self._blocks.get((message.op, message.is_full_refresh))
                block = key.encode().join(parts or self._new_parts(message))
            else:
                block = self._block_from_scratch(message)
        except UnicodeEncodeError:
            raise MessageUndecodable("the message holds text that is not Unicode") from None
        head = len(block)
        if head + body_bytes > max_payload:
            raise MessageTooLarge(
                f"the message has {head + body_bytes} bytes with its headers, the server's"
                f" max_payload is {max_payload} bytes"
            )
        if head > _MAX_HEADER_BYTES:
            raise MessageTooLarge(
                f"the headers have {head} bytes, JetStream's limit is {_MAX_HEADER_BYTES} bytes"
            )
        return block

    def _new_parts(self, message: RelayMessage) -> list[bytes]:
        """The header block of messages like this one, cut where the dedup key stands."""
        marked = self._block_from_scratch(structs.replace(message, dedup_key=_KEY_MARK))
        parts = marked.split(_KEY_MARK.encode())
        self._blocks[message.op, message.is_full_refresh] = parts
        return parts

    def _block_from_scratch(self, message: RelayMessage) -> bytes:
        return wire_headers.encode(
            self._headers_of(message), message_id=message.dedup_key, fixed=self._fixed_headers
        )

    def _on_accepted(self, accepted: Mapping[int, int], duplicates: Mapping[int, int]) -> None:
        for number, answers in accepted.items():
            self._answered(number, answers)
        for number, answers in duplicates.items():
            self._answered(number, answers, duplicates=answers)

    def _on_reply(self, subject: bytes, _: bytes, body: bytes, block: bytes | None) -> None:
        flight = self._flight
        number = int(subject[len(self._reply_prefix) :])
        chunk = self._chunks.get(number)
        if flight is None or chunk is None:
            return
        # Of several it may be any; what is told is told of one that was sent alone.
        publishing_to = self._subject(flight.messages[chunk.indices[0]])
        is_duplicate = False
        if block is not None:
            chunk.error = _of_status(block, publishing_to)
        else:
            try:
                acknowledgement = _acknowledgement.decode(body)
            except msgspec.DecodeError:
                chunk.error = Outage("the server's acknowledgement can't be read")
            else:
                is_duplicate = acknowledgement.duplicate
                if acknowledgement.error is not None:
                    chunk.error = of_jetstream(
                        acknowledgement.error,
                        f"publishing to {publishing_to!r}",
                        is_publish=True,
                    )
                elif not acknowledgement.stream:
                    chunk.error = _no_stream(publishing_to)
        self._answered(number, 1, duplicates=int(is_duplicate))

    def _answered(self, number: int, answers: int, *, duplicates: int = 0) -> None:
        flight, chunk = self._flight, self._chunks.get(number)
        if flight is None or chunk is None:
            return
        chunk.answers += answers
        chunk.duplicates += duplicates
        if chunk.answers >= len(chunk.indices):
            del self._chunks[number]
            flight.answered(chunk)
            if flight.wants_sender:
                self._wake.set()


def _check(options: NatsSinkOptions) -> None:
    for template in (options.subject_template, *options.routing.values()):
        check_template(template)
    if options.stream is not None:
        check_name(options.stream, "sink.stream")
    if options.create_stream:
        if options.stream is None:
            raise ConfigurationError(
                "sink.create_stream needs a name", remedy="say which one with sink.stream"
            )
        covering((options.subject_template, *options.routing.values()))
    for name, value in (
        ("max_in_flight", options.max_in_flight),
        ("ack_timeout_ms", options.ack_timeout_ms),
        ("duplicate_window_s", options.duplicate_window_s),
    ):
        if value < 1:
            raise ConfigurationError(f"sink.{name} must be at least 1")


def _of_status(block: bytes, subject: str) -> RelayError:
    code, text = wire_headers.status(block) or (0, "")
    if code == _NO_RESPONDERS:
        return _no_stream(subject)
    return Outage(f"publishing to {subject!r}: the server answers {code} {text}".rstrip())


def _no_stream(subject: str) -> DestinationMissing:
    return DestinationMissing(
        f"no stream listens on the subject {subject!r}",
        remedy="set create_stream with stream, or create one with this subject",
    )


def _fail_denied(flight: Flight, denied: Sequence[str]) -> None:
    """End the flight where the server refused to take something: no acknowledgement will come.

    The server names the subject; the client library gives its words in lower case.
    """
    for text in denied:
        if any(
            f'publish to "{flight.messages[index].subject.lower()}"' in text
            for index in flight.under_way()
        ):
            flight.fail_all(of_server_text(text, "publishing"))
