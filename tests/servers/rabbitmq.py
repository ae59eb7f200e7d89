"""RabbitMQ nodes for the tests.

The local node is the distribution's server, on loopback, with a plain and a TLS listener, users
made at its first start, an epmd of its own and everything it writes in a directory of its own;
stopped, killed and started again it keeps its address and its durable queues.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from docker.errors import DockerException
from pamqp import commands, frame
from pamqp.header import ProtocolHeader

from tests.servers.finding import (
    LOOPBACK,
    NotControllable,
    ServerControl,
    ServerMissing,
    address_in_environment,
    free_port,
    is_docker_running,
    leave_out,
    warn_of_docker,
)
from tests.servers.tls import TlsFiles, write_tls_files

IMAGE = "rabbitmq:4.0"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 30.0

MAX_MESSAGE_BYTES = 24 * 1024 * 1024
"""The node's limit, above the largest document that has to pass."""

USERS: Mapping[str, tuple[str, tuple[str, str, str] | None]] = {
    "guest": ("guest", (".*", ".*", ".*")),
    # The name in the client's certificate, and a password that has to be escaped in a URL.
    "relay": ("s3cret/@", (".*", ".*", ".*")),
    # May neither make nor change anything.
    "modest": ("p", ("", ".*", ".*")),
    "reader": ("p", ("", "", ".*")),
    "writer": ("p", ("", ".*", "")),
    "stranger": ("p", None),
}
"""Name to password and to what it may configure, write and read in ``/``."""

_BINARIES = Path("/usr/lib/rabbitmq/bin")
_CONFIGURATION = """
listeners.tcp.1 = {host}:{port}
listeners.ssl.1 = {host}:{tls_port}
ssl_options.cacertfile = {directory}/authority.pem
ssl_options.certfile = {directory}/server.pem
ssl_options.keyfile = {directory}/server.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = false
ssl_cert_login_from = common_name
auth_mechanisms.1 = PLAIN
auth_mechanisms.2 = EXTERNAL
loopback_users.guest = false
load_definitions = {directory}/definitions.json
max_message_size = {max_message_bytes}
disk_free_limit.absolute = 1MB
vm_memory_high_watermark.absolute = 2GB
log.console = true
log.console.level = warning
log.file = false
"""


class RabbitControl(ServerControl, Protocol):
    """A node that can also be told things with ``rabbitmqctl``."""

    def tell(self, *arguments: str) -> str: ...


@dataclass(frozen=True)
class RabbitServer:
    """A running RabbitMQ node.

    `start`, `stop`, `kill`, `restart` and `tell` block; from a coroutine use `asyncio.to_thread`.
    ``tls_port`` is where it speaks TLS, 0 where it does not; ``tls_files`` are the certificates.
    """

    url: str
    version: str
    origin: str
    control: RabbitControl
    tls_port: int = 0
    tls_files: TlsFiles | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, without TLS."""
        parts = urlsplit(self.url)
        return parts.hostname or LOOPBACK, parts.port or 5672

    def url_of(self, user: str) -> str:
        """The node's address without credentials in it, for a user of `USERS`."""
        host, port = self.address
        assert user in USERS
        return f"amqp://{host}:{port}"

    def start(self) -> None:
        """Start the stopped or killed node and wait until it answers."""
        self.control.start()

    def stop(self) -> None:
        """Shut down in order and wait until the node is gone."""
        self.control.stop()

    def kill(self) -> None:
        """SIGKILL: durable queues with their persistent messages are what is left."""
        self.control.kill()

    def restart(self) -> None:
        """Stop and start on the same address, with the same durable queues."""
        self.control.stop()
        self.control.start()

    def tell(self, *arguments: str) -> str:
        """What ``rabbitmqctl`` answers."""
        return self.control.tell(*arguments)


class _NotTellable(NotControllable):
    def tell(self, *_: str) -> str:
        leave_out(f"{self.server} comes from the environment and is not administered by a test")


def find_rabbitmq() -> RabbitServer:
    """Find and start the RabbitMQ node of this run; raises `ServerMissing`."""
    address = address_in_environment("RABBITMQ")
    if address is not None:
        parts = urlsplit(address)
        return RabbitServer(
            url=address,
            version=_version(parts.hostname or LOOPBACK, parts.port or 5672),
            origin="address in the environment",
            control=_NotTellable("RabbitMQ"),
        )
    if is_docker_running():
        try:
            container = DockerRabbit()
            return _started(container, container.listening, f"Docker, {IMAGE}")
        except DockerException as failure:
            warn_of_docker(IMAGE, failure)
    server = _binary("rabbitmq-server")
    local = LocalRabbit(server.parent)
    return _started(local, local.listening, f"local, {server}")


