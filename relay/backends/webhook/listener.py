"""HTTP servers that several receivers share: one for each address, while somebody wants it.

A listener reads requests under bounds of time and size, finds the receiver of the path and gives
its answer, everything in JSON. What it refuses before reading a body ends the connection.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from relay.backends.webhook.options import WebhookSourceOptions
from relay.endpoint import address_of, parse_address
from relay.errors import ConfigurationError
from relay.network import listening
from relay.tls import server_context_of

if TYPE_CHECKING:
    from relay.backends.webhook.source import WebhookSource

HEADERS_TIMEOUT_S = 10.0
BODY_TIMEOUT_S = 30.0
RETRY_AFTER_S = 1

_KEY = "source.listen_addr"
_TAKEN = (
    "end what listens there, or choose another port; relays of one host need one each, such as"
    " ${env:RELAY_HOOK_PORT}"
)
_KEEP_IDLE_S = 75.0
_LINGER_S = 1.0
_CLOSE_TIMEOUT_S = 1.0
_TLS_HANDSHAKE_S = 10.0
_BACKLOG_CONNECTIONS = 1024
# Well below what a process may usually open, of which the database needs its share.
_MOST_CONNECTIONS = 800

# What a refusal is counted under; an answer itself says more.
_REASONS: Mapping[int, str] = {
    400: "malformed",
    401: "unauthorized",
    404: "unknown_path",
    405: "method",
    408: "too_slow",
    413: "too_large",
    415: "unsupported",
    503: "unavailable",
}

_HEADERS = {"Server": "pgtrickle-relay", "Content-Type": "application/json"}

_log = logging.getLogger(__name__)
# The server's own log would tell of every client that goes away.
_SILENT = logging.getLogger(f"{__name__}.server")
_SILENT.disabled = True


class Answer(msgspec.Struct, frozen=True):
    """What a sender is told: a status, and either how many messages were taken or why none."""

    status: int
    accepted: int | None = None
    reason: str = ""
    headers: Mapping[str, str] = {}


class Listener:
    """A server on one address, with a receiver for each path. Use `attach` and `detach`."""

    def __init__(self, addr: str, tls_keys: tuple[str | None, ...]) -> None:
        self.addr = addr
        self.tls_keys = tls_keys
        self._receivers: dict[str, WebhookSource] = {}
        self._left: set[str] = set()
        # Connections that have not sent the headers of a request yet, each with its time's end.
        self._silent: dict[web.RequestHandler, asyncio.TimerHandle] = {}
        self._web: web.Server | None = None
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        """``host:port`` as it was bound."""
        if self._server is None or not self._server.sockets:
            return self.addr
        host, port = self._server.sockets[0].getsockname()[:2]
        return address_of(host, port)

    @property
    def is_listening(self) -> bool:
        """True while connections are accepted."""
        return self._server is not None and self._server.is_serving()

    @property
    def is_deserted(self) -> bool:
        """True when no receiver is left."""
        return not self._receivers

    async def open(self, options: WebhookSourceOptions) -> None:
        """Listen. Raises `ConfigurationError`, `Outage`."""
        host, port = parse_address(self.addr, _KEY)
        context = server_context_of(options, "source") if options.tls_cert else None
        handler = web.Server(
            self._handle,
            logger=_SILENT,
            access_log=None,
            keepalive_timeout=_KEEP_IDLE_S,
            lingering_time=_LINGER_S,
            auto_decompress=False,
        )
        with listening(f"{_KEY} {self.addr}", _TAKEN):
            self._server = await asyncio.get_running_loop().create_server(
                functools.partial(self._accept, handler),
                host,
                port,
                ssl=context,
                backlog=_BACKLOG_CONNECTIONS,
                ssl_handshake_timeout=None if context is None else _TLS_HANDSHAKE_S,
            )
        self._web = handler

    def add(self, path: str, receiver: WebhookSource) -> None:
        """Serve this path. Raises `ConfigurationError` where somebody else does."""
        if self._receivers.get(path, receiver) is not receiver:
            raise ConfigurationError(
                f"source.path {path} of {self.addr} belongs to another pipeline of this relay",
                remedy="give each pipeline a path of its own",
            )
        self._receivers[path] = receiver
        self._left.discard(path)

    def remove(self, path: str) -> None:
        """Serve this path no more; its senders are told to come again as long as we listen."""
        if self._receivers.pop(path, None) is not None:
            self._left.add(path)

    async def aclose(self) -> None:
        """Stop listening; answers that are in flight get a second."""
        server, self._server = self._server, None
        handler, self._web = self._web, None
        if server is not None:
            server.close()
        for silence in self._silent.values():
            silence.cancel()
        self._silent.clear()
        if handler is not None:
            # Whoever was just told how it ends is still writing the answer.
            await asyncio.sleep(0)
            handler.pre_shutdown()
            await handler.shutdown(_CLOSE_TIMEOUT_S)

    def _accept(self, handler: web.Server) -> asyncio.Protocol:
        if len(handler.connections) >= _MOST_CONNECTIONS:
            return _Refusal()
        connection = handler()
        self._silent[connection] = asyncio.get_running_loop().call_later(
            HEADERS_TIMEOUT_S, self._drop_silent, connection
        )
        return connection

    def _drop_silent(self, connection: web.RequestHandler) -> None:
        """The server itself bounds only the wait between requests."""
        del self._silent[connection]
        connection.force_close()

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        silence = self._silent.pop(request.protocol, None)
        if silence is not None:
            silence.cancel()
        try:
            answer = await self._answer(request)
        except Exception as error:  # noqa: BLE001 - a mistake of ours is an answer, too
            _log.debug("a request could not be answered", exc_info=error)
            answer = Answer(500, reason="internal error")
        if answer.status != 200:
            addressed = self._receivers.get(request.path)
            for receiver in self._receivers.values() if addressed is None else (addressed,):
                receiver.refused(answer.status, _REASONS.get(answer.status, "internal"))
        response = web.Response(
            body=_body_of(answer.accepted, answer.reason),
            status=answer.status,
            headers={**_HEADERS, **answer.headers},
        )
        if not request.content.at_eof():
            response.force_close()
        return response

    async def _answer(self, request: web.BaseRequest) -> Answer:
        path = request.path
        receiver = self._receivers.get(path)
        if receiver is None:
            if path in self._left:
                return unavailable("this receiver is stopping")
            return Answer(404, reason="no receiver has this path")
        if request.method != "POST":
            return Answer(405, reason="send a POST", headers={"Allow": "POST"})
        raw = dict(request.headers)
        headers = {name.lower(): value for name, value in raw.items()}
        limit = receiver.max_body_bytes
        size = limit if request.content_length is None else request.content_length
        if size > limit:
            return _too_large(limit)
        refused = receiver.admit(headers, size)
        if refused is not None:
            return refused
        try:
            if headers.get("expect", "").lower() == "100-continue":
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                # It is no part of the answer.
                request.writer.output_size = 0
            try:
                # Mostly it came together with its headers, and nothing is to be waited for.
                is_whole = request.content.is_eof()
                body = request.content.read_nowait() if is_whole else await _read(request, limit)
            except TimeoutError:
                return Answer(408, reason=f"the body took more than {BODY_TIMEOUT_S:g} s")
            except (web.RequestPayloadError, ConnectionError):
                return Answer(400, reason="the body ended too early")
            if body is None or len(body) > limit:
                return _too_large(limit)
            # A body in chunks does not say its size: there was room kept for the largest.
            receiver.release(size - len(body))
            size = len(body)
            return await receiver.receive(headers, raw, body)
        finally:
            receiver.release(size)


class _Refusal(asyncio.Protocol):
    """Ends a connection as soon as it is made."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


