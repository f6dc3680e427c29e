"""Every object against the schemas of Kubernetes, the Prometheus operator and cert-manager."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import kubernetes_validate

from deploy.kubernetes.rendering import Manifests, Object

OLDEST, NEWEST = "1.30", "1.37"


@cache
def _custom_kinds() -> dict[str, dict[str, Any]]:
    """The models of each kind, by version: imported once they are needed, for that takes seconds."""
    from cloudcoil.models.cert_manager import v1 as cert_manager
    from cloudcoil.models.prometheus_operator import v1 as operator

    return {
        "monitoring.coreos.com/v1": {
            "ServiceMonitor": operator.ServiceMonitor,
            "PodMonitor": operator.PodMonitor,
            "PrometheusRule": operator.PrometheusRule,
        },
        "cert-manager.io/v1": {"Certificate": cert_manager.Certificate, "Issuer": cert_manager.Issuer},
    }


def against_schemas(manifests: Manifests) -> Iterator[str]:
    """What the API servers of the oldest and the newest Kubernetes would refuse."""
    for each in manifests.objects:
        name = f"{each['kind']}/{each['metadata']['name']}"
        if each["apiVersion"] in _custom_kinds():
            yield from (f"{name}: {said}" for said in _custom(each))
        else:
            for version in (OLDEST, NEWEST):
                yield from (f"{name} in {version}: {said}" for said in _kubernetes(each, version))


def _kubernetes(document: Object, version: str) -> Iterator[str]:
    try:
        used = kubernetes_validate.validate(document, version, strict=True)
        assert used == version, f"there are no schemas of {version}"
    except kubernetes_validate.SchemaNotFoundError as error:
        yield error.message
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message}"


def _custom(document: Object) -> Iterator[str]:
    model = _custom_kinds()[document["apiVersion"]].get(document["kind"])
    if model is None:
        yield "no such kind"
        return
    try:
        read = model.model_validate(document)
    except ValueError as error:
        yield str(error)
        return
    # The models pass over unknown fields; what they kept shows which.
    kept = read.model_dump(mode="json", by_alias=True, exclude_unset=True)
    yield from (f"unknown field or changed value {path}" for path in _differences(document, kept, ""))


def _differences(given: object, kept: object, path: str) -> Iterator[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        for key in given:
            yield from _differences(given[key], kept.get(key), f"{path}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _differences(one, other, f"{path}[{number}]")
    elif given != kept:
        yield path