@dataclass(frozen=True)
class _Listening:
    """Where a node listens, and the directory with all that belongs to it."""

    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="pgt-rabbitmq-")))
    port: int = field(default_factory=free_port)
    tls_port: int = field(default_factory=free_port)

    def write(self, inside: Path, host: str, ports: tuple[int, int]) -> TlsFiles:
        """Write the node's configuration; ``inside`` is the directory as the node sees it."""
        files = write_tls_files(self.directory)
        (self.directory / "enabled_plugins").write_text("[rabbitmq_auth_mechanism_ssl].\n")
        (self.directory / "definitions.json").write_text(json.dumps(_definitions()))
        (self.directory / "rabbitmq.conf").write_text(
            _CONFIGURATION.format(
                host=host,
                port=ports[0],
                tls_port=ports[1],
                directory=inside,
                max_message_bytes=MAX_MESSAGE_BYTES,
            )
        )
        return files


def _started(control: LocalRabbit | DockerRabbit, where: _Listening, origin: str) -> RabbitServer:
    try:
        control.start()
        version = _version(LOOPBACK, where.port)
    except BaseException:
        control.close()
        raise
    return RabbitServer(
        url=f"amqp://{LOOPBACK}:{where.port}",
        version=version,
        origin=origin,
        control=control,
        tls_port=where.tls_port,
        tls_files=control.tls_files,
    )


