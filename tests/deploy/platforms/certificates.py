"""Certificates of a run as cert-manager lays them into Secrets: for each role ca.crt, tls.crt and tls.key."""

from pathlib import Path

import trustme

from deploy.docker.tree import ROOT

ROLES = ("server", "worker", "evaluator")
ACCESS = ROOT / "deploy" / "kubernetes" / "components" / "tls" / "access.toml"
# What the server is called: by workers under Compose and on Kubernetes, and by itself.
_NAMES = {
    "server": ("server", "ormo-server", "localhost"),
    "worker": ("ormo-worker",),
    "evaluator": ("ormo-evaluator",),
}


class Certificates:
    """Files in a folder, which anybody may read: containers have no other user in common with us."""

    def __init__(self, folder: Path, access: str) -> None:
        self._authority = trustme.CA()
        self._top = folder
        for role in ROLES:
            self.folder(role).mkdir(parents=True)
            _replace(self.folder(role) / "ca.crt", self._authority.cert_pem.bytes())
        _replace(self.folder("server") / "access.toml", access.encode())
        self.renew()

    def folder(self, role: str) -> Path:
        return self._top / role

    def renew(self) -> None:
        """New certificates of the same authority, with new keys."""
        for role in ROLES:
            made = self._authority.issue_cert(*_NAMES[role])
            _replace(self.folder(role) / "tls.key", made.private_key_pem.bytes())
            _replace(self.folder(role) / "tls.crt", b"".join(pem.bytes() for pem in made.cert_chain_pems))


def _replace(path: Path, content: bytes) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.chmod(0o644)
    new.rename(path)
