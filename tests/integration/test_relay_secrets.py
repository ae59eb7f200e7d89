"""No secret that a relay resolves is ever seen in what it says, answers or stores."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.integration.relay_surroundings import (
    MEMBER,
    RelayWorld,
    StartProcess,
    relay_world,
    until,
)
from tests.servers.finding import free_port
from tests.servers.nats import NatsServer
from tests.servers.postgres import PostgresServer

# A password that must be escaped in a URL shows whether both spellings are masked.
DATABASE_PASSWORD = "db-s3cret-4711"
NATS_PASSWORD = "nats-s3cret-4712"
WRONG_PASSWORD = "wrong-s3cret-4713"
FILE_PASSWORD = "file-s3cret-4714"
REMOTE_PASSWORD = "remote-s3cret-4715"
SECRETS = (DATABASE_PASSWORD, NATS_PASSWORD, WRONG_PASSWORD, FILE_PASSWORD, REMOTE_PASSWORD)

_ACCESS = f"""\
host all postgres 127.0.0.1/32 trust
host all {MEMBER} 127.0.0.1/32 scram-sha-256
"""


@pytest.fixture
async def world(
    postgres_server_with: Callable[..., PostgresServer],
    tmp_path: Path,
    relay_process: StartProcess,
) -> AsyncIterator[RelayWorld]:
    """A server that asks the relay for its password."""
    server = postgres_server_with({}, files={"pg_hba.conf": _ACCESS.encode()})
    with server.migrated_database() as database:
        async with relay_world(database, tmp_path, relay_process) as world:
            await world.run(f"alter role {MEMBER} password '{DATABASE_PASSWORD}'")
            await world.make_orders()
            yield world


def _with_password(dsn: str, password: str) -> str:
    return dsn.replace(f"{MEMBER}@", f"{MEMBER}:{password}@")


def _assert_secret(*texts: str) -> None:
    for text in texts:
        for secret in SECRETS:
            assert secret not in text, text


async def test_secrets_are_nowhere_in_logs_answers_reports_and_settings(
    world: RelayWorld, nats_server_with: Callable[..., NatsServer]
) -> None:
    nats = nats_server_with(f'authorization {{ user: "relay", password: "{NATS_PASSWORD}" }}')
    in_file = world.directory / "secret"
    in_file.write_text(f"{FILE_PASSWORD}\n")
    template = {"subject_template": "secrets.{op}", "stream": "secrets", "create_stream": True}
    sinks = {
        "good": {"url": nats.url, "user": "relay", "password": "${env:RELAY_RIGHT}"},
        "wrong": {"url": nats.url, "user": "relay", "password": "${env:RELAY_WRONG}"},
        "file": {"url": nats.url, "user": "relay", "password": f"${{file:{in_file}}}"},
        "in-url": {"url": nats.url.replace("://", "://relay:${env:RELAY_WRONG}@")},
        "away": {"url": f"nats://relay:${{env:RELAY_RIGHT}}@127.0.0.1:{free_port()}"},
    }
    for name, keys in sinks.items():
        await world.forward(name, {"type": "nats", **keys, **template})
    remote = _with_password(world.member_dsn, "${env:RELAY_REMOTE}")
    await world.forward("remote", {"type": "pg-inbox", "url": remote, "inbox_table": "arrived"})
    settings = (
        f"secrets.file_roots=[{world.directory}]",
        "log.level=debug",
        "relay.failed_retry_s=0.2",
        f"+backends.main={{type: nats, url: '{nats.url}', user: relay, password: {NATS_PASSWORD}}}",
    )
    environment = {
        "DB_PASSWORD": DATABASE_PASSWORD,
        "RELAY_RIGHT": NATS_PASSWORD,
        "RELAY_WRONG": WRONG_PASSWORD,
        "RELAY_REMOTE": REMOTE_PASSWORD,
    }
    dsn = _with_password(world.member_dsn, "${env:DB_PASSWORD}")

    relay = await world.relay(*settings, dsn=dsn, environment=environment)
    await world.until_state(relay, "good", "running")
    for name in ("wrong", "file", "in-url", "remote"):
        health = await world.until_state(relay, name, "failed")
        assert health.reason
    await world.until_state(relay, "away", "retrying")
    await world.insert(1, 3)
    # Once more, by the means that an operator has.
    reported = await until(
        lambda: world.value("select max(report::text) from pgtrickle.relay_fleet()")
    )
    pages = [
        await world.page(relay, path)
        for path in ("/metrics", "/status", "/health", "/readyz", "/health/drained")
    ]
    catalog = await world.value(
        "select string_agg(config::text, ' ') from pgtrickle.list_relay_configs()"
    )
    assert await relay.terminate() == 0

    assert "wrong" in relay.output
    _assert_secret(relay.output, str(reported), str(catalog), *pages)


async def test_a_refused_password_of_the_database_is_not_said(world: RelayWorld) -> None:
    relay = await world.relay(
        dsn=_with_password(world.member_dsn, "${env:DB_PASSWORD}"),
        environment={"DB_PASSWORD": WRONG_PASSWORD},
        is_awaited=False,
    )

    assert await relay.wait() == 2
    assert "password authentication failed" in relay.output
    _assert_secret(relay.output)


async def test_an_address_with_a_password_that_is_out_of_reach_is_said_without_it(
    relay_process: StartProcess,
) -> None:
    relay = await relay_process(
        dsn=f"postgresql://relay:{DATABASE_PASSWORD}@127.0.0.1:{free_port()}/none"
    )

    assert await relay.wait() == 3
    _assert_secret(relay.output)


async def test_the_composed_settings_are_printed_without_secrets(
    relay_process: StartProcess,
) -> None:
    relay = await relay_process(
        "--cfg",
        "job",
        f"+backends.main={{type: nats, user: relay, password: {NATS_PASSWORD}}}",
        dsn=f"postgresql://relay:{DATABASE_PASSWORD}@127.0.0.1/none",
    )

    assert await relay.wait() == 0
    assert "postgresql://relay:" in relay.output
    _assert_secret(relay.output)
