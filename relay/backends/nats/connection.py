"""One connection to a NATS server, over nats-py, for many messages at a time.

The client library does what it does well: the handshake, TLS, authentication, pings and single
requests. For bulk work it makes a future, a message object and a queue entry per message, which
costs more than all else; so whole chunks of protocol lines are handed to its transport, and what
arrives for our own inboxes goes straight to a handler. The seams used are those of `_Client` and
`relay.backends.nats.frame`.

A connection that is lost stays lost: the library's own reconnecting would buffer and replay
publishes behind the back of the loop, which has to decide what is repeated, and in which order.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from nats.aio.client import Client, RawCredentials
from nats.aio.transport import TcpTransport
from nats.errors import Error as ClientError
from nats.errors import NoRespondersError

from relay.backends.nats.acceptance import Acceptances, Accepted
from relay.backends.nats.errors import (
    ApiError,
    mapped,
    of_exception,
    of_jetstream,
    of_server_text,
)
from relay.backends.nats.frame import FrameParser, Handler
from relay.backends.nats.options import NatsConnectionOptions, NatsServer, servers_of
from relay.errors import AuthenticationRefused, ConfigurationError, NotConnected, RelayError

CONNECT_TIMEOUT_S = 5
REQUEST_TIMEOUT_S = 5.0
_CLOSE_TIMEOUT_S = 2.0
# A TLS handshake that failed is never reported as closed.
_ABORT_TIMEOUT_S = 0.1
_HEALTH_TIMEOUT_S = 2.0
_PING_INTERVAL_S = 20

T = TypeVar("T")


class _Client(Client):
    """nats-py's client with its seams: what arrives, what is sent, and when TLS is begun."""

    def __init__(self, *, is_tls_wanted: bool) -> None:
        super().__init__()
        self._handlers: dict[int, Handler] = {}
        self._ps = self._parser = FrameParser(self, self._handlers)
        self._is_tls_wanted = is_tls_wanted

    def listen(self, subject: str, handler: Handler) -> int:
        self._sid += 1
        self._handlers[self._sid] = handler
        self.write(f"SUB {subject}  {self._sid}\r\n".encode())
        return self._sid

    def expect_acceptances(self, prefix: str, sid: int, accepted: Accepted) -> None:
        self._parser.acceptances = Acceptances(prefix, sid, accepted)

    def unlisten(self, sid: int) -> None:
        """Ask the server to send no more; what is on its way still goes to the handler."""
        self.write(f"UNSUB {sid}\r\n".encode())

    def forget(self, sid: int) -> None:
        self._handlers.pop(sid, None)

    def write(self, chunk: bytes) -> None:
        if self._transport is None or not self.is_connected:
            raise NotConnected("the connection to NATS was lost")
        self._transport.write(chunk)

    async def drain_writes(self) -> None:
        if self._transport is not None:
            await self._transport.drain()  # type: ignore[no-untyped-call]  # untyped in the library

    def abort(self) -> None:
        """Drop the connection without another word."""
        writer = getattr(self._transport, "_io_writer", None)
        if isinstance(self._transport, TcpTransport) and writer is not None:
            writer.transport.abort()

    async def _process_msg(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes
    ) -> None:
        handler = self._handlers.get(sid)
        if handler is None:
            await super()._process_msg(sid, subject, reply, data, headers)
        else:
            handler(subject, reply, data, headers)

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # The library begins TLS only when the server demands it, and would otherwise send the
        # credentials in the clear.
        if initial_connection and self._is_tls_wanted and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise ConfigurationError(
                    "TLS is asked for, but the server offers none",
                    remedy="enable TLS on the server, or leave out tls",
                )
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)


