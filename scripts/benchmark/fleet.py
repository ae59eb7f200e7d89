"""`idle`, `fleet` and `claim-check`: what many pipelines, many relays and one large row cost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from statistics import median
from typing import Final

from scripts.benchmark.orders import COLUMNS, VALUES, make_table
from scripts.benchmark.row import Row, Target
from scripts.benchmark.surroundings import STREAM, Surroundings, surroundings

IDLE_PIPELINES: Final = 300
IDLE_OF_A_CORE: Final = 0.05
RELAYS: Final = 10
PIPELINES: Final = 50
OWNED_WITHIN_S: Final = 5.0
FAILOVER_WITHIN_S: Final = 2.0
CLAIM_CHECK_ROWS: Final = 1_000_000
CLAIM_CHECK_MIB: Final = 32.0

# The embedded server takes a hundred connections.
_POOL: Final = "postgres.pool_size=5"
_WARM_UP_S: Final = 15.0
_BOUND_S: Final = 60.0
_TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")
# Who holds the lock of each pipeline: a session of one relay each.
_OWNERS: Final = """
select l.pid, count(*) as held from pg_locks as l
where l.locktype = 'advisory' and l.mode = 'ExclusiveLock' and l.granted
    and l.database = (select d.oid from pg_database as d where d.datname = current_database())
