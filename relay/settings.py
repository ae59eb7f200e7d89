"""The runtime settings of one relay process, typed and frozen.

`relay.cli` composes them with Hydra and hands one `Settings` down; nobody below knows where they
came from. Keys and defaults here are those of ``conf/config.yaml``; a test keeps the two equal.
Durations end in ``_s`` (seconds) or ``_ms``, sizes in ``_bytes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from relay.errors import ConfigurationError
from relay.options import Key, check_values
from relay.secrets import DEFAULT_ENV_ALLOW, DEFAULT_FILE_ROOTS

SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]


class PostgresSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The relay's own database."""

    url: Annotated[
        str,
        Key(
            "A libpq URL or keyword=value pairs; empty: libpq's environment variables (PGHOST and"
            " so on)."
        ),
    ] = ""
    sslmode: Annotated[
        SslMode | None,
        Key("TLS, as libpq spells it; wins over the same parameter inside the URL."),
    ] = None
    sslrootcert: Annotated[
        str | None,
        Key("CA file, as libpq spells it; wins over the URL."),
    ] = None
    sslcert: Annotated[
        str | None,
        Key("Client certificate file, as libpq spells it; wins over the URL."),
    ] = None
    sslkey: Annotated[
        str | None,
        Key("Client key file, as libpq spells it; wins over the URL."),
    ] = None
    application_name: Annotated[
        str,
        Key(
            "Shown in `pg_stat_activity`, followed by what the connection does (`work`, `lock`,"
            " `listen`, `migrate`)."
        ),
    ] = "pgtrickle-relay"
    connect_timeout_s: Annotated[
        float,
        Key("How long connecting may take, and waiting for a connection of the pool.", gt=0),
    ] = 10.0
    command_timeout_s: Annotated[float, Key("How long one statement may take.", gt=0)] = 60.0
    heartbeat_timeout_s: Annotated[
        float,
        Key(
            "So long may the ownership connection be silent before the pipelines are given up.",
            gt=0,
        ),
    ] = 2.0
    pool_size: Annotated[
        int,
        Key("Connections of the working pool; two more own locks and listen.", gt=0),
    ] = 10


class LogSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Logs go to standard error."""

    format: Annotated[
        Literal["text", "json"],
        Key("`text` for people, `json` for machines. Logs go to standard error."),
    ] = "text"
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Key("The least severe level that is written. `debug` names every batch."),
    ] = "info"
    repeat_s: Annotated[
        float,
        Key("An equal error is logged once in this time, then summed up."),
    ] = 60.0


class MetricsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Metrics and health over HTTP."""

    enabled: Annotated[bool, Key("Whether there is an HTTP server.")] = True
    addr: Annotated[str, Key("Host:port; port 0 takes a free one.")] = "0.0.0.0:9090"
    lag_interval_s: Annotated[float, Key("How often lag is measured.", gt=0)] = 5.0
    stalled_after_s: Annotated[
        float,
        Key("A pipeline with work to do and no progress for so long counts as stalled.", gt=0),
    ] = 60.0


class UiSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The status view."""

    mode: Annotated[
        Literal["none", "tui"],
        Key("`tui` shows the status view, where standard input and output are a terminal."),
    ] = "none"
    refresh_ms: Annotated[int, Key("How often the view is drawn again.", gt=0)] = 250


class SecretSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What secret references in the catalog may reach."""

    file_roots: Annotated[
        tuple[str, ...],
        Key("Files must lie under one of these directories."),
    ] = DEFAULT_FILE_ROOTS
    env_allow: Annotated[
        tuple[str, ...] | None,
        Key(
            "Shell patterns of allowed variable names; null allows every name but"
            " PGTRICKLE_RELAY_*."
        ),
    ] = DEFAULT_ENV_ALLOW


class FileSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Under which directories file backends may read and write."""

    roots: Annotated[
        tuple[str, ...] | None,
        Key(
            "Directories that file pipelines may use; null: the working and the temporary"
            " directory."
        ),
    ] = None


class RelaySettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this process works; many are defaults for pipelines that do not say otherwise."""

    group_id: Annotated[
        str,
        Key("Relays of one group share the pipelines; every group delivers everything."),
    ] = "default"
    worker_id: Annotated[
        str | None,
        Key("This relay's name in the fleet; null: host, process id and a random part."),
    ] = None
    max_pipelines: Annotated[
        int | None,
        Key(
            "At most so many pipelines in this process, webhook receivers not counted; null: no"
            " limit.",
            ge=1,
        ),
    ] = None
    shutdown_timeout_s: Annotated[
        float,
        Key("How long work in flight may take to finish on SIGTERM.", gt=0),
    ] = 30.0
    coordinate_interval_s: Annotated[
        float,
        Key("How often ownership is looked at, besides every change of the catalog.", gt=0),
    ] = 0.5
    failed_retry_s: Annotated[
        float,
        Key("How often a pipeline with a configuration error is tried again.", gt=0),
    ] = 30.0
    batch_size: Annotated[
        int,
        Key("Most messages in a batch; a pipeline's own key wins.", gt=0),
    ] = 4000
    batch_bytes: Annotated[int, Key("About the most payload bytes in a batch.", gt=0)] = 4_194_304
    prefetch: Annotated[
        int,
        Key(
            "Polled batches that may wait while one is published; a pipeline's own key wins.", ge=0
        ),
    ] = 1
    poll_interval_ms: Annotated[
        int,
        Key("First pause after an empty poll; a pipeline's own key wins.", gt=0),
    ] = 20
    retry_initial_ms: Annotated[
        int,
        Key("First wait after a failure; a pipeline's own key wins.", gt=0),
    ] = 1_000
    retry_max_ms: Annotated[
        int,
        Key("Longest wait after a failure; a pipeline's own key wins."),
    ] = 60_000
    breaker_threshold: Annotated[
        int,
        Key(
            "Rejections in a row, without one success, after which the sink counts as broken; a"
            " pipeline's own key wins.",
            gt=0,
        ),
    ] = 20
    sweep_interval_s: Annotated[
        float,
        Key("How often delivered rows past their retention are removed.", gt=0),
    ] = 60.0
    report_interval_s: Annotated[
        float,
        Key("How often this relay reports to the fleet.", gt=0),
    ] = 2.0


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about the process."""

    postgres: PostgresSettings = PostgresSettings()
    log: LogSettings = LogSettings()
    metrics: MetricsSettings = MetricsSettings()
    ui: UiSettings = UiSettings()
    secrets: SecretSettings = SecretSettings()
    files: FileSettings = FileSettings()
    relay: RelaySettings = RelaySettings()
    backends: Annotated[
        Mapping[str, Mapping[str, object]],
        Key("Named connection profiles, see [Profiles](#profiles)."),
    ] = {}


def checked(settings: Settings) -> Settings:
    """The same settings, if their values make sense together. Raises `ConfigurationError`."""
    check_values(settings, "")
    if settings.relay.retry_max_ms < settings.relay.retry_initial_ms:
        raise ConfigurationError("relay.retry_max_ms must not be below relay.retry_initial_ms")
    return settings
