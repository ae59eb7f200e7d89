"""One connection to a Redis server, over redis-py, for many commands at a time.

The library connects, authenticates and parses. Its pools and pipelines are not used: they connect
again and repeat commands on their own, and the relay decides what is repeated, and in which order.
A connection that is lost, or left in the middle of an answer, stays lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator, Sequence
from typing import TypeAlias

from hiredis import pack_command
from redis.asyncio import Connection as Driver
from redis.asyncio import SSLConnection as TlsDriver
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, ResponseError

from relay.backends.redis.errors import mapped, of_reply
from relay.backends.redis.options import RedisConnectionOptions, endpoint_of
from relay.errors import NotConnected, RelayError
from relay.tls import context_of

Reply: TypeAlias = "bytes | int | ResponseError | list[Reply] | None"

_PROMPT_S = 2.0
_NAME_UNSAFE = re.compile(r"[^!-~]")


class Connection:
    """An open connection. Safe to use from several tasks, which are served in their order.

    ``address``: ``host:port`` of the server. ``loss``: why the connection is gone, None while it
    stands.
    """

    def __init__(self, driver: Driver, address: str, timeout_s: float) -> None:
        self.address = address
        self.loss: RelayError | None = None
        self._driver = driver
        self._timeout_s = timeout_s
        # Who sends keeps the first until it is its turn to read: answers come in the same order.
        self._sending = asyncio.Lock()
        self._reading = asyncio.Lock()

    async def ask(self, doing: str, *command: bytes, wait_s: float = 0.0) -> Reply:
        """Send one command and read its answer, which may take ``wait_s`` by design.

        Raises `Outage` when the connection is lost, and what an answer that is an error says.
        """
        (reply,) = await self.ask_all(doing, [pack(*command)], wait_s=wait_s)
        if isinstance(reply, ResponseError):
            raise of_reply(reply, doing)
        return reply

    async def ask_all(
        self, doing: str, commands: Sequence[bytes], *, wait_s: float = 0.0
    ) -> list[Reply]:
        """Send packed commands in one go and read an answer to each, errors among them as they are.

        The commands are sent while the answers to others are still being read. Raises `Outage`:
        then, as after a cancellation, nothing is known of any command, and the connection is lost.
        """
        replies: list[Reply] = []
        async with self._sending:
            with self._exchange(doing):
                async with asyncio.timeout(self._timeout_s):
                    await self._driver.send_packed_command([b"".join(commands)], check_health=False)
                await self._reading.acquire()
        try:
            with self._exchange(doing):
                read = self._driver.read_response
                async with asyncio.timeout(self._timeout_s + wait_s):
                    while len(replies) < len(commands):
                        try:
                            replies.append(await read(disable_decoding=True))
                        except ResponseError as error:
                            replies.append(error)
        finally:
            self._reading.release()
        return replies

    async def facts(self, *command: bytes) -> Reply:
        """The answer to a command that the user may not be allowed to give; None where not."""
        (reply,) = await self.ask_all(f"asking Redis at {self.address}", [pack(*command)])
        return None if isinstance(reply, ResponseError) else reply

    async def greet(self) -> None:
        """See that the server serves us. Raises what keeps it from that."""
        doing = f"greeting Redis at {self.address}"
        (reply,) = await self.ask_all(doing, [pack(b"PING")])
        # Who may do little may still be all that is needed.
        if isinstance(reply, ResponseError) and not isinstance(reply, NoPermissionError):
            raise of_reply(reply, doing)

    async def is_healthy(self) -> bool:
        """True when the server answers now."""
        with contextlib.suppress(RelayError, TimeoutError):
            async with asyncio.timeout(_PROMPT_S):
                await self.greet()
                return True
        return False

    async def aclose(self) -> None:
        """Close; never raises, and takes no longer than the bound."""
        self._lose(NotConnected("the connection is closed"))
        # Whatever the library meets while closing, the socket goes.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(_PROMPT_S):
                await self._driver.disconnect()

    @contextlib.contextmanager
    def _exchange(self, doing: str) -> Iterator[None]:
        """An exchange that did not end leaves answers behind that belong to no later command."""
        if self.loss is not None:
            raise self.loss
        try:
            with mapped(doing):
                yield
        except RelayError as error:
            self._lose(error)
            raise
        except BaseException:
            self._lose(NotConnected(f"{doing} was interrupted"))
            raise

    def _lose(self, reason: RelayError) -> None:
        self.loss = self.loss or reason


async def connect(options: RedisConnectionOptions, *, name: str, path: str) -> Connection:
    """Connect and see that the server serves us.

    Raises `Outage`, `AuthenticationRefused` or `ConfigurationError`.
    """
    endpoint, db = endpoint_of(options, path)
    driver = (TlsDriver if endpoint.is_tls else Driver)(
        host=endpoint.host,
        port=endpoint.port,
        db=db,
        username=endpoint.username,
        password=endpoint.password,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        # Waiting is bounded here, over a whole exchange and not by answer.
        socket_timeout=None,
        socket_connect_timeout=options.timeout_ms / 1000,
    )
    if isinstance(driver, TlsDriver):
        # The library's own context trusts more than what tls_ca names.
        driver.ssl_context.context = context_of(options, path)
    connection = Connection(driver, endpoint.address, options.timeout_ms / 1000)
    try:
        with mapped(f"connecting to Redis at {endpoint.address}"):
            async with asyncio.timeout(options.timeout_ms / 1000):
                await driver.connect()  # type: ignore[no-untyped-call]  # untyped in the library
        await connection.greet()
        await connection.facts(b"CLIENT", b"SETNAME", _NAME_UNSAFE.sub("_", name).encode())
    except BaseException:
        await connection.aclose()
        raise
    return connection


def pack(*command: bytes | str) -> bytes:
    """One command as the protocol spells it. Raises `UnicodeEncodeError`."""
    packed: bytes = pack_command(command)  # type: ignore[arg-type]  # it takes any number
    return packed


def rows(reply: Reply) -> Sequence[Reply]:
    """The items of an answer; none where there is no list."""
    return reply if isinstance(reply, list) else ()
