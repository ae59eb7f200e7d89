"""The keys of a RabbitMQ ``sink`` and ``source`` object, and how they say whom to connect to."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote, urlsplit

import msgspec

from relay.errors import ConfigurationError
from relay.options import (
    Connecting,
    Credential,
    Format,
    Key,
    Positive,
    Routing,
    TimeoutMs,
    Tls,
    TlsCa,
    TlsCert,
    TlsInsecure,
    TlsKey,
)

DEFAULT_EXCHANGE_TYPE = "topic"
DEFAULT_ROUTING_KEY = "pgtrickle.{stream_table}.{op}"
# AMQP counts unacknowledged deliveries in 16 bits.
MAX_PREFETCH = 65535
# Names of exchanges, queues and routing keys have a length of one byte.
MAX_NAME_BYTES = 255

_PORTS = {"amqp": 5672, "amqps": 5671}


class RabbitConnectionOptions(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """What sink and source have in common.

    type: `rabbitmq`.
    url: `amqp://host:5672/vhost`, or `amqps://` for TLS; a user, a password and a virtual host in
        it are percent-decoded.
    username: User name, with `password`; without one `guest`, unless there is a client certificate,
        which then logs in by itself.
    password: Password, with `username`.
    vhost: The virtual host, `/` by default.
    """

    type: str
    url: Annotated[str, Key(schemes=tuple(_PORTS), connection=True)]
    username: Connecting = None
    password: Credential = None
    vhost: Connecting = None
    tls: Tls = False
    tls_ca: TlsCa = None
    tls_cert: TlsCert = None
    tls_key: TlsKey = None
    tls_insecure: TlsInsecure = False
    timeout_ms: TimeoutMs = 10_000


class RabbitSinkOptions(
    RabbitConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The sink's keys.

    exchange: Where events are published; without it the broker's own, which hands an event to the
        queue that is named like its routing key.
    exchange_type: Of an exchange that `declare_exchange` makes, by default `topic`.
    routing_key_template: The routing key of each event.
    declare_exchange: Make the exchange where it is missing, durable.
    mandatory: An event that no queue takes is an error, instead of being dropped by the broker.
    max_in_flight: The most events without confirmation.
    max_message_bytes: The most bytes of one body; by default what a broker of that version takes
        (16 MiB from 4.0 on, 128 MiB before), and never more than it says it does.
    confirm_timeout_ms: How long to go on without a single confirmation.
    """

    exchange: Annotated[str, Key(required_unless="routing_key_template")] = ""
    exchange_type: Annotated[str | None, Key(needs="declare_exchange")] = None
    routing_key_template: Annotated[str, Key(template=True)] = DEFAULT_ROUTING_KEY
    routing: Routing = {}
    declare_exchange: Annotated[bool, Key(needs="exchange")] = False
    mandatory: bool = True
    max_in_flight: Positive = 4096
    max_message_bytes: Positive | None = None
    confirm_timeout_ms: Positive = 30_000
    format: Format = "envelope"


class RabbitSourceOptions(
    RabbitConnectionOptions, frozen=True, forbid_unknown_fields=True, kw_only=True
):
    """The source's keys.

    queue: What to consume.
    declare_queue: Make the queue where it is missing, durable.
    prefetch_count: How many messages the broker sends ahead of their acknowledgement; by default
        four batches and at least 1000.
    exclusive: Be the queue's only consumer, which keeps its order across a lost connection; `false`
        shares the queue with other consumers.
    """

    queue: str
    declare_queue: bool = False
    prefetch_count: Annotated[int | None, Key(ge=1, le=MAX_PREFETCH)] = None
    exclusive: bool = True


class Endpoint(msgspec.Struct, frozen=True):
    """Where the broker is, and who we are there."""

    host: str
    port: int
    vhost: str
    username: str | None
    password: str | None
    is_tls: bool

    @property
    def address(self) -> str:
        """``host:port``, as errors and logs name the broker."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def endpoint_of(options: RabbitConnectionOptions, path: str) -> Endpoint:
    """The broker that the keys name. Raises `ConfigurationError`; never repeats a password."""
    wrong = ConfigurationError(
        f"{path}.url is not a RabbitMQ address",
        remedy="write amqp://host:5672/vhost or amqps://host:5671/vhost",
    )
    try:
        parts = urlsplit(options.url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise wrong from None
    if parts.scheme not in _PORTS or not host:
        raise wrong
    if parts.query or parts.fragment:
        raise ConfigurationError(
            f"{path}.url has a query", remedy="write its options as keys of their own"
        )
    named: dict[str, str | None] = {}
    in_url = {"username": parts.username, "password": parts.password, "vhost": parts.path[1:]}
    for name, value in in_url.items():
        named[name] = getattr(options, name) or unquote(value or "") or None
        if value and getattr(options, name) is not None:
            raise ConfigurationError(f"{path} has {name} in its url and beside it")
    username, password, vhost = named["username"], named["password"], named["vhost"] or "/"
    if (username is None) != (password is None):
        raise ConfigurationError(f"{path} needs username and password together")
    if "\x00" in f"{username}{password}":
        raise ConfigurationError(f"{path}: username and password can't hold NUL")
    check_name(vhost, f"{path}.vhost")
    is_tls = parts.scheme == "amqps" or bool(
        options.tls or options.tls_ca or options.tls_cert or options.tls_insecure
    )
    port = port or _PORTS["amqps" if is_tls else "amqp"]
    return Endpoint(host, port, vhost, username, password, is_tls)


def check_name(name: str, path: str) -> None:
    """Raise `ConfigurationError` for what AMQP can't spell."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ConfigurationError(f"{path} has no UTF-8 form") from None
    if size > MAX_NAME_BYTES:
        raise ConfigurationError(f"{path} has {size} bytes, the limit is {MAX_NAME_BYTES} bytes")
