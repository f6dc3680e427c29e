"""What the assertions of `test_runs` need of whatever runs our containers: Compose, or a cluster."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

from deploy.platforms.checks import Ending
from deploy.prometheus.prometheus import Prometheus

Role = Literal["server", "worker", "evaluator"]
ROLES: tuple[Role, ...] = ("server", "worker", "evaluator")


class NotHere(Exception):
    """This platform can't do that; says why."""


class Platform(ABC):
    """A server with a journal, workers and an evaluator, with JSON logs, that train without end.

    Attributes:
        guarded: whether they speak TLS.
        patience_seconds: within which anything that is to happen by itself does.
    """

    guarded = False
    patience_seconds = 120.0

    @abstractmethod
    def pods(self, role: Role) -> list[str]:
        """Names of the containers that run."""

    @abstractmethod
    def execute(self, pod: str, *command: str) -> str:
        """Run a command in a container; returns its stdout, AssertionError with what it said if it fails."""

    @abstractmethod
    def log(self, pod: str) -> list[str]:
        """The lines that a container wrote to stdout and stderr, in its lives so far as far as they are kept."""

    @abstractmethod
    def is_healthy(self, pod: str) -> bool:
        """What the platform's health checks say now."""

    @abstractmethod
    def lives(self, pod: str) -> int:
        """How often it was started, under this name."""

    @abstractmethod
    def scale(self, workers: int) -> None:
        """Have so many, as an operator asks for them."""

    @abstractmethod
    def evict(self, worker: str) -> Ending:
        """One has to leave its place, and gets another one if it needs to be told."""

    @abstractmethod
    def drain(self) -> None:
        """The machine is emptied, in order, and may then be used again."""

    @abstractmethod
    def replace_certificates(self) -> None:
        """New ones of the same authority come where the old ones were."""

    @abstractmethod
    def cut_off(self, pod: str) -> contextlib.AbstractContextManager[None]:
        """Inside, no packet comes to it or from it; NotHere where nothing is certain to do that."""

    @abstractmethod
    def prometheus(self) -> Prometheus:
        """The one that comes with it; NotHere where it is somebody else's."""

    @abstractmethod
    def stop(self) -> list[Ending]:
        """All that train are told to end, workers first, the server last."""

    def all_pods(self) -> Iterator[str]:
        """Of every role."""
        for role in ROLES:
            yield from self.pods(role)

    @property
    def server(self) -> str:
        """The one that there is."""
        (server,) = self.pods("server")
        return server
