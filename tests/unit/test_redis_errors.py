"""Every error of Redis is one of the relay's, of the right kind."""

from __future__ import annotations

import inspect
import ssl

import pytest
import redis.exceptions as client

from relay.backends.redis.errors import CLIENT_ERRORS, REPLY_ERRORS, mapped, of_exception, of_reply
from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    ErrorKind,
    NotConnected,
    Outage,
    PositionLost,
    RelayError,
    TimedOut,
)
from tests.contract.redis_broker import driver_exceptions

PREFIX = "Transaction discarded because of: "
# Judged by the server's word.
BY_WORD = {"ResponseError", "ExecAbortError", "NoScriptError", "ModuleError", "NoSuchFieldsetError"}
# Of what is not used: locks, pools, transactions with WATCH, clusters, credential providers.
UNUSED = {
    "ChildDeadlockedError",
    "ClusterError",
    "DataError",
    "IncorrectPolicyType",
    "LockError",
    "LockNotOwnedError",
    "PubSubError",
    "RedisClusterException",
    "CrossSlotTransactionError",
    "InvalidPipelineStack",
    "SlotNotCoveredError",
    "WatchError",
}


def test_every_exception_class_of_the_library_has_an_entry_of_its_own_or_a_fitting_parent() -> None:
    missing = [
        name
        for name, member in inspect.getmembers(client, inspect.isclass)
        if issubclass(member, Exception)
        and name not in BY_WORD | UNUSED | {"RedisError"}
        and not any(one.__name__ in CLIENT_ERRORS for one in member.__mro__)
    ]

    assert not missing


def test_every_exception_of_the_library_comes_out_as_one_of_ours() -> None:
    for exception in driver_exceptions():
        with pytest.raises(RelayError), mapped("testing"):
            raise exception


@pytest.mark.parametrize(
    "error, kind",
    [
        (client.ResponseError("WRONGTYPE Operation against a key"), DestinationMissing),
        (client.ResponseError("NOGROUP No such key"), PositionLost),
        (client.ResponseError("UNBLOCKED the stream key no longer exists"), PositionLost),
        (client.ResponseError("UNBLOCKED force unblock from blocking operation"), NotConnected),
        (client.ResponseError("MISCONF Redis is configured to save RDB snapshots"), Outage),
        (client.ResponseError("NOREPLICAS Not enough good replicas to write."), Outage),
        (client.ResponseError("BUSY Redis is busy running a script."), Outage),
        (client.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."), Outage),
        (client.ReadOnlyError("You can't write against a read only replica."), NotConnected),
        (
            client.ResponseError(
                "WAIT cannot be used with replica instances. Please also note that since Redis 4.0"
            ),
            NotConnected,
        ),
        (client.BusyLoadingError("Redis is loading the dataset in memory"), Outage),
        (client.ClusterDownError("The cluster is down"), Outage),
        (client.MasterDownError("Link with MASTER is down"), NotConnected),
        (client.MovedError("3999 127.0.0.1:6381"), ConfigurationError),
        (client.NoPermissionError("this user has no permissions"), AuthenticationRefused),
        (client.AuthenticationError("Authentication required."), AuthenticationRefused),
        (client.ConnectionError("Connection closed by server."), NotConnected),
        (client.TimeoutError("Timeout reading"), TimedOut),
        (client.ResponseError("unknown command 'XAUTOCLAIM'"), ConfigurationError),
        (client.ExecAbortError("Transaction discarded because of: OOM no memory"), Outage),
        (
            client.ExecAbortError("Transaction discarded because of: NOPERM no"),
            AuthenticationRefused,
        ),
        (ConnectionResetError(), NotConnected),
        (TimeoutError(), TimedOut),
    ],
)
def test_an_error_is_of_its_kind(error: Exception, kind: type[RelayError]) -> None:
    assert type(of_exception(error, "testing")) is kind


def test_what_the_server_has_no_word_for_blames_a_message_only_while_publishing() -> None:
    error = client.ResponseError("Elements are too large to be stored")

    assert of_reply(error, "adding", is_publish=True).kind is ErrorKind.MESSAGE
    assert of_reply(error, "making").kind is ErrorKind.CONFIGURATION


@pytest.mark.parametrize("word", sorted(REPLY_ERRORS))
def test_a_word_of_the_server_is_understood_inside_an_aborted_transaction(word: str) -> None:
    error = client.ExecAbortError(f"Transaction discarded because of: {word} something")

    assert type(of_reply(error, "adding")) is REPLY_ERRORS[word][0]


def test_what_a_server_quotes_of_a_command_is_not_repeated() -> None:
    said = "unknown command 'XADD', with args beginning with: 'orders' 'payload' '{\"card\":4111}' "

    for error in (client.ResponseError(said), client.ExecAbortError(f"{PREFIX}{said}")):
        ours = of_reply(error, "adding", is_publish=True)
        assert "4111" not in str(ours)
        assert "unknown command 'XADD'" in str(ours)
        assert "under their own names" in ours.remedy


def test_what_tls_says_is_found_below_what_the_library_says() -> None:
    wrapped = client.ConnectionError("Error 1 connecting")
    wrapped.__context__ = ssl.SSLCertVerificationError(1, "unknown authority")

    error = of_exception(wrapped, "connecting")

    assert isinstance(error, ConfigurationError)
    assert "tls_ca" in str(error)


def test_an_error_of_ours_passes_unchanged() -> None:
    error = Outage("ours")

    with pytest.raises(Outage) as caught, mapped("connecting"):
        raise error

    assert caught.value is error


def test_a_mistake_in_our_own_code_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), mapped("connecting"):
        raise ZeroDivisionError
