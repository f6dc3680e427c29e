"""Who may call what: the table of roles, and the list of callers, a TOML file that is read again when it changes.

[[allow]]
role = "worker"
certificate = "gpu-*"         # an alternative name in the client's certificate, of any kind, with *, ? and [...] as in
                              # a shell; the worker id must be that name

[[allow]]
role = "worker"
token = "at least 32 characters, drawn at random"
name = "spot-machines"        # what the log calls those who have the token
workers = ["spot-*"]          # the worker ids that it may use
"""

import hashlib
import hmac
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator
from typing_extensions import override

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_runtime.channels import host_of, is_loopback
from ormo_runtime.tls import (
    AUTHORIZATION,
    BEARER,
    CredentialsError,
    WatchedFiles,
    check_certificates,
    check_pair,
    read_bytes,
)
from ormo_server.core.errors import PermissionDenied, SettingsError, Unauthenticated


class Role(StrEnum):
    """What a caller is to a run."""

    WORKER = "worker"
    READER = "reader"
    ADMIN = "admin"


_WORKERS = frozenset({Role.WORKER})
_ALL = frozenset(Role)
_ADMINS = frozenset({Role.ADMIN})

SERVICE = pb.DESCRIPTOR.services_by_name["ParameterServer"]
HEALTH: ServiceDescriptor = health_pb2.DESCRIPTOR.services_by_name["Health"]  # type: ignore[assignment] # its class in C
REFLECTION: ServiceDescriptor = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]  # type: ignore[assignment]

# Where a message names a worker, that it is the caller's own is checked besides.
ALLOWED: dict[str, frozenset[Role]] = {
    f"/{SERVICE.full_name}/Join": _WORKERS,
    f"/{SERVICE.full_name}/OfferModel": _WORKERS,
    f"/{SERVICE.full_name}/DescribeModel": _ALL,
    f"/{SERVICE.full_name}/PullParams": _ALL,
    f"/{SERVICE.full_name}/PushGradient": _WORKERS,
    f"/{SERVICE.full_name}/PushPull": _WORKERS,
    f"/{SERVICE.full_name}/Heartbeat": _WORKERS,
    f"/{SERVICE.full_name}/Leave": _WORKERS,
    f"/{SERVICE.full_name}/ReportEvaluation": _ALL,
    f"/{SERVICE.full_name}/GetStatus": _ALL,
    f"/{SERVICE.full_name}/Control": _ADMINS,
    f"/{HEALTH.full_name}/Check": _ALL,
    f"/{HEALTH.full_name}/List": _ALL,
    f"/{HEALTH.full_name}/Watch": _ALL,
    f"/{REFLECTION.full_name}/ServerReflectionInfo": _ALL,  # served with `--reflection` only
}


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller whose identity the server knows, as far as it asks.

    Attributes:
        name: of the certificate or token; where nobody is asked for one, the host's address.
        roles: what the caller is to the run.
        workers: patterns of the worker ids that are the caller's own, `*` for any characters; None: the one that is
            its name. A name is no pattern: certificates may have a `*` in theirs.
        proof: digest of the token that was brought; empty without one.
    """

    name: str
    roles: frozenset[Role]
    workers: Sequence[str] | None = ("*",)
    proof: bytes = field(default=b"", repr=False)

    def check_may_call(self, method: str, allowed: frozenset[Role]) -> None:
        """Check that one of the roles is allowed.

        Raises:
            PermissionDenied: none is.
        """
        if not self.roles & allowed:
            has, needed = " or ".join(sorted(self.roles)), " or ".join(sorted(allowed)) or "no role"
            raise PermissionDenied(f"{self.name!r} has the role {has}, but {method} is for {needed}")

    def owns(self, worker: str) -> bool:
        """Whether this worker id is the caller's own."""
        if self.workers is None:
            return worker == self.name
        return any(fnmatchcase(worker, pattern) for pattern in self.workers)

    def check_owns(self, worker: str) -> None:
        """Check that this worker id is the caller's own.

        Raises:
            PermissionDenied: it is somebody else's.
        """
        if Role.WORKER not in self.roles:
            raise PermissionDenied(f"{self.name!r} does not have the role worker, but called as worker {worker!r}")
        if not self.owns(worker):
            own = ", ".join(map(repr, self.workers or (self.name,)))
            raise PermissionDenied(f"{self.name!r} may not use the worker id {worker!r}, only {own}")


