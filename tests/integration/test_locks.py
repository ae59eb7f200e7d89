"""Who owns what, through advisory locks on one connection of each relay."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import psycopg
import pytest

from relay.errors import NotConnected, TimedOut
from relay.locks import Locks, lock_key, unowned
from relay.postgres import Database as Pool
from relay.settings import PostgresSettings
from tests.servers.postgres import Database
from tests.servers.proxy import TcpProxy

BOUND_S = 10.0

Join = Callable[..., Awaitable[Locks]]


def _nothing() -> None:
    """Nobody waits for the loss."""


@pytest.fixture
async def join(database: Database) -> AsyncIterator[Join]:
    """A factory of relays that have joined their group."""
    async with AsyncExitStack() as joined:

        async def make(
            group_id: str = "default",
            *,
            url: str | None = None,
            heartbeat_timeout_s: float = 1.0,
            on_lost: Callable[[], None] = _nothing,
        ) -> Locks:
            settings = PostgresSettings(
                url=url or database.dsn, heartbeat_timeout_s=heartbeat_timeout_s
            )
            locks = Locks(settings, group_id)
            joined.push_async_callback(locks.aclose)
            await locks.open(on_lost)
            return locks

        yield make


@pytest.fixture
async def pool(database: Database) -> AsyncIterator[Pool]:
    pool = Pool(PostgresSettings(url=database.dsn))
    await pool.open()
    yield pool
    await pool.aclose()


async def proxy_to(database: Database, tcp_proxy: Callable[..., Awaitable[TcpProxy]]) -> TcpProxy:
    parts = urlsplit(database.dsn)
    return await tcp_proxy(str(parts.hostname), int(parts.port or 0))


async def test_a_pipeline_has_one_owner_until_it_is_released(join: Join) -> None:
    one, two = await join(), await join()

    assert await one.try_acquire("p")
    assert await one.try_acquire("p")
    assert not await two.try_acquire("p")
    assert (set(one.held), set(two.held)) == ({"p"}, set())

    await one.release("p")
    await one.release("p")

    assert await two.try_acquire("p")
    assert (set(one.held), set(two.held)) == (set(), {"p"})


async def test_taking_twice_is_released_once(join: Join) -> None:
    one, two = await join(), await join()
    await one.try_acquire("p")
    await one.try_acquire("p")

    await one.release("p")

    assert await two.try_acquire("p")


async def test_each_group_has_owners_and_members_of_its_own(join: Join) -> None:
    one, other = await join("one"), await join("other")

    assert await one.try_acquire("p")
    assert await other.try_acquire("p")
    assert ((await one.members()).count, (await other.members()).count) == (1, 1)


async def test_members_are_counted_while_they_are_there(join: Join) -> None:
    one, two, three = await join(), await join(), await join()
    assert (await one.members()).count == 3

    await two.aclose()
    await three.aclose()

    async with asyncio.timeout(BOUND_S):
        while (await one.members()).count != 1:  # noqa: ASYNC110 - the server tells nobody of it
            await asyncio.sleep(0.01)


async def test_a_member_sees_what_the_others_own_until_they_are_full(join: Join) -> None:
    one, two, three = await join(), await join(), await join()
    for locks, names in ((one, "a"), (two, "bc")):
        for name in names:
            await locks.try_acquire(name)

    assert sorted((await one.members()).held_by_open) == [0, 2]
    await two.show_full(is_full=True)
    assert sorted((await one.members()).held_by_open) == [0]
    assert sorted((await three.members()).held_by_open) == [1]
    await two.show_full(is_full=False)
    assert sorted((await one.members()).held_by_open) == [0, 2]


async def test_members_of_another_database_are_not_counted(
    join: Join, another_migrated_database: Database
) -> None:
    one = await join()
    await join(url=another_migrated_database.dsn)

    assert (await one.members()).count == 1


async def test_leaving_gives_everything_up_and_can_be_repeated(join: Join) -> None:
    one, two = await join(), await join()
    await one.try_acquire("p")

    await one.aclose()
    await one.aclose()

    assert one.held == set()
    async with asyncio.timeout(BOUND_S):
        while not await two.try_acquire("p"):  # noqa: ASYNC110 - the server tells nobody of it
            await asyncio.sleep(0.01)
    with pytest.raises(NotConnected, match="closed"):
        await one.members()


async def test_opening_again_joins_again_without_the_former_locks(join: Join) -> None:
    one = await join()
    await one.try_acquire("p")

    await one.open(_nothing)

    assert one.held == set()
    assert await one.try_acquire("p")


async def test_a_connection_that_was_ended_takes_all_locks_with_it(
    join: Join, database: Database
) -> None:
    lost = asyncio.Event()
    one, two = await join(on_lost=lost.set), await join()
    await one.try_acquire("p")
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute(
            "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory'"
            " and objsubid = 1 and mode = 'ExclusiveLock'"
        )

    async with asyncio.timeout(BOUND_S):
        await lost.wait()
    with pytest.raises(NotConnected):
        await one.members()
    assert one.held == set()
    assert await two.try_acquire("p")


@pytest.mark.shows("setting:postgres.heartbeat_timeout_s")
@pytest.mark.parametrize("timeout_s", [0.1, 1.2])
async def test_silence_counts_as_loss_after_the_heartbeat_timeout(
    join: Join,
    database: Database,
    tcp_proxy: Callable[..., Awaitable[TcpProxy]],
    timeout_s: float,
) -> None:
    proxy = await proxy_to(database, tcp_proxy)
    locks = await join(url=proxy.url(database.dsn), heartbeat_timeout_s=timeout_s)
    await locks.try_acquire("p")
    proxy.stall()
    started = time.monotonic()

    with pytest.raises(TimedOut):
        await locks.members()

    assert timeout_s <= time.monotonic() - started < timeout_s + 1
    assert locks.held == set()
    # The second is the driver's, which asks the server to cancel the query.
    await proxy.wait_for_connections(2)
    await proxy.restore()
    await proxy.wait_for_connections(0)


async def test_closing_ends_although_the_server_does_not_answer(
    join: Join, database: Database, tcp_proxy: Callable[..., Awaitable[TcpProxy]]
) -> None:
    proxy = await proxy_to(database, tcp_proxy)
    locks = await join(url=proxy.url(database.dsn), heartbeat_timeout_s=0.2)
    proxy.stall()

    async with asyncio.timeout(3):
        await locks.aclose()
    await proxy.restore()
    await proxy.wait_for_connections(0)


def test_keys_of_different_names_differ_also_where_their_texts_join_alike() -> None:
    keys = {lock_key("a", "b", "c"), lock_key("a", "bc"), lock_key("ab", "c"), lock_key("abc")}

    assert len(keys) == 4
    assert all(-(2**63) <= key < 2**63 for key in keys)


async def test_readers_of_one_pipeline_have_an_owner_each_and_exclude_its_only_reader(
    join: Join, database: Database
) -> None:
    one, two = await join(), await join()
    with psycopg.connect(database.dsn, autocommit=True) as third:

        def is_free() -> bool:
            query = "select pg_try_advisory_xact_lock(%s)"
            row = third.execute(query, (one.key("p"),)).fetchone()
            return row is not None and bool(row[0])

        assert await one.try_acquire("p")
        assert not await two.try_acquire("p/1")
        assert not is_free()
        await one.release("p")
        assert is_free()

        assert await one.try_acquire("p/1")
        assert await one.try_acquire("p/2")
        assert not await two.try_acquire("p/2")
        assert await two.try_acquire("p/3")
        assert not await two.try_acquire("p")
        for locks, reader in ((one, "p/1"), (two, "p/3"), (one, "p/2")):
            assert not is_free()
            await locks.release(reader)
        # What a reader could not have is no lock that stays behind.
        assert is_free()
        third.execute("select pg_advisory_lock(%s)", (one.key("p"),))
        assert not await one.try_acquire("p/1")
        assert list(await one.strangers(["p/1"])) == ["p/1"]


async def test_a_stranger_who_holds_the_lock_of_a_pipeline_is_named_and_members_are_not(
    join: Join, database: Database, pool: Pool
) -> None:
    own, other = await join(), await join()
    assert await other.try_acquire("shared")
    with psycopg.connect(database.dsn, autocommit=True, application_name="psql") as stranger:
        stranger.execute("select pg_advisory_lock(%s)", (lock_key("pipeline", "default", "held"),))
        assert not await own.try_acquire("held")
        assert not await own.try_acquire("shared")

        found = await own.strangers(["held", "shared", "free"])

        names = ["free", "held", "shared"]
        assert await unowned(pool, "default", names) == ["free", "held"]
        assert await unowned(pool, "another", names) == names

        pid = stranger.info.backend_pid
        assert found == {"held": f"pid {pid}, role postgres, application psql, address 127.0.0.1"}
    assert await own.strangers([]) == {}
    async with asyncio.timeout(BOUND_S):
        while not await own.try_acquire("held"):  # noqa: ASYNC110 - the server tells nobody
            await asyncio.sleep(0.01)
