"""A quorum queue of RabbitMQ: what it confirmed survives the node's death."""

from __future__ import annotations

import asyncio

import pytest

from tests.contract.rabbitmq_broker import Broker
from tests.integration.relay_surroundings import (
    RelayWorld,
    until,
    writing,
)
from tests.servers.rabbitmq import RabbitServer

ROWS = 2_000
RESTART_S = 120.0


@pytest.mark.slow
async def test_what_a_quorum_queue_confirmed_survives_its_node(
    world: RelayWorld, rabbitmq_server: RabbitServer
) -> None:
    broker = Broker(rabbitmq_server, "quorum")
    await broker.make({"x-queue-type": "quorum"})
    await world.run("select pgtrickle.create_inbox('arrived')")
    await world.forward(
        "out", {"type": "rabbitmq", "url": rabbitmq_server.url, "exchange": broker.exchange}
    )
    await world.reverse(
        "in", {"type": "rabbitmq", "url": rabbitmq_server.url, "queue": broker.queue}, "arrived"
    )
    relay = await world.relay()
    await world.until_state(relay, "out", "running")
    statement = "insert into orders (id) values (%s) on conflict do nothing"

    with writing(world.database.dsn, statement, 1, ROWS) as committed:
        for part in (1, 2):

            async def is_committed(count: int = part * ROWS // 3) -> bool:
                return committed() >= count

            await until(is_committed)
            await asyncio.to_thread(rabbitmq_server.kill)
            await asyncio.to_thread(rabbitmq_server.start)

    async def is_all_there() -> bool:
        return await world.value("select count(*) from pgtrickle.arrived") == ROWS

    await until(is_all_there, timeout_s=RESTART_S)
    await broker.drop()
