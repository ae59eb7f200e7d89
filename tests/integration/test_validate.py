"""`validate`: all findings at once, without a destination, and what would go out next."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.integration.relay_surroundings import RelayWorld, StartProcess, relay_world
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess

SECRET = "correct-horse"
AWAY = {"type": "nats", "url": "nats://127.0.0.1:1", "stream": "s"}


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        await world.insert(1, 5)
        yield world


async def asked(world: RelayWorld, *arguments: str) -> RelayProcess:
    process = await world.relay(
        "validate", *arguments, is_awaited=False, environment={"RELAY_SECRET": SECRET}
    )
    await process.wait()
    assert SECRET not in process.output
    assert "Traceback" not in process.output
    return process


async def test_all_findings_of_settings_and_overlays_are_told_and_exit_2(
    world: RelayWorld, tmp_path: Path
) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "ours.yaml").write_text("relay: {group_id: x}\n")

    answer = await asked(
        world,
        "relay.batch_size=0",
        "log.level=loud",
        "++relay.groop=x",
        "metrics.addr=9090",
        "--config-dir",
        str(tmp_path),
    )

    told = "\n".join(answer.stdout)
    assert answer.returncode == 2, answer.output
    for one in (
        "settings: relay.batch_size must be above 0",
        "settings: log.level: invalid enum value",
        "settings: relay.groop is not a known key (did you mean group_id?)",
        "overlay ours: ",
    ):
        assert one in told


async def test_all_findings_of_all_pipelines_are_told(world: RelayWorld) -> None:
    for name in ("good", "bad", "secret"):
        await world.forward(name, AWAY)
    await world.run(
        "update pgtrickle.relay_outbox_config set config = config ||"
        ' \'{"batch_size": 0, "colour": 1, "prefetch": 99}\' where name = \'bad\''
    )
    await world.run(
        "update pgtrickle.relay_outbox_config set config ="
        " jsonb_set(config, '{sink,token}', '\"${env:RELAY_ABSENT}\"') where name = 'secret'"
    )

    every = await asked(world)
    one = await asked(world, "good", "--json")
    none = await asked(world, "nope")

    assert every.returncode == 2, every.output
    told = "\n".join(every.stdout)
    assert "pipeline bad: colour is not a known key" in told
    assert "pipeline bad: batch_size must be from 1 to 100000, but is 0" in told
    assert "pipeline bad: prefetch must be from 0 to 8, but is 99" in told
    assert "pipeline secret: ${env:RELAY_ABSENT}: the environment has no such variable" in told
    assert "pipeline good" not in told
    assert (one.returncode, json.loads(one.stdout[0])) == (
        0,
        {"is_valid": True, "findings": [], "pipelines": ["good"], "samples": []},
    )
    assert none.returncode == 2
    assert "there is no pipeline nope" in none.stderr[0]


async def test_a_sample_shows_the_next_events_as_they_would_go_out_and_moves_nothing(
    world: RelayWorld,
) -> None:
    output = await world.to_file("out")
    await (await world.relay("drain", is_awaited=False)).wait()
    await world.insert(6, 9)
    await world.run("create table keyless (a int); select pgtrickle.enable_outbox('keyless')")
    await world.run("insert into keyless values (1)")
    await world.forward("dealt", {"type": "stdout"}, table="keyless", partitions=2)
    await world.forward("away", {**AWAY, "subject_template": "shop.{op}", "format": "payload"})
    positions = "select array_agg(r::text) from pgtrickle.relay_consumer_offsets as r"
    before = await world.value(positions)

    answer = await asked(world, "--sample", "3", "--json")
    table = await asked(world, "out", "--sample", "1")

    assert answer.returncode == 0, answer.output
    samples = json.loads(answer.stdout[0])["samples"]
    (note,) = json.loads(answer.stdout[0])["notes"].values()
    assert "its messages have no key" in note
    away = [sample for sample in samples if sample["pipeline"] == "away"]
    assert [(one["subject"], one["key"]) for one in away] == [
        ("shop.insert", "1"),
        ("shop.insert", "2"),
        ("shop.insert", "3"),
    ]
    assert json.loads(away[0]["body"]) == {"id": 1, "version": 0, "note": None}
    assert away[0]["headers"]["Pgtrickle-Dedup-Key"] == away[0]["dedup_key"]
    out = [json.loads(one["body"]) for one in samples if one["pipeline"] == "out"]
    assert [event["payload"]["id"] for event in out] == [6, 7, 8]
    assert "out: pgtrickle" in table.stdout[0] or "out: orders" in table.stdout[0]
    assert await world.value(positions) == before
    assert len(output.read_text().splitlines()) == 5


async def test_a_sample_of_a_consumer_group_leases_nothing_and_leaves_no_trace(
    world: RelayWorld,
) -> None:
    config = {
        "source": {"outbox": "orders", "consumer_group": "sharers"},
        "sink": AWAY,
        "batch_size": 2,
        "visibility_seconds": 600,
    }
    await world.run(
        "select pgtrickle.set_relay_outbox('shared', $1::text::jsonb)", json.dumps(config)
    )
    traces = (
        "select array_agg(r::text) from ("
        "select g::text from pgtrickle.relay_groups as g"
        " union all select c::text from pgtrickle.relay_group_consumers as c"
        " union all select l::text from pgtrickle.relay_group_leases as l) as r"
    )
    before = await world.value(traces)

    answer = await asked(world, "shared", "--sample", "4", "--json")

    assert answer.returncode == 0, answer.output
    samples = json.loads(answer.stdout[0])["samples"]
    assert [one["key"] for one in samples] == ["1", "2", "3", "4"]
    assert await world.value(traces) == before
    leased = "select count(*) from pgtrickle.poll_outbox('sharers', 'another', 10)"
    assert await world.value(leased) == 5


async def test_a_sample_is_shaped_and_says_how_much_is_left_out(world: RelayWorld) -> None:
    await world.to_file("odd", where="payload.id % 2 == 1", exclude=["note"])
    await world.to_file("wrong", where="payload.id %")
    # What would be called at the end of the backlog, were this a relay at work.
    await world.run("drop function pgtrickle.relay_sleep(text, text, integer)")
    await world.run("drop function pgtrickle.relay_release(text, text, bigint)")

    answer = await asked(world, "odd", "--sample", "2")
    as_json = await asked(world, "odd", "--sample", "9", "--json")
    wrong = await asked(world, "wrong")

    told = "\n".join(answer.stdout)
    assert answer.returncode == 0, answer.output
    assert '"payload":{"id":1,"version":0}' in told
    assert "odd: ops and where leave out 2 of 5 events" in told
    assert [json.loads(one["body"])["key"] for one in json.loads(as_json.stdout[0])["samples"]] == [
        "1", "3", "5",
    ]  # fmt: skip
    assert wrong.returncode == 2
    assert "pipeline wrong: where does not compile" in wrong.stdout[0]
