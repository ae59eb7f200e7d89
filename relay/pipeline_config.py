"""The config object of one catalog row, typed: what a pipeline is made of and how it behaves.

The SQL functions validate what goes into the catalog. A row may still have been edited by hand, so
everything is checked again here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from relay.errors import ConfigurationError
from relay.events import Direction
from relay.options import Key, Positive, parse_options
from relay.settings import RelaySettings

CONFIG_VERSION = 1

_OF_A_GROUP = frozenset({"parallelism", "visibility_seconds"})

ChosenOp = Literal["insert", "update", "delete", "upsert", "truncate", "event"]


class Mask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the value of a column is masked, by one of these.

    hash: Its HMAC-SHA-256 under this secret, in hexadecimal.
    keep_last: All but so many of its last characters are hidden.
    """

    hash: Annotated[str | None, Key(secret=True)] = None
    keep_last: Annotated[int | None, Key(ge=1, le=1000)] = None

    def __post_init__(self) -> None:
        if (self.hash is None) == (self.keep_last is None):
            raise ValueError("a mask has either hash or keep_last")
        if self.keep_last is not None and not 1 <= self.keep_last <= 1000:
            raise ValueError("keep_last must be from 1 to 1000")


class PipelineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pipeline. Keys that are None take the default of the runtime settings.

    config_version: Version of the configuration's shape; filled in.
    source_type: Filled in from `source.type`.
    source: Where events come from.
    sink_type: Filled in from `sink.type`.
    sink: Where events go.
    description: A note for people. The relay does not read it.
    batch_size: Most messages in a batch.
    poll_interval_ms: First pause after an empty poll. It doubles up to 1 s; a notification ends it
        at once.
    prefetch: Polled batches that may wait while one is published. Of an outbox the rows of one more
        are read ahead.
    max_attempts: Attempts of a message that fails transiently, before it becomes a dead letter.
        Without it the relay never gives up.
    retry_initial_ms: First wait after a failure. Waits double and are jittered.
    retry_max_ms: Longest wait after a failure.
    breaker_threshold: Rejections in a row, without one success, after which the pipeline is
        suspended and probes.
    ordering: `strict`: no event of a key overtakes another, also under retries. `pipelined`: faster
        on hot keys. Read by the sinks of brokers and webhooks; inboxes and files are always strict.
    allow_plaintext_secrets: Accept a secret that is not a reference.
    ops: Which operations are sent. The rows of a snapshot or a backfill, `upsert`, go along with
        `insert` and `update`. `update` needs `collapse_updates` in a forward pipeline.
    where: A condition in [CEL](https://cel.dev) over `op`, `key`, `subject`, `payload`, `headers`
        and `stream_table`, see [Choosing and shaping](#choosing-and-shaping). Needs the extra
        `filter`.
    select: The columns that are sent.
    exclude: Columns that are not sent.
    rename: Column to the name with which it is sent.
    mask: Column to how its value is masked: `"redact"`, `{"keep_last": 4}`, or
        `{"hash": "${env:NAME}"}`, the HMAC-SHA-256 under this secret.
    start: Where a new position starts. `latest`: behind what is visible when the pipeline is set;
        transactions open at that moment are still delivered.
    on_reset: What to do when the position lies beyond the outbox, which was created again or
        restored.
    parallelism: Workers of a consumer group in each relay; there is no order across workers.
    partitions: Readers of the outbox, each like a pipeline of its own (`name/1`, `name/2`, …) and
        spread over the relays. Each publishes the events of its keys, in order: the CRC-32 of the
        key, modulo `partitions`, says whose it is. An event without a key, `truncate` above all,
        goes through the first, in no order with the keys of the others.
    visibility_seconds: For how long rows are leased to a worker of a consumer group. It is extended
        while the worker lives; others have the rows of a dead one that much later.
    collapse_updates: Send the delete and the insert of one key in one outbox row as one `update`.
        Needs a key.
    snapshot_markers: Frame a full refresh with `snapshot_begin` and `snapshot_end`.
    dedup_namespace: Goes in front of every dedup key. Set it where several databases, or several
        pipelines of one outbox, feed one deduplicating destination.
    key_columns: Columns whose values are the `key`; the primary key of the table otherwise.
    dedup_key_from: Where the dedup key comes from, see [Rules](#rules); what the source says
        otherwise.
    event_type_from: Where the event type comes from, see [Rules](#rules); the message's subject
        otherwise.
    columns: Inbox field to rule, see [Rules](#rules).
    """

    config_version: Annotated[int, Key(ge=1, le=CONFIG_VERSION)] = CONFIG_VERSION
    source_type: str
    source: Mapping[str, object]
    sink_type: str
    sink: Mapping[str, object]
    description: str = ""
    batch_size: Annotated[int | None, Key(ge=1, le=100000)] = None
    poll_interval_ms: Annotated[int | None, Key(ge=1, le=3600000)] = None
    prefetch: Annotated[int | None, Key(ge=0, le=8)] = None
    max_attempts: Positive | None = None
    retry_initial_ms: Annotated[int | None, Key(ge=1, le=86400000)] = None
    retry_max_ms: Annotated[int | None, Key(ge=1, le=86400000)] = None
    breaker_threshold: Positive | None = None
    ordering: Literal["strict", "pipelined"] | None = None
    allow_plaintext_secrets: bool = False
    ops: Sequence[ChosenOp] | None = None
    where: str | None = None
    select: Annotated[Sequence[str] | None, Key(excludes=("exclude",))] = None
    exclude: Sequence[str] | None = None
    rename: Mapping[str, str] | None = None
    mask: Mapping[str, Literal["redact"] | Mask] | None = None
    start: Annotated[Literal["earliest", "latest"], Key(only="forward")] = "earliest"
    on_reset: Annotated[Literal["earliest", "latest", "fail"], Key(only="forward")] = "fail"
    parallelism: Annotated[int, Key(ge=1, le=64, only="forward")] = 1
    partitions: Annotated[int, Key(ge=1, le=64, only="forward")] = 1
    visibility_seconds: Annotated[int, Key(ge=1, le=604800, only="forward")] = 30
    collapse_updates: Annotated[bool, Key(only="forward")] = False
    snapshot_markers: Annotated[bool, Key(only="forward")] = False
    dedup_namespace: Annotated[str, Key(only="forward")] = ""
    key_columns: Annotated[Sequence[str] | None, Key(only="forward")] = None
    dedup_key_from: Annotated[str | None, Key(only="reverse")] = None
    event_type_from: Annotated[str | None, Key(only="reverse")] = None
    columns: Annotated[Mapping[str, str] | None, Key(only="reverse")] = None


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How a pipeline goes about its work: its own keys over the defaults of the settings."""

    batch_size: int
    poll_interval_s: float
    prefetch: int
    max_attempts: int | None
    retry_initial_s: float
    retry_max_s: float
    breaker_threshold: int


def parse_config(direction: Direction, config: Mapping[str, object]) -> PipelineConfig:
    """Type one catalog row. Raises `ConfigurationError` in the user's words."""
    version = config.get("config_version", CONFIG_VERSION)
    if str(version) != str(CONFIG_VERSION):
        raise ConfigurationError(
            f"config_version {version} is not one this version can read",
            remedy="upgrade pgtrickle-relay",
        )
    parsed = parse_options(config, PipelineConfig, path="", kind=direction)
    if parsed.source.get("consumer_group") is None:
        for name in _OF_A_GROUP & config.keys():
            raise ConfigurationError(
                f"{name} needs a consumer group", remedy="name one in source.consumer_group"
            )
    if parsed.partitions > 1:
        _refuse_beside_partitions(parsed)
    if direction == "forward" and parsed.source_type != "outbox":
        raise ConfigurationError("source_type of a forward pipeline must be outbox")
    if direction == "reverse" and parsed.sink_type != "pg-inbox":
        raise ConfigurationError("sink_type of a reverse pipeline must be pg-inbox")
    return parsed


def _refuse_beside_partitions(config: PipelineConfig) -> None:
    if config.source.get("consumer_group") is not None:
        raise ConfigurationError(
            "partitions and a consumer group don't go together",
            remedy="with partitions readers share the keys, in order; workers of a group share the"
            " rows, without",
        )
    if config.snapshot_markers:
        raise ConfigurationError(
            "partitions and snapshot_markers don't go together",
            remedy="the rows between two markers would come from several readers",
        )
    if config.sink_type == "file":
        raise ConfigurationError(
            "partitions need another sink than file", remedy="a file has one writer"
        )


def pace_of(config: PipelineConfig, defaults: RelaySettings) -> Pace:
    """The pipeline's pace. Raises `ConfigurationError` where it is one that makes no sense."""

    def own(name: str) -> int:
        value = getattr(config, name)
        return int(getattr(defaults, name) if value is None else value)

    pace = Pace(
        batch_size=own("batch_size"),
        poll_interval_s=own("poll_interval_ms") / 1000,
        prefetch=own("prefetch"),
        max_attempts=config.max_attempts,
        retry_initial_s=own("retry_initial_ms") / 1000,
        retry_max_s=own("retry_max_ms") / 1000,
        breaker_threshold=own("breaker_threshold"),
    )
    if pace.retry_max_s < pace.retry_initial_s:
        raise ConfigurationError("retry_max_ms must not be below retry_initial_ms")
    return pace


def with_profile(
    role: str,
    type_: str,
    options: Mapping[str, object],
    profiles: Mapping[str, Mapping[str, object]],
    declared: Mapping[str, Key],
) -> dict[str, object]:
    """The options with their connection profile merged in; ``role`` is ``source`` or ``sink``.

    ``declared`` are the keys of that backend. Where it is, and who we are to it, comes from a
    profile as a whole or from the row as a whole: a row that could aim a profile's credentials at
    an endpoint of its own would give them away. Raises `ConfigurationError` for that, for an
    unknown profile and for one of another type.
    """
    merged = {name: value for name, value in options.items() if name != "profile"}
    name = options.get("profile")
    if name is None:
        for key in merged:
            if key in declared and declared[key].profile_only:
                raise ConfigurationError(
                    f"{role}.{key} belongs into a profile",
                    remedy=f"add it to backends.<name>.{key}",
                )
        return merged
    profile = profiles.get(str(name))
    if profile is None:
        raise ConfigurationError(
            f"{role}.profile names {name!r}, which this relay does not have",
            remedy=f"add backends.{name} to the runtime settings",
        )
    if profile.get("type") != type_:
        raise ConfigurationError(
            f"{role}.profile {name!r} is of type {profile.get('type')!r}, the {role} of {type_!r}"
        )
    mixed = sorted(key for key in merged if key in declared and declared[key].connection)
    if mixed:
        raise ConfigurationError(
            f"{role}.{mixed[0]} can't be combined with the profile {name!r}",
            remedy="endpoint, credentials and TLS come from a profile as a whole",
        )
    # A profile may serve both sides, and has keys of both.
    return {**{key: value for key, value in profile.items() if key in declared}, **merged}
