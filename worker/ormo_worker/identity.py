"""Who a worker is: an id that people read, and a number that tells its processes apart."""

import os
import re
import secrets
import socket
from dataclasses import dataclass, field

from ormo_protos.v1 import parameter_server_pb2 as pb
from ormo_worker.errors import OptionRefused

_ALLOWED = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HOST_CHARACTERS = 80  # so that the rest fits into 128


def default_worker_id() -> str:
    """HOSTNAME-PID-HEX: readable, and unique also where containers share host names and process ids."""
    host = re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname())[:_HOST_CHARACTERS]
    return f"{host or 'worker'}-{os.getpid()}-{secrets.token_hex(3)}"


@dataclass(frozen=True, slots=True)
class Identity:
    """A worker in its messages.

    Attributes:
        worker: 1 to 128 of the characters A-Z a-z 0-9 . _ -
        incarnation: drawn at random; a newer process with the same id has another.

    Raises:
        OptionRefused: the id has other characters, or too many.
    """

    worker: str = field(default_factory=default_worker_id)
    incarnation: int = field(default_factory=lambda: secrets.randbits(64))

    def __post_init__(self) -> None:
        if not isinstance(self.worker, str) or not _ALLOWED.fullmatch(self.worker):
            raise OptionRefused(
                f"the worker id {self.worker!r} can't be used: expected 1 to 128 of the characters A-Z a-z 0-9 . _ -"
            )

    def requester(self, slot: int, request: int) -> pb.Requester:
        """The worker as the sender of one request."""
        return pb.Requester(worker=self.worker, incarnation=self.incarnation, slot=slot, request=request)
