"""The checks are able to fail: each planted fault is found, by the check that is there for it."""

from collections.abc import Callable

import pytest

from deploy.kubernetes import checks
from deploy.kubernetes.checks import Check
from deploy.kubernetes.rendering import Manifests, overlay
from deploy.kubernetes.schemas import against_schemas

Fault = Callable[[Manifests], object]


def _server(manifests: Manifests) -> dict:
    return manifests.server.owner["spec"]


def _set(manifests: Manifests, config: str, **values: str) -> None:
    manifests.config(config)["data"].update(values)


def _job(manifests: Manifests) -> dict:
    return manifests.jobs[0]["spec"]


def _access(manifests: Manifests, old: str, new: str) -> None:
    assert old in manifests.access
    manifests.replace_access(manifests.access.replace(old, new))


FAULTS_OF_TLS: dict[str, tuple[Check, Fault, str]] = {
    "a certificate with a field that cert-manager does not know": (
        against_schemas,
        lambda it: it.one("Certificate", "ormo-worker")["spec"].update(renewAfter="1h"),
        "unknown field or changed value .spec.renewAfter",
    ),
    "a Secret that nobody makes": (
        checks.references,
        lambda it: it.one("Certificate", "ormo-worker")["spec"].update(secretName="other"),
        "mounts a Secret that nobody makes: ormo-worker-tls",
    ),
    "a list that is not there": (
        checks.references,
        lambda it: it.one("Secret", "ormo-access")["metadata"].update(name="other"),
        "mounts a Secret that nobody makes: ormo-access",
    ),
    "a probe that speaks gRPC to a port with TLS": (
        checks.server_probes,
        lambda it: it.server.container.update(livenessProbe={**it.server.container["livenessProbe"], "httpGet": {}}),
        "livenessProbe asks for None",
    ),
    "a server with another name than workers call": (
        checks.certificates,
        lambda it: it.one("Certificate", "ormo-server")["spec"].update(dnsNames=["localhost"]),
        "its certificate is for ['localhost']",
    ),
    "workers that the list has as readers": (
        checks.certificates,
        lambda it: _access(
            it,
            'role = "worker"\ncertificate = "ormo-worker"\nworkers = ["ormo-worker-*"]',
            'role = "reader"\ncertificate = "ormo-worker"',
        ),
        "Job/ormo-worker is no worker with a certificate for ['ormo-worker']",
    ),
    "workers that may not have their names": (
        checks.certificates,
        lambda it: _access(it, "ormo-worker-*", "ormo-worker-a100-*"),
        "Job/ormo-worker may not call itself ormo-worker-0",
    ),
    "a key that only root can read": (
        checks.certificates,
        lambda it: it.jobs[0]["spec"]["template"]["spec"]["securityContext"].pop("fsGroup"),
        "Job/ormo-worker can't read its key",
    ),
    "a key of somebody else in the server's pod": (
        checks.certificates,
        lambda it: it.server.spec["volumes"].append({"name": "o", "secret": {"secretName": "ormo-operator-tls"}}),
        "StatefulSet/ormo-server has the keys of others",
    ),
    "a key in another place": (
        checks.certificates,
        lambda it: _set(it, "ormo-task", ORMO_TLS_KEY="/tls/key"),
        "reads other files than cert-manager writes",
    ),
}

