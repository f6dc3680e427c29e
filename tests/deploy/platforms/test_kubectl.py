"""What `make test-cluster` tells `kubectl` to do: a stand-in notes it, and answers as a cluster does.

No cluster is here to run it; that the assertions work is seen with Compose, and that kubectl has these commands and
flags by its own help.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.kubernetes.rendering import RUNS, overlay, program
from deploy.platforms.certificates import ACCESS, Certificates
from deploy.platforms.checks import unclean
from deploy.platforms.kubectl import ClusterRun, Kubectl, namespace, rendered

STAND_IN = """#!{python}
import json, pathlib, sys
folder = pathlib.Path({folder!r})
words = sys.argv[3:]
given = sys.stdin.read() if "--filename=-" in words else None
with (folder / "log").open("a") as log:
    log.write(json.dumps([words, given]) + "\\n")
answers = json.loads((folder / "answers").read_text())
for start, answer in answers.items():
    if " ".join(words).startswith(start):
        print(answer if isinstance(answer, str) else json.dumps(answer))
        sys.exit(answer == "no")
"""


def pod(name: str, phase: str = "Running", **metadata: str) -> dict[str, Any]:
    status = {"phase": phase, "containerStatuses": [{"ready": True, "restartCount": 1}]}
    spec = {"terminationGracePeriodSeconds": 30, "nodeName": "node-7"}
    return {"metadata": {"name": name} | metadata, "spec": spec, "status": status}


def of(role: str, *pods: dict[str, Any]) -> dict[str, Any]:
    return {f"get pods --selector=app.kubernetes.io/component={role}": {"items": list(pods)}}


class Cluster:
    """What was told to the stand-in, and what it answers to commands that begin so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.answers: dict[str, Any] = {}

    def answer(self, answers: dict[str, Any]) -> None:
        self.answers |= answers
        (self.folder / "answers").write_text(json.dumps(self.answers))

    @property
    def commands(self) -> list[tuple[str, Any]]:
        """Each with what it was given on stdin."""
        rows = [json.loads(line) for line in (self.folder / "log").read_text().splitlines()]
        return [(" ".join(words), given) for words, given in rows]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    script = tmp_path / "kubectl"
    script.write_text(STAND_IN.format(python=sys.executable, folder=str(tmp_path)))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    made = Cluster(tmp_path)
    made.answer(
        {
            **of("server", pod("ormo-server-0")),
            **of("worker", pod("ormo-worker-0-x"), pod("ormo-worker-1-y")),
            **of("evaluator", pod("ormo-evaluator-z")),
            "get pod ormo-server-0 --watch": "\n0\n",
            "get pod ormo-worker-0-x --watch": "\n143\n",
            "get pod ormo-worker-1-y --watch": "\n137\n",
            "get pod ormo-evaluator-z --watch": "\n143\n",
            "get pod": pod("any"),
        }
    )
    return made


@pytest.fixture
def run(cluster: Cluster) -> ClusterRun:
    return ClusterRun(Kubectl("ormo-test-1"), None)


def test_pods_that_are_on_their_way_or_leaving_do_not_count(cluster: Cluster, run: ClusterRun) -> None:
    leaving = pod("c", deletionTimestamp="2026-01-01T00:00:00Z")
    cluster.answer(of("worker", pod("a"), pod("b", "Pending"), leaving, pod("d", "Succeeded")))
    assert run.pods("worker") == ["a"]


def test_log_is_that_of_the_life_before_and_of_this_one(cluster: Cluster, run: ClusterRun) -> None:
    cluster.answer({"logs a --previous": "before", "logs a": "now"})
    assert run.log("a") == ["before", "now"]


def test_eviction_is_asked_for_and_its_exit_code_is_watched_for(cluster: Cluster, run: ClusterRun) -> None:
    assert unclean([run.evict("ormo-worker-0-x")]) == []
    assert [words for words, _ in cluster.commands if words.startswith("get pod ormo-worker-0-x --watch")]
    ((words, given),) = [each for each in cluster.commands if each[0].startswith("create --raw")]
    assert words.split()[2] == "/api/v1/namespaces/ormo-test-1/pods/ormo-worker-0-x/eviction"
    assert json.loads(given)["kind"] == "Eviction"


