"""Which server stands behind each address that the pages write, and the stage on which they run.

An address is written as a reader would have it (``localhost:4222`` for a server on their machine,
``….internal`` for one that asks for a password, ``….invalid`` for a host that does not exist) and
is replaced everywhere in a page: in its SQL, its commands, their output and its tables. A new
server is one line in `ADDRESSES` and one fixture that gives ``host:port`` or a URL; it is started
for those pages and sections only that write its address. The fixture may not be asynchronous.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.docs.console_block import Shell
from tests.docs.page import REPOSITORY
from tests.docs.stage import Stage
from tests.servers.finding import LOOPBACK, free_port
from tests.servers.kafka import KafkaServer
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database, PostgresServer
from tests.servers.process import RelayProcess
from tests.servers.rabbitmq import RabbitServer
from tests.servers.redis import RedisServer
from tests.servers.sqs import SqsServer

# What stands where nobody listens, or where the page starts something itself.
FREE_PORT = "a free port"

# The address as pages write it, and the fixture that gives the real one.
ADDRESSES: Mapping[str, str] = {
    "localhost:4222": "nats_of_page",
    "nats.internal:4222": "nats_with_password",
    "localhost:4223": FREE_PORT,
    "localhost:9092": "kafka_of_page",
    "kafka.internal:9092": "kafka_with_password",
    "localhost:9093": FREE_PORT,
    "localhost:6379": "redis_of_page",
    "redis.internal:6379": "redis_with_password",
    "localhost:6380": FREE_PORT,
    "localhost:5000": "sqs_of_page",
    "sqs.internal:5000": "sqs_with_keys",
    "localhost:5001": FREE_PORT,
    "localhost:5672": "rabbitmq_of_page",
    "localhost:5673": FREE_PORT,
    "localhost:8000": FREE_PORT,
    "localhost:8001": FREE_PORT,
    "localhost:8080": FREE_PORT,
    "postgresql://postgres@localhost:5432/empty": "empty_database_of_page",
    "postgresql://postgres@localhost:5432/warehouse": "empty_database_of_page",
    "db.internal:5432": "postgres_with_password",
    "localhost:5433": FREE_PORT,
}

# What a page may refer to as ${env:…} without having said it: a secret that no server accepts.
WRONG_SECRET = "wr0ng-s3cret-4711"
ENVIRONMENT = {"RELAY_WRONG": WRONG_SECRET}

# A host that does not exist is looked up once, and not for long.
_IMPATIENT = {"RES_OPTIONS": "timeout:2 attempts:1"}


@pytest.fixture
def nats_of_page(nats_server_with: Callable[..., NatsServer]) -> str:
    """A server of its own: streams of the pages cover broad subjects."""
    return _host_of(nats_server_with("").url)


@pytest.fixture
def nats_with_password(nats_server_with: Callable[..., NatsServer]) -> str:
    """The user is relay, the password s3cret."""
    return _host_of(
        nats_server_with('authorization { user: "relay", password: "s3cret" }').url,
    )


@pytest.fixture
def redis_of_page(redis_server_with: Callable[..., RedisServer]) -> str:
    """A server of its own."""
    return _host_of(redis_server_with("").url)


@pytest.fixture
def redis_with_password(redis_server_with: Callable[..., RedisServer]) -> str:
    """The password of the default user is s3cret."""
    return _host_of(redis_server_with("requirepass s3cret").url)


@pytest.fixture
def kafka_of_page(kafka_server: KafkaServer) -> str:
    """The broker of the session, which takes long to start: topics of the pages are no one's."""
    host, port = kafka_server.address
    return f"{host}:{port}"


@pytest.fixture
def kafka_with_password(kafka_server: KafkaServer) -> str:
    """The user is relay."""
    port = kafka_server.at("SASL").rpartition(":")[2]
    return f"{LOOPBACK}:{port}"


@pytest.fixture
def sqs_of_page(sqs_server: SqsServer) -> str:
    """The server of the session, which takes any keys."""
    return _host_of(sqs_server.url)


@pytest.fixture
def sqs_with_keys(sqs_server_with: Callable[..., SqsServer]) -> str:
    """A server that knows nobody's keys."""
    return _host_of(sqs_server_with({"INITIAL_NO_AUTH_ACTION_COUNT": "0", "PAGES": "1"}).url)


@pytest.fixture
def rabbitmq_of_page(rabbitmq_server: RabbitServer) -> str:
    """The node of the session, which takes long to start: queues of the pages are no one's."""
    host, port = rabbitmq_server.address
    return f"{host}:{port}"


@pytest.fixture
def empty_database_of_page(database: Database) -> str:
    """A second database, without a catalog."""
    return database.dsn


@pytest.fixture
def postgres_with_password(postgres_server_with: Callable[..., PostgresServer]) -> str:
    """A server that asks the user relay for a password."""
    access = "host all postgres 127.0.0.1/32 trust\nhost all relay 127.0.0.1/32 scram-sha-256\n"
    return _host_of(postgres_server_with({}, files={"pg_hba.conf": access.encode()}).dsn)


@pytest.fixture
def servers_behind(request: pytest.FixtureRequest) -> Callable[[str], dict[str, str]]:
    """The real addresses for those that a text writes."""

    def find(text: str) -> dict[str, str]:
        return {
            written: f"{LOOPBACK}:{free_port()}"
            if fixture == FREE_PORT
            else request.getfixturevalue(fixture)
            for written, fixture in ADDRESSES.items()
            if written in text
        }

    return find


MakeStage = Callable[[Database, Mapping[str, str]], Awaitable[Stage]]


@pytest.fixture
async def make_stage(
    relay_process: Callable[..., Awaitable[RelayProcess]], tmp_path: Path
) -> AsyncIterator[MakeStage]:
    """A factory of stages: `await make_stage(database, servers_behind(text))`."""
    async with AsyncExitStack() as opened:

        async def make(database: Database, servers: Mapping[str, str]) -> Stage:
            directory = tmp_path / "page"
            directory.mkdir()
            environment = {
                **{k: v for k, v in os.environ.items() if not k.startswith("PG")},
                **ENVIRONMENT,
                **_IMPATIENT,
                "PYTHONPATH": str(REPOSITORY),
                "PGTRICKLE_RELAY_POSTGRES_URL": database.dsn,
                "PGTRICKLE_RELAY_METRICS_ADDR": f"{LOOPBACK}:{free_port()}",
            }
            shell = await opened.enter_async_context(Shell(directory, environment))
            return Stage(
                database=database,
                connection=opened.enter_context(psycopg.connect(database.dsn, autocommit=True)),
                shell=shell,
                start_relay=relay_process,
                substitutions={
                    "postgresql://postgres@localhost:5432/shop": database.dsn,
                    "localhost:5432": _host_of(database.dsn),
                    **servers,
                    "/tmp/": f"{directory}/",  # noqa: S108 - as the pages write it
                    "scripts/demo --seconds 10": "python -m relay demo --seconds 2",
                },
            )

        yield make


def _host_of(url: str) -> str:
    """``host:port`` of a URL, without user and password."""
    return urlsplit(url).netloc.rpartition("@")[2]