class _Listeners:
    """The listeners of one event loop, by address."""

    def __init__(self) -> None:
        self.by_addr: dict[str, Listener] = {}
        self.changing = asyncio.Lock()


# A port belongs to the process, so what listens on it is found by all pipelines of the process.
_LISTENERS: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Listeners] = (
    weakref.WeakKeyDictionary()
)


async def attach(options: WebhookSourceOptions, receiver: WebhookSource) -> Listener:
    """Serve the receiver under its address and path, together with what is there already.

    Raises `ConfigurationError` where the address, the path or the TLS keys do not allow it.
    """
    listeners = _LISTENERS.setdefault(asyncio.get_running_loop(), _Listeners())
    tls_keys = (options.tls_ca, options.tls_cert, options.tls_key)
    async with listeners.changing:
        listener = listeners.by_addr.get(options.listen_addr)
        if listener is not None and listener.tls_keys != tls_keys:
            raise ConfigurationError(
                f"source.listen_addr {options.listen_addr} is shared with a pipeline that has other"
                " TLS keys",
                remedy="use the same tls_ca, tls_cert and tls_key, or another address",
            )
        if listener is None:
            listener = Listener(options.listen_addr, tls_keys)
            await listener.open(options)
            # Each use of port 0 means a port of its own.
            if parse_address(options.listen_addr, _KEY)[1] != 0:
                listeners.by_addr[options.listen_addr] = listener
        listener.add(options.path, receiver)
        return listener


async def detach(listener: Listener, path: str) -> None:
    """Serve the path no more; where it was the last one, stop listening."""
    listeners = _LISTENERS.setdefault(asyncio.get_running_loop(), _Listeners())
    # Now: whoever is cut off while it waits for its turn does not come again.
    listener.remove(path)
    async with listeners.changing:
        if not listener.is_deserted:
            return
        if listeners.by_addr.get(listener.addr) is listener:
            del listeners.by_addr[listener.addr]
        await listener.aclose()


def unavailable(reason: str) -> Answer:
    """Told to a sender who should come again soon."""
    return Answer(503, reason=reason, headers={"Retry-After": str(RETRY_AFTER_S)})


def _too_large(limit: int) -> Answer:
    return Answer(413, reason=f"the body has more than {limit} bytes")


@functools.lru_cache(maxsize=256)
def _body_of(accepted: int | None, reason: str) -> bytes:
    if accepted is None:
        return msgspec.json.encode({"error": reason})
    return msgspec.json.encode({"accepted": accepted})


async def _read(request: web.BaseRequest, limit: int) -> bytes | None:
    """The body, None where it is larger than the limit. Raises `TimeoutError`."""
    chunks: list[bytes] = []
    size = 0
    async with asyncio.timeout(BODY_TIMEOUT_S):
        async for chunk in request.content.iter_any():
            size += len(chunk)
            if size > limit:
                return None
            chunks.append(chunk)
    return b"".join(chunks)
