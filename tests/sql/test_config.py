"""The catalog of pipelines: the seven functions, what they refuse and what they tell."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import psycopg
import pytest

from tests.servers.postgres import Database
from tests.sql.outbox_session import Session, session

FORWARD = "select pgtrickle.set_relay_outbox(%s, 'events', null, %s::jsonb)"
FORWARD_CONFIG = "select pgtrickle.set_relay_outbox('p', %s::jsonb)"
REVERSE = "select pgtrickle.set_relay_inbox(%s, 'received', %s::jsonb)"
STDOUT = '{"type": "stdout"}'
NATS_SOURCE = '{"type": "nats", "url": "nats://h:4222", "subject": "a.>"}'


@pytest.fixture
def db(any_migrated_database: Database) -> Iterator[Session]:
    with session(any_migrated_database.dsn) as opened:
        opened.run("select pgtrickle.enable_outbox('events', capture => 'none')")
        yield opened


def forward(**keys: object) -> str:
    return json.dumps({"source": {"outbox": "events"}, "sink": {"type": "stdout"}, **keys})


def nats(**keys: object) -> str:
    return json.dumps({"type": "nats", "url": "nats://h:4222", **keys})


def test_both_forms_store_the_same_kind_of_config(db: Session) -> None:
    db.run(FORWARD, "p", STDOUT)
    by_arguments = db.value("select pgtrickle.get_relay_config('p')")
    db.run(FORWARD_CONFIG, forward())

    assert db.value("select pgtrickle.get_relay_config('p')") == by_arguments
    assert by_arguments == {
        "config_version": 1,
        "source_type": "outbox",
        "source": {"outbox": "events", "outbox_table": "outbox_events"},
        "sink_type": "stdout",
        "sink": {"type": "stdout"},
    }


def test_plain_literals_find_their_form(db: Session) -> None:
    db.run(f"select pgtrickle.set_relay_outbox('a', 'events', null, '{STDOUT}')")
    db.run(f"select pgtrickle.set_relay_outbox('b', '{forward()}', false)")
    db.run(f"select pgtrickle.set_relay_inbox('c', 'received', '{NATS_SOURCE}')")
    db.run(
        f"""select pgtrickle.set_relay_inbox('d',
        '{{"source": {NATS_SOURCE}, "sink": {{"inbox": "received"}}}}')"""
    )
    with db.refused("RL010"):
        db.run("select pgtrickle.set_relay_inbox('e', 'received', 'no json')")

    assert db.rows("select name, direction, enabled from pgtrickle.list_relay_configs()") == [
        ("a", "forward", True),
        ("b", "forward", False),
        ("c", "reverse", True),
        ("d", "reverse", True),
    ]
    assert db.value("select pgtrickle.get_relay_config('c')") == db.value(
        "select pgtrickle.get_relay_config('d')"
    )


def test_an_outbox_that_is_not_enabled_is_refused_with_the_statement_that_enables_it(
    db: Session,
) -> None:
    db.run("create table public.orders (id int primary key)")

    with db.refused("RL003") as said:
        db.run("select pgtrickle.set_relay_outbox('p', 'orders', null, %s::jsonb)", STDOUT)

    db.run(said.message_hint)
    db.run("select pgtrickle.set_relay_outbox('p', 'orders', null, %s::jsonb)", STDOUT)


def test_a_missing_inbox_is_created_and_one_that_is_there_is_kept(db: Session) -> None:
    db.run(
        "select pgtrickle.set_relay_inbox('p', 'received', %s::jsonb, max_retries => 2,"
        " retention_hours => 48)",
        NATS_SOURCE,
    )
    db.run(REVERSE, "q", NATS_SOURCE)

    assert db.rows(
        "select inbox_name, max_retries, retention_hours from pgtrickle.inbox_status()"
    ) == [("received", 2, 48)]


def test_retention_is_raised_and_never_lowered(db: Session) -> None:
    for hours in (72, 24):
        db.run(
            "select pgtrickle.set_relay_outbox('p', 'events', null, %s::jsonb,"
            " retention_hours => %s)",
            STDOUT,
            hours,
        )

    assert db.value("select (pgtrickle.outbox_status('events') ->> 'retention_hours')::int") == 72
    with db.refused("RL010"):
        db.run(
            "select pgtrickle.set_relay_outbox('p', 'events', null, %s::jsonb,"
            " retention_hours => 0)",
            STDOUT,
        )


def test_a_consumer_group_is_made_with_its_pipeline(db: Session) -> None:
    db.run("select pgtrickle.set_relay_outbox('p', 'events', 'g', %s::jsonb)", STDOUT)

    assert (
        db.value("select outbox_table_name from pgtrickle.relay_groups where group_name = 'g'")
        == "outbox_events"
    )
    db.run("select pgtrickle.enable_outbox('others', capture => 'none')")
    with db.refused("RL023"):
        db.run("select pgtrickle.set_relay_outbox('q', 'others', 'g', %s::jsonb)", STDOUT)


def test_a_consumer_group_belongs_to_one_pipeline_and_to_one_relay_group(db: Session) -> None:
    db.run("select pgtrickle.set_relay_outbox('p', 'events', 'g', %s::jsonb)", STDOUT)
    join = "select pgtrickle.relay_group_join('g', 'p', %s, 'outbox_events', 'one/1', 'fail')"

    with db.refused("RL023") as said:
        db.run("select pgtrickle.set_relay_outbox('q', 'events', 'g', %s::jsonb)", STDOUT)
    assert 'belongs to pipeline "p"' in said.message_primary
    assert db.rows("select name from pgtrickle.list_relay_configs()") == [("p",)]
    db.run(join, "mine")
    db.run(join, "mine")
    with db.refused("RL023") as said:
        db.run(join, "theirs")
    assert 'for relay group "mine"' in said.message_primary
    assert "relay_forget_group('mine')" in said.message_hint
    db.run("select pgtrickle.relay_forget_group('mine')")
    db.run(join, "theirs")


def test_a_pipeline_that_is_deleted_or_reads_another_group_leaves_its_group_and_says_so(
    db: Session,
) -> None:
    def frontiers() -> list[tuple[str, int, str | None]]:
        return db.rows(
            "select group_name, frontier, relay_group_id from pgtrickle.relay_groups order by 1"
        )

    db.run("select pgtrickle.set_relay_outbox('p', 'events', 'g', %s::jsonb)", STDOUT)
    db.run("select pgtrickle.relay_group_join('g', 'p', 'd', 'outbox_events', 'one/1', 'fail')")
    db.run("insert into pgtrickle.outbox_events (payload) values ('{}')")
    db.run("select pgtrickle.relay_group_poll('g', 'one/1', 10, 30, 1000)")

    db.run("select pgtrickle.set_relay_outbox('p', 'events', 'h', %s::jsonb)", STDOUT)
    assert db.notices == ['consumer group "g" stays, with its position, and holds back retention']
    db.run("select pgtrickle.delete_relay('p')")

    assert db.notices[1:] == [
        'consumer group "h" stays, with its position, and holds back retention'
    ]
    assert frontiers() == [("g", 1, None), ("h", 0, None)]
    db.run("select pgtrickle.set_relay_outbox('q', 'events', 'g', %s::jsonb)", STDOUT)


def test_a_pipeline_that_gets_a_group_says_that_its_own_position_does_not_count(
    db: Session,
) -> None:
    db.run("select pgtrickle.set_relay_outbox('p', 'events', null, %s::jsonb)", STDOUT)
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w')")

    db.run("select pgtrickle.set_relay_outbox('p', 'events', 'g', %s::jsonb)", STDOUT)

    assert db.notices == [
        'pipeline "p" goes on at the position of consumer group "g", not at its own'
    ]


def test_names_are_unique_over_both_directions(db: Session) -> None:
    db.run(FORWARD, "p", STDOUT)

    with db.refused("RL012") as said:
        db.run(REVERSE, "p", NATS_SOURCE)
    assert "delete_relay('p')" in said.message_hint
    with db.refused("RL012"):
        db.run("insert into pgtrickle.relay_inbox_config (name, config) values ('p', '{}')")
    db.run("select pgtrickle.delete_relay('p')")
    db.run(REVERSE, "p", NATS_SOURCE)


def test_two_transactions_that_take_one_name_at_once_do_not_both_get_it(
    db: Session, any_migrated_database: Database
) -> None:
    outcome: list[str | None] = []

    def take_for_reverse() -> None:
        with session(any_migrated_database.dsn) as other:
            try:
                other.run(REVERSE, "p", NATS_SOURCE)
            except psycopg.Error as error:
                outcome.append(error.sqlstate)
            else:
                outcome.append(None)

    db.run("begin")
    db.run(FORWARD, "p", STDOUT)
    waiting = threading.Thread(target=take_for_reverse)
    waiting.start()
    with session(any_migrated_database.dsn) as observer:
        while not observer.rows("select from pg_locks where not granted"):
            assert waiting.is_alive()
    db.run("commit")
    waiting.join(timeout=10)

    assert outcome == ["RL012"]


def test_enabling_disabling_and_deleting(db: Session) -> None:
    db.run(FORWARD, "p", STDOUT)
    db.run("select pgtrickle.relay_claim('default', 'p', 'outbox_events', 'w')")

    db.run("select pgtrickle.disable_relay('p')")
    disabled = db.value("select enabled from pgtrickle.list_relay_configs()")
    db.run("select pgtrickle.enable_relay('p')")
    enabled = db.value("select enabled from pgtrickle.list_relay_configs()")
    db.run("select pgtrickle.delete_relay('p')")

    assert (disabled, enabled) == (False, True)
    assert db.rows("select from pgtrickle.list_relay_configs()") == []
    assert db.rows("select from pgtrickle.relay_consumer_offsets") == []
    assert any("position of forward pipeline" in said for said in db.notices)


def test_an_unknown_pipeline_is_an_error_that_suggests_a_name(db: Session) -> None:
    db.run(FORWARD, "orders-out", STDOUT)

    for function in ("enable_relay", "disable_relay", "delete_relay", "get_relay_config"):
        with db.refused("RL011") as said:
            db.run(f"select pgtrickle.{function}('order-out')")

        assert said.message_hint == 'Did you mean "orders-out"?'
    with db.refused("RL011") as said:
        db.run("select pgtrickle.get_relay_config('xyz')")
    assert "list_relay_configs()" in said.message_hint


def test_each_change_tells_the_relays_what_happened(db: Session) -> None:
    db.run("listen pgtrickle_relay_config")
    db.run(FORWARD, "p", STDOUT)
    db.run("select pgtrickle.disable_relay('p')")
    db.run("select pgtrickle.disable_relay('p')")
    db.run("select pgtrickle.delete_relay('p')")
    db.run(REVERSE, "q", NATS_SOURCE)

    told = [json.loads(n.payload) for n in db.connection.notifies(timeout=5, stop_after=4)]

    assert [tuple(note.values()) for note in told] == [
        ("relay_outbox_config", "INSERT", "p", True),
        ("relay_outbox_config", "UPDATE", "p", False),
        ("relay_outbox_config", "DELETE", "p", False),
        ("relay_inbox_config", "INSERT", "q", True),
    ]
    assert list(told[0]) == ["direction", "event", "name", "enabled"]


WRONG_SINKS = [
    ('{"url": "nats://h"}', "sink.type is missing", "nats"),
    ('{"type": "natz"}', "sink.type 'natz' is not known", "Did you mean nats?"),
    ('{"type": "nats"}', "sink.url or sink.profile is missing", "profile"),
    ('{"type": "nats", "url": null}', "sink.url or sink.profile is missing", "profile"),
    (nats(subject_templat="x"), "sink.subject_templat is not a known key", "subject_template"),
    (nats(zzzzzzzz="x"), "sink.zzzzzzzz is not a known key", "Known are"),
    (nats(subject_template="{ops}"), "unknown variable {ops}", "Did you mean {op}?"),
    (nats(subject_template="a{"), "brace without its partner", "{{"),
    (nats(subject_template=""), "sink.subject_template is empty", "default"),
    (nats(routing={"insert": "{nope}"}), "sink.routing.insert has an unknown variable", "Known"),
    (nats(routing={"insert": 5}), "sink.routing.insert is of type number", "template"),
    (nats(max_in_flight="many"), "sink.max_in_flight is a text", "a whole number"),
    (nats(create_stream="perhaps"), "sink.create_stream is a text", "true or false"),
    ('{"type": "kafka", "client": {"x": 1}}', "sink.client can't be set here", "profile"),
    ('{"type": "nats", "profile": "n", "url": "nats://h"}', "can't be combined", "as a whole"),
    ('{"type": "nats", "profile": "n", "tls": false}', "can't be combined", "as a whole"),
    ('{"type": "nats", "profile": "n", "url": null}', "can't be combined", "as a whole"),
    ('{"type": "file"}', "sink.output is missing", "file"),
    ('{"type": "kafka", "brokers": "h"}', "sink.topic or sink.topic_template is missing", ""),
    ('["stdout"]', "sink is of type array", "an object"),
    (nats(format="avro"), "sink.format is 'avro'", "envelope or payload or cloudevents"),
    (nats(max_in_flight=-5), "sink.max_in_flight is -5", "from 1 on"),
    (nats(max_in_flight="-5"), "sink.max_in_flight is -5", "from 1 on"),
    (nats(url="http://h:4222"), "sink.url is a text that does not fit", "nats:// or tls://"),
    (nats(url="nats://a, http://b"), "sink.url is a text that does not fit", "nats:// or tls://"),
    (nats(type="redis"), "sink.url is a text that does not fit", "redis:// or rediss://"),
    ('{"type": "webhook", "url": "h/x"}', "sink.url is a text", "http:// or https://"),
    ('{"type": "webhook", "url": "http://h", "retry_on_status": [200]}', "is 200", "400 to 599"),
    ('{"type": "pg-inbox", "inbox": "a", "inbox_table": "b"}', "both inbox and inbox_table", ""),
    (
        '{"type": "rabbitmq", "url": "amqp://h"}',
        "exchange or sink.routing_key_template",
        "rabbitmq",
    ),
    ('{"type": "stdout", "output": "/tmp/x"}', "sink.output is not a known key", "content"),
    (nats(user="u"), "sink.user needs password", "both"),
    (nats(token="${env:T}", nkey_seed="${env:S}"), "sink has both token and nkey_seed", "out"),
    (nats(stream=5), "sink.stream is of type number", "a text"),
]


def test_a_wrong_sink_is_refused_with_its_remedy(db: Session) -> None:
    for sink, message, hint in WRONG_SINKS:
        with db.refused("RL010") as said:
            db.run(FORWARD, "p", sink)

        assert message in said.message_primary, sink
        assert hint in said.message_hint, sink


WRONG_KEYS: list[tuple[dict[str, object], str]] = [
    ({"batch_sise": 5}, "batch_sise is not a known key"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": "x"}, "batch_size is a text"),
    ({"batch_size": 1.5}, "batch_size is 1.5"),
    ({"prefetch": 9}, "prefetch is 9"),
    ({"ordering": "loose"}, "ordering is 'loose'"),
    ({"start": "now"}, "start is 'now'"),
    ({"columns": {}}, "columns is not a key of a forward pipeline"),
    ({"url": "x"}, "url is not a key of the pipeline itself"),
    ({"key_columns": "id"}, "key_columns is a text"),
    ({"parallelism": 2}, "parallelism needs a consumer group"),
    ({"retry_initial_ms": 5, "retry_max_ms": 4}, "retry_max_ms is less"),
    ({"config_version": 2}, "config_version is 2"),
    ({"source_type": "nats"}, "source_type is 'nats'"),
    ({"sink_type": "nats"}, "sink.type is 'stdout'"),
    ({"source": {"outbox": "events", "grp": "x"}}, "source.grp is not a known key"),
    ({"source": {}}, "source.outbox is missing"),
    ({"source": ["events"]}, "source is of type array"),
]


def test_a_wrong_pipeline_key_is_refused(db: Session) -> None:
    for keys, message in WRONG_KEYS:
        with db.refused("RL010") as said:
            db.run(FORWARD_CONFIG, forward(**keys))

        assert message in said.message_primary, keys
    with db.refused("RL010") as said:
        db.run(FORWARD_CONFIG, '["events"]')
    assert said.message_primary == "the configuration is not a JSON object"


def test_a_configuration_that_is_none_is_refused_by_the_one_function_that_may_be_called(
    db: Session,
) -> None:
    check = "select pgtrickle.relay_validate_config(%s, %s::jsonb)"
    db.run("set role pgtrickle_relay")
    for direction, config, code in (
        (None, None, "22023"),
        ("sideways", "{}", "22023"),
        ("forward", None, "RL010"),
        ("forward", "null", "RL010"),
        ("reverse", "[]", "RL010"),
        ("forward", '{"source": null, "sink": null}', "RL010"),
    ):
        with db.refused(code):
            db.run(check, direction, config)
    db.run(check, "forward", forward(source_type="outbox", sink_type="stdout"))
    for helper in ("relay_key_rules()", "relay_check_keys('sink', '{}', '{}', true)"):
        with db.refused("42501"):
            db.run(f"select pgtrickle.{helper}")


def test_good_configurations_of_every_backend_pass(db: Session) -> None:
    forward_sinks = [
        nats(subject_template="a.{{x}}.{payload.customer.id}.{op}", routing={"insert": "{key}"}),
        '{"type": "kafka", "profile": "k", "topic": "t", "key_template": "{key}"}',
        '{"type": "webhook", "url": "https://h/x", "headers": {"X-Team": "a"},'
        ' "retry_on_status": [429]}',
        '{"type": "redis", "url": "redis://h", "stream_key": "{stream_table}", "maxlen": "1000"}',
        '{"type": "sqs", "queue_url": "https://q", "region": "eu",'
        ' "access_key_id": "${env:I}", "secret_access_key": "${env:K}"}',
        '{"type": "rabbitmq", "url": "amqp://u:${env:P}@h", "exchange": "e", "mandatory": true}',
        '{"type": "pg-inbox", "url": "postgres://h/d", "inbox": "x"}',
        '{"type": "file", "output": "/tmp/x", "format": "csv", "rotate_bytes": 10}',
    ]
    reverse_sources = [
        '{"type": "kafka", "brokers": ["h:1"], "topic": "t"}',
        '{"type": "webhook", "listen_addr": "0.0.0.0:80", "auth_value": "${file:/run/secrets/x}"}',
        '{"type": "redis", "url": "redis://h", "stream_key": "s", "group_name": "g"}',
        '{"type": "sqs", "queue_url": "https://q"}',
        '{"type": "rabbitmq", "url": "amqp://h", "queue": "q", "prefetch_count": 5}',
        '{"type": "stdin"}',
        '{"type": "file", "input": "/tmp/x", "follow": true}',
    ]
    for sink in forward_sinks:
        db.run(FORWARD, "p", sink)
    for source in reverse_sources:
        db.run(REVERSE, "q", source)


PLAINTEXT = [
    nats(user="u", password="hunter2"),
    nats(token="hunter2"),
    '{"type": "nats", "url": "nats://u:hunter2@h"}',
    '{"type": "webhook", "url": "https://h", "headers": {"Authorization": "Bearer hunter2"}}',
    '{"type": "webhook", "url": "https://h", "hmac_secret": "hunter2"}',
    '{"type": "sqs", "queue_url": "https://q", "access_key_id": "${env:I}",'
    ' "secret_access_key": "hunter2"}',
    nats(token="hunter2${env:X}"),
    nats(token="${env:X}hunter2"),
    '{"type": "nats", "url": "nats://hunter2@h"}',
    '{"type": "nats", "url": "nats://a,nats://u:hunter2${env:X}@h"}',
    '{"type": "webhook", "url": "http://h/?token=hunter2"}',
    '{"type": "webhook", "url": "http://h/?a=b&api_key=hunter2${env:X}"}',
    '{"type": "webhook", "url": "https://hunter2@h/"}',
    '{"type": "webhook", "url": "https://h", "headers": {"X-Key": "hunter2"}}',
    '{"type": "webhook", "url": "https://h", "headers": {"x-api-key": "hunter2"}}',
    '{"type": "webhook", "url": "https://h", "headers": {"Cookie": "session=hunter2"}}',
    '{"type": "webhook", "url": "https://h", "headers": {"X-A": "hunter2 ${env:X}", "X-Auth":'
    ' "hunter2 ${env:X}"}}',
    '{"type": "pg-inbox", "inbox": "i", "url": "host=h password=hunter2"}',
]


@pytest.mark.shows("pipeline:allow_plaintext_secrets")
def test_a_plaintext_secret_is_refused_and_not_repeated_in_the_error(db: Session) -> None:
    for sink in PLAINTEXT:
        with db.refused("RL013") as said:
            db.run(FORWARD, "p", sink)
        told = f"{said.message_primary}{said.message_hint}"
        assert "${env:NAME}" in told
        assert "hunter2" not in told
        db.run(FORWARD_CONFIG, forward(sink=json.loads(sink), allow_plaintext_secrets=True))


def test_a_reference_is_no_plaintext_secret(db: Session) -> None:
    for sink in (
        '{"type": "webhook", "url": "https://h", "headers": {"Authorization": "Bearer ${env:T}"}}',
        '{"type": "webhook", "url": "https://u:${env:P}@h/?token=${env:T}&partition=5"}',
        '{"type": "webhook", "url": "https://h:443/tokens/x", "headers": {"X-Keyboard": "a"}}',
        nats(url="nats://a:1,nats://u:${file:/run/secrets/p}@h", max_in_flight="${env:N}"),
        nats(url="${env:URL}", format="${env:F}", tls="${env:T}", subject_template="${env:S}.{op}"),
        '{"type": "pg-inbox", "inbox": "i", "url": "host=h password=\'${env:P}\' sslkey=/k"}',
    ):
        db.run(FORWARD, "p", sink)


def test_a_pipeline_s_own_keys_are_no_references(db: Session) -> None:
    with db.refused("RL010"):
        db.run(FORWARD_CONFIG, forward(batch_size="${env:N}"))


def test_a_pipeline_into_an_inbox_of_this_database_needs_that_inbox(db: Session) -> None:
    sink = '{"type": "pg-inbox", "inbox": "copies"}'
    with db.refused("RL030") as said:
        db.run(FORWARD, "p", sink)

    db.run(said.message_hint)
    db.run(FORWARD, "p", sink)


def test_a_row_edited_by_hand_is_not_stopped_but_is_not_enabled_either(db: Session) -> None:
    db.run(
        "insert into pgtrickle.relay_outbox_config (name, enabled, config)"
        " values ('p', false, '[]')"
    )

    with db.refused("RL010"):
        db.run("select pgtrickle.enable_relay('p')")


def test_a_pipeline_can_be_renamed_by_hand(db: Session) -> None:
    db.run(FORWARD, "p", STDOUT)
    db.run("update pgtrickle.relay_outbox_config set name = 'q'")

    db.run("select pgtrickle.disable_relay('q')")
    db.run(REVERSE, "p", NATS_SOURCE)


@pytest.mark.parametrize("name", ['o"r.d ers', "Größe ✓ {x} %s", "a" * 200])
def test_odd_names_are_just_names(db: Session, name: str) -> None:
    db.run(FORWARD, name, STDOUT)

    assert db.value("select name from pgtrickle.list_relay_configs()") == name


@pytest.mark.parametrize("name", ["", "a" * 201, None])
def test_impossible_names_are_refused(db: Session, name: str | None) -> None:
    with db.refused("RL010"):
        db.run(FORWARD, name, STDOUT)
