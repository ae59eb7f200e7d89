"""One connection to a NATS server, over nats-py, for many messages at a time.

A connection that is lost stays lost: the library's own reconnecting would buffer and replay
publishes behind the back of the loop, which has to decide what is repeated, and in which order.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from nats.aio.client import Client, RawCredentials
from nats.aio.subscription import Subscription
from nats.errors import Error as ClientError
from nats.js.api import StreamInfo
from nats.js.errors import APIError
from nats.js.manager import JetStreamManager

from relay.backends.nats.errors import mapped, of_exception, of_server_text
from relay.backends.nats.headers import parse
from relay.backends.nats.options import NatsConnectionOptions, servers_of
from relay.endpoint import Endpoint
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    NotConnected,
    Outage,
    RelayError,
    TimedOut,
)
from relay.message import text_of
from relay.tls import context_of

_REQUEST_TIMEOUT_S = 5
_ANSWER_TIMEOUT_S = 10
_CLOSE_TIMEOUT_S = 2.0
# A TLS handshake that failed is never reported as closed.
_ABORT_TIMEOUT_S = 0.1
_HEALTH_TIMEOUT_S = 2.0
_PING_INTERVAL_S = 20
# By then the library itself has given up a server that does not answer its pings.
_PONG_TIMEOUT_S = 4 * _PING_INTERVAL_S

T = TypeVar("T")


class Received(msgspec.Struct, frozen=True, gc=False):
    """A message as it arrived; ``headers`` are those on the wire, None without."""

    subject: str
    reply: str
    data: bytes
    headers: dict[str, str] | None


class LineClient(Client):
    """nats-py's client with its seams, which are here and nowhere else.

    ``_transport``: `publish` checks, formats and queues each message by itself, at a third of the
    speed; lines that were made in bulk are written to the transport as they are.
    ``_process_info``: the library begins TLS only where the server demands it, and would otherwise
    send the credentials in the clear.
    ``_process_headers``, ``_build_message``: at a subject that is not UTF-8, or a header block that
    is none, the library stops reading for good, and again after each reconnect. A server takes
    both from anybody.
    """

    def __init__(self, *, is_tls_wanted: bool) -> None:
        super().__init__()
        self._is_tls_wanted = is_tls_wanted

    async def send(self, lines: Iterable[bytes]) -> None:
        """Send complete lines of the protocol; waits while the server takes them too slowly."""
        if self._transport is None or not self.is_connected:
            raise NotConnected("the connection to NATS was lost")
        self._transport.write(b"".join(lines))
        await self._transport.drain()  # type: ignore[no-untyped-call]  # untyped in the library

    def abort(self) -> None:
        """Drop the connection without another word; what is not yet sent is thrown away."""
        writer = getattr(self._transport, "_io_writer", None)
        if writer is not None:
            writer.transport.abort()

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection and self._is_tls_wanted and not info.get("tls_required"):
            if not info.get("tls_available"):
                raise ConfigurationError(
                    "TLS is asked for, but the server offers none",
                    remedy="enable TLS on the server, or leave out tls",
                )
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    async def _process_headers(self, headers: bytes | None) -> dict[str, str] | None:
        return parse(headers) if headers else None

    def _build_message(
        self, _: int, subject: bytes, reply: bytes, data: bytes, headers: dict[str, str] | None
    ) -> Received:
        return Received(text_of(subject), reply.decode(), data, headers)


class Connection:
    """An open connection. Safe to use from several tasks; ends for good when it is lost.

    ``manager``: the client's JetStream manager, to be used through `ask`.
    """

    def __init__(self, client: LineClient, address: str) -> None:
        self.client = client
        self.address = address
        self._loss: RelayError | None = None
        self._trouble: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._asked: set[asyncio.Task[Any]] = set()
        self.denied: list[str] = []
        self.reported_last: Exception | None = None
        self.on_trouble: Callable[[], None] = lambda: None
        self.manager = JetStreamManager(client, timeout=_REQUEST_TIMEOUT_S)

    @property
    def loss(self) -> RelayError | None:
        """Why the connection is gone, None while it stands."""
        if self._loss is None and not self.client.is_connected:
            self._loss = NotConnected(f"the connection to {self.address} was lost")
        return self._loss

    async def subscribe(
        self, subject: str, handler: Callable[[Received], Awaitable[None]]
    ) -> Subscription:
        """Hand every message on the subject to the handler, in order.

        A permission that is missing for it fails what is asked next.
        Nothing is dropped, however much waits: what can arrive is limited by what was asked for.
        """
        with mapped(f"subscribing at {self.address}"):
            return await self.client.subscribe(
                subject,
                cb=handler,  # type: ignore[arg-type]  # it gets what `_build_message` makes
                pending_msgs_limit=0,
                pending_bytes_limit=0,
            )

    async def send(self, lines: Iterable[bytes], *, timeout_s: float) -> None:
        """Send complete lines of the protocol. Raises `Outage`, also when it takes too long."""
        with mapped("sending to NATS"):
            async with asyncio.timeout(timeout_s):
                await self.client.send(lines)

    async def ask(self, request: Coroutine[Any, Any, T], doing: str) -> T:
        """The result of a call of the client, which by itself would sit out a lost connection.

        A call that took too long is left to itself until the connection is closed: a late answer
        to a cancelled ping would end the client's reading. Raises `Outage`, `ConfigurationError`.
        """
        if self.loss is not None:
            request.close()
            raise self.loss
        asked = asyncio.ensure_future(request)
        self._asked.add(asked)
        asked.add_done_callback(self._forget)
        denied_before = len(self.denied)
        either: set[asyncio.Future[Any]] = {asked, self._trouble}
        await asyncio.wait(either, timeout=_ANSWER_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if len(self.denied) > denied_before:
            raise of_server_text(self.denied[-1], doing)
        if asked.done():
            with mapped(doing):
                return asked.result()
        if self._loss is None:
            self.abort(TimedOut(f"{doing}: no answer in time"))
        raise self._loss or NotConnected(doing)

    async def streams_on(self, subject: str) -> list[StreamInfo]:
        """The streams that listen on a subject or on a part of a filter.

        Asked here because the client's manager finds only one. Raises what `ask` does, and
        `Outage` where one of them does not answer.
        """
        doing = f"looking for a stream on {subject!r}"
        body = msgspec.json.encode({"subject": subject})
        request = self.client.request("$JS.API.STREAM.LIST", body, timeout=_REQUEST_TIMEOUT_S)
        found = msgspec.json.decode((await self.ask(request, doing)).data)
        with mapped(doing):
            if "error" in found:
                raise APIError.from_error(found["error"])
        if missing := found.get("missing"):
            # It is there, but its servers are away, or are choosing a leader.
            raise Outage(f"{doing}: the stream {missing[0]!r} does not answer")
        return [StreamInfo.from_response(one) for one in found["streams"] or ()]

    async def stream_info(self, name: str) -> StreamInfo:
        """The stream of that name. Raises `DestinationMissing`, and what `ask` does."""
        return await self.ask(self.manager.stream_info(name), f"looking for the stream {name!r}")

    async def is_healthy(self) -> bool:
        """True when the server answers a ping now."""
        with contextlib.suppress(RelayError, TimeoutError):
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await self.ask(self.client.rtt(timeout=_PONG_TIMEOUT_S), "asking for a pong")
                return True
        return False

    def abort(self, reason: RelayError) -> None:
        """Drop the connection at once: what is unsettled stays unknown."""
        self._loss = self._loss or reason
        self.client.abort()
        self._raise_alarm()

    async def aclose(self, *, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Close, by force when a stalled peer does not let us; never raises."""
        self._loss = self._loss or NotConnected("the connection is closed")
        try:
            async with asyncio.timeout(timeout_s):
                await self.client.close()
        except Exception:  # noqa: BLE001 - whatever the library meets while closing, the socket goes
            self.client.abort()
        for asked in self._asked:
            asked.cancel()
        await asyncio.gather(*self._asked, return_exceptions=True)

    async def reported(self, error: Exception) -> None:
        """What the library reports on the side."""
        self.reported_last = error
        if "permissions violation" in str(error).lower():
            self.denied.append(str(error))
            self._raise_alarm()

    async def lost(self) -> None:
        """The library gave the connection up."""
        doing = f"the connection to {self.address} was lost"
        cause = self.client.last_error or NotConnected(doing)
        self._loss = self._loss or of_exception(cause, doing) or NotConnected(doing)
        self._raise_alarm()

    def _raise_alarm(self) -> None:
        """Wake all who wait for an answer."""
        if not self._trouble.done():
            self._trouble.set_result(None)
        if self._loss is None:
            self._trouble = asyncio.get_running_loop().create_future()
        self.on_trouble()

    def _forget(self, asked: asyncio.Task[Any]) -> None:
        self._asked.discard(asked)
        if not asked.cancelled():
            asked.exception()


