"""The tree of errors: what its picture says is what it is, and what the process makes of it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest

from relay import cli, errors
from relay.errors import (
    AuthenticationRefused,
    CatalogError,
    CatalogMissing,
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    LeaseLost,
    MessageRejected,
    MessageTooLarge,
    MessageUndecodable,
    MigrationRefused,
    NotConnected,
    Outage,
    OwnershipLost,
    RelayError,
    SecretUnresolved,
    TimedOut,
)

CLASSES: Mapping[str, type[Exception]] = {
    name: member
    for name, member in vars(errors).items()
    if isinstance(member, type) and issubclass(member, Exception)
}


def drawn() -> dict[str, str | None]:
    """Each class in the module's picture, with the one above it."""
    picture = (errors.__doc__ or "").split("```")[1].strip("\n")
    above: dict[int, str] = {}
    parents: dict[str, str | None] = {}
    for line in picture.splitlines():
        found = re.match(r"[│├└─ ]*", line)
        depth = (found.end() if found else 0) // 4
        name = line.lstrip("│├└─ ").split()[0]
        above[depth] = name
        parents[name] = above.get(depth - 1) if depth else None
    return parents


def test_the_picture_shows_every_class_under_its_parent() -> None:
    is_outside = {"EndOfInput"}  # drawn in the tree, but it is no failure
    actual = {
        name: "RelayError" if name in is_outside else member.__bases__[0].__name__
        for name, member in CLASSES.items()
        if name != "RelayError"
    }

    assert {name: parent for name, parent in drawn().items() if parent is not None} == actual


def test_the_end_of_input_is_no_failure() -> None:
    assert not issubclass(errors.EndOfInput, RelayError)


@pytest.mark.parametrize(
    "root,kind",
    [
        (ConfigurationError, ErrorKind.CONFIGURATION),
        (CatalogError, ErrorKind.CONFIGURATION),
        (Outage, ErrorKind.OUTAGE),
        (OwnershipLost, ErrorKind.OUTAGE),
        (MessageRejected, ErrorKind.MESSAGE),
    ],
)
def test_a_branch_has_one_kind(root: type[RelayError], kind: ErrorKind) -> None:
    branch = [
        member
        for member in CLASSES.values()
        if issubclass(member, RelayError) and issubclass(member, root)
    ]

    assert {member.kind for member in branch} == {kind}


def test_an_error_reads_as_one_line_with_its_remedy() -> None:
    assert str(NotConnected("the server is away")) == "the server is away"
    assert str(NotConnected("away", remedy="start it")) == "away (start it)"


def test_what_the_relay_found_itself_says_nothing_about_the_broker() -> None:
    assert MessageTooLarge.found_before_sending
    assert MessageUndecodable.found_before_sending
    assert not MessageRejected.found_before_sending


@pytest.mark.parametrize(
    "error,code",
    [
        (ConfigurationError, 2),
        (SecretUnresolved, 2),
        (AuthenticationRefused, 2),
        (DestinationMissing, 2),
        (CatalogMissing, 3),
        (MigrationRefused, 3),
        (NotConnected, 3),
        (TimedOut, 3),
        (LeaseLost, 1),
        (MessageRejected, 1),
    ],
)
def test_an_error_that_ends_the_process_is_a_line_and_an_exit_code(
    error: type[RelayError],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: object) -> int:
        raise error("it went wrong", remedy="mend it")

    monkeypatch.setattr(cli, "_run", fail)

    assert cli.run([]) == code
    assert capsys.readouterr().err == "pgtrickle-relay: it went wrong (mend it)\n"
