"""Whichever backend: what a secret resolves to is never seen, and no row can send it elsewhere.

A new backend is an entry in `SINKS_WITH_SECRET` and `SOURCES_WITH_SECRET` each, with a line in
`SERVERS` for the server that asks for `RIGHT`, and its harmless keys in `BESIDE_A_PROFILE`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest

from relay.options import declared_keys
from relay.registry import SINKS, SOURCES, options_of
from tests.contract.kafka_broker import Broker
from tests.contract.sqs_broker import let_in
from tests.integration.relay_surroundings import RelayWorld, StartProcess, relay_world, until
from tests.servers.finding import LOOPBACK, free_port
from tests.servers.http import OK, HttpServer, Received, Reply
from tests.servers.kafka import PASSWORD as KAFKA_PASSWORD
from tests.servers.kafka import USER, KafkaServer
from tests.servers.nats import NatsServer
from tests.servers.postgres import Database, PostgresServer
from tests.servers.rabbitmq import RabbitServer
from tests.servers.redis import RedisServer
from tests.servers.sqs import SqsServer

RIGHT, WRONG = KAFKA_PASSWORD, "wrong-s3cret-5812"


class WithSecret(msgspec.Struct, frozen=True):
    """A backend's keys. ``{address}`` and ``{secret}`` are put in where they stand."""

    endpoint: Mapping[str, str]
    secret: Mapping[str, str]
    more: Mapping[str, object] = {}

    def keys(self, address: str, secret: str) -> dict[str, object]:
        """All of them."""
        stated = {**self.endpoint, **self.secret}
        filled = {
            key: text.replace("{address}", address).replace("{secret}", secret)
            for key, text in stated.items()
        }
        return {**filled, **self.more}


SINKS_WITH_SECRET: Mapping[str, WithSecret] = {
    "nats": WithSecret(
        {"url": "nats://{address}"},
        {"user": "relay", "password": "{secret}"},
        {"subject_template": "guarded.{op}", "stream": "guarded", "create_stream": True},
    ),
    "kafka": WithSecret(
        {"brokers": "{address}"},
        {"sasl_username": USER, "sasl_password": "{secret}"},
        {"topic": "guarded"},
    ),
    "redis": WithSecret({"url": "redis://{address}"}, {"password": "{secret}"}),
    "sqs": WithSecret(
        {"queue_url": "http://{address}/123456789012/guarded", "region": "eu-central-1"},
        {"access_key_id": "{secret}", "secret_access_key": "{secret}"},
    ),
    "rabbitmq": WithSecret(
        {"url": "amqp://{address}"},
        {"username": "guarded", "password": "{secret}"},
        {"exchange": "guarded", "declare_exchange": True, "mandatory": False},
    ),
    "webhook": WithSecret({"url": "http://{address}/hook"}, {"bearer_token": "{secret}"}),
    "pg-inbox": WithSecret(
        {"url": "postgresql://guarded:{secret}@{address}/postgres"}, {}, {"inbox_table": "arrived"}
    ),
}

SOURCES_WITH_SECRET: Mapping[str, WithSecret] = {
    "nats": WithSecret(
        {"url": "nats://{address}"},
        {"user": "relay", "password": "{secret}"},
        {"subject": "guarded.>", "stream": "guarded"},
    ),
    "kafka": WithSecret(
        {"brokers": "{address}"},
        {"sasl_username": USER, "sasl_password": "{secret}"},
        {"topic": "guarded"},
    ),
    "redis": WithSecret(
        {"url": "redis://{address}"}, {"password": "{secret}"}, {"stream_key": "guarded"}
    ),
    "sqs": WithSecret(
        {"queue_url": "http://{address}/123456789012/guarded", "region": "eu-central-1"},
        {"access_key_id": "{secret}", "secret_access_key": "{secret}"},
    ),
    "rabbitmq": WithSecret(
        {"url": "amqp://{address}"},
        {"username": "guarded", "password": "{secret}"},
        {"queue": "guarded", "declare_queue": True},
    ),
    # A receiver is who refuses: it runs, whatever its secret.
    "webhook": WithSecret(
        {"listen_addr": "{address}"}, {"auth_value": "{secret}"}, {"path": "/guarded"}
    ),
}

