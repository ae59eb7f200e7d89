"""The composition root: builds a relay from its settings, runs it, and owns the signals.

Start, main loop, stop: `run_relay` reads as these three. Everything that the process holds open is
opened and closed here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets as randomness
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING

from relay import __version__, log
from relay.assembly import Access
from relay.board import Board
from relay.catalog import CONFIG_CHANNEL, OUTBOX_CHANNEL, Catalog
from relay.coordinator import Coordinator
from relay.errors import ConfigurationError
from relay.events import Events
from relay.housekeeping import Housekeeping
from relay.http import HttpServer
from relay.locks import Locks, unowned
from relay.metrics import Metrics
from relay.migrate import MigrationStep, contents, file_count, migrate, uninstall
from relay.postgres import Database, connect
from relay.process import keep_freed_memory, rare_collections
from relay.profiles import check_profiles
from relay.progress import Progress
from relay.settings import Settings, UiSettings
from relay.start import (
    naming_the_variable,
    opened,
    operator_secrets,
    other_groups,
    resolved,
)

if TYPE_CHECKING:  # the view, and rich with it, only where one is shown
    from relay.status.fleet import Watched

_log = logging.getLogger(__name__)

# Beyond the time for what is in flight: to close connections.
_LAST_WORD_S = 3.0


class Relay:
    """One relay process, built and not yet running."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self._settings = settings
        check_profiles(settings.backends)
        access = Access(settings, environment)
        self.mask = access.mask
        self.worker_id = settings.relay.worker_id or _own_name()
        self.events = Events()
        self.board = Board(
            worker_id=self.worker_id,
            group_id=settings.relay.group_id,
            stalled_after_s=settings.metrics.stalled_after_s,
            mask=access.mask,
        )
        self._metrics = Metrics(self.board)
        self.database = access.database()
        self.catalog = Catalog(self.database, settings.relay.group_id)
        self.coordinator = Coordinator(
            settings=settings.relay,
            database=self.database,
            catalog=self.catalog,
            locks=Locks(self.database.settings, settings.relay.group_id),
            builder=access.assembly(
                self.database, self.catalog, worker_id=self.worker_id, emit=self.events.emit
            ),
            emit=self.events.emit,
        )
        self._housekeeping = Housekeeping(
            catalog=self.catalog,
            worker_id=self.worker_id,
            owned=lambda: self.coordinator.rows,
            unowned=partial(unowned, self.database, settings.relay.group_id),
            report=lambda: self.board.snapshot().to_json(),
            emit=self.events.emit,
        )
        self.http = HttpServer(
            settings.metrics,
            board=self.board,
            render_metrics=self._metrics.render,
            measure_lag=self._housekeeping.observe_lag,
            find_delivery=self.catalog.delivered,
        )
        self.events.subscribe(self.board)

    async def run(self, *, until_drained: bool = False) -> bool:
        """Work until stopped or drained; True when everything in flight was finished.

        Raises `ConfigurationError`, `CatalogMissing`, or `Outage` when it can't even start.
        """
        async with AsyncExitStack() as stack:
            await self.http.start()
            stack.push_async_callback(self.http.aclose)
            await stack.enter_async_context(opened(self.database, self.catalog))
            await self._require_primary()
            await self._announce()
            await stack.enter_async_context(self._background())
            return await self.coordinator.run(until_drained=until_drained)

    async def _require_primary(self) -> None:
        """What a relay does, it writes down; a standby would let it start and then do nothing."""
        row = await self.database.fetch_row(
            "looking at the server", "select pg_catalog.pg_is_in_recovery() as is_standby"
        )
        if row is not None and row["is_standby"]:
            raise ConfigurationError(
                "the database is a standby",
                remedy="connect to the primary; with several hosts, add"
                " target_session_attrs=read-write",
            )

    async def _announce(self) -> None:
        """The first line of a start, and a warning where this start delivers everything again."""
        rows = [row for row in await self.catalog.pipelines() if row.enabled]
        address = self.http.address
        _log.info(
            "pgtrickle-relay %s: group %s, database %s, http %s, %d pipeline%s",
            __version__,
            self.catalog.group_id,
            await self.database.whereabouts(),
            "off" if address is None else f"{address[0]}:{address[1]}",
            len(rows),
            "" if len(rows) == 1 else "s",
        )
        others = other_groups(await self.catalog.readers(), self.catalog.group_id)
        if others and any(row.direction == "forward" for row in rows):
            _log.warning(
                "relay group %s is new here and delivers everything from the start again, while"
                " others have positions: %s; is relay.group_id what you mean?",
                self.catalog.group_id,
                ", ".join(others),
            )

    @contextlib.asynccontextmanager
    async def _background(self) -> AsyncIterator[None]:
        pace = self._settings.relay
        async with asyncio.TaskGroup() as tasks:
            background = [
                tasks.create_task(self.database.listen((CONFIG_CHANNEL, OUTBOX_CHANNEL))),
                tasks.create_task(
                    self._housekeeping.run(
                        lag_interval_s=self._settings.metrics.lag_interval_s,
                        sweep_interval_s=pace.sweep_interval_s,
                        report_interval_s=pace.report_interval_s,
                    )
                ),
            ]
            try:
                yield
            finally:
                for task in background:
                    task.cancel()
        await self._housekeeping.retire()


async def run_relay(settings: Settings) -> int:
    """Run a relay in this process until a signal ends it; the exit code."""
    return 0 if await work(Relay(settings, os.environ), settings) else 1


