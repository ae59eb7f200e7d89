"""Who we are to SQS: keys, temporary ones, the AWS chain, permissions, certificates, addresses."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aioboto3
import httpx
import pytest

from relay.errors import (
    AuthenticationRefused,
    ConfigurationError,
    DestinationMissing,
    Outage,
    RelayError,
)
from tests.contract.evidence import numbered
from tests.contract.sqs_broker import broker_of, lasting_queue, sink_of, source_of
from tests.servers.finding import free_port
from tests.servers.sqs import SqsServer
from tests.servers.tls import TlsFiles

ServerWith = Callable[..., SqsServer]
ROLES = pytest.mark.parametrize("role", ["sink", "source"])
CHECKING = {"INITIAL_NO_AUTH_ACTION_COUNT": "0"}
REGION = "eu-central-1"


async def reach(role: str, url: str, **keys: Any) -> None:
    """Connect, send or receive, and close. Raises what the sink or the source raises."""
    if role == "sink":
        sink = sink_of(url, **keys)
        try:
            await sink.connect()
            result = await sink.publish(numbered(1))
            if result.failures:
                raise result.failures[0].error
        finally:
            await sink.aclose()
    else:
        source = source_of(url, batch_size=10, batch_bytes=1000, **keys)
        try:
            await source.connect()
            await source.poll()
            await source.poll()
        finally:
            await source.aclose()


async def refused(role: str, url: str, **keys: Any) -> str:
    """What is said, on one line, when our credentials are refused."""
    with pytest.raises(AuthenticationRefused) as caught:
        await reach(role, url, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@dataclass(frozen=True)
class Account:
    """A queue on a server that checks credentials, and who may do what there."""

    url: str
    all_keys: Mapping[str, str]
    temporary_keys: Mapping[str, str]
    sending_keys: Mapping[str, str]


@pytest.fixture
async def account(sqs_server_with: ServerWith) -> Account:
    server = sqs_server_with(CHECKING)
    async with httpx.AsyncClient(trust_env=False) as client:
        # So many calls are let through before credentials are checked.
        await client.post(f"{server.url}/moto-api/reset-auth", content=b"10")
    session = aioboto3.Session(
        aws_access_key_id="any", aws_secret_access_key="any", region_name=REGION
    )
    name = uuid.uuid4().hex
    async with (
        session.client("iam", endpoint_url=server.url) as iam,
        session.client("sts", endpoint_url=server.url) as sts,
    ):
        users: list[Mapping[str, str]] = []
        for action in ("sqs:*", "sqs:SendMessage*"):
            user = f"{name}-{len(users)}"
            await iam.create_user(UserName=user)
            made = await iam.create_access_key(UserName=user)
            await iam.put_user_policy(
                UserName=user, PolicyName="p", PolicyDocument=_allowing(action)
            )
            users.append(made["AccessKey"])
        role = await iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        await iam.put_role_policy(RoleName=name, PolicyName="p", PolicyDocument=_allowing("sqs:*"))
        assumed = await sts.assume_role(RoleArn=role["Role"]["Arn"], RoleSessionName="relay")
    url = await lasting_queue(server)
    return Account(url, _keys(users[0]), _keys(assumed["Credentials"]), _keys(users[1]))


def _allowing(action: str) -> str:
    statement = {"Effect": "Allow", "Action": action, "Resource": "*"}
    return json.dumps({"Version": "2012-10-17", "Statement": [statement]})


def _keys(made: Mapping[str, str]) -> dict[str, str]:
    keys = {
        "region": REGION,
        "access_key_id": made["AccessKeyId"],
        "secret_access_key": made["SecretAccessKey"],
    }
    return keys | ({"session_token": made["SessionToken"]} if "SessionToken" in made else {})


@pytest.fixture
def no_chain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Nothing that the AWS chain could find."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return monkeypatch


@pytest.mark.shows("sink:sqs.access_key_id", "sink:sqs.secret_access_key")
@pytest.mark.shows("source:sqs.access_key_id", "source:sqs.secret_access_key")
@ROLES
async def test_keys_are_accepted_or_refused(account: Account, role: str) -> None:
    await reach(role, account.url, **account.all_keys)

    for wrong in ({"access_key_id": "AKIAUNKNOWN"}, {"secret_access_key": "hunter2"}):
        said = await refused(role, account.url, **{**account.all_keys, **wrong})
        assert "correct access_key_id" in said
        assert "hunter2" not in said


@pytest.mark.shows("sink:sqs.session_token", "source:sqs.session_token")
@ROLES
async def test_temporary_keys_need_their_token(account: Account, role: str) -> None:
    await reach(role, account.url, **account.temporary_keys)

    said = await refused(role, account.url, **{**account.temporary_keys, "session_token": "other"})
    assert "session_token" in said


async def test_who_may_only_send_can_send_and_a_missing_permission_is_said(
    account: Account,
) -> None:
    await reach("sink", account.url, **account.sending_keys)

    said = await refused("source", account.url, **account.sending_keys)
    assert "AccessDenied" in said
    assert "policy" in said


@ROLES
async def test_without_keys_the_aws_chain_is_asked(
    account: Account, role: str, no_chain: pytest.MonkeyPatch
) -> None:
    said = await refused(role, account.url, region=REGION)
    assert "set access_key_id" in said

    no_chain.setenv("AWS_ACCESS_KEY_ID", account.all_keys["access_key_id"])
    no_chain.setenv("AWS_SECRET_ACCESS_KEY", account.all_keys["secret_access_key"])
    await reach(role, account.url, region=REGION)


@pytest.mark.shows("sink:sqs.region", "source:sqs.region")
@ROLES
async def test_a_region_has_queues_of_its_own_and_is_never_guessed(
    sqs_server: SqsServer, role: str, no_chain: pytest.MonkeyPatch
) -> None:
    async with broker_of(sqs_server, is_fifo=True) as broker:
        keys = broker.keys
        await reach(role, broker.url, **keys)

        with pytest.raises(DestinationMissing):
            await reach(role, broker.url, **{**keys, "region": "us-west-2"})
        del keys["region"]
        with pytest.raises(ConfigurationError, match="region is missing"):
            await reach(role, broker.url, **keys)
        no_chain.setenv("AWS_DEFAULT_REGION", sqs_server.region)
        await reach(role, broker.url, **keys)


@pytest.mark.shows("sink:sqs.queue_url", "source:sqs.queue_url")
@ROLES
async def test_a_queue_that_does_not_exist_is_named_on_one_line(
    sqs_server: SqsServer, role: str
) -> None:
    url = f"{sqs_server.url}/123456789012/absent"

    with pytest.raises(DestinationMissing, match="absent") as caught:
        await reach(role, url, region=sqs_server.region, **sqs_server.keys)
    assert "queue_url" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.shows("sink:sqs.endpoint_url", "source:sqs.endpoint_url")
@ROLES
async def test_requests_go_to_the_endpoint_that_is_said(sqs_server: SqsServer, role: str) -> None:
    async with broker_of(sqs_server, is_fifo=True) as broker:
        name = broker.url.rpartition("/")[2]
        url = f"https://sqs.{sqs_server.region}.amazonaws.com/123456789012/{name}"

        await reach(role, url, endpoint_url=sqs_server.url, **sqs_server.keys)


@ROLES
async def test_a_server_that_is_away_is_an_outage_that_names_it_on_one_line(role: str) -> None:
    for host in (f"127.0.0.1:{free_port()}", "nowhere.invalid:7"):
        with pytest.raises(Outage, match=host.partition(":")[0]) as caught:
            await reach(
                role,
                f"http://{host}/1/orders",
                region=REGION,
                access_key_id="any",
                secret_access_key="hunter2",
            )
        assert "hunter2" not in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.shows("sink:sqs.tls_ca", "sink:sqs.tls_insecure")
@pytest.mark.shows("source:sqs.tls_ca", "source:sqs.tls_insecure")
@ROLES
async def test_an_unknown_certificate_is_refused_unless_its_authority_is_named_or_any_will_do(
    sqs_server_with: ServerWith, tls_files: TlsFiles, role: str
) -> None:
    server = sqs_server_with(tls=tls_files)
    url = await lasting_queue(server, tls_ca=str(tls_files.authority))
    keys = {"region": server.region, **server.keys}

    with pytest.raises(ConfigurationError, match="not trusted"):
        await reach(role, url, **keys)
    await reach(role, url, tls_ca=str(tls_files.authority), **keys)
    await reach(role, url, tls_insecure=True, **keys)


@asynccontextmanager
async def demanding_a_certificate(server: SqsServer, files: TlsFiles) -> AsyncIterator[str]:
    """The address of a front that lets in who has a certificate of the authority."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=files.authority)
    context.load_cert_chain(files.server_certificate, files.server_key)
    context.verify_mode = ssl.CERT_REQUIRED
    open_now: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(65536):
            writer.write(chunk)
            await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_now.add(task)
        back_reader, back_writer = await asyncio.open_connection(*server.address)
        try:
            both = [
                asyncio.create_task(pump(reader, back_writer)),
                asyncio.create_task(pump(back_reader, writer)),
            ]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        finally:
            for end in (writer, back_writer):
                end.transport.abort()
                with contextlib.suppress(OSError):
                    await end.wait_closed()
            open_now.discard(task)

    front = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield f"https://127.0.0.1:{front.sockets[0].getsockname()[1]}"
    finally:
        front.close()
        if open_now:
            await asyncio.wait(open_now, timeout=10)


