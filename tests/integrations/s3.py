"""A real server of S3 as a process, and what stands between it and ours."""

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos.proxy import Proxy

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
NOWHERE = "127.0.0.1:1"  # nobody listens there


class S3:
    """A server of S3 with one bucket, behind a line that can be cut.

    Attributes:
        line: what leads to it.
        environment: what programs need to find it.
    """

    def __init__(self, port: int) -> None:
        self._address = f"127.0.0.1:{port}"
        self.line = Proxy()
        self.mend()
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://{self.line.address}"}

    def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """A request, past the line."""
        request = urllib.request.Request(f"http://{self._address}/{path}", body, method=method)
        request.add_header("Authorization", "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request")
        request.add_header("Content-Type", "text/plain")
        with urllib.request.urlopen(request, timeout=20) as answer:
            content: bytes = answer.read()
            return content

    def cut(self) -> None:
        """Break all connections, and take no new ones."""
        self.line.lead_to(NOWHERE)
        self.line.reset()

    def mend(self) -> None:
        self.line.lead_to(self._address)

    def deny(self) -> None:
        """Refuse everybody from now on: it checks keys, and knows none."""
        self.ask("POST", "moto-api/reset-auth", b"0")


def _port_of(server: "subprocess.Popen[str]", log: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        said = log.read_text()
        if "Running on http://127.0.0.1:" in said:
            return int(said.rpartition("Running on http://127.0.0.1:")[2].split()[0])
        assert server.poll() is None, said
        time.sleep(0.05)
    raise AssertionError(log.read_text())


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """moto's server, on a free port."""
    log = folder / "s3.log"
    program = Path(sys.executable).with_name("moto_server")
    with log.open("w") as said:
        server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", "0"], stdout=said, stderr=said, text=True)
    try:
        found = S3(_port_of(server, log))
        try:
            yield found
        finally:
            found.line.close()
    finally:
        server.kill()
        server.wait(10)
