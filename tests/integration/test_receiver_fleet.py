"""Webhook receivers run in every relay of the group: a load balancer sends anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec
import pytest

from tests.contract.webhook_client import PATH, call
from tests.integration.relay_surroundings import (
    RelayWorld,
    StartProcess,
    events_in,
    events_of,
    relay_world,
    until,
)
from tests.servers.finding import LOOPBACK, free_port
from tests.servers.postgres import Database
from tests.servers.process import RelayProcess

PIPELINES = 4
# What a notification brings about has to be there long before the tick.
SLOW_TICK = "relay.coordinate_interval_s=30"

_LOCKS_HELD = """
select count(*) as held from pg_locks
where locktype = 'advisory' and mode = 'ExclusiveLock' and granted
    and database = (select oid from pg_database where datname = current_database())
group by pid
"""
_REPORTED = """
select f.worker_id, p ->> 'state' as state, (p ->> 'consumed')::bigint as consumed
from pgtrickle.relay_fleet('default') as f
cross join jsonb_array_elements(f.report -> 'pipelines') as p
where f.is_alive and p ->> 'name' = 'hook'
"""


class _Pipeline(msgspec.Struct):
    name: str
    state: str


class _Status(msgspec.Struct):
    pipelines: list[_Pipeline]


class Receiver:
    """One relay of the group and the port on which it shall listen."""

    def __init__(self, relay: RelayProcess, port: int) -> None:
        self.relay = relay
        self.port = port

    async def send(self, key: str, body: str = '{"id": 1}') -> int | None:
        """The status of the answer; None where nobody listens."""
        try:
            answer = await call(
                f"{LOOPBACK}:{self.port}", body.encode(), [(b"Idempotency-Key", key.encode())]
            )
        except OSError:
            return None
        return answer.status

    async def until_listening(self, *, timeout_s: float = 30.0) -> None:
        """An empty array is answered and leaves nothing behind."""

        async def is_answered() -> bool:
            return await self.send("-", "[]") == 200

        await until(is_answered, timeout_s=timeout_s)

    async def until_silent(self, *, timeout_s: float = 30.0) -> None:
        async def is_silent() -> bool:
            return await self.send("-", "[]") is None

        await until(is_silent, timeout_s=timeout_s)


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        yield world


def source(**keys: object) -> Mapping[str, object]:
    """A source object with another port in each relay."""
    addr = f"{LOOPBACK}:${{env:RELAY_HOOK_PORT}}"
    return {"type": "webhook", "listen_addr": addr, "path": PATH, **keys}


async def receiver(world: RelayWorld, *arguments: str, port: int | None = None) -> Receiver:
    """A relay that is ready; whether it listens by then is another matter."""
    port = port or free_port()
    relay = await world.relay(*arguments, environment={"RELAY_HOOK_PORT": str(port)})
    return Receiver(relay, port)


async def running_in(world: RelayWorld, relay: RelayProcess) -> frozenset[str]:
    """The pipelines that run in this relay."""
    status = msgspec.json.decode(await world.page(relay, "/status"), type=_Status)
    return frozenset(one.name for one in status.pipelines if one.state == "running")


async def owned_by(world: RelayWorld, relay: RelayProcess) -> int:
    """How many pipelines it counts as its own."""
    (line,) = [
        line
        for line in (await world.page(relay, "/metrics")).splitlines()
        if line.startswith("pgtrickle_relay_pipelines_owned ")
    ]
    return int(float(line.split()[1]))


async def test_refused_requests_are_counted_logged_once_and_shown(world: RelayWorld) -> None:
    await world.reverse(
        "hook", source(auth_value="${env:RELAY_HOOK_PORT}", max_body_bytes=64), "arrived"
    )
    one = await receiver(world)
    await one.relay.wait_for_log(r"\[hook\] running")
    addr = f"{LOOPBACK}:{one.port}"
    allowed = (b"Authorization", str(one.port).encode())
    for _ in range(3):
        assert (await call(addr, b"{}")).status == 401
    assert (await call(addr, b"x" * 65, [allowed])).status == 413
    form = (b"Content-Type", b"application/x-www-form-urlencoded")
    assert (await call(addr, b"a=1", [allowed, form])).status == 415
    assert (await call(addr, b"no JSON", [allowed])).status == 400
    assert (await call(addr, b"{}", path="/elsewhere")).status == 404

    metrics = await world.page(one.relay, "/metrics")
    refused = 'webhook_refused_total{direction="reverse",pipeline="hook",reason='
    counts = {"unauthorized": 3, "too_large": 1, "unsupported": 1, "malformed": 1}
    for reason, count in {**counts, "unknown_path": 1}.items():
        assert f'{refused}"{reason}"}} {count}.0' in metrics
    health = await world.health(one.relay)
    assert health.status == "degraded"
    assert "requests are refused, and none was accepted" in health.pipelines["hook"].reason
    lines = [line for line in one.relay.stderr if "a request was refused" in line]
    assert len(lines) == len(counts) + 1
    assert "401, unauthorized" in lines[0]
    assert (await call(addr, b"{}", [allowed])).status == 200
    assert (await world.health(one.relay)).status == "healthy"


async def test_every_relay_receives_and_each_idempotency_key_is_written_once(
    world: RelayWorld,
) -> None:
    await world.reverse("hook", source(), "arrived")
    relays = [await receiver(world), await receiver(world)]
    for one in relays:
        await one.until_listening()

    keys = [f"k{number:02}" for number in range(40)]
    # A sender that heard nothing repeats to whom the load balancer chooses, at the same time even.
    answers = await asyncio.gather(*(one.send(key) for key in keys for one in relays))

    assert set(answers) == {200}
    assert await world.inbox_keys("arrived") == keys

    async def reported() -> bool:
        rows = await world.owner.fetch(_REPORTED)
        consumed = sorted((row["state"], row["consumed"]) for row in rows)
        return consumed == [("running", 40), ("running", 40)]

    await until(reported)
    assert await world.value("select count(*) from pgtrickle.relay_consumer_offsets") == 0


async def test_the_others_go_on_receiving_when_one_is_killed(world: RelayWorld) -> None:
    await world.reverse("hook", source(), "arrived")
    killed, other = await receiver(world), await receiver(world)
    for one in (killed, other):
        await one.until_listening()
    keys = [f"k{number:03}" for number in range(100)]

    async def send_all() -> None:
        """As a load balancer: to the first, and to the other where that gives no answer."""
        for key in keys:
            if await killed.send(key) != 200:
                assert await other.send(key) == 200

    sending = asyncio.create_task(send_all())

    async def has_begun() -> bool:
        return len(await world.inbox_keys("arrived")) >= 10

    await until(has_begun)
    await killed.relay.kill()
    await sending

    assert await world.inbox_keys("arrived") == keys
    assert await running_in(world, other.relay) == {"hook"}


async def test_disabling_changing_and_deleting_it_reach_every_relay_at_once(
    world: RelayWorld,
) -> None:
    await world.reverse("hook", source(), "arrived")
    relays = [await receiver(world, SLOW_TICK), await receiver(world, SLOW_TICK)]
    for one in relays:
        await one.until_listening()

    await world.run("select pgtrickle.disable_relay('hook')")
    for one in relays:
        await one.until_silent(timeout_s=10)
    await world.run("select pgtrickle.enable_relay('hook')")
    for one in relays:
        await one.until_listening(timeout_s=10)

    await world.reverse("hook", source(path="/hooks/elsewhere"), "arrived")
    for one in relays:

        async def is_elsewhere(one: Receiver = one) -> bool:
            return await one.send("k") == 404

        await until(is_elsewhere, timeout_s=10)

    await world.run("select pgtrickle.delete_relay('hook')")
    for one in relays:
        await one.until_silent(timeout_s=10)
        assert await running_in(world, one.relay) == frozenset()


async def test_receivers_count_in_no_share_and_in_no_limit(world: RelayWorld) -> None:
    await world.make_orders()
    for number in range(PIPELINES):
        await world.to_file(f"p{number}")
    await world.reverse("hook", source(), "arrived")
    await world.reverse("hook2", source(path="/hooks/others"), "arrived_too")
    small = await receiver(world, "relay.max_pipelines=1")
    large = await receiver(world)

    async def is_shared() -> bool:
        small_ones, large_ones = await asyncio.gather(
            running_in(world, small.relay), running_in(world, large.relay)
        )
        return (
            small_ones & large_ones == {"hook", "hook2"}
            and (len(small_ones), len(large_ones)) == (3, 5)
            and sorted(row["held"] for row in await world.owner.fetch(_LOCKS_HELD)) == [1, 3]
        )

    await until(is_shared)
    assert await owned_by(world, small.relay) == 1
    assert await owned_by(world, large.relay) == 3
    for one in (small, large):
        await one.until_listening()
        assert await one.relay.terminate() == 0


async def test_two_relays_that_want_one_port_say_so_and_the_first_goes_on(
    world: RelayWorld,
) -> None:
    await world.make_orders()
    output = await world.to_file("out")
    await world.reverse("hook", source(), "arrived")
    first = await receiver(world)
    await first.until_listening()

    second = await receiver(world, port=first.port)
    failed = await world.until_state(second.relay, "hook", "failed")

    assert "the address is in use" in failed.reason
    assert "RELAY_HOOK_PORT" in failed.reason
    assert len(failed.reason.splitlines()) == 1
    assert await first.send("k") == 200
    assert (await world.health(first.relay)).status == "healthy"
    said = [line for line in second.relay.stderr if "the address is in use" in line]
    assert len(said) == 1
    # What else it runs is untouched, and the port is taken over once it is free.
    assert await first.relay.terminate() == 0
    await world.insert(1, 3)
    await events_of(output, 3)
    await world.until_state(second.relay, "hook", "running")
    assert await second.send("k2") == 200
    assert await world.inbox_keys("arrived") == ["k", "k2"]


async def test_a_pipeline_that_gets_another_kind_of_source_changes_between_one_and_all(
    world: RelayWorld,
) -> None:
    lines = world.directory / "in.jsonl"
    lines.write_text("".join(f'{{"id": {id_}}}\n' for id_ in range(1, 11)))
    file = {"type": "file", "input": str(lines), "follow": True}
    await world.reverse("hook", source(), "arrived")
    relays = [await receiver(world), await receiver(world)]
    for one in relays:
        await one.until_listening()

    await world.reverse("hook", file, "arrived")

    async def running() -> int:
        found = await asyncio.gather(*(running_in(world, one.relay) for one in relays))
        return sum("hook" in names for names in found)

    async def are_written() -> bool:
        return len(await world.inbox_keys("arrived")) == 10

    async def is_in_one() -> bool:
        return await running() == 1

    await until(are_written)
    await until(is_in_one)
    for one in relays:
        await one.until_silent()

    await world.reverse("hook", source(), "arrived")
    for one in relays:
        await one.until_listening()
    assert await world.owner.fetch(_LOCKS_HELD) == []


async def test_receivers_of_a_relay_that_lost_its_database_stop_and_come_again(
    world: RelayWorld,
) -> None:
    await world.reverse("hook", source(), "arrived")
    one = await receiver(world, SLOW_TICK)
    await one.until_listening()
    since = len(one.relay.stderr)

    await world.run(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where application_name like '% lock' and datname = current_database()"
    )
    lost = await one.relay.wait_for_log("the database is lost", since=since)
    # It may have begun to run after it listened.
    since = one.relay.stderr.index(lost)
    await one.relay.wait_for_log(r"\[hook\] running", since=since)

    assert await one.send("k") == 200
    assert await world.inbox_keys("arrived") == ["k"]


async def test_a_drain_delivers_the_rest_beside_a_receiver_and_does_not_listen(
    world: RelayWorld,
) -> None:
    await world.make_orders()
    await world.insert(1, 5)
    output = await world.to_file("out")
    # Whoever listened here would be refused the port.
    async with await asyncio.start_server(lambda _, writer: writer.close(), LOOPBACK, 0) as taken:
        port = taken.sockets[0].getsockname()[1]
        await world.reverse("hook", source(), "arrived")

        drain = await world.relay(
            "drain", environment={"RELAY_HOOK_PORT": str(port)}, is_awaited=False
        )

        assert await drain.wait() == 0, drain.output
    assert [event.id for event in events_in(output)] == [1, 2, 3, 4, 5]


async def test_the_address_may_be_each_relays_own_by_a_profile_or_any_that_is_free(
    world: RelayWorld,
) -> None:
    await world.reverse("own", {"type": "webhook", "profile": "hooks", "path": PATH}, "arrived")
    await world.reverse(
        "free", {"type": "webhook", "listen_addr": f"{LOOPBACK}:0", "path": PATH}, "arrived"
    )
    for number in range(2):
        port = free_port()
        one = await receiver(
            world,
            f"+backends.hooks={{type: webhook, listen_addr: '{LOOPBACK}:{port}'}}",
            port=port,
        )
        said = await one.relay.wait_for_log(r"\[free\] source connected .listening: ")
        free = Receiver(one.relay, int(said.partition(f"listening: {LOOPBACK}:")[2].split(";")[0]))

        await one.until_listening()
        assert await one.send(f"own {number}") == 200
        assert await free.send(f"free {number}") == 200

    assert await world.inbox_keys("arrived") == ["free 0", "free 1", "own 0", "own 1"]


async def test_a_dead_letter_that_every_relay_tries_again_counts_once_and_is_written_once(
    world: RelayWorld,
) -> None:
    await world.reverse("hook", source(), "arrived")
    relays = [await receiver(world), await receiver(world)]
    for one in relays:
        await one.until_listening()
    await world.run("alter table pgtrickle.arrived add constraint c check (event_id <> 'k')")
    assert await relays[0].send("k") == 200
    letters = "select attempts, retry_requested_at from pgtrickle.relay_dlq_list()"

    async def are_settled(expected: list[tuple[object, ...]]) -> None:
        async def found() -> bool:
            return [tuple(row) for row in await world.owner.fetch(letters)] == expected

        await until(found)

    await are_settled([(1, None)])
    await world.run("select pgtrickle.relay_dlq_retry_all('hook')")
    await are_settled([(2, None)])
    await world.run("alter table pgtrickle.arrived drop constraint c")
    await world.run("select pgtrickle.relay_dlq_retry_all('hook')")
    await are_settled([])

    assert await world.inbox_keys("arrived") == ["k"]