class Connection:
    """An open connection. Safe to use from several tasks; ends for good when it is lost."""

    def __init__(self, client: _Client, server: NatsServer) -> None:
        self._client = client
        self._server = server
        self._troubled = asyncio.Event()
        self._loss: RelayError | None = None
        self.denied: list[str] = []
        self.on_trouble: Callable[[], None] = lambda: None

    @property
    def loss(self) -> RelayError | None:
        """Why the connection is gone, None while it stands."""
        if self._loss is None and not self._client.is_connected:
            self._loss = NotConnected(f"the connection to {self._server.address} was lost")
        return self._loss

    @property
    def max_payload(self) -> int:
        """The most bytes of headers and body together that the server takes in one message."""
        return self._client.max_payload

    @property
    def address(self) -> str:
        """``host:port`` of the server."""
        return self._server.address

    def new_inbox(self) -> str:
        """A subject of our own for replies."""
        return self._client.new_inbox()

    def listen(self, subject: str, handler: Handler) -> int:
        """Hand every message on the subject to the handler, at once and in order."""
        return self._client.listen(subject, handler)

    def listen_for_acceptances(self, prefix: str, handler: Handler, accepted: Accepted) -> None:
        """Hand what comes to ``prefix`` and a number to the handler; acceptances in bulk.

        For one prefix of a connection, to the end of it.
        """
        subscription = self._client.listen(f"{prefix}*", handler)
        self._client.expect_acceptances(prefix, subscription, accepted)

    async def unlisten(self, subscription: int) -> None:
        """End a subscription; when it returns, all that was under way has been handed over."""
        self._client.unlisten(subscription)
        try:
            await self.flush()
        finally:
            self._client.forget(subscription)

    def write(self, chunk: bytes) -> None:
        """Send complete protocol lines. Raises `NotConnected`."""
        self._client.write(chunk)

    async def drain(self, timeout_s: float) -> None:
        """Wait while the server takes our bytes more slowly than they come. Raises `Outage`."""
        with mapped("sending to NATS"):
            async with asyncio.timeout(timeout_s):
                await self._client.drain_writes()

    async def flush(self) -> None:
        """Return when the server has processed all that was written. Raises `Outage`."""
        with mapped("waiting for NATS"):
            await self._ask(self._client.flush(timeout=int(REQUEST_TIMEOUT_S)))

    async def request(self, subject: str, request: object, into: type[T], doing: str) -> T:
        """Ask the JetStream API. Raises what the answer says, and `Outage`."""
        body = b"" if request is None else msgspec.json.encode(request)
        with mapped(doing):
            try:
                reply = await self._ask(
                    self._client.request(subject, body, timeout=REQUEST_TIMEOUT_S)
                )
            except NoRespondersError:
                raise ConfigurationError(
                    f"{doing}: JetStream does not answer",
                    remedy="start the server with JetStream and enable it for this account",
                ) from None
            error = msgspec.json.decode(reply.data, type=_Answer).error
            if error is not None:
                raise of_jetstream(error, doing)
            return msgspec.json.decode(reply.data, type=into)

    async def is_healthy(self) -> bool:
        """True when the server answers a ping now."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await self.flush()
        except (RelayError, TimeoutError):
            return False
        return True

    def abort(self, reason: RelayError) -> None:
        """Drop the connection at once: what is unsettled stays unknown."""
        if self._loss is None:
            self._loss = reason
        self._client.abort()
        self._trouble()

    async def aclose(self) -> None:
        """Close; never raises, and takes no longer than the bound."""
        if self._loss is None:
            self._loss = NotConnected("the connection is closed")
        await _closed(self._client)

    async def reported(self, error: Exception) -> None:
        """What the library reports on the side."""
        if "permissions violation" in str(error).lower():
            self.denied.append(str(error))
            self._trouble()

    async def lost(self) -> None:
        """The library gave the connection up."""
        if self._loss is None:
            doing = f"the connection to {self._server.address} was lost"
            cause = self._client.last_error
            known = None if cause is None else of_exception(cause, doing)
            self._loss = known or NotConnected(doing)
        self._trouble()

    def _trouble(self) -> None:
        self._troubled.set()
        self.on_trouble()

    async def _ask(self, request: Coroutine[Any, Any, T]) -> T:
        """Await a request of the library, which by itself would sit out a lost connection."""
        self._troubled.clear()
        denied_before = len(self.denied)
        if self.loss is not None:
            request.close()
            raise self.loss
        asking = asyncio.ensure_future(request)
        troubled = asyncio.ensure_future(self._troubled.wait())
        try:
            await asyncio.wait({asking, troubled}, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
        finally:
            asking.cancel()
            troubled.cancel()
            await asyncio.gather(asking, troubled, return_exceptions=True)
        if len(self.denied) > denied_before:
            raise of_server_text(self.denied[-1], "NATS refuses")
        raise self._loss or NotConnected(f"the connection to {self._server.address} was lost")


class _Answer(msgspec.Struct, frozen=True):
    error: ApiError | None = None


async def connect(options: NatsConnectionOptions, *, name: str, path: str) -> Connection:
    """Connect to one of the servers, in random order.

    Raises the last server's error when none is reachable: `Outage`, `AuthenticationRefused` or
    `ConfigurationError`.
    """
    servers = list(servers_of(options.url, path))
    random.shuffle(servers)
    context = _tls_context(options, path)
    for server in servers[:-1]:
        with contextlib.suppress(RelayError):
            return await _connect_to(server, options, context, name=name, path=path)
    return await _connect_to(servers[-1], options, context, name=name, path=path)


async def _connect_to(
    server: NatsServer,
    options: NatsConnectionOptions,
    context: ssl.SSLContext | None,
    *,
    name: str,
    path: str,
) -> Connection:
    client = _Client(is_tls_wanted=context is not None or server.is_tls)
    connection = Connection(client, server)
    reports: list[Exception] = []

    async def report(error: Exception) -> None:
        reports.append(error)
        await connection.reported(error)

    doing = f"connecting to NATS at {server.address}"
    try:
        with mapped(doing):
            try:
                async with asyncio.timeout(2 * CONNECT_TIMEOUT_S):
                    await client.connect(
                        [f"nats://{server.address}"],
                        name=name,
                        allow_reconnect=False,
                        max_reconnect_attempts=1,
                        reconnect_time_wait=0,
                        connect_timeout=CONNECT_TIMEOUT_S,
                        ping_interval=_PING_INTERVAL_S,
                        tls=context,
                        tls_hostname=server.host,
                        error_cb=report,
                        closed_cb=connection.lost,
                        **_authentication(options, server, path),
                    )
            except ClientError:
                # What keeps a server from being reached is reported on the side only.
                raise (reports[-1] if reports else NotConnected(doing)) from None
            if not client.is_connected:
                raise NotConnected(f"{doing}: the server ended the handshake")
            await client.flush(timeout=CONNECT_TIMEOUT_S)
    except BaseException:
        client.abort()
        await _closed(client, timeout_s=_ABORT_TIMEOUT_S)
        raise
    if connection.loss is not None:
        await _closed(client)
        raise connection.loss
    return connection


async def _closed(client: _Client, *, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
    """Close in order, or by force when a stalled peer does not let us."""
    try:
        async with asyncio.timeout(timeout_s):
            await client.close()
    except Exception:  # noqa: BLE001 - whatever the library meets while closing, the socket goes
        client.abort()


def _authentication(
    options: NatsConnectionOptions, server: NatsServer, path: str
) -> Mapping[str, Any]:
    if options.creds_file is not None:
        return {"user_credentials": RawCredentials(_credentials(options.creds_file, path))}
    if options.nkey_seed is not None:
        return {"nkeys_seed_str": _checked_seed(options.nkey_seed, path)}
    if options.token is not None:
        return {"token": options.token}
    if options.user is not None:
        return {"user": options.user, "password": options.password}
    if server.user is not None and server.password is None:
        return {"token": server.user}
    return {"user": server.user, "password": server.password}


def _credentials(file: str, path: str) -> str:
    try:
        text = Path(file).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{path}.creds_file {file} can't be read:"
            f" {getattr(error, 'strerror', None) or 'not text'}"
        ) from None
    # The library looks for these for ever.
    for marker in ("BEGIN NATS USER JWT", "BEGIN USER NKEY SEED"):
        if marker not in text:
            raise ConfigurationError(
                f"{path}.creds_file {file} has no line {marker!r}",
                remedy="it is the file that `nsc generate creds` writes",
            )
    seed = text.split("BEGIN USER NKEY SEED", 1)[1].split("\n")[1:2]
    _checked_seed(seed[0] if seed else "", path)
    return text


def _checked_seed(seed: str, path: str) -> str:
    import nkeys

    try:
        nkeys.from_seed(bytearray(seed.strip().encode())).wipe()
    except Exception:  # noqa: BLE001 - nkeys raises errors of several libraries, some with the seed
        raise AuthenticationRefused(f"{path}: the nkey seed is not a valid seed") from None
    return seed


def _tls_context(options: NatsConnectionOptions, path: str) -> ssl.SSLContext | None:
    is_wanted = options.tls or options.tls_insecure or options.tls_ca or options.tls_cert
    if not is_wanted and not any(server.is_tls for server in servers_of(options.url, path)):
        return None
    try:
        context = ssl.create_default_context(cafile=options.tls_ca)
        if options.tls_cert is not None:
            context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"{path}: the TLS files can't be used: {error.strerror or type(error).__name__}",
            remedy="tls_ca, tls_cert and tls_key are paths of PEM files",
        ) from None
    if options.tls_insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
