"""Dead letters in the catalog: whatever text a message has, it can be kept."""

from __future__ import annotations

import msgspec
import pytest

from relay.catalog import Catalog, DeadLetter
from relay.message import RelayMessage
from relay.postgres import Database
from relay.settings import PostgresSettings
from tests.servers.postgres import Database as ServerDatabase
from tests.servers.postgres import PostgresServer


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


@pytest.mark.parametrize("encoding", ["LATIN1", "WIN1252", "SQL_ASCII"])
async def test_what_the_databases_encoding_lacks_is_stored_and_sent_again_as_it_was(
    any_postgres_server: PostgresServer, encoding: str
) -> None:
    texts = {"日本": "価格 €", "plain": "café", "\\u65e5\\u672c": "a \\ b"}
    with any_postgres_server.encoded_database(encoding) as created:
        database = Database(PostgresSettings(url=created.dsn))
        await database.open()
        catalog = Catalog(database, "default")
        messages = [
            RelayMessage(
                dedup_key=key,
                key=text,
                subject=text,
                stream_table=key,
                headers={key: text},
                payload=text.encode(),
            )
            for key, text in texts.items()
        ]

        ids = await catalog.dead_letter(
            "p", "forward", [_letter(message, f"no {message.key}") for message in messages]
        )
        await catalog.put_back(ids)
        taken = await catalog.take_dead_letters("p", 10)
        await catalog.fail_dead_letters(taken, ["still no 日本"] * len(taken))
        await catalog.report("w", '{"host": "h", "error": "no 日本 \\" €"}'.encode())
        row = await database.fetch_row("looking", "select report from pgtrickle.relay_fleet()")
        await database.aclose()

    assert len(set(ids)) == len(texts), "no two keys become one"
    assert [one.message for one in taken] == messages
    assert row is not None
    assert msgspec.json.decode(row["report"])["error"].startswith('no &#26085;&#26412; " ')


def _message(dedup_key: str, field: str = "subject", text: str = "") -> RelayMessage:
    message = RelayMessage(dedup_key=dedup_key, payload=b"{}")
    value = {text: text} if field == "headers" else text
    return msgspec.structs.replace(message, **{field: value})


def _letter(message: RelayMessage, error: str = "no") -> DeadLetter:
    return DeadLetter(
        message=message, is_transformed=True, error_kind="message", error=error, attempts=1
    )
