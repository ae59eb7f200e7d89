"""Where the databases of the tests of SQL and of attacks have their catalog."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.sql.outbox_session import ODD_SCHEMA


@pytest.fixture(autouse=True)
def schema_of_the_catalog(request: pytest.FixtureRequest) -> Iterator[None]:
    """The newest PostgreSQL has the catalog in its default schema, the oldest in `ODD_SCHEMA`.

    So what runs on both runs in both. `PGTRICKLE_TEST_SCHEMA=odd` turns it round.
    """
    if "any_postgres_server" not in request.fixturenames:
        yield
        return
    server = request.getfixturevalue("any_postgres_server")
    usual = server.schema
    is_oldest = request.node.callspec.params["any_postgres_server"] == "oldest"
    if is_oldest is not (os.environ.get("PGTRICKLE_TEST_SCHEMA") == "odd"):
        server.schema = ODD_SCHEMA
    yield
    server.schema = usual
