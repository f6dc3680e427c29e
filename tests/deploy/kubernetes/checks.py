"""What no schema can say of the manifests. Each check yields a sentence for everything that is wrong."""

import re
from collections.abc import Callable, Iterator

from deploy.kubernetes.rendering import FOREIGN_CLAIMS, KUBERNETES, Manifests, Object, Pod, probes, quantity
from deploy.kubernetes.settings import command, environment, program_settings, settings, unknown
from ormo_runtime.settings_loader import SettingsProblemsError
from ormo_server.core.method import memory_need
from ormo_server.metrics.process import ALIVE, READY
from ormo_server.security import Role, by_name, parsed_list
from ormo_server.service.server import LIVENESS_NAME, SERVICE_NAME
from ormo_server.settings import ServerSettings
from ormo_worker.cli import FAILED_EXIT_CODE, REPLACED_EXIT_CODE
from ormo_worker.settings import RunSettings

Check = Callable[[Manifests], Iterator[str]]

# Python, PyTorch and gRPC before there is a model: `make train` shows 273 MB for the whole server.
INTERPRETER_BYTES = 512 * 2**20
# Of a slow network disk.
DISK_BYTES_PER_SECOND = 10e6
SPARE_SECONDS = 5


def selectors(manifests: Manifests) -> Iterator[str]:
    """Who selects pods gets those that are meant."""
    for each in manifests.of("StatefulSet", "Deployment"):
        (own,) = (pod for pod in manifests.pods() if pod.owner is each)
        if manifests.selected(each["spec"]["selector"]) != [own]:
            yield f"{own.name} does not select its own pods, and only them"
    for each in manifests.of("Service", "PodDisruptionBudget"):
        selector = each["spec"]["selector"]
        found = manifests.selected(selector if "matchLabels" in selector else {"matchLabels": selector})
        if [pod.component for pod in found] != ["ormo-server"]:
            yield f"{each['kind']} {each['metadata']['name']} does not select the server"
    for each in manifests.of("NetworkPolicy"):
        if not manifests.selected(each["spec"]["podSelector"]):
            yield f"NetworkPolicy {each['metadata']['name']} is for no pod"


