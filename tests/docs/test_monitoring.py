"""The dashboard and the alert rules ask for what the relay tells, in PromQL, and lead somewhere."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Sequence

import promql_parser
import yaml
from promql_parser import AggregateExpr, BinaryExpr, Expr, VectorSelector

from relay.errors import ErrorKind
from relay.events import PipelineState
from relay.metrics import METRICS, PREFIX, MetricSpec
from tests.docs.page import anchors, read

# What Prometheus and Kubernetes put on every series.
OF_TARGETS = {"job", "instance", "pod"}
PROJECT = tomllib.loads(read("pyproject.toml"))["project"]
SPECS = {PREFIX + spec.name: spec for spec in METRICS}
VALUES = {
    "state": {state.value for state in PipelineState},
    "kind": {kind.value for kind in ErrorKind},
}


def rules() -> Sequence[dict[str, object]]:
    (group,) = yaml.safe_load(read("docs/monitoring/alerts.yaml"))["groups"]
    found: Sequence[dict[str, object]] = group["rules"]
    return found


def panels() -> Sequence[dict[str, object]]:
    found: Sequence[dict[str, object]] = json.loads(read("docs/monitoring/dashboard.json"))[
        "panels"
    ]
    return found


def queries() -> Iterator[str]:
    """Everything that is asked, with Grafana's variables filled in."""
    for rule in rules():
        yield str(rule["expr"])
    for panel in panels():
        for target in panel.get("targets", ()):  # type: ignore[attr-defined]  # JSON
            yield target["expr"].replace("$__rate_interval", "5m").replace("$pipeline", ".*")


def nodes(query: str) -> Sequence[Expr]:
    """The parts of a query. Raises ValueError where it is no PromQL."""
    found: list[Expr] = []
    promql_parser.walk(promql_parser.parse(query), found.append)
    return found


def spec_of(selector: VectorSelector) -> MetricSpec:
    """The metric that is selected, by the name that a series of it has."""
    name = str(selector.name)
    spec = SPECS.get(name) or SPECS[name.removesuffix("_bucket")]
    assert (spec.type == "histogram") == name.endswith("_bucket"), name
    return spec


def grouping(node: Expr) -> Sequence[str]:
    """The labels by which a part of a query groups or matches."""
    if isinstance(node, AggregateExpr) and node.modifier is not None:
        return node.modifier.labels
    if isinstance(node, BinaryExpr) and node.modifier is not None and node.modifier.matching:
        return node.modifier.matching.labels
    return ()


def test_every_query_is_promql_over_metrics_and_labels_that_exist() -> None:
    for query in queries():
        parts = nodes(query)
        selectors = [part for part in parts if isinstance(part, VectorSelector)]
        assert selectors, query
        labels = {label for one in selectors for label in spec_of(one).label_names}
        for part in parts:
            assert set(grouping(part)) <= labels | OF_TARGETS | {"le"}, query
        for one in selectors:
            for matcher in one.matchers.matchers:
                assert matcher.name in spec_of(one).label_names, query
                if known := VALUES.get(matcher.name):
                    assert set(matcher.value.split("|")) <= known, query


def test_every_metric_has_a_panel() -> None:
    shown = {
        f"{PREFIX}{spec_of(part).name}"
        for panel in panels()
        for target in panel.get("targets", ())  # type: ignore[attr-defined]  # JSON
        for part in nodes(target["expr"].replace("$__rate_interval", "5m"))
        if isinstance(part, VectorSelector)
    }

    assert shown == SPECS.keys()


def test_every_alert_says_how_bad_it_is_what_it_is_and_what_to_do() -> None:
    headings = anchors("docs/OPERATIONS.md")
    for rule in rules():
        text = json.dumps(rule)
        selected = [one for one in nodes(str(rule["expr"])) if isinstance(one, VectorSelector)]
        labels = {label for one in selected for label in spec_of(one).label_names}
        severity = re.search(r'"severity": "(\w+)"', text)
        summary = re.search(r'"summary": "([^"]+)"', text)
        runbook = re.search(r'"runbook_url": "(\S+)#([\w-]+)"', text)
        assert severity is not None, rule
        assert summary is not None, rule
        assert runbook is not None, rule
        assert severity[1] in {"critical", "warning", "info"}
        assert set(re.findall(r"\$labels\.(\w+)", summary[1])) <= labels
        assert runbook[1] == f"{PROJECT['urls']['Source']}/blob/main/docs/OPERATIONS.md"
        assert runbook[2] in headings
    assert len({rule["alert"] for rule in rules()}) == len(rules())
