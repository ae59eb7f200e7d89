"""What `pip install pgtrickle-relay` brings: PostgreSQL, files and webhooks, and nothing else.

The wheel is built and installed without extras into a virtual environment of its own, and the
installed command is run there, away from the checkout.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from relay.registry import EXTRAS, SINKS
from tests.servers.finding import LOOPBACK, free_port
from tests.servers.http import HttpServer
from tests.servers.postgres import Database
from tests.servers.process import REPOSITORY

pytestmark = pytest.mark.slow

COMMAND_TIMEOUT_S = 120.0
EXTRA_NAMES = {"nats", "webhook", "kafka", "redis", "sqs", "rabbitmq", "filter", "demo", "all"}

# The least that the catalog accepts, for each backend whose extra brings a driver.
SINKS_WITH_DRIVER: Mapping[str, Mapping[str, str]] = {
    "nats": {"url": "nats://localhost"},
    "redis": {"url": "redis://localhost"},
    "kafka": {"brokers": "localhost:9092", "topic": "orders"},
    "sqs": {"queue_url": "https://sqs.eu-central-1.amazonaws.com/1/orders"},
    "rabbitmq": {"url": "amqp://localhost", "exchange": "orders"},
}

# The least loads when it runs: what a pipeline to a file may not have loaded in the end.
UNUSED = (
    *("nats", "redis", "aiokafka", "aiobotocore", "aioboto3", "aio_pika", "httpx", "rich"),
    *("relay.backends.nats", "relay.backends.webhook"),
)


@dataclass(frozen=True)
class Installation:
    """A virtual environment with the wheel in it, and an empty directory to work in."""

    bin: Path
    directory: Path

    async def run(self, program: str, *arguments: str, dsn: str = "") -> tuple[int, str]:
        """The exit code and all that was said."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PG", "PYTHON", "VIRTUAL_ENV"))
        }
        environment["PGTRICKLE_RELAY_METRICS_ADDR"] = f"{LOOPBACK}:{free_port()}"
        environment["PGTRICKLE_RELAY_POSTGRES_URL"] = dsn
        process = await asyncio.create_subprocess_exec(
            self.bin / program,
            *arguments,
            cwd=self.directory,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_S):
                said, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert process.returncode is not None
        return process.returncode, said.decode()


def _extras() -> dict[str, list[str]]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    return extras


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The project's wheel, installed without extras."""
    place = tmp_path_factory.mktemp("installed")
    python = place / "venv" / "bin" / "python"
    uv = [sys.executable, "-m", "uv", "--quiet"]
    _done([*uv, "build", "--wheel", "--out-dir", place, REPOSITORY])
    _done([*uv, "venv", "--python", sys.executable, place / "venv"])
    (wheel,) = place.glob("pgtrickle_relay-*.whl")
    _done([*uv, "pip", "install", "--python", python, wheel])
    directory = place / "work"
    directory.mkdir()
    return Installation(python.parent, directory)


def _done(command: list[str | Path]) -> None:
    finished = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"


@pytest.fixture
async def orders(installation: Installation, database: Database) -> Database:
    """A database that the installed command has migrated, with an order in an outbox."""
    code, said = await installation.run("pgtrickle-relay", "migrate", dsn=database.dsn)
    assert code == 0, said
    with psycopg.connect(database.dsn, autocommit=True) as connection:
        connection.execute("create table orders (id bigint primary key)")
        connection.execute("select pgtrickle.enable_outbox('orders')")
        connection.execute("insert into orders values (1)")
    return database


def _set_pipeline(database: Database, name: str, sink: Mapping[str, str]) -> None:
    with psycopg.connect(database.dsn) as connection:
        connection.execute(
            "select pgtrickle.set_relay_outbox(%s, 'orders', null, %s)", (name, json.dumps(sink))
        )


async def test_files_and_webhooks_work_and_nothing_else_is_loaded(
    installation: Installation, orders: Database, http_server: HttpServer
) -> None:
    output = installation.directory / "orders.jsonl"
    _set_pipeline(orders, "to-file", {"type": "file", "output": str(output)})
    report = (
        "import sys\n"
        "from relay.cli import run\n"
        "code = run(['drain'])\n"
        f"print('loaded', [name for name in {UNUSED!r} if name in sys.modules])\n"
        "sys.exit(code)"
    )

    code, said = await installation.run("python", "-c", report, dsn=orders.dsn)

    assert code == 0, said
    assert json.loads(output.read_text())["payload"] == {"id": 1}
    assert "loaded []" in said

    _set_pipeline(orders, "to-webhook", {"type": "webhook", "url": http_server.url})

    code, said = await installation.run("pgtrickle-relay", "drain", dsn=orders.dsn)

    assert code == 0, said
    assert [json.loads(one.body)[0]["payload"] for one in http_server.accepted] == [{"id": 1}]


async def test_a_backend_without_its_extra_fails_with_one_line_that_names_it(
    installation: Installation, orders: Database
) -> None:
    with_driver = {type_ for type_, extra in EXTRAS.items() if _extras()[extra]} & SINKS.keys()
    assert with_driver <= SINKS_WITH_DRIVER.keys()
    for type_ in with_driver:
        _set_pipeline(orders, f"to-{type_}", {"type": type_, **SINKS_WITH_DRIVER[type_]})

    code, said = await installation.run("pgtrickle-relay", "drain", dsn=orders.dsn)

    assert code == 1, said
    assert "Traceback" not in said
    for type_ in with_driver:
        lines = [line for line in said.splitlines() if f"[to-{type_}]" in line]
        named = [
            line for line in lines if f"pip install 'pgtrickle-relay[{EXTRAS[type_]}]'" in line
        ]
        assert len(named) == 1, said


async def test_the_wheel_states_its_license_and_brings_its_types(
    installation: Installation,
) -> None:
    code, said = await installation.run(
        "python",
        "-c",
        "from importlib.metadata import files, metadata\n"
        "print(metadata('pgtrickle-relay')['License-Expression'])\n"
        "print(*(path.name for path in files('pgtrickle-relay')))",
    )

    license_, _, names = said.partition("\n")
    assert code == 0, said
    assert license_ == "Apache-2.0"
    assert {"LICENSE", "py.typed"} <= set(names.split())


async def test_the_wheel_offers_every_extra(installation: Installation) -> None:
    code, said = await installation.run(
        "python",
        "-c",
        "from importlib.metadata import metadata\n"
        "print(*metadata('pgtrickle-relay').get_all('Provides-Extra'))",
    )

    assert code == 0, said
    assert set(said.split()) >= EXTRA_NAMES
    assert _extras().keys() >= EXTRA_NAMES
    brought = {extra: _extras()[extra] for extra in EXTRA_NAMES - {"demo", "all"}}
    assert brought["webhook"] == []
    (everything,) = _extras()["all"]
    assert set(everything.partition("[")[2].rstrip("]").split(",")) == brought.keys()
