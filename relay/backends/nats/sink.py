"""The NATS JetStream sink: see the package for what it promises."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Self

import msgspec
from msgspec import structs
from nats.js.api import StorageType, StreamConfig

from relay import wire
from relay.backends.nats import headers as wire_headers
from relay.backends.nats.connection import Connection, Received, connect, standing
from relay.backends.nats.errors import ApiError, of_jetstream, of_server_text
from relay.backends.nats.options import NatsSinkOptions, check_name, servers_of
from relay.backends.nats.subject import check_subject, check_template, covering, escape, filter_of
from relay.context import BackendContext
from relay.contracts import Failure, PublishResult
from relay.errors import (
    ConfigurationError,
    DestinationMissing,
    MessageRejected,
    MessageTooLarge,
    MessageUndecodable,
    Outage,
    RelayError,
    TimedOut,
)
from relay.flight import Flight
from relay.message import RelayMessage
from relay.options import parse_options
from relay.template import compile_routing

# JetStream keeps the length of a header block in 16 bits.
_MAX_HEADER_BYTES = 65535
_CHUNK_BYTES = 128 * 1024
_CHUNK_MESSAGES = 256
_NO_RESPONDERS = "503"
# No stream's name has a blank, so that this is nowhere else in a block of ours.
_KEY_MARK = "< dedup key >"


class _Acknowledgement(msgspec.Struct, frozen=True, gc=False):
    stream: str = ""
    duplicate: bool = False
    error: ApiError | None = None


_acknowledgement = msgspec.json.Decoder(_Acknowledgement)


class NatsSink:
    """Publishes to JetStream, many messages at a time, and waits for every acknowledgement."""

    def __init__(self, options: NatsSinkOptions, context: BackendContext) -> None:
        """`from_options` checks what this takes."""
        self._options = options
        self._name = f"pgtrickle-relay {context.pipeline}"
        self._is_strict = context.ordering != "pipelined"
        self._render = compile_routing(
            options.subject_template, options.routing, escape=escape, check=check_subject
        )
        self._bodies = wire.bodies_encoder(options.format, namespace=context.dedup_namespace)
        self._headers_of = wire.headers_encoder(options.format, wire.TITLE)
        self._has_few_headers = options.format in wire.FEW_HEADERS
        # Header blocks by op and full-refresh mark, cut where the dedup key stands.
        self._blocks: dict[tuple[str, bool], list[bytes]] = {}
        self._fixed_headers = ""
        if options.stream is not None:
            self._fixed_headers = f"{wire_headers.EXPECTED_STREAM}: {options.stream}\r\n"
        self._ack_timeout_s = options.ack_timeout_ms / 1000
        self._connection: Connection | None = None
        self._reply_prefix = ""
        self._flight: Flight | None = None
        # Replies carry a number that never repeats, so that a late one settles no other message.
        self._first_number = 0
        self._accepted: list[int] = []
        self._wake = asyncio.Event()

    @classmethod
    def from_options(cls, options: Mapping[str, object], context: BackendContext) -> Self:
        """Build from a ``sink`` object. Raises `ConfigurationError`; does no I/O."""
        parsed = parse_options(options, NatsSinkOptions, path="sink")
        servers_of(parsed.url, "sink")
        _check(parsed)
        return cls(parsed, context)

    async def connect(self) -> None:
        """Open, or start again when open; find or make the stream where one is named.

        Raises `DestinationMissing` where it is neither there nor ours to make.
        """
        await self.aclose()
        connection = await connect(self._options, name=self._name, path="sink")
        try:
            inbox = connection.client.new_inbox()
            await connection.subscribe(f"{inbox}.*", self._on_reply)
            await self._find_stream(connection)
        except BaseException:
            await connection.aclose()
            raise
        self._reply_prefix = f"{inbox}."
        connection.on_trouble = self._wake.set
        self._connection = connection

    async def describe(self) -> dict[str, str]:
        """What there is to know about the broker: server, streams and duplicate windows."""
        connection, options = standing(self._connection), self._options
        if options.stream is not None:
            streams = [await connection.stream_info(options.stream)]
        else:
            filters = map(filter_of, (options.subject_template, *options.routing.values()))
            found = [await connection.streams_on(one) for one in dict.fromkeys(filters)]
            streams = list({one.config.name: one for some in found for one in some}.values())
        described = {"server": connection.address}
        for stream in streams:
            window_s = f"{stream.config.duplicate_window:g} s"
            described[f"stream {stream.config.name}"] = f"duplicate window {window_s}"
        if not streams:
            described["stream"] = f"none listens on {options.subject_template} yet"
        return described

    def subject_of(self, message: RelayMessage) -> str:
        """The subject by template or routing. Raises `MessageRejected` for one NATS refuses."""
        return self._render(message)

    async def publish(self, messages: Sequence[RelayMessage]) -> PublishResult:
        """Publish all; see the package for order and for what counts as accepted.

        A connection that is lost, or silent for ``ack_timeout_ms``, fails what was in flight as
        unknown and what was not sent; it is not used again.
        """
        connection = standing(self._connection)
        flight = Flight(messages, is_strict=self._is_strict, window=self._options.max_in_flight)
        denied_before = len(connection.denied)
        self._flight = flight
        try:
            while True:
                await self._send(connection, flight)
                if flight.is_over:
                    break
                await self._await_replies(connection)
                flight.accept(self._accepted)
                self._accepted.clear()
                if connection.loss is not None:
                    flight.fail_all(connection.loss)
                _fail_denied(flight, connection.denied[denied_before:])
        finally:
            self._flight = None
            self._first_number += len(messages)
            self._accepted.clear()
        failures = await self._judged(connection, flight)
        return PublishResult(failures=failures, duplicates=flight.duplicates)

    async def is_healthy(self) -> bool:
        """True when the server answers a ping within seconds."""
        connection = self._connection
        return connection is not None and await connection.is_healthy()

    async def aclose(self) -> None:
        """Close the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.aclose()

    async def _find_stream(self, connection: Connection) -> None:
        options = self._options
        if options.stream is None:
            await connection.ask(connection.manager.account_info(), "looking for JetStream")
            return
        try:
            await connection.stream_info(options.stream)
        except DestinationMissing:
            if not options.create_stream:
                raise DestinationMissing(
                    f"there is no stream {options.stream!r} on {connection.address}",
                    remedy=f"set create_stream, or run: nats stream add {options.stream}",
                ) from None
            # Harmless when somebody else makes it meanwhile with the same configuration.
            config = StreamConfig(
                name=options.stream,
                subjects=covering((options.subject_template, *options.routing.values())),
                storage=StorageType.FILE,
                duplicate_window=options.duplicate_window_s,
            )
            creating = connection.manager.add_stream(config)
            await connection.ask(creating, f"creating the stream {options.stream!r}")

    async def _send(self, connection: Connection, flight: Flight) -> None:
        """Send what may go, a chunk at a time, letting acknowledgements in between."""
        try:
            while taken := flight.take_chunk(_CHUNK_MESSAGES, _CHUNK_BYTES):
                lines = self._lines(flight, taken, connection.client.max_payload)
                await connection.send(lines, timeout_s=self._ack_timeout_s)
                await asyncio.sleep(0)
        except Outage as error:
            connection.abort(error)

    def _lines(self, flight: Flight, taken: Sequence[int], max_payload: int) -> list[bytes]:
        """The lines of these messages, each with a reply subject of its own."""
        lines: list[bytes] = []
        prefix, first = self._reply_prefix, self._first_number
        messages = [flight.messages[index] for index in taken]
        for index, message, body in zip(taken, messages, self._bodies(messages), strict=True):
            try:
                if isinstance(body, MessageUndecodable):
                    raise body
                subject = check_subject(message.subject)
                block = self._block(message, len(body), max_payload)
            except MessageRejected as error:
                flight.fail(index, error)
                continue
            head = len(block)
            total = head + len(body)
            line = f"HPUB {subject} {prefix}{first + index} {head} {total}\r\n"
            lines += (line.encode(), block, body, b"\r\n")
            flight.weigh(index, total)
        return lines

    async def _await_replies(self, connection: Connection) -> None:
        """Return when there is something to do; give up on a connection that has gone silent."""
        try:
            async with asyncio.timeout(self._ack_timeout_s):
                await self._wake.wait()
        except TimeoutError:
            connection.abort(
                TimedOut(
                    f"no acknowledgement from {connection.address} within"
                    f" {self._options.ack_timeout_ms} ms"
                )
            )
        self._wake.clear()

    async def _judged(self, connection: Connection, flight: Flight) -> Sequence[Failure]:
        """The failures; where nobody listens on a subject, but a stream should, it is an outage.

        A stream listens through its leader, and has none during an election.
        """
        failures = flight.failures()
        unheard = next((one for one in failures if isinstance(one.error, DestinationMissing)), None)
        if unheard is None:
            return failures
        subject = flight.messages[unheard.index].subject
        try:
            if not await connection.streams_on(subject):
                return failures
            outage = Outage(f"the stream that listens on {subject!r} has no leader at the moment")
        except Outage as error:
            outage = error
        except ConfigurationError:
            # To look for streams may not be allowed.
            return failures
        return [
            structs.replace(one, error=outage) if isinstance(one.error, DestinationMissing) else one
            for one in failures
        ]

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
        parts = self._blocks[message.op, message.is_full_refresh] = marked.split(_KEY_MARK.encode())
        return parts

    def _block_from_scratch(self, message: RelayMessage) -> bytes:
        headers = self._headers_of(message)
        return wire_headers.encode(headers, message_id=message.dedup_key, fixed=self._fixed_headers)

    async def _on_reply(self, reply: Received) -> None:
        """Note what became of one message; `publish` is woken once for all that came together."""
        flight = self._flight
        index = int(reply.subject[len(self._reply_prefix) :]) - self._first_number
        if flight is None or not flight.is_in_flight(index):
            return
        self._wake.set()
        try:
            acknowledgement = _acknowledgement.decode(reply.data)
        except msgspec.DecodeError:
            # Of somebody else, or none.
            acknowledgement = _Acknowledgement()
        if acknowledgement.stream and acknowledgement.error is None:
            self._accepted.append(index)
            flight.duplicates += acknowledgement.duplicate
        else:
            subject = flight.messages[index].subject
            flight.fail(index, _refusal(reply, acknowledgement, subject))


def _check(options: NatsSinkOptions) -> None:
    for template in (options.subject_template, *options.routing.values()):
        check_template(template)
    if options.stream is not None:
        check_name(options.stream, "sink.stream")
    if options.create_stream:
        covering((options.subject_template, *options.routing.values()))


def _refusal(reply: Received, acknowledgement: _Acknowledgement, subject: str) -> RelayError:
    doing = f"publishing to {subject!r}"
    if acknowledgement.error is not None:
        return of_jetstream(acknowledgement.error, doing, is_publish=True)
    status = (reply.headers or {}).get("Status")
    if status == _NO_RESPONDERS or (status is None and not reply.data):
        return DestinationMissing(
            f"no stream listens on the subject {subject!r}",
            remedy="set create_stream with stream, or create one with this subject",
        )
    return Outage(f"{doing}: the server's answer can't be read, status {status}")


def _fail_denied(flight: Flight, denied: Sequence[str]) -> None:
    """Fail what the server refused to take: no acknowledgement will come.

    The server names the subject; the client library gives its words in lower case.
    """
    for text in denied:
        for index in flight.in_flight():
            if f'publish to "{flight.messages[index].subject.lower()}"' in text:
                flight.fail(index, of_server_text(text, "publishing"))
