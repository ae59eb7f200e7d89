"""The keys of a Kafka ``sink`` and ``source`` object, and how they say whom to connect to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from relay.errors import ConfigurationError

SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]

DEFAULT_PORT = 9092

# What `client` may hold: keys of the client library's connection that have none of ours.
CLIENT_KEYS: Mapping[str, type] = {"client_id": str, "max_idle_ms": int}

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:/@\[\]]+))(?::(?P<port>\d+))?")
_SCHEME = re.compile(r"^(kafka|plaintext|ssl|sasl_plaintext|sasl_ssl)://", re.IGNORECASE)


class KafkaConnectionOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What sink and source have in common.

    ``brokers``: ``host:9092``, several separated by commas or as a list; one that answers is
    enough. ``sasl_mechanism``: ``PLAIN``, ``SCRAM-SHA-256`` or ``SCRAM-SHA-512``, by default
    ``SCRAM-SHA-512`` where a user is given; ``sasl_username``, ``sasl_password``. ``tls`` speaks
    TLS; ``tls_ca``, ``tls_cert`` and ``tls_key`` are paths of PEM files and imply it;
    ``tls_insecure`` accepts any certificate. ``request_timeout_ms``: how long to wait for an
    answer, in milliseconds, default 30000. ``client``: settings of the client library's
    connections (``client_id``, ``max_idle_ms``); in a profile only.
    """

    type: str
    brokers: str | Sequence[str]
    sasl_mechanism: SaslMechanism | None = None
    sasl_username: str | None = None
    sasl_password: str | None = None
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_insecure: bool = False
    request_timeout_ms: int = 30_000
    client: Mapping[str, object] = {}


class KafkaSinkOptions(
    KafkaConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The sink's keys.

    ``topic``: where all events go, or ``topic_template``: where each event goes, a template; one
    of the two. ``routing``: other topic templates by event type or op. ``key_template``: the
    record key, which decides the partition; by default the dedup key, which spreads events over
    all partitions. ``{key}`` keeps the events of an entity in one partition, in order.
    ``acks``: ``all`` (every in-sync replica, the default) or ``1`` (the leader alone, which can
    lose what it accepted, and is not idempotent). ``compression``: ``gzip``, ``snappy``, ``lz4``
    or ``zstd``, by default none. ``linger_ms``: how long a publish that would not fill a request
    waits, so that what is written meanwhile goes out together in the next one; default 0.
    ``max_request_size``: the most bytes of one record with its batch, default 1048576; a lower
    limit of the topic is found by itself. ``format``: ``envelope``, ``payload`` or
    ``cloudevents``.
    """

    topic: str | None = None
    topic_template: str | None = None
    routing: Mapping[str, str] = {}
    key_template: str | None = None
    acks: Literal["all", "1"] = "all"
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "none"
    linger_ms: int = 0
    max_request_size: int = 1024 * 1024
    format: str = "envelope"


class KafkaSourceOptions(
    KafkaConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The source's keys.

    ``topic``: one topic, or a list. ``group_id``: the consumer group, by default named after the
    pipeline. ``group_instance_id``: our name in it, by default the pipeline's too, so that whoever
    runs the pipeline next has its partitions at once; empty for none. ``auto_offset_reset``: where
    a partition begins that the group has never read: ``earliest`` (the default) or ``latest``.
    ``on_position_lost``: what to do when retention or a new topic took the position away: ``fail``
    (the default), ``earliest`` or ``latest``. ``isolation_level``: ``read_committed`` (the
    default: what a transaction aborted is left out) or ``read_uncommitted``.
    ``session_timeout_ms``: after how many milliseconds without a sign of life our partitions go to
    others, default 30000. ``rebalance_timeout_ms``: how long what is out may take when others
    join, default 60000. ``fetch_max_bytes``: the most bytes that one fetch asks of a broker,
    default 8 MiB.
    """

    topic: str | Sequence[str]
    group_id: str | None = None
    group_instance_id: str | None = None
    auto_offset_reset: Literal["earliest", "latest"] = "earliest"
    on_position_lost: Literal["fail", "earliest", "latest"] = "fail"
    isolation_level: Literal["read_committed", "read_uncommitted"] = "read_committed"
    session_timeout_ms: int = 30_000
    rebalance_timeout_ms: int = 60_000
    fetch_max_bytes: int = 8 * 1024 * 1024


class Address(msgspec.Struct, frozen=True):
    """One broker as it is written."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def addresses_of(options: KafkaConnectionOptions, path: str) -> list[Address]:
    """The brokers to begin with. Raises `ConfigurationError`; never repeats what looks secret."""
    written = options.brokers
    texts = written.split(",") if isinstance(written, str) else list(written)
    addresses = [_address(text.strip(), path) for text in texts if text.strip()]
    if not addresses:
        raise ConfigurationError(f"{path}.brokers is empty", remedy="write host:9092")
    return addresses


def is_tls(options: KafkaConnectionOptions) -> bool:
    """Whether these keys ask for TLS."""
    return bool(options.tls or options.tls_ca or options.tls_cert or options.tls_insecure)


def mechanism_of(options: KafkaConnectionOptions) -> SaslMechanism | None:
    """How to authenticate; None for not at all."""
    if options.sasl_username is None:
        return None
    return options.sasl_mechanism or "SCRAM-SHA-512"


def check_connection(options: KafkaConnectionOptions, path: str) -> None:
    """Raise `ConfigurationError` for keys that contradict each other or make no sense."""
    addresses_of(options, path)
    if (options.tls_cert is None) != (options.tls_key is None):
        raise ConfigurationError(f"{path} needs tls_cert and tls_key together")
    if (options.sasl_username is None) != (options.sasl_password is None):
        raise ConfigurationError(f"{path} needs sasl_username and sasl_password together")
    if options.sasl_mechanism is not None and options.sasl_username is None:
        raise ConfigurationError(f"{path}.sasl_mechanism needs sasl_username and sasl_password")
    check_at_least(path, 1, request_timeout_ms=options.request_timeout_ms)
    for name, value in options.client.items():
        kind = CLIENT_KEYS.get(name)
        if kind is None:
            raise ConfigurationError(
                f"{path}.client.{name} is not a known key",
                remedy=f"known are {', '.join(CLIENT_KEYS)}",
            )
        if not isinstance(value, kind):
            raise ConfigurationError(f"{path}.client.{name} is not of type {kind.__name__}")


def check_at_least(path: str, least: int, **values: int) -> None:
    """Raise `ConfigurationError` naming the first key whose number is too low."""
    for name, value in values.items():
        if value < least:
            raise ConfigurationError(f"{path}.{name} must be at least {least}")


def _address(text: str, path: str) -> Address:
    found = _ADDRESS.fullmatch(_SCHEME.sub("", text).rstrip("/"))
    port = int((found and found["port"]) or DEFAULT_PORT)
    if found is None or not 0 < port < 65536:
        raise ConfigurationError(
            f"{path}.brokers has an entry that is not an address", remedy="write host:9092"
        )
    return Address(found["v6"] or found["host"], port)
