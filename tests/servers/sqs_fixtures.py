"""Fixtures of the SQS servers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack

import pytest

from tests.servers.finding import ServerLedger, ServerMissing, leave_out
from tests.servers.sqs import SqsServer, configured_sqs, find_sqs
from tests.servers.tls import TlsFiles


@pytest.fixture(scope="session")
def sqs_server(server_ledger: ServerLedger) -> Iterator[SqsServer]:
    """An SQS server, shared by the session. A test uses a queue of its own."""
    try:
        server = find_sqs()
    except ServerMissing as missing:
        server_ledger.missing["sqs"] = str(missing)
        leave_out(f"sqs: {missing}")
    server_ledger.found["sqs"] = f"SQS of {server.version} ({server.origin})"
    yield server
    server.control.close()


@pytest.fixture(scope="session")
def sqs_server_with() -> Iterator[Callable[..., SqsServer]]:
    """A factory of SQS servers of their own, for TLS and for credentials that are checked.

    `sqs_server_with(environment={}, tls=None)`; the same arguments give the same server.
    """
    with ExitStack() as servers:
        started: dict[object, SqsServer] = {}

        def start(
            environment: Mapping[str, str] | None = None, tls: TlsFiles | None = None
        ) -> SqsServer:
            which = (tuple(sorted((environment or {}).items())), tls)
            if which not in started:
                try:
                    started[which] = configured_sqs(environment, tls)
                except ServerMissing as missing:
                    leave_out(f"sqs: {missing}")
                servers.callback(started[which].control.close)
            return started[which]

        yield start