class LocalRabbit:
    """A node of ours and its epmd; its queues live as long as this object."""

    def __init__(self, binaries: Path) -> None:
        self.listening = _Listening()
        directory = self.listening.directory
        self.tls_files = self.listening.write(
            directory, LOOPBACK, (self.listening.port, self.listening.tls_port)
        )
        self._binaries = binaries
        self._log = directory / "node.log"
        self._epmd_port = free_port()
        self._node: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self._environment = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": str(directory),
            # The script becomes the virtual machine then, so that it can be waited for.
            "RUNNING_UNDER_SYSTEMD": "true",
            "LANG": "C.UTF-8",
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "RABBITMQ_NODENAME": f"{directory.name}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_MNESIA_BASE": str(directory / "data"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            # An idle node shall not take a share of the machine.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none"
                " -kernel inet_dist_use_interface {127,0,0,1}"
            ),
        }

    def start(self) -> None:
        if self._node is not None:
            return
        self._start_epmd()
        with self._log.open("ab") as log:
            self._node = subprocess.Popen(
                [self._binaries / "rabbitmq-server"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.listening.directory,
                env=self._environment,
                # Ctrl-C in the terminal belongs to the tests, which then stop the server.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._node.poll() is None:
            if _does_answer(self.listening.port) and _does_listen(self.listening.tls_port):
                return
            time.sleep(0.05)
        self.kill()
        raise RuntimeError(f"RabbitMQ did not start:\n{self._log.read_text(errors='replace')}")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        if self._epmd is not None:
            self._epmd.kill()
            self._epmd.wait()
            self._epmd = None
        shutil.rmtree(self.listening.directory, ignore_errors=True)

    def tell(self, *arguments: str) -> str:
        told = subprocess.run(
            [self._binaries / "rabbitmqctl", "--quiet", *arguments],
            env=self._environment,
            cwd=self.listening.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        assert told.returncode == 0, told.stderr
        return told.stdout

    def _start_epmd(self) -> None:
        """Our own one, in the foreground: the node would leave one behind as a daemon."""
        if self._epmd is not None:
            return
        self._epmd = subprocess.Popen(
            [_binary("epmd"), "-port", str(self._epmd_port), "-address", LOOPBACK],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _does_listen(self._epmd_port):
            if time.monotonic() > deadline or self._epmd.poll() is not None:
                raise RuntimeError("epmd did not start")
            time.sleep(0.01)

    def _end(self, number: signal.Signals) -> None:
        if self._node is None:
            return
        node, self._node = self._node, None
        node.send_signal(number)
        try:
            node.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()
        # The helper processes of the virtual machine end by themselves, unless it was killed.
        with suppress(ProcessLookupError):
            os.killpg(node.pid, signal.SIGKILL)


class DockerRabbit:
    """A RabbitMQ container on fixed ports, so that a restart keeps its address."""

    def __init__(self) -> None:
        from testcontainers.core.container import DockerContainer

        self.listening = _Listening()
        directory = self.listening.directory
        inside = Path("/relay")
        self.tls_files = self.listening.write(inside, "0.0.0.0", (5672, 5671))
        # The image's user reads what we write here.
        directory.chmod(0o755)
        for path in directory.iterdir():
            path.chmod(0o644)
        self._container = (
            DockerContainer(IMAGE)
            .with_bind_ports(5672, self.listening.port)
            .with_bind_ports(5671, self.listening.tls_port)
            .with_volume_mapping(str(directory), str(inside), "ro")
            .with_env("RABBITMQ_CONFIG_FILE", f"{inside}/rabbitmq.conf")
            .with_env("RABBITMQ_ENABLED_PLUGINS_FILE", f"{inside}/enabled_plugins")
            .with_env("RABBITMQ_NODENAME", "relay@localhost")
        )
        self._is_created = False

    def start(self) -> None:
        if self._is_created:
            self._container.get_wrapped_container().start()
        else:
            self._is_created = True
            self._container.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _does_answer(self.listening.port):
            if time.monotonic() > deadline:
                raise RuntimeError("RabbitMQ did not start in Docker")
            time.sleep(0.1)

    def stop(self) -> None:
        self._container.get_wrapped_container().stop(timeout=int(STOP_TIMEOUT_S))

    def kill(self) -> None:
        self._container.get_wrapped_container().kill("SIGKILL")
        self._container.get_wrapped_container().wait(timeout=STOP_TIMEOUT_S)

    def close(self) -> None:
        if self._is_created:
            self._container.stop()
        shutil.rmtree(self.listening.directory, ignore_errors=True)

    def tell(self, *arguments: str) -> str:
        code, output = self._container.exec(["rabbitmqctl", "--quiet", *arguments])
        assert code == 0, output.decode(errors="replace")
        text: str = output.decode(errors="replace")
        return text


def _definitions() -> Mapping[str, object]:
    permitted = {name: rights for name, (_, rights) in USERS.items() if rights is not None}
    return {
        "vhosts": [{"name": "/"}, {"name": "other/place"}],
        "users": [
            {
                "name": name,
                "password_hash": _hashed(password),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": "",
            }
            for name, (password, _) in USERS.items()
        ],
        "permissions": [
            {
                "user": name,
                "vhost": vhost,
                "configure": rights[0],
                "write": rights[1],
                "read": rights[2],
            }
            for name, rights in permitted.items()
            for vhost in (("/", "other/place") if name in ("guest", "relay") else ("/",))
        ],
    }


def _hashed(password: str) -> str:
    salt = b"\x01\x02\x03\x04"
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def _does_listen(port: int) -> bool:
    try:
        socket.create_connection((LOOPBACK, port), timeout=5).close()
    except OSError:
        return False
    return True


def _does_answer(port: int) -> bool:
    """Whether a node there greets, which it does only when its queues are up."""
    try:
        return bool(_greeting(LOOPBACK, port))
    except OSError:
        return False


def _version(host: str, port: int) -> str:
    _, _, start = frame.unmarshal(_greeting(host, port))
    assert isinstance(start, commands.Connection.Start)
    return str((start.server_properties or {}).get("version", "unknown"))


def _greeting(host: str, port: int) -> bytes:
    """The frame with which a node begins; empty where none comes."""
    greeting = b""
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(ProtocolHeader(0, 9, 1).marshal())
        while len(greeting) < 7 or len(greeting) < 8 + int.from_bytes(greeting[3:7], "big"):
            arrived = connection.recv(4096)
            if not arrived:
                return b""
            greeting += arrived
    return greeting


def _binary(name: str) -> Path:
    beside = _BINARIES / name
    if beside.exists():
        return beside
    on_path = shutil.which(name) or shutil.which(name, path="/opt/homebrew/sbin:/usr/local/sbin")
    if on_path is None:
        raise ServerMissing("apt-get install rabbitmq-server, or set PGTRICKLE_TEST_RABBITMQ_URL")
    return Path(on_path)
