"""`pgtrickle-relay validate`: everything wrong in settings, overlays and pipelines, all at once.

No destination is touched, no position moves. A sample shows the next events of a forward pipeline
as they would go out.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import msgspec

from relay.assembly import Access, Sides
from relay.catalog import Catalog, Claim, Lease, PipelineRow
from relay.errors import ConfigurationError, MessageRejected, RelayError
from relay.message import RelayMessage
from relay.overlays import Composed, compose_settings, type_settings
from relay.partition import KEYLESS, KEYLESS_REMEDY, partitions_of
from relay.pipeline_config import parse_config
from relay.postgres import Database, PooledConnection, postgres_errors
from relay.profiles import check_profiles
from relay.secrets import mask_urls
from relay.settings import PostgresSettings, Settings
from relay.start import opened
from relay.wire import FIELD, HTTP, LOWER, TITLE, encoder

T = TypeVar("T")

_KEY = re.compile(r"([a-z_]\w*(?:\.\w[\w-]*)*)")
_FORMATS = ("envelope", "payload", "cloudevents")
_SPELLINGS = {"webhook": HTTP, "redis": FIELD, "kafka": LOWER, "file": LOWER, "stdout": LOWER}
# Of the backlog of a pipeline that leaves most of it out.
_MOST_LOOKED_AT = 10_000
# What nobody could correct in one go.
_MOST_FINDINGS = 100


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is wrong: where, what, and what to do."""

    where: str
    problem: str
    remedy: str


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One event as it would go out, or why it would not."""

    pipeline: str
    dedup_key: str
    subject: str
    key: str | None
    headers: Mapping[str, str]
    body: str
    problem: str = ""


class Validation(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All findings, the samples that were asked for, and what strikes in those of a pipeline."""

    is_valid: bool
    findings: Sequence[Finding]
    pipelines: Sequence[str]
    samples: Sequence[Sample]
    notes: Mapping[str, str] = {}


def settings_of(
    compose: Callable[[], Composed], config_dirs: Sequence[str]
) -> tuple[Settings | None, list[Finding]]:
    """The settings where they are sound, and everything that is wrong in them and in overlays."""
    findings: list[Finding] = []
    settings = None
    try:
        composed = compose()
    except ConfigurationError as error:
        findings.append(_finding("settings", error))
    else:
        settings, wrong = _everything_wrong("settings", composed, type_settings)
        findings += wrong
    for directory in config_dirs:
        for overlay in sorted(Path(directory).glob("env/*.yaml")):
            try:
                type_settings(compose_settings([f"+env={overlay.stem}"], config_dirs=config_dirs))
            except ConfigurationError as error:
                finding = _finding(f"overlay {overlay.stem}", error)
                if finding.problem not in [known.problem for known in findings]:
                    findings.append(finding)
    if settings is not None:
        try:
            check_profiles(settings.backends)
        except ConfigurationError as error:
            findings.append(_finding("settings", error))
    return (None if findings else settings), findings


async def validate(
    settings: Settings, environment: Mapping[str, str], *, name: str | None, samples: int
) -> Validation:
    """Look at all pipelines, or at one. Raises `ConfigurationError` where there is none of it."""
    access = Access(settings, environment)
    database = access.database()
    catalog = _Onlooker(database, settings.relay.group_id, samples)
    async with opened(database, catalog):
        rows = [row for row in await catalog.pipelines() if name is None or row.name == name]
        if name is not None and not rows:
            raise ConfigurationError(
                f"there is no pipeline {name}", remedy="select name from list_relay_configs()"
            )
        assembly = access.assembly(database, catalog, worker_id="validate")
        findings: list[Finding] = []
        shown: list[Sample] = []
        notes: dict[str, str] = {}
        for row in rows:
            where = f"pipeline {row.name}"
            _, wrong = _everything_wrong(where, row.config, partial(parse_config, row.direction))
            findings += wrong
            try:
                sides = assembly.sides(row)
                if samples and row.direction == "forward" and not wrong:
                    found, summary = await _samples(row, sides, samples)
                    shown += found
                    if summary:
                        notes[row.name] = summary
            except RelayError as error:
                if str(error) not in [f"{one.problem}{_aside(one.remedy)}" for one in wrong]:
                    findings.append(_finding(where, error))
    hidden = [
        msgspec.structs.replace(one, problem=mask_urls(access.mask(one.problem)))
        for one in findings
    ]
    return Validation(
        is_valid=not hidden,
        findings=hidden,
        pipelines=[row.name for row in rows],
        samples=shown,
        notes=notes,
    )


