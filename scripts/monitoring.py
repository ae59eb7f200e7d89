"""The Grafana dashboard and the Prometheus alert rules, made from the definitions of the metrics.

`scripts/docs.py` writes both files, and the table of the alerts in the operations guide. A panel is
made for every metric: whoever adds one gets it. What an alert asks for must exist.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from relay.metrics import METRICS, PREFIX, MetricSpec

DASHBOARD = "docs/monitoring/dashboard.json"
ALERTS = "docs/monitoring/alerts.yaml"
_PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
RUNBOOKS = f"{_PROJECT['urls']['Source']}/blob/main/docs/OPERATIONS.md"

_SPECS: Mapping[str, MetricSpec] = {spec.name: spec for spec in METRICS}


@dataclass(frozen=True)
class Alert:
    """One rule. ``after``: for how long it holds before it fires. ``runbook``: an anchor."""

    name: str
    severity: Literal["critical", "warning", "info"]
    expr: str
    after: str
    summary: str
    runbook: str


def metric(name: str, matchers: str = "") -> str:
    """The selector of a metric that exists. Raises `KeyError` for any other."""
    return PREFIX + _SPECS[name].name + (f"{{{matchers}}}" if matchers else "")


def once(expr: str) -> str:
    """What several relays tell alike, as one series."""
    return f"max without (instance, pod) ({expr})"


def counted(how: Literal["rate", "increase"], window: str, name: str, matchers: str = "") -> str:
    """True where a counter has moved, whichever relay counts."""
    return f"sum without (instance, pod) ({how}({metric(name, matchers)}[{window}])) > 0"


def growing(name: str, window: str, above: int) -> str:
    """True where a gauge has been above a bound and has grown all the time."""
    grows = once(f"deriv({metric(name)}[{window}])")
    return f"{once(metric(name))} > {above} and {grows} > 0"


def _disconnected(side: str) -> str:
    at_rest = metric("pipeline_state", 'state=~"stopped|completed"')
    connected = metric(f"{side}_connected")
    return f"{connected} == 0 unless on (job, instance, pipeline) {at_rest} == 1"


def _in_state(state: str) -> str:
    return metric("pipeline_state", f'state="{state}"') + " == 1"


RULES: Sequence[Alert] = (
    Alert(
        "RelayDown",
        "critical",
        f"absent({metric('build_info')})",
        "1m",
        "No relay is scraped.",
        "the-relay-does-not-start",
    ),
    Alert(
        "RelayDatabaseLost",
        "critical",
        f"{metric('database_connected')} == 0",
        "1m",
        "A relay has lost its database, and runs nothing.",
        "the-database-is-lost",
    ),
    Alert(
        "RelayPipelinesUnowned",
        "critical",
        f"{once(metric('pipelines_unowned'))} > 0",
        "1m",
        "{{ $value }} enabled pipelines are run by no relay.",
        "waiting",
    ),
    Alert(
        "RelayPipelineFailed",
        "critical",
        _in_state("failed"),
        "1m",
        "Pipeline {{ $labels.pipeline }} has failed and waits for an operator.",
        "failed",
    ),
    Alert(
        "RelayPipelineSuspended",
        "critical",
        _in_state("suspended"),
        "1m",
        "The sink of pipeline {{ $labels.pipeline }} refuses everything.",
        "suspended",
    ),
    Alert(
        "RelayPipelineStalled",
        "critical",
        f"{metric('pipeline_stalled')} == 1",
        "1m",
        "Pipeline {{ $labels.pipeline }} has something to do, and nothing moves.",
        "running",
    ),
    Alert(
        "RelayPipelineUnhealthy",
        "warning",
        f"{metric('pipeline_healthy')} == 0",
        "5m",
        "Pipeline {{ $labels.pipeline }} is not healthy; /health has the reason.",
        "runbooks",
    ),
    Alert(
        "RelayBehind",
        "warning",
        f"{once(metric('oldest_unsent_age_seconds'))} > 300",
        "5m",
        "An event of pipeline {{ $labels.pipeline }} waits for {{ $value | humanizeDuration }}.",
        "running",
    ),
    Alert(
        "RelayLagGrows",
        "warning",
        growing("consumer_lag_rows", "15m", 1000),
        "15m",
        "Pipeline {{ $labels.pipeline }} falls behind: {{ $value }} rows.",
        "running",
    ),
    Alert(
        "RelaySourceLagGrows",
        "warning",
        growing("source_lag", "15m", 1000),
        "15m",
        "The broker has {{ $value }} messages for pipeline {{ $labels.pipeline }}, and more come.",
        "running",
    ),
    Alert(
        "RelayDeadLettersGrow",
        "warning",
        counted("increase", "10m", "dlq_entries_total"),
        "0m",
        "Messages of pipeline {{ $labels.pipeline }} became dead letters.",
        "dead-letters",
    ),
    Alert(
        "RelayDeadLettersWait",
        "info",
        f"{once(metric('dlq_depth'))} > 0",
        "1h",
        "{{ $value }} dead letters of pipeline {{ $labels.pipeline }} wait for somebody.",
        "dead-letters",
    ),
    Alert(
        "RelayPublishErrors",
        "warning",
        counted("rate", "5m", "publish_errors_total"),
        "10m",
        "Pipeline {{ $labels.pipeline }} can't publish to {{ $labels.backend }}, and repeats.",
        "retrying",
    ),
    Alert(
        "RelaySourceErrors",
        "warning",
        counted("rate", "5m", "source_errors_total"),
        "10m",
        "Pipeline {{ $labels.pipeline }} can't read from {{ $labels.backend }}, and repeats.",
        "retrying",
    ),
    Alert(
        "RelaySourceDisconnected",
        "warning",
        _disconnected("source"),
        "5m",
        "The source {{ $labels.backend }} of pipeline {{ $labels.pipeline }} is not connected.",
        "retrying",
    ),
    Alert(
        "RelaySinkDisconnected",
        "warning",
        _disconnected("sink"),
        "5m",
        "The sink {{ $labels.backend }} of pipeline {{ $labels.pipeline }} is not connected.",
        "retrying",
    ),
    Alert(
        "RelayCaptureProblem",
        "critical",
        f"{once(metric('capture_problems'))} > 0",
        "1m",
        "Outbox {{ $labels.outbox }} does not capture all that it should.",
        "capture-has-a-problem",
    ),
    Alert(
        "RelayOutboxGrows",
        "warning",
        growing("outbox_bytes", "6h", 1_000_000_000),
        "1h",
        "Outbox {{ $labels.outbox }} grows, and is not swept: {{ $value | humanize1024 }}B.",
        "the-outbox-grows",
    ),
    Alert(
        "RelayWebhookRefusals",
        "warning",
        counted("rate", "5m", "webhook_refused_total", 'reason!~"unknown_path|method"'),
        "10m",
        "Pipeline {{ $labels.pipeline }} refuses requests: {{ $labels.reason }}.",
        "requests-are-refused",
    ),
    Alert(
        "RelayLeasesLost",
        "info",
        counted("increase", "15m", "leases_lost_total"),
        "15m",
        "Workers of pipeline {{ $labels.pipeline }} are slower than their leases.",
        "scaling",
    ),
)


def rules() -> str:
    """The alert rules, for ``rule_files`` of Prometheus."""
    groups = [
        {
            "name": "pgtrickle-relay",
            "rules": [
                {
                    "alert": rule.name,
                    "expr": rule.expr,
                    "for": rule.after,
                    "labels": {"severity": rule.severity},
                    "annotations": {
                        "summary": rule.summary,
                        "runbook_url": f"{RUNBOOKS}#{rule.runbook}",
                    },
                }
                for rule in RULES
            ],
        }
    ]
    return "# Generated by scripts/docs.py from scripts/monitoring.py.\n" + yaml.safe_dump(
        {"groups": groups}, sort_keys=False, width=1000
    )


def alerts_part() -> str:
    """The table of the alerts."""
    head = "| alert | severity | where | for | |\n| --- | --- | --- | --- | --- |\n"
    rows = (
        (f"`{rule.name}`", rule.severity, f"`{rule.expr}`", rule.after, f"[do](#{rule.runbook})")
        for rule in RULES
    )
    lines = (" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows)
    return head + "".join(f"| {line} |\n" for line in lines)


_ROWS: Mapping[str, Sequence[str]] = {
    "What needs somebody": (
        "pipeline_healthy",
        "pipeline_state",
        "pipeline_stalled",
        "pipelines_unowned",
        "database_connected",
        "capture_problems",
        "dlq_depth",
        "source_connected",
        "sink_connected",
    ),
    "How far behind": (
        "consumer_lag_rows",
        "oldest_unsent_age_seconds",
        "source_lag",
        "delivery_latency_seconds",
        "outbox_rows",
        "outbox_bytes",
    ),
    "What goes through": (
        "messages_published_total",
        "messages_consumed_total",
        "batches_committed_total",
        "batch_publish_duration_seconds",
        "poll_duration_seconds",
        "inbox_writes_total",
    ),
    "What goes wrong": (
        "errors_total",
        "publish_errors_total",
        "source_errors_total",
        "dlq_entries_total",
        "webhook_refused_total",
        "leases_lost_total",
    ),
}
_REST = "Everything else"

_WIDTH, _HEIGHT = 8, 8
_PER_LINE = 24 // _WIDTH
_UNITS = (("_timestamp_seconds", "dateTimeFromNow"), ("_seconds", "s"), ("_bytes", "bytes"))
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard() -> str:
    """The dashboard, to be imported into Grafana."""
    panels: list[Mapping[str, object]] = []
    named = {name for names in _ROWS.values() for name in names}
    rest = [spec.name for spec in METRICS if spec.name not in named]
    y = 0
    for title, names in {**_ROWS, _REST: rest}.items():
        panels.append(
            {
                "type": "row",
                "title": title,
                "collapsed": False,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
            }
        )
        for number, name in enumerate(names):
            line, column = divmod(number, _PER_LINE)
            place = {"x": column * _WIDTH, "y": y + 1 + line * _HEIGHT}
            panels.append(_panel(_SPECS[name], {**place, "w": _WIDTH, "h": _HEIGHT}))
        y += 1 + -(-len(names) // _PER_LINE) * _HEIGHT
    document = {
        "uid": "pgtrickle-relay",
        "title": "pgtrickle-relay",
        "description": "Generated by scripts/docs.py from the definitions of the metrics.",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource_variable(), _pipeline_variable()]},
        "panels": [{"id": number, **panel} for number, panel in enumerate(panels, 1)],
    }
    return json.dumps(document, indent=2) + "\n"


def _panel(spec: MetricSpec, place: Mapping[str, int]) -> Mapping[str, object]:
    targets = [
        {"refId": chr(ord("A") + number), "expr": expr, "legendFormat": legend}
        for number, (expr, legend) in enumerate(_queries(spec))
    ]
    return {
        "type": "timeseries",
        "title": spec.name.removesuffix("_total").replace("_", " ").capitalize(),
        "description": spec.help,
        "datasource": _DATASOURCE,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": _unit(spec), "min": 0}, "overrides": []},
        "targets": targets,
    }


def _queries(spec: MetricSpec) -> Iterator[tuple[str, str]]:
    """Each PromQL expression of a panel with the legend of its series."""
    labels = [name for name in spec.label_names if name != "direction"]
    shown = " ".join(f"{{{{{name}}}}}" for name in labels)
    matchers = '{pipeline=~"$pipeline"}' if "pipeline" in labels else ""
    name = PREFIX + spec.name
    if spec.type == "histogram":
        by = ", ".join(["le", *labels])
        rate = f"sum by ({by}) (rate({name}_bucket{matchers}[$__rate_interval]))"
        for quantile in ("0.5", "0.99"):
            yield f"histogram_quantile({quantile}, {rate})", f"{shown} p{float(quantile) * 100:g}"
        return
    by = f" by ({', '.join(labels)})" if labels else ""
    if spec.type == "counter":
        yield f"sum{by} (rate({name}{matchers}[$__rate_interval]))", shown
    elif spec.of_relay is not None:
        yield f"{name}{matchers}", f"{{{{instance}}}} {shown}".strip()
    else:
        worst = "min" if spec.name.endswith(("_healthy", "_connected")) else "max"
        is_flag = " == 1" if spec.by == "state" else ""
        times = " * 1000" if "timestamp" in spec.name else ""
        yield f"{worst}{by} ({name}{matchers}{is_flag}){times}", shown


def _unit(spec: MetricSpec) -> str:
    if spec.type == "counter":
        return "cps"
    return next((unit for ending, unit in _UNITS if spec.name.endswith(ending)), "short")


def _datasource_variable() -> Mapping[str, object]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus"}


def _pipeline_variable() -> Mapping[str, object]:
    # The one metric that every pipeline has, also one that no relay runs.
    query = f"label_values({metric('dlq_depth')}, pipeline)"
    return {
        "name": "pipeline",
        "type": "query",
        "datasource": _DATASOURCE,
        "query": query,
        "definition": query,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def files() -> Mapping[str, str]:
    """Both files, by their path in the repository."""
    return {ALERTS: rules(), DASHBOARD: dashboard()}