SHORTEST_TOKEN = 32
_Pattern = Annotated[str, Field(min_length=1, max_length=256)]


class AccessError(SettingsError):
    """A list that can't be used; the sentence says where, what came and what was expected."""


class Access(Protocol):
    """Knows callers."""

    def caller(self, context: grpc.ServicerContext) -> Caller:
        """Who calls.

        Raises:
            Unauthenticated: the caller is not known.
        """

    def still_knows(self, caller: Caller) -> bool:
        """Whether a caller of before would be known today."""


class OpenAccess(Access):
    """Anyone may do everything, except control the run from another machine than the server's."""

    _ANYONE = frozenset({Role.WORKER, Role.READER})

    @override
    def caller(self, context: grpc.ServicerContext) -> Caller:
        host = host_of(context.peer())
        return Caller(host, frozenset(Role) if host == "unix" or is_loopback(host) else self._ANYONE)

    @override
    def still_knows(self, caller: Caller) -> bool:
        return True


class Line(BaseModel):
    """One `[[allow]]`.

    Attributes:
        role: what it lets its callers be.
        certificate: pattern of a name in their certificate.
        token: that they bring instead.
        name: of those who bring the token.
        workers: patterns of their worker ids; by default their name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Role
    certificate: _Pattern | None = None
    token: SecretStr | None = None
    name: _Pattern | None = None
    workers: Annotated[tuple[_Pattern, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _says_who(self) -> Self:
        if (self.certificate is None) == (self.token is None):
            raise ValueError("expected either `certificate` or `token`")
        if (self.token is None) != (self.name is None):
            raise ValueError("a `token` needs a `name`, for the log, and a `certificate` has one")
        if self.token is not None and len(self.token.get_secret_value()) < SHORTEST_TOKEN:
            raise ValueError(f"a token of at least {SHORTEST_TOKEN} characters was expected, drawn at random")
        if self.workers is not None and self.role is not Role.WORKER:
            raise ValueError(f"`workers` says which ids a worker may use, and the role is {self.role}")
        return self

    @property
    def proof(self) -> bytes:
        """What the token is known by; empty without one."""
        return b"" if self.token is None else _digest(self.token.get_secret_value())

    def caller(self, name: str) -> Caller:
        """Somebody on this line, by name."""
        return Caller(name, frozenset({self.role}), self.workers, self.proof)


class _List(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    allow: Annotated[tuple[Line, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _tells_tokens_apart(self) -> Self:
        first: dict[bytes, int] = {}
        for number, line in enumerate(self.allow, start=1):
            if line.proof and first.setdefault(line.proof, number) != number:
                raise ValueError(f"[[allow]] number {number} has the token of number {first[line.proof]}: draw another")
        return self


class ListedAccess(Access):
    """Only callers on a list may call.

    Args:
        path: of the file.

    Raises:
        AccessError: it can't be used.
    """

    def __init__(self, path: Path) -> None:
        self._lines = WatchedFiles([path], lambda: read_list(path), AccessError)

    @override
    def caller(self, context: grpc.ServicerContext) -> Caller:
        # A token, where one is brought, decides alone; the certificate counts where there is none.
        lines = self._lines.value
        token = _token(context)
        if token is None:
            _refuse_resumed(context)
        found = by_name(lines, _names(context.auth_context())) if token is None else _by_token(lines, token)
        if found is None:
            raise Unauthenticated(_unknown(context, token))
        return found

    @override
    def still_knows(self, caller: Caller) -> bool:
        lines = self._lines.value
        return caller == (_by_proof(lines, caller.proof) if caller.proof else by_name(lines, [caller.name]))


def read_list(path: Path) -> tuple[Line, ...]:
    """The lines of a list.

    Raises:
        AccessError: it can't be read, or is not such a list.
    """
    try:
        return parsed_list(path.read_text("utf-8"))
    except OSError as error:
        raise AccessError(f"the access list {path} can't be read ({error.strerror or error})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise AccessError(f"the access list {path} is not valid TOML: {error}") from None
    except ValidationError as error:
        raise AccessError(f"the access list {path}: {'; '.join(_problems(error))}") from None


def parsed_list(text: str) -> tuple[Line, ...]:
    """The lines of a list, from its text.

    Raises:
        TOMLDecodeError, ValidationError: it is not such a list.
    """
    return _List.model_validate(tomllib.loads(text)).allow


def _problems(error: ValidationError) -> Iterator[str]:
    # Without what came: it may be a token.
    for details in error.errors(include_input=False):
        place = details["loc"]
        where = f"[[allow]] number {int(place[1]) + 1}" if len(place) > 1 else "it"
        what = f", `{place[2]}`" if len(place) > 2 else ""
        message = details["msg"].removeprefix("Value error, ")
        yield f"{where}{what}: {message[:1].lower()}{message[1:]}"


def _token(context: grpc.ServicerContext) -> str | None:
    for key, value in context.invocation_metadata():
        if key == AUTHORIZATION:
            return value.removeprefix(BEARER) if isinstance(value, str) and value.startswith(BEARER) else ""
    return None


def _by_token(lines: Sequence[Line], token: str) -> Caller | None:
    return _by_proof(lines, _digest(token))


def _by_proof(lines: Sequence[Line], proof: bytes) -> Caller | None:
    """Takes as long for any token: digests are of one length, and every line is looked at."""
    found = None
    for line in lines:
        if hmac.compare_digest(proof, line.proof) and line.name is not None:
            found = line.caller(line.name)
    return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def by_name(lines: Sequence[Line], names: Sequence[str]) -> Caller | None:
    """The caller who has a certificate with these names; None if no line knows any of them."""
    for line in lines:
        for name in names:
            if line.certificate is not None and fnmatchcase(name, line.certificate):
                return line.caller(name)
    return None


def _refuse_resumed(context: grpc.ServicerContext) -> None:
    # Who takes up an earlier session shows no certificate, so that an expired one would go on for as long as its owner
    # likes. gRPC can't be told to give no sessions out.
    about: Mapping[str, Any] = context.auth_context()  # the stubs have single values for the lists that come
    if about.get("ssl_session_reused") == [b"true"]:
        raise Unauthenticated(
            "this connection resumes an earlier TLS session, which shows no certificate: connect without resumption"
        )


def _names(about: Mapping[str, Any]) -> list[str]:
    """The names in a certificate that gRPC has verified; the common name counts where there is no other."""
    names = about.get("x509_subject_alternative_name") or about.get("x509_common_name") or ()
    return [name.decode("utf-8", errors="replace") for name in names]


def _unknown(context: grpc.ServicerContext, token: str | None) -> str:
    if token is not None:
        return "this server does not know the bearer token: get the current one from the server's operator"
    names = _names(context.auth_context())
    if not names:
        return "this server serves known callers only: call with a certificate or a bearer token (--token-file)"
    return f"the access list has no line for a certificate of {', '.join(map(repr, names))}"


# The certificates by which a server is known, and its callers if they have any. Both may be replaced while it runs.


def server_credentials(certificate: Path, key: Path, client_ca: Path | None) -> grpc.ServerCredentials:
    """What to open a port with. The files are looked at for every connection.

    Args:
        certificate: PEM, the server's, with those between it and its authority.
        key: PEM, of the certificate.
        client_ca: PEM, authorities that clients' certificates must be signed by; None to ask clients for none.

    Raises:
        CredentialsError: a file can't be used.
    """

    def read() -> grpc.ServerCertificateConfiguration:
        check_pair(certificate, key)
        if client_ca is not None:
            check_certificates(client_ca)
        authorities = None if client_ca is None else read_bytes(client_ca)
        return grpc.ssl_server_certificate_configuration([(read_bytes(key), read_bytes(certificate))], authorities)

    paths = [path for path in (certificate, key, client_ca) if path is not None]
    files = WatchedFiles(paths, read, CredentialsError)
    used = files.version

    def newer() -> grpc.ServerCertificateConfiguration | None:
        # gRPC asks at each handshake, and takes nothing for "as before".
        nonlocal used
        if files.version == used:
            return None
        used = files.version
        return files.value

    return grpc.dynamic_ssl_server_credentials(
        files.value,
        newer,  # type: ignore[arg-type] # the stubs do not know of None
        require_client_authentication=client_ca is not None,
    )
