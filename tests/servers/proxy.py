"""A TCP proxy between the relay and a server, to break the network on purpose.

`cut` breaks every connection and refuses new ones, `stall` keeps connections open but moves
no byte, `half_close` ends one direction only, `restore` makes everything normal again.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from tests.servers.finding import LOOPBACK

Direction = Literal["to_server", "to_client"]

_CHUNK_BYTES = 65536
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class _Connection:
    """One client's way through the proxy."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None

    def writer(self, direction: Direction) -> asyncio.StreamWriter | None:
        return self.server if direction == "to_server" else self.client

    def close(self) -> None:
        """End both sides in order: what was written still arrives."""
        for writer in self._writers():
            writer.close()

    def reset(self) -> None:
        """End both sides with a TCP reset, as a broken network does."""
        for writer in self._writers():
            peer: socket.socket | None = writer.get_extra_info("socket")
            if peer is not None and not writer.transport.is_closing():
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()

    def _writers(self) -> list[asyncio.StreamWriter]:
        return [writer for writer in (self.client, self.server) if writer is not None]


@dataclass(eq=False)
class TcpProxy:
    """Forwards one listening port on loopback to `host:port` until it is told to misbehave."""

    host: str
    port: int
    listen_port: int = 0
    bytes_forwarded: dict[Direction, int] = field(
        default_factory=lambda: {"to_server": 0, "to_client": 0}
    )
    _connections: set[_Connection] = field(default_factory=set)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _cut_after: dict[Direction, int] = field(default_factory=dict)
    _swallowed: set[Direction] = field(default_factory=set)
    _listener: socket.socket | None = None
    _unserved: set[socket.socket] = field(default_factory=set)

    @property
    def address(self) -> str:
        """`host:port` for clients; the same before and after a cut."""
        return f"{LOOPBACK}:{self.listen_port}"

    def url(self, upstream: str) -> str:
        """The given URL of the server, leading through this proxy instead."""
        parts = urlsplit(upstream)
        credentials, at, _ = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{credentials}{at}{self.address}"))

    @property
    def open_connections(self) -> int:
        """How many clients are connected now."""
        return len(self._connections)

    async def start(self) -> None:
        """Listen on a free port of loopback."""
        self._flowing.set()
        self._listen()

    async def cut(self) -> None:
        """Reset every connection and refuse new ones until `restore`."""
        await self._stop_listening()
        await self._abort_connections()

    async def reset_connections(self) -> None:
        """Reset every connection once; clients may connect again at once."""
        await self._abort_connections()

    def cut_after(self, count: int, direction: Direction) -> None:
        """Cut as soon as `count` more bytes went in that direction, in the middle of whatever."""
        self._cut_after[direction] = self.bytes_forwarded[direction] + count

    def stall(self) -> None:
        """Move no more bytes; connections stay open and new ones are accepted."""
        self._flowing.clear()

    def swallow(self, direction: Direction) -> None:
        """Throw away what goes in that direction until `restore`; the other one flows."""
        self._swallowed.add(direction)

    def half_close(self, direction: Direction) -> None:
        """End that direction of every open connection; the other one stays."""
        for connection in self._connections:
            writer = connection.writer(direction)
            if writer is not None and writer.can_write_eof():
                writer.write_eof()

    async def restore(self) -> None:
        """Forward again: end a stall, forget a planned cut, accept connections."""
        self._cut_after.clear()
        self._swallowed.clear()
        self._flowing.set()
        if self._listener is None:
            self._listen()

    async def wait_for_connections(self, count: int, *, timeout_s: float = 10.0) -> None:
        """Wait until exactly `count` clients are connected; TimeoutError after `timeout_s`."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: len(self._connections) == count)

    async def wait_until_cut(self, *, timeout_s: float = 10.0) -> None:
        """Wait until the proxy refuses connections; TimeoutError after `timeout_s`."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: self._listener is None)

    async def aclose(self) -> None:
        """Cut and wait until every task of the proxy has ended."""
        await self.cut()
        # A connection may have been accepted in the moment in which the listener closed.
        while self._tasks:
            await self._abort_connections()
        # A reset socket is closed by the loop's next turns, of which there may be no more.
        for _ in range(3):
            await asyncio.sleep(0)

    def _listen(self) -> None:
        # asyncio's own server leaks a connection that is accepted while it closes.
        self._listener = socket.create_server((LOOPBACK, self.listen_port), backlog=100)
        self._listener.setblocking(False)
        self.listen_port = self._listener.getsockname()[1]
        asyncio.get_running_loop().add_reader(self._listener, self._accept, self._listener)

    async def _stop_listening(self) -> None:
        listener, self._listener = self._listener, None
        if listener is not None:
            asyncio.get_running_loop().remove_reader(listener)
            listener.close()
        async with self._changed:
            self._changed.notify_all()

    async def _abort_connections(self) -> None:
        for connection in list(self._connections):
            connection.reset()
        # A stalled pump is not reading, so that it would not see the abort.
        for task in list(self._tasks):
            if task is not asyncio.current_task():
                task.cancel()
        others = self._tasks - {asyncio.current_task()}
        if others:
            await asyncio.wait(others)

    def _accept(self, listener: socket.socket) -> None:
        try:
            client, _ = listener.accept()
        except OSError:
            # It went away again.
            return
        self._unserved.add(client)
        task = asyncio.create_task(self._serve(client), name=f"proxy {self.address}")
        self._tasks.add(task)

        def ended(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            # A task that is cancelled before its first step has closed nothing.
            if client in self._unserved:
                self._unserved.remove(client)
                client.close()

        task.add_done_callback(ended)

    async def _serve(self, client: socket.socket) -> None:
        self._unserved.remove(client)
        client.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=client)
        connection = _Connection(client=writer)
        self._connections.add(connection)
        is_cut_due = is_over = False
        try:
            await self._announce()
            await self._flowing.wait()
            server_reader, connection.server = await asyncio.open_connection(self.host, self.port)
            is_cut_due = await self._forward(connection, reader, server_reader)
            if not is_cut_due:
                connection.close()
                is_over = True
        except OSError:
            # The other side hears of it by the reset below.
            pass
        finally:
            if not is_over:
                connection.reset()
            self._connections.discard(connection)
        await self._announce()
        if is_cut_due:
            await self.cut()

    async def _forward(
        self,
        connection: _Connection,
        from_client: asyncio.StreamReader,
        from_server: asyncio.StreamReader,
    ) -> bool:
        """Move bytes both ways until both ends are closed; True when a planned cut is due."""
        pumps = {
            asyncio.create_task(self._pump(connection, from_client, "to_server")),
            asyncio.create_task(self._pump(connection, from_server, "to_client")),
        }
        try:
            while pumps:
                done, pumps = await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                if any(pump.result() for pump in done):
                    return True
            return False
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(
        self, connection: _Connection, reader: asyncio.StreamReader, direction: Direction
    ) -> bool:
        writer = connection.writer(direction)
        assert writer is not None
        while True:
            chunk = await reader.read(_CHUNK_BYTES)
            await self._flowing.wait()
            if direction in self._swallowed:
                continue
            limit = self._cut_after.get(direction)
            if limit is not None:
                chunk = chunk[: max(0, limit - self.bytes_forwarded[direction])]
            if chunk:
                writer.write(chunk)
                await writer.drain()
                self.bytes_forwarded[direction] += len(chunk)
            if limit is not None and self.bytes_forwarded[direction] >= limit:
                return True
            if not chunk:
                writer.write_eof()
                return False

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()


@contextlib.asynccontextmanager
async def proxied(host: str, port: int) -> AsyncIterator[TcpProxy]:
    """A started proxy in front of `host:port`, closed at the end."""
    proxy = TcpProxy(host, port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.aclose()
