"""Three NATS servers and a stream of three replicas: leaders die, what was confirmed stays."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import nats
import pytest
from nats.aio.client import Client
from nats.errors import Error, NoRespondersError
from nats.js.api import StreamConfig

from relay.errors import ErrorKind
from relay.message import RelayMessage
from tests.contract.nats_broker import sink_of
from tests.integration.relay_surroundings import (
    Event,
    NatsWorld,
    RelayWorld,
    assert_each_once_or_repeated_with_its_key,
    assert_first_occurrences_are_in_order,
    until,
    writing,
)
from tests.servers.finding import LOOPBACK, free_port
from tests.servers.nats import NatsServer

NODES = ("n1", "n2", "n3")
ROWS = 3_000
LEADERS_KILLED = 3
# An election takes some seconds, and longer where the machine has other work.
ELECTION_S = 60.0


@dataclass(frozen=True)
class Cluster:
    """The servers by name, and a client that goes wherever one is left."""

    nodes: dict[str, NatsServer]
    client: Client

    @property
    def url(self) -> str:
        return ",".join(node.url for node in self.nodes.values())

    async def leader(self, stream: str) -> NatsServer:
        """Who leads the stream, as soon as somebody does."""

        async def found() -> NatsServer | None:
            with contextlib.suppress(Error, TimeoutError):
                info = await self.client.jetstream(timeout=2).stream_info(stream)
                if info.cluster is not None and info.cluster.leader is not None:
                    return self.nodes[info.cluster.leader]
            return None

        return await until(found, timeout_s=ELECTION_S)


@pytest.fixture
async def cluster(nats_server_with: Callable[..., NatsServer]) -> AsyncIterator[Cluster]:
    routes = {name: free_port() for name in NODES}
    others = ", ".join(f'"nats://{LOOPBACK}:{port}"' for port in routes.values())
    nodes = {
        name: nats_server_with(
            f'server_name: "{name}"\n'
            f'cluster: {{ name: "tests", listen: "{LOOPBACK}:{port}", routes: [{others}] }}'
        )
        for name, port in routes.items()
    }
    client = await nats.connect(
        [node.url for node in nodes.values()], max_reconnect_attempts=-1, reconnect_time_wait=0.1
    )
    yield Cluster(nodes, client)
    await client.close()


@pytest.fixture
async def stream(cluster: Cluster) -> NatsWorld:
    name = "replicated"
    config = StreamConfig(name=name, subjects=[f"{name}.>"], num_replicas=len(NODES))

    async def is_made() -> bool:
        # Refused until the servers have found each other.
        with contextlib.suppress(Error, TimeoutError):
            await cluster.client.jetstream(timeout=2).add_stream(config)
            return True
        return False

    await until(is_made, timeout_s=ELECTION_S)
    return NatsWorld(cluster.nodes["n1"], name, cluster.client)


@pytest.mark.slow
async def test_what_was_confirmed_survives_leaders_that_die(
    world: RelayWorld, cluster: Cluster, stream: NatsWorld
) -> None:
    await world.forward("out", stream.sink(cluster.url))
    relay = await world.relay()
    await world.until_state(relay, "out", "running")
    statement = "insert into orders (id) values (%s) on conflict do nothing"

    with writing(world.database.dsn, statement, 1, ROWS) as committed:
        for number in range(1, LEADERS_KILLED + 1):
            await _until_committed(committed, number * ROWS // (LEADERS_KILLED + 1))
            leader = await cluster.leader(stream.stream)
            await asyncio.to_thread(leader.kill)
            await cluster.leader(stream.stream)
            await asyncio.to_thread(leader.start)

    async def all_events() -> list[Event] | None:
        # While there is no leader nobody answers.
        with contextlib.suppress(Error, TimeoutError):
            if await stream.count() >= ROWS:
                return await stream.events()
        return None

    events = await until(all_events, timeout_s=ELECTION_S)
    assert_each_once_or_repeated_with_its_key(events, range(1, ROWS + 1))
    assert_first_occurrences_are_in_order(events)


@pytest.mark.slow
async def test_a_stream_without_a_leader_is_an_outage(cluster: Cluster, stream: NatsWorld) -> None:
    subject = f"{stream.stream}.x"
    leader = await cluster.leader(stream.stream)
    survivor = next(node for node in cluster.nodes.values() if node is not leader)
    sink = sink_of(survivor.url)
    await sink.connect()
    nobody = await nats.connect(survivor.url)
    for node in cluster.nodes.values():
        if node is not survivor:
            await asyncio.to_thread(node.kill)

    async def has_no_leader() -> bool:
        try:
            await nobody.request(subject, b"{}", timeout=1)
        except NoRespondersError:
            return True
        except TimeoutError:
            pass
        return False

    await until(has_no_leader, timeout_s=ELECTION_S)
    event = RelayMessage(dedup_key="1", payload=b"{}", subject=subject)
    (failure,) = (await sink.publish([event])).failures
    await nobody.close()
    await sink.aclose()

    assert failure.error.kind is ErrorKind.OUTAGE
    assert "looking for a stream" in str(failure.error) or "no leader" in str(failure.error)


async def _until_committed(committed: Callable[[], int], count: int) -> None:
    async def is_there() -> bool:
        return committed() >= count

    await until(is_there, timeout_s=ELECTION_S)
