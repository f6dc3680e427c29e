"""How a client proves who it is, and knows that the server is the right one: files with certificates and tokens."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ormo_protos.settings import Settings
from ormo_protos.usage import UsageError

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
    """How to reach a server that does not serve just anybody."""

    tls_ca: Path | None = Field(
        None,
        description="PEM file with the certificates that the server's must be signed by, such as "
        "/etc/ssl/certs/ca-certificates.crt for public ones; none: no TLS",
    )
    tls_cert: Path | None = Field(None, description="PEM file with this client's own certificate; none: it has none")
    tls_key: Path | None = Field(None, description="PEM file with the key of --tls-cert")
    tls_server_name: str = Field("", description="name in the server's certificate; none: the host in --server")
    token_file: Path | None = Field(
        None, description="file with the bearer token that the server knows this client by; none: it has none"
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
        CredentialsError: the file can't be read, or is no line of printable ASCII.
    """
    token = read_bytes(path).strip().decode("ascii", errors="replace")
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise CredentialsError(f"{path} holds no token: expected one line of printable ASCII without spaces")
    return token


def check_certificates(path: Path) -> None:
    """Nothing, if gRPC can use the file as authorities.

    Raises:
        CredentialsError: it holds no certificate in PEM.
    """
    text = read_bytes(path)
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=text.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise CredentialsError(f"{path} holds no certificates: expected them in PEM") from None


def check_pair(certificate: Path, key: Path) -> None:
    """Nothing, if the certificate and the key are one another's.

    Raises:
        CredentialsError: they are not, or are no PEM, or the key is encrypted.
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