# What a row may say beside a profile, since it leads nowhere and proves nothing.
BESIDE_A_PROFILE: Mapping[str, str] = {
    "sink:nats": "subject_template routing stream create_stream duplicate_window_s max_in_flight"
    " ack_timeout_ms format",
    "source:nats": "subject stream durable_name deliver_policy ack_wait_seconds max_deliver",
    "sink:kafka": "topic topic_template routing key_template acks compression linger_ms"
    " max_request_size request_timeout_ms format",
    "source:kafka": "topic group_id group_instance_id auto_offset_reset on_position_lost"
    " isolation_level session_timeout_ms rebalance_timeout_ms fetch_max_bytes request_timeout_ms",
    "sink:redis": "timeout_ms stream_key routing maxlen max_message_bytes wait_replicas format",
    "source:redis": "timeout_ms stream_key group_name consumer_name start_id block_ms count"
    " claim_idle_ms payload_field",
    "sink:sqs": "timeout_ms max_in_flight message_group_id subject_template routing"
    " max_message_bytes format",
    "source:sqs": "timeout_ms max_in_flight visibility_timeout wait_time_seconds",
    "sink:rabbitmq": "timeout_ms exchange exchange_type routing_key_template routing"
    " declare_exchange mandatory max_in_flight max_message_bytes confirm_timeout_ms format",
    "source:rabbitmq": "timeout_ms queue declare_queue prefetch_count exclusive",
    "sink:webhook": "method timeout_ms batch_mode max_in_flight retry_on_status max_body_bytes"
    " subject_template routing format",
    "source:webhook": "path signature_tolerance_s max_body_bytes answer_timeout_ms",
    "sink:pg-inbox": "inbox inbox_table schema columns source subject_template routing",
}

# Nobody signs in to these.
WITHOUT_SECRET = {"stdout", "stdin", "file", "outbox"}


@pytest.fixture
def nats_that_asks(nats_server_with: Callable[..., NatsServer]) -> str:
    server = nats_server_with(f'authorization {{ user: "relay", password: "{RIGHT}" }}')
    return urlsplit(server.url).netloc


@pytest.fixture
def redis_that_asks(redis_server_with: Callable[..., RedisServer]) -> str:
    return urlsplit(redis_server_with(f"requirepass {RIGHT}").url).netloc


@pytest.fixture
async def kafka_that_asks(kafka_server: KafkaServer) -> AsyncIterator[str]:
    broker = Broker(kafka_server, "guarded")
    await broker.create()
    yield kafka_server.at("SASL")
    await broker.drop()


@pytest.fixture
async def sqs_that_asks(sqs_server_with: Callable[..., SqsServer]) -> str:
    checking = {"INITIAL_NO_AUTH_ACTION_COUNT": "0", "PGTRICKLE_TEST_SQS_KEY": RIGHT}
    server = sqs_server_with(checking)
    await let_in(server, "guarded")
    return urlsplit(server.url).netloc


@pytest.fixture
def rabbitmq_that_asks(rabbitmq_server: RabbitServer) -> Iterator[str]:
    rabbitmq_server.tell("add_user", "guarded", RIGHT)
    rabbitmq_server.tell("set_permissions", "guarded", ".*", ".*", ".*")
    yield urlsplit(rabbitmq_server.url).netloc
    rabbitmq_server.tell("delete_user", "guarded")


@pytest.fixture
async def webhook_that_asks(http_server: HttpServer) -> str:
    def judge(request: Received) -> Reply:
        return OK if request.header("Authorization") == f"Bearer {RIGHT}" else Reply(401)

    http_server.judge = judge
    return f"{LOOPBACK}:{http_server.port}"


@pytest.fixture
async def postgres_that_asks(postgres_server_with: Callable[..., PostgresServer]) -> str:
    access = "host all postgres 127.0.0.1/32 trust\nhost all guarded 127.0.0.1/32 scram-sha-256\n"
    server = await asyncio.to_thread(
        postgres_server_with, {}, files={"pg_hba.conf": access.encode()}
    )
    connection = await asyncpg.connect(server.dsn)
    await connection.execute(
        f"create role guarded login password '{RIGHT}'; create schema pgtrickle;"
        "create table pgtrickle.arrived (event_id text primary key, payload jsonb);"
        "grant usage on schema pgtrickle to guarded;"
        "grant select, insert on pgtrickle.arrived to guarded;"
    )
    await connection.close()
    return urlsplit(server.dsn).netloc.rpartition("@")[2]


# The fixture that gives ``host:port`` of a server that lets in who knows `RIGHT`.
SERVERS: Mapping[str, str] = {
    "nats": "nats_that_asks",
    "kafka": "kafka_that_asks",
    "redis": "redis_that_asks",
    "sqs": "sqs_that_asks",
    "rabbitmq": "rabbitmq_that_asks",
    "webhook": "webhook_that_asks",
    "pg-inbox": "postgres_that_asks",
}