def standing(connection: Connection | None) -> Connection:
    """The connection. Raises why there is none."""
    if connection is None:
        raise NotConnected("not connected to NATS")
    if connection.loss is not None:
        raise connection.loss
    return connection


async def connect(options: NatsConnectionOptions, *, name: str, path: str) -> Connection:
    """Connect to one of the servers, in random order.

    Raises the last server's error when none is reachable: `Outage`, `AuthenticationRefused` or
    `ConfigurationError`.
    """
    servers = list(servers_of(options.url, path))
    random.shuffle(servers)
    context = None
    if options.wants_tls or any(server.is_tls for server in servers):
        context = context_of(options, path)
    for server in servers[1:]:
        with contextlib.suppress(RelayError):
            return await _connect_to(server, options, context, name=name, path=path)
    return await _connect_to(servers[0], options, context, name=name, path=path)


async def _connect_to(
    server: Endpoint,
    options: NatsConnectionOptions,
    context: ssl.SSLContext | None,
    *,
    name: str,
    path: str,
) -> Connection:
    client = LineClient(is_tls_wanted=context is not None)
    connection = Connection(client, server.address)
    doing = f"connecting to NATS at {server.address}"
    try:
        with mapped(doing):
            try:
                async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                    await client.connect(
                        [f"nats://{server.address}"],
                        name=name,
                        allow_reconnect=False,
                        max_reconnect_attempts=1,
                        reconnect_time_wait=0,
                        connect_timeout=_REQUEST_TIMEOUT_S,
                        ping_interval=_PING_INTERVAL_S,
                        tls=context,
                        tls_hostname=server.host,
                        error_cb=connection.reported,
                        closed_cb=connection.lost,
                        **_authentication(options, server, path),
                    )
            except ClientError:
                # Why a server can't be reached the client says to its error callback only.
                raise connection.reported_last or NotConnected(doing) from None
            if not client.is_connected:
                raise NotConnected(f"{doing}: the server ended the handshake")
    except BaseException:
        client.abort()
        await connection.aclose(timeout_s=_ABORT_TIMEOUT_S)
        raise
    return connection


def _authentication(
    options: NatsConnectionOptions, server: Endpoint, path: str
) -> Mapping[str, Any]:
    if options.creds_file is not None:
        return {"user_credentials": RawCredentials(_credentials(options.creds_file, path))}
    if options.nkey_seed is not None:
        return {"nkeys_seed_str": _checked_seed(options.nkey_seed, path)}
    if options.token is not None:
        return {"token": options.token}
    if options.user is not None:
        return {"user": options.user, "password": options.password}
    if server.username is not None and server.password is None:
        return {"token": server.username}
    return {"user": server.username, "password": server.password}


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
