"""An overlay in a namespace of its own, of whatever cluster `KUBECONFIG` names, by `kubectl` alone."""

import base64
import contextlib
import json
import os
import secrets
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.kubernetes.rendering import KUBERNETES, RUNS, Object, program
from deploy.platforms.certificates import ACCESS, Certificates
from deploy.platforms.checks import Ending
from deploy.platforms.platform import NotHere, Platform, Role
from deploy.prometheus.prometheus import Prometheus

# Besides KUBECONFIG, which may name a company's cluster and be set for something else; the Makefile's word sets it.
VARIABLE = "TEST_CLUSTER"
# Without these a cluster must know `ormo-server:0.1.0` and `ormo-worker:0.1.0`, as the overlays do.
IMAGES = {"ormo-server": "SERVER_IMAGE", "ormo-worker": "WORKER_IMAGE"}
_SETTINGS = {
    "ormo-server": ["ORMO_STOP_AFTER_GRADIENTS=0", "ORMO_FAILURE_TIMEOUT_SECONDS=5"],
    "ormo-task": ["ORMO_FAILURE_TIMEOUT_SECONDS=5"],
}
_TERMINATED = '{.status.containerStatuses[0].state.terminated.exitCode}{"\\n"}'
# See the shells in the manifests of worker and evaluator: 0 is for a run that is over.
_CLEAN = {"server": 0, "worker": 143, "evaluator": 143}


class Kubectl:
    """`kubectl` in one namespace.

    Args:
        namespace: that all commands are about.
    """

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._path = program("kubectl")

    def __call__(self, *words: str, given: str | None = None, seconds: float = 180.0) -> str:
        """What it prints; AssertionError with all that it said if it fails."""
        ran = subprocess.run(
            self.command(words), input=given, capture_output=True, text=True, timeout=seconds, check=False
        )
        assert ran.returncode == 0, f"kubectl {' '.join(words)} ended with {ran.returncode}:\n{ran.stdout}{ran.stderr}"
        return ran.stdout

    def command(self, words: Sequence[str]) -> list[str]:
        return [self._path, "--namespace", self.namespace, *words]

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--output=json"))


