"""The connections to the brokers of one cluster, and what they say of its topics.

The client library does what it does well: the handshake, TLS, authentication, and packing and
reading requests. Its producer, consumer and cluster client are not used: they reconnect, wait and
repeat behind the back of the loop, which has to know what was accepted and decide what is
repeated, and in which order.
"""

from __future__ import annotations

import asyncio
import math
import random
import ssl
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aiokafka.conn import AIOKafkaConnection
from aiokafka.protocol.metadata import MetadataRequest

from relay.backends.kafka.errors import UNKNOWN_TOPIC_OR_PARTITION, mapped, of_code
from relay.backends.kafka.options import (
    Address,
    KafkaConnectionOptions,
    addresses_of,
    is_tls,
    mechanism_of,
)
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    NotConnected,
    RelayError,
)

_CLOSE_TIMEOUT_S = 2.0
_HEALTH_TIMEOUT_S = 2.0
# How old what we know of a topic may become: partitions are added and leaders move.
_METADATA_AGE_S = 60.0
# Waiting is bounded here, by the request and not by the connection.
_NO_BOUND_MS = 24 * 3600 * 1000
# Brokers hang up on what was idle for ten minutes.
_MAX_IDLE_MS = 540_000

GROUP_LANE = "group"


class _Connection(AIOKafkaConnection):  # type: ignore[misc]  # untyped in the library
    """The library's connection, which can be closed for certain, whatever state it is in."""

    transport: asyncio.WriteTransport | None = None

    def _create_reader_task(self) -> Any:  # the library's own type, which it does not tell
        self.transport = self._writer.transport
        return super()._create_reader_task()

    async def aclose(self) -> None:
        """Close, and return when the socket is gone; a peer that has stalled is let go."""
        self.close()
        transport, closed = self.transport, self._closed_fut
        if transport is None or closed is None:
            return
        await asyncio.wait({closed}, timeout=_CLOSE_TIMEOUT_S)
        if not closed.done():
            transport.abort()
            await asyncio.wait({closed}, timeout=_CLOSE_TIMEOUT_S)