def lines_of(validation: Validation) -> Iterator[str]:
    """The answer for people."""
    for one in validation.findings:
        yield f"{one.where}: {one.problem}{_aside(one.remedy)}"
    for sample in validation.samples:
        yield f"{sample.pipeline}: {sample.subject or sample.problem}"
        yield f"  key: {sample.key}"
        for header, text in sample.headers.items():
            yield f"  {header}: {text}"
        yield f"  {sample.body}"
    for name, summary in validation.notes.items():
        yield f"{name}: {summary}"
    if validation.is_valid:
        names = ", ".join(validation.pipelines) or "no pipeline yet"
        yield f"valid: settings, {names}"


class _Onlooker(Catalog):
    """The catalog without anything that would move a position, lease a row or wake anybody."""

    def __init__(self, database: Database, group_id: str, samples: int) -> None:
        super().__init__(database, group_id)
        self._samples = samples
        # How each group is joined, until it was looked at.
        self._joining: dict[str, Callable[[Catalog], Awaitable[bool]]] = {}

    async def claim(
        self,
        pipeline: str,
        outbox_table: str | None,  # noqa: ARG002 - the catalog's own signature
        worker_id: str,  # noqa: ARG002
        partitioning: Mapping[str, object] | None = None,  # noqa: ARG002
    ) -> Claim:
        """Where the pipeline stands, for nobody; its pending gaps are left out."""
        lags = [lag for lag in await self.lag([pipeline]) if lag.max_outbox_id is not None]
        reads_above = min(
            ((lag.max_outbox_id or 0) - (lag.lag_rows or 0) for lag in lags), default=0
        )
        return Claim(epoch=0, last_change_id=reads_above, gap_first_ids=[], gap_last_ids=[])

    async def join_group(
        self, group: str, pipeline: str, outbox_table: str, consumer: str, on_reset: str
    ) -> bool:
        """Nothing yet: `lease` joins, and undoes it."""

        async def join(catalog: Catalog) -> bool:
            return await catalog.join_group(group, pipeline, outbox_table, consumer, on_reset)

        self._joining[group] = join
        return False

    async def lease(
        self,
        group: str,
        consumer: str,
        lease_token: UUID,
        *,
        max_messages: int,
        max_bytes: int,
        seconds: int,
    ) -> Lease:
        """What the group would lease next, and does not: all of it is undone. Nothing after it."""
        join = self._joining.pop(group, None)
        if join is None:
            return Lease(outbox_ids=[], is_settled=True)
        async with _undone(self._database) as database:
            catalog = Catalog(database, self.group_id)
            await join(catalog)
            return await catalog.lease(
                group,
                consumer,
                lease_token,
                max_messages=max(max_messages, self._samples),
                max_bytes=max_bytes,
                seconds=seconds,
            )

    async def _do(self, doing: str, function: str, *args: object) -> None:
        """Nothing: what a function does is what an onlooker leaves alone."""


class _OneConnection(Database):
    """The database over a connection that somebody else has opened."""

    def __init__(self, settings: PostgresSettings, connection: PooledConnection) -> None:
        super().__init__(settings)
        self._connection = connection

    @asynccontextmanager
    async def connection(self, doing: str) -> AsyncIterator[PooledConnection]:
        """That connection."""
        with postgres_errors(doing):
            yield self._connection


