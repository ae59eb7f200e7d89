"""One queue, over the client library: its calls, with bounded time and errors of the relay's own.

The library's own retries are switched off: the loop decides what is repeated, and in which order.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import cast

import aioboto3
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore.exceptions import ClientError
from botocore.loaders import Loader, create_loader

from relay.backends.sqs.entry import Received
from relay.backends.sqs.errors import code_of, mapped
from relay.backends.sqs.options import MOST_BYTES, SqsConnectionOptions, Target, target_of
from relay.errors import ConfigurationError, RelayError
from relay.tls import context_of

MOST_MESSAGES = 10

# The limit of older servers and, until August 2025, of SQS itself.
_CLASSIC_BYTES = 256 * 1024
_HEALTH_TIMEOUT_S = 2.0
_CLOSE_TIMEOUT_S = 2.0
# Calls beside those in flight: looks at the queue, and keeping batches alive.
_SPARE_CONNECTIONS = 4
_DEPTH = ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible")

Answer = Mapping[str, object]
Refused = Sequence[Mapping[str, object]]


class Queue:
    """An open queue. Safe to use from several tasks at a time."""

    def __init__(self, client: object, closing: AsyncExitStack, target: Target, timeout_s: float):
        self._client = client
        self._closing = closing
        self._timeout_s = timeout_s
        self.target = target
        self.message_bytes = MOST_BYTES
        self.is_dedup_by_group = False

    @property
    def name(self) -> str:
        """The queue's name."""
        return self.target.name

    @property
    def batch_bytes(self) -> int:
        """How many bytes one call may send."""
        return max(_CLASSIC_BYTES, self.message_bytes)

    async def learn(self) -> None:
        """Ask for the queue's limits. Raises `DestinationMissing` and what else keeps us off."""
        try:
            attributes = await self._attributes(f"asking for the queue {self._where}")
        except _NotPermitted:
            # Who may do little may still be all that is needed.
            return
        limit = attributes.get("MaximumMessageSize", "")
        if limit.isdecimal():
            self.message_bytes = min(int(limit), MOST_BYTES)
        self.is_dedup_by_group = attributes.get("DeduplicationScope") == "messageGroup"

    async def send(self, entries: Sequence[Mapping[str, object]]) -> Answer:
        """Send at most ten; what was accepted and what was not is in the answer.

        Raises a `MessageRejected` where the call as a whole is refused for what it contains.
        """
        doing = f"sending to the queue {self._where}"
        return await self._ask(doing, "send_message_batch", is_publish=True, Entries=entries)

    async def receive(self, *, wait_s: int, visibility_s: int) -> Sequence[Received]:
        """At most ten messages, which are hidden from others for that time."""
        answer = await self._ask(
            f"receiving from the queue {self._where}",
            "receive_message",
            wait_s=wait_s,
            MaxNumberOfMessages=MOST_MESSAGES,
            WaitTimeSeconds=wait_s,
            VisibilityTimeout=visibility_s,
            MessageAttributeNames=["All"],
            MessageSystemAttributeNames=["All"],
        )
        return cast("Sequence[Received]", answer.get("Messages", ()))

    async def delete(self, handles: Sequence[str]) -> Refused:
        """Delete at most ten; those that were not deleted."""
        return await self._settle(
            f"deleting from the queue {self._where}", "delete_message_batch", handles
        )

    async def hide(self, handles: Sequence[str], visibility_s: int) -> Refused:
        """Hide at most ten for so long from now, 0 to show them at once; those that can't be."""
        return await self._settle(
            f"keeping messages of the queue {self._where}",
            "change_message_visibility_batch",
            handles,
            VisibilityTimeout=visibility_s,
        )

    async def depth(self) -> int | None:
        """How many messages it holds, hidden ones included; None where it may not be asked."""
        try:
            attributes = await self._attributes(f"asking for the queue {self._where}")
        except _NotPermitted:
            return None
        return sum(int(attributes.get(name, 0)) for name in _DEPTH)

    async def is_healthy(self) -> bool:
        """True when the queue answers now."""
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await self._attributes("looking at the queue")
        except _NotPermitted:
            return True
        except (RelayError, TimeoutError):
            return False
        return True

    async def aclose(self) -> None:
        """Close the connections; never raises, and takes no longer than the bound."""
        try:
            async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                await self._closing.aclose()
        except Exception:  # noqa: BLE001, S110 - whatever the library meets, it is closed
            pass

    @property
    def _where(self) -> str:
        return f"{self.target.name} at {self.target.host}"

    async def _attributes(self, doing: str) -> Mapping[str, str]:
        answer = await self._ask(doing, "get_queue_attributes", AttributeNames=["All"])
        return cast("Mapping[str, str]", answer.get("Attributes", {}))

    async def _settle(
        self, doing: str, action: str, handles: Sequence[str], **rest: object
    ) -> Refused:
        entries = [
            {"Id": str(number), "ReceiptHandle": handle, **rest}
            for number, handle in enumerate(handles)
        ]
        answer = await self._ask(doing, action, Entries=entries)
        return cast("Refused", answer.get("Failed", ()))

    async def _ask(
        self,
        doing: str,
        action: str,
        *,
        wait_s: float = 0.0,
        is_publish: bool = False,
        **arguments: object,
    ) -> Answer:
        with mapped(doing, is_publish=is_publish):
            async with asyncio.timeout(self._timeout_s + wait_s):
                try:
                    answer: Answer = await getattr(self._client, action)(
                        QueueUrl=self.target.queue_url, **arguments
                    )
                except ClientError as error:
                    is_denied = code_of(error).startswith("AccessDenied")
                    if is_denied and action == "get_queue_attributes":
                        raise _NotPermitted from error
                    raise
        return answer


