"""Kafka brokers for the tests.

The local broker is Apache Kafka itself, from its Maven jars, as one KRaft node on loopback that is
broker and controller; stopped, killed and started again it keeps its addresses and its topics. It
has a listener for each way to connect, so that one JVM serves the whole session.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaError
from aiokafka.protocol.commit import OffsetFetchRequest
from aiokafka.protocol.coordination import FindCoordinatorRequest
from aiokafka.protocol.transaction import InitProducerIdRequest
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from docker.errors import DockerException

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
from tests.servers.tls import TlsFiles

VERSION = "4.1.0"
IMAGE = f"apache/kafka:{VERSION}"
JARS = Path.home() / ".cache" / "pgtrickle-relay-tests" / f"kafka-{VERSION}"
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 60.0
USER, PASSWORD = "relay", "right-s3cret-5811"

# Each with how it is spoken to; PROXIED says that it stands where the proxy of a test listens.
LISTENERS: Mapping[str, str] = {
    "PLAIN": "PLAINTEXT",
    "PROXIED": "PLAINTEXT",
    "TLS": "SSL",
    "MTLS": "SSL",
    "SASL": "SASL_PLAINTEXT",
    "SASLTLS": "SASL_SSL",
}
_CLUSTER_ID = "cGd0cmlja2xlLXJlbGF5LQ"
_NOT_READY = (14, 15, 16)
_NODES = 3
# A broker that was killed is noticed within two seconds.
_REPLICATED = {
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "min.insync.replicas": "2",
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "2000",
}
# So many ports are chosen that one may be taken meanwhile.
_ATTEMPTS = 3


class KafkaNotStarted(RuntimeError):
    """The broker ended before it served anybody; the message has the end of its log."""


@dataclass(frozen=True)
class KafkaServer:
    """A running broker.

    `start`, `stop`, `kill` and `restart` block; from a coroutine use `asyncio.to_thread`.
    `ports` has the port of each listener, `proxied_port` where clients of PROXIED are sent.
    """

    brokers: str
    version: str
    origin: str
    control: ServerControl
    ports: Mapping[str, int] = field(default_factory=dict)
    proxied_port: int = 0

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the listener without TLS and users, of the first broker."""
        host, _, port = self.brokers.partition(",")[0].rpartition(":")
        return host, int(port)

    def at(self, listener: str) -> str:
        """The address of one listener; leaves the test out where a foreign server has none."""
        if listener not in self.ports:
            leave_out(f"Kafka comes from the environment and has no listener {listener}")
        return f"localhost:{self.ports[listener]}"

    def start(self) -> None:
        """Start the stopped or killed broker and wait until it serves groups."""
        self.control.start()

    def stop(self) -> None:
        """Shut down in order and wait until the broker is gone."""
        self.control.stop()

    def kill(self) -> None:
        """SIGKILL: the logs are what is left."""
        self.control.kill()

    def restart(self) -> None:
        """Stop and start on the same addresses, with the same topics."""
        self.control.stop()
        self.control.start()


def find_kafka(tls_files: TlsFiles) -> KafkaServer:
    """Find and start the broker of this run; raises `ServerMissing`."""
    address = address_in_environment("KAFKA")
    if address is not None:
        return KafkaServer(
            brokers=address.rpartition("//")[2],
            version="of unknown version",
            origin="address in the environment",
            control=NotControllable("Kafka"),
        )
    if is_docker_running():
        try:
            container = DockerKafka(tls_files)
            return _started(container, container.node, f"Docker, {IMAGE}")
        except DockerException as failure:
            warn_of_docker(IMAGE, failure)
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(KafkaNotStarted):
            return _started_locally(tls_files)
    return _started_locally(tls_files)


def _started_locally(tls_files: TlsFiles) -> KafkaServer:
    local = LocalKafka(_java(), _jars(), _Node(tls_files, host=LOOPBACK))
    return _started(local, local.node, f"local, {JARS}")


def _started(control: ServerControl, node: _Node, origin: str) -> KafkaServer:
    try:
        control.start()
    except BaseException:
        control.close()
        raise
    return KafkaServer(
        brokers=f"{LOOPBACK}:{node.ports['PLAIN']}",
        version=VERSION,
        origin=origin,
        control=control,
        ports=node.ports,
        proxied_port=node.proxied_port,
    )


