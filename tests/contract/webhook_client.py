"""What the tests of the webhook sink and source share: what arrived, and a sender that repeats."""

from __future__ import annotations

import asyncio
import bisect
import errno
import inspect
import socket
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx
import msgspec

from relay.backends.webhook import WebhookSink, WebhookSource
from relay.backends.webhook.header import RESERVED, SUBJECT, encode, without
from relay.backends.webhook.listener import Answer
from relay.escape import headers_from
from relay.message import RelayMessage
from relay.wire import HTTP, encoder, restore
from tests.contract.evidence import PAUSE_S
from tests.contract.surroundings import backend_context
from tests.servers.finding import LOOPBACK
from tests.servers.http import Received

PATH = "/hooks/orders"

Headers = Sequence[tuple[bytes, bytes]]


def sink_of(url: str, ordering: str | None = None, /, **keys: object) -> WebhookSink:
    """A sink with these keys, not connected."""
    return WebhookSink.from_options(
        {"type": "webhook", "url": url, **keys}, backend_context(ordering=ordering)
    )


def source_of(
    addr: str = f"{LOOPBACK}:0", *, batch_size: int = 100, **keys: object
) -> WebhookSource:
    """A source with these keys, not connected."""
    return WebhookSource.from_options(
        {"type": "webhook", "listen_addr": addr, "path": PATH, **keys},
        backend_context(direction="reverse", batch_size=batch_size),
    )


def restored(requests: Iterable[Received]) -> list[RelayMessage]:
    """All messages of requests of ours, in order, as a consumer gets them."""
    messages: list[RelayMessage] = []
    for request in requests:
        headers = headers_from(without(request.headers, RESERVED))
        subject = headers.pop(SUBJECT, "")
        is_array = request.header(HTTP.dedup_key) is None
        bodies = (
            [bytes(raw) for raw in msgspec.json.decode(request.body, type=list[msgspec.Raw])]
            if is_array
            else [request.body]
        )
        for body in bodies:
            message = restore(body, headers, HTTP)
            assert message is not None
            messages.append(
                message if message.subject else msgspec.structs.replace(message, subject=subject)
            )
    return messages


def driver_exceptions() -> Iterable[Exception]:
    """One instance of every exception class of the HTTP client, TLS and the network."""
    for _, member in inspect.getmembers(httpx, inspect.isclass):
        if issubclass(member, Exception):
            yield _instance(member)
    yield from (TimeoutError(), ConnectionResetError(), OSError("no route"), EOFError())
    yield from (ssl.SSLError(1, "broken"), ssl.SSLCertVerificationError(1, "unknown"))
    yield from (ssl.SSLEOFError(8, "ended"), socket.gaierror(-2, "no such name"))


def listening_exceptions() -> Iterable[Exception]:
    """What the operating system and TLS can have against a server."""
    yield from (OSError(number, name) for number, name in errno.errorcode.items())
    yield from (OSError(), socket.gaierror(-2, "no such name"), ssl.SSLError(1, "broken"))


def _instance(kind: type[Exception]) -> Exception:
    if issubclass(kind, httpx.HTTPStatusError):
        request = httpx.Request("POST", "http://localhost")
        return kind("something", request=request, response=httpx.Response(500, request=request))
    parameters = list(inspect.signature(kind).parameters.values())
    return kind(
        *(
            "something"
            for one in parameters
            if one.kind is one.POSITIONAL_OR_KEYWORD and one.default is one.empty
        )
    )


def host_of(url: str) -> tuple[str, int]:
    """Host and port of a URL."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


@dataclass
class Answered:
    """A raw answer: status, headers by lower-case name, the JSON body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def error(self) -> str:
        return msgspec.json.decode(self.body, type=dict[str, str])["error"]


