"""From a catalog row to a pipeline that is ready to run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from relay.catalog import Catalog, PipelineRow
from relay.context import BackendContext
from relay.contracts import Sink, Source
from relay.dead_letter import Transform
from relay.delivery import RetryPolicy
from relay.errors import ConfigurationError
from relay.events import Direction, Event, PipelineDescribed, PipelineEvent
from relay.mapping import compile_reverse
from relay.message import RelayMessage
from relay.options import declared_keys
from relay.pipeline import Pipeline, Workers
from relay.pipeline_config import Pace, PipelineConfig, pace_of, parse_config, with_profile
from relay.postgres import Database
from relay.registry import build_sink, build_source, options_of, source_runs_everywhere
from relay.secrets import masked
from relay.settings import Settings
from relay.shape import Shape, shape_of
from relay.start import catalog_secrets, operator_secrets, resolved

# Longer than one attempt of one batch of them may take.
_DEAD_LETTER_LEASE_S = 60


class Sides(NamedTuple):
    """What a row is made of, built and not connected."""

    config: PipelineConfig
    pace: Pace
    source: Source
    sink: Sink
    shape: Transform
    transform: Transform


class Access:
    """What a process may reach by its settings: secrets, the database, and pipelines over both.

    ``operator`` are the secrets of the settings themselves, ``pipelines`` those of catalog rows.
    """

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self.settings = settings
        self.operator = operator_secrets(environment)
        self.pipelines = catalog_secrets(settings, environment)

    def mask(self, text: str) -> str:
        """The text without any secret that was resolved."""
        return self.pipelines.mask(self.operator.mask(text))

    def database(self) -> Database:
        """The relay's own database, not open. Raises `SecretUnresolved`."""
        return Database(resolved(self.settings.postgres, self.operator))

    def assembly(
        self,
        database: Database,
        catalog: Catalog,
        *,
        worker_id: str,
        emit: Callable[[Event], None] = lambda _: None,
    ) -> Assembly:
        """What builds pipelines of this catalog."""
        return Assembly(self, database, catalog, worker_id, emit)


