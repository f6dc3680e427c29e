"""Certificates, tokens and access lists for tests, and servers that ask for them."""

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trustme

from ormo_protos.v1.parameter_server_pb2_grpc import ParameterServerStub
from ormo_runtime.tls import Credentials, Dialer
from ormo_server.service.server import Server
from service.wire import served

YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
TOKEN = "of-at-least-32-characters-at-random-"
ACCESS = """
[[allow]]
role = "worker"
certificate = "gpu-*"

[[allow]]
role = "worker"
certificate = "pool.example"
workers = ["pool-*"]

[[allow]]
role = "reader"
certificate = "evaluator"

[[allow]]
role = "admin"
certificate = "operator"
"""


def line(role: str, name: str, token: str, **more: str) -> str:
    """A line of an access list for who has a token."""
    rest = "".join(f"{key} = {value}\n" for key, value in more.items())
    return f'[[allow]]\nrole = "{role}"\nname = "{name}"\ntoken = "{token}"\n{rest}'


class Authority:
    """Signs certificates, as files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ca = trustme.CA()
        self.ca = folder / f"ca-{id(self):x}.pem"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def pair(self, name: str, *, expired: bool = False, into: str = "") -> tuple[Path, Path]:
        """Paths of a certificate and its key; they are replaced if they are there already."""
        until = {"not_after": YESTERDAY} if expired else {}
        # Both forms of the loopback, so that it serves servers as well.
        made = self._ca.issue_cert(name, "127.0.0.1", **until)
        stem = into or f"{name}-{id(self):x}{'-expired' if expired else ''}"
        certificate, key = self.folder / f"{stem}.pem", self.folder / f"{stem}.key"
        _replace(key, made.private_key_pem.bytes())
        _replace(certificate, b"".join(pem.bytes() for pem in made.cert_chain_pems))
        return certificate, key

    def credentials(self, name: str, *, trusting: "Authority | None" = None, **how: Any) -> Credentials:
        """What a client called this brings, who trusts servers of this authority, or another."""
        certificate, key = self.pair(name, **how)
        return Credentials((trusting or self).ca, certificate, key)

    def server(self, access: str | None = ACCESS, *, client_certificates: bool = True) -> dict[str, Any]:
        """Settings of a server with a certificate of this authority, which believes it, too."""
        certificate, key = self.pair("localhost", into="server")
        settings: dict[str, Any] = {"tls_cert": certificate, "tls_key": key}
        if client_certificates:
            settings["tls_client_ca"] = self.ca
        if access is not None:
            settings["access"] = self.folder / "access.toml"
            _replace(settings["access"], access.encode())
        return settings

    def allow(self, access: str) -> None:
        """Change the list."""
        _replace(self.folder / "access.toml", access.encode())


def _replace(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.rename(path)


@contextlib.contextmanager
def guarded(folder: Path, authority: Authority, access: str = ACCESS, **changes: Any) -> Iterator[Server]:
    """A server that knows its callers by certificate."""
    with served(folder / "run", **authority.server(access), **changes) as server:
        yield server


@contextlib.contextmanager
def dialled(server: Server, credentials: Credentials | None) -> Iterator[ParameterServerStub]:
    with Dialer(server.address, credentials).dial() as channel:
        yield ParameterServerStub(channel)
