"""Files with certificates, keys and tokens: how a client proves who it is and knows its server, while they change."""

import logging
import math
import os
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Self, TypeVar

from pydantic import Field, model_validator

from ormo_runtime.settings import Settings, UsageError

_LOG = logging.getLogger(__name__)

AUTHORIZATION = "authorization"
BEARER = "Bearer "


class CredentialsError(UsageError):
    """Files with certificates, keys or tokens that can't be used; the sentence says which, and what was expected."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Files to connect with. They may be replaced at any time: new connections and calls use what they say then.

    Attributes:
        ca: PEM, certificates of the authorities that may have signed the server's.
        certificate, key: PEM, the client's own; None for none.
        token_file: whose content, a bearer token, goes with every call; None for none.
        server_name: that the server's certificate must be for; empty: the host that is connected to.
    """

    ca: Path
    certificate: Path | None = None
    key: Path | None = None
    token_file: Path | None = None
    server_name: str = ""

    def __post_init__(self) -> None:
        for name in ("ca", "certificate", "key", "token_file"):
            path = getattr(self, name)
            object.__setattr__(self, name, None if path is None else Path(path))  # in Python many write a str


class ClientSettings(Settings):
    """How to reach a server that asks its callers for certificates or tokens."""

    tls_ca: Path | None = Field(
        None,
        title="TLS and token",
        description="PEM file with the certificates that the server's must be signed by, such as "
        "/etc/ssl/certs/ca-certificates.crt for public ones; none: no TLS",
    )
    tls_cert: Path | None = Field(None, description="PEM file with this client's own certificate; none: no certificate")
    tls_key: Path | None = Field(None, description="PEM file with the key of --tls-cert")
    tls_server_name: str = Field("", description="name in the server's certificate; none: the host in --server")
    token_file: Path | None = Field(
        None, description="file with the bearer token that identifies this client to the server; none: no token"
    )

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together: give both, or neither")
        if self.tls_ca is None and (self.tls_cert or self.token_file or self.tls_server_name):
            raise ValueError(
                "--tls-cert, --tls-server-name and --token-file need TLS, which is on once --tls-ca is given"
            )
        return self

    def credentials(self) -> Credentials | None:
        """What the settings name; None for no TLS."""
        if self.tls_ca is None:
            return None
        return Credentials(self.tls_ca, self.tls_cert, self.tls_key, self.token_file, self.tls_server_name)


def read_bytes(path: Path) -> bytes:
    """A file's content.

    Raises:
        CredentialsError: it can't be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CredentialsError(f"{path} can't be read ({error.strerror or error})") from None


def read_token(path: Path) -> str:
    """The token in a file, without the white space round it.

    Raises:
        CredentialsError: the file can't be read, or is not one line of printable ASCII.
    """
    token = read_bytes(path).strip().decode("ascii", errors="replace")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise CredentialsError(f"{path} does not hold a token: expected one line of printable ASCII without spaces")
    return token


def check_certificates(path: Path) -> None:
    """Check that gRPC can use the file as authorities.

    Raises:
        CredentialsError: it holds no certificate in PEM.
    """
    text = read_bytes(path)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=text.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise CredentialsError(f"{path} does not hold certificates: expected one or more in PEM") from None


def check_pair(certificate: Path, key: Path) -> None:
    """Check that the certificate and the key belong together.

    Raises:
        CredentialsError: they do not, or are not PEM, or the key is encrypted.
    """
    for path in (certificate, key):
        read_bytes(path)
    try:
        # An empty password: without one OpenSSL would ask for it at the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise CredentialsError(
            f"{certificate} and {key} can't be used together ({reason}): expected a certificate, and the key that it "
            "was made for, in PEM and not encrypted"
        ) from None


RETRY_SECONDS = 60.0

T = TypeVar("T")
_Stamp = tuple[tuple[int, int, int] | None, ...]


class WatchedFiles(Generic[T]):
    """The contents of some files, read again when one of them changes. A look takes microseconds, so look often.

    If files can't be used, as when only one of a pair has been replaced so far, the previous contents stay in force,
    and the log says so. They are tried again now and then: they may be good, and this process out of descriptors.

    Args:
        paths: of the files.
        read: makes the value from them.
        unusable: what `read` raises for files that can't be used.

    Raises:
        what `read` raises: they can't be used at the start.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T], unusable: type[Exception]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._unusable = unusable
        self._lock = threading.Lock()
        self._seen = self._stamp()
        self._value = read()
        self._version = 0
        self._again = math.inf

    @property
    def value(self) -> T:
        """The contents."""
        self._look()
        return self._value

    @property
    def version(self) -> int:
        """Rises with each change that could be used."""
        self._look()
        return self._version

    def _look(self) -> None:
        # Without the lock first: each call of a server looks, and nearly always nothing has changed.
        if self._stamp() == self._seen and time.monotonic() < self._again:
            return
        with self._lock:  # one thread reads the files anew; those that come meanwhile find them read
            stamp = self._stamp()
            if stamp == self._seen and time.monotonic() < self._again:
                return
            names = ", ".join(map(str, self._paths))
            self._seen, self._again = stamp, math.inf  # before reading: a change meanwhile is seen by the next look
            try:
                self._value = self._read()
            except self._unusable as error:
                self._again = time.monotonic() + RETRY_SECONDS
                _LOG.error("%s changed but can't be used, so the previous contents stay in force: %s", names, error)
            else:
                self._version += 1
                _LOG.info("%s changed, and the new contents are in force", names)

    def _stamp(self) -> _Stamp:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - half the time of Path.stat, for each call of the server
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)
