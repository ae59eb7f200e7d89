"""How a test server is found, and what the run says about it.

Every server is looked for in the same order: an address in the environment, Docker, a local
binary. What was found, and what was not, is kept in a `ServerLedger` that the terminal summary
prints. With `CI=true` a missing server is a failure; elsewhere its tests are left out by name.
"""

from __future__ import annotations

import functools
import gc
import os
import random
import socket
import sys
import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import docker
import pytest
from docker.errors import DockerException

LOOPBACK = "127.0.0.1"

# Linux hands out ports from 32768 on, others from 49152 on.
_PORTS = (20_000, 32_000)
_ATTEMPTS = 1000
# A claim is a file descriptor, of which a process has a few hundred.
_CLAIMS_KEPT = 100
_CLAIMS: deque[int] = deque()
# Not the one that a test seeds, so that two runs do not ask for the same ones in turn.
_RANDOM = random.SystemRandom()


class ServerMissing(Exception):
    """No address, no Docker and no binary for this server; the message says how to get one."""


class ServerControl(Protocol):
    """Starts and stops one server on an address that stays the same.

    All calls block until the server is ready or gone; from a coroutine use `asyncio.to_thread`.
    """

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class NotControllable:
    """The control of a server that somebody else runs: it is used, never stopped."""

    server: str

    def start(self) -> None:
        leave_out(f"{self.server} comes from the environment and cannot be started by a test")

    def stop(self) -> None:
        leave_out(f"{self.server} comes from the environment and cannot be stopped by a test")

    def kill(self) -> None:
        leave_out(f"{self.server} comes from the environment and cannot be killed by a test")

    def close(self) -> None:
        """Leave the server as it is."""


@dataclass
class ServerLedger:
    """Which server each backend was tested against, and which were missing."""

    found: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One line per server, for the terminal summary."""
        found = [f"{name}: {what}" for name, what in sorted(self.found.items())]
        missing = [f"{name}: LEFT OUT, {why}" for name, why in sorted(self.missing.items())]
        return found + missing


def is_ci(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a missing server must fail the run."""
    return environment.get("CI", "").lower() in {"1", "true", "yes"}


def leave_out(reason: str) -> NoReturn:
    """Skip the running test with its reason; with `CI=true` fail it instead."""
    if is_ci():
        pytest.fail(f"{reason} (CI=true: nothing may be left out)", pytrace=False)
    pytest.skip(reason)


def address_in_environment(name: str) -> str | None:
    """The value of `PGTRICKLE_TEST_<name>_URL`, or None when it is unset or empty."""
    return os.environ.get(f"PGTRICKLE_TEST_{name}_URL") or None


@functools.cache
def is_docker_running() -> bool:
    """Whether a Docker daemon answers; asked once per session."""
    with warnings.catch_warnings():
        # The client leaves the socket of a failed attempt to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        answer = _does_docker_answer()
        gc.collect()
    return answer


def _does_docker_answer() -> bool:
    try:
        client = docker.from_env(timeout=5)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except DockerException:
        return False


def warn_of_docker(image: str, failure: DockerException) -> None:
    """Say that a container did not start, before a local binary is taken instead."""
    print(f"{image} did not start in Docker, a local binary is used: {failure}", file=sys.stderr)


def free_port() -> int:
    """A TCP port on loopback where nobody listens, and that nobody else is given meanwhile.

    It is below those that the system hands out by itself, to either end of a connection: one of
    them may be taken between its choice and the start of the server that it is for. The claim on
    it is a UDP port of the same number, which other test runs on this machine respect.
    """
    for _ in range(_ATTEMPTS):
        port = _RANDOM.randrange(*_PORTS)
        with socket.socket() as probe, socket.socket(type=socket.SOCK_DGRAM) as claim:
            try:
                claim.bind((LOOPBACK, port))
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            _CLAIMS.append(claim.detach())
        if len(_CLAIMS) > _CLAIMS_KEPT:
            os.close(_CLAIMS.popleft())
        return port
    raise RuntimeError(f"no free port from {_PORTS[0]} to {_PORTS[1]}")
