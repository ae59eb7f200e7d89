"""The keys of a Kafka ``sink`` and ``source`` object, and how they say whom to connect to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from relay.errors import ConfigurationError
from relay.options import Format, Key, Routing, TimeoutMs, TlsCa, TlsCert, TlsInsecure, TlsKey

SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]

DEFAULT_PORT = 9092

# What `client` may hold: keys of the client library's connection that have none of ours.
CLIENT_KEYS: Mapping[str, type] = {"client_id": str, "max_idle_ms": int}

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:/@\[\]]+))(?::(?P<port>\d+))?")
_SCHEMES = ("kafka", "plaintext", "ssl", "sasl_plaintext", "sasl_ssl")
_SCHEME = re.compile(rf"^({'|'.join(_SCHEMES)})://", re.IGNORECASE)


class KafkaConnectionOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What sink and source have in common."""

    type: Annotated[str, Key("`kafka`.")]
    brokers: Annotated[
        str | Sequence[str],
        Key(
            "`host:9092`, several separated by commas or as a list; one that answers is enough.",
            schemes=("", *_SCHEMES),
            connection=True,
        ),
    ]
    sasl_mechanism: Annotated[
        SaslMechanism | None,
        Key(
            "How to log in; `SCRAM-SHA-512` where a user is given.",
            connection=True,
            needs="sasl_username",
        ),
    ] = None
    sasl_username: Annotated[
        str | None,
        Key("User name, with `sasl_password`.", connection=True, needs="sasl_password"),
    ] = None
    sasl_password: Annotated[
        str | None,
        Key("Password, with `sasl_username`.", secret=True, connection=True, needs="sasl_username"),
    ] = None
    tls: Annotated[bool, Key("Speak TLS.", connection=True)] = False
    tls_ca: TlsCa = None
    tls_cert: TlsCert = None
    tls_key: TlsKey = None
    tls_insecure: TlsInsecure = False
    request_timeout_ms: TimeoutMs = 30_000
    client: Annotated[
        Mapping[str, object],
        Key(
            "Settings of the client library's connections (`client_id`, `max_idle_ms`); in a"
            " profile only.",
            connection=True,
            profile_only=True,
        ),
    ] = {}


class KafkaSinkOptions(
    KafkaConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The sink's keys."""

    topic: Annotated[
        str | None,
        Key(
            "Where all events go.",
            required_unless="topic_template",
            excludes=("topic_template",),
        ),
    ] = None
    topic_template: Annotated[
        str | None, Key("Where each event goes, instead of `topic`.", template=True)
    ] = None
    routing: Routing = {}
    key_template: Annotated[
        str | None,
        Key(
            "The record key, which decides the partition; by default the dedup key, which spreads"
            " events over all partitions. `{key}` keeps the events of an entity in one partition,"
            " in order.",
            template=True,
        ),
    ] = None
    acks: Annotated[
        Literal["all", "1"],
        Key(
            "`all`: every in-sync replica. `1`: the leader alone, which can lose what it accepted,"
            " and is not idempotent."
        ),
    ] = "all"
    compression: Annotated[
        Literal["none", "gzip", "snappy", "lz4", "zstd"], Key("How batches are compressed.")
    ] = "none"
    linger_ms: Annotated[
        int,
        Key(
            "How long a publish that would not fill a request waits, so that what is written"
            " meanwhile goes out together in the next one.",
            ge=0,
        ),
    ] = 0
    max_request_size: Annotated[
        int,
        Key(
            "The most bytes of one record with its batch; a lower limit of the topic is found by"
            " itself.",
            ge=1,
        ),
    ] = 1024 * 1024
    format: Format = "envelope"


class KafkaSourceOptions(
    KafkaConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The source's keys."""

    topic: Annotated[str | Sequence[str], Key("One topic, or a list.")]
    group_id: Annotated[
        str | None, Key("The consumer group, by default named after the pipeline.")
    ] = None
    group_instance_id: Annotated[
        str | None,
        Key(
            "Our name in the group, by default the pipeline's too, so that whoever runs the"
            " pipeline next has its partitions at once; empty for none."
        ),
    ] = None
    auto_offset_reset: Annotated[
        Literal["earliest", "latest"],
        Key("Where a partition begins that the group has never read."),
    ] = "earliest"
    on_position_lost: Annotated[
        Literal["fail", "earliest", "latest"],
        Key("What to do when retention or a new topic took the position away."),
    ] = "fail"
    isolation_level: Annotated[
        Literal["read_committed", "read_uncommitted"],
        Key("`read_committed` leaves out what a transaction aborted."),
    ] = "read_committed"
    session_timeout_ms: Annotated[
        int, Key("Without a heartbeat for so long, our partitions go to others.", ge=1)
    ] = 30_000
    rebalance_timeout_ms: Annotated[
        int, Key("How long what is in flight may take when others join.", ge=1)
    ] = 60_000
    fetch_max_bytes: Annotated[
        int, Key("The most bytes that one fetch asks of a broker.", ge=1)
    ] = 8 * 1024 * 1024


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
