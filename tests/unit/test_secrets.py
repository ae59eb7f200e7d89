"""Secret references, what they may reach, and masking."""

from __future__ import annotations

from pathlib import Path

import pytest

from relay.errors import SecretUnresolved
from relay.secrets import OPERATOR, SecretPolicy, Secrets, masked, references


def test_references_are_resolved_wherever_they_stand(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    secrets = Secrets(SecretPolicy(file_roots=[str(tmp_path)]), {"RELAY_PASSWORD": "hunter2"})

    resolved = secrets.resolve(
        {"url": "nats://u:${env:RELAY_PASSWORD}@h", "list": [f"${{file:{tmp_path}/token}}"], "n": 3}
    )

    assert resolved == {"url": "nats://u:hunter2@h", "list": ["s3cret"], "n": 3}


@pytest.mark.parametrize(
    "reference,said",
    [
        ("${env:ABSENT}", "no such variable"),
        ("${env:PGTRICKLE_RELAY_POSTGRES_URL}", "relay's own settings"),
        ("${env:pgtrickle_relay_postgres_url}", "relay's own settings"),
        ("${env:OTHER}", "allow-list"),
        ("${file:/etc/passwd}", "outside of the allowed directories"),
    ],
)
@pytest.mark.shows("error:SecretUnresolved")
def test_a_reference_that_leads_nowhere_is_named(reference: str, said: str) -> None:
    secrets = Secrets(
        SecretPolicy(file_roots=["/run/secrets"], env_allow=["ABSENT", "PGTRICKLE*", "pgt*"]),
        {"OTHER": "value-of-other", "PGTRICKLE_RELAY_POSTGRES_URL": "postgres://"},
    )

    with pytest.raises(SecretUnresolved) as refused:
        secrets.resolve(reference)

    assert said in str(refused.value)
    assert reference in str(refused.value)
    assert "value-of-other" not in str(refused.value)


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "PATH", "relay_token", "MY_RELAY_TOKEN"])
def test_without_an_allow_list_of_its_own_a_pipeline_reaches_names_of_the_relay_only(
    name: str,
) -> None:
    secrets = Secrets(SecretPolicy(), {name: "hunter2", "RELAY_TOKEN": "x"})

    with pytest.raises(SecretUnresolved, match="allow-list"):
        secrets.resolve(f"${{env:{name}}}")
    assert secrets.resolve("${env:RELAY_TOKEN}") == "x"


def test_a_path_can_not_climb_out_of_its_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").write_text("no")
    (root / "link").symlink_to(tmp_path / "outside")
    secrets = Secrets(SecretPolicy(file_roots=[str(root)]), {})

    for path in (f"{root}/../outside", f"{root}/link"):
        with pytest.raises(SecretUnresolved, match="outside"):
            secrets.resolve(f"${{file:{path}}}")


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_can_not_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)

    with pytest.raises(SecretUnresolved, match="can't be read"):
        Secrets(OPERATOR, {}).resolve(f"${{file:{tmp_path}/key}}")


def test_the_operator_reaches_everything() -> None:
    secrets = Secrets(OPERATOR, {"PGTRICKLE_RELAY_DB": "x"})

    assert secrets.resolve("${env:PGTRICKLE_RELAY_DB}") == "x"


def test_what_was_resolved_is_masked_in_any_text() -> None:
    secrets = Secrets(SecretPolicy(), {"RELAY_A": "hunter2", "RELAY_B": "hunter2-longer"})
    secrets.resolve(["${env:RELAY_A}", "${env:RELAY_B}"])

    text = secrets.mask("hunter2 and hunter2-longer and amqp://u:other@h")

    assert text == "****** and ****** and amqp://u:******@h"


def test_a_structure_is_shown_without_its_secrets() -> None:
    shown = masked(
        {
            "password": "hunter2",
            "token": "${env:TOKEN}",
            "url": "postgresql://u:hunter2@h/d",
            "ref": "postgresql://u:${env:PW}@h/d",
            "inner": [{"sasl_password": "hunter2", "batch_size": 3}],
            "nkey_seed": "",
            "headers": {"X-Key": "hunter2", "x-api-key": "hunter2", "X-Keyboard": "a"},
            "hook": "https://h/?token=hunter2&page=5&sig=${env:SIG}",
            "stream_key": "orders",
            "tls_key": "/etc/key.pem",
        }
    )

    assert shown == {
        "password": "******",
        "token": "${env:TOKEN}",
        "url": "postgresql://u:******@h/d",
        "ref": "postgresql://u:${env:PW}@h/d",
        "inner": [{"sasl_password": "******", "batch_size": 3}],
        "nkey_seed": "",
        "headers": {"X-Key": "******", "x-api-key": "******", "X-Keyboard": "a"},
        "hook": "https://h/?token=******&page=5&sig=${env:SIG}",
        "stream_key": "orders",
        "tls_key": "/etc/key.pem",
    }


def test_references_are_listed_as_they_are_written() -> None:
    value = {"a": "x${env:A}${file:/b}", "b": ["${env:C}", 3]}

    assert references(value) == ["${env:A}", "${file:/b}", "${env:C}"]
