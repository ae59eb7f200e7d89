"""How a relay ends: gracefully, at once, too late, and with which exit code."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest

from tests.integration.relay_surroundings import (
    BOUND_S,
    NatsWorld,
    RelayWorld,
    StartProcess,
    nats_world,
    port_of,
    relay_world,
    until,
)
from tests.servers.finding import LOOPBACK, free_port
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess
from tests.servers.proxy import TcpProxy

Proxies = Callable[[str, int], Awaitable[TcpProxy]]


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        yield world


@pytest.fixture
async def stream(nats_server: NatsServer) -> AsyncIterator[NatsWorld]:
    async with nats_world(nats_server, "shutdown") as stream:
        yield stream


class _InFlight(msgspec.Struct):
    in_flight: int
    state: str


class _Status(msgspec.Struct):
    pipelines: list[_InFlight]


async def _until_status(
    world: RelayWorld, relay: RelayProcess, is_so: Callable[[_InFlight], bool]
) -> None:
    async def found() -> bool:
        status = msgspec.json.decode(await world.page(relay, "/status"), type=_Status)
        return any(is_so(pipeline) for pipeline in status.pipelines)

    await until(found)


async def _with_a_publish_that_hangs(
    world: RelayWorld, stream: NatsWorld, tcp_proxy: Proxies, *settings: str
) -> tuple[RelayProcess, TcpProxy]:
    """A relay that has sent ten events and hears nothing."""
    proxy = await tcp_proxy(LOOPBACK, port_of(stream.server.url))
    await world.forward("p", stream.sink(proxy.url(stream.server.url), ack_timeout_ms=60_000))
    relay = await world.relay(*settings)
    await world.until_state(relay, "p", "running")
    proxy.stall()
    async with world.owner.transaction():
        await world.insert(1, 10)
    await _until_status(world, relay, lambda pipeline: pipeline.in_flight == 10)
    return relay, proxy


async def test_a_terminated_relay_finishes_what_is_in_flight_and_exits_0(
    world: RelayWorld, stream: NatsWorld, tcp_proxy: Proxies
) -> None:
    relay, proxy = await _with_a_publish_that_hangs(world, stream, tcp_proxy)

    relay.send_signal(signal.SIGTERM)
    await _until_status(world, relay, lambda pipeline: pipeline.state == "stopping")
    assert relay.returncode is None
    await proxy.restore()

    assert await relay.wait() == 0, relay.output
    assert await stream.count() == 10
    assert await world.value("select last_change_id from pgtrickle.relay_consumer_offsets") == 10


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_second_signal_ends_it_at_once(
    world: RelayWorld,
    stream: NatsWorld,
    tcp_proxy: Proxies,
    number: signal.Signals,
    code: int,
) -> None:
    relay, _ = await _with_a_publish_that_hangs(world, stream, tcp_proxy)
    relay.send_signal(number)
    await _until_status(world, relay, lambda pipeline: pipeline.state == "stopping")

    relay.send_signal(number)

    assert await relay.wait(timeout_s=1.0) == code


async def test_a_sink_that_never_answers_makes_it_exit_1_in_time_and_loses_nothing(
    world: RelayWorld, stream: NatsWorld, tcp_proxy: Proxies
) -> None:
    relay, proxy = await _with_a_publish_that_hangs(
        world, stream, tcp_proxy, "relay.shutdown_timeout_s=1"
    )

    began = time.monotonic()
    code = await relay.terminate()

    assert code == 1, relay.output
    assert time.monotonic() - began < 5.0
    await proxy.restore()
    successor = await world.relay()
    await stream.until_holding(10)
    assert [event.id for event in await stream.events()] == list(range(1, 11))
    assert await successor.terminate() == 0


async def test_a_reader_that_does_not_read_does_not_keep_it_from_ending(world: RelayWorld) -> None:
    await world.forward("p", {"type": "stdout"})
    await world.run(
        "insert into orders (id, note) select n, repeat('x', 1000) from generate_series(1, 500) n"
    )
    template = await world.relay("--version", is_awaited=False)
    reader, writer = os.pipe()
    relay = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "relay", "+env=test", "relay.shutdown_timeout_s=1"),
        stdout=writer,
        stderr=asyncio.subprocess.DEVNULL,
        env=template.environment,
        cwd=world.directory,
    )
    try:
        await template.wait()
        await until(lambda: _is_full(writer))

        began = time.monotonic()
        relay.send_signal(signal.SIGTERM)
        async with asyncio.timeout(BOUND_S):
            code = await relay.wait()

        assert code == 1
        assert time.monotonic() - began < 6.0
    finally:
        if relay.returncode is None:
            relay.kill()
            await relay.wait()
        os.close(reader)
        os.close(writer)


async def _is_full(pipe: int) -> bool:
    """Whether a writer of this pipe would wait."""
    return not select.select([], [pipe], [], 0)[1]


async def test_a_database_that_is_not_there_is_exit_code_3(relay_process: StartProcess) -> None:
    relay = await relay_process(dsn=f"postgresql://nobody@{LOOPBACK}:{free_port()}/none")

    assert await relay.wait() == 3
    (line,) = relay.stderr
    assert line.startswith("pgtrickle-relay: PostgreSQL is out of reach")


async def test_a_database_without_the_catalog_is_exit_code_3_and_says_what_to_run(
    database: Database, relay_process: StartProcess
) -> None:
    relay = await relay_process(dsn=database.dsn)

    assert await relay.wait() == 3
    (line,) = relay.stderr
    assert "run `pgtrickle-relay migrate`" in line


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("relay.batch_sise=5",), "did you mean relay.batch_size?"),
        (("relay.batch_size=much",), "relay.batch_size"),
        (("+env=prodd",), "did you mean prod?"),
        (("drian",), "did you mean drain?"),
        (("--nope",), "--nope"),
    ],
)
async def test_wrong_settings_are_exit_code_2_and_one_line(
    relay_process: StartProcess, arguments: tuple[str, ...], says: str
) -> None:
    relay = await relay_process(*arguments, dsn="postgresql://nobody@127.0.0.1:1/none")

    assert await relay.wait() == 2
    (line,) = relay.stderr
    assert says in line


async def test_an_address_that_is_in_use_is_exit_code_2(
    migrated_database: Database, relay_process: StartProcess
) -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        relay = await relay_process(
            dsn=migrated_database.dsn,
            environment={"PGTRICKLE_RELAY_METRICS_ADDR": f"{LOOPBACK}:{port}"},
        )

        assert await relay.wait() == 2
        assert "the address is in use" in relay.stderr[-1]