class _NotPermitted(Exception):
    """The queue knows who we are, but does not show us its attributes."""


async def open_queue(options: SqsConnectionOptions, *, path: str, wait_s: float = 0.0) -> Queue:
    """Open a queue and learn its limits. ``wait_s``: how long an answer may take by design.

    Raises `Outage`, `AuthenticationRefused`, `DestinationMissing` or `ConfigurationError`.
    """
    target = target_of(options, path)
    # The library reads the files itself, and says less of what is wrong with them.
    context_of(options, path)
    timeout_s = options.timeout_ms / 1000
    closing = AsyncExitStack()
    queue = Queue(None, closing, target, timeout_s)
    try:
        with mapped(f"connecting to {target.host}"):
            async with asyncio.timeout(timeout_s):
                client = await closing.enter_async_context(
                    _client(options, target, path, timeout_s + wait_s)
                )
        queue = Queue(client, closing, target, timeout_s)
        await queue.learn()
    except BaseException:
        await queue.aclose()
        raise
    return queue


def _client(
    options: SqsConnectionOptions, target: Target, path: str, timeout_s: float
) -> aioboto3.session.ClientCreatorContext:
    library = AioSession()
    library.register_component("data_loader", _loader())
    session = aioboto3.Session(
        botocore_session=library,
        aws_access_key_id=options.access_key_id,
        aws_secret_access_key=options.secret_access_key,
        aws_session_token=options.session_token,
        region_name=target.region,
    )
    if session.region_name is None:
        raise ConfigurationError(f"{path}.region is missing", remedy="for example eu-central-1")
    certificate = None if options.tls_cert is None else (options.tls_cert, options.tls_key)
    return session.client(
        "sqs",
        endpoint_url=target.endpoint_url,
        verify=False if options.tls_insecure else options.tls_ca,
        config=AioConfig(
            connect_timeout=timeout_s,
            read_timeout=timeout_s,
            retries={"total_max_attempts": 1, "mode": "standard"},
            max_pool_connections=options.max_in_flight + _SPARE_CONNECTIONS,
            # What is sent is made here; checking it again costs as much as signing it.
            parameter_validation=False,
            client_cert=certificate,
            user_agent_extra="pgtrickle-relay",
        ),
    )


@functools.cache
def _loader() -> Loader:
    """The library's descriptions of the service, read once: that takes a quarter of a second."""
    return create_loader()
