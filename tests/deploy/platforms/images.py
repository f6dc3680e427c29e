"""The images, built from the Dockerfiles as they are, on the stand-in for their base.

pip gets its index and that index' authority as a company would give them: by the secrets that the Dockerfiles have.
"""

import contextlib
import functools
import http.server
import re
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import trustme

from deploy.docker import compose
from deploy.docker.tree import FOLDER, ROOT
from deploy.platforms.engine import Engine

NAMES = ("server", "worker")
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}


def base_image() -> str:
    return compose.variables()["PYTHON_IMAGE"]


def build_all(engine: Engine) -> None:
    """Both images and the stand-ins for others', under the names that compose.yaml has for them."""
    path = "ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
    engine.docker("import", "-c", path, "-c", 'CMD ["python3"]', engine.trees.base, base_image())
    _build_prometheus(engine)
    for name in NAMES:
        build(engine, name, f"ormo-{name}:local")


def build(engine: Engine, name: str, tag: str, context: Path = ROOT, **how: float) -> None:
    """One of our images, with pip's secrets."""
    with _index(engine) as secrets:
        given = [word for name, path in secrets.items() for word in ("--secret", f"id={name},src={path}")]
        file = context / FOLDER.relative_to(ROOT) / f"{name}.Dockerfile"
        engine.docker("build", "--progress=plain", *given, "-f", file, "-t", tag, context, **how)


def layer_bytes_of_its_own(engine: Engine, image: str) -> float:
    """What a node loads that has all other images, as `docker system df -v` counts."""
    repository, _, tag = image.partition(":")
    form = "{{range .Images}}{{.Repository}} {{.Tag}} {{.UniqueSize}}\n{{end}}"
    lines = engine.docker("system", "df", "-v", "--format", form).splitlines()
    (size,) = (line.split()[2] for line in lines if line.split()[:2] == [repository, tag])
    number = re.fullmatch(r"([\d.]+)([kMG]?B)", size)
    assert number, size
    return float(number[1]) * _UNITS[number[2]]


@contextlib.contextmanager
def _index(engine: Engine) -> Iterator[dict[str, Path]]:
    """A company's index, behind a certificate of its own authority, while the block runs; yields the two secrets."""
    gateway = engine.docker("network", "inspect", "bridge", "-f", "{{(index .IPAM.Config 0).Gateway}}").strip()
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(gateway).configure_cert(context)
    handler = functools.partial(_Quiet, directory=str(engine.trees.wheels))
    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        files = {"pip": engine.folder / "pip.conf", "pip-ca": engine.folder / "pip-ca.pem"}
        authority.cert_pem.write_to_path(str(files["pip-ca"]))
        files["pip"].write_text(
            "[global]\nno-index = true\ncert = /etc/pip-ca.pem\n"
            f"find-links = https://{gateway}:{server.server_address[1]}/\n"
        )
        yield files
        server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, form: str, *arguments: object) -> None:
        pass


def _build_prometheus(engine: Engine) -> None:
    """Debian's Prometheus, and the `wget` of its health check, under the name of the official image."""
    tree, context = engine.trees.engine, engine.folder / "prometheus"
    (context / "data").mkdir(parents=True)
    libraries = re.findall(r"/(\S+) \(0x", _in_tree(tree, "ldd", "/usr/bin/prometheus").decode())
    files = ["usr/bin/prometheus", "usr/bin/busybox", *libraries]
    packed = _in_tree(tree, "tar", "--dereference", "--transform=s,busybox,wget,", "-c", *files)
    (context / "files.tar").write_bytes(packed)
    (context / "Dockerfile").write_text(
        "FROM scratch\nADD files.tar /\nCOPY --chown=65534:65534 data /prometheus\n"
        'ENV PATH=/usr/bin\nENTRYPOINT ["/usr/bin/prometheus"]\n'
    )
    engine.docker("build", "-t", f"prom/prometheus:{compose.variables()['PROMETHEUS_VERSION']}", context)


def _in_tree(tree: Path, *command: str) -> bytes:
    return subprocess.run(["chroot", tree, *command], capture_output=True, check=True, cwd="/").stdout