def test_all_are_stopped_workers_first_and_who_had_to_be_killed_is_told(cluster: Cluster, run: ClusterRun) -> None:
    assert unclean(run.stop()) == ["ormo-worker-1-y ended with 137, and 143 was expected"]
    orders = [words for words, _ in cluster.commands if words.startswith(("delete", "scale"))]
    assert [words.split()[1] for words in orders] == ["jobs", "deployment", "statefulset"]


def test_workers_are_scaled_as_the_page_says(cluster: Cluster, run: ClusterRun) -> None:
    run.scale(4)
    (words, _) = cluster.commands[-1]
    assert words == 'patch job ormo-worker --patch {"spec": {"parallelism": 4, "completions": 4}}'


def test_drain_takes_no_pod_of_another_run_and_the_node_is_given_back(cluster: Cluster, run: ClusterRun) -> None:
    cluster.answer({"drain": "no"})
    with pytest.raises(AssertionError, match="kubectl drain node-7"):
        run.drain()
    drain, uncordon = (words for words, _ in cluster.commands[-2:])
    assert "--pod-selector=ormo-test=ormo-test-1" in drain
    assert uncordon == "uncordon node-7"


def test_renewed_certificates_go_where_the_overlay_looks_for_them(
    cluster: Cluster, run: ClusterRun, tmp_path: Path
) -> None:
    guarded = ClusterRun(run.kubectl, Certificates(tmp_path / "tls", ACCESS.read_text()))
    guarded.replace_certificates()
    guarded.replace_certificates()
    before, after = (list(yaml.safe_load_all(given)) for words, given in cluster.commands if words.startswith("apply"))
    names = {each["metadata"]["name"] for each in after}
    assert names == {"ormo-server-tls", "ormo-worker-tls", "ormo-evaluator-tls"}
    for old, new in zip(before, after, strict=True):
        assert {name for name in new["data"] if new["data"][name] != old["data"][name]} == {"tls.crt", "tls.key"}
        assert "ca.crt" in new["data"]


def test_namespace_goes_whatever_happens_in_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", "somewhere")
    with pytest.raises(RuntimeError, match="a fault"), namespace() as kubectl:
        raise RuntimeError("a fault")
    created, deleted = (words.split()[:3] for words, _ in cluster.commands)
    assert created == ["create", "namespace", kubectl.namespace]
    assert deleted == ["delete", "namespace", kubectl.namespace]


@pytest.mark.parametrize("name", RUNS)
def test_overlay_is_moved_whole_into_its_namespace(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKER_IMAGE", "registry.example:5000/team/worker:7")
    objects = rendered(name, "ormo-test-1", tmp_path)
    assert len(objects) == len(overlay(name).objects)
    assert {each["metadata"].get("namespace", "ormo-test-1") for each in objects} == {"ormo-test-1"}
    templates = [each["spec"]["template"] for each in objects if each["kind"] in ("Job", "Deployment", "StatefulSet")]
    assert {template["metadata"]["labels"]["ormo-test"] for template in templates} == {"ormo-test-1"}
    images = {each["image"] for template in templates for each in template["spec"]["containers"]}
    assert "registry.example:5000/team/worker:7" in images
    settings = next(each["data"] for each in objects if each["metadata"]["name"].startswith("ormo-server-"))
    assert settings["ORMO_STOP_AFTER_GRADIENTS"] == "0"


def test_kubectl_has_every_command_and_flag(cluster: Cluster, run: ClusterRun, monkeypatch: pytest.MonkeyPatch) -> None:
    everything: list[Callable[[], object]] = [
        lambda: run.execute("a", "true"),
        lambda: run.log("a"),
        lambda: run.scale(3),
        lambda: run.evict("ormo-worker-0-x"),
        run.drain,
        run.stop,
        lambda: run.start([]),
        lambda: run.kubectl("apply", "--dry-run=server", "--validate=strict", "--filename=-", given=""),
    ]
    for act in everything:
        act()
    told = cluster.commands
    monkeypatch.undo()
    real = program("kubectl")
    for command in {words.split()[0] for words, _ in told}:
        shown = subprocess.run([real, command, "--help"], capture_output=True, text=True, check=True).stdout
        known = set(re.findall(r"(--[a-z-]+)=", shown)) | {"--namespace"}
        flags = {
            found for words, _ in told if words.split()[0] == command for found in re.findall(r" (--[a-z-]+)", words)
        }
        assert flags - {"--"} <= known, command