group by l.pid
"""


async def idle(*, seconds: float, say: Callable[[str], None]) -> Row:
    """Processor time of a relay and its PostgreSQL while many pipelines have nothing to do."""
    async with (
        surroundings() as around,
        _pipelines(around, IDLE_PIPELINES),
        around.relay() as relay,
    ):
        await _until_owned(around, IDLE_PIPELINES, sessions=1)
        await asyncio.sleep(_WARM_UP_S)
        server = _parent(await around.count("select pg_backend_pid()"))
        before = [_processor_s(relay), _processor_s(server, with_children=True)]
        started = time.monotonic()
        await asyncio.sleep(seconds)
        elapsed_s = time.monotonic() - started
        after = [_processor_s(relay), _processor_s(server, with_children=True)]
    in_relay, in_server = (
        (end - begin) / elapsed_s for begin, end in zip(before, after, strict=True)
    )
    say(f"idle: {in_relay:.1%} of a core in the relay, {in_server:.1%} in PostgreSQL")
    return Row(
        name="idle",
        title=f"{IDLE_PIPELINES} pipelines with nothing to do",
        targets=[
            Target(
                figure="of a core, relay and server together",
                value=100 * (in_relay + in_server),
                bound="below",
                limit=100 * IDLE_OF_A_CORE,
                unit="%",
            )
        ],
        figures={"relay": in_relay, "server": in_server},
        runs=[{"relay": in_relay, "server": in_server}],
        counted={"sent": 0, "received": 0},
    )


async def fleet(*, runs: int, say: Callable[[str], None]) -> Row:
    """How soon many relays own all pipelines, each once; and how soon one's death is made good.

    From the start of the first process, and from SIGKILL, to when other sessions hold the locks.
    """
    results: list[dict[str, float]] = []
    async with surroundings() as around, _pipelines(around, PIPELINES):
        for run in range(1, runs + 1):
            async with contextlib.AsyncExitStack() as relays:
                started = time.monotonic()
                pids = await asyncio.gather(
                    *(relays.enter_async_context(around.relay(_POOL)) for _ in range(RELAYS))
                )
                ready_s = time.monotonic() - started
                await _until_owned(around, PIPELINES)
                owned_s = time.monotonic() - started - ready_s
                os.kill(pids[0], signal.SIGKILL)
                killed = time.monotonic()
                await _until_owned(around, PIPELINES, gone=True)
                failover_s = time.monotonic() - killed
            results.append({"ready_s": ready_s, "owned_s": owned_s, "failover_s": failover_s})
            say(
                f"fleet {run}/{runs}: ready in {ready_s:.1f} s, all owned {owned_s:.2f} s later,"
                f" again {failover_s:.2f} s after a kill"
            )
    figures = {name: median(result[name] for result in results) for name in results[0]}
    return Row(
        name="fleet",
        title=f"{RELAYS} relays that start at once, {PIPELINES} pipelines",
        targets=[
            Target(
                figure="all owned, from when the relays are ready",
                value=figures["owned_s"],
                bound="below",
                limit=OWNED_WITHIN_S,
                unit="s",
            ),
            Target(
                figure="all owned again after kill -9 of one",
                value=figures["failover_s"],
                bound="below",
                limit=FAILOVER_WITHIN_S,
                unit="s",
            ),
        ],
        figures=figures,
        runs=results,
        counted={"sent": 0, "received": 0},
    )


async def claim_check(*, say: Callable[[str], None]) -> Row:
    """By how much one statement of a million rows makes the relay that sends it grow."""
    async with surroundings() as around:
        await make_table(around.postgres, "orders")
        await around.postgres.execute("select pgtrickle.enable_outbox('orders')")
        await around.fresh_stream()
        await around.set_pipeline("orders-to-jetstream", "orders")
        async with around.relay() as relay:
            # Code, caches and connections are there before it is measured.
            await _insert(around, 20_000)
            await around.nats.until_stored(STREAM, 20_000, timeout_s=_BOUND_S)
            before_kib = _peak_kib(relay)
            await _insert(around, CLAIM_CHECK_ROWS)
            sent = 20_000 + CLAIM_CHECK_ROWS
            await around.nats.until_stored(STREAM, sent, timeout_s=10 * _BOUND_S)
            grown_mib = (_peak_kib(relay) - before_kib) / 1024
            received = (await around.nats.state_of(STREAM)).messages
    say(f"claim-check: {grown_mib:.1f} MiB more for {CLAIM_CHECK_ROWS:,} rows")
    return Row(
        name="claim-check",
        title=f"one statement of {CLAIM_CHECK_ROWS:,} rows",
        targets=[
            Target(
                figure="growth of the relay's peak memory",
                value=grown_mib,
                bound="below",
                limit=CLAIM_CHECK_MIB,
                unit="MiB",
            )
        ],
        figures={"grown_mib": grown_mib},
        runs=[{"grown_mib": grown_mib}],
        counted={"sent": sent, "received": received},
    )


@contextlib.asynccontextmanager
async def _pipelines(around: Surroundings, count: int) -> AsyncIterator[None]:
    """As many outboxes, each with a pipeline to a file of its own; the files go in the end."""
    with tempfile.TemporaryDirectory(prefix="pgtrickle-bench-") as directory:
        for number in range(count):
            table = f"orders_{number}"
            await make_table(around.postgres, table)
            await around.postgres.execute("select pgtrickle.enable_outbox($1)", table)
            sink = {"type": "file", "output": f"{directory}/{number}.jsonl"}
            await around.forward(f"pipeline-{number}", table, sink)
        yield


async def _until_owned(
    around: Surroundings, pipelines: int, *, sessions: int | None = None, gone: bool = False
) -> None:
    """Wait until the locks of so many pipelines are held.

    ``sessions``: by so many. ``gone``: first until fewer of them are, a relay having died.
    """
    async with asyncio.timeout(_BOUND_S):
        while True:
            owners = await around.postgres.fetch(_OWNERS)
            held = sum(owner["held"] for owner in owners)
            gone = gone and held >= pipelines
            if held == pipelines and not gone and sessions in (None, len(owners)):
                return
            await asyncio.sleep(0.005)


async def _insert(around: Surroundings, rows: int) -> None:
    await around.postgres.execute(
        f"insert into orders ({COLUMNS}) select {VALUES} from generate_series(1, {rows})"
    )


def _parent(pid: int) -> int:
    return int(_stat(pid)[1])


def _stat(pid: int) -> list[str]:
    """The fields of a process from its state on; the name before may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _processor_s(pid: int, *, with_children: bool = False) -> float:
    """User and system time of a process, with that of the children it has and has had."""
    pids = [pid]
    if with_children:
        pids += [int(child) for child in _children(pid)]
    total = 0.0
    for one in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = _stat(one)
            # Fields 14 to 17 of proc(5): utime, stime, and the same of children waited for.
            used = fields[11:15] if one == pid else fields[11:13]
            total += sum(map(int, used)) / _TICKS_A_SECOND
    return total


def _children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def _peak_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])
