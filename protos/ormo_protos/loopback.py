"""Which addresses only this machine can reach, or have."""

import ipaddress
from urllib.parse import unquote


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on this host, as in HOST:PORT."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def host_of(peer: str) -> str:
    """The host of a gRPC peer, such as `ipv4:10.0.0.7:51234` or `ipv6:%5B::1%5D:51234`."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0] if kind in ("ipv4", "ipv6") else kind
