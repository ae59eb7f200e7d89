"""The proxy breaks the network in the ways that the crash tests need."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.servers.proxy import TcpProxy, proxied


@pytest.fixture
async def echo_port() -> AsyncIterator[int]:
    """A server that sends back what it gets and says goodbye when the client ends."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(65536):
                writer.write(chunk)
                await writer.drain()
            writer.write(b"bye")
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()


@pytest.fixture
async def proxy(echo_port: int) -> AsyncIterator[TcpProxy]:
    async with proxied("127.0.0.1", echo_port) as started:
        yield started


Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[[TcpProxy], Awaitable[Client]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Connects to a proxy; every connection is closed after the test."""
    writers: list[asyncio.StreamWriter] = []

    async def open_connection(proxy: TcpProxy) -> Client:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.listen_port)
        writers.append(writer)
        return reader, writer

    yield open_connection
    for writer in writers:
        writer.transport.abort()
    # An aborted transport closes its socket in the loop's next round.
    await asyncio.sleep(0)


async def echoed(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes
) -> bytes:
    writer.write(message)
    async with asyncio.timeout(5):
        return await reader.readexactly(len(message))


async def test_bytes_pass_unchanged_in_both_directions(proxy: TcpProxy, connect: Connect) -> None:
    reader, writer = await connect(proxy)
    message = bytes(range(256)) * 4096

    answer = await echoed(reader, writer, message)

    assert answer == message
    assert proxy.bytes_forwarded == {"to_server": len(message), "to_client": len(message)}


async def test_the_end_of_the_client_reaches_the_server_and_its_last_words_come_back(
    proxy: TcpProxy,
    connect: Connect,
) -> None:
    reader, writer = await connect(proxy)

    writer.write_eof()

    assert await asyncio.wait_for(reader.read(), 5) == b"bye"


async def test_a_cut_breaks_connections_and_refuses_new_ones_until_restored(
    proxy: TcpProxy,
    connect: Connect,
) -> None:
    reader, writer = await connect(proxy)
    assert await echoed(reader, writer, b"before") == b"before"

    await proxy.cut()

    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 5)
    with pytest.raises(ConnectionRefusedError):
        await connect(proxy)
    await proxy.restore()
    reader, writer = await connect(proxy)
    assert await echoed(reader, writer, b"after") == b"after"


async def test_a_stall_holds_bytes_back_and_delivers_them_when_restored(
    proxy: TcpProxy, connect: Connect
) -> None:
    reader, writer = await connect(proxy)
    assert await echoed(reader, writer, b"before") == b"before"

    proxy.stall()
    writer.write(b"held")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(4), 0.1)

    await proxy.restore()
    assert await asyncio.wait_for(reader.readexactly(4), 5) == b"held"


async def test_a_stalled_connection_can_be_cut(proxy: TcpProxy, connect: Connect) -> None:
    reader, writer = await connect(proxy)
    assert await echoed(reader, writer, b"before") == b"before"
    proxy.stall()
    writer.write(b"held")

    await asyncio.wait_for(proxy.cut(), 5)

    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 5)


async def test_a_half_closed_server_gets_no_more_but_still_answers(
    proxy: TcpProxy, connect: Connect
) -> None:
    reader, writer = await connect(proxy)
    assert await echoed(reader, writer, b"before") == b"before"

    proxy.half_close("to_server")

    assert await asyncio.wait_for(reader.read(), 5) == b"bye"


async def test_a_half_closed_client_sees_the_end(proxy: TcpProxy, connect: Connect) -> None:
    reader, writer = await connect(proxy)
    assert await echoed(reader, writer, b"before") == b"before"

    proxy.half_close("to_client")

    assert await asyncio.wait_for(reader.read(), 5) == b""


async def test_a_planned_cut_lets_exactly_so_many_bytes_through(
    proxy: TcpProxy, connect: Connect
) -> None:
    reader, writer = await connect(proxy)
    assert await echoed(reader, writer, b"before") == b"before"

    proxy.cut_after(3, "to_client")
    writer.write(b"abcdef")
    await proxy.wait_until_cut()

    assert proxy.bytes_forwarded["to_client"] == len(b"before") + 3
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.readexactly(6), 5)
    with pytest.raises(ConnectionRefusedError):
        await connect(proxy)


async def test_connections_can_be_awaited(proxy: TcpProxy, connect: Connect) -> None:
    await connect(proxy)
    await connect(proxy)
    await proxy.wait_for_connections(2)

    await proxy.reset_connections()

    await proxy.wait_for_connections(0)


async def test_a_client_of_a_dead_server_is_reset(
    proxy: TcpProxy, connect: Connect, unused_tcp_port: int
) -> None:
    proxy.port = unused_tcp_port

    reader, _ = await connect(proxy)

    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 5)


async def test_a_url_leads_through_the_proxy_with_its_credentials_and_path(
    proxy: TcpProxy,
) -> None:
    url = proxy.url("postgresql://user:secret@db.example.org:5432/shop?sslmode=disable")

    expected = f"postgresql://user:secret@127.0.0.1:{proxy.listen_port}/shop?sslmode=disable"
    assert url == expected
