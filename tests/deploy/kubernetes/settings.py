"""What a container's program is told: its arguments and environment, read as the program reads them."""

import re
from collections.abc import Sequence

from deploy.kubernetes.rendering import Manifests, Pod
from ormo_runtime.settings import Settings
from ormo_runtime.settings_loader import read_settings
from ormo_server.settings import ServerSettings
from ormo_worker.settings import EvaluateSettings, RunSettings

PROGRAMS: dict[tuple[str, str], type[Settings]] = {
    ("ormo-server", "serve"): ServerSettings,
    ("ormo-worker", "run"): RunSettings,
    ("ormo-worker", "evaluate"): EvaluateSettings,
}
_PREFIX = "ORMO_"


def command(pod: Pod) -> list[str]:
    """The program and its arguments, without the shell that may stand before them."""
    whole = [*pod.container["command"], *pod.container["args"]]
    if whole[0] == "sh":
        assert whole[1] == "-c"
        assert '"$@"' in whole[2]
        return whole[4:]
    return whole


def program_settings(pod: Pod) -> type[Settings]:
    name, verb, *_ = command(pod)
    return PROGRAMS[name, verb]


def environment(manifests: Manifests, pod: Pod, index: int = 0) -> dict[str, str]:
    """As the kubelet makes it for the pod of this index: ConfigMaps first, and `$(NAME)` from what stands before."""
    made: dict[str, str] = {}
    for source in pod.container["envFrom"]:
        made |= manifests.one("ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in pod.container["env"]:
        if "value" in variable:
            made[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda name: made[name[1]], variable["value"])
        else:
            made[variable["name"]] = _field(pod, variable["valueFrom"]["fieldRef"]["fieldPath"], index)
    return made


def _field(pod: Pod, path: str, index: int) -> str:
    return {
        "metadata.labels['batch.kubernetes.io/job-name']": pod.owner["metadata"]["name"],
        "metadata.annotations['batch.kubernetes.io/job-completion-index']": str(index),
    }[path]


def settings(manifests: Manifests, pod: Pod, index: int = 0) -> Settings:
    """What the program makes of it.

    Raises:
        SettingsProblemsError: it would refuse to start.
    """
    _, _, *flags = command(pod)
    return read_settings(program_settings(pod), flags, environment(manifests, pod, index), program=pod.name)


def unknown(names: Sequence[str], cls: type[Settings]) -> list[str]:
    """Variables with our prefix that the program does not know; it would silently pass over them."""
    known = {f"{_PREFIX}{field}".upper() for field in cls.model_fields} | {f"{_PREFIX}CONFIG"}
    return [name for name in names if name.startswith(_PREFIX) and name not in known]