@pytest.mark.shows("sink:sqs.tls_cert", "sink:sqs.tls_key")
@pytest.mark.shows("source:sqs.tls_cert", "source:sqs.tls_key")
@ROLES
async def test_a_client_certificate_is_accepted_and_its_absence_refused(
    sqs_server: SqsServer, tls_files: TlsFiles, role: str
) -> None:
    async with (
        broker_of(sqs_server, is_fifo=True) as broker,
        demanding_a_certificate(sqs_server, tls_files) as front,
    ):
        keys = {**broker.keys, "endpoint_url": front, "tls_ca": str(tls_files.authority)}

        await reach(
            role,
            broker.url,
            tls_cert=str(tls_files.client_certificate),
            tls_key=str(tls_files.client_key),
            **keys,
        )
        with pytest.raises(RelayError) as caught:
            await reach(role, broker.url, **keys)
        assert isinstance(caught.value, AuthenticationRefused | Outage)


async def test_tls_files_that_do_not_exist_are_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="TLS files"):
        await reach("sink", "https://127.0.0.1:1/1/q", tls_ca=str(tmp_path / "absent.pem"))


@pytest.mark.shows("sink:sqs.timeout_ms", "source:sqs.timeout_ms")
@ROLES
async def test_a_server_that_never_answers_is_given_up_in_time(role: str) -> None:
    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            pass
        writer.close()
        is_closed.set()

    is_closed = asyncio.Event()
    server = await asyncio.start_server(be_silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    started = time.monotonic()

    with pytest.raises(Outage):
        await reach(
            role,
            f"http://127.0.0.1:{port}/1/orders",
            timeout_ms=1500,
            region=REGION,
            access_key_id="any",
            secret_access_key="any",
        )

    assert time.monotonic() - started < 8
    async with asyncio.timeout(5):
        await is_closed.wait()
    server.close()
    await server.wait_closed()
