"""What can be refused. Every class names its reason; every message says what came, what was expected, what to do."""

from typing import ClassVar

from ormo_protos.refusals import Reason


class OrmoError(Exception):
    """A caller's mistake or a wish that can't be met now. State is untouched when one is raised.

    Attributes:
        reason: the word that travels on the wire and labels the metrics.
        retry_seconds: when asking again may help; None where waiting does not.
        worker: whose gradient it is about; empty if it is about something else.
    """

    reason: ClassVar[Reason]

    def __init_subclass__(cls, reason: Reason) -> None:
        """Take the row of the contract's table: what the class means stands there."""
        cls.reason = reason
        cls.__doc__ = reason.meaning

    def __init__(self, message: str, *, retry_seconds: float | None = None, worker: str = "") -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds
        self.worker = worker


class SettingsError(ValueError):
    """Settings that contradict each other; raised before anything starts."""


class BadManifest(OrmoError, reason=Reason.BAD_MANIFEST): ...


class BadPayload(OrmoError, reason=Reason.BAD_PAYLOAD): ...


class BadRequest(OrmoError, reason=Reason.BAD_REQUEST): ...


class DiskFull(OrmoError, reason=Reason.DISK_FULL): ...


class Draining(OrmoError, reason=Reason.DRAINING): ...


class Finished(OrmoError, reason=Reason.FINISHED): ...


class LocalSteps(OrmoError, reason=Reason.LOCAL_STEPS): ...


class ManifestDigest(OrmoError, reason=Reason.MANIFEST_DIGEST): ...


class MemoryLimit(OrmoError, reason=Reason.MEMORY_LIMIT): ...


class ModelExists(OrmoError, reason=Reason.MODEL_EXISTS): ...


class NonFinite(OrmoError, reason=Reason.NON_FINITE): ...


class NormTooLarge(OrmoError, reason=Reason.NORM_TOO_LARGE): ...


class NotAMember(OrmoError, reason=Reason.NOT_A_MEMBER): ...


class NotReady(OrmoError, reason=Reason.NOT_READY): ...


class NotWanted(OrmoError, reason=Reason.NOT_WANTED): ...


class PermissionDenied(OrmoError, reason=Reason.PERMISSION_DENIED): ...


class ProtocolVersion(OrmoError, reason=Reason.PROTOCOL_VERSION): ...


class Replaced(OrmoError, reason=Reason.REPLACED): ...


class StaleRequest(OrmoError, reason=Reason.STALE_REQUEST): ...


class Superseded(OrmoError, reason=Reason.SUPERSEDED): ...


class TicketUnknown(OrmoError, reason=Reason.TICKET_UNKNOWN): ...


class TooManyStreams(OrmoError, reason=Reason.TOO_MANY_STREAMS): ...


class TooManyWorkers(OrmoError, reason=Reason.TOO_MANY_WORKERS): ...


class TooMuchInFlight(OrmoError, reason=Reason.TOO_MUCH_IN_FLIGHT): ...


class Unauthenticated(OrmoError, reason=Reason.UNAUTHENTICATED): ...


class UnsoundWorker(OrmoError, reason=Reason.UNSOUND_WORKER): ...