class _Node:
    """The directory and the ports of one broker."""

    def __init__(
        self,
        tls_files: TlsFiles,
        *,
        host: str,
        inside: str | None = None,
        number: int = 1,
        controllers: Sequence[int] = (),
        more: Mapping[str, str] | None = None,
    ) -> None:
        """One of several where ``controllers`` has the ports of all, this one's among them."""
        self.directory = Path(tempfile.mkdtemp(prefix="pgt-kafka-"))
        self.number = number
        self._controllers = controllers or (free_port(),)
        self._more = more or {}
        self.ports = {name: free_port() for name in LISTENERS}
        self.proxied_port = free_port()
        _write_tls(self.directory, tls_files)
        properties = self.directory / "server.properties"
        properties.write_text(self._properties(host, inside or str(self.directory)))

    def _properties(self, host: str, home: str) -> str:
        controller = self._controllers[self.number - 1]
        advertised = {**self.ports, "PROXIED": self.proxied_port}
        protocols = {**LISTENERS, "CONTROLLER": "PLAINTEXT"}
        jaas = "org.apache.kafka.common.security"
        lines = {
            "process.roles": "broker,controller",
            "node.id": f"{self.number}",
            "controller.quorum.voters": ",".join(
                f"{number}@{LOOPBACK}:{port}" for number, port in enumerate(self._controllers, 1)
            ),
            "controller.listener.names": "CONTROLLER",
            "inter.broker.listener.name": "PLAIN",
            "listeners": ",".join(
                [f"{name}://{host}:{port}" for name, port in self.ports.items()]
                + [f"CONTROLLER://{LOOPBACK}:{controller}"]
            ),
            "advertised.listeners": ",".join(
                f"{name}://{'localhost' if 'TLS' in name else LOOPBACK}:{port}"
                for name, port in advertised.items()
            ),
            "listener.security.protocol.map": ",".join(
                f"{name}:{protocol}" for name, protocol in protocols.items()
            ),
            "log.dirs": f"{home}/logs",
            "num.partitions": "1",
            "offsets.topic.num.partitions": "1",
            "offsets.topic.replication.factor": "1",
            "transaction.state.log.num.partitions": "1",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "group.initial.rebalance.delay.ms": "0",
            "group.min.session.timeout.ms": "500",
            "log.retention.check.interval.ms": "500",
            # The relay must not rely on it, nor cause it.
            "auto.create.topics.enable": "true",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": f"{home}/server.pem",
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": f"{home}/authority.pem",
            "listener.name.mtls.ssl.client.auth": "required",
        }
        for name in ("sasl", "sasltls"):
            prefix = f"listener.name.{name}"
            lines[f"{prefix}.sasl.enabled.mechanisms"] = "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512"
            lines[f"{prefix}.plain.sasl.jaas.config"] = (
                f'{jaas}.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
            )
            for mechanism in ("scram-sha-256", "scram-sha-512"):
                lines[f"{prefix}.{mechanism}.sasl.jaas.config"] = (
                    f"{jaas}.scram.ScramLoginModule required;"
                )
        return "".join(f"{name}={value}\n" for name, value in {**lines, **self._more}.items())


def format_arguments() -> list[str]:
    """What formats a broker's directory, with the users that log in by SCRAM."""
    users = [
        argument
        for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512")
        for argument in ("--add-scram", f"{mechanism}=[name={USER},password={PASSWORD}]")
    ]
    return ["format", "--cluster-id", _CLUSTER_ID, "--config", "server.properties", *users]


