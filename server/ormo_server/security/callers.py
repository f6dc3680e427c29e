"""Who calls."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ormo_server.core.errors import PermissionDenied
from ormo_server.security.roles import Role


@dataclass(frozen=True, slots=True)
class Caller:
    """Somebody who is known, as far as the server asks.

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
        """Nothing, if one of the roles is allowed.

        Raises:
            PermissionDenied: none is.
        """
        if not self.roles & allowed:
            has, needed = " or ".join(sorted(self.roles)), " or ".join(sorted(allowed)) or "no role"
            raise PermissionDenied(f"{self.name!r} has the role {has}, and {method} is for {needed}")

    def owns(self, worker: str) -> bool:
        """Whether this worker id is the caller's own."""
        if self.workers is None:
            return worker == self.name
        return any(fnmatchcase(worker, pattern) for pattern in self.workers)

    def check_owns(self, worker: str) -> None:
        """Nothing, if this worker id is the caller's own.

        Raises:
            PermissionDenied: it is somebody else's.
        """
        if Role.WORKER not in self.roles:
            raise PermissionDenied(f"{self.name!r} has not the role worker, and asked as worker {worker!r}")
        if not self.owns(worker):
            own = ", ".join(map(repr, self.workers or (self.name,)))
            raise PermissionDenied(f"worker id {worker!r} is not one of {self.name!r}, who may use {own}")
