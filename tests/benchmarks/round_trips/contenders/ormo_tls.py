"""This project with a certificate for the server, and one for each worker."""

from pathlib import Path

import trustme

from benchmarks.round_trips.contenders import ormo
from benchmarks.round_trips.place import Place, RoundTrip
from ormo_runtime.tls import Credentials

_ACCESS = '[[allow]]\nrole = "worker"\ncertificate = "worker"\nworkers = ["worker-*"]\n'


def _files(place: Place) -> dict[str, Path]:
    names = ("ca.pem", "server.pem", "server.key", "worker.pem", "worker.key", "access.toml")
    return {name: place.folder / "tls" / name for name in names}


def serve(place: Place) -> None:
    """Become the server's program."""
    files, authority = _files(place), trustme.CA()
    files["ca.pem"].parent.mkdir()
    authority.cert_pem.write_to_path(str(files["ca.pem"]))
    for name, identity in (("server", "127.0.0.1"), ("worker", "worker")):
        made = authority.issue_cert(identity)
        made.private_key_pem.write_to_path(str(files[f"{name}.key"]))
        made.cert_chain_pems[0].write_to_path(str(files[f"{name}.pem"]))
    files["access.toml"].write_text(_ACCESS)
    flags = {
        "--tls-cert": files["server.pem"],
        "--tls-key": files["server.key"],
        "--tls-client-ca": files["ca.pem"],
        "--access": files["access.toml"],
    }
    ormo.serve(place, *(str(word) for flag in flags.items() for word in flag))


def connect(place: Place) -> RoundTrip:
    """A worker that has joined."""
    files = _files(place)
    return ormo.connect(place, credentials=Credentials(files["ca.pem"], files["worker.pem"], files["worker.key"]))
