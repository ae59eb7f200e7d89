"""The keys of a Kafka ``sink`` and ``source`` object, and how they say whom to connect to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import msgspec

from relay.errors import ConfigurationError
from relay.options import (
    Format,
    Key,
    Positive,
    Routing,
    TimeoutMs,
)
from relay.tls import TlsKeys

SaslMechanism = Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]

DEFAULT_PORT = 9092

# What `client` may hold: keys of the client library's connection that have none of ours.
CLIENT_KEYS: Mapping[str, type] = {"client_id": str, "max_idle_ms": int}

_ADDRESS = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+)(?::(?P<port>\d+))?")
_SCHEMES = ("kafka", "plaintext", "ssl", "sasl_plaintext", "sasl_ssl")
_SCHEME = re.compile(rf"^({'|'.join(_SCHEMES)})://", re.IGNORECASE)


class KafkaConnectionOptions(
    TlsKeys, msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """What sink and source have in common.

    type: `kafka`.
    brokers: `host:9092`, several separated by commas or as a list; one that answers is enough.
    sasl_mechanism: How to log in; `SCRAM-SHA-512` where a user is given.
    sasl_username: User name, with `sasl_password`.
    sasl_password: Password, with `sasl_username`.
    tls: Speak TLS.
    client: Settings of the client library's connections (`client_id`, `max_idle_ms`); in a profile
        only.
    """

    type: str
    brokers: Annotated[str | Sequence[str], Key(schemes=("", *_SCHEMES), connection=True)]
    sasl_mechanism: Annotated[SaslMechanism | None, Key(connection=True, needs="sasl_username")] = (
        None
    )
    sasl_username: Annotated[str | None, Key(connection=True, needs="sasl_password")] = None
    sasl_password: Annotated[
        str | None, Key(secret=True, connection=True, needs="sasl_username")
    ] = None
    request_timeout_ms: TimeoutMs = 30_000
    client: Annotated[Mapping[str, object], Key(connection=True, profile_only=True)] = {}


class KafkaSinkOptions(
    KafkaConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The sink's keys.

    topic: Where all events go.
    topic_template: Where each event goes, instead of `topic`.
    key_template: The record key, which decides the partition; by default the dedup key, which
        spreads events over all partitions. `{key}` keeps the events of an entity in one partition,
        in order.
    acks: `all`: every in-sync replica. `1`: the leader alone, which can lose what it accepted, and
        is not idempotent.
    compression: How batches are compressed.
    linger_ms: How long a publish that would not fill a request waits, so that what is written
        meanwhile goes out together in the next one.
    max_request_size: The most bytes of one record with its batch; a lower limit of the topic is
        found by itself.
    """

    topic: Annotated[
        str | None, Key(required_unless="topic_template", excludes=("topic_template",))
    ] = None
    topic_template: Annotated[str | None, Key(template=True)] = None
    routing: Routing = {}
    key_template: Annotated[str | None, Key(template=True)] = None
    acks: Literal["all", "1"] = "all"
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "none"
    linger_ms: Annotated[int, Key(ge=0)] = 0
    max_request_size: Positive = 1024 * 1024
    format: Format = "envelope"


class KafkaSourceOptions(
    KafkaConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The source's keys.

    topic: One topic, or a list.
    group_id: The consumer group, by default named after the pipeline.
    group_instance_id: Our name in the group, by default the pipeline's too, so that whoever runs
        the pipeline next has its partitions at once; empty for none.
    auto_offset_reset: Where a partition begins that the group has never read.
    on_position_lost: What to do when retention or a new topic took the position away.
    isolation_level: `read_committed` leaves out what a transaction aborted.
    session_timeout_ms: Without a heartbeat for so long, our partitions go to others.
    rebalance_timeout_ms: How long what is in flight may take when others join.
    fetch_max_bytes: The most bytes that one fetch asks of a broker.
    """

    topic: str | Sequence[str]
    group_id: str | None = None
    group_instance_id: str | None = None
    auto_offset_reset: Literal["earliest", "latest"] = "earliest"
    on_position_lost: Literal["fail", "earliest", "latest"] = "fail"
    isolation_level: Literal["read_committed", "read_uncommitted"] = "read_committed"
    session_timeout_ms: Positive = 30_000
    rebalance_timeout_ms: Positive = 60_000
    fetch_max_bytes: Positive = 8 * 1024 * 1024


def addresses_of(options: KafkaConnectionOptions, path: str) -> list[str]:
    """Each broker to begin with as ``host:port``.

    Raises `ConfigurationError`, which never repeats what looks secret.
    """
    written = options.brokers
    texts = written.split(",") if isinstance(written, str) else list(written)
    addresses = [_address(text.strip(), path) for text in texts if text.strip()]
    if not addresses:
        raise ConfigurationError(f"{path}.brokers is empty", remedy="write host:9092")
    return addresses


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


def _address(text: str, path: str) -> str:
    found = _ADDRESS.fullmatch(_SCHEME.sub("", text).rstrip("/"))
    port = int((found and found["port"]) or DEFAULT_PORT)
    if found is None or not 0 < port < 65536:
        raise ConfigurationError(
            f"{path}.brokers has an entry that is not an address", remedy="write host:9092"
        )
    return f"{found['host']}:{port}"