FAULTS: dict[str, tuple[Check, Fault, str]] = {
    "a field that no Kubernetes knows": (
        against_schemas,
        lambda it: _server(it).update(replica=1),
        "'replica' was unexpected",
    ),
    "a kind that nobody knows": (
        against_schemas,
        lambda it: manifest_of(it, "StatefulSet").update(kind="StatefullSet"),
        "StatefullSet",
    ),
    "a value of another type": (
        against_schemas,
        lambda it: _server(it).update(replicas="one"),
        "is not of type 'integer'",
    ),
    "a Service that selects nothing": (
        checks.selectors,
        lambda it: it.one("Service", "ormo-server")["spec"].update(selector={"app": "ormo"}),
        "Service ormo-server does not select the server",
    ),
    "a policy for pods that are not there": (
        checks.selectors,
        lambda it: it.one("NetworkPolicy", "ormo-server")["spec"].update(podSelector={"matchLabels": {"a": "b"}}),
        "is for no pod",
    ),
    "a pod that may fill the disk": (
        checks.security,
        lambda it: it.server.container["resources"]["limits"].pop("ephemeral-storage"),
        "StatefulSet/ormo-server may fill its node's disk",
    ),
    "a ConfigMap by a wrong name": (
        checks.references,
        lambda it: it.server.container.update(envFrom=[{"configMapRef": {"name": "ormo"}}]),
        "needs ConfigMap ormo",
    ),
    "a port that the program does not listen on": (
        checks.ports,
        lambda it: it.server.container["env"][0].update(value="0.0.0.0:50052"),
        "its program listens on",
    ),
    "a Service to a port by a wrong name": (
        checks.ports,
        lambda it: it.one("Service", "ormo-server")["spec"]["ports"][0].update(targetPort="rpc"),
        "Service ormo-server forwards to",
    ),
    "a server by a wrong address": (
        checks.ports,
        lambda it: _set(it, "ormo-task", ORMO_SERVER="server:50051"),
        "looks for the server at server:50051",
    ),
    "a setting that does not exist": (
        checks.program_arguments,
        lambda it: _set(it, "ormo-server", ORMO_LEARNING_RAT="1"),
        "sets ORMO_LEARNING_RAT, which ormo-server serve does not know",
    ),
    "a setting with a value that is refused": (
        checks.program_arguments,
        lambda it: _set(it, "ormo-server", ORMO_MAX_WORKERS="many"),
        "--max-workers is 'many'",
    ),
    "a flag that does not exist": (
        checks.program_arguments,
        lambda it: it.pods("ormo-worker")[0].container.update(args=["ormo-worker", "run", "--gpu"]),
        "unknown flag --gpu",
    ),
    "a variable for each Service": (
        checks.kubernetes_variables,
        lambda it: it.server.spec.pop("enableServiceLinks"),
        "gets a variable for each Service",
    ),
    "the tag latest": (
        checks.images,
        lambda it: it.server.container.update(image="ormo-server:latest"),
        "in the image ormo-server:latest",
    ),
    "a GPU without CUDA": (
        checks.images,
        lambda it: it.pods("ormo-worker")[0].container["resources"]["limits"].update({"nvidia.com/gpu": 1}),
        "has a GPU without the CUDA image",
    ),
    "a capability": (
        checks.security,
        lambda it: it.server.container["securityContext"].update(capabilities={"add": ["NET_ADMIN"]}),
        "may have capabilities",
    ),
    "root": (checks.security, lambda it: it.server.spec["securityContext"].pop("runAsNonRoot"), "may have root"),
    "a run beside its volume": (
        checks.server_shape,
        lambda it: _set(it, "ormo-server", ORMO_DIRECTORY="/tmp/run"),
        "is not a folder of its own on the volume",
    ),
    "a budget that blocks every drain": (
        checks.server_shape,
        lambda it: manifest_of(it, "PodDisruptionBudget").update(spec={"minAvailable": 1}),
        "keeps the server's node from being drained",
    ),
    "a server that ends with its run": (
        checks.server_shape,
        lambda it: _set(it, "ormo-server", ORMO_EXIT_WHEN_FINISHED="true"),
        "start the server again and again",
    ),
    "a probe for a name that is not registered": (
        checks.server_probes,
        lambda it: it.server.container["readinessProbe"]["grpc"].update(service="ormo.v2.ParameterServer"),
        "readinessProbe asks for 'ormo.v2.ParameterServer'",
    ),
    "an impatient probe": (
        checks.server_probes,
        lambda it: it.server.container["livenessProbe"].update(failureThreshold=1),
        "busy for 30 s is killed",
    ),
    "a drain longer than the grace period": (
        checks.grace_period,
        lambda it: _set(it, "ormo-server", ORMO_DRAIN_SECONDS="60"),
        "s to end, and gets 60",
    ),
    "a rule that keeps a vector for each slot": (
        checks.memory,
        lambda it: _set(it, "ormo-server", ORMO_METHOD="shifted"),
        "the largest model needs",
    ),
    "a pod with too little memory": (
        checks.memory,
        lambda it: it.server.container["resources"]["requests"].update(memory="512Mi"),
        "are not ORMO_MEMORY_LIMIT_BYTES and",
    ),
    "a small disk": (
        checks.memory,
        lambda it: _server(it)["volumeClaimTemplates"][0]["spec"]["resources"]["requests"].update(storage="40Mi"),
        "does not hold 3 checkpoints",
    ),
    "a disk without room for the journal": (
        checks.memory,
        lambda it: _set(it, "ormo-server", ORMO_JOURNAL_MAX_BYTES="500MiB"),
        "does not hold 3 checkpoints, the next, and the journal",
    ),
    "a server that keeps no journal": (
        checks.memory,
        lambda it: _set(it, "ormo-server", ORMO_JOURNAL="false"),
        "loses what came after its last checkpoint",
    ),
    "more workers than the server takes": (
        checks.workers,
        lambda it: _job(it).update(parallelism=9, completions=9),
        "9 workers come, and the server takes 8",
    ),
    "one id for all": (
        checks.workers,
        lambda it: _set(it, "ormo-worker", ORMO_WORKER_ID="me") or it.pods("ormo-worker")[0].container["env"].pop(2),
        "workers share an id",
    ),
    "a Job that can't be scaled": (
        checks.jobs,
        lambda it: _job(it).update(completions=3),
        "can't be scaled",
    ),
    "a disruption that counts": (
        checks.jobs,
        lambda it: _job(it)["podFailurePolicy"]["rules"].pop(0),
        "exit code 143 by disruption means Count, not Ignore",
    ),
    "bad settings that are tried again": (
        checks.jobs,
        lambda it: _job(it)["podFailurePolicy"]["rules"].pop(1),
        "exit code 2 means Count, not FailIndex",
    ),
}


def manifest_of(manifests: Manifests, kind: str) -> dict:
    (found,) = manifests.of(kind)
    return found


@pytest.mark.parametrize("fault", FAULTS | FAULTS_OF_TLS)
def test_fault_is_found(fault: str) -> None:
    check, plant, sentence = (FAULTS | FAULTS_OF_TLS)[fault]
    manifests = overlay("local" if fault in FAULTS else "tls")
    plant(manifests)
    said = [*check(manifests)]
    assert any(sentence in each for each in said), said


def test_unknown_field_of_an_operator_kind_is_found() -> None:
    manifests = overlay("monitoring")
    manifest_of(manifests, "ServiceMonitor")["spec"]["endpoints"][0]["intervall"] = "15s"
    assert [*against_schemas(manifests)] == [
        "ServiceMonitor/ormo-server: unknown field or changed value .spec.endpoints[0].intervall"
    ]


def test_bad_duration_in_an_operator_kind_is_found() -> None:
    manifests = overlay("monitoring")
    manifest_of(manifests, "PodMonitor")["spec"]["podMetricsEndpoints"][0]["interval"] = "soon"
    (said,) = against_schemas(manifests)
    assert "should match pattern" in said
