"""What can go wrong for a worker. Each message says what came, what was expected and what to do next."""

from ormo_protos.usage import UsageError


class WorkerError(Exception):
    """Anything that this package raises on purpose, but for `RunFinished`."""


OrmoError = WorkerError  # the name that it had, for a release


class ModelUnusable(WorkerError, UsageError, ValueError):
    """A model that can't be trained through a parameter server."""


class ModelMismatch(WorkerError):
    """The server trains another model than this worker has."""


class ParametersChanged(WorkerError):
    """The program changed parameters between two steps, which the next delivery would overwrite."""


class OlderServer(WorkerError):
    """The server is of a version that does not know what this worker's model has."""


class ServerUnreachable(WorkerError, ConnectionError):
    """Nobody answered for as long as the caller was ready to wait."""


class Refused(WorkerError):
    """The server won't have this call, and asking again would not help.

    Attributes:
        reason: the word that the server gave, as in `ormo_protos.reasons`; empty where it gave none.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class Replaced(Refused):
    """A newer process with this worker's id has joined: this one has to stop."""


class ProtocolBroken(WorkerError):
    """The server sent what the contract does not allow."""


class ClientClosed(WorkerError):
    """The client was closed, by this thread or another."""


class OptionRefused(WorkerError, UsageError, ValueError):
    """An option that can't be had: the server decides it, or it does not exist, or not on this machine."""


class RunFinished(Exception):
    """The run is over: there is nothing left to push to. Not a mistake, hence no `WorkerError`."""
