"""Each alert fires in Prometheus for what it is there for, after its time, and for nothing else."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from relay.metrics import PREFIX
from tests.docs.page import REPOSITORY
from tests.docs.test_monitoring import rules
from tests.servers.finding import leave_out

RULES = REPOSITORY / "docs" / "monitoring" / "alerts.yaml"

OF_ORDERS = {"pipeline": "orders", "direction": "forward"}
OF_NATS = {**OF_ORDERS, "backend": "nats"}
OF_IMPORT = {"pipeline": "import", "direction": "reverse"}
ORDERS, OTHER = 'pipeline="orders",direction="forward"', 'pipeline="other",direction="forward"'
IMPORT = 'pipeline="import",direction="reverse"'
A, B = 'instance="a",pod="a"', 'instance="b",pod="b"'
IN_A = {"instance": "a", "pod": "a"}

# Prometheus' notation of a value each minute: well for five, and then no longer.
BEGINS, ENDS, COUNTS = "0x4 1x120", "1x4 0x120", "0x4 1+1x120"
TURNS_MINUTE = 5
STAYS_0, STAYS_1 = "0x125", "1x125"
MINUTES = {"m": 1, "h": 60}


@dataclass(frozen=True)
class Case:
    """``series`` become unwell in the sixth minute, ``quiet`` look alike and never do."""

    series: Mapping[str, str]
    quiet: Mapping[str, str]
    summary: str
    labels: Mapping[str, str] = field(default_factory=dict)


def of_lag(metric: str, labels: str, alert_labels: Mapping[str, str], summary: str) -> Case:
    """What has to grow, above a bound that hides what is usual."""
    other = labels.replace("orders", "other").replace("import", "other")
    return Case(
        {f"{metric}{{{labels},{A}}}": "0x4 2000+10x120"},
        {
            f"{metric}{{{other},side='much',{A}}}": "5000x125",
            f"{metric}{{{other},side='shrinks',{A}}}": "9000-10x125",
            f"{metric}{{{other},side='little',{A}}}": "0+1x125",
        },
        summary,
        alert_labels,
    )


def disconnected(side: str, summary: str) -> Case:
    return Case(
        {
            f'{side}_connected{{{ORDERS},backend="nats",{A}}}': ENDS,
            f'pipeline_state{{{ORDERS},state="retrying",{A}}}': BEGINS,
            f'pipeline_state{{{ORDERS},state="stopped",{A}}}': STAYS_0,
        },
        {
            f'{side}_connected{{{OTHER},backend="nats",{A}}}': STAYS_0,
            f'pipeline_state{{{OTHER},state="stopped",{A}}}': STAYS_1,
        },
        summary,
        {**OF_NATS, **IN_A},
    )


CASES: Mapping[str, Case] = {
    "RelayDown": Case(
        {'build_info{version="1"}': "1x4 stale"},
        {},
        "No relay is scraped.",
    ),
    "RelayDatabaseLost": Case(
        {f"database_connected{{{A}}}": ENDS},
        {f"database_connected{{{B}}}": STAYS_1},
        "A relay has lost its database, and runs nothing.",
        IN_A,
    ),
    "RelayPipelinesUnowned": Case(
        {f"pipelines_unowned{{{A}}}": "0x4 2x120", f"pipelines_unowned{{{B}}}": "0x4 2x120"},
        {},
        "2 enabled pipelines are run by no relay.",
    ),
    "RelayPipelineFailed": Case(
        {f'pipeline_state{{{ORDERS},state="failed",{A}}}': BEGINS},
        {
            f'pipeline_state{{{OTHER},state="failed",{A}}}': "0x4 1x0 0x120",
            f'pipeline_state{{{OTHER},state="running",{A}}}': STAYS_1,
        },
        "Pipeline orders has failed and waits for an operator.",
        {**OF_ORDERS, **IN_A, "state": "failed"},
    ),
    "RelayPipelineSuspended": Case(
        {f'pipeline_state{{{ORDERS},state="suspended",{A}}}': BEGINS},
        {f'pipeline_state{{{OTHER},state="running",{A}}}': STAYS_1},
        "The sink of pipeline orders refuses everything.",
        {**OF_ORDERS, **IN_A, "state": "suspended"},
    ),
    "RelayPipelineStalled": Case(
        {f"pipeline_stalled{{{ORDERS},{A}}}": BEGINS},
        {f"pipeline_stalled{{{OTHER},{A}}}": STAYS_0},
        "Pipeline orders has something to do, and nothing moves.",
        {**OF_ORDERS, **IN_A},
    ),
    "RelayPipelineUnhealthy": Case(
        {f"pipeline_healthy{{{ORDERS},{A}}}": ENDS},
        {f"pipeline_healthy{{{OTHER},{A}}}": "1x4 0x3 1x120"},
        "Pipeline orders is not healthy; /health has the reason.",
        {**OF_ORDERS, **IN_A},
    ),
    "RelayBehind": Case(
        {
            f"oldest_unsent_age_seconds{{{ORDERS},{A}}}": "0x4 600x120",
            f"oldest_unsent_age_seconds{{{ORDERS},{B}}}": "0x4 540x120",
        },
        {f"oldest_unsent_age_seconds{{{OTHER},{A}}}": "200x125"},
        "An event of pipeline orders waits for 10m 0s.",
        OF_ORDERS,
    ),
    "RelayLagGrows": of_lag(
        "consumer_lag_rows", ORDERS, OF_ORDERS, "Pipeline orders falls behind: 2150 rows."
    ),
    "RelaySourceLagGrows": of_lag(
        "source_lag",
        f'{IMPORT},backend="nats"',
        {**OF_IMPORT, "backend": "nats"},
        "The broker has 2150 messages for pipeline import, and more come.",
    ),
    "RelayDeadLettersGrow": Case(
        {
            f"dlq_entries_total{{{ORDERS},{A}}}": STAYS_0,
            f"dlq_entries_total{{{ORDERS},{B}}}": "3x4 4x120",
        },
        {f"dlq_entries_total{{{OTHER},{A}}}": "7x125"},
        "Messages of pipeline orders became dead letters.",
        OF_ORDERS,
    ),
    "RelayDeadLettersWait": Case(
        {f"dlq_depth{{{ORDERS},{A}}}": "0x4 3x120", f"dlq_depth{{{ORDERS},{B}}}": "0x4 3x120"},
        {f"dlq_depth{{{OTHER},{A}}}": "0x4 3x30 0x120"},
        "3 dead letters of pipeline orders wait for somebody.",
        OF_ORDERS,
    ),
    "RelayPublishErrors": Case(
        {f'publish_errors_total{{{ORDERS},backend="nats",{A}}}': COUNTS},
        {f'publish_errors_total{{{OTHER},backend="nats",{A}}}': "0x4 1x120"},
        "Pipeline orders can't publish to nats, and repeats.",
        OF_NATS,
    ),
    "RelaySourceErrors": Case(
        {f'source_errors_total{{{IMPORT},backend="kafka",{A}}}': COUNTS},
        {f'source_errors_total{{{OTHER},backend="kafka",{A}}}': "0x4 1x120"},
        "Pipeline import can't read from kafka, and repeats.",
        {**OF_IMPORT, "backend": "kafka"},
    ),
    "RelaySourceDisconnected": disconnected(
        "source", "The source nats of pipeline orders is not connected."
    ),
    "RelaySinkDisconnected": disconnected(
        "sink", "The sink nats of pipeline orders is not connected."
    ),
    "RelayCaptureProblem": Case(
        {f'capture_problems{{outbox="outbox_orders",{A}}}': BEGINS},
        {f'capture_problems{{outbox="outbox_other",{A}}}': STAYS_0},
        "Outbox outbox_orders does not capture all that it should.",
        {"outbox": "outbox_orders"},
    ),
    "RelayOutboxGrows": Case(
        {f'outbox_bytes{{outbox="outbox_orders",{A}}}': "0x4 3221225472+1x120"},
        {
            f'outbox_bytes{{outbox="outbox_large",{A}}}': "5000000000x125",
            f'outbox_bytes{{outbox="outbox_small",{A}}}': "0+1000000x125",
        },
        "Outbox outbox_orders grows, and is not swept: 3GiB.",
        {"outbox": "outbox_orders"},
    ),
    "RelayWebhookRefusals": Case(
        {f'webhook_refused_total{{{IMPORT},reason="unauthorized",{A}}}': COUNTS},
        {
            f'webhook_refused_total{{{IMPORT},reason="unknown_path",{A}}}': COUNTS,
            f'webhook_refused_total{{{IMPORT},reason="method",{A}}}': COUNTS,
            f'webhook_refused_total{{{IMPORT},reason="too_large",{A}}}': "0x4 1x120",
        },
        "Pipeline import refuses requests: unauthorized.",
        {**OF_IMPORT, "reason": "unauthorized"},
    ),
    "RelayLeasesLost": Case(
        {f"leases_lost_total{{{ORDERS},{A}}}": COUNTS},
        {f"leases_lost_total{{{OTHER},{A}}}": "0x4 1x120"},
        "Workers of pipeline orders are slower than their leases.",
        OF_ORDERS,
    ),
}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        leave_out("promtool is missing (apt-get install prometheus, or brew install prometheus)")
    return subprocess.run(
        ["promtool", *arguments], capture_output=True, text=True, check=False, timeout=60
    )


def test_each_alert_fires_after_its_time_for_what_is_unwell_and_for_nothing_else(
    tmp_path: Path,
) -> None:
    checked = promtool("check", "rules", str(RULES))
    assert checked.returncode == 0, checked.stdout + checked.stderr

    assert CASES.keys() == {rule["alert"] for rule in rules()}
    document = {"rule_files": [str(RULES)], "tests": [scenario(rule) for rule in rules()]}
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    tested = promtool("test", "rules", str(tmp_path / "tests.yaml"))

    assert tested.returncode == 0, tested.stdout + tested.stderr


def scenario(rule: Mapping[str, Any]) -> dict[str, object]:
    """Nothing a minute before, what is expected then."""
    case = CASES[rule["alert"]]
    fires_at = TURNS_MINUTE + int(rule["for"][:-1]) * MINUTES[rule["for"][-1]]
    expected = {
        "exp_labels": {**rule["labels"], **case.labels},
        "exp_annotations": {**rule["annotations"], "summary": case.summary},
    }
    every = {**case.series, **case.quiet}
    return {
        "name": rule["alert"],
        "interval": "1m",
        "input_series": [{"series": PREFIX + one, "values": every[one]} for one in every],
        "alert_rule_test": [
            {"alertname": rule["alert"], "eval_time": f"{at}m", "exp_alerts": alerts}
            for at, alerts in ((fires_at - 1, []), (fires_at, [expected]))
        ],
    }
