"""`peers-to-jetstream` and `peers-from-kafka`: the relay beside other programs, on the same work.

The programs take turns in one run, each started for its turn on a backlog that waits, and what
arrived is counted at the destination. A program that is not installed is left out and named.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Final, Protocol
from urllib.parse import urlsplit

import msgspec
import yaml

from relay.demo.embedded import LOOPBACK
from scripts.benchmark.backends import Origin, ServerMissing, source_backend
from scripts.benchmark.forward import seconds_of
from scripts.benchmark.inbox import Inbox
from scripts.benchmark.orders import COLUMNS, VALUES, make_table
from scripts.benchmark.row import Row, Target
from scripts.benchmark.server import free_port, running_server
from scripts.benchmark.surroundings import (
    STREAM,
    Surroundings,
    migrated_database,
    surroundings,
)

# Delivered first and not counted: what a virtual machine compiles meanwhile.
WARM_UP_PART: Final = 0.5

_INBOX: Final = "arrived"
_SLOT: Final = "debezium"
# How many outputs of Bento share the keys; each has one message in flight, which keeps its order.
_LANES: Final = 16
_TIMEOUT_S: Final = 120.0

Figures = dict[str, float]
# Figures and how many different events arrived, of one program on servers and database of the turn.
Turn = Callable[[Surroundings, "Program"], Awaitable[tuple[Figures, int]]]


class _Row(msgspec.Struct, frozen=True):
    id: int


class _Event(msgspec.Struct, frozen=True):
    """The id of an order, wherever a program puts it: the row, an envelope's, a change's."""

    id: int | None = None
    payload: _Row | None = None
    after: _Row | None = None


class Program(Protocol):
    """One that takes part. ``note``: what it does, and in whose favour that is."""

    name: str
    keeps_order: bool
    note: str

    async def prepare(self, around: Surroundings) -> None:
        """Called before the backlog is written."""

    def running(self, around: Surroundings) -> AbstractAsyncContextManager[None]:
        """The process, from its start to its end. Raises `RuntimeError` where it does not start."""
        ...


class Relay:
    """This relay, with the defaults of everything."""

    name = "relay"
    keeps_order = True
    note = "reads the outbox that its trigger wrote; what the trigger costs writers is `capture`"

    async def prepare(self, around: Surroundings) -> None:
        await around.postgres.execute("select pgtrickle.enable_outbox('orders')")
        await around.set_pipeline("orders-to-jetstream", "orders")

    @contextlib.asynccontextmanager
    async def running(self, around: Surroundings) -> AsyncIterator[None]:
        async with around.relay():
            yield


class RelayFromKafka(Relay):
    """The same in the other direction."""

    note = "stores key, headers and trace besides, and a bad record becomes a dead letter"

    def __init__(self, origin: Origin) -> None:
        self._origin = origin

    async def prepare(self, around: Surroundings) -> None:
        await around.reverse("kafka-to-inbox", _INBOX, self._origin.source())


class DebeziumServer:
    """Debezium Server: the table by logical decoding, into JetStream."""

    name = "Debezium Server"
    keeps_order = True
    note = (
        "reads the write-ahead log, so writers pay nothing for it; publishes asynchronously,"
        " without message ids and without schemas in its messages; the rest by default"
    )

    def __init__(self) -> None:
        home = os.environ.get("DEBEZIUM_SERVER_HOME")
        java_home = os.environ.get("JAVA_HOME")
        java = shutil.which("java", path=f"{java_home}/bin" if java_home else None)
        runners = sorted(Path(home).glob("debezium-server-*runner.jar")) if home else []
        if java is None or not runners:
            raise ServerMissing(
                "Debezium Server is left out: unpack io.debezium:debezium-server-dist of Maven"
                " Central, name its directory in DEBEZIUM_SERVER_HOME and a Java 21 in JAVA_HOME"
            )
        self._command = [java, "-cp", f"{runners[-1]}:{runners[-1].parent}/lib/*"]

    async def prepare(self, around: Surroundings) -> None:
        await around.postgres.execute(f"create publication {_SLOT} for table orders")
        await around.postgres.execute(
            f"select pg_create_logical_replication_slot('{_SLOT}', 'pgoutput')"
        )

    @contextlib.asynccontextmanager
    async def running(self, around: Surroundings) -> AsyncIterator[None]:
        port = free_port()
        postgres = urlsplit(around.database_url)
        source = {
            "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
            "offset.storage.file.filename": "offsets.dat",
            "database.hostname": postgres.hostname,
            "database.port": postgres.port,
            "database.user": postgres.username,
            "database.password": postgres.password,
            "database.dbname": postgres.path.lstrip("/"),
            "topic.prefix": STREAM,
            "plugin.name": "pgoutput",
            "slot.name": _SLOT,
            "publication.name": _SLOT,
            "publication.autocreate.mode": "disabled",
            "snapshot.mode": "no_data",
        }
        settings = {
            **{f"debezium.source.{name}": value for name, value in source.items()},
            "debezium.sink.type": "nats-jetstream",
            "debezium.sink.nats-jetstream.url": _nats_url(around),
            "debezium.sink.nats-jetstream.create-stream": "false",
            "debezium.sink.nats-jetstream.async.enabled": "true",
            "debezium.format.key.schemas.enable": "false",
            "debezium.format.value.schemas.enable": "false",
            "quarkus.http.host": LOOPBACK,
            "quarkus.http.port": port,
            "quarkus.log.level": "WARN",
        }
        with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-debezium-") as name:
            file = Path(name) / "application.properties"
            file.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
            configured = (*self._command, f"-Dquarkus.config.locations={file}")
            try:
                async with running_server(
                    [*configured, "io.debezium.server.Main"], Path(name), port
                ):
                    yield
            finally:
                await around.postgres.execute(f"select pg_drop_replication_slot('{_SLOT}')")


class Bento:
    """Bento: the table by one query, into JetStream."""

    name = "Bento"
    keeps_order = True
    note = (
        "reads the table by one query, once, without a position that it could come back to;"
        f" its order per key is that of {_LANES} outputs with one message in flight each"
    )

    def __init__(self) -> None:
        found = shutil.which(os.environ.get("BENTO", "bento"))
        if found is None:
            raise ServerMissing(
                "Bento is left out: put its program on the PATH or name it in BENTO"
                " (https://warpstreamlabs.github.io/bento/)"
            )
        self._program = found

    async def prepare(self, around: Surroundings) -> None:
        """Part of the protocol."""

    @contextlib.asynccontextmanager
    async def running(self, around: Surroundings) -> AsyncIterator[None]:
        port = free_port()
        document = {
            "http": {"address": f"{LOOPBACK}:{port}"},
            "logger": {"level": "WARN"},
            "pipeline": {"threads": 1},
            "input": self._input(around),
            "output": self._output(around),
        }
        with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-bento-") as name:
            file = Path(name) / "bento.yaml"
            file.write_text(yaml.safe_dump(document))
            async with running_server([self._program, "-c", file], Path(name), port):
                yield

    def _input(self, around: Surroundings) -> Mapping[str, object]:
        query = "select to_jsonb(o)::text as row from orders as o order by o.id"
        # What follows the last row keeps the process from ending.
        at_rest = {"generate": {"interval": "1h", "mapping": "root = deleted()"}}
        rows = {
            "sql_raw": {"driver": "postgres", "dsn": _libpq_url(around), "query": query},
            "processors": [{"mapping": "root = this.row.parse_json()"}],
        }
        return {"sequence": {"inputs": [rows, at_rest]}}

    def _output(self, around: Surroundings) -> Mapping[str, object]:
        lanes = [
            {"check": f"this.id % {_LANES} == {lane}", "output": self._jetstream(around, 1)}
            for lane in range(_LANES)
        ]
        return {"switch": {"cases": lanes}}

    @staticmethod
    def _jetstream(around: Surroundings, in_flight: int) -> Mapping[str, object]:
        return {
            "nats_jetstream": {
                "urls": [_nats_url(around)],
                "subject": f"{STREAM}.orders.insert",
                "headers": {"Nats-Msg-Id": '${! json("id") }'},
                "max_in_flight": in_flight,
            }
        }


class BentoInAnyOrder(Bento):
    """The same as it is by default."""

    name = "Bento in any order"
    keeps_order = False
    note = "as before, with 1,024 messages in flight on one output, which is its default"

    def _output(self, around: Surroundings) -> Mapping[str, object]:
        return self._jetstream(around, 1024)


class BentoFromKafka(Bento):
    """Bento: a topic into the inbox table."""

    note = (
        "inserts batches of 2,000, one in flight; a record that the table refuses keeps its whole"
        " batch out, and later ones pass it"
    )

    def __init__(self, origin: Origin) -> None:
        super().__init__()
        self._origin = origin

    def _input(self, around: Surroundings) -> Mapping[str, object]:  # noqa: ARG002
        source = self._origin.source()
        return {
            "kafka_franz": {
                "seed_brokers": [source["brokers"]],
                "topics": [source["topic"]],
                "consumer_group": str(source["topic"]),
                "checkpoint_limit": 8_000,
                "batching": {"count": 2_000, "period": "50ms"},
            }
        }

    def _output(self, around: Surroundings) -> Mapping[str, object]:
        place = '[@kafka_topic, @kafka_partition.string(), @kafka_offset.string()].join(":")'
        return {
            "sql_insert": {
                "driver": "postgres",
                "dsn": _libpq_url(around),
                "table": f"pgtrickle.{_INBOX}",
                "columns": ["event_id", "event_type", "payload"],
                "args_mapping": f'root = [{place}, "in", content().string()]',
                "suffix": "on conflict (event_id) do nothing",
                "max_in_flight": 1,
            }
        }


async def peers_to_jetstream(*, events: int, runs: int, say: Callable[[str], None]) -> Row:
    """A backlog of single-row inserts, each committed by itself, into a stream.

    By the stream's own clock, from when it holds the warm-up to the last event. Raises
    `ServerMissing` where nobody else is installed.
    """
    programs = _installed(Relay, (DebeziumServer, Bento, BentoInAnyOrder), say)
    warm_up = round(events * WARM_UP_PART)

    async def turn(around: Surroundings, program: Program) -> tuple[Figures, int]:
        await around.fresh_stream()
        await make_table(around.postgres, "orders")
        await program.prepare(around)
        await _commit_one_by_one(around, warm_up + events)
        async with program.running(around):
            state = await around.nats.until_stored(
                STREAM, warm_up + events, _TIMEOUT_S + events / 1000
            )
        began = await around.nats.stored_at(STREAM, warm_up)
        stored = await around.nats.read(STREAM, state.messages)
        ids = [_id_of(message.body) for message in stored]
        overtaken = sum(one > other for one, other in itertools.pairwise(ids))
        seconds = seconds_of(state.last_ts) - seconds_of(began)
        return {"per_s": events / max(seconds, 1e-6), "overtaken": overtaken}, len(set(ids))

    async with surroundings({"wal_level": "logical"}) as around:
        results, received = await _in_turns("peers-to-jetstream", around, programs, turn, runs, say)
    return _row("peers-to-jetstream", programs, results, (warm_up + events) * runs, received)


async def peers_from_kafka(*, events: int, runs: int, say: Callable[[str], None]) -> Row:
    """The records of a topic into an inbox table.

    By the table's own clock, from when it holds the warm-up to the last batch. Raises
    `ServerMissing` where nobody else is installed.
    """
    warm_up = round(events * WARM_UP_PART)
    Bento()  # Raises before Kafka is started for nobody.
    async with (
        surroundings() as around,
        source_backend("kafka").opened(around) as origin,
    ):
        programs = _installed(
            lambda: RelayFromKafka(origin), (lambda: BentoFromKafka(origin),), say
        )

        async def turn(around: Surroundings, program: Program) -> tuple[Figures, int]:
            await around.postgres.execute("select pgtrickle.create_inbox($1)", _INBOX)
            await origin.fill(warm_up + events)
            await program.prepare(around)
            inbox = Inbox(around.postgres, f"pgtrickle.{_INBOX}")
            async with program.running(around):
                stretch = await inbox.until_holding(
                    warm_up + events, _TIMEOUT_S + events / 1000, warm_up=warm_up
                )
            different = await around.count(
                f"select count(distinct payload ->> 'id') from pgtrickle.{_INBOX}"
            )
            return {"per_s": stretch.per_s}, different

        results, received = await _in_turns("peers-from-kafka", around, programs, turn, runs, say)
    return _row("peers-from-kafka", programs, results, (warm_up + events) * runs, received)


def _installed(
    relay: Callable[[], Program],
    peers: Sequence[Callable[[], Program]],
    say: Callable[[str], None],
) -> Sequence[Program]:
    """The relay and who else can be found. Raises `ServerMissing` where that is nobody."""
    programs, missing = [relay()], dict[str, None]()
    for peer in peers:
        try:
            programs.append(peer())
        except ServerMissing as reason:
            missing[str(reason)] = None
    if len(programs) == 1:
        raise ServerMissing("\n".join(missing))
    for line in (*missing, *(f"{program.name}: {program.note}" for program in programs)):
        say(line)
    return programs


async def _in_turns(
    row: str,
    around: Surroundings,
    programs: Sequence[Program],
    turn: Turn,
    runs: int,
    say: Callable[[str], None],
) -> tuple[list[Figures], int]:
    """The figures of each run, by program; how many different events arrived in all."""
    results: list[Figures] = []
    received = 0
    for run in range(runs):
        result: Figures = {}
        first = run % len(programs)
        for program in (*programs[first:], *programs[:first]):
            async with migrated_database(around.servers) as (url, postgres):
                own = replace(around, database_url=url, postgres=postgres)
                figures, different = await turn(own, program)
            received += different
            result |= {f"{program.name}: {figure}": value for figure, value in figures.items()}
            say(f"{row} {run + 1}/{runs}: {program.name} {figures['per_s']:,.0f}/s")
        results.append(result)
    return results, received


def _row(
    name: str, programs: Sequence[Program], results: list[Figures], sent: int, received: int
) -> Row:
    """The relay is to be ahead of each that keeps the order of a key."""
    figures = {figure: median(result[figure] for result in results) for figure in results[0]}
    relay, *peers = programs
    ratios = {
        peer.name: median(
            result[f"{relay.name}: per_s"] / result[f"{peer.name}: per_s"] for result in results
        )
        for peer in peers
    }
    return Row(
        name=name,
        title="; ".join(f"{program.name} {program.note}" for program in programs),
        targets=[
            Target(
                figure=f"of {peer.name}, {figures[f'{relay.name}: per_s']:,.0f} to"
                f" {figures[f'{peer.name}: per_s']:,.0f}/s",
                value=100 * ratios[peer.name],
                bound="at least",
                limit=100,
                unit="%",
            )
            for peer in peers
            if peer.keeps_order
        ],
        figures=figures,
        runs=results,
        counted={"sent": sent * len(programs), "received": received},
    )


async def _commit_one_by_one(around: Surroundings, rows: int) -> None:
    """So many inserts, each in a transaction of its own; only the last waits for the disk."""
    await around.postgres.execute("set synchronous_commit to off")
    await around.postgres.execute(
        f"do $$ begin for n in 1..{rows} loop"
        f" insert into orders ({COLUMNS}) values ({VALUES}); commit; end loop; end $$"
    )
    await around.postgres.execute("reset synchronous_commit")
    await around.postgres.execute("vacuum analyze orders")
    await around.postgres.execute("checkpoint")


def _id_of(body: bytes) -> int:
    event = _decode(body)
    row = event.payload or event.after
    found = event.id if row is None else row.id
    if found is None:
        raise RuntimeError("a message in the stream has no order in it")
    return found


_decode = msgspec.json.Decoder(_Event).decode


def _nats_url(around: Surroundings) -> str:
    """With the token in it, which is how both peers take one."""
    nats = around.servers.nats
    return nats.url.replace("://", f"://{nats.token}@")


def _libpq_url(around: Surroundings) -> str:
    return f"{around.database_url}?sslmode=disable"