class LocalKafka:
    """A JVM of ours; its topics live as long as this object."""

    def __init__(self, java: str, jars: Path, node: _Node) -> None:
        self.node = node
        self._log = self.node.directory / "kafka.log"
        self._java = [
            java,
            *("-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
            *("-cp", f"{jars}/*"),
        ]
        self._is_formatted = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._process is not None:
            return
        with self._log.open("ab") as log:
            if not self._is_formatted:
                subprocess.run(
                    [*self._java, "kafka.tools.StorageTool", *format_arguments()],
                    check=True,
                    cwd=self.node.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    timeout=START_TIMEOUT_S,
                )
                self._is_formatted = True
            self._process = subprocess.Popen(
                [*self._java, "kafka.Kafka", "server.properties"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.node.directory,
                # Ctrl-C in the terminal belongs to the tests, which then stop the server.
                start_new_session=True,
            )
        process = self._process

        def is_gone() -> bool:
            return process.poll() is not None

        if not _wait_until_ready(self.node, is_gone):
            said = self._log.read_text(errors="replace")[-2000:]
            raise KafkaNotStarted(f"Kafka did not start:\n{said}")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def freeze(self) -> None:
        """SIGSTOP: its connections stay, and nothing is answered until `thaw`."""
        if self._process is not None:
            self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Resume it."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self._end(signal.SIGKILL)
        shutil.rmtree(self.node.directory, ignore_errors=True)

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class KafkaCluster:
    """Three brokers, each a JVM of ours; what they keep of topics and groups is on all of them."""

    def __init__(self, tls_files: TlsFiles) -> None:
        """Raises `ServerMissing`."""
        controllers = [free_port() for _ in range(_NODES)]
        self.nodes = {
            number: LocalKafka(
                _java(),
                _jars(),
                _Node(
                    tls_files,
                    host=LOOPBACK,
                    number=number,
                    controllers=controllers,
                    more=_REPLICATED,
                ),
            )
            for number in range(1, _NODES + 1)
        }

    @property
    def brokers(self) -> str:
        """All addresses."""
        return ",".join(f"{LOOPBACK}:{one.node.ports['PLAIN']}" for one in self.nodes.values())

    def start(self) -> None:
        """Start those that are not running, and wait until each serves groups."""
        with ThreadPoolExecutor(_NODES) as each:
            for starting in [each.submit(one.start) for one in self.nodes.values()]:
                starting.result()

    def close(self) -> None:
        for one in self.nodes.values():
            one.close()


class DockerKafka:
    """A broker in a container, on the same ports inside and outside."""

    def __init__(self, tls_files: TlsFiles) -> None:
        from testcontainers.core.container import DockerContainer

        self.node = _Node(tls_files, host="0.0.0.0", inside="/relay")
        # The image's user writes its logs here.
        self.node.directory.chmod(0o777)
        formatting = " ".join(f"'{argument}'" for argument in format_arguments())
        container = (
            DockerContainer(IMAGE)
            .with_volume_mapping(str(self.node.directory), "/relay", "rw")
            .with_command(
                f'sh -c "/opt/kafka/bin/kafka-storage.sh {formatting} --ignore-formatted && exec'
                ' /opt/kafka/bin/kafka-server-start.sh server.properties"'
            )
            .with_kwargs(working_dir="/relay")
        )
        for port in self.node.ports.values():
            container = container.with_bind_ports(port, port)
        self._container = container
        self._is_created = False

    def start(self) -> None:
        if self._is_created:
            self._container.get_wrapped_container().start()
        else:
            self._is_created = True
            self._container.start()
        if not _wait_until_ready(self.node, lambda: False):
            raise RuntimeError("Kafka did not start in Docker")

    def stop(self) -> None:
        self._container.get_wrapped_container().stop(timeout=int(STOP_TIMEOUT_S))

    def kill(self) -> None:
        self._container.get_wrapped_container().kill("SIGKILL")
        self._container.get_wrapped_container().wait(timeout=STOP_TIMEOUT_S)

    def close(self) -> None:
        if self._is_created:
            self._container.stop()
        shutil.rmtree(self.node.directory, ignore_errors=True)


def _write_tls(directory: Path, tls_files: TlsFiles) -> None:
    """Key and certificate in one file, the key in the only form that the JVM reads."""
    key = load_pem_private_key(tls_files.server_key.read_bytes(), None)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (directory / "server.pem").write_bytes(pem + tls_files.server_certificate.read_bytes())
    (directory / "authority.pem").write_bytes(tls_files.authority.read_bytes())


def _wait_until_ready(node: _Node, is_gone: object) -> bool:
    """Wait until the broker serves a group; False where it does not in time."""
    assert callable(is_gone)
    deadline = time.monotonic() + START_TIMEOUT_S
    # The loop of a test may be running in this thread.
    with ThreadPoolExecutor(1) as another:
        while time.monotonic() < deadline and not is_gone():
            if another.submit(asyncio.run, _does_serve_groups(node)).result():
                return True
            time.sleep(0.1)
    return False


async def _does_serve_groups(node: _Node) -> bool:
    """Whether the broker answers, and has what it keeps of groups at hand."""
    connection = AIOKafkaConnection(LOOPBACK, node.ports["PLAIN"], request_timeout_ms=5000)
    try:
        await connection.connect()
        found = await connection.send(FindCoordinatorRequest("warm up", 0))
        if found.error_code:
            return False
        if found.coordinator_id != node.number:
            return True
        answer = await connection.send(OffsetFetchRequest("warm up", [("warm up", [0])]))
        codes = [code for _, ones in answer.topics for *_, code in ones]
        identified = await connection.send(InitProducerIdRequest(None, 1000))
        return not set(_NOT_READY) & {answer.error_code, identified.error_code, *codes}
    except (OSError, KafkaError, TimeoutError):
        return False
    finally:
        closed = connection.close()
        if closed is not None and connection._protocol is not None:
            await asyncio.wait({closed}, timeout=5)


def _java() -> str:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=f"{home}/bin" if home else None)
    if java is None:
        raise ServerMissing(
            "install Java 17 (apt-get install openjdk-17-jre-headless) and run scripts/test, or"
            " set PGTRICKLE_TEST_KAFKA_URL"
        )
    return java


def _jars() -> Path:
    if not any(JARS.glob("kafka_2.13-*.jar")):
        raise ServerMissing(
            f"no jars in {JARS}: scripts/test gets them with Maven (apt-get install maven), or"
            " set PGTRICKLE_TEST_KAFKA_URL"
        )
    return JARS
