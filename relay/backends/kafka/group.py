"""Membership of a consumer group, by the group protocol that every Kafka client speaks.

Join, be given partitions, show signs of life, join again when others come or go
(https://kafka.apache.org/protocol.html#The_Messages_JoinGroup). Which partitions a member gets is
decided by one of the members, with the rules ``range`` or ``roundrobin``.

A member with an instance name is *static*: whoever joins under the name takes the place of the one
before, with its partitions and at once, and the one before is shut out (KIP-345).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocol
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.group import (
    HeartbeatRequest,
    JoinGroupRequest,
    LeaveGroupRequest,
    SyncGroupRequest,
)

from relay.backends.kafka.cluster import GROUP_LANE, Cluster
from relay.backends.kafka.errors import (
    MEMBER_ID_REQUIRED,
    REBALANCE_IN_PROGRESS,
    UNKNOWN_MEMBER_ID,
    of_code,
)
from relay.errors import Outage, OwnershipLost, RelayError

Partition = tuple[str, int]

_ASSIGNORS = {one.name: one for one in (RangePartitionAssignor, RoundRobinPartitionAssignor)}
_COORDINATOR_OF_GROUPS = 0
_NO_ASSIGNMENT: Sequence[tuple[str, bytes]] = ()
_DEFAULT_RETENTION = -1
_NEVER_COMMITTED = -1
_LEAVE_TIMEOUT_S = 2.0
# What an answer may take on top of what the broker itself waits for.
_MARGIN_S = 5.0


class Rebalancing(Exception):
    """The group is about to share its partitions anew: join again."""


class Member:
    """Our place in one group. ``generation`` numbers the rounds of sharing."""

    def __init__(
        self,
        group: str,
        topics: Sequence[str],
        *,
        instance: str | None,
        session_timeout_ms: int,
        rebalance_timeout_ms: int,
    ) -> None:
        self._group = group
        self._topics = topics
        self._instance = instance
        self._session_timeout_ms = session_timeout_ms
        self._rebalance_timeout_ms = rebalance_timeout_ms
        self._id = ""
        self._coordinator = -1
        self.generation = -1

    @property
    def group(self) -> str:
        """The group's name."""
        return self._group

    async def find_coordinator(self, cluster: Cluster) -> None:
        """Find the broker that keeps the group. Raises `Outage`, `AuthenticationRefused`."""
        doing = f"finding the coordinator of the group {self._group!r}"
        answer = await cluster.ask_any(
            FindCoordinatorRequest(self._group, _COORDINATOR_OF_GROUPS), doing
        )
        if answer.error_code:
            raise of_code(answer.error_code, doing)
        self._coordinator = answer.coordinator_id

    async def join(self, cluster: Cluster) -> Sequence[Partition]:
        """Become a member, or stay one in the next round; the partitions that are ours.

        Waits until all others have joined too. Raises `Rebalancing` where yet another round has
        begun meanwhile, or has to, `Outage`, `ConfigurationError`.
        """
        may_take_over = self._instance is not None and not self._id
        answer = await self._join(cluster)
        self.generation, self._id = answer.generation_id, answer.member_id
        assignment = _NO_ASSIGNMENT
        if answer.leader_id == answer.member_id and answer.members:
            assignment = await _assigned(cluster, answer)
        synced = await self._ask(
            cluster,
            SyncGroupRequest(
                self._group, self.generation, self._id, self._instance, list(assignment)
            ),
            f"being given partitions in the group {self._group!r}",
            self._rebalance_timeout_ms / 1000 + _MARGIN_S,
        )
        if synced.error_code == REBALANCE_IN_PROGRESS:
            raise Rebalancing
        if synced.error_code:
            raise self._trouble(synced.error_code, f"joining the group {self._group!r}")
        partitions = _given(synced.member_assignment)
        is_leader = answer.leader_id == answer.member_id
        if may_take_over and not is_leader and not self._has_all(cluster, partitions):
            # Who takes the place of the one that shares is not told so, and partitions that came
            # meanwhile would stay nobody's. When that one joins again, all are shared anew.
            raise Rebalancing
        return partitions

    async def show_sign_of_life(self, cluster: Cluster) -> None:
        """Tell that we are there. Raises `Rebalancing`, `OwnershipLost`, `Outage`."""
        doing = f"showing a sign of life to the group {self._group!r}"
        request = HeartbeatRequest(self._group, self.generation, self._id)
        answer = await self._ask(cluster, request, doing)
        if answer.error_code == REBALANCE_IN_PROGRESS:
            raise Rebalancing
        if answer.error_code:
            raise self._trouble(answer.error_code, doing)

    async def committed(
        self, cluster: Cluster, partitions: Sequence[Partition]
    ) -> Mapping[Partition, int]:
        """Where the group goes on; without the partitions of which it has read nothing."""
        doing = f"asking where the group {self._group!r} goes on"
        request = OffsetFetchRequest(self._group, _by_topic({one: one[1] for one in partitions}))
        answer = await self._ask(cluster, request, doing)
        if code := getattr(answer, "error_code", 0):
            raise self._trouble(code, doing)
        found: dict[Partition, int] = {}
        for topic, numbers in answer.topics:
            for number, offset, _, code in numbers:
                if code:
                    raise self._trouble(code, doing)
                if offset > _NEVER_COMMITTED:
                    found[topic, number] = offset
        return found

    async def commit(self, cluster: Cluster, offsets: Mapping[Partition, int]) -> None:
        """Make it durable that the group goes on there. Raises `OwnershipLost`, `Outage`."""
        doing = f"committing offsets of the group {self._group!r}"
        topics = _by_topic({one: (one[1], offset, "") for one, offset in offsets.items()})
        request = OffsetCommitRequest(
            self._group, self.generation, self._id, _DEFAULT_RETENTION, topics
        )
        answer = await self._ask(cluster, request, doing)
        codes = [code for _, numbers in answer.topics for _, code in numbers if code]
        if codes:
            raise self._trouble(codes[0], doing)

    async def leave(self, cluster: Cluster) -> None:
        """Let go, so that others have our partitions at once; never raises."""
        if not self._id or cluster.is_lost(self._coordinator, GROUP_LANE):
            return
        member, self._id, self.generation = self._id, "", -1
        try:
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                await self._ask(cluster, LeaveGroupRequest(self._group, member), "leaving")
        except (RelayError, TimeoutError):
            # They come to it when the session is over.
            pass

    def _has_all(self, cluster: Cluster, partitions: Sequence[Partition]) -> bool:
        return len(partitions) >= sum(map(cluster.partitions_of, self._topics))

    async def _join(self, cluster: Cluster) -> Any:  # the answer's type goes with the request's
        doing = f"joining the group {self._group!r}"
        for _ in range(3):
            request = JoinGroupRequest(
                self._group,
                self._session_timeout_ms,
                self._rebalance_timeout_ms,
                self._id,
                self._instance,
                ConsumerProtocol.PROTOCOL_TYPE,
                [
                    (name, assignor.metadata(self._topics).encode())
                    for name, assignor in _ASSIGNORS.items()
                ],
            )
            # Members that were killed are waited for until their session is over.
            wait_s = max(self._rebalance_timeout_ms, self._session_timeout_ms) / 1000 + _MARGIN_S
            answer = await self._ask(cluster, request, doing, wait_s)
            if answer.error_code == MEMBER_ID_REQUIRED:
                self._id = answer.member_id
            elif answer.error_code == UNKNOWN_MEMBER_ID and self._id:
                # The group has forgotten whom we were.
                self._id = ""
            elif answer.error_code:
                raise self._trouble(answer.error_code, doing)
            else:
                return answer
        raise Outage(f"{doing}: it does not know us")

    def _trouble(self, code: int, doing: str) -> RelayError:
        error = of_code(code, doing)
        if isinstance(error, OwnershipLost) and code != REBALANCE_IN_PROGRESS:
            self._id = ""
        return error

    async def _ask(
        self, cluster: Cluster, request: object, doing: str, timeout_s: float | None = None
    ) -> Any:  # as above
        return await cluster.ask(
            self._coordinator, request, doing, lane=GROUP_LANE, timeout_s=timeout_s
        )