async def work(relay: Relay, settings: Settings, *, until_drained: bool = False) -> bool:
    """Run this relay with logs, view and signals of the process; True as `Relay.run`."""
    async with AsyncExitStack() as stack:
        logs = stack.enter_context(contextlib.closing(log.configure(settings.log, relay.mask)))
        event_log = stack.enter_context(contextlib.closing(log.EventLog(settings.log.repeat_s)))
        relay.events.subscribe(event_log)
        restore_terminal = await stack.enter_async_context(_shown(relay, logs, settings.ui))
        patience_s = settings.relay.shutdown_timeout_s + _LAST_WORD_S
        stack.enter_context(_signals(relay.coordinator, restore_terminal, patience_s))
        stack.enter_context(rare_collections())
        keep_freed_memory()
        return await relay.run(until_drained=until_drained)


async def run_migrate(settings: Settings, say: Callable[[str], None]) -> int:
    """Install or upgrade the catalog, saying what is done; the exit code."""
    postgres = resolved(settings.postgres, operator_secrets(os.environ))
    with naming_the_variable(postgres):
        connection = await connect(postgres, purpose="migrate")

    progress = Progress()
    files = file_count()
    done = 0

    def on_step(step: MigrationStep) -> None:
        nonlocal done
        done += 1
        progress.clear()
        if step.is_applied:
            say(f"applied  {step.filename}")
        progress.show(done, files, f"{done} of {files} files")

    try:
        report = await migrate(connection, on_step=on_step, schema=postgres.schema)
    finally:
        progress.clear()
        await connection.close()
    for notice in report.notices:
        say(notice)
    if not report.has_own_role:
        say(f"the role pgtrickle_owner could not be created: {report.owner} owns the functions")
    state = "up to date" if report.is_up_to_date else "now"
    say(f"the catalog is {state} at {report.version_after}")
    return 0


async def run_uninstall(
    settings: Settings, *, confirm: Callable[[str], bool], say: Callable[[str], None]
) -> int:
    """Remove the catalog with all outboxes and inboxes, once ``confirm`` agrees; the exit code."""
    postgres = resolved(settings.postgres, operator_secrets(os.environ))
    with naming_the_variable(postgres):
        connection = await connect(postgres, purpose="migrate")
    try:
        kept = await contents(connection, postgres.schema)
        if not kept:
            say(f"there is no catalog in schema {postgres.schema}")
            return 0
        if not confirm(
            f"This removes schema {postgres.schema} with {', '.join(kept)}. Events that were not"
            " delivered and messages in inboxes of the schema are lost. Go on?"
        ):
            say("nothing was removed")
            return 1
        left = await uninstall(connection, schema=postgres.schema)
    finally:
        await connection.close()
    say(f"schema {postgres.schema} is removed, and the triggers of captured tables with it")
    for function in left:
        say(f"left for its owner: drop function {function}")
    say(
        "the roles pgtrickle_owner, pgtrickle_relay and pgtrickle_publisher stay: they belong to"
        " the whole cluster"
    )
    return 0


async def watch_fleet(settings: Settings) -> bool:
    """Show the status view over the fleet until it is left; touches no relay. Raises as `opened`.

    False when the view could not go on. For where `relay.status.can_show` is true.
    """
    from relay.status import WholeFleet

    operator = operator_secrets(os.environ)
    database = Database(resolved(settings.postgres, operator))
    catalog = Catalog(database, settings.relay.group_id)
    async with opened(database, catalog):
        return await _watch(WholeFleet(database, catalog), settings, operator.mask)


async def watch_relay(settings: Settings, address: str) -> bool:
    """The same over one relay, which is asked at its address alone. Raises as `status_of`."""
    from relay.status import OneRelay

    return await _watch(OneRelay(address), settings, operator_secrets(os.environ).mask)


async def _watch(watched: Watched, settings: Settings, mask: Callable[[str], str]) -> bool:
    from relay.status import StatusView

    left = asyncio.Event()
    await watched.refresh()
    with contextlib.closing(log.configure(settings.log, mask)) as logs:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, left.set)
        view = StatusView(watched, logs, settings.ui, on_quit=left.set, on_lost=left.set)
        async with view:
            await left.wait()
    return not view.is_lost


@contextlib.asynccontextmanager
async def _shown(relay: Relay, logs: log.Logs, ui: UiSettings) -> AsyncIterator[Callable[[], None]]:
    """The status view, where it is asked for and possible; gives what restores the terminal."""
    if ui.mode != "tui" or not sys.stdout.isatty():
        yield lambda: None
        return
    from relay.status import OwnRelay, StatusView, can_show

    if not can_show():
        yield lambda: None
        return
    watched = OwnRelay(relay.board, relay.database, relay.catalog)
    stop = relay.coordinator.stop
    async with StatusView(watched, logs, ui, on_quit=stop, stops_relay=True) as view:
        yield view.restore


@contextlib.contextmanager
def _signals(
    coordinator: Coordinator, restore_terminal: Callable[[], None], patience_s: float
) -> Iterator[None]:
    """First SIGTERM or SIGINT: stop gracefully. Second: exit at once. SIGHUP: reload.

    After ``patience_s`` the process ends whatever still hangs; what was not acknowledged is
    delivered again.
    """
    loop = asyncio.get_running_loop()
    is_stopping = False

    def stop(number: int) -> None:
        nonlocal is_stopping
        if is_stopping:
            restore_terminal()
            os._exit(128 + number)
        is_stopping = True
        coordinator.stop()
        loop.call_later(patience_s, give_up)

    def give_up() -> None:
        restore_terminal()
        _log.error("not everything ended in time, what was not acknowledged is delivered again")
        os._exit(1)

    handlers: dict[int, Callable[[], None]] = {
        signal.SIGTERM: lambda: stop(signal.SIGTERM),
        signal.SIGINT: lambda: stop(signal.SIGINT),
        signal.SIGHUP: coordinator.reload,
    }
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


def _own_name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{randomness.token_hex(2)}"
