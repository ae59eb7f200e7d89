"""One connection to a Redis server, over redis-py, for many commands at a time.

The client library does what it does well: the handshake, TLS, authentication and reading answers.
Its pipelines and pools are not used: they reconnect and repeat behind the back of the loop, which
has to decide what is repeated, and in which order; and packing a command costs them more than all
else. Of many answers only those that are waited for come through its coroutine; what has arrived
with them is taken straight from its parser. A connection that is lost, or given up in the middle
of an answer, stays lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from redis._parsers.hiredis import NOT_ENOUGH_DATA, _AsyncHiredisParser
from redis.asyncio import Connection as Driver
from redis.exceptions import ConnectionError as ServerGone
from redis.exceptions import NoPermissionError, ResponseError

from relay.backends.redis.errors import mapped, of_reply
from relay.backends.redis.options import Endpoint, RedisConnectionOptions, endpoint_of
from relay.errors import ConfigurationError, NotConnected, RelayError

Reply: TypeAlias = "bytes | int | ResponseError | list[Reply] | None"

_CLOSE_TIMEOUT_S = 2.0
_HEALTH_TIMEOUT_S = 2.0
_NAME_UNSAFE = re.compile(r"[^!-~]")


class _TlsDriver(Driver):
    """redis-py's connection over TLS with a context of our own: the library's trusts more."""

    def __init__(self, context: ssl.SSLContext, **arguments: object) -> None:
        super().__init__(**arguments)  # type: ignore[arg-type]  # passed on as they came
        self._context = context

    def _connection_arguments(self) -> Mapping[str, object]:
        return {**super()._connection_arguments(), "ssl": self._context}


class Connection:
    """An open connection. Safe to use from several tasks, which are served in their order."""

    def __init__(self, driver: Driver, endpoint: Endpoint, timeout_s: float) -> None:
        self._driver = driver
        self._endpoint = endpoint
        self._timeout_s = timeout_s
        # Who asks keeps the first until it is its turn to read: of all that is asked meanwhile,
        # the answers come in the same order.
        self._asking = asyncio.Lock()
        self._reading = asyncio.Lock()
        self._loss: RelayError | None = None

    @property
    def loss(self) -> RelayError | None:
        """Why the connection is gone, None while it stands."""
        return self._loss

    @property
    def address(self) -> str:
        """``host:port`` of the server."""
        return self._endpoint.address

    async def ask(self, doing: str, *command: bytes, wait_s: float = 0.0) -> Reply:
        """Send one command and read its answer, which may take ``wait_s`` by design.

        Raises `Outage` when the connection is lost, and what an answer that is an error says.
        """
        (reply,) = await self.ask_all(doing, pack(*command), 1, wait_s=wait_s)
        if isinstance(reply, ResponseError):
            raise of_reply(reply, doing)
        return reply

    async def ask_all(
        self, doing: str, packed: bytes, answers: int, *, wait_s: float = 0.0
    ) -> list[Reply]:
        """Send packed commands in one go and read all answers, errors among them as they are.

        The commands are sent while the answers to others are still being read. Raises `Outage`:
        then, as after a cancellation, nothing is known of any command, and the connection is lost.
        """
        replies: list[Reply] = []
        async with contextlib.AsyncExitStack() as reading:
            async with self._asking:
                self._refuse_lost()
                with self._giving_up(doing), mapped(doing):
                    async with asyncio.timeout(self._timeout_s):
                        await self._driver.send_packed_command([packed], check_health=False)
                    await reading.enter_async_context(self._reading)
            self._refuse_lost()
            with self._giving_up(doing), mapped(doing):
                async with asyncio.timeout(self._timeout_s + wait_s):
                    while len(replies) < answers:
                        replies.append(await self._read())
                        self._take_arrived(replies, answers)
        return replies

    def _refuse_lost(self) -> None:
        if self._loss is not None:
            raise self._loss

    async def is_healthy(self) -> bool:
        """True when the server answers now."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await self.greet()
        except (RelayError, TimeoutError):
            return False
        return True

    async def greet(self) -> None:
        """See that the server serves us. Raises what keeps it from that."""
        doing = f"greeting Redis at {self.address}"
        (reply,) = await self.ask_all(doing, pack(b"PING"), 1)
        # Who may do little may still be all that is needed.
        if isinstance(reply, ResponseError) and not isinstance(reply, NoPermissionError):
            raise of_reply(reply, doing)

    async def facts(self, *command: bytes) -> Reply:
        """The answer to a command that the user may not be allowed to give; None where not."""
        (reply,) = await self.ask_all(f"asking Redis at {self.address}", pack(*command), 1)
        return None if isinstance(reply, ResponseError) else reply

    async def aclose(self) -> None:
        """Close; never raises, and takes no longer than the bound."""
        self._lost(NotConnected("the connection is closed"))
        await _disconnect(self._driver)

    async def _read(self) -> Reply:
        try:
            reply: Reply = await self._driver.read_response(disable_decoding=True)
        except ResponseError as error:
            return error
        return reply

    def _take_arrived(self, replies: list[Reply], answers: int) -> None:
        """Take what has arrived whole by now, without the library's coroutines for each."""
        parser = self._driver._parser  # noqa: SLF001 - a seam, see the module
        if not isinstance(parser, _AsyncHiredisParser):
            return
        # The library types its reader as the None that it is until it is connected.
        gets: Callable[[bool], Reply] = parser._reader.gets  # type: ignore[attr-defined]  # noqa: SLF001
        while len(replies) < answers:
            reply = gets(False)
            if reply is NOT_ENOUGH_DATA:
                return
            if isinstance(reply, ServerGone):
                raise reply
            replies.append(reply)

    @contextlib.contextmanager
    def _giving_up(self, doing: str) -> Iterator[None]:
        """An exchange that did not end leaves answers behind that belong to no later command."""
        try:
            yield
        except RelayError as error:
            self._lost(error)
            raise
        except BaseException:
            self._lost(NotConnected(f"{doing} was broken off"))
            raise

    def _lost(self, reason: RelayError) -> None:
        if self._loss is None:
            self._loss = reason


