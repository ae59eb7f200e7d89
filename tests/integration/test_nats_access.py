"""Who we are to a NATS server: each kind of authentication, permissions, certificates."""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import nkeys
import pytest

from relay.errors import AuthenticationRefused, ConfigurationError, Outage, RelayError
from tests.contract.evidence import numbered
from tests.contract.nats_broker import sink_of, source_of
from tests.servers.finding import free_port
from tests.servers.nats import NatsServer
from tests.servers.tls import TlsFiles

ServerWith = Callable[..., NatsServer]

TLS = 'tls { cert_file: "server.pem", key_file: "server.key" }'
MUTUAL_TLS = TLS.replace("}", ', ca_file: "authority.pem", verify: true }')


@dataclass(frozen=True)
class Key:
    """An nkey: its seed and its public key."""

    seed: str
    public: str

    def sign(self, text: bytes) -> bytes:
        return bytes(nkeys.from_seed(bytearray(self.seed.encode())).sign(text))


def new_key(prefix: int) -> Key:
    seed = bytes(nkeys.encode_seed(os.urandom(32), prefix)).decode()
    public = bytes(nkeys.from_seed(bytearray(seed.encode())).public_key).decode()
    return Key(seed, public)


def token_of(issuer: Key, subject: Key, name: str, claims: dict[str, object]) -> str:
    """A signed JWT as NATS defines it (https://docs.nats.io/running-a-nats-service/nats_admin/security/jwt)."""

    def part(value: object) -> bytes:
        return base64.urlsafe_b64encode(msgspec.json.encode(value)).rstrip(b"=")

    body: dict[str, object] = {
        "iat": int(time.time()),
        "iss": issuer.public,
        "sub": subject.public,
        "name": name,
        "nats": {"version": 2, **claims},
    }
    body["jti"] = base64.b32encode(hashlib.sha256(msgspec.json.encode(body)).digest()).decode()[:52]
    signed = part({"typ": "JWT", "alg": "ed25519-nkey"}) + b"." + part(body)
    signature = base64.urlsafe_b64encode(issuer.sign(signed)).rstrip(b"=")
    return (signed + b"." + signature).decode()


@dataclass(frozen=True)
class Operated:
    """A server under an operator, and the credentials of one of its users."""

    configuration: str
    credentials: str


def operated() -> Operated:
    operator = new_key(nkeys.PREFIX_BYTE_OPERATOR)
    system, account = new_key(nkeys.PREFIX_BYTE_ACCOUNT), new_key(nkeys.PREFIX_BYTE_ACCOUNT)
    user = new_key(nkeys.PREFIX_BYTE_USER)
    unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
    storage = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
    operator_token = token_of(
        operator, operator, "operator", {"type": "operator", "system_account": system.public}
    )
    account_token = token_of(
        operator,
        account,
        "account",
        {"type": "account", "limits": {**unlimited, **storage, "wildcards": True}},
    )
    system_token = token_of(operator, system, "system", {"type": "account", "limits": unlimited})
    user_token = token_of(
        account, user, "relay", {"type": "user", "subs": -1, "data": -1, "payload": -1}
    )
    return Operated(
        f"operator: {operator_token}\nsystem_account: {system.public}\nresolver: MEMORY\n"
        f"resolver_preload: {{ {system.public}: {system_token}\n"
        f"{account.public}: {account_token} }}",
        f"-----BEGIN NATS USER JWT-----\n{user_token}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n",
    )


async def reach(server: NatsServer, url: str | None = None, **keys: object) -> None:
    """Connect, publish one message and close. Raises what the sink raises."""
    options: dict[str, object] = {"stream": "access", "create_stream": True, **keys}
    sink = sink_of(url or server.url, ordering=None, namespace="", **options)
    await sink.connect()
    try:
        result = await sink.publish(numbered(1))
        if result.failures:
            raise result.failures[0].error
    finally:
        await sink.aclose()


@pytest.mark.shows("sink:nats.user", "sink:nats.password", "error:AuthenticationRefused")
async def test_user_and_password_are_accepted_or_refused(nats_server_with: ServerWith) -> None:
    server = nats_server_with('authorization { user: "relay", password: "s3cret/@" }')

    await reach(server, user="relay", password="s3cret/@")
    await reach(server, url=server.url.replace("//", "//relay:s3cret%2F%40@"))
    for keys in ({}, {"user": "relay", "password": "wrong-one"}):
        with pytest.raises(AuthenticationRefused) as caught:
            await reach(server, **keys)
        assert "wrong-one" not in str(caught.value)


@pytest.mark.shows("sink:nats.token")
async def test_a_token_is_accepted_or_refused(nats_server_with: ServerWith) -> None:
    server = nats_server_with('authorization { token: "t0ken-of-ours" }')

    await reach(server, token="t0ken-of-ours")
    with pytest.raises(AuthenticationRefused):
        await reach(server, token="another")


