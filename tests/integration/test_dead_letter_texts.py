"""Dead letters in the catalog: whatever text a message has, it can be kept."""

from __future__ import annotations

import msgspec
import pytest

from relay.catalog import Catalog, DeadLetter
from relay.message import RelayMessage
from relay.postgres import Database
from relay.settings import PostgresSettings
from tests.servers.postgres import Database as ServerDatabase


@pytest.mark.parametrize(
    "text, kept",
    [("a\x00b", "a\\u0000b"), ("a\ud800b", "a\\ud800b")],
    ids=["NUL", "lone surrogate"],
)
@pytest.mark.parametrize(
    "field", ["dedup_key", "key", "subject", "stream_table", "refresh_id", "headers"]
)
async def test_a_text_that_postgresql_can_not_hold_keeps_no_message_from_the_dead_letters(
    field: str, text: str, kept: str, migrated_database: ServerDatabase
) -> None:
    database = Database(PostgresSettings(url=migrated_database.dsn))
    await database.open()
    catalog = Catalog(database, "default")
    letters = [_letter(_message("sound")), _letter(_message("odd", field, text))]

    ids = await catalog.dead_letter("p", "reverse", letters)

    await catalog.put_back(ids)
    taken = [one.message for one in await catalog.take_dead_letters("p", 10)]
    assert taken == [_message("sound"), _message("odd", field, kept)]
    await database.aclose()


def _message(dedup_key: str, field: str = "subject", text: str = "") -> RelayMessage:
    message = RelayMessage(dedup_key=dedup_key, payload=b"{}")
    value = {text: text} if field == "headers" else text
    return msgspec.structs.replace(message, **{field: value})


def _letter(message: RelayMessage) -> DeadLetter:
    return DeadLetter(
        message=message, is_transformed=True, error_kind="message", error="no", attempts=1
    )
