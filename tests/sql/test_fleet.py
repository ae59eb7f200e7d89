"""What relays report about themselves."""

from __future__ import annotations

from tests.servers.postgres import Database
from tests.sql.outbox_session import session


def test_a_relay_is_alive_while_it_reports_and_gone_when_it_retires(
    any_migrated_database: Database,
) -> None:
    with session(any_migrated_database.dsn) as db:
        for worker in ("one", "two"):
            db.run(
                "select pgtrickle.relay_report('default', %s, %s::jsonb)",
                worker,
                '{"host": "h", "pid": 12, "version": "0.29.0", "pipelines": []}',
            )
        db.run(
            "update pgtrickle.relay_workers set last_seen_at = now() - interval '20 seconds'"
            " where worker_id = 'two'"
        )

        fleet = db.rows(
            "select relay_group_id, worker_id, host, pid, version, is_alive"
            " from pgtrickle.relay_fleet()"
        )
        db.run("select pgtrickle.relay_retire('default', 'one')")

        assert fleet == [
            ("default", "one", "h", 12, "0.29.0", True),
            ("default", "two", "h", 12, "0.29.0", False),
        ]
        assert db.rows("select worker_id from pgtrickle.relay_fleet('default')") == [("two",)]
        assert db.rows("select worker_id from pgtrickle.relay_fleet('blue')") == []


def test_a_report_without_the_usual_fields_is_kept_too(any_migrated_database: Database) -> None:
    with session(any_migrated_database.dsn) as db:
        db.run("""select pgtrickle.relay_report('default', 'odd', '{"pid": "many"}')""")

        assert db.rows("select pid, report from pgtrickle.relay_fleet()") == [
            (None, {"pid": "many"})
        ]


def test_the_catalog_names_its_version(any_migrated_database: Database) -> None:
    with session(any_migrated_database.dsn) as db:
        assert db.value("select pgtrickle.relay_schema_version()") == "0.29.0"
