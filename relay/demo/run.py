"""The demo: servers, catalog, an application that writes, the real relay, and the count.

Every start begins with an empty database and an empty broker. Ctrl-C, SIGTERM, leaving the view
and the end of ``seconds`` all end the writing; what was written is then given time to arrive, and
counted. A second signal ends without counting.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

import asyncpg
import msgspec

from relay import log
from relay.app import Relay, run_migrate
from relay.demo.embedded import EmbeddedServers, embedded_servers
from relay.demo.orders import Shop
from relay.demo.tally import Summary, count_arrivals, inbox_rows, stored_in_stream
from relay.errors import Outage, RelayError
from relay.events import BatchPublished, Event, PipelineState, StateChanged
from relay.postgres import Connection, connect, postgres_errors
from relay.progress import bar
from relay.settings import PostgresSettings, Settings, schema_identifier
from relay.status import Key, OwnRelay, StatusView, can_show

FORWARD, REVERSE, STREAM = "orders-to-jetstream", "jetstream-to-inbox", "orders"

_DATABASE = "demo"
_TOKEN = "RELAY_DEMO_NATS_TOKEN"  # noqa: S105 - the name of the variable that holds it
_ABOUT = "A demo: orders go from PostgreSQL to NATS JetStream, and from there into order_inbox."
_NATS_RUNS = "Try x: it kills the NATS server. Events wait then, and none is lost."
_NATS_IS_DEAD = "NATS is dead, and orders are written all the same. Press b to bring it back."
_ENDS = "No more orders are written. What waits is delivered, and then everything is counted."
KEYS = (
    Key(key="x", label="kill NATS", help="as a crash would; orders wait in their outbox"),
    Key(key="b", label="bring NATS back", help="what waited is delivered then"),
)
_PROGRESS_EVERY_S = 1.0
_START_TIMEOUT_S = 30.0
_PATIENCE_S = 15.0
_LOOK_EVERY_S = 0.02


async def run_demo(settings: Settings, *, seconds: float | None, rate: float, as_json: bool) -> int:
    """Run the demo; 0 when everything that was written has arrived, else 1.

    ``seconds``: how long to write, None until interrupted. ``rate``: rows written a second.
    ``as_json``: end with one JSON object on standard output (`Summary`) instead of a text. What
    happens meanwhile goes to standard error, or to the status view where there is a terminal.
    Raises `DriverMissing`, `Outage`.
    """
    started_s = time.monotonic() - process_age_s()
    with _closing_time() as closing:
        _say("starting PostgreSQL and NATS")
        async with embedded_servers() as servers:
            own = _on(servers, settings)
            await _fresh_database(servers.postgres_url)
            await run_migrate(own, say=_say_what_is_new)
            demo = _Demo(own, servers, closing, started_s)
            with _first_of_a_group():
                summary = await demo.run(seconds, rate, shows_view=not as_json and can_show())
    if as_json:
        sys.stdout.write(msgspec.json.encode(summary).decode() + "\n")
    else:
        sys.stdout.write(_in_words(summary))
    sys.stdout.flush()
    return 0 if summary.lost == 0 else 1


def process_age_s() -> float:
    """How long this process exists.

    Without Linux's ``/proc`` it is the processor time used so far, which is somewhat less.
    """
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, IndexError, ValueError):
        return time.process_time()
    return max(age_s, time.process_time())


class _Demo:
    """One demo on servers that run."""

    def __init__(
        self,
        settings: Settings,
        servers: EmbeddedServers,
        closing: asyncio.Event,
        started_s: float,
    ) -> None:
        self._settings = settings
        self._nats = servers.nats
        self._closing = closing
        self._relay = Relay(settings, {**os.environ, _TOKEN: servers.nats.token})
        self._seen = _Seen(started_s)
        self._relay.events.subscribe(self._seen)

    async def run(self, seconds: float | None, rate: float, *, shows_view: bool) -> Summary:
        async with contextlib.AsyncExitStack() as opened:
            # Applications and users like any other: nothing of these connections is the relay's.
            with postgres_errors("connecting"):
                schema = schema_identifier(self._settings.postgres.schema)
                connection = await asyncpg.connect(
                    self._settings.postgres.url,
                    server_settings={"search_path": f"public, {schema}"},
                )
                opened.push_async_callback(connection.close)
                shop_connection = await asyncpg.connect(self._settings.postgres.url)
                opened.push_async_callback(shop_connection.close)
            logs = opened.enter_context(
                contextlib.closing(log.configure(self._settings.log, self._relay.mask))
            )
            event_log = log.EventLog(self._settings.log.repeat_s)
            self._relay.events.subscribe(opened.enter_context(contextlib.closing(event_log)))
            shop = Shop(shop_connection)
            async with asyncio.TaskGroup() as tasks:
                working = tasks.create_task(self._relay.run())
                try:
                    await self._open(shop, connection)
                    view = self._view(shop, logs, seconds) if shows_view else self._lines(shop)
                    async with view:
                        await self._write(shop, rate, seconds)
                        await self._everything_arrived(shop, connection)
                    return await self._summary(shop, connection)
                finally:
                    self._relay.coordinator.stop()
                    with contextlib.suppress(RelayError):
                        await working

    async def _open(self, shop: Shop, connection: Connection) -> None:
        """What a user would type, in this order, while the relay is up already."""
        await shop.open()
        with postgres_errors("setting the demo up"):
            await connection.execute("select enable_outbox('orders', 8760)")
            await connection.execute("select create_inbox('order_inbox')")
            await connection.execute(
                "select set_relay_outbox($1, 'orders', null, $2)",
                FORWARD,
                self._nats_options(create_stream=True),
            )
        # The stream that the second pipeline reads is made by the first.
        await self._seen.running(FORWARD)
        with postgres_errors("setting the demo up"):
            await connection.execute(
                "select set_relay_inbox($1, 'order_inbox', $2)",
                REVERSE,
                self._nats_options(subject="pgtrickle.orders.>"),
            )
        await self._seen.running(REVERSE)

    def _nats_options(self, **keys: object) -> str:
        options = {
            "type": "nats",
            "url": self._nats.url,
            "token": f"${{env:{_TOKEN}}}",
            "stream": STREAM,
            **keys,
        }
        return msgspec.json.encode(options).decode()

    async def _write(self, shop: Shop, rate: float, seconds: float | None) -> None:
        if seconds is not None:
            asyncio.get_running_loop().call_later(seconds, self._closing.set)
        await shop.write(rate, self._closing)

    async def _everything_arrived(self, shop: Shop, connection: Connection) -> None:
        """Wait until the inbox has as much as was written, as long as it still grows."""
        await self._nats.start()
        await self._resume_all(connection)
        rows = await inbox_rows(connection)
        deadline = time.monotonic() + _PATIENCE_S
        while rows < shop.events and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_EVERY_S)
            former, rows = rows, await inbox_rows(connection)
            if rows > former:
                deadline = time.monotonic() + _PATIENCE_S

    async def _resume_all(self, connection: Connection) -> None:
        """What was paused in the view must run for its events to arrive."""
        with postgres_errors("resuming the pipelines"):
            await connection.execute(
                "select enable_relay(name) from list_relay_configs() where not enabled"
            )

    async def _summary(self, shop: Shop, connection: Connection) -> Summary:
        arrival = await count_arrivals(connection)
        stored = await stored_in_stream(self._nats.url, self._nats.token, STREAM)
        return Summary(
            startup_ms=self._seen.startup_ms,
            written=shop.events,
            published=stored,
            received=arrival.received,
            duplicates=self._seen.repeated,
            lost=shop.events - arrival.received,
            latency_ms=arrival.latency_ms,
        )

    @contextlib.asynccontextmanager
    async def _view(self, shop: Shop, logs: log.Logs, seconds: float | None) -> AsyncIterator[None]:
        began_s = time.monotonic()

        def banner() -> Sequence[str]:
            written, received = shop.events, self._seen.received
            figures = f"events written {written:,}   received {received:,}"
            waiting = f"{figures}   waiting {written - received:,}"
            if self._closing.is_set():
                return (_ABOUT, _ENDS, f"{waiting}   {bar(received / max(1, written))}")
            if not self._nats.is_running:
                return (_ABOUT, _NATS_IS_DEAD, waiting)
            if seconds is not None:
                left_s = max(0.0, began_s + seconds - time.monotonic())
                figures += f"   {bar(1 - left_s / seconds)} {left_s:.0f} s left"
            return (_ABOUT, _NATS_RUNS, figures)

        async def kill_nats() -> None:
            await asyncio.to_thread(self._nats.kill)

        own = OwnRelay(self._relay.board, self._relay.database, self._relay.catalog)
        async with StatusView(
            own,
            logs,
            self._settings.ui,
            on_quit=self._closing.set,
            on_lost=self._closing.set,
            banner=banner,
            keys=dict(zip(KEYS, (kill_nats, self._nats.start), strict=True)),
            stops_relay=True,
        ):
            yield

    @contextlib.asynccontextmanager
    async def _lines(self, shop: Shop) -> AsyncIterator[None]:
        began_s = time.monotonic()

        async def tell() -> None:
            while True:
                await asyncio.sleep(_PROGRESS_EVERY_S)
                _say(
                    f"{time.monotonic() - began_s:4.0f} s"
                    f"   written {shop.events}"
                    f"   published {self._seen.published}"
                    f"   received {self._seen.received}"
                )

        _say("writing orders; Ctrl-C ends it")
        telling = asyncio.create_task(tell())
        try:
            yield
        finally:
            telling.cancel()
            await asyncio.wait([telling])


class _Seen:
    """An observer of the relay: what has started, what has moved, when the first event was in."""

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._changed = asyncio.Event()
        self._states: dict[str, StateChanged] = {}
        self.startup_ms: int | None = None
        self.published = 0
        self.received = 0
        self.repeated = 0

    def __call__(self, event: Event) -> None:
        match event:
            case StateChanged():
                self._states[event.pipeline] = event
                self._changed.set()
            case BatchPublished(direction="forward"):
                self.published += event.messages
            case BatchPublished():
                self.received += event.messages - event.duplicates
                self.repeated += event.duplicates
                if self.startup_ms is None and event.messages:
                    self.startup_ms = round((time.monotonic() - self._started_s) * 1000)

    async def running(self, pipeline: str) -> None:
        """Wait until the pipeline runs. Raises `Outage` when it does not in time."""
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while not self._is_running(pipeline):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            state = self._states.get(pipeline)
            why = "it was not started" if state is None else f"{state.state.value} {state.reason}"
            raise Outage(f"the pipeline {pipeline} does not run: {why}") from None

    def _is_running(self, pipeline: str) -> bool:
        state = self._states.get(pipeline)
        return state is not None and state.state is PipelineState.RUNNING


def _on(servers: EmbeddedServers, settings: Settings) -> Settings:
    """The same settings on the demo's own database."""
    own = msgspec.structs.replace(
        settings.postgres,
        url=f"{servers.postgres_url.rpartition('/')[0]}/{_DATABASE}",
        sslmode=None,
        sslrootcert=None,
        sslcert=None,
        sslkey=None,
    )
    return msgspec.structs.replace(settings, postgres=own)


