"""Fixtures of the RabbitMQ node."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers.finding import ServerLedger, ServerMissing, leave_out
from tests.servers.rabbitmq import RabbitServer, find_rabbitmq


@pytest.fixture(scope="session")
def rabbitmq_server(server_ledger: ServerLedger) -> Iterator[RabbitServer]:
    """A RabbitMQ node with a plain and a TLS listener, shared by the session.

    It takes many seconds to start, so there is only the one. A test uses queues and exchanges of
    its own; one that stops the node starts it again.
    """
    try:
        server = find_rabbitmq()
    except ServerMissing as missing:
        server_ledger.missing["rabbitmq"] = str(missing)
        leave_out(f"rabbitmq: {missing}")
    server_ledger.found["rabbitmq"] = f"RabbitMQ {server.version} ({server.origin})"
    yield server
    server.control.close()
