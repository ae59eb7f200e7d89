"""Redis servers for the tests.

The local server is the distribution's binary, on loopback, with an append-only file that is
synced at every write, in a directory of its own; stopped, killed and started again it keeps its
address and its streams.
"""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from docker.errors import DockerException

from tests.servers.finding import (
    LOOPBACK,
    NotControllable,
    ServerControl,
    ServerMissing,
    address_in_environment,
    free_port,
    is_docker_running,
    warn_of_docker,
)

IMAGE = "redis:7.4"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0

_DURABLE = 'appendonly yes\nappendfsync always\nsave ""\nprotected-mode no\n'


@dataclass(frozen=True)
class RedisServer:
    """A running Redis server.

    `start`, `stop`, `kill` and `restart` block; from a coroutine use `asyncio.to_thread`.
    `tls_port` is where it speaks TLS, 0 where it does not.
    """

    url: str
    version: str
    origin: str
    control: ServerControl
    tls_port: int = 0

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, without TLS."""
        parts = urlsplit(self.url)
        return parts.hostname or LOOPBACK, parts.port or 6379

    def start(self) -> None:
        """Start the stopped or killed server and wait until it answers."""
        self.control.start()

    def stop(self) -> None:
        """Shut down in order and wait until the server is gone."""
        self.control.stop()

    def kill(self) -> None:
        """SIGKILL: the append-only file is what is left."""
        self.control.kill()

    def restart(self) -> None:
        """Stop and start on the same address, with the same streams."""
        self.control.stop()
        self.control.start()


def find_redis() -> RedisServer:
    """Find and start the Redis server of this run; raises `ServerMissing`."""
    address = address_in_environment("REDIS")
    if address is not None:
        parts = urlsplit(address)
        return RedisServer(
            url=address,
            version=_version(parts.hostname or LOOPBACK, parts.port or 6379),
            origin="address in the environment",
            control=NotControllable("Redis"),
        )
    return configured_redis("")


def configured_redis(
    configuration: str, files: Mapping[str, bytes] | None = None, *, is_tls: bool = False
) -> RedisServer:
    """Start a Redis server of its own with these extra lines of configuration.

    `files` are written into the server's working directory, so that the configuration can name
    them by their bare name; with `is_tls` they hold ``server.pem``, ``server.key`` and
    ``authority.pem``, and a second port speaks TLS. The caller closes it with `control.close()`.
    Raises `ServerMissing`.
    """
    if is_docker_running():
        try:
            container = DockerRedis(configuration, files or {}, is_tls=is_tls)
            return _started(container, container.port, container.tls_port, f"Docker, {IMAGE}")
        except DockerException as failure:
            warn_of_docker(IMAGE, failure)
    binary = _binary()
    local = LocalRedis(binary, configuration, files or {}, is_tls=is_tls)
    return _started(local, local.port, local.tls_port, f"local, {binary}")


def _started(control: ServerControl, port: int, tls_port: int, origin: str) -> RedisServer:
    try:
        control.start()
        version = _version(LOOPBACK, port)
    except BaseException:
        control.close()
        raise
    return RedisServer(
        url=f"redis://{LOOPBACK}:{port}",
        version=version,
        origin=origin,
        control=control,
        tls_port=tls_port,
    )


class LocalRedis:
    """A Redis process of ours; its streams live as long as this object."""

    def __init__(
        self, binary: Path, configuration: str, files: Mapping[str, bytes], *, is_tls: bool
    ) -> None:
        self.port = free_port()
        self.tls_port = free_port() if is_tls else 0
        self._binary = binary
        self._directory = Path(tempfile.mkdtemp(prefix="pgt-redis-"))
        self._log = self._directory / "redis.log"
        _write_configuration(
            self._directory, LOOPBACK, (self.port, self.tls_port), configuration, files
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, "redis.conf"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                # Ctrl-C in the terminal belongs to the tests, which then stop the server.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if _does_answer(self.port):
                return
            time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"Redis did not start:\n{self._log.read_text(errors='replace')}")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


class DockerRedis:
    """A Redis container on fixed ports, so that a restart keeps its address."""

    def __init__(self, configuration: str, files: Mapping[str, bytes], *, is_tls: bool) -> None:
        from testcontainers.core.container import DockerContainer

        self.port = free_port()
        self.tls_port = free_port() if is_tls else 0
        self._directory = Path(tempfile.mkdtemp(prefix="pgt-redis-"))
        # The image's user writes the append-only file here.
        self._directory.chmod(0o777)
        inside = (6379, 6380 if is_tls else 0)
        _write_configuration(self._directory, "0.0.0.0", inside, configuration, files)
        self._container = (
            DockerContainer(IMAGE)
            .with_bind_ports(6379, self.port)
            .with_volume_mapping(str(self._directory), "/relay", "rw")
            .with_command("redis-server redis.conf")
            .with_kwargs(working_dir="/relay")
        )
        if is_tls:
            self._container = self._container.with_bind_ports(6380, self.tls_port)
        self._is_created = False

    def start(self) -> None:
        if self._is_created:
            self._container.get_wrapped_container().start()
        else:
            self._is_created = True
            self._container.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _does_answer(self.port):
            if time.monotonic() > deadline:
                raise RuntimeError("Redis did not start in Docker")
            time.sleep(0.05)

    def stop(self) -> None:
        self._container.get_wrapped_container().stop(timeout=int(STOP_TIMEOUT_S))

    def kill(self) -> None:
        self._container.get_wrapped_container().kill("SIGKILL")
        self._container.get_wrapped_container().wait(timeout=STOP_TIMEOUT_S)

    def close(self) -> None:
        if self._is_created:
            self._container.stop()
        shutil.rmtree(self._directory, ignore_errors=True)


def _write_configuration(
    directory: Path,
    host: str,
    ports: tuple[int, int],
    configuration: str,
    files: Mapping[str, bytes],
) -> None:
    for name, content in files.items():
        path = directory / name
        path.write_bytes(content)
        path.chmod(0o644)
    port, tls_port = ports
    tls = (
        f"tls-port {tls_port}\ntls-cert-file server.pem\ntls-key-file server.key\n"
        "tls-ca-cert-file authority.pem\ntls-auth-clients optional\n"
        if tls_port
        else ""
    )
    # What comes later wins.
    (directory / "redis.conf").write_text(
        f"bind {host}\nport {port}\n{_DURABLE}{tls}{configuration}\n"
    )


def _does_answer(port: int) -> bool:
    """Whether a server there is ready; one that asks for a password is."""
    try:
        answer = _asked(LOOPBACK, port, b"PING\r\n")
    except OSError:
        return False
    return answer.startswith((b"+PONG", b"-NOAUTH"))


def _version(host: str, port: int) -> str:
    found = re.search(rb"redis_version:(\S+)", _asked(host, port, b"INFO server\r\n"))
    return found[1].decode() if found else "unknown"


def _asked(host: str, port: int, command: bytes) -> bytes:
    """The beginning of the answer to one command."""
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.sendall(command)
        return connection.recv(4096)


def _binary() -> Path:
    on_path = shutil.which("redis-server")
    if on_path is None:
        raise ServerMissing("apt-get install redis-server, or set PGTRICKLE_TEST_REDIS_URL")
    return Path(on_path)