@pytest.fixture(params=SERVERS)
def type_(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def address(type_: str, request: pytest.FixtureRequest) -> str:
    """Where the type's server is."""
    found: str = request.getfixturevalue(SERVERS[type_])
    return found


@pytest.fixture
async def world(
    migrated_database: Database, tmp_path: Path, relay_process: StartProcess
) -> AsyncIterator[RelayWorld]:
    async with relay_world(migrated_database, tmp_path, relay_process) as world:
        await world.make_orders()
        await world.insert(1, 2)
        yield world


def test_every_backend_with_a_secret_is_here() -> None:
    assert SINKS.keys() - WITHOUT_SECRET == SINKS_WITH_SECRET.keys()
    assert SOURCES.keys() - WITHOUT_SECRET == SOURCES_WITH_SECRET.keys()


async def test_no_secret_is_seen_whether_it_is_right_or_wrong(
    address: str, type_: str, world: RelayWorld
) -> None:
    sink, source = SINKS_WITH_SECRET[type_], SOURCES_WITH_SECRET.get(type_)
    for name in ("right", "wrong"):
        reference = f"${{env:RELAY_{name.upper()}}}"
        await world.forward(name, {"type": type_, **sink.keys(address, reference)})
    profile = {"type": type_, **sink.keys(address, WRONG)}
    settings = ("log.level=debug", f"+backends.main={_as_override(profile)}")
    environment = {"RELAY_RIGHT": RIGHT, "RELAY_WRONG": WRONG}

    relay = await world.relay(*settings, environment=environment)
    await world.until_state(relay, "right", "running")
    refused = await world.until_state(relay, "wrong", "failed")
    if source is not None:
        # Now that the sink has made what it reads.
        for name in ("right", "wrong"):
            where = f"{LOOPBACK}:{free_port()}" if type_ == "webhook" else address
            keys = source.keys(where, f"${{env:RELAY_{name.upper()}}}")
            await world.reverse(f"{name}-in", {"type": type_, **keys}, "received")
        await world.until_state(relay, "right-in", "running")
        state = "running" if type_ == "webhook" else "failed"
        await world.until_state(relay, "wrong-in", state)
    reported = await until(
        lambda: world.value("select max(report::text) from pgtrickle.relay_fleet()")
    )
    pages = [await world.page(relay, f"/{path}") for path in ("metrics", "status", "health")]
    stored = [
        await world.value(f"select string_agg(t::text, ' ') from {relation} as t")
        for relation in ("pgtrickle.list_relay_configs()", "pgtrickle.relay_dlq_list('wrong')")
    ]
    shown = await world.start_process("--cfg", "job", *settings, dsn=world.member_dsn)
    assert await shown.wait() == 0
    assert await relay.terminate() == 0

    assert refused.reason.endswith(")"), f"no remedy: {refused.reason}"
    for said in (relay.output, shown.output, refused.reason, str(reported), str(stored), *pages):
        assert RIGHT not in said
        assert WRONG not in said


@pytest.mark.parametrize(
    "role, name",
    [
        *(("sink", name) for name in SINKS_WITH_SECRET),
        *(("source", name) for name in SOURCES_WITH_SECRET),
    ],
)
def test_what_a_row_may_say_beside_a_profile_is_known(role: str, name: str) -> None:
    declared = declared_keys(options_of(role, name))

    beside = {key for key, rule in declared.items() if not rule.connection} - {"type"}

    assert beside == set(BESIDE_A_PROFILE[f"{role}:{name}"].split())


async def test_a_row_that_was_edited_by_hand_can_not_aim_a_profile_elsewhere(
    world: RelayWorld,
) -> None:
    callers: list[str] = []

    async def called(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        callers.append("somebody")
        writer.close()

    trap = await asyncio.start_server(called, LOOPBACK, 0)
    trap_address = f"{LOOPBACK}:{trap.sockets[0].getsockname()[1]}"
    profiles = {}
    for type_, sink in SINKS_WITH_SECRET.items():
        profiles[type_] = {"type": type_, **sink.keys(f"{LOOPBACK}:{free_port()}", RIGHT)}
        row = {"type": type_, "profile": type_, **sink.more}
        await world.forward(f"to-{type_}", row)
        aimed = json.dumps(
            {k: v for k, v in sink.keys(trap_address, "").items() if k in sink.endpoint}
        )
        await world.run(
            "update pgtrickle.relay_outbox_config"
            " set config = jsonb_set(config, '{sink}', config -> 'sink' || $2::text::jsonb)"
            " where name = $1",
            f"to-{type_}",
            aimed,
        )

    relay = await world.relay(*(f"+backends.{n}={_as_override(p)}" for n, p in profiles.items()))
    reasons = [
        (await world.until_state(relay, f"to-{type_}", "failed")).reason for type_ in profiles
    ]
    assert await relay.terminate() == 0
    trap.close()
    await trap.wait_closed()

    assert callers == []
    assert all("come from a profile as a whole" in reason for reason in reasons), reasons
    assert RIGHT not in relay.output


def _as_override(profile: Mapping[str, object]) -> str:
    """The mapping as Hydra's override grammar writes it."""
    pairs = (f"{key}: {_quoted(value)}" for key, value in profile.items())
    return f"{{{', '.join(pairs)}}}"


def _quoted(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else json.dumps(value)