@pytest.mark.shows("sink:nats.nkey_seed")
async def test_an_nkey_seed_is_accepted_or_refused(nats_server_with: ServerWith) -> None:
    ours, another = (new_key(nkeys.PREFIX_BYTE_USER) for _ in range(2))
    server = nats_server_with(f"authorization {{ users: [ {{ nkey: {ours.public} }} ] }}")

    await reach(server, nkey_seed=ours.seed)
    with pytest.raises(AuthenticationRefused):
        await reach(server, nkey_seed=another.seed)
    with pytest.raises(AuthenticationRefused) as caught:
        await reach(server, nkey_seed="SUAnotaseed")
    assert "SUAnotaseed" not in str(caught.value)


@pytest.mark.shows("sink:nats.creds_file")
async def test_a_credentials_file_is_accepted_or_refused(
    nats_server_with: ServerWith, tmp_path: Path
) -> None:
    ours, another = operated(), operated()
    server = nats_server_with(ours.configuration)
    good, bad = tmp_path / "good.creds", tmp_path / "bad.creds"
    good.write_text(ours.credentials)
    bad.write_text(another.credentials)

    await reach(server, creds_file=str(good))
    with pytest.raises(AuthenticationRefused):
        await reach(server, creds_file=str(bad))


@pytest.mark.parametrize("content", [None, "", "-----BEGIN NATS USER JWT-----\nabc\n"])
async def test_a_credentials_file_that_is_none_is_a_configuration_error(
    nats_server: NatsServer, tmp_path: Path, content: str | None
) -> None:
    path = tmp_path / "some.creds"
    if content is not None:
        path.write_text(content)

    with pytest.raises(ConfigurationError, match=r"some\.creds"):
        await reach(nats_server, creds_file=str(path))


async def test_a_missing_permission_to_publish_is_said_at_once(
    nats_server_with: ServerWith,
) -> None:
    server = nats_server_with(
        'authorization { users: [ { user: "relay", password: "p", permissions: {'
        ' publish: ["$JS.API.>", "orders.allowed"], subscribe: ["_INBOX.>"] } } ] }'
    )
    started = time.monotonic()

    with pytest.raises(AuthenticationRefused, match=r"orders\.insert"):
        await reach(server, user="relay", password="p")

    assert time.monotonic() - started < 3


async def test_a_missing_permission_to_receive_acknowledgements_is_said_on_connecting(
    nats_server_with: ServerWith,
) -> None:
    server = nats_server_with(
        'authorization { users: [ { user: "relay", password: "p", permissions: {'
        ' publish: [">"], subscribe: ["nothing"] } } ] }'
    )

    with pytest.raises(AuthenticationRefused, match=r"(?i)subscription"):
        await reach(server, user="relay", password="p")


@pytest.mark.shows("sink:nats.tls_ca", "sink:nats.tls_cert", "sink:nats.tls_key")
async def test_a_client_certificate_is_accepted_and_its_absence_refused(
    nats_server_with: ServerWith, tls_files: TlsFiles
) -> None:
    server = nats_server_with(MUTUAL_TLS, tls_files.contents())
    ca = str(tls_files.authority)

    await reach(
        server,
        tls_ca=ca,
        tls_cert=str(tls_files.client_certificate),
        tls_key=str(tls_files.client_key),
    )
    with pytest.raises(RelayError) as caught:
        await reach(server, tls_ca=ca)
    assert isinstance(caught.value, AuthenticationRefused | Outage)


@pytest.mark.shows("sink:nats.tls")
async def test_tls_is_never_silently_left_out(nats_server: NatsServer) -> None:
    for url in (nats_server.url, nats_server.url.replace("nats://", "tls://")):
        with pytest.raises(ConfigurationError, match="the server offers none"):
            await reach(nats_server, url=url, tls=True)


@pytest.mark.shows("sink:nats.tls_insecure")
async def test_a_server_that_demands_tls_with_an_unknown_certificate_is_refused(
    nats_server_with: ServerWith, tls_files: TlsFiles
) -> None:
    server = nats_server_with(TLS, tls_files.contents())

    with pytest.raises(ConfigurationError, match="not trusted"):
        await reach(server)
    await reach(server, tls_insecure=True)


async def test_tls_files_that_do_not_exist_are_a_configuration_error(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match="TLS files"):
        await reach(nats_server, tls_ca=str(tmp_path / "absent.pem"))


@pytest.mark.shows("source:nats.url", "source:nats.stream")
async def test_of_several_servers_any_reachable_one_will_do(nats_server: NatsServer) -> None:
    nobody = f"nats://127.0.0.1:{free_port()}"

    for _ in range(5):
        source = source_of(f"{nobody},{nats_server.url},{nobody}", stream="nowhere")
        with pytest.raises(ConfigurationError, match="nowhere"):
            await source.connect()
        await source.aclose()


@pytest.mark.shows("sink:nats.url", "error:Outage")
async def test_a_server_that_is_away_is_an_outage_that_names_it(nats_server: NatsServer) -> None:
    port = free_port()

    with pytest.raises(Outage, match=str(port)):
        await reach(nats_server, url=f"nats://me:hunter2@127.0.0.1:{port}")
