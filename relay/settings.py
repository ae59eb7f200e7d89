"""The runtime settings of one relay process, typed and frozen.

`relay.cli` composes them with Hydra and hands one `Settings` down; nobody below knows where they
came from. Keys and defaults here are those of ``conf/config.yaml``; a test keeps the two equal.
Durations end in ``_s`` (seconds) or ``_ms``, sizes in ``_bytes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from relay.errors import ConfigurationError
from relay.secrets import DEFAULT_FILE_ROOTS

SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]

DEFAULT_SCHEMA = "pgtrickle"


class PostgresSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The relay's own database.

    ``url``: a libpq connection string or URL; empty means libpq's own environment variables.
    ``sslmode``, ``sslrootcert``, ``sslcert``, ``sslkey``: as libpq spells them; they win over the
    same parameters inside ``url``. ``schema``: where the relay's catalog is. ``pool_size`` bounds
    the connections of the working pool; two more are used for ownership and for listening.
    ``heartbeat_timeout_s`` is how long the ownership connection may stay silent before this relay
    gives up its pipelines.
    """

    url: str = ""
    sslmode: SslMode | None = None
    sslrootcert: str | None = None
    sslcert: str | None = None
    sslkey: str | None = None
    schema: str = DEFAULT_SCHEMA
    application_name: str = "pgtrickle-relay"
    connect_timeout_s: float = 10.0
    command_timeout_s: float = 60.0
    heartbeat_timeout_s: float = 2.0
    pool_size: int = 10


class LogSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logs go to standard error. ``repeat_s``: an equal error is logged once in this time."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    repeat_s: float = 60.0


class MetricsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metrics and health over HTTP. ``addr``: host:port; port 0 takes a free one."""

    enabled: bool = True
    addr: str = "0.0.0.0:9090"
    lag_interval_s: float = 5.0
    stalled_after_s: float = 60.0


class UiSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``mode``: ``tui`` shows the status view where standard output is a terminal."""

    mode: Literal["none", "tui"] = "none"
    refresh_ms: int = 250


class SecretSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What secret references in the catalog may reach; ``env_allow`` null allows all names."""

    file_roots: tuple[str, ...] = DEFAULT_FILE_ROOTS
    env_allow: tuple[str, ...] | None = None


class FileSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Under which directories file backends may read and write.

    ``roots`` null means the working directory and the temporary directory.
    """

    roots: tuple[str, ...] | None = None


class RelaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this process works.

    ``group_id``: relays of one group share the pipelines; each group delivers everything.
    ``max_pipelines``: null for no limit; what runs in every relay does not count. The other keys
    are defaults for pipelines that do not say otherwise, and the pace of the coordinator.
    """

    group_id: str = "default"
    worker_id: str | None = None
    max_pipelines: int | None = None
    shutdown_timeout_s: float = 30.0
    coordinate_interval_s: float = 0.5
    failed_retry_s: float = 30.0
    batch_size: int = 4000
    batch_bytes: int = 4_194_304
    prefetch: int = 1
    poll_interval_ms: int = 20
    retry_initial_ms: int = 1_000
    retry_max_ms: int = 60_000
    breaker_threshold: int = 20
    sweep_interval_s: float = 60.0
    report_interval_s: float = 2.0


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about the process; ``backends`` holds named connection profiles."""

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
    positive: tuple[tuple[str, float], ...] = (
        ("postgres.connect_timeout_s", settings.postgres.connect_timeout_s),
        ("postgres.command_timeout_s", settings.postgres.command_timeout_s),
        ("postgres.heartbeat_timeout_s", settings.postgres.heartbeat_timeout_s),
        ("postgres.pool_size", settings.postgres.pool_size),
        ("metrics.lag_interval_s", settings.metrics.lag_interval_s),
        ("metrics.stalled_after_s", settings.metrics.stalled_after_s),
        ("ui.refresh_ms", settings.ui.refresh_ms),
        ("relay.shutdown_timeout_s", settings.relay.shutdown_timeout_s),
        ("relay.coordinate_interval_s", settings.relay.coordinate_interval_s),
        ("relay.failed_retry_s", settings.relay.failed_retry_s),
        ("relay.batch_size", settings.relay.batch_size),
        ("relay.batch_bytes", settings.relay.batch_bytes),
        ("relay.poll_interval_ms", settings.relay.poll_interval_ms),
        ("relay.retry_initial_ms", settings.relay.retry_initial_ms),
        ("relay.breaker_threshold", settings.relay.breaker_threshold),
        ("relay.sweep_interval_s", settings.relay.sweep_interval_s),
        ("relay.report_interval_s", settings.relay.report_interval_s),
    )
    schema = settings.postgres.schema
    if not 0 < len(schema.encode()) < 64 or schema.startswith("pg_") or {"\0", "$"} & set(schema):
        raise ConfigurationError(
            "postgres.schema can't be the name of a schema of the relay's",
            remedy="write 1 to 63 bytes that don't begin with pg_ and have no $ in them",
        )
    for path, value in positive:
        if value <= 0:
            raise ConfigurationError(f"{path} must be above 0, but is {value}")
    if settings.relay.prefetch < 0:
        raise ConfigurationError("relay.prefetch must not be below 0")
    if settings.relay.retry_max_ms < settings.relay.retry_initial_ms:
        raise ConfigurationError("relay.retry_max_ms must not be below relay.retry_initial_ms")
    if settings.relay.max_pipelines is not None and settings.relay.max_pipelines < 1:
        raise ConfigurationError("relay.max_pipelines must be at least 1, or null for no limit")
    return settings
