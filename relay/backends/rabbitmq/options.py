"""The keys of a RabbitMQ ``sink`` and ``source`` object, and how they say whom to connect to."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import structs

from relay import endpoint
from relay.endpoint import Endpoint
from relay.errors import ConfigurationError, MessageRejected
from relay.escape import fitting
from relay.options import (
    Connecting,
    Credential,
    Format,
    Key,
    Positive,
    Routing,
    TimeoutMs,
)
from relay.tls import TlsKeys

DEFAULT_EXCHANGE_TYPE = "topic"
DEFAULT_ROUTING_KEY = "pgtrickle.{stream_table}.{op}"
# AMQP counts unacknowledged deliveries in 16 bits.
MAX_PREFETCH = 65535
# Names of exchanges, queues and routing keys have a length of one byte.
MAX_NAME_BYTES = 255

_PORTS = {"amqp": 5672, "amqps": 5671}


class RabbitConnectionOptions(
    TlsKeys, msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True
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
        two batches and at least 1000.
    exclusive: Be the queue's only consumer, which keeps its order across a lost connection; `false`
        shares the queue with other consumers.
    """

    queue: str
    declare_queue: bool = False
    prefetch_count: Annotated[int | None, Key(ge=1, le=MAX_PREFETCH)] = None
    exclusive: bool = True


def endpoint_of(options: RabbitConnectionOptions, path: str) -> tuple[Endpoint, str]:
    """The broker that the keys name, and the virtual host. Raises `ConfigurationError`.

    Who we are there is in the endpoint, wherever it was said.
    """
    wrong = ConfigurationError(
        f"{path}.url is not a RabbitMQ address",
        remedy="write amqp://host:5672/vhost or amqps://host:5671/vhost",
    )
    found = endpoint.endpoint_of(options.url, _PORTS, wrong, options)
    endpoint.refuse_query(found, path)
    username = endpoint.either(path, "username", found.username or None, options.username)
    password = endpoint.either(path, "password", found.password or None, options.password)
    vhost = endpoint.either(path, "vhost", found.path or None, options.vhost) or "/"
    username, password = username or None, password or None
    if (username is None) != (password is None):
        raise ConfigurationError(f"{path} needs username and password together")
    if "\x00" in f"{username}{password}":
        raise ConfigurationError(f"{path}: username and password can't hold NUL")
    check_name(vhost, f"{path}.vhost")
    return structs.replace(found, username=username, password=password), vhost


def check_name(name: str, path: str) -> None:
    """Raise `ConfigurationError` for what AMQP can't spell."""
    try:
        fitting(name, path, MAX_NAME_BYTES)
    except MessageRejected as error:
        raise ConfigurationError(error.problem) from None
