"""What the tests of the SQS sink and source share: queues of their own, and looks at them."""

from __future__ import annotations

import asyncio
import inspect
import json
import socket
import ssl
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import aioboto3
import botocore.exceptions
import httpx
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession

from relay.backends.sqs import SqsSink, SqsSource
from relay.backends.sqs.entry import Received, decoded, entry_maker
from relay.backends.sqs.errors import mapped
from relay.backends.sqs.identifier import deduplication_id, group_id
from relay.backends.sqs.queue import _loader
from relay.contracts import Rejected
from relay.message import RelayMessage
from tests.contract.evidence import BOUND_S, PAUSE_S
from tests.contract.surroundings import backend_context
from tests.servers.proxy import TcpProxy
from tests.servers.sqs import SqsServer


def sink_of(
    url: str, *, ordering: str | None = None, namespace: str = "", **keys: object
) -> SqsSink:
    """A sink to this queue, not connected."""
    return SqsSink.from_options(
        {"type": "sqs", "queue_url": url, **keys},
        backend_context(ordering=ordering, dedup_namespace=namespace),
    )


def source_of(
    url: str, *, batch_size: int = 100, batch_bytes: int = 1024 * 1024, **keys: object
) -> SqsSource:
    """A source on this queue, not connected."""
    return SqsSource.from_options(
        {"type": "sqs", "queue_url": url, "wait_time_seconds": 1, **keys},
        backend_context(direction="reverse", batch_size=batch_size, batch_bytes=batch_bytes),
    )


class Broker:
    """One queue, looked at over a client of its own.

    A queue can only be looked at by taking messages out, so those that were seen are kept here.
    """

    def __init__(self, server: SqsServer, client: object, url: str) -> None:
        self.server = server
        self.url = url
        self._client = client
        self._seen: list[Received] = []

    @property
    def keys(self) -> dict[str, Any]:
        """What a sink or source needs besides the queue's address, to be passed on as keywords."""
        return {"region": self.server.region, **self.server.keys}

    @property
    def is_fifo(self) -> bool:
        return self.url.endswith(".fifo")

    def through(self, proxy: TcpProxy) -> str:
        """The queue's address that leads through a proxy."""
        return proxy.url(self.url)

    async def ask(self, action: str, **arguments: object) -> Mapping[str, object]:
        """The answer to any call about this queue. Raises what the client library raises."""
        answer: Mapping[str, object] = await getattr(self._client, action)(
            QueueUrl=self.url, **arguments
        )
        return answer

    async def attribute(self, name: str) -> str:
        """One attribute of the queue."""
        answer = await self.ask("get_queue_attributes", AttributeNames=[name])
        attributes = answer["Attributes"]
        assert isinstance(attributes, dict)
        return str(attributes[name])

    async def until_attribute(self, name: str, value: str) -> None:
        """Wait until an attribute is that: counts are approximate, and follow after a moment.

        Raises TimeoutError after `BOUND_S`.
        """
        async with asyncio.timeout(BOUND_S):
            while True:
                if await self.attribute(name) == value:
                    return
                await asyncio.sleep(PAUSE_S)

    async def take(self) -> Sequence[Received]:
        """All messages that were ever seen, in the queue's order; takes out what is there."""
        while True:
            answer = await self.ask(
                "receive_message",
                MaxNumberOfMessages=10,
                WaitTimeSeconds=0,
                MessageAttributeNames=["All"],
                MessageSystemAttributeNames=["All"],
            )
            found = answer.get("Messages", [])
            assert isinstance(found, list)
            if not found:
                return self._seen
            self._seen.extend(found)
            entries = [
                {"Id": str(number), "ReceiptHandle": one["ReceiptHandle"]}
                for number, one in enumerate(found)
            ]
            await self.ask("delete_message_batch", Entries=entries)

    async def restored(self) -> list[RelayMessage]:
        """All messages as a consumer of ours gets them; broken ones by what they say."""
        ones = [decoded(received, "orders.insert") for received in await self.take()]
        return [one.message if isinstance(one, Rejected) else one for one in ones]

    async def put(
        self,
        *bodies: str,
        attributes: Mapping[str, str] | None = None,
        group: str | None = None,
        dedup_id: str | None = None,
    ) -> None:
        """Send these as somebody else would, in order."""
        for body in bodies:
            arguments: dict[str, object] = {"MessageBody": body}
            if attributes:
                arguments["MessageAttributes"] = {
                    name: {"DataType": "String", "StringValue": text}
                    for name, text in attributes.items()
                }
            if group is not None:
                arguments["MessageGroupId"] = group
            if dedup_id is not None:
                arguments["MessageDeduplicationId"] = dedup_id
            await self.ask("send_message", **arguments)

    async def feed(self, messages: Sequence[RelayMessage], format_: str = "envelope") -> None:
        """Send messages of ours, in order."""
        make = entry_maker(format_)
        for start in range(0, len(messages), 10):
            entries: list[dict[str, object]] = []
            for number, message in enumerate(messages[start : start + 10]):
                entry = make(message)
                one: dict[str, object] = {
                    "Id": str(number),
                    "MessageBody": entry.body,
                    "MessageAttributes": entry.attributes,
                }
                if self.is_fifo:
                    one["MessageGroupId"] = group_id(message.key or "_")
                    one["MessageDeduplicationId"] = deduplication_id(message.dedup_key)
                entries.append(one)
            answer = await self.ask("send_message_batch", Entries=entries)
            assert not answer.get("Failed")


