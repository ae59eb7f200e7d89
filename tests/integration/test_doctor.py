"""`doctor` and `status`: what does not move, why, and what to do, in one screen."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.integration.relay_surroundings import RelayWorld, StartProcess, relay_world, until
from tests.servers.finding import LOOPBACK, free_port
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess
from tests.status.emulator import Emulator

SECRET = "correct-horse"
SCREEN_LINES, SCREEN_COLUMNS = 50, 200


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        await world.insert(1, 10)
        yield world


async def asked(world: RelayWorld, *arguments: str, dsn: str | None = None) -> RelayProcess:
    """A command that answers and ends."""
    process = await world.relay(
        *arguments, dsn=dsn, is_awaited=False, environment={"RELAY_NATS_PASSWORD": SECRET}
    )
    await process.wait()
    assert SECRET not in process.output
    assert "Traceback" not in process.output
    return process


def found(process: RelayProcess, check: str) -> str:
    """The one line of a check."""
    (line,) = [line for line in process.stdout if line[2:].startswith(f"{check}: ")]
    return line


async def test_six_misconfigured_pipelines_are_six_causes_and_remedies_on_one_screen(
    world: RelayWorld,
    nats_server: NatsServer,
    nats_server_with: Callable[..., NatsServer],
) -> None:
    await world.run("select pgtrickle.create_inbox('received')")
    await world.run("alter table pgtrickle.received add check (payload ->> 'id' <> '7')")
    await world.forward("refused", {"type": "pg-inbox", "inbox": "received"})
    await asked(world, "drain", "relay.group_id=forgotten")
    await asked(world, "drain")
    closed = nats_server_with('authorization { user: "relay", password: "another" }')
    await world.forward(
        "password",
        {
            "type": "nats",
            "url": closed.url,
            "user": "relay",
            "password": "${env:RELAY_NATS_PASSWORD}",
        },
    )
    await world.forward("stream", {"type": "nats", "url": nats_server.url, "stream": "nowhere"})
    await world.forward("host", {"type": "nats", "url": f"nats://127.0.0.1:{free_port()}"})
    await world.to_file("template")
    await world.run(
        "update pgtrickle.relay_outbox_config set config ="
        " jsonb_set(config, '{sink,subject_template}', '\"{nope}\"') where name = 'template'"
    )

    doctor = await asked(world, "doctor")

    assert doctor.returncode == 1, doctor.output
    for check, cause, remedy in (
        ("pipeline password", "Authorization Violation", "correct user and password"),
        ("pipeline stream", "there is no stream 'nowhere'", "set create_stream"),
        ("pipeline host", "Connection refused", "start the server, or correct the address"),
        ("pipeline template", "unknown variable {nope}", "did you mean {op}?"),
    ):
        line = found(doctor, check)
        assert line.startswith("✗")
        assert cause in line.partition(" → ")[0]
        assert remedy in line.partition(" → ")[2]
    refused = found(doctor, "dead letters of refused")
    assert "violates check constraint" in refused
    assert "→ mend the cause, then select pgtrickle.relay_dlq_retry_all('refused')" in refused
    group = found(doctor, "relay group forgotten")
    assert "holds back outbox_orders" in group
    assert "select pgtrickle.relay_forget_group('forgotten')" in group
    assert found(doctor, "pipeline refused").startswith("✓")
    assert len(doctor.stdout) <= SCREEN_LINES
    assert all(line[0] in "✓✗" for line in doctor.stdout)


async def test_profiles_that_no_pipeline_uses_and_file_roots_are_looked_at(
    world: RelayWorld,
    nats_server: NatsServer,
    nats_server_with: Callable[..., NatsServer],
    tmp_path: Path,
) -> None:
    closed = nats_server_with('authorization { user: "relay", password: "another" }')
    credentials = "user: relay, password: '${env:RELAY_NATS_PASSWORD}'"
    absent = tmp_path / "absent"

    doctor = await asked(
        world,
        "doctor",
        f"++backends.right={{type: nats, url: '{nats_server.url}', ack_wait_seconds: 5}}",
        f"++backends.closed={{type: nats, url: '{closed.url}', {credentials}}}",
        f"++backends.away={{type: kafka, brokers: '127.0.0.1:{free_port()}'}}",
        "++backends.queues={type: sqs, region: eu-central-1}",
        f"secrets.file_roots=[{absent},{tmp_path}]",
        f"files.roots=[{tmp_path}]",
    )

    assert doctor.returncode == 1, doctor.output
    assert (
        found(doctor, "profile right") == "✓ profile right: connects; no enabled pipeline uses it"
    )
    assert "Authorization Violation" in found(doctor, "profile closed")
    assert "→ correct user and password" in found(doctor, "profile closed")
    assert "→ start the server, or correct the address" in found(doctor, "profile away")
    assert found(doctor, "profile queues").startswith("✓ profile queues: not connected")
    missing, there = [line for line in doctor.stdout if "secrets.file_roots: " in line]
    assert f"{absent} is no directory that the relay may read → make it" in missing
    assert there == f"✓ secrets.file_roots: {tmp_path}"
    assert found(doctor, "files.roots") == f"✓ files.roots: {tmp_path}"
    assert found(doctor, "extras").startswith("✓")


async def test_a_well_fleet_is_all_marks_and_exit_0(world: RelayWorld) -> None:
    await world.to_file("out")
    running = await world.relay("relay.worker_id=first")
    await running.wait_for_log("running")
    await until(
        lambda: world.value(
            "select report #>> '{pipelines,0,state}' = 'running' from pgtrickle.relay_fleet()"
        )
    )

    await world.run("call pgtrickle.backfill('orders')")

    doctor = await asked(world, "doctor", "--json")
    status = await asked(world, "status")

    diagnosis = json.loads(doctor.stdout[0])
    assert (doctor.returncode, diagnosis["is_well"]) == (0, True), doctor.output
    assert set(diagnosis) == {"version", "is_well", "checks"}
    assert {frozenset(check) for check in diagnosis["checks"]} == {
        frozenset({"check", "is_ok", "found", "remedy"})
    }
    checks = {check["check"]: check["found"] for check in diagnosis["checks"]}
    assert "running in first" in checks["pipeline out"]
    assert "postgres.url from PGTRICKLE_RELAY_POSTGRES_URL" in checks["settings"]
    assert status.returncode == 0, status.output
    rows = await world.value("select count(*) from orders")
    assert status.stdout[-1].startswith(f"backfill of orders to all: finished, {rows} rows sent")


async def test_seeks_backfills_that_stand_still_and_partitions_without_keys_are_shown(
    world: RelayWorld,
) -> None:
    await world.to_file("out")
    await world.run("call pgtrickle.backfill('orders')")
    await world.run("call pgtrickle.backfill('orders', 'out')")
    await world.run("create table keyless (a int); select pgtrickle.enable_outbox('keyless')")
    for table in ("keyless", "orders"):
        await world.forward(f"{table}-dealt", {"type": "stdout"}, table=table, partitions=2)
    last = await world.value("select max(id) from pgtrickle.outbox_orders")
    await world.run("select pgtrickle.relay_seek('out', 2)")
    await world.run(
        "update pgtrickle.relay_backfills set finished_at = null,"
        " progressed_at = now() - '1 min'::interval,"
        " updated_at = case when pipeline is null then now() else now() - '1 min'::interval end"
    )

    doctor = await asked(world, "doctor")
    answer = json.loads((await asked(world, "status", "--json")).stdout[0])

    stuck = found(doctor, "backfill of orders to all")
    interrupted = found(doctor, "backfill of orders to out")
    assert (stuck[0], interrupted[0]) == ("✗", "✗")
    assert "no progress for 6" in stuck
    assert "→ its next row is locked: end the session that select pg_blocking_pids(" in stuck
    assert "→ call backfill with the same arguments" in interrupted
    (keys,) = [line for line in doctor.stdout if "keys of" in line]
    assert keys.startswith("✗ keys of keyless-dealt: it has several readers")
    assert [one["state"] for one in answer["backfills"]] == ["stuck", "interrupted"]
    (seek,) = answer["seeks"]
    assert (seek["pipeline"], seek["reached_id"], seek["through_id"]) == ("out", 1, last)


async def test_what_pauses_or_is_not_run_keeps_its_lag_in_status(world: RelayWorld) -> None:
    await world.to_file("idle")
    await world.to_file("off")
    await world.run("select pgtrickle.disable_relay('off')")

    table = await asked(world, "status")
    answer = await asked(world, "status", "--json")
    doctor = await asked(world, "doctor")

    assert (table.returncode, answer.returncode) == (1, 1)
    idle, off = json.loads(answer.stdout[0])["pipelines"]
    assert (idle["name"], idle["state"], idle["lag_rows"]) == ("idle", "waiting", 10)
    assert idle["trouble"] == "no relay of the group runs it"
    assert (off["name"], off["state"], off["lag_rows"], off["trouble"]) == ("off", "paused", 10, "")
    assert (off["outbox"], off["dead_letters"]) == ("outbox_orders", 0)
    assert off["outbox_bytes"] > 0
    assert off["oldest_unsent_age_s"] >= 0
    assert [line.split()[0] for line in table.stdout] == ["pipeline", "idle", "off"]
    assert "no relay of the group runs it" in table.stdout[1]
    held = found(doctor, "paused pipeline off")
    assert "holds back 10 rows of outbox_orders" in held
    assert "→ select pgtrickle.enable_relay('off')" in held


async def test_a_database_out_of_reach_is_one_cross(world: RelayWorld) -> None:
    process = await world.relay(
        "doctor", dsn=f"postgresql://u:{SECRET}@127.0.0.1:{free_port()}/d", is_awaited=False
    )
    await process.wait()

    assert process.returncode == 1
    assert "Connection refused → start the server" in found(process, "database")
    assert SECRET not in process.output


async def test_schema_capture_and_a_new_group_are_looked_at(world: RelayWorld) -> None:
    await world.to_file("out")
    await asked(world, "drain", "relay.group_id=other")
    await world.run("grant create on schema pgtrickle to relay_member")
    await world.run("alter table orders disable trigger user")

    doctor = await asked(world, "doctor")

    assert "revoke create on schema pgtrickle from relay_member" in found(doctor, "schema")
    assert "would deliver everything again; others have positions: other" in found(doctor, "group")
    capture = [line for line in doctor.stdout if line.startswith("✗ capture: ")]
    assert capture
    assert all("is disabled" in line and "repair_outbox" in line for line in capture)


async def test_a_name_can_not_command_the_terminal(world: RelayWorld) -> None:
    await world.to_file("red")
    await world.run("update pgtrickle.relay_outbox_config set name = E'red\\x1b[31m'")

    for command in ("status", "doctor", "validate"):
        assert "\x1b" not in "\n".join((await asked(world, command)).stdout)


async def test_in_a_terminal_the_fleet_is_shown_live_and_leaving_stops_no_relay(
    world: RelayWorld,
) -> None:
    await world.to_file("out")
    await world.to_file("off")
    await world.run("select pgtrickle.disable_relay('off')")
    running = await world.relay("relay.worker_id=first")
    await running.wait_for_log("running")
    terminal = Emulator(
        "relay",
        ["status"],
        columns=120,
        lines=30,
        environment={"PGTRICKLE_RELAY_POSTGRES_URL": world.member_dsn},
    )

    try:
        await asyncio.to_thread(
            terminal.until, lambda screen: bool(re.search(r"off .*paused.* 10 ", screen))
        )
        await asyncio.to_thread(terminal.until_shown, "out", "running")
        terminal.type("q")
        assert await asyncio.to_thread(terminal.wait) == 0
    finally:
        terminal.close()
    assert running.returncode is None


async def test_one_relay_is_asked_without_the_database_and_a_view_of_it_says_when_it_is_old(
    world: RelayWorld,
) -> None:
    await world.to_file("out")
    running = await world.relay("relay.worker_id=first")
    await running.wait_for_log("running")
    where = ("status", "--relay", f"{LOOPBACK}:{running.metrics_port}")
    nowhere = f"postgresql://{LOOPBACK}:{free_port()}/d"

    table = await asked(world, *where, dsn=nowhere)
    answer = await asked(world, *where, "--json", dsn=nowhere)
    fleet = json.loads((await asked(world, "status", "--json")).stdout[0])

    assert (table.returncode, answer.returncode) == (0, 0), table.output
    assert table.stdout[1].split()[:6] == ["out", "outbox", "->", "file", "running", "first"]
    seen = json.loads(answer.stdout[0])
    assert (seen.keys(), seen["relays"], seen["trouble"]) == (fleet.keys(), ["first"], "")
    assert seen["pipelines"][0].keys() == fleet["pipelines"][0].keys()

    terminal = Emulator("relay", where, columns=100, lines=24)
    try:
        await asyncio.to_thread(terminal.until_shown, "out", "running", "all well")
        terminal.type("py")
        await asyncio.to_thread(terminal.until_shown, "select disable_relay('out')")
        await running.kill()
        await asyncio.to_thread(terminal.until_shown, "not refreshed since", "no relay answers")
        terminal.type("q")
        assert await asyncio.to_thread(terminal.wait) == 0
    finally:
        terminal.close()
    gone = await asked(world, *where, dsn=nowhere)
    assert gone.returncode == 3, gone.output
    assert "no relay answers at" in gone.stderr[0]


async def test_a_paused_pipeline_keeps_its_lag_in_the_view_of_a_relay(world: RelayWorld) -> None:
    await world.to_file("out")
    await world.to_file("off")
    await world.run("select pgtrickle.disable_relay('off')")
    terminal = Emulator(
        "relay",
        ["+env=test", "ui=tui"],
        columns=120,
        lines=30,
        environment={"PGTRICKLE_RELAY_POSTGRES_URL": world.member_dsn},
    )

    try:
        await asyncio.to_thread(
            terminal.until, lambda screen: bool(re.search(r"off .*paused.* 10 ", screen))
        )
    finally:
        terminal.close()
