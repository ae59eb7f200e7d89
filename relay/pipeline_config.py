"""The config object of one catalog row, typed: what a pipeline is made of and how it behaves.

The SQL functions validate what goes into the catalog; a row may still have been edited by hand, so
nothing is believed here either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from relay import __version__
from relay.errors import ConfigurationError
from relay.events import Direction
from relay.options import parse_options
from relay.settings import RelaySettings

CONFIG_VERSION = 1

# What says where a backend is and who we are to it. It comes from a profile as a whole or from
# the row as a whole: a row that could aim a profile's credentials at an endpoint of its own would
# give them away.
CONNECTION_KEYS = frozenset(
    {
        *("url", "brokers", "region", "endpoint_url", "queue_url", "listen_addr"),
        *("user", "username", "password", "token", "creds_file", "nkey_seed", "db", "vhost"),
        *("sasl_mechanism", "sasl_username", "sasl_password"),
        *("access_key_id", "secret_access_key", "session_token", "role_arn"),
        *("auth_header", "auth_value", "bearer_token", "hmac_secret", "headers"),
        *("signature", "signature_header"),
        *("sslmode", "sslrootcert", "sslcert", "sslkey"),
        *("tls", "tls_ca", "tls_cert", "tls_key", "tls_insecure", "client"),
    }
)


# The catalog accepts these for releases in which relays of a group compete for one outbox. Until
# they do, such a pipeline would run with other guarantees than its row asks for.
_NOT_AVAILABLE = ("parallelism", "visibility_seconds")

# Keys that mean something in one direction only, and would be without effect in the other.
_KEYS_OF: Mapping[Direction, frozenset[str]] = {
    "forward": frozenset(
        {
            *("start", "on_reset", "collapse_updates", "snapshot_markers"),
            *("dedup_namespace", "key_columns"),
        }
    ),
    "reverse": frozenset({"dedup_key_from", "event_type_from", "columns"}),
}


class PipelineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One pipeline. Keys that are None take the default of the runtime settings."""

    config_version: int = CONFIG_VERSION
    source_type: str
    source: Mapping[str, object]
    sink_type: str
    sink: Mapping[str, object]
    description: str = ""
    batch_size: int | None = None
    poll_interval_ms: int | None = None
    prefetch: int | None = None
    max_attempts: int | None = None
    retry_initial_ms: int | None = None
    retry_max_ms: int | None = None
    breaker_threshold: int | None = None
    ordering: Literal["strict", "pipelined"] | None = None
    allow_plaintext_secrets: bool = False
    start: Literal["earliest", "latest"] = "earliest"
    on_reset: Literal["earliest", "latest", "fail"] = "fail"
    parallelism: int = 1
    visibility_seconds: int = 30
    collapse_updates: bool = False
    snapshot_markers: bool = False
    dedup_namespace: str = ""
    key_columns: Sequence[str] | None = None
    dedup_key_from: str | None = None
    event_type_from: str | None = None
    columns: Mapping[str, str] | None = None


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
    parsed = parse_options(config, PipelineConfig, path="")
    _refuse_what_is_not_available(config, parsed.source)
    if parsed.config_version != CONFIG_VERSION:
        raise ConfigurationError(
            f"config_version {parsed.config_version} is not one this version can read",
            remedy="upgrade pgtrickle-relay",
        )
    if direction == "forward" and parsed.source_type != "outbox":
        raise ConfigurationError("source_type of a forward pipeline must be outbox")
    if direction == "reverse" and parsed.sink_type != "pg-inbox":
        raise ConfigurationError("sink_type of a reverse pipeline must be pg-inbox")
    other: Direction = "reverse" if direction == "forward" else "forward"
    strange = sorted(_KEYS_OF[other] & config.keys())
    if strange:
        raise ConfigurationError(
            f"{strange[0]} belongs to {other} pipelines", remedy="leave it out"
        )
    return parsed


def _refuse_what_is_not_available(
    config: Mapping[str, object], source: Mapping[str, object]
) -> None:
    asked_for = [name for name in _NOT_AVAILABLE if name in config]
    if source.get("consumer_group") is not None:
        asked_for.append("source.consumer_group")
    if asked_for:
        raise ConfigurationError(
            f"{asked_for[0]} is not available in {__version__}: one relay at a time reads an outbox"
            " for a pipeline",
            remedy="leave it out",
        )


def pace_of(config: PipelineConfig, defaults: RelaySettings) -> Pace:
    """The pipeline's pace. Raises `ConfigurationError` for values that make no sense."""

    def own(name: str, value: int | None, default: int) -> int:
        if value is not None and value < (0 if name == "prefetch" else 1):
            raise ConfigurationError(f"{name} must be positive, but is {value}")
        return default if value is None else value

    pace = Pace(
        batch_size=own("batch_size", config.batch_size, defaults.batch_size),
        poll_interval_s=own("poll_interval_ms", config.poll_interval_ms, defaults.poll_interval_ms)
        / 1000,
        prefetch=own("prefetch", config.prefetch, defaults.prefetch),
        max_attempts=None
        if config.max_attempts is None
        else own("max_attempts", config.max_attempts, config.max_attempts),
        retry_initial_s=own("retry_initial_ms", config.retry_initial_ms, defaults.retry_initial_ms)
        / 1000,
        retry_max_s=own("retry_max_ms", config.retry_max_ms, defaults.retry_max_ms) / 1000,
        breaker_threshold=own(
            "breaker_threshold", config.breaker_threshold, defaults.breaker_threshold
        ),
    )
    if pace.retry_max_s < pace.retry_initial_s:
        raise ConfigurationError("retry_max_ms must not be below retry_initial_ms")
    return pace


def with_profile(
    role: str,
    type_: str,
    options: Mapping[str, object],
    profiles: Mapping[str, Mapping[str, object]],
) -> dict[str, object]:
    """The options with their connection profile merged in; ``role`` is ``source`` or ``sink``.

    Raises `ConfigurationError` for an unknown profile, one of another type, or a row that adds
    connection keys of its own to a profile's.
    """
    merged = {name: value for name, value in options.items() if name != "profile"}
    name = options.get("profile")
    if name is None:
        if "client" in merged:
            raise ConfigurationError(
                f"{role}.client belongs into a profile", remedy="add it to backends.<name>.client"
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
    mixed = sorted(CONNECTION_KEYS & merged.keys())
    if mixed:
        raise ConfigurationError(
            f"{role}.{mixed[0]} can't be combined with the profile {name!r}",
            remedy="endpoint, credentials and TLS come from a profile as a whole",
        )
    return {**profile, **merged}
