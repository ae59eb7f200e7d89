"""What is known of a pipeline's shape when it is set."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

SET = "select pgtrickle.set_relay_outbox('p', %s::jsonb)"


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run("create table public.people (id int primary key, email text, note text)")
        opened.run("select pgtrickle.enable_outbox('public.people')")
        opened.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        yield opened


def people(outbox: str = "people", sink: object = None, **keys: object) -> str:
    return json.dumps({"source": {"outbox": outbox}, "sink": sink or {"type": "stdout"}, **keys})


def test_a_sound_shape_is_taken(db: Session) -> None:
    hashed = {"email": {"hash": "${env:RELAY_PEPPER}"}, "note": {"keep_last": 4}}
    for keys in (
        {"ops": ["insert", "delete"], "where": "payload.id > 1", "exclude": ["email"]},
        {"select": ["id", "note"], "rename": {"note": "remark"}, "mask": {"note": "redact"}},
        {"mask": hashed, "rename": {"id": "person_id"}},
        {"ops": ["update"], "collapse_updates": True},
        {"exclude": None, "mask": None, "rename": None, "select": None, "ops": None},
    ):
        db.run(SET, people(**keys))
    # Nothing is known of the columns of what an application publishes itself.
    db.run(SET, people("events", exclude=["whatever"]))
    template = {"type": "stdout", "subject_template": "{{payload.email}}.{payload.remark}"}
    db.run(SET, people(sink=template, exclude=["email"], rename={"note": "remark"}))
    db.run(
        "select pgtrickle.set_relay_inbox('in', %s::jsonb)",
        json.dumps({"source": {"type": "stdin"}, "sink": {"inbox": "i"}, "exclude": ["secret"]}),
    )


def test_what_can_not_be_right_is_refused_with_the_reason(db: Session) -> None:
    template = {"type": "stdout", "subject_template": "people.{payload.email.domain}"}
    for config, code, message, hint in (
        (people(exclude=["emails"]), "RL010", 'exclude names the column "emails"', 'mean "email"'),
        (people(mask={"nope": "redact"}), "RL010", "mask names the column", ""),
        (people(exclude=["id"]), "RL010", 'key needs the column "id", which exclude leaves', ""),
        (people(mask={"id": "redact"}), "RL010", "which mask changes", ""),
        (people(select=["email"]), "RL010", "which select does not list", ""),
        (people(exclude=["email"], key_columns=["email"]), "RL010", 'key needs the column "em', ""),
        (people(sink=template, mask={"email": "redact"}), "RL010", "a template of the sink", ""),
        (people(ops=["update"]), "RL010", "needs collapse_updates", ""),
        (people(ops=["merge"]), "RL010", "ops is 'merge'", "insert or update"),
        (people(ops="insert"), "RL010", "ops is a text that does not fit", "a list"),
        (people(select=["id"], exclude=["note"]), "RL010", "both select and exclude", ""),
        (people(mask={"note": "hide"}), "RL010", "mask.note is 'hide'", "redact"),
        (people(mask={"note": {"keep": 4}}), "RL010", "mask.note.keep", "hash or keep_last"),
        (people(mask={"note": {"keep_last": 0}}), "RL010", "mask.note.keep_last is 0", "from 1"),
        (people(mask={"note": {}}), "RL010", "not exactly one of", ""),
        (people(mask={"note": {"hash": "pepper"}}), "RL013", "mask.note.hash holds a secret", ""),
    ):
        with db.refused(code) as said:
            db.run(SET, config)
        assert message in said.message_primary, (config, said)
        assert hint in said.message_hint, (config, said)
        assert "pepper" not in said.message_primary + said.message_hint
    with db.refused("RL010") as said:
        db.run(
            "select pgtrickle.set_relay_inbox('in', %s::jsonb)",
            json.dumps(
                {
                    "source": {"type": "stdin"},
                    "sink": {"inbox": "i"},
                    "dedup_key_from": "payload:id.x",
                    "exclude": ["id"],
                }
            ),
        )
    assert 'dedup_key_from needs the column "id"' in said.message_primary
