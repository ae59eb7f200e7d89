"""Pipelines are made, changed, switched and deleted while the relay runs, each on its own."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.integration.relay_surroundings import (
    RelayWorld,
    StartProcess,
    events_of,
    nats_world,
    relay_world,
    until,
)
from tests.servers.finding import free_port
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess

AT_ONCE_S = 1.0


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        yield world


async def _until_absent(world: RelayWorld, relay: RelayProcess, pipeline: str) -> None:
    async def is_absent() -> bool:
        return await world.state(relay, pipeline) is None

    await until(is_absent, timeout_s=AT_ONCE_S)


async def _by_hand(world: RelayWorld, pipeline: str, path: str, value: str) -> None:
    """Edit a row as nobody should: past every check of the SQL functions."""
    await world.run(
        "update pgtrickle.relay_outbox_config"
        " set config = jsonb_set(config, $2::text::text[], $3::text::jsonb) where name = $1",
        pipeline,
        path,
        value,
    )


async def test_every_change_takes_effect_within_a_second_and_restarts_only_its_own_pipeline(
    world: RelayWorld,
) -> None:
    bystander = await world.to_file("bystander")
    # Neither a tick nor a slow re-read may be what makes the change visible.
    relay = await world.relay("relay.coordinate_interval_s=30")
    await world.until_state(relay, "bystander", "running")
    undisturbed = await world.epoch("bystander")

    output = await world.to_file("p")
    await world.until_state(relay, "p", "running", timeout_s=AT_ONCE_S)
    await world.insert(1, 2)
    await events_of(output, 2, timeout_s=AT_ONCE_S)
    assert await world.epoch("p") == 1

    moved = world.directory / "moved.jsonl"
    await world.forward("p", {"type": "file", "output": str(moved)})

    async def is_restarted() -> bool:
        return await world.epoch("p") == 2

    await until(is_restarted, timeout_s=AT_ONCE_S)
    await world.insert(3, 3)
    assert [event.id for event in await events_of(moved, 1, timeout_s=AT_ONCE_S)] == [3]

    await world.run("select pgtrickle.disable_relay('p')")
    await _until_absent(world, relay, "p")
    await world.insert(4, 4)
    await world.run("select pgtrickle.enable_relay('p')")
    await world.until_state(relay, "p", "running", timeout_s=AT_ONCE_S)
    assert [event.id for event in await events_of(moved, 2, timeout_s=AT_ONCE_S)] == [3, 4]

    await world.run("select pgtrickle.delete_relay('p')")
    await _until_absent(world, relay, "p")
    await world.insert(5, 5)
    assert [event.id for event in await events_of(bystander, 5)] == [1, 2, 3, 4, 5]
    assert [event.id for event in await events_of(moved, 2)] == [3, 4]

    assert await world.epoch("bystander") == undisturbed


async def test_what_is_wrong_with_one_pipeline_is_told_and_disturbs_no_other(
    world: RelayWorld, nats_server: NatsServer
) -> None:
    sound = await world.to_file("sound")
    names = ("bad-type", "no-secret", "no-broker", "bad-template", "nonsense")
    for name in names:
        await world.to_file(name)
    async with nats_world(nats_server, "reload") as stream:
        await world.forward("no-secret", stream.sink(user="u", password="${env:ABSENT}"))
        await world.forward(
            "no-broker", {**stream.sink(), "url": f"nats://127.0.0.1:{free_port()}"}
        )
        await _by_hand(world, "bad-type", "{sink_type}", '"fiel"')
        await _by_hand(world, "bad-type", "{sink,type}", '"fiel"')
        await _by_hand(world, "bad-template", "{sink,subject_template}", '"{nonsense}"')
        await world.run(
            "update pgtrickle.relay_outbox_config set config = '[1, 2]' where name = 'nonsense'"
        )
        relay = await world.relay("relay.failed_retry_s=60")

        reasons = {
            name: (await world.until_state(relay, name, state)).reason
            for name, state in zip(
                names, ("failed", "failed", "retrying", "failed", "failed"), strict=True
            )
            if state == "failed"
        }
        assert "'fiel' is not a type of sink (did you mean file?)" in reasons["bad-type"]
        assert "${env:ABSENT}" in reasons["no-secret"]
        assert "nonsense" in reasons["bad-template"]
        assert "source_type" in reasons["nonsense"]
        await world.until_state(relay, "no-broker", "retrying")
        page = await world.page(relay, "/status")
        assert "connecting to NATS at 127.0.0.1" in page
        await world.insert(1, 3)
        await events_of(sound, 3, timeout_s=AT_ONCE_S)
        undisturbed = await world.epoch("sound")

        for name in names:
            output = await world.to_file(name)
            await world.until_state(relay, name, "running", timeout_s=AT_ONCE_S)
            await events_of(output, 3, timeout_s=AT_ONCE_S)
        assert await world.epoch("sound") == undisturbed
        assert (await world.health(relay)).status == "healthy"


async def test_a_hangup_reads_the_secrets_again(
    world: RelayWorld, nats_server_with: Callable[..., NatsServer]
) -> None:
    guarded = nats_server_with('authorization { user: "relay", password: "right" }')
    url = guarded.url
    secret = world.directory / "password"
    secret.write_text("wrong\n")
    await world.forward(
        "guarded",
        {
            "type": "nats",
            "url": url,
            "user": "relay",
            "password": f"${{file:{secret}}}",
            "stream": "guarded",
            "create_stream": True,
            "subject_template": "guarded.{stream_table}",
        },
    )
    relay = await world.relay("relay.failed_retry_s=60", f"secrets.file_roots=[{world.directory}]")
    failed = await world.until_state(relay, "guarded", "failed")
    assert "NATS" in failed.reason

    secret.write_text("right\n")
    relay.send_signal(signal.SIGHUP)

    await world.until_state(relay, "guarded", "running", timeout_s=2.0)
    assert not any("right" in line for line in relay.stderr)