class Assembly:
    """Builds pipelines from catalog rows, under the settings of this process."""

    def __init__(
        self,
        access: Access,
        database: Database,
        catalog: Catalog,
        worker_id: str,
        emit: Callable[[Event], None],
    ) -> None:
        self._settings = access.settings
        self._secrets = access.pipelines
        self._operator_secrets = access.operator
        self._database = database
        self._catalog = catalog
        self._worker_id = worker_id
        self._emit = emit
        self._file_roots = _file_roots(access.settings)

    def describe(self, row: PipelineRow) -> None:
        """Tell observers what a row is, whether or not it can be built."""
        self._emit(
            PipelineDescribed(
                pipeline=row.name,
                direction=row.direction,
                source=str(row.config.get("source_type", "?")),
                sink=str(row.config.get("sink_type", "?")),
                settings=_shown(row.config),
            )
        )

    def runs_everywhere(self, row: PipelineRow) -> bool:
        """Whether every relay of the group runs this row at once, and none owns it."""
        if _consumer_group(row.config) is not None:
            return True
        return source_runs_everywhere(str(row.config.get("source_type")))

    def sides(
        self,
        row: PipelineRow,
        *,
        worker: int = 0,
        emit: Callable[[Event], None] | None = None,
    ) -> Sides:
        """Both sides of a row, not connected, for the relay or one of its workers.

        Raises `ConfigurationError`.
        """
        config = parse_config(row.direction, row.config)
        pace = pace_of(config, self._settings.relay)
        context = BackendContext(
            pipeline=row.name,
            direction=row.direction,
            worker_id=f"{self._worker_id}/{worker}" if worker else self._worker_id,
            database=self._database,
            catalog=self._catalog,
            emit=emit or self._emit,
            file_roots=self._file_roots,
            batch_size=pace.batch_size,
            batch_bytes=self._settings.relay.batch_bytes,
            poll_interval_s=pace.poll_interval_s,
            dedup_namespace=config.dedup_namespace,
            ordering=config.ordering,
            pipeline_options=msgspec.structs.asdict(config),
            partition=row.partition,
            partitioning=row.partitioning,
        )
        sink_options = self._options("sink", config.sink_type, config.sink)
        sink = build_sink(config.sink_type, sink_options, context)
        shape = shape_of(
            config,
            row.direction,
            templates=_templates(config.sink_type, sink_options),
            resolve=self._secrets.resolve,
            subject_of=sink.subject_of if row.direction == "forward" else None,
        )
        source = build_source(
            config.source_type,
            self._options("source", config.source_type, config.source),
            msgspec.structs.replace(context, shape=shape),
        )
        return Sides(
            config=config,
            pace=pace,
            source=source,
            sink=sink,
            shape=list if shape is None or row.direction == "reverse" else shape.all_of,
            transform=_transform(row.direction, config, sink, shape),
        )

    def build(self, row: PipelineRow) -> Pipeline | Workers:
        """The pipeline of a row. Raises `ConfigurationError` with what is wrong in it."""
        config = parse_config(row.direction, row.config)
        if _consumer_group(row.config) is None:
            return self._pipeline(row, self._emit)
        several = config.parallelism > 1
        return Workers(
            [
                self._pipeline(row, self._emitter(number) if several else self._emit, number)
                for number in range(1, config.parallelism + 1)
            ]
        )

    def _pipeline(
        self, row: PipelineRow, emit: Callable[[Event], None], worker: int = 0
    ) -> Pipeline:
        sides = self.sides(row, worker=worker, emit=emit)
        pace = sides.pace
        return Pipeline(
            name=row.name,
            direction=row.direction,
            source=sides.source,
            sink=sides.sink,
            shape=sides.shape,
            transform=sides.transform,
            dead_letters=self._catalog,
            dead_letter_lease_s=_DEAD_LETTER_LEASE_S if self.runs_everywhere(row) else 0,
            emit=emit,
            policy=RetryPolicy(
                initial_s=pace.retry_initial_s,
                max_s=pace.retry_max_s,
                max_attempts=pace.max_attempts,
                breaker_threshold=pace.breaker_threshold,
            ),
            prefetch=pace.prefetch,
            failed_retry_s=self._settings.relay.failed_retry_s,
        )

    def _emitter(self, worker: int) -> Callable[[Event], None]:
        """Emits the events of one worker, with its number on them."""

        def emit(event: Event) -> None:
            if isinstance(event, PipelineEvent):
                event = msgspec.structs.replace(event, worker=worker)
            self._emit(event)

        return emit

    def _options(
        self, role: str, type_: str, options: Mapping[str, object]
    ) -> Mapping[str, object]:
        stated = options.get("type", type_)
        if stated != type_:
            raise ConfigurationError(f"{role}.type is {stated!r}, but {role}_type is {type_!r}")
        resolved = {name: self._secrets.resolve(value) for name, value in options.items()}
        profiles = {
            name: {key: self._operator_secrets.resolve(value) for key, value in profile.items()}
            for name, profile in self._settings.backends.items()
            if name == options.get("profile")
        }
        declared = declared_keys(options_of(role, type_))
        return with_profile(role, type_, resolved, profiles, declared) | {"type": type_}


def _templates(sink_type: str, options: Mapping[str, object]) -> dict[str, list[str]]:
    """The templates that a sink is given, by their key."""
    declared = declared_keys(options_of("sink", sink_type))
    given = {
        name: options[name] for name in options if name in declared and declared[name].template
    }
    return {
        name: [str(text) for text in (value.values() if isinstance(value, Mapping) else [value])]
        for name, value in given.items()
    }


def _transform(
    direction: Direction, config: PipelineConfig, sink: Sink, shape: Shape | None
) -> Transform:
    if direction == "reverse":
        reshape = compile_reverse(config.dedup_key_from, config.event_type_from)
        if shape is None:
            return lambda messages: list(map(reshape, messages))
        return lambda messages: shape.all_of(list(map(reshape, messages)))
    subject_of, fill_in = sink.subject_of, msgspec.structs.force_setattr

    def routed(messages: Sequence[RelayMessage]) -> list[RelayMessage]:
        # Nobody has seen them yet, and a copy of each costs a twentieth of all that is done.
        for message in messages:
            fill_in(message, "subject", subject_of(message))
        return list(messages)

    return routed


def _consumer_group(config: Mapping[str, object]) -> object:
    source = config.get("source")
    return source.get("consumer_group") if isinstance(source, Mapping) else None


def _shown(config: Mapping[str, object]) -> dict[str, object]:
    shown = masked(config)
    return shown if isinstance(shown, dict) else {}


def _file_roots(settings: Settings) -> tuple[Path, ...]:
    roots = settings.files.roots
    if roots is not None:
        return tuple(Path(root) for root in roots)
    try:
        return (Path.cwd(), Path(tempfile.gettempdir()))
    except FileNotFoundError:
        # Where nothing can be written, as in a container with a read-only root, there is none.
        return (Path.cwd(),)
