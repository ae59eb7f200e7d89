"""A real little HTTP server that does what a test tells it, and remembers what it was sent."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import aiohttp
from aiohttp import web

from tests.servers.finding import LOOPBACK


@dataclass(frozen=True)
class Received:
    """One request whose body was read to its end. Header names as they were spelled."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    def header(self, name: str) -> str | None:
        """A header by its name in any case."""
        return next((v for k, v in self.headers.items() if k.lower() == name.lower()), None)


@dataclass(frozen=True)
class Reply:
    """What happens to a request.

    ``after``: the answer waits for this event. ``cut``: the connection is reset instead of the
    answer, in the middle of its body, or the body never ends.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    after: asyncio.Event | None = None
    cut: Literal["", "before the answer", "in the answer", "never ends"] = ""


OK = Reply()


@dataclass(eq=False)
class HttpServer:
    """Runs in the test's own event loop; `stop` and `start` keep its port.

    ``replies`` are used up first, one for each request; then ``judge`` decides. ``accepted`` has
    the requests that it decided to answer 2xx, whether or not the answer arrived.
    """

    tls: ssl.SSLContext | None = None
    port: int = 0
    judge: Callable[[Received], Reply] = lambda _: OK
    replies: deque[Reply] = field(default_factory=deque)
    received: list[Received] = field(default_factory=list)
    accepted: list[Received] = field(default_factory=list)
    most_at_once: int = 0
    _at_once: int = 0
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _server: asyncio.Server | None = None
    _web: web.Server | None = None

    @property
    def version(self) -> str:
        return f"aiohttp {aiohttp.__version__}"

    @property
    def url(self) -> str:
        """Its address, with a path."""
        scheme = "http" if self.tls is None else "https"
        return f"{scheme}://{LOOPBACK}:{self.port}/hook"

    async def start(self) -> None:
        """Listen, on the same port as before."""
        self._web = web.Server(self._handle, access_log=None)
        self._server = await asyncio.get_running_loop().create_server(
            self._web, LOOPBACK, self.port, ssl=self.tls
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End every connection and refuse new ones."""
        server, self._server = self._server, None
        handler, self._web = self._web, None
        if server is not None:
            server.close()
        if handler is not None:
            for connection in handler.connections:
                if connection.transport is not None:
                    connection.transport.abort()
            await handler.shutdown(0.1)

    async def restart(self) -> None:
        """Stop and start."""
        await self.stop()
        await self.start()

    async def until_received(self, count: int, *, timeout_s: float = 10.0) -> None:
        """Wait until so many requests were received. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: len(self.received) >= count)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return await self._answer(request)
        except ConnectionError:
            # The client broke off: there is nobody to answer.
            return web.Response()
        finally:
            self._at_once -= 1

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        chunks = [chunk async for chunk in request.content.iter_any()]
        seen = Received(request.method, request.path, dict(request.headers), b"".join(chunks))
        reply = self.replies.popleft() if self.replies else self.judge(seen)
        self.received.append(seen)
        if 200 <= reply.status < 300:
            self.accepted.append(seen)
        async with self._changed:
            self._changed.notify_all()
        if reply.after is not None:
            await reply.after.wait()
        transport = request.transport
        if not reply.cut:
            return web.Response(status=reply.status, headers=reply.headers, body=reply.body)
        if reply.cut == "before the answer":
            if transport is not None:
                transport.abort()
            return web.Response()
        return await self._break(request, reply)

    async def _break(self, request: web.BaseRequest, reply: Reply) -> web.StreamResponse:
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            await response.write(b"{")
            while reply.cut == "never ends":
                await response.write(b" " * 1024)
                await asyncio.sleep(0)
        if request.transport is not None:
            request.transport.abort()
        return response


@contextlib.asynccontextmanager
async def running(tls: ssl.SSLContext | None = None) -> AsyncIterator[HttpServer]:
    """A started server, stopped at the end."""
    server = HttpServer(tls)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
