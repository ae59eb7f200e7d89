"""A catalog row, typed: what is refused, what falls back to the settings, and profiles."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from relay.errors import ConfigurationError
from relay.events import Direction
from relay.options import declared_keys
from relay.pipeline_config import Pace, pace_of, parse_config, with_profile
from relay.registry import SINKS, SOURCES, options_of
from relay.settings import RelaySettings

FORWARD: Mapping[str, object] = {
    "config_version": 1,
    "source_type": "outbox",
    "source": {"outbox": "orders"},
    "sink_type": "nats",
    "sink": {"type": "nats", "url": "nats://h"},
}
REVERSE: Mapping[str, object] = {
    "source_type": "nats",
    "source": {"type": "nats", "url": "nats://h", "subject": "a"},
    "sink_type": "pg-inbox",
    "sink": {"inbox": "orders"},
}
PROFILES: Mapping[str, Mapping[str, object]] = {
    "main": {"type": "nats", "url": "nats://profile", "password": "p", "user": "u"}
}


def merge(
    role: str,
    type_: str,
    options: Mapping[str, object],
    profiles: Mapping[str, Mapping[str, object]] = PROFILES,
) -> Mapping[str, object]:
    return with_profile(role, type_, options, profiles, declared_keys(options_of(role, type_)))


@pytest.mark.parametrize("direction,row", [("forward", FORWARD), ("reverse", REVERSE)])
def test_a_plain_row_of_each_direction_is_accepted(
    direction: Direction, row: Mapping[str, object]
) -> None:
    parsed = parse_config(direction, row)

    assert (parsed.source_type, parsed.sink_type) == (row["source_type"], row["sink_type"])
    assert parsed.config_version == 1


@pytest.mark.shows("error:ConfigurationError")
@pytest.mark.parametrize(
    "direction,changed,said",
    [
        ("forward", {"batchsize": 1}, "did you mean batch_size"),
        ("forward", {"batch_size": "many"}, "batch_size: expected `int"),
        ("forward", {"ordering": "loose"}, "use one of strict, pipelined"),
        ("forward", {"source": "orders"}, "source: expected `object`"),
        ("forward", {"source_type": "nats"}, "must be outbox"),
        ("reverse", {"sink_type": "nats"}, "must be pg-inbox"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused_in_words(
    direction: Direction, changed: Mapping[str, object], said: str
) -> None:
    row = FORWARD if direction == "forward" else REVERSE

    with pytest.raises(ConfigurationError, match=said):
        parse_config(direction, {**row, **changed})


def test_a_row_without_its_source_is_refused() -> None:
    row = {name: value for name, value in FORWARD.items() if name != "source"}

    with pytest.raises(ConfigurationError, match="source is missing"):
        parse_config("forward", row)


@pytest.mark.shows("pipeline:config_version")
def test_a_row_of_a_later_version_is_not_guessed_at() -> None:
    with pytest.raises(ConfigurationError, match="upgrade pgtrickle-relay"):
        parse_config("forward", {**FORWARD, "config_version": 2})


@pytest.mark.parametrize(
    "key,value",
    [
        ("start", "latest"),
        ("on_reset", "latest"),
        ("collapse_updates", True),
        ("snapshot_markers", True),
        ("dedup_namespace", "eu"),
        ("key_columns", ["id"]),
    ],
)
def test_a_key_of_forward_pipelines_is_refused_in_a_reverse_one(key: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"{key} belongs to forward pipelines"):
        parse_config("reverse", {**REVERSE, key: value})

    parse_config("forward", {**FORWARD, key: value})


@pytest.mark.parametrize(
    "key,value",
    [
        ("dedup_key_from", "header:X"),
        ("event_type_from", "subject"),
        ("columns", {"source": "subject"}),
    ],
)
def test_a_key_of_reverse_pipelines_is_refused_in_a_forward_one(key: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"{key} belongs to reverse pipelines"):
        parse_config("forward", {**FORWARD, key: value})

    parse_config("reverse", {**REVERSE, key: value})


def test_a_row_that_says_nothing_takes_the_pace_of_the_settings() -> None:
    settings = RelaySettings(
        batch_size=7,
        poll_interval_ms=30,
        prefetch=2,
        retry_initial_ms=40,
        retry_max_ms=80,
        breaker_threshold=9,
    )

    assert pace_of(parse_config("forward", FORWARD), settings) == Pace(
        batch_size=7,
        poll_interval_s=0.03,
        prefetch=2,
        max_attempts=None,
        retry_initial_s=0.04,
        retry_max_s=0.08,
        breaker_threshold=9,
    )


def test_what_a_row_says_wins_over_the_settings() -> None:
    row = {
        **FORWARD,
        "batch_size": 1,
        "poll_interval_ms": "2",
        "prefetch": 0,
        "max_attempts": 4,
        "retry_initial_ms": 5,
        "retry_max_ms": 6,
        "breaker_threshold": 7,
    }

    assert pace_of(parse_config("forward", row), RelaySettings()) == Pace(
        batch_size=1,
        poll_interval_s=0.002,
        prefetch=0,
        max_attempts=4,
        retry_initial_s=0.005,
        retry_max_s=0.006,
        breaker_threshold=7,
    )


@pytest.mark.parametrize(
    "key,value,said",
    [
        ("batch_size", 0, "from 1 to 100000"),
        ("poll_interval_ms", 0, "from 1 to 3600000"),
        ("prefetch", -1, "from 0 to 8"),
        ("max_attempts", 0, "at least 1"),
        ("retry_initial_ms", 0, "from 1 to 86400000"),
        ("retry_max_ms", -5, "from 1 to 86400000"),
        ("breaker_threshold", 0, "at least 1"),
    ],
)
def test_a_pace_that_makes_no_sense_is_refused(key: str, value: int, said: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{key} must be {said}, but is {value}"):
        parse_config("forward", {**FORWARD, key: value})


def test_a_longest_wait_below_the_first_is_refused() -> None:
    config = parse_config("forward", {**FORWARD, "retry_max_ms": 10})

    with pytest.raises(ConfigurationError, match="retry_max_ms must not be below"):
        pace_of(config, RelaySettings(retry_initial_ms=100))


def test_a_profile_brings_the_connection_and_the_row_the_rest() -> None:
    merged = merge("sink", "nats", {"profile": "main", "subject_template": "a"})

    assert merged == {**PROFILES["main"], "subject_template": "a"}


def test_without_a_profile_the_row_stands_alone() -> None:
    assert merge("sink", "nats", {"url": "nats://row"}) == {"url": "nats://row"}


def test_a_row_can_not_aim_the_credentials_of_a_profile_elsewhere() -> None:
    tried = 0
    for role, table in (("sink", SINKS), ("source", SOURCES)):
        for type_ in table:
            for key, rule in declared_keys(options_of(role, type_)).items():
                if rule.connection:
                    tried += 1
                    with pytest.raises(ConfigurationError, match="come from a profile as a whole"):
                        merge(role, type_, {"profile": type_, key: "x"}, {type_: {"type": type_}})
    assert tried > 100


def test_settings_of_a_client_library_stand_in_profiles_only() -> None:
    with pytest.raises(ConfigurationError, match="client belongs into a profile"):
        merge("sink", "kafka", {"client": {"client_id": "x"}})


@pytest.mark.parametrize(
    "profile,type_,said",
    [("mian", "nats", "does not have .add backends.mian"), ("main", "kafka", "is of type 'nats'")],
)
def test_a_profile_that_does_not_fit_is_named(profile: str, type_: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        merge("sink", type_, {"profile": profile})
