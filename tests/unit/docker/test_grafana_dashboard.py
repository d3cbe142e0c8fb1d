"""The dashboard asks Prometheus for metrics, labels and states that the services have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from web4lora_chassis.telemetry import metrics

BOARD = json.loads((Path(__file__).parents[3] / "docker" / "grafana-dashboard.json").read_text("utf-8"))
QUERIES = [(panel["title"], target["expr"], target["legendFormat"])
           for panel in BOARD["panels"] for target in panel["targets"]]  # fmt: skip
_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_count", "_sum")}
_OF_PROMETHEUS = {"job", "instance"}


def known() -> dict[str, set[str]]:
    """Return the labels of every series that is shown, by its name."""
    series: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        if isinstance(metric, metrics.Looked):
            series[metric.name] = {metric.label}
        elif isinstance(metric, MetricWrapperBase):
            labels = set(metric._labelnames)
            for suffix in _SUFFIXES[metric._type]:
                series[metric._name + suffix] = labels | ({"le"} if suffix == "_bucket" else set())
    return series


def asked(query: str) -> set[str]:
    return set(re.findall(r"\b(web4lora_\w+|process_\w+)", re.sub(r'"[^"]*"', '""', query)))


@pytest.mark.parametrize(("title", "query", "legend"), QUERIES)
def test_a_panel_asks_for_what_is_there(title: str, query: str, legend: str) -> None:
    names = asked(query)
    assert names, title
    ours = known()
    of_the_process = {sample.name for family in REGISTRY.collect() for sample in family.samples}
    labels = set(_OF_PROMETHEUS)
    for name in names:
        assert name in ours or name in of_the_process, f"{title}: there is no metric {name}"
        labels |= ours.get(name, set())
    used = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
    used |= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", query)) | set(re.findall(r"{{(\w+)}}", legend))
    assert used <= labels, f"{title}: no such labels: {used - labels}"
    by = re.findall(r"by \(([^)]*)\)", query)
    for label in re.findall(r"{{(\w+)}}", legend):
        assert not by or label in by[-1], f"{title}: {label} is summed up and can't be in the legend"


def test_every_metric_of_ours_is_on_the_board() -> None:
    names = {re.sub(r"_(total|bucket|count|sum)$", "", name) for name in known()}
    on_board = {
        re.sub(r"_(total|bucket|count|sum)$", "", name) for _, query, _ in QUERIES for name in asked(query)
    }
    assert names - on_board == set()


def test_brackets_match_and_panels_do_not_overlap() -> None:
    for _, query, _ in QUERIES:
        for left, right in ("()", "{}", "[]"):
            assert query.count(left) == query.count(right), query
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in BOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(places)
