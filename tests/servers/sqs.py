"""SQS servers for the tests: moto's, on loopback.

moto keeps queues in memory, so a server that is stopped has lost them; a restart that keeps them
is shown through a proxy instead. It trusts any credentials unless it is told to check them.
"""

from __future__ import annotations

import http.client
import importlib.metadata
import importlib.util
import json
import os
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
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
from tests.servers.process import REPOSITORY
from tests.servers.tls import TlsFiles

IMAGE = "motoserver/moto:5.2.0"
REGION = "eu-central-1"
START_TIMEOUT_S = 60.0

ANY_KEYS: Mapping[str, str] = {"access_key_id": "any", "secret_access_key": "any"}


@dataclass(frozen=True)
class SqsServer:
    """A running SQS server at `url`; `keys` are credentials that it accepts, as a sink's keys."""

    url: str
    version: str
    origin: str
    control: ServerControl
    region: str = REGION
    keys: Mapping[str, str] = field(default_factory=lambda: ANY_KEYS)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or LOOPBACK, parts.port or (443 if parts.scheme == "https" else 80)


def find_sqs() -> SqsServer:
    """Find and start the SQS server of this run; raises `ServerMissing`.

    With an address in the environment the usual AWS variables say region and credentials.
    """
    address = address_in_environment("SQS")
    if address is not None:
        return SqsServer(
            url=address,
            version=urlsplit(address).netloc,
            origin="address in the environment",
            control=NotControllable("SQS"),
            region=os.environ.get("AWS_DEFAULT_REGION", REGION),
            keys={
                "access_key_id": os.environ.get("AWS_ACCESS_KEY_ID", "any"),
                "secret_access_key": os.environ.get("AWS_SECRET_ACCESS_KEY", "any"),
            },
        )
    if is_docker_running():
        try:
            return _started(DockerSqs(), f"Docker, {IMAGE}")
        except DockerException as failure:
            warn_of_docker(IMAGE, failure)
    return configured_sqs()


def configured_sqs(
    environment: Mapping[str, str] | None = None, tls: TlsFiles | None = None
) -> SqsServer:
    """Start a moto of its own with these variables in its environment, with `tls` over HTTPS.

    The caller closes it with `control.close()`. Raises `ServerMissing`.
    """
    if importlib.util.find_spec("moto") is None:
        raise ServerMissing("pip install 'moto[server,sqs]', or set PGTRICKLE_TEST_SQS_URL")
    return _started(LocalSqs(environment or {}, tls), "local process")


def _started(control: LocalSqs | DockerSqs, origin: str) -> SqsServer:
    try:
        control.start()
    except BaseException:
        control.close()
        raise
    version = f"moto {importlib.metadata.version('moto')}"
    return SqsServer(control.url, version, origin, control)


class LocalSqs:
    """A moto process of ours."""

    def __init__(self, environment: Mapping[str, str], tls: TlsFiles | None) -> None:
        self.port = free_port()
        self.url = f"http{'s' if tls else ''}://{LOOPBACK}:{self.port}"
        self._environment = environment
        self._tls = tls
        descriptor, log = tempfile.mkstemp(prefix="pgt-sqs-", suffix=".log")
        os.close(descriptor)
        self._log = Path(log)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        tls = self._tls
        certificate = () if tls is None else ("-c", tls.server_certificate, "-k", tls.server_key)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "tests.servers.sqs_program"),
                    *("-H", LOOPBACK, "-p", str(self.port), *certificate),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
                env={**os.environ, **self._environment},
                # Ctrl-C in the terminal belongs to the tests, which then stop the server.
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if _does_answer(self.url):
                return
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"moto did not start:\n{self._log.read_text(errors='replace')}")

    def stop(self) -> None:
        self.kill()

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        self._log.unlink(missing_ok=True)


class DockerSqs:
    """A moto container."""

    def __init__(self) -> None:
        from testcontainers.core.container import DockerContainer

        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._container = DockerContainer(IMAGE).with_bind_ports(5000, self.port)
        self._is_created = False

    def start(self) -> None:
        if self._is_created:
            self._container.get_wrapped_container().start()
        else:
            self._is_created = True
            self._container.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _does_answer(self.url):
            if time.monotonic() > deadline:
                raise RuntimeError("moto did not start in Docker")
            time.sleep(0.05)

    def stop(self) -> None:
        self._container.get_wrapped_container().stop()

    def kill(self) -> None:
        self._container.get_wrapped_container().kill("SIGKILL")

    def close(self) -> None:
        if self._is_created:
            self._container.stop()


def _does_answer(url: str) -> bool:
    """Whether a moto is ready there; its SQS is loaded by the first question about it."""
    parts = urlsplit(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        connection = http.client.HTTPSConnection(parts.netloc, timeout=30, context=context)
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    try:
        connection.request("GET", "/moto-api/data.json")
        return isinstance(json.loads(connection.getresponse().read()), dict)
    except (OSError, ValueError, http.client.HTTPException):
        return False
    finally:
        connection.close()
