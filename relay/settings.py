"""The runtime settings of one relay process, typed and frozen.

`relay.overlays` composes them with Hydra and hands one `Settings` down; nobody below knows where
they came from. Keys and defaults here are those of ``conf/config.yaml``; a test keeps the two
equal. Durations end in ``_s`` (seconds) or ``_ms``, sizes in ``_bytes``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from relay.endpoint import parse_address
from relay.errors import ConfigurationError
from relay.options import Key, Positive, check_values
from relay.secrets import DEFAULT_ENV_ALLOW, DEFAULT_FILE_ROOTS

SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]

DEFAULT_SCHEMA = "pgtrickle"


def schema_identifier(schema: str) -> str:
    """The schema as SQL text names it: in quotes where its name needs them."""
    if re.fullmatch(rf"{DEFAULT_SCHEMA}[a-z0-9_]*", schema):
        return schema
    return '"' + schema.replace('"', '""') + '"'


class PostgresSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The relay's own database.

    url: A libpq URL or keyword=value pairs; empty: libpq's environment variables (PGHOST and so
        on).
    sslmode: TLS, as libpq spells it; wins over the same parameter inside the URL.
    sslrootcert: CA file, as libpq spells it; wins over the URL.
    sslcert: Client certificate file, as libpq spells it; wins over the URL.
    sslkey: Client key file, as libpq spells it; wins over the URL.
    schema: Where the catalog is. Beside the pg_trickle extension, which owns `pgtrickle`, another
        one.
    application_name: Shown in `pg_stat_activity`, followed by what the connection does (`work`,
        `lock`, `listen`, `migrate`).
    connect_timeout_s: How long connecting may take, and waiting for a connection of the pool.
    command_timeout_s: How long one statement may take.
    heartbeat_timeout_s: How long the ownership connection may be silent before the pipelines are
        given up.
    pool_size: Connections of the working pool; two more own locks and listen.
    """

    url: str = ""
    sslmode: SslMode | None = None
    sslrootcert: str | None = None
    sslcert: str | None = None
    sslkey: str | None = None
    schema: str = DEFAULT_SCHEMA
    application_name: str = "pgtrickle-relay"
    connect_timeout_s: Annotated[float, Key(gt=0)] = 10.0
    command_timeout_s: Annotated[float, Key(gt=0)] = 60.0
    heartbeat_timeout_s: Annotated[float, Key(gt=0)] = 2.0
    pool_size: Annotated[int, Key(gt=0)] = 10


class LogSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logs go to standard error.

    format: `text` for people, `json` for machines. Logs go to standard error.
    level: The least severe level that is written. `debug` names every batch.
    repeat_s: An equal error is logged once in this time, then summed up.
    """

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    repeat_s: float = 60.0


class MetricsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metrics and health over HTTP.

    enabled: Whether there is an HTTP server.
    addr: Host:port; port 0 takes a free one.
    lag_interval_s: How often lag is measured.
    stalled_after_s: A pipeline with work to do and no progress for so long counts as stalled.
    """

    enabled: bool = True
    addr: str = "0.0.0.0:9090"
    lag_interval_s: Annotated[float, Key(gt=0)] = 5.0
    stalled_after_s: Annotated[float, Key(gt=0)] = 60.0


class UiSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The status view.

    mode: `tui` shows the status view, where standard input and output are a terminal; leaving it
        stops the relay, and it asks first.
    refresh_ms: How often the view is drawn again.
    """

    mode: Literal["none", "tui"] = "none"
    refresh_ms: Annotated[int, Key(gt=0)] = 250


class SecretSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What secret references in the catalog may reach.

    file_roots: Files must lie under one of these directories.
    env_allow: Shell patterns of allowed variable names; null allows every name but
        PGTRICKLE_RELAY_*.
    """

    file_roots: tuple[str, ...] = DEFAULT_FILE_ROOTS
    env_allow: tuple[str, ...] | None = DEFAULT_ENV_ALLOW


class FileSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Under which directories file backends may read and write.

    roots: Directories that file pipelines may use; null: the working and the temporary directory.
    """

    roots: tuple[str, ...] | None = None


class RelaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this process works; many are defaults for pipelines that do not say otherwise.

    group_id: Relays of one group share the pipelines; every group delivers everything.
    worker_id: This relay's name in the fleet; null: host, process id and a random part.
    max_pipelines: At most so many pipelines in this process, webhook receivers not counted; null:
        no limit.
    shutdown_timeout_s: How long work in flight may take to finish on SIGTERM.
    coordinate_interval_s: How often ownership is looked at, besides every change of the catalog.
    failed_retry_s: How often a pipeline with a configuration error is tried again; where a stream,
        topic, queue, group or table is missing, every 3 s at least.
    batch_size: Most messages in a batch; a pipeline's own key wins.
    batch_bytes: About the most payload bytes in a batch.
    prefetch: Polled batches that may wait while one is published; a pipeline's own key wins.
    poll_interval_ms: First pause after an empty poll; a pipeline's own key wins.
    retry_initial_ms: First wait after a failure; a pipeline's own key wins.
    retry_max_ms: Longest wait after a failure; a pipeline's own key wins.
    breaker_threshold: Rejections in a row, without one success, after which the sink counts as
        broken; a pipeline's own key wins.
    sweep_interval_s: How often delivered rows past their retention are removed.
    report_interval_s: How often this relay reports to the fleet.
    """

    group_id: str = "default"
    worker_id: str | None = None
    max_pipelines: Positive | None = None
    shutdown_timeout_s: Annotated[float, Key(gt=0)] = 30.0
    coordinate_interval_s: Annotated[float, Key(gt=0)] = 0.5
    failed_retry_s: Annotated[float, Key(gt=0)] = 30.0
    batch_size: Annotated[int, Key(gt=0)] = 4000
    batch_bytes: Annotated[int, Key(gt=0)] = 4_194_304
    prefetch: Annotated[int, Key(ge=0)] = 1
    poll_interval_ms: Annotated[int, Key(gt=0)] = 20
    retry_initial_ms: Annotated[int, Key(gt=0)] = 1_000
    retry_max_ms: int = 60_000
    breaker_threshold: Annotated[int, Key(gt=0)] = 20
    sweep_interval_s: Annotated[float, Key(gt=0)] = 60.0
    report_interval_s: Annotated[float, Key(gt=0)] = 2.0


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about the process.

    backends: Named connection profiles, see [Profiles](#profiles).
    """

    postgres: PostgresSettings = PostgresSettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    ui: UiSettings = UiSettings()
    secrets: SecretSettings = SecretSettings()
    files: FileSettings = FileSettings()
    relay: RelaySettings = RelaySettings()
    backends: Mapping[str, Mapping[str, object]] = {}


def checked(settings: Settings) -> Settings:
    """The same settings, if their values make sense together. Raises `ConfigurationError`."""
    check_values(settings, "")
    schema = settings.postgres.schema
    if not 0 < len(schema.encode()) < 64 or schema.startswith("pg_") or {"\0", "$"} & set(schema):
        raise ConfigurationError(
            "postgres.schema can't be the name of a schema of the relay's",
            remedy="write 1 to 63 bytes that don't begin with pg_ and have no $ in them",
        )
    parse_address(settings.metrics.addr, "metrics.addr")
    if not settings.relay.group_id.strip():
        raise ConfigurationError(
            "relay.group_id is empty", remedy="leave it out for the group called default"
        )
    if settings.relay.retry_max_ms < settings.relay.retry_initial_ms:
        raise ConfigurationError("relay.retry_max_ms must not be below relay.retry_initial_ms")
    return settings