@asynccontextmanager
async def broker_of(
    server: SqsServer, *, is_fifo: bool = False, tls_ca: str | None = None, **attributes: str
) -> AsyncIterator[Broker]:
    """A queue of its own, removed at the end."""
    async with _client(server, tls_ca) as client:
        broker = Broker(server, client, await _make_queue(server, client, is_fifo, attributes))
        try:
            yield broker
        finally:
            # A test may have deleted it.
            with suppress(botocore.exceptions.ClientError):
                await broker.ask("delete_queue")


async def lasting_queue(server: SqsServer, *, tls_ca: str | None = None) -> str:
    """The address of a new FIFO queue, on a server that ends with the tests."""
    async with _client(server, tls_ca) as client:
        return await _make_queue(server, client, True, {})


async def let_in(server: SqsServer, queue: str) -> None:
    """Make this queue, and a user with a key who may use it, on a server that checks who calls."""
    async with httpx.AsyncClient(trust_env=False) as client:
        # So many calls are let through before credentials are checked again.
        await client.post(f"{server.url}/moto-api/reset-auth", content=b"4")
    session = aioboto3.Session(
        aws_access_key_id="any", aws_secret_access_key="any", region_name=server.region
    )
    statement = {"Effect": "Allow", "Action": "sqs:*", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    async with session.client("iam", endpoint_url=server.url) as iam:
        await iam.create_user(UserName=queue)
        await iam.create_access_key(UserName=queue)
        await iam.put_user_policy(UserName=queue, PolicyName="p", PolicyDocument=policy)
    async with session.client("sqs", endpoint_url=server.url) as sqs:
        await sqs.create_queue(QueueName=queue)


@asynccontextmanager
async def _client(server: SqsServer, tls_ca: str | None) -> AsyncIterator[object]:
    library = AioSession()
    library.register_component("data_loader", _loader())
    session = aioboto3.Session(
        botocore_session=library,
        aws_access_key_id=server.keys["access_key_id"],
        aws_secret_access_key=server.keys["secret_access_key"],
        region_name=server.region,
    )
    config = AioConfig(parameter_validation=False)
    async with session.client(
        "sqs", endpoint_url=server.url, verify=tls_ca, config=config
    ) as client:
        yield client


async def _make_queue(
    server: SqsServer,
    client: object,
    is_fifo: bool,
    attributes: Mapping[str, str],
) -> str:
    name = f"relay-{uuid.uuid4().hex}"
    if is_fifo:
        name, attributes = f"{name}.fifo", {"FifoQueue": "true", **attributes}
    made = await getattr(client, "create_queue")(QueueName=name, Attributes=attributes)  # noqa: B009 - the client has no types
    # A server behind a proxy or in a container may not know its own address.
    return f"{server.url}{urlsplit(made['QueueUrl']).path}"


class SqsHarness:
    """What both harnesses can do to an SQS server, which is reached through a proxy."""

    def __init__(self, broker: Broker, proxy: TcpProxy) -> None:
        self.broker = broker
        self.proxy = proxy

    @property
    def url(self) -> str:
        """The address that leads through the proxy."""
        return self.broker.through(self.proxy)

    async def cut(self) -> None:
        await self.proxy.cut()

    async def stall(self) -> None:
        self.proxy.stall()

    async def restore(self) -> None:
        await self.proxy.restore()

    async def restart(self) -> None:
        # The server has its queues in memory: one that keeps them goes and comes back like this.
        await self.proxy.cut()
        await self.proxy.restore()

    def mapping(self) -> AbstractContextManager[object]:
        return mapped("testing")

    def exceptions(self) -> Iterable[BaseException]:
        yield from driver_exceptions()


def driver_exceptions() -> Iterable[Exception]:
    """One instance of every exception class of the client library, TLS and the network."""
    for _, member in inspect.getmembers(botocore.exceptions, inspect.isclass):
        if issubclass(member, botocore.exceptions.BotoCoreError):
            yield _instance(member)
    yield client_error("Whatever", "nobody knows")
    yield from (TimeoutError(), ConnectionResetError(), OSError("no route"), EOFError())
    yield from (ssl.SSLError(1, "broken"), ssl.SSLCertVerificationError(1, "unknown"))
    yield socket.gaierror(-2, "Name or service not known")


def client_error(
    code: str, message: str = "", status: int = 400
) -> botocore.exceptions.ClientError:
    """What the client library raises for an answer that is an error."""
    return botocore.exceptions.ClientError(
        {
            "Error": {"Code": code, "Message": message},
            "ResponseMetadata": {"HTTPStatusCode": status},
        },
        "SendMessageBatch",
    )


def _instance(kind: type[botocore.exceptions.BotoCoreError]) -> Exception:
    """Their texts are templates; each gets a word for every name in it."""
    names: dict[str, object] = {}
    if kind is botocore.exceptions.WaiterError:
        names = {"name": "a", "reason": "b", "last_response": {}}
    for _ in range(20):
        try:
            return kind(**names)
        except KeyError as missing:
            names[str(missing.args[0])] = "something"
    raise AssertionError(f"{kind} can't be made")