async def connect(options: RedisConnectionOptions, *, name: str, path: str) -> Connection:
    """Connect and see that the server serves us.

    Raises `Outage`, `AuthenticationRefused` or `ConfigurationError`.
    """
    endpoint = endpoint_of(options, path)
    timeout_s = options.timeout_ms / 1000
    arguments = {
        "host": endpoint.host,
        "port": endpoint.port,
        "db": endpoint.db,
        "username": endpoint.username,
        "password": endpoint.password,
        "protocol": 2,
        # Waiting is bounded here, over a whole exchange and not by answer.
        "socket_timeout": None,
        "socket_connect_timeout": timeout_s,
    }
    driver = (
        _TlsDriver(_tls_context(options, path), **arguments)
        if endpoint.is_tls
        else Driver(**arguments)  # type: ignore[arg-type]  # one mapping for both
    )
    connection = Connection(driver, endpoint, timeout_s)
    try:
        with mapped(f"connecting to Redis at {endpoint.address}"):
            async with asyncio.timeout(timeout_s):
                await driver.connect()  # type: ignore[no-untyped-call]  # untyped in the library
        await connection.greet()
        await connection.facts(b"CLIENT", b"SETNAME", _NAME_UNSAFE.sub("_", name).encode())
    except BaseException:
        await connection.aclose()
        raise
    return connection


def pack(*command: bytes) -> bytes:
    """One command as the protocol spells it."""
    return b"*%d\r\n%b" % (len(command), b"".join(map(pack_one, command)))


def pack_one(argument: bytes) -> bytes:
    """One argument of a command."""
    return b"$%d\r\n%b\r\n" % (len(argument), argument)


def rows(reply: Reply) -> Sequence[Reply]:
    """The items of an answer; none where there is no list."""
    return reply if isinstance(reply, list) else ()


async def _disconnect(driver: Driver) -> None:
    """Close in order, or let go when a stalled peer does not let us."""
    try:
        async with asyncio.timeout(_CLOSE_TIMEOUT_S):
            await driver.disconnect()
    except Exception:  # noqa: BLE001 - whatever the library meets while closing, the socket goes
        await driver.disconnect(nowait=True)


def _tls_context(options: RedisConnectionOptions, path: str) -> ssl.SSLContext:
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
