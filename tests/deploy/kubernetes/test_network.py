"""The NetworkPolicies, as a cluster that enforces them would: who reaches whom, and nobody else."""

import pytest
import yaml

from deploy.kubernetes.reach import Peer, reaches
from deploy.kubernetes.rendering import RUNS, Manifests, overlay
from deploy.kubernetes.schemas import against_schemas
from docs.pages import blocks, text_of

STRANGER = Peer({"app.kubernetes.io/name": "stranger"})
PROMETHEUS = Peer({"app.kubernetes.io/name": "prometheus"}, namespace="monitoring")
DNS = Peer({"k8s-app": "kube-dns"}, namespace="kube-system")
FAKE = Peer({"app.kubernetes.io/name": "ormo-worker"}, namespace="elsewhere")
OUTSIDE = Peer({}, namespace="elsewhere", address="203.0.113.9")


def peers(manifests: Manifests) -> dict[str, Peer]:
    ours = {pod.component.removeprefix("ormo-"): Peer(pod.labels) for pod in manifests.pods()}
    return ours | {
        "stranger": STRANGER,
        "prometheus": PROMETHEUS,
        "dns": DNS,
        "worker elsewhere": FAKE,
        "outside": OUTSIDE,
    }


def reached(manifests: Manifests) -> set[tuple[str, str, int]]:
    """Every way that is open, over all pods and ports that matter."""
    everybody = peers(manifests)
    return {
        (source, target, port)
        for source in everybody
        for target in everybody
        for port in (50051, 9464, 9465, 9466, 443)
        if {source, target} & {"server", "worker", "evaluator"}
        and reaches(manifests, everybody[source], everybody[target], port)
    }


@pytest.mark.parametrize("name", RUNS)
def test_only_workers_and_evaluator_reach_the_server_and_nobody_reaches_anything_else(name: str) -> None:
    assert reached(overlay(name)) == {("worker", "server", 50051), ("evaluator", "server", 50051)}


def test_with_monitoring_prometheus_reaches_the_metrics_and_only_them() -> None:
    monitored = overlay("gpu", "monitoring")
    added = reached(monitored) - reached(overlay("gpu"))
    assert {source for source, _, _ in added} == {"prometheus"}
    assert {port for _, _, port in added} == {9464, 9465, 9466}
    assert {("prometheus", "server", 9464), ("prometheus", "worker", 9465), ("prometheus", "evaluator", 9466)} <= added


@pytest.mark.parametrize("protocol", ["UDP", "TCP"])
def test_those_that_look_for_the_server_can_ask_dns_and_the_server_need_not(protocol: str) -> None:
    manifests = overlay("gpu")
    asks = {name for name, peer in peers(manifests).items() if reaches(manifests, peer, DNS, 53, protocol)}
    assert asks & {"worker", "evaluator", "server"} == {"worker", "evaluator"}


def test_with_the_pages_policy_the_server_reaches_a_bucket_and_nothing_else_is_open() -> None:
    manifests = overlay("gpu")
    before = reached(manifests)
    (policy,) = map(yaml.safe_load, blocks(text_of("with/buckets.md"), "yaml"))
    manifests.objects.append(policy)
    added = reached(manifests) - before
    assert ("server", "outside", 443) in added
    assert {(source, port) for source, _, port in added} == {("server", 443)}
    assert reaches(manifests, peers(manifests)["server"], DNS, 53, "UDP")
    assert list(against_schemas(Manifests([policy]))) == []


def test_policy_that_lets_everybody_in_is_noticed() -> None:
    manifests = overlay("gpu")
    del manifests.one("NetworkPolicy", "ormo-server")["spec"]["ingress"][0]["from"]
    assert ("stranger", "server", 50051) in reached(manifests)