@asynccontextmanager
async def _undone(database: Database) -> AsyncIterator[Database]:
    """The database in a transaction that is rolled back."""
    async with database.connection("looking at the next rows") as connection:
        transaction = connection.transaction()
        await transaction.start()
        try:
            yield _OneConnection(database.settings, connection)
        finally:
            await transaction.rollback()


async def _samples(row: PipelineRow, sides: Sides, most: int) -> tuple[list[Sample], str]:
    """The next events that go out, and in words what strikes; of some thousands at most."""
    type_ = sides.config.sink_type
    stated = str(sides.config.sink.get("format", "envelope"))
    encode = encoder(
        "payload" if type_ == "pg-inbox" else stated if stated in _FORMATS else "envelope",
        _SPELLINGS.get(type_, TITLE),
        namespace=sides.config.dedup_namespace,
    )
    found: list[Sample] = []
    looked_at = left_out = 0
    async with _connected(sides) as source:
        while len(found) < most and looked_at < _MOST_LOOKED_AT:
            batch = await source.source.poll()
            events = len(batch.messages) + len(batch.rejected) + batch.filtered
            looked_at += events
            left_out += batch.filtered
            found += [
                _sample(row, rejected.message, {}, "", str(rejected.error))
                for rejected in batch.rejected
            ]
            for message in batch.messages[: max(0, most - len(found))]:
                try:
                    (out,) = sides.transform([message])
                    encoded = encode(out)
                except MessageRejected as error:
                    found.append(_sample(row, message, {}, "", str(error)))
                else:
                    body = encoded.body.decode(errors="replace")
                    found.append(_sample(row, out, encoded.headers, body, ""))
            if batch.is_end_of_backlog or not events:
                break
    notes = [f"ops and where leave out {left_out} of {looked_at} events"] if left_out else []
    if partitions_of(row.config) > 1 and found and all(one.key is None for one in found):
        notes.append(f"it {KEYLESS} ({KEYLESS_REMEDY})")
    return found[:most], "; ".join(notes)


@asynccontextmanager
async def _connected(sides: Sides) -> AsyncIterator[Sides]:
    try:
        await sides.source.connect()
        yield sides
    finally:
        await sides.source.aclose()
        await sides.sink.aclose()


def _sample(
    row: PipelineRow, message: RelayMessage, headers: Mapping[str, str], body: str, problem: str
) -> Sample:
    return Sample(
        pipeline=row.name,
        dedup_key=message.dedup_key,
        subject="" if problem else message.subject,
        key=message.key,
        headers=headers,
        body=body,
        problem=problem,
    )


def _everything_wrong(
    where: str, mapping: Mapping[str, object], parse: Callable[[Mapping[str, object]], T]
) -> tuple[T | None, list[Finding]]:
    """Parse; after each error without the key that it names, so that others are found too."""
    findings: list[Finding] = []
    rest: Mapping[str, object] = mapping
    while len(findings) < _MOST_FINDINGS:
        try:
            parsed = parse(rest)
        except ConfigurationError as error:
            findings.append(_finding(where, error))
            named = _KEY.match(error.problem)
            without = None if named is None else _without(rest, named[1].split("."))
            if without is None:
                return None, findings
            rest = without
        else:
            return (None if findings else parsed), findings
    return None, findings


def _without(mapping: Mapping[str, object], path: Sequence[str]) -> Mapping[str, object] | None:
    """The mapping without the key at this path; None where it is not there."""
    name, *further = path
    if name not in mapping:
        return None
    if not further:
        return {key: value for key, value in mapping.items() if key != name}
    inner = mapping[name]
    less = _without(inner, further) if isinstance(inner, Mapping) else None
    return None if less is None else {**mapping, name: less}


def _finding(where: str, error: RelayError) -> Finding:
    return Finding(where=where, problem=error.problem, remedy=error.remedy)


def _aside(remedy: str) -> str:
    return f" ({remedy})" if remedy else ""