class Cluster:
    """Open connections to one cluster, at most one for each broker and lane.

    A lane of its own keeps short requests from queueing behind long ones: a broker answers the
    requests of a connection one after the other.
    """

    def __init__(
        self, options: KafkaConnectionOptions, addresses: Sequence[Address], path: str, name: str
    ) -> None:
        self._options = options
        self._addresses = addresses
        self._path = path
        self._timeout_s = options.request_timeout_ms / 1000
        self._arguments: dict[str, object] = {
            "client_id": name,
            "max_idle_ms": _MAX_IDLE_MS,
            **options.client,
            "request_timeout_ms": _NO_BOUND_MS,
            **_security(options, path),
        }
        self._connections: dict[tuple[int, str], _Connection] = {}
        self._opening = asyncio.Lock()
        self._brokers: dict[int, Address] = {}
        # By topic the leader of each partition, a negative number where there is none.
        self._leaders: dict[str, Sequence[int]] = {}
        self._known_at: dict[str, float] = {}
        self._is_closed = False

    @property
    def address(self) -> str:
        """The brokers as they were written."""
        return ",".join(map(str, self._addresses))

    @property
    def brokers(self) -> int:
        """How many brokers there are."""
        return len(self._brokers)

    async def bootstrap(self) -> None:
        """Find the brokers. Raises the most telling of what keeps each address from answering."""
        troubles: list[RelayError] = []
        for address in self._addresses:
            doing = f"connecting to Kafka at {address}"
            connection = self._connection(address.host, address.port)
            try:
                await self._open(connection, doing)
                self._learn(await self._ask(connection, MetadataRequest([]), doing))
                return
            except RelayError as error:
                troubles.append(error)
            finally:
                await connection.aclose()
        telling = [error for error in troubles if isinstance(error, ConfigurationError)]
        raise (telling or troubles)[0]

    async def learn(self, topics: Iterable[str], *, anew: bool = False) -> None:
        """Know the partitions and leaders of these topics. Raises `DestinationMissing`.

        What was learnt a short while ago is not asked again, unless ``anew``.
        """
        oldest = time.monotonic() - _METADATA_AGE_S
        wanted = [
            topic for topic in topics if anew or self._known_at.get(topic, -math.inf) < oldest
        ]
        if not wanted:
            return
        doing = f"asking for topics at {self.address}"
        answer = await self.ask_any(MetadataRequest(wanted, False), doing)
        for code, topic, *_ in answer.topics:
            if code == UNKNOWN_TOPIC_OR_PARTITION:
                raise DestinationMissing(
                    f"there is no topic {topic!r} at {self.address}, or the user may not see it",
                    remedy=f"make it with: kafka-topics.sh --create --topic {topic}",
                )
            if code:
                raise of_code(code, f"asking for the topic {topic!r} at {self.address}")
        self._learn(answer)
        self._known_at.update(dict.fromkeys(wanted, time.monotonic()))

    def forget(self, topic: str) -> None:
        """Ask for this topic again before it is used: something has changed."""
        self._known_at.pop(topic, None)

    def is_known(self, topic: str) -> bool:
        """Whether the partitions of this topic were learnt a short while ago."""
        return self._known_at.get(topic, -math.inf) >= time.monotonic() - _METADATA_AGE_S

    def partitions_of(self, topic: str) -> int:
        """How many partitions a known topic has; 0 for one that is not known."""
        return len(self._leaders.get(topic, ()))

    def leader_of(self, topic: str, partition: int) -> int:
        """The broker that serves a partition. Raises `NotConnected` while there is none."""
        leaders = self._leaders.get(topic, ())
        leader = leaders[partition] if partition < len(leaders) else -1
        if leader < 0:
            self.forget(topic)
            raise NotConnected(f"partition {partition} of {topic!r} has no leader at the moment")
        return leader

    async def ask(
        self,
        node: int,
        request: object,
        doing: str,
        *,
        lane: str = "",
        timeout_s: float | None = None,
    ) -> Any:  # the answer's type goes with the request's
        """Send one request to a broker and give its answer. Raises `Outage` and its like.

        Requests of one lane to one broker are sent in the order of the calls, once it is open.
        """
        connection = await self.connected(node, doing, lane)
        return await self._ask(connection, request, doing, timeout_s)

    async def ask_any(self, request: object, doing: str) -> Any:  # as above
        """Ask whichever broker answers, beginning with those that are connected."""
        nodes = list(self._brokers)
        random.shuffle(nodes)
        nodes.sort(key=lambda node: not self._is_connected(node))
        trouble: RelayError = NotConnected(f"{doing}: no broker is known")
        for node in nodes:
            try:
                return await self.ask(node, request, doing)
            except NotConnected as error:
                trouble = error
        raise trouble

    async def connected(self, node: int, doing: str, lane: str = "") -> _Connection:
        """The connection to a broker, opened where there is none. Raises `Outage` and its like."""
        found = self._connections.get((node, lane))
        if found is not None and found.connected():
            return found
        async with self._opening:
            if self._is_closed:
                raise NotConnected(f"{doing}: the connection is closed")
            found = self._connections.get((node, lane))
            if found is not None:
                if found.connected():
                    return found
                await found.aclose()
            broker = self._brokers.get(node)
            if broker is None:
                raise NotConnected(f"{doing}: broker {node} is not known any more")
            connection = self._connection(broker.host, broker.port)
            self._connections[node, lane] = connection
            await self._open(connection, f"connecting to Kafka at {broker}")
            return connection

    def is_lost(self, node: int, lane: str) -> bool:
        """Whether a connection that was open is not any more."""
        found = self._connections.get((node, lane))
        return found is None or not found.connected()

    async def drop(self, node: int, lane: str = "") -> None:
        """Close one connection: no answer of it is believed any more."""
        found = self._connections.pop((node, lane), None)
        if found is not None:
            await found.aclose()

    async def is_healthy(self) -> bool:
        """True when a broker answers now."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await self.ask_any(MetadataRequest([]), "asking for a sign of life")
        except (RelayError, TimeoutError):
            return False
        return True

    async def aclose(self) -> None:
        """Close every connection; never raises. Whoever is asking hears `NotConnected`."""
        self._is_closed = True
        connections = list(self._connections.values())
        self._connections.clear()
        await asyncio.gather(*(one.aclose() for one in connections))

    def _connection(self, host: str, port: int) -> _Connection:
        return _Connection(host, port, **self._arguments)

    def _is_connected(self, node: int) -> bool:
        found = self._connections.get((node, ""))
        return found is not None and bool(found.connected())

    async def _open(self, connection: _Connection, doing: str) -> None:
        try:
            with mapped(doing):
                async with asyncio.timeout(self._timeout_s):
                    await connection.connect()
        except NotConnected as error:
            raise self._explained(error) from error
        except ValueError as error:
            # What the server says in the exchange of passwords is not what it must.
            raise AuthenticationRefused(
                f"{doing}: the server does not prove that it knows our password: {error}"
            ) from None

    def _explained(self, error: NotConnected) -> NotConnected:
        """A server that speaks TLS hangs up on one who does not."""
        if is_tls(self._options) or "ended" not in error.problem:
            return error
        return NotConnected(error.problem, remedy="does the broker want TLS? set tls_ca or tls")

    async def _ask(
        self,
        connection: _Connection,
        request: object,
        doing: str,
        timeout_s: float | None = None,
    ) -> Any:  # as above
        with mapped(doing):
            async with asyncio.timeout(self._timeout_s if timeout_s is None else timeout_s):
                return await connection.send(request)

    def _learn(self, answer: Any) -> None:  # as above
        """Take over what an answer says of brokers and topics."""
        self._brokers = {node: Address(host, port) for node, host, port, *_ in answer.brokers}
        for code, topic, _, partitions in answer.topics:
            if code == 0:
                numbered = sorted((partition, leader) for _, partition, leader, *_ in partitions)
                self._leaders[topic] = [leader for _, leader in numbered]


def _security(options: KafkaConnectionOptions, path: str) -> Mapping[str, object]:
    mechanism = mechanism_of(options)
    with_tls = is_tls(options)
    protocol = ("SASL_" if mechanism else "") + ("SSL" if with_tls else "PLAINTEXT")
    security: dict[str, object] = {"security_protocol": protocol}
    if with_tls:
        security["ssl_context"] = _tls_context(options, path)
    if mechanism:
        security |= {
            "sasl_mechanism": mechanism,
            "sasl_plain_username": options.sasl_username,
            "sasl_plain_password": options.sasl_password,
        }
    return security


def _tls_context(options: KafkaConnectionOptions, path: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.tls_ca)
        if options.tls_cert is not None:
            context.load_cert_chain(options.tls_cert, options.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"{path}: the TLS files can't be used: {error.strerror or type(error).__name__}",
            remedy="tls_ca, tls_cert and tls_key are paths of PEM files",
        ) from None
    if options.tls_insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


async def open_cluster(options: KafkaConnectionOptions, *, path: str, name: str) -> Cluster:
    """Connect, and find the brokers. Raises `Outage`, `ConfigurationError` and its kinds."""
    cluster = Cluster(options, addresses_of(options, path), path, name)
    try:
        await cluster.bootstrap()
    except BaseException:
        await cluster.aclose()
        raise
    return cluster
