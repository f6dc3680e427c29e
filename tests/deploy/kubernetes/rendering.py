"""The overlays as `kubectl kustomize` renders them, and ways round in them."""

import base64
import copy
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
KUBERNETES = ROOT / "deploy" / "kubernetes"
RUNS = ("local", "gpu", "tls", "gpu-tls")  # with a server in them
OVERLAYS = (*RUNS, "monitoring")
# Made by the user, on storage that only they know.
FOREIGN_CLAIMS = {"ormo-data"}

Object = dict[str, Any]

_WORKLOADS = ("StatefulSet", "Deployment", "Job")
_BYTES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def program(name: str, variable: str | None = None) -> str:
    """Where a program is; without it the test is skipped, but fails in CI."""
    found = (os.environ.get(variable) if variable else None) or shutil.which(name)
    if found is None:
        reason = f"{name} is not installed" + (f", and {variable} does not say where it is" if variable else "")
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@functools.cache
def rendered_text(directory: Path) -> str:
    kustomize = subprocess.run(
        [program("kubectl"), "kustomize", str(directory)], capture_output=True, text=True, check=False, timeout=60
    )
    assert kustomize.returncode == 0, kustomize.stderr
    assert "deprecated" not in kustomize.stderr
    return kustomize.stdout


@functools.cache
def _rendered(directory: Path) -> tuple[Object, ...]:
    return tuple(yaml.safe_load_all(rendered_text(directory)))


def overlay(*names: str) -> "Manifests":
    """The objects of these overlays, applied one after the other; the caller may change them."""
    objects: list[Object] = []
    for name in names:
        objects += copy.deepcopy(_rendered(KUBERNETES / "overlays" / name))
    return Manifests(objects)


@dataclass(frozen=True)
class Pod:
    """A workload's pods.

    Attributes:
        owner: the workload.
        template: of its pods.
    """

    owner: Object
    template: Object

    @property
    def name(self) -> str:
        return f"{self.owner['kind']}/{self.owner['metadata']['name']}"

    @property
    def labels(self) -> dict[str, str]:
        labels = dict(self.template["metadata"]["labels"])
        if self.owner["kind"] == "Job":
            labels["batch.kubernetes.io/job-name"] = self.owner["metadata"]["name"]
        return labels

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/name"]

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def container(self) -> Object:
        (container,) = self.spec["containers"]
        return container

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def count(self) -> int:
        return self.owner["spec"].get("parallelism", self.owner["spec"].get("replicas"))


@dataclass(frozen=True)
class Manifests:
    """Objects that are applied together."""

    objects: list[Object]

    def of(self, *kinds: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] in kinds]

    def one(self, kind: str, name: str) -> Object:
        (found,) = (each for each in self.of(kind) if each["metadata"]["name"] == name)
        return found

    def config(self, name: str) -> Object:
        """The generated ConfigMap of this name, whatever its hash."""
        (found,) = (
            each
            for each in self.of("ConfigMap")
            if re.fullmatch(re.escape(name) + "-[a-z0-9]{10}", each["metadata"]["name"])
        )
        return found

    @property
    def access(self) -> str:
        """The server's list of who may call."""
        return base64.b64decode(self.one("Secret", "ormo-access")["data"]["access.toml"]).decode()

    def replace_access(self, text: str) -> None:
        """Have another list in its place."""
        self.one("Secret", "ormo-access")["data"]["access.toml"] = base64.b64encode(text.encode()).decode()

    def pods(self, component: str | None = None) -> list[Pod]:
        pods = [Pod(each, each["spec"]["template"]) for each in self.of(*_WORKLOADS)]
        return [pod for pod in pods if component in (None, pod.component)]

    @property
    def server(self) -> Pod:
        (server,) = self.pods("ormo-server")
        return server

    @property
    def jobs(self) -> list[Object]:
        return self.of("Job")

    def selected(self, selector: Object) -> list[Pod]:
        return [pod for pod in self.pods() if selects(selector, pod.labels)]


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector takes these labels."""
    assert set(selector) <= {"matchLabels", "matchExpressions"}, selector
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True


def quantity(text: str | int) -> float:
    """A Kubernetes quantity in bytes, or in cores."""
    match = re.fullmatch(r"(\d+)(m|[kMG]i?|Ki)?", str(text))
    assert match, text
    number, unit = int(match[1]), match[2] or ""
    return number / 1000 if unit == "m" else number * _BYTES[unit]


def probes(container: Object) -> Iterator[Object]:
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        if kind in container:
            yield container[kind]