async def _fresh_database(url: str) -> None:
    connection = await connect(PostgresSettings(url=url), purpose="demo")
    try:
        with postgres_errors("making the demo's database"):
            await connection.execute(f"drop database if exists {_DATABASE} with (force)")
            await connection.execute(f"create database {_DATABASE} template template0")
    finally:
        await connection.close()


@contextlib.contextmanager
def _closing_time() -> Iterator[asyncio.Event]:
    """Set by SIGINT and SIGTERM; the second one cancels what runs."""
    loop = asyncio.get_running_loop()
    closing = asyncio.Event()
    main = asyncio.current_task()

    def close() -> None:
        if closing.is_set() and main is not None:
            main.cancel()
        closing.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, close)
    try:
        yield closing
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _first_of_a_group() -> Iterator[None]:
    """Of errors that came together, the first of ours: the command line shows one line."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, RelayError):
            raise error from None
        raise


def _in_words(summary: Summary) -> str:
    latency = summary.latency_ms
    rows: Mapping[str, str] = {
        "written": f"{summary.written:>8}   events of committed changes (an update is two)",
        "published": f"{summary.published:>8}   messages in the JetStream stream",
        "received": f"{summary.received:>8}   rows in the table order_inbox",
        "duplicates": f"{summary.duplicates:>8}   arrived again and were skipped",
        "lost": f"{summary.lost:>8}",
    }
    lines = [f"  {name:<12}{text}" for name, text in rows.items()]
    if latency is not None:
        lines.append(
            f"  {'latency':<12}p50 {latency.p50:.1f} ms, p95 {latency.p95:.1f} ms,"
            f" p99 {latency.p99:.1f} ms from commit to commit in the inbox"
        )
    if summary.startup_ms is not None:
        lines.append(f"  {'startup':<12}{summary.startup_ms} ms to the first event received")
    return "orders → JetStream → order_inbox\n" + "\n".join(lines) + "\n"


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _say_what_is_new(line: str) -> None:
    if line.startswith("the catalog"):
        _say(line)
