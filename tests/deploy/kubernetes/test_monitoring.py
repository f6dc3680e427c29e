"""What Prometheus would scrape, and by which names."""

import json
import re

import pytest

from deploy.kubernetes.rendering import ROOT, RUNS, Manifests, Object, overlay, selects

PART_OF = "app.kubernetes.io/part-of"


def targets(manifests: Manifests) -> set[tuple[str, str, int]]:
    """(job, workload, port) for each port that the monitors find, as the operator does."""
    found = set()
    for monitor in manifests.of("ServiceMonitor"):
        for service in manifests.of("Service"):
            if selects(monitor["spec"]["selector"], service["metadata"]["labels"]):
                found |= _service_targets(manifests, monitor, service)
    for monitor in manifests.of("PodMonitor"):
        for pod in manifests.selected(monitor["spec"]["selector"]):
            job = pod.labels[monitor["spec"]["jobLabel"]]
            names = [endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]]
            found |= {(job, pod.name, pod.ports[name]) for name in names if name in pod.ports}
    return found


def _service_targets(manifests: Manifests, monitor: Object, service: Object) -> set[tuple[str, str, int]]:
    job = service["metadata"]["labels"][monitor["spec"]["jobLabel"]]
    pods = manifests.selected({"matchLabels": service["spec"]["selector"]})
    wanted = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
    names = [port["targetPort"] for port in service["spec"]["ports"] if port["name"] in wanted]
    return {(job, pod.name, pod.ports[name]) for pod in pods for name in names}


@pytest.mark.parametrize("name", RUNS)
def test_every_pod_is_scraped_once_under_the_job_of_its_program(name: str) -> None:
    manifests = overlay(name, "monitoring")
    found = targets(manifests)
    assert {(job, port) for job, _, port in found} == {
        ("ormo-server", 9464),
        ("ormo-worker", 9465),
        ("ormo-evaluator", 9466),
    }
    assert sorted(workload for _, workload, _ in found) == sorted(pod.name for pod in manifests.pods())


def test_server_is_found_through_one_service_only() -> None:
    manifests = overlay("local", "monitoring")
    (monitor,) = manifests.of("ServiceMonitor")
    with_metrics = [each for each in manifests.of("Service") if _service_targets(manifests, monitor, each)]
    assert [each["metadata"]["name"] for each in with_metrics] == ["ormo-server"]


def test_jobs_are_those_of_the_prometheus_without_kubernetes() -> None:
    text = (ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text()
    jobs = {job for job, _, _ in targets(overlay("local", "monitoring"))}
    assert jobs == set(re.findall(r"job_name: (\S+)", text))


def test_monitor_with_a_wrong_label_finds_nothing() -> None:
    manifests = overlay("local", "monitoring")
    (monitor,) = manifests.of("ServiceMonitor")
    monitor["spec"]["selector"]["matchLabels"] = {"app.kubernetes.io/name": "ormo"}
    assert "ormo-server" not in {job for job, _, _ in targets(manifests)}


def test_instance_is_the_pod_so_that_a_replaced_server_stays_the_same_one() -> None:
    for monitor in overlay("monitoring").of("ServiceMonitor", "PodMonitor"):
        for endpoint in monitor["spec"].get("endpoints", []) + monitor["spec"].get("podMetricsEndpoints", []):
            (relabeling,) = endpoint["relabelings"]
            assert relabeling["targetLabel"] == "instance"
            assert relabeling["sourceLabels"] == ["__meta_kubernetes_namespace", "__meta_kubernetes_pod_name"]


def test_rules_and_dashboards_come_along_with_the_labels_that_have_them_found() -> None:
    manifests = overlay("monitoring")
    rules = manifests.of("PrometheusRule")
    assert [rule for each in rules for group in each["spec"]["groups"] for rule in group["rules"]]
    dashboards = [each for each in manifests.of("ConfigMap") if "grafana_dashboard" in each["metadata"]["labels"]]
    shown = [json.loads(text)["title"] for each in dashboards for text in each["data"].values()]
    assert shown
    assert {each["metadata"]["labels"]["grafana_dashboard"] for each in dashboards} == {"1"}
    for each in (*rules, *manifests.of("ServiceMonitor", "PodMonitor")):
        assert each["metadata"]["labels"]["release"] == "kube-prometheus-stack"
        assert each["metadata"]["labels"][PART_OF] == "ormo"
