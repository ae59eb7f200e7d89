"""The packaged overlays, the operator's own, and what wins over what."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import yaml

from relay.cli import run
from relay.errors import ConfigurationError
from relay.options import known_keys
from relay.overlays import compose_settings, show_settings, type_settings
from relay.settings import Settings

CONF = Path(__file__).parents[2] / "conf"
OVERLAYS = sorted(
    f"{'+' if path.parent.name == 'env' else ''}{path.parent.name}={path.stem}"
    for path in CONF.glob("*/*.yaml")
)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_composes_to_valid_settings(overlay: str) -> None:
    type_settings(compose_settings([overlay]))


def test_the_packaged_defaults_are_the_typed_defaults() -> None:
    assert type_settings(compose_settings([])) == Settings()


def test_every_key_is_in_the_yaml_where_people_look_for_it() -> None:
    shown = yaml.safe_load(show_settings(compose_settings([])))

    missing = [path for path in known_keys(Settings) if not _is_in(shown, path.split("."))]

    assert missing == []


def test_each_overlay_changes_something() -> None:
    defaults = type_settings(compose_settings([]))
    same = [
        overlay for overlay in OVERLAYS if type_settings(compose_settings([overlay])) == defaults
    ]

    assert same == ["log=text", "metrics=default", "postgres=default", "ui=none"]


def test_flags_may_stand_between_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["+env=prod", "--cfg", "job", "relay.group_id=between"]) == 0

    assert yaml.safe_load(capsys.readouterr().out)["relay"]["group_id"] == "between"


@pytest.fixture
def own_overlays(tmp_path: Path) -> Path:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "mine.yaml").write_text(
        "# @package _global_\nrelay:\n  group_id: mine\npostgres:\n  url: postgresql:///overlay\n"
    )
    (tmp_path / "env" / "prod.yaml").write_text("# @package _global_\nrelay: {group_id: ours}\n")
    return tmp_path


def test_the_operators_directory_is_searched_before_the_packaged_one(own_overlays: Path) -> None:
    mine = compose_settings(["+env=mine"], config_dirs=[str(own_overlays)])
    prod = compose_settings(["+env=prod"], config_dirs=[str(own_overlays)])

    assert type_settings(mine).relay.group_id == "mine"
    assert type_settings(prod).relay.group_id == "ours"


def test_command_line_wins_over_environment_over_overlay_over_default(own_overlays: Path) -> None:
    def url(overrides: list[str], flags: dict[str, str], environment: dict[str, str]) -> str:
        composed = compose_settings(
            overrides, config_dirs=[str(own_overlays)], flags=flags, environment=environment
        )
        return type_settings(composed).postgres.url

    variable = {"PGTRICKLE_RELAY_POSTGRES_URL": "postgresql:///environment"}
    flag = {"postgres.url": "postgresql:///flag?a=b,c&d={e}"}

    assert url([], {}, {}) == ""
    assert url(["+env=mine"], {}, {}) == "postgresql:///overlay"
    assert url(["+env=mine"], {}, variable) == "postgresql:///environment"
    assert url(["+env=mine", "postgres.url=override"], {}, variable) == "override"
    assert url(["+env=mine"], flag, variable) == flag["postgres.url"]


@pytest.mark.parametrize(
    "flag,variable,read",
    [
        ("--postgres-url", "PGTRICKLE_RELAY_POSTGRES_URL", "url: marker"),
        ("--metrics-addr", "PGTRICKLE_RELAY_METRICS_ADDR", "addr: marker"),
        ("--log-format", "PGTRICKLE_RELAY_LOG_FORMAT", "format: marker"),
        ("--log-level", "PGTRICKLE_RELAY_LOG_LEVEL", "level: marker"),
        ("--relay-group-id", "PGTRICKLE_RELAY_GROUP_ID", "group_id: marker"),
    ],
)
def test_each_classic_flag_and_variable_reaches_its_key(
    flag: str,
    variable: str,
    read: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["--cfg", "job", flag, "marker"]) == 0
    assert read in capsys.readouterr().out

    monkeypatch.setenv(variable, "marker")
    assert run(["--cfg", "job"]) == 0
    assert read in capsys.readouterr().out


def test_references_stay_literal_and_secrets_are_masked() -> None:
    composed = compose_settings(
        ["+backends.main={type: nats, url: '${env:URL}', password: '${file:/run/secrets/pw}'}"],
        flags={"postgres.url": "postgresql://u:hunter2@h/d"},
    )

    settings = type_settings(composed)
    shown = show_settings(composed)

    assert settings.backends["main"]["url"] == "${env:URL}"
    assert settings.backends["main"]["password"] == "${file:/run/secrets/pw}"
    assert "hunter2" not in shown
    assert "postgresql://u:******@h/d" in shown


@pytest.mark.parametrize(
    "argument,said",
    [
        ("+env=prud", "did you mean prod?"),
        ("log=jsn", "did you mean json?"),
        ("relay.group=1", "relay.group is not a known key (did you mean relay.group_id?)"),
        ("++relay.group=1", "relay.group is not a known key (did you mean group_id?)"),
        ("log.level=loud", "log.level: invalid enum value 'loud' (use one of debug, info"),
        ("relay.batch_size=abc", "relay.batch_size: expected `int`"),
        ("relay.batch_size=0", "relay.batch_size must be above 0"),
        ("relay.prefetch=-1", "relay.prefetch must not be negative"),
        ("relay.max_pipelines=0", "relay.max_pipelines must be at least 1"),
        ("relay.retry_max_ms=1", "relay.retry_max_ms must not be below"),
        ("relay.group_id=[", "the value of relay.group_id can't be read"),
        ("--nope", "unrecognized arguments: --nope"),
        ("--config-dir=/does/not/exist", "/does/not/exist is not a directory"),
        ("migrat", "did you mean migrate?"),
        ("relay:group_id=a", "'relay:group_id' is no key"),
        ("relay..group_id=a", "'relay..group_id' is no key"),
        ("relay.group_id =a", "'relay.group_id ' is no key"),
        ("++env=prod", "(write a single +)"),
        ("+backends.k=a", "backends.<name>: expected `object`"),
        (
            "postgres.sslmode=requred",
            "(use one of disable, allow, prefer, require, verify-ca, verify-full)",
        ),
    ],
)
def test_a_wrong_argument_is_one_readable_line(
    argument: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run([argument])

    line = capsys.readouterr().err
    assert code == 2
    assert said in line
    assert re.fullmatch(r"pgtrickle-relay: [^\n]+\n", line)


def test_an_unresolvable_interpolation_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code = run(["relay.group_id=${nothing.here}"])

    assert code == 2
    assert "relay.group_id refers to a key that is not there" in capsys.readouterr().err


def test_help_names_every_command_and_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(["--help"])

    text = capsys.readouterr().out
    for word in ("run", "drain", "migrate", "demo", "--config-dir", "--postgres-url", "+env=prod"):
        assert word in text


def test_printing_the_migration_needs_no_database(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["migrate", "--print"]) == 0

    assert "relay_outbox_config" in capsys.readouterr().out


def test_settings_refuse_unknown_and_wrong_keys_with_their_path() -> None:
    with pytest.raises(ConfigurationError, match=r"backends: expected"):
        type_settings(compose_settings(["backends=3"]))


def test_settings_are_frozen() -> None:
    settings = Settings()

    with pytest.raises(AttributeError):
        settings.relay.group_id = "other"  # type: ignore[misc]
    assert msgspec.structs.asdict(settings)


def _is_in(shown: object, path: list[str]) -> bool:
    for name in path:
        if not isinstance(shown, dict) or name not in shown:
            return False
        shown = shown[name]
    return True
