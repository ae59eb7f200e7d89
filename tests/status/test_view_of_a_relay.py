"""The view over a relay at work, which goes on when its view can't."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.integration.relay_surroundings import RelayWorld, StartProcess, events_of, relay_world
from tests.servers.postgres import Database
from tests.status.emulator import Emulator

LEAVE_SCREEN = b"\x1b[?1049l"


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        yield world


@pytest.fixture
def terminal(world: RelayWorld) -> Iterator[Emulator]:
    """A relay with its view; its renderer fails once there is a file `fail`."""
    emulator = Emulator(
        "tests.status.failing_relay",
        [str(world.directory / "fail"), "+env=test", "ui=tui", f"files.roots=[{world.directory}]"],
        environment={"PGTRICKLE_RELAY_POSTGRES_URL": world.member_dsn},
    )
    yield emulator
    emulator.close()


async def test_details_have_dead_letters_and_no_secret_and_a_failing_view_does_not_stop_its_relay(
    world: RelayWorld, terminal: Emulator
) -> None:
    out = await world.to_file("out")
    secret = {"type": "webhook", "url": "https://u:hunter22@example.com/x"}
    await world.forward("paused", secret, allow_plaintext_secrets=True)
    await world.run("select pgtrickle.disable_relay('paused')")
    await world.run(
        "select pgtrickle.relay_dead_letter('default', 'out', 'forward', array['a', 'b'],"
        " array['s', 's'], array['1', '2'], array['insert', 'insert'], array['{}', '{}']::jsonb[],"
        " array['{}', '{}']::bytea[], array['{}', '{}']::jsonb[], array['rejected', 'rejected'],"
        " array['too old', 'too large'], array[1, 1])"
    )
    await asyncio.to_thread(terminal.until_shown, "out ", "running")
    terminal.type("\r")
    shown = await asyncio.to_thread(terminal.until_shown, "2 dead letters", "too large", "too old")
    assert shown.index("too large") < shown.index("too old")
    terminal.type("dt")
    await asyncio.to_thread(terminal.until_shown, "try dead letter 2 of out again?")
    terminal.type("y")
    await asyncio.to_thread(terminal.until_shown, "dead letter 2 of out is delivered", "too old")
    assert (out.read_text()).count("\n") == 1
    terminal.type("j")
    shown = await asyncio.to_thread(terminal.until_shown, "paused: p resumes it", "sink.url: ")
    assert "******" in shown
    assert b"hunter22" not in terminal.output

    (world.directory / "fail").touch()

    await asyncio.to_thread(terminal.until_shown, "the status view failed", "as asked")
    await world.insert(1, 3)
    await events_of(out, 3)
    terminal.signal(signal.SIGTERM)
    assert await asyncio.to_thread(terminal.wait) == 0
    assert terminal.attributes_after == terminal.attributes
    _, _, after = terminal.output.rpartition(LEAVE_SCREEN)
    assert after.count(b"the status view failed") == 1


async def test_a_terminal_that_goes_away_does_not_stop_its_relay(
    world: RelayWorld, terminal: Emulator
) -> None:
    out = await world.to_file("out")
    await asyncio.to_thread(terminal.until_shown, "out ", "running")

    terminal.hang_up()

    await world.insert(1, 3)
    await events_of(out, 3)
    terminal.signal(signal.SIGTERM)
    assert await asyncio.to_thread(terminal.wait, reads=False) == 0