async def _assigned(cluster: Cluster, joined: Any) -> Sequence[tuple[str, bytes]]:
    """Share the partitions among all members, by the rule that the group has agreed on."""
    members = {
        # From the fifth version on an instance name stands in between.
        member[0]: ConsumerProtocol.METADATA.decode(member[-1])
        for member in joined.members
    }
    topics = {topic for member in members.values() for topic in member.subscription}
    await cluster.learn(topics, anew=True)
    assigned = _ASSIGNORS[joined.group_protocol].assign(_Partitions(cluster), members)
    return [(member, one.encode()) for member, one in assigned.items()]


class _Partitions:
    """What the library's rules ask of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def partitions_for_topic(self, topic: str) -> set[int]:
        """The numbers of a topic's partitions."""
        return set(range(self._cluster.partitions_of(topic)))


def _given(assignment: bytes) -> Sequence[Partition]:
    if not assignment:
        return ()
    given = ConsumerProtocol.ASSIGNMENT.decode(assignment)
    return [(topic, number) for topic, numbers in given.assignment for number in numbers]


def _by_topic(of_partitions: Mapping[Partition, Any]) -> list[tuple[str, list[Any]]]:
    """As requests want it: by topic what belongs to each partition."""
    topics: dict[str, list[Any]] = {}
    for (topic, _), item in of_partitions.items():
        topics.setdefault(topic, []).append(item)
    return list(topics.items())
