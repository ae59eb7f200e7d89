"""All blows against relays that share a consumer group, on the way to JetStream and an inbox."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from tests.crash.fifty_thousand import Destination, Proof
from tests.crash.sharing import FAIR_ROWS, Proxies, Sharing
from tests.crash.test_inbox import ToInbox
from tests.crash.test_nats import ToJetStream
from tests.integration.relay_surroundings import RelayWorld, nats_world
from tests.servers.nats import NatsServer
from tests.servers.postgres import PostgresServer

# A stream that takes repetitions: they are to be seen.
FORGETFUL_S = 0.1


class _AllBlows(Proof):
    @pytest.mark.parametrize("relays", [2, 4])
    async def test_relays_of_a_group_that_are_stopped_cut_off_restarted_and_killed(
        self, relays: int, world: RelayWorld, destination: Destination, tcp_proxy: Proxies
    ) -> None:
        sharing = Sharing(world, destination, tcp_proxy)
        await sharing.begin(relays, through_a_proxy=True)

        await sharing.write(FAIR_ROWS * relays)
        await sharing.until_settled()
        sharing.assert_shared_fairly()
        await sharing.cut_destination(600)
        await sharing.write_and_catch(sharing.relays[0], 600)
        await sharing.stop(sharing.relays[0])
        await sharing.write_and_catch(sharing.relays[1], 600)
        await sharing.cut(sharing.relays[1])
        await sharing.write_and_catch(sharing.relays[0], 600)
        await sharing.restart_postgres()
        await sharing.write_and_catch(sharing.relays[1], 600)
        await sharing.kill(sharing.relays[1])
        await sharing.start()
        await sharing.write(200)

        await sharing.assert_nothing_is_lost_or_repeated_without_a_blow()


class TestToJetStream(_AllBlows):
    @pytest.fixture
    async def destination(self, nats_server: NatsServer) -> AsyncIterator[Destination]:
        async with nats_world(nats_server, "blows", duplicate_window_s=FORGETFUL_S) as stream:
            yield ToJetStream(stream)


class TestToInbox(_AllBlows):
    @pytest.fixture
    async def destination(
        self, postgres_server_with: Callable[..., PostgresServer]
    ) -> AsyncIterator[Destination]:
        server = postgres_server_with({})
        with server.database() as database:
            destination = ToInbox(server, database.dsn)
            await destination.prepare()
            yield destination