def references(manifests: Manifests) -> Iterator[str]:
    """What a pod needs is there."""
    named = {(each["kind"], each["metadata"]["name"]) for each in manifests.objects}
    for pod in manifests.pods():
        wanted = [("ServiceAccount", pod.spec["serviceAccountName"])]
        wanted += [("ConfigMap", source["configMapRef"]["name"]) for source in pod.container["envFrom"]]
        volumes = pod.spec["volumes"]
        wanted += [("ConfigMap", volume["configMap"]["name"]) for volume in volumes if "configMap" in volume]
        yield from (f"{pod.name} needs {kind} {name}" for kind, name in wanted if (kind, name) not in named)
        made = {each["spec"]["secretName"] for each in manifests.of("Certificate")}
        made |= {each["metadata"]["name"] for each in manifests.of("Secret")}
        secrets = {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
        yield from (f"{pod.name} mounts a Secret that nobody makes: {secret}" for secret in secrets - made)
        claims = {volume.get("persistentVolumeClaim", {}).get("claimName") for volume in pod.spec["volumes"]} - {None}
        yield from (f"{pod.name} mounts a claim that nobody makes: {claim}" for claim in claims - FOREIGN_CLAIMS)
    for each in manifests.of("StatefulSet"):
        if ("Service", each["spec"]["serviceName"]) not in named:
            yield f"there is no Service {each['spec']['serviceName']}"
        elif manifests.one("Service", each["spec"]["serviceName"])["spec"].get("clusterIP") != "None":
            yield f"Service {each['spec']['serviceName']} is not headless"
    for each in manifests.objects:
        if each["kind"] != "Namespace" and each["metadata"]["namespace"] != "ormo":
            yield f"{each['kind']} {each['metadata']['name']} is in another namespace"


def ports(manifests: Manifests) -> Iterator[str]:
    """Every port that is named or numbered somewhere is one that the program listens on."""
    for pod in manifests.pods():
        told = settings(manifests, pod)
        listens = {"metrics": told.metrics_listen} | ({"grpc": told.listen} if hasattr(told, "listen") else {})
        wanted = {name: f"0.0.0.0:{port}" for name, port in pod.ports.items()}
        if listens != wanted:
            yield f"{pod.name} has the ports {wanted}, its program listens on {listens}"
        for probe in probes(pod.container):
            (way,) = {"grpc", "httpGet"} & set(probe)
            if probe[way]["port"] != pod.ports[{"grpc": "grpc", "httpGet": "metrics"}[way]]:
                yield f"a probe of {pod.name} asks port {probe[way]['port']}"
        if pod.component != "ormo-server" and told.server != _address(manifests):
            yield f"{pod.name} looks for the server at {told.server}, it is at {_address(manifests)}"
    for service in manifests.of("Service"):
        for port in service["spec"]["ports"]:
            if manifests.server.ports.get(port["targetPort"]) != port["port"]:
                yield f"Service {service['metadata']['name']} forwards to {port}"
    for policy in manifests.of("NetworkPolicy"):
        yield from _policy_ports(manifests, policy)


def _address(manifests: Manifests) -> str:
    service = manifests.one("Service", "ormo-server")
    (port,) = (port["port"] for port in service["spec"]["ports"] if port["name"] == "grpc")
    return f"{service['metadata']['name']}:{port}"


def _policy_ports(manifests: Manifests, policy: Object) -> Iterator[str]:
    for rule in policy["spec"].get("ingress", []):
        open_ports = {port for pod in manifests.selected(policy["spec"]["podSelector"]) for port in pod.ports.values()}
        for port in rule["ports"]:
            if port["port"] not in open_ports:
                yield f"NetworkPolicy {policy['metadata']['name']} lets in to port {port['port']}, which nobody has"


def program_arguments(manifests: Manifests) -> Iterator[str]:
    """Arguments and environment are settings of the real programs, with values that they take."""
    for pod in manifests.pods():
        cls = program_settings(pod)
        for name in unknown([*environment(manifests, pod)], cls):
            # task.env is read by both programs; what only one of them knows does not belong there.
            yield f"{pod.name} sets {name}, which {' '.join(command(pod))} does not know"
        for index in range(pod.count):
            try:
                settings(manifests, pod, index)
            except SettingsProblemsError as error:
                yield f"{pod.name}: {error}"


def kubernetes_variables(manifests: Manifests) -> Iterator[str]:
    """Kubernetes adds no ORMO_SERVER_PORT=tcp://... and the like."""
    for pod in manifests.pods():
        if pod.spec.get("enableServiceLinks") is not False:
            yield f"{pod.name} gets a variable for each Service"


def images(manifests: Manifests) -> Iterator[str]:
    """This version's images, from no registry in particular."""
    version = re.search(r'^version = "(.+)"$', (KUBERNETES.parents[1] / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    for pod in manifests.pods():
        image = pod.container["image"]
        program, *_ = command(pod)
        if image not in (f"{program}:{version[1]}", f"{program}:{version[1]}-cuda"):
            yield f"{pod.name} runs {program} in the image {image}"
        if ("nvidia.com/gpu" in pod.container["resources"]["limits"]) != image.endswith("-cuda"):
            yield f"{pod.name} has a GPU without the CUDA image, or the other way round: {image}"


def security(manifests: Manifests) -> Iterator[str]:
    """The `restricted` standard, a read-only root, and no token."""
    (namespace,) = manifests.of("Namespace")
    if namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] != "restricted":
        yield "the namespace does not enforce the restricted standard"
    for pod in manifests.pods():
        context, container = pod.spec.get("securityContext", {}), pod.container.get("securityContext", {})
        wanted = {
            "a token": pod.spec.get("automountServiceAccountToken") is False,
            "root": context.get("runAsNonRoot") is True and context.get("runAsUser") == 10001,
            "all system calls": context.get("seccompProfile") == {"type": "RuntimeDefault"},
            "more privileges": container.get("allowPrivilegeEscalation") is False,
            "a writable root": container.get("readOnlyRootFilesystem") is True,
            "capabilities": container.get("capabilities") == {"drop": ["ALL"]},
            "the host": not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec),
            "a host path": not any("hostPath" in volume for volume in pod.spec["volumes"]),
        }
        yield from (f"{pod.name} may have {what}" for what, ruled_out in wanted.items() if not ruled_out)
        mounted = {mount["mountPath"] for mount in pod.container["volumeMounts"]}
        if "/tmp" not in mounted:
            yield f"{pod.name} has no place for temporary files"
        if pod.container["resources"]["requests"]["memory"] != pod.container["resources"]["limits"]["memory"]:
            yield f"{pod.name} may be killed for memory that it was promised"
        if "ephemeral-storage" not in pod.container["resources"]["limits"]:
            yield f"{pod.name} may fill its node's disk"


def server_shape(manifests: Manifests) -> Iterator[str]:
    """One server, which keeps its run on its volume and can leave its node."""
    pod, told = manifests.server, _server_settings(manifests)
    if pod.owner["kind"] != "StatefulSet" or pod.count != 1:
        yield "the server is not one pod of a StatefulSet"
    mounts = {mount["mountPath"] for mount in pod.container["volumeMounts"] if mount["name"] == "data"}
    if [str(parent) for parent in told.directory.parents][:1] != [*mounts]:
        yield f"{told.directory} is not a folder of its own on the volume, which is at {mounts}"
    if told.exit_when_finished:
        yield "a StatefulSet would start the server again and again after the run's end"
    if pod.container.get("command") != ["ormo-server"]:
        yield "a shell stands between SIGTERM and the server"
    (budget,) = (each["spec"] for each in manifests.of("PodDisruptionBudget"))
    if "minAvailable" in budget or budget.get("maxUnavailable", 0) < 1:
        yield "the budget keeps the server's node from being drained"


def server_probes(manifests: Manifests) -> Iterator[str]:
    """Probes ask for names that the server registers; a busy one is not killed."""
    container, alive, ready = manifests.server.container, LIVENESS_NAME, SERVICE_NAME
    asked = {
        kind: container.get(kind, {}).get("grpc", {}).get("service")
        for kind in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    if _server_settings(manifests).tls_cert is not None:
        # The kubelet has no certificate.
        asked = {kind: container.get(kind, {}).get("httpGet", {}).get("path") for kind in asked}
        alive, ready = ALIVE, READY
    wanted = {"startupProbe": alive, "readinessProbe": ready, "livenessProbe": alive}
    yield from (
        f"{kind} asks for {asked[kind]!r}, not {name!r}" for kind, name in wanted.items() if asked[kind] != name
    )
    patience = _seconds(container["livenessProbe"])
    if patience < 120 or container["livenessProbe"]["timeoutSeconds"] < 10:
        yield f"a server that is busy for {patience} s is killed"
    if _seconds(container["startupProbe"]) < 300:
        yield "a server that restores a large checkpoint from a slow disk is killed"


def _seconds(probe: Object) -> int:
    return probe["periodSeconds"] * probe["failureThreshold"]


def certificates(manifests: Manifests) -> Iterator[str]:
    """With TLS everybody has a certificate, by a name that the server's list has in the right role."""
    if _server_settings(manifests).tls_cert is None:
        return
    made = {each["spec"]["secretName"]: each["spec"] for each in manifests.of("Certificate")}
    lines = parsed_list(manifests.access)
    for pod in manifests.pods():
        own = made[_mounted(pod, "/tls")["secret"]["secretName"]]
        told = settings(manifests, pod)
        paths = [told.tls_cert, told.tls_key, getattr(told, "tls_ca", None) or getattr(told, "tls_client_ca", None)]
        if [str(path) for path in paths] != ["/tls/tls.crt", "/tls/tls.key", "/tls/ca.crt"]:
            yield f"{pod.name} reads other files than cert-manager writes: {paths}"
        if pod.spec["securityContext"].get("fsGroup") != pod.spec["securityContext"]["runAsGroup"]:
            yield f"{pod.name} can't read its key"
        if pod.component == "ormo-server":
            yield from _server_names(manifests, own)
            keys = {
                volume["secret"]["secretName"] for volume in pod.spec["volumes"] if "secret" in volume
            } & made.keys()
            if keys != {own["secretName"]}:
                yield f"{pod.name} has the keys of others: {keys}"
            continue
        caller = by_name(lines, own["dnsNames"])
        role = Role.WORKER if pod.component == "ormo-worker" else Role.READER
        if own["usages"] != ["client auth"] or caller is None or caller.roles != {role}:
            yield f"{pod.name} is no {role} with a certificate for {own['dnsNames']}"
        for index in range(pod.count if role is Role.WORKER else 0):
            worker = environment(manifests, pod, index)["ORMO_WORKER_ID"]
            if caller is not None and not caller.owns(worker):
                yield f"{pod.name} may not call itself {worker}"


def _server_names(manifests: Manifests, own: Object) -> Iterator[str]:
    names = {_address(manifests).partition(":")[0], "localhost"}
    if own["usages"] != ["server auth"] or not names <= set(own["dnsNames"]):
        yield f"the server is called {names}, its certificate is for {own['dnsNames']}"


def _mounted(pod: Pod, path: str) -> Object:
    (name,) = (mount["name"] for mount in pod.container["volumeMounts"] if mount["mountPath"] == path)
    (volume,) = (volume for volume in pod.spec["volumes"] if volume["name"] == name)
    return volume


def grace_period(manifests: Manifests) -> Iterator[str]:
    """SIGKILL comes after preStop, the drain and the last checkpoint."""
    pod, told = manifests.server, _server_settings(manifests)
    waits = pod.container["lifecycle"]["preStop"]["sleep"]["seconds"]
    wanted = waits + told.drain_seconds + _checkpoint_bytes(manifests) / DISK_BYTES_PER_SECOND + SPARE_SECONDS
    if pod.spec["terminationGracePeriodSeconds"] < wanted:
        yield f"the server may need {wanted:.0f} s to end, and gets {pod.spec['terminationGracePeriodSeconds']}"


def memory(manifests: Manifests) -> Iterator[str]:
    """The server's memory holds the largest model that it takes, and its disk the checkpoints."""
    told, container = _server_settings(manifests), manifests.server.container
    if told.memory_limit_bytes is None:
        yield "a model of any size is taken"
        return
    exchanges = told.max_workers * told.slots_per_worker + told.max_readers
    wanted = memory_need(told.run(), _largest_model(manifests), exchanges).total_bytes
    if told.memory_limit_bytes < wanted:
        yield f"the largest model needs {wanted:,} bytes, ORMO_MEMORY_LIMIT_BYTES is {int(told.memory_limit_bytes):,}"
    requested = quantity(container["resources"]["requests"]["memory"])
    if requested < told.memory_limit_bytes + INTERPRETER_BYTES:
        yield f"{requested:,.0f} bytes are not ORMO_MEMORY_LIMIT_BYTES and {INTERPRETER_BYTES:,} for the interpreter"
    (claim,) = manifests.server.owner["spec"]["volumeClaimTemplates"]
    disk = quantity(claim["spec"]["resources"]["requests"]["storage"])
    journal = 2 * told.journal_max_bytes if told.journal else 0
    if disk < (told.checkpoints_kept + 1) * _checkpoint_bytes(manifests) + journal:
        kept = told.checkpoints_kept
        yield f"a disk of {disk:,.0f} bytes does not hold {kept} checkpoints, the next, and the journal"
    if not told.journal:
        yield "a server that is killed loses what came after its last checkpoint"


def _checkpoint_bytes(manifests: Manifests) -> int:
    """The state, and the model once more in a file of its own."""
    elements = _largest_model(manifests)
    return memory_need(_server_settings(manifests).run(), elements, slots=0).checkpoint_bytes + 4 * elements


def _largest_model(manifests: Manifests) -> int:
    """As the comment beside ORMO_MEMORY_LIMIT_BYTES says: in the overlay whose limit this is, or else in the base."""
    limit = f"ORMO_MEMORY_LIMIT_BYTES={manifests.config('ormo-server')['data']['ORMO_MEMORY_LIMIT_BYTES']}"
    places = [KUBERNETES / "base", *(KUBERNETES / "overlays" / name for name in ("local", "gpu"))]
    (text,) = (text for text in ((place / "server.env").read_text() for place in places) if limit in text)
    (stated,) = re.findall(r"for up to ([\d,]+)\s+parameters", " ".join(text.replace("#", " ").split()), re.IGNORECASE)
    return int(stated.replace(",", ""))


def _server_settings(manifests: Manifests) -> ServerSettings:
    told = settings(manifests, manifests.server)
    assert isinstance(told, ServerSettings)
    return told


def workers(manifests: Manifests) -> Iterator[str]:
    """All workers fit into the run, each with an id of its own that its replacement has too."""
    pods = manifests.pods("ormo-worker")
    told = {(pod.name, index): settings(manifests, pod, index) for pod in pods for index in range(pod.count)}
    runs = [each for each in told.values() if isinstance(each, RunSettings)]
    if len({each.worker_id for each in runs}) != len(told) or not all(each.worker_id for each in runs):
        yield "workers share an id, or have none that outlives the pod"
    if len(told) > _server_settings(manifests).max_workers:
        yield f"{len(told)} workers come, and the server takes {_server_settings(manifests).max_workers}"
    if len({each.batch_size for each in runs}) != 1:
        yield "batches differ in size: samples of the larger ones count less"
    if any(each.give_up_after_seconds is not None or each.leave_after_gradients for each in runs):
        yield "a worker leaves before the run is over"
    tasks = {(each.task, each.data_dir) for each in (settings(manifests, pod) for pod in _clients(manifests))}
    if len(tasks) != 1:
        yield f"workers and evaluators have different tasks: {tasks}"
    for pod in pods:
        if pod.container["resources"]["limits"].get("nvidia.com/gpu", 1) != 1:
            yield f"{pod.name} has several GPUs, and uses one"


def _clients(manifests: Manifests) -> list[Pod]:
    return [*manifests.pods("ormo-worker"), *manifests.pods("ormo-evaluator")]


def jobs(manifests: Manifests) -> Iterator[str]:
    """Jobs are what the API server takes, can be scaled, and do the right thing when a worker ends."""
    for job in manifests.jobs:
        name, spec = job["metadata"]["name"], job["spec"]
        if spec["completionMode"] != "Indexed" or spec["parallelism"] != spec["completions"]:
            yield f"{name} can't be scaled: parallelism and completions of an indexed Job differ"
        # Both are demanded of a podFailurePolicy, by validation that is in no schema.
        if spec["podReplacementPolicy"] != "Failed" or spec["template"]["spec"]["restartPolicy"] != "Never":
            yield f"{name} would be refused"
        if "backoffLimitPerIndex" not in spec or "backoffLimit" in spec:
            yield f"{name} ends as a whole when one worker fails too often"
        for rule in spec["podFailurePolicy"]["rules"]:
            containers = [container["name"] for container in spec["template"]["spec"]["containers"]]
            if rule.get("onExitCodes", {}).get("containerName", "worker") not in containers:
                yield f"{name} looks at the exit code of a container that is not there"
        wanted = {
            (FAILED_EXIT_CODE, False): "Count",
            (137, False): "Count",  # out of memory
            (143, True): "Ignore",
            (137, True): "Ignore",
            (2, False): "FailIndex",
            (REPLACED_EXIT_CODE, False): "FailIndex",
        }
        for (code, disrupted), action in wanted.items():
            got = pod_failure_action(spec["podFailurePolicy"], code, disrupted=disrupted)
            if got != action:
                yield f"{name}: exit code {code}{' by disruption' if disrupted else ''} means {got}, not {action}"


def pod_failure_action(policy: Object, code: int, *, disrupted: bool) -> str:
    """What the Job controller does: the first rule that matches, else the failure counts."""
    for rule in policy["rules"]:
        if "onPodConditions" in rule:
            condition = {"type": "DisruptionTarget", "status": "True"}
            if disrupted and condition in rule["onPodConditions"]:
                return rule["action"]
        elif (code in rule["onExitCodes"]["values"]) == (rule["onExitCodes"]["operator"] == "In"):
            return rule["action"]
    return "Count"


ALL: tuple[Check, ...] = (
    selectors,
    references,
    ports,
    program_arguments,
    kubernetes_variables,
    images,
    security,
    server_shape,
    server_probes,
    certificates,
    grace_period,
    memory,
    workers,
    jobs,
)