class ClusterRun(Platform):
    """What an operator applies, less what needs controllers: Secrets are there instead of cert-manager's Certificates.

    Args:
        kubectl: in the namespace of the run.
        certificates: for an overlay with TLS.
    """

    patience_seconds = 300.0  # nodes pull images, and volumes are made

    def __init__(self, kubectl: Kubectl, certificates: Certificates | None) -> None:
        self.kubectl = kubectl
        self.guarded = certificates is not None
        self._certificates = certificates

    def start(self, objects: Sequence[Object]) -> None:
        self._apply([*self._secrets(), *objects])

    def _apply(self, objects: Sequence[Object]) -> None:
        self.kubectl("apply", "--validate=strict", "--filename=-", given=yaml.safe_dump_all(objects))

    def _secrets(self) -> list[Object]:
        if self._certificates is None:
            return []
        return [secret(f"ormo-{role}-tls", self._certificates.folder(role)) for role in _CLEAN]

    def pods(self, role: Role) -> list[str]:
        found = self.kubectl.json("get", "pods", f"--selector=app.kubernetes.io/component={role}")["items"]
        return [
            pod["metadata"]["name"]
            for pod in found
            if pod["status"]["phase"] == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]

    def execute(self, pod: str, *command: str) -> str:
        return self.kubectl("exec", pod, "--", *command)

    def log(self, pod: str) -> list[str]:
        lives = self._status(pod)["restartCount"] + 1
        before = self.kubectl("logs", pod, "--previous").splitlines() if lives > 1 else []
        return before + self.kubectl("logs", pod).splitlines()

    def is_healthy(self, pod: str) -> bool:
        return bool(self._status(pod)["ready"])

    def lives(self, pod: str) -> int:
        return int(self._status(pod)["restartCount"]) + 1

    def scale(self, workers: int) -> None:
        # As docs/deployment.md has it.
        spec = {"spec": {"parallelism": workers, "completions": workers}}
        self.kubectl("patch", "job", "ormo-worker", "--patch", json.dumps(spec))

    def evict(self, worker: str) -> Ending:
        wish = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": worker, "namespace": self.kubectl.namespace},
        }
        path = f"/api/v1/namespaces/{self.kubectl.namespace}/pods/{worker}/eviction"
        (ending,) = self._ended("worker", [worker], "create", "--raw", path, "--filename=-", given=json.dumps(wish))
        return ending

    def drain(self) -> None:
        node = self.kubectl.json("get", "pod", self.server)["spec"]["nodeName"]
        ours = f"--pod-selector={self._label}"
        try:
            self.kubectl("drain", node, ours, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=170s")
        finally:
            self.kubectl("uncordon", node)

    @property
    def _label(self) -> str:
        """Which no other run's pods have: a drain takes nobody else's."""
        return f"ormo-test={self.kubectl.namespace}"

    def replace_certificates(self) -> None:
        assert self._certificates is not None
        self._certificates.renew()
        self._apply(self._secrets())

    def cut_off(self, pod: str) -> contextlib.AbstractContextManager[None]:
        raise NotHere("a NetworkPolicy cuts off only where the cluster's network enforces it, which nothing says")

    def prometheus(self) -> Prometheus:
        raise NotHere("a cluster's Prometheus is not this run's")

    def stop(self) -> list[Ending]:
        selector = "--selector=app.kubernetes.io/component=worker"
        endings = self._ended("worker", self.pods("worker"), "delete", "jobs", selector, "--wait=false")
        endings += self._ended(
            "evaluator", self.pods("evaluator"), "scale", "deployment", "ormo-evaluator", "--replicas=0"
        )
        return endings + self._ended("server", [self.server], "scale", "statefulset", "ormo-server", "--replicas=0")

    def _ended(self, role: Role, pods: Sequence[str], *order: str, given: str | None = None) -> list[Ending]:
        """Give an order, and see each of these end; their codes are told only while somebody watches."""
        graces = [float(self.kubectl.json("get", "pod", pod)["spec"]["terminationGracePeriodSeconds"]) for pod in pods]
        watches = [_Watch(self.kubectl, pod) for pod in pods]
        try:
            began = time.monotonic()
            self.kubectl(*order, given=given)
            return [
                Ending(pod, watch.code(grace + self.patience_seconds), _CLEAN[role], time.monotonic() - began, grace)
                for pod, grace, watch in zip(pods, graces, watches, strict=True)
            ]
        finally:
            for watch in watches:
                watch.close()

    def _status(self, pod: str) -> Object:
        (status,) = self.kubectl.json("get", "pod", pod)["status"]["containerStatuses"]
        found: Object = status
        return found


class _Watch:
    """Looks at a pod until its container has ended."""

    def __init__(self, kubectl: Kubectl, pod: str) -> None:
        words = ["get", "pod", pod, "--watch", f"--output=jsonpath={_TERMINATED}"]
        self._pod = pod
        self._process = subprocess.Popen(kubectl.command(words), stdout=subprocess.PIPE, text=True)

    def code(self, seconds: float) -> int:
        """The exit code, once it is known."""
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                if line.strip():
                    return int(line)
        finally:
            timer.cancel()
        raise AssertionError(f"{self._pod} did not say within {seconds:g} s with which code it ended")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def secret(name: str, folder: Path) -> Object:
    """A folder's files."""
    data = {path.name: base64.b64encode(path.read_bytes()).decode() for path in sorted(folder.iterdir())}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}


def rendered(overlay: str, namespace: str, folder: Path) -> list[Object]:
    """An overlay's objects in a namespace, with what the tests set, by a kustomization in the folder."""
    images = [
        {"name": name, "newName": wanted.rpartition(":")[0], "newTag": wanted.rpartition(":")[2]}
        for name, variable in IMAGES.items()
        if (wanted := os.environ.get(variable))
    ]
    resource = os.path.relpath((KUBERNETES / "overlays" / overlay).resolve(), folder.resolve())
    kustomization: Object = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": [resource],
        "images": images,
        "labels": [{"pairs": {"ormo-test": namespace}, "includeTemplates": True}],
    }
    if overlay in RUNS:
        kustomization["configMapGenerator"] = [
            {"name": name, "behavior": "merge", "literals": settings} for name, settings in _SETTINGS.items()
        ]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    ran = subprocess.run(
        [program("kubectl"), "kustomize", folder], capture_output=True, text=True, check=False, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    return list(yaml.safe_load_all(ran.stdout))


@contextlib.contextmanager
def namespace() -> Iterator[Kubectl]:
    """A fresh one of the cluster, which goes with all that is in it; skipped with a sentence where there is none."""
    if not os.environ.get("KUBECONFIG"):
        pytest.skip("there is no cluster: KUBECONFIG names none")
    kubectl = Kubectl(f"ormo-test-{secrets.token_hex(4)}")
    kubectl("create", "namespace", kubectl.namespace)
    try:
        yield kubectl
    finally:
        kubectl("delete", "namespace", kubectl.namespace, "--timeout=170s")


@contextlib.contextmanager
def cluster_run(overlay: str) -> Iterator[ClusterRun]:
    """An overlay that runs, until the block ends."""
    with namespace() as kubectl, tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        certificates = Certificates(folder / "tls", ACCESS.read_text()) if "tls" in overlay else None
        objects = rendered(overlay, kubectl.namespace, folder)
        made = ClusterRun(kubectl, certificates)
        made.start([each for each in objects if not each["apiVersion"].startswith("cert-manager.io/")])
        yield made
