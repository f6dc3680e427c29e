"""Who may talk to whom, as the NetworkPolicies have it."""

import ipaddress
from dataclasses import dataclass

from deploy.kubernetes.rendering import Manifests, Object, selects


@dataclass(frozen=True)
class Peer:
    """A pod anywhere in the cluster.

    Attributes:
        labels: of the pod.
        namespace: where it is.
        address: of the pod.
    """

    labels: dict[str, str]
    namespace: str = "ormo"
    address: str = "10.1.2.3"


def reaches(manifests: Manifests, source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether the policies let the source open a connection to the target's port."""
    return _passes(manifests, "Egress", source, target, port, protocol) and _passes(
        manifests, "Ingress", target, source, port, protocol
    )


def _passes(manifests: Manifests, direction: str, subject: Peer, other: Peer, port: int, protocol: str) -> bool:
    rules, restricted = [], False
    for policy in manifests.of("NetworkPolicy"):
        here = policy["metadata"]["namespace"] == subject.namespace
        if not here or direction not in policy["spec"]["policyTypes"]:
            continue
        if selects(policy["spec"]["podSelector"], subject.labels):
            restricted = True
            rules += policy["spec"].get(direction.lower(), [])
    return not restricted or any(_rule_passes(rule, direction, other, port, protocol) for rule in rules)


def _rule_passes(rule: Object, direction: str, other: Peer, port: int, protocol: str) -> bool:
    peers = rule.get("from" if direction == "Ingress" else "to")
    ports = rule.get("ports")
    fits_port = ports is None or any(
        each.get("port") == port and each.get("protocol", "TCP") == protocol for each in ports
    )
    return fits_port and (peers is None or any(_is(each, other) for each in peers))


def _is(peer: Object, other: Peer) -> bool:
    if "ipBlock" in peer:
        return ipaddress.ip_address(other.address) in ipaddress.ip_network(peer["ipBlock"]["cidr"])
    namespace = peer.get("namespaceSelector")
    in_namespace = (
        other.namespace == "ormo"
        if namespace is None
        else selects(namespace, {"kubernetes.io/metadata.name": other.namespace})
    )
    return in_namespace and selects(peer.get("podSelector", {}), other.labels)
