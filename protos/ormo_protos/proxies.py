"""Which proxy gRPC's connections take: it goes by variables that are meant for browsers and package managers, too."""

import ipaddress
import urllib.parse
from collections.abc import Mapping

from ormo_protos.logs import printable
from ormo_protos.loopback import is_loopback

# As gRPC reads them: the first that is set, in lower case only.
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")
_EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def is_local(server: str) -> bool:
    """Whether HOST:PORT is on this machine, where no proxy has anything to do."""
    return is_loopback(_host(server).lower())


def through_proxy(server: str, environment: Mapping[str, str]) -> str:
    """What a sentence on a connection to HOST:PORT says of the proxy, after the address; empty if there is none."""
    variable = next((name for name in _PROXIES if name in environment), None)
    if variable is None or is_local(server) or _is_excepted(_host(server), environment):
        return ""
    address = _proxy(environment[variable])
    if not address:
        return ""
    return f" through the proxy {printable(address)} ({variable}; to do without it, name the host in no_proxy)"


def _proxy(value: str) -> str:
    """HOST:PORT of a proxy's URL, without the password that may be in it; empty if gRPC takes none from there."""
    parts = urllib.parse.urlsplit(value)
    return parts.netloc.rpartition("@")[2] if parts.scheme == "http" else ""


def _is_excepted(host: str, environment: Mapping[str, str]) -> bool:
    listed = next((environment[name] for name in _EXCEPTIONS if name in environment), "")
    return any(_matches(host, entry.strip()) for entry in listed.split(",") if entry)


def _matches(host: str, entry: str) -> bool:
    """Whether an exception is for this host: its name, or address, or a domain that it is in, or a net of addresses."""
    if f".{host}".lower().endswith(f".{entry.removeprefix('.')}".lower()):
        return True
    try:
        return "/" in entry and ipaddress.ip_address(host) in ipaddress.ip_network(entry, strict=False)
    except ValueError:
        return False


def _host(server: str) -> str:
    return server.rpartition(":")[0].removeprefix("[").removesuffix("]")