async def call(
    addr: str,
    body: bytes,
    headers: Headers = (),
    *,
    method: str = "POST",
    path: str = PATH,
    tls: ssl.SSLContext | None = None,
) -> Answered:
    """Send one request on a connection of its own and read the answer. Raises OSError."""
    host, _, port = addr.rpartition(":")
    reader, writer = await asyncio.open_connection(
        host, int(port), ssl=tls, server_hostname=None if tls is None else host
    )
    try:
        writer.write(request_bytes(body, headers, method=method, path=path))
        return await read_answer(reader)
    finally:
        writer.transport.abort()


def request_bytes(
    body: bytes, headers: Headers = (), *, method: str = "POST", path: str = PATH
) -> bytes:
    """A whole request as it stands on the wire."""
    lines = [
        b"%b %b HTTP/1.1" % (method.encode(), path.encode()),
        b"Host: localhost",
        b"Connection: close",
        b"Content-Length: %d" % len(body),
        *(b"%b: %b" % header for header in headers),
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


async def read_answer(reader: asyncio.StreamReader) -> Answered:
    """The answer to a request. Raises ConnectionError where there is none."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
    except asyncio.IncompleteReadError as error:
        raise ConnectionResetError("no answer") from error
    status, *lines = head.strip().split("\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Answered(int(status.split(" ")[1]), headers, body)


def request_of(message: RelayMessage, format_: str = "envelope") -> tuple[bytes, Headers]:
    """Body and headers with which our own sink sends one message by itself."""
    encoded = encoder(format_, HTTP)(message)
    return encoded.body, encode({**encoded.headers, SUBJECT: message.subject})


class ObservedSource(WebhookSource):
    """Says when it has taken a request in: from here to its queue nothing else can happen."""

    arrivals: asyncio.Event | None = None

    async def receive(
        self, headers: Mapping[str, str], raw: Mapping[str, str], body: bytes
    ) -> Answer:
        if self.arrivals is not None:
            self.arrivals.set()
        return await super().receive(headers, raw, body)


@dataclass(order=True)
class _Outgoing:
    number: int
    body: bytes = field(compare=False)
    headers: Headers = field(compare=False)


class Sender:
    """Keeps what it has to send until it is answered 200, and sends it again otherwise.

    One request for each event, each begun when the one before has reached the receiver, so that
    they arrive in order; it waits for no answer. What was refused goes out again before anything
    newer.
    """

    def __init__(self, addr: str, arrivals: asyncio.Event) -> None:
        self._addr = addr
        self._arrivals = arrivals
        self._pending: list[_Outgoing] = []
        self._in_flight: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._count = 0
        self._has_failed = False

    def add(self, body: bytes, headers: Headers) -> None:
        """Send this, sooner or later."""
        self._pending.append(_Outgoing(self._count, body, headers))
        self._count += 1
        self._wake.set()

    async def run(self) -> None:
        """Send for ever, until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await self._send_next(tasks)
        finally:
            self._in_flight.clear()

    async def _send_next(self, tasks: asyncio.TaskGroup) -> None:
        if not self._pending:
            self._wake.clear()
            await self._wake.wait()
            return
        if self._has_failed:
            # What else was refused is on its way back and has to go first.
            self._has_failed = False
            await asyncio.wait(
                self._in_flight or {tasks.create_task(asyncio.sleep(0))}, timeout=PAUSE_S
            )
            return
        self._arrivals.clear()
        task = tasks.create_task(self._send(self._pending.pop(0)))
        self._in_flight.add(task)
        task.add_done_callback(self._in_flight.discard)
        arrival = tasks.create_task(self._arrivals.wait())
        await asyncio.wait({task, arrival}, return_when=asyncio.FIRST_COMPLETED)
        arrival.cancel()

    async def _send(self, outgoing: _Outgoing) -> None:
        try:
            is_taken = (await call(self._addr, outgoing.body, outgoing.headers)).status == 200
        except OSError:
            await asyncio.sleep(PAUSE_S)
            is_taken = False
        if not is_taken:
            bisect.insort(self._pending, outgoing)
            self._has_failed = True
            self._wake.set()
