"""What can go wrong for a worker. Each message says what came, what was expected and what to do next."""

from ormo_runtime.settings import UsageError


class OrmoError(Exception):
    """Anything that this package raises on purpose, but for `RunFinished`."""


# For those who have the server's beside it. The class itself keeps the name that `ormo_worker` exports: it is what a
# traceback shows, and what programs look for there.
WorkerError = OrmoError


class ModelUnusable(OrmoError, UsageError, ValueError):
    """A model that can't be trained through a parameter server."""


class ModelMismatch(OrmoError):
    """The server trains another model than this worker has."""


class ParametersChanged(OrmoError):
    """The program changed parameters between two steps, which the next delivery would overwrite."""


class OlderServer(OrmoError):
    """The server is of a version that does not know what this worker's model has."""


class ServerUnreachable(OrmoError, ConnectionError):
    """Nobody answered for as long as the caller was ready to wait."""


class Refused(OrmoError):
    """The server won't have this call, and asking again would not help.

    Attributes:
        reason: the word that the server gave, as in `ormo_protos.refusals`; empty where it gave none.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class Replaced(Refused):
    """A newer process with this worker's id has joined: this one has to stop."""


class ProtocolBroken(OrmoError):
    """The server sent what the contract does not allow."""


class ClientClosed(OrmoError):
    """The client was closed, by this thread or another."""


class GroupBroken(OrmoError):
    """A rank of the process group that is this worker has ended, or the ranks do not do the same."""


class OptionRefused(OrmoError, UsageError, ValueError):
    """An option that can't be had: the server decides it, or it does not exist, or not on this machine."""


class RunFinished(Exception):
    """The run is over: there is nothing left to push to. Not a mistake, hence no `OrmoError`."""
