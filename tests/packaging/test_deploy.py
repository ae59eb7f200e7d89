"""What stands in `deploy/` and `docker-compose.yaml` is valid, and the relay understands it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from relay import cli
from relay.overlays import compose_settings, type_settings
from relay.settings import Settings
from tests.servers.finding import leave_out
from tests.servers.process import REPOSITORY

KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
UNIT = REPOSITORY / "deploy" / "systemd" / "pgtrickle-relay.service"
COMPOSE = REPOSITORY / "docker-compose.yaml"

# The oldest that knows all that the manifests say, and the newest with a schema here.
KUBERNETES_VERSIONS = ("1.30", kubernetes_validate.latest_version())

# Definitions of others, without a schema in Kubernetes itself.
FOREIGN_KINDS = {"Kustomization", "ServiceMonitor"}

MOST_EXPOSED = 3.0


def manifests() -> Iterator[dict[str, Any]]:
    for path in sorted(KUBERNETES.glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


def manifest(kind: str, name: str = "pgtrickle-relay") -> dict[str, Any]:
    (found,) = [
        one for one in manifests() if one["kind"] == kind and one["metadata"]["name"] == name
    ]
    return found


def pod_specs() -> Iterator[dict[str, Any]]:
    for one in manifests():
        if "template" in one.get("spec", {}):
            yield one["spec"]["template"]["spec"]


def settings_of(arguments: Sequence[str], overlays: Path) -> Settings:
    """What the relay makes of a command line whose `--config-dir` is that directory."""
    parsed = cli.parser().parse_intermixed_args(list(arguments))
    _, _, overrides = cli._told_apart(parsed.words)
    return type_settings(compose_settings(overrides, config_dirs=[str(overlays)]))


@pytest.fixture
def overlays(tmp_path: Path) -> Path:
    """The directory that the deployment mounts."""
    (volume,) = manifest("Deployment")["spec"]["template"]["spec"]["volumes"]
    data: Mapping[str, str] = manifest("ConfigMap", volume["configMap"]["name"])["data"]
    for item in volume["configMap"]["items"]:
        path = tmp_path / item["path"]
        path.parent.mkdir(exist_ok=True)
        path.write_text(data[item["key"]])
    return tmp_path


def test_manifests_fit_the_schemas_of_kubernetes() -> None:
    for one in manifests():
        if one["kind"] in FOREIGN_KINDS:
            continue
        for version in KUBERNETES_VERSIONS:
            kubernetes_validate.validate(one, version, strict=True)


def test_manifests_refer_to_what_they_define() -> None:
    deployment = manifest("Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    service = manifest("Service")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    assert labels >= deployment["spec"]["selector"]["matchLabels"].items()
    assert labels >= manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"].items()
    assert labels >= service["spec"]["selector"].items()
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()

    monitor = manifest("ServiceMonitor")["spec"]
    assert service["metadata"]["labels"].items() >= monitor["selector"]["matchLabels"].items()
    (endpoint,) = monitor["endpoints"]
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}

    secrets = {one["metadata"]["name"] for one in manifests() if one["kind"] == "Secret"}
    for spec in pod_specs():
        for source in spec["containers"][0]["envFrom"]:
            assert source["secretRef"]["name"] in secrets

    (kustomization,) = [one for one in manifests() if one["kind"] == "Kustomization"]
    for name in kustomization["resources"]:
        assert (KUBERNETES / name).is_file()


def test_a_pod_has_no_right_that_the_relay_does_not_need() -> None:
    for spec in pod_specs():
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"]["memory"]


def test_the_deployment_runs_with_its_settings_and_has_time_to_stop(overlays: Path) -> None:
    spec = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}

    settings = settings_of(container["args"], overlays)

    assert settings.log.format == "json"
    assert settings.postgres.sslmode == "require"
    assert settings.metrics.addr == f"0.0.0.0:{ports['http']}"
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > pause_s + settings.relay.shutdown_timeout_s
    routes = (REPOSITORY / "relay" / "http.py").read_text()
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert f'"{container[probe]["httpGet"]["path"]}"' in routes


def test_the_compose_file_fits_its_schema_and_waits_for_what_it_needs() -> None:
    checked = subprocess.run(
        [
            *(sys.executable, "-m", "check_jsonschema"),
            *("--builtin-schema", "vendor.compose-spec", str(COMPOSE)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout

    composed = yaml.safe_load(COMPOSE.read_text())
    services = composed["services"]
    for name, service in services.items():
        for other, condition in service.get("depends_on", {}).items():
            asks_health = condition["condition"] == "service_healthy"
            assert not asks_health or "healthcheck" in services[other], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), name
        if service["image"].startswith("grove/"):
            settings = settings_of(service["command"], REPOSITORY)
            assert service["read_only"] is True
    assert int(services["relay"]["stop_grace_period"].rstrip("s")) > (
        settings.relay.shutdown_timeout_s
    )


def test_the_unit_is_hardened_and_runs_what_the_relay_understands(overlays: Path) -> None:
    unit = dict(re.findall(r"^(\w+)=(.*)$", UNIT.read_text(), re.MULTILINE))
    arguments = shlex.split(unit["ExecStart"])[1:]
    settings = settings_of(arguments, overlays)
    assert int(unit["TimeoutStopSec"]) > settings.relay.shutdown_timeout_s
    assert settings.files.roots == (f"/var/lib/{unit['StateDirectory']}",)

    analyze = shutil.which("systemd-analyze")
    if analyze is None and sys.platform != "linux":
        pytest.skip("systemd is Linux's")
    if analyze is None:
        leave_out("systemd: systemd-analyze was not found")
    judged = subprocess.run(
        [analyze, "security", "--offline=true", "--no-pager", str(UNIT)],
        capture_output=True,
        text=True,
        check=False,
    )
    (level,) = re.findall(r"exposure level for \S+: (\d+\.\d+)", judged.stdout)
    assert float(level) < MOST_EXPOSED, judged.stdout
