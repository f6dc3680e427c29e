"""What can be refused. Every class names its reason; every message says what came, what was expected, what to do."""

from typing import ClassVar

from ormo_protos.reasons import Reason


class OrmoError(Exception):
    """A caller's mistake or a wish that can't be met now. State is untouched when one is raised.

    Attributes:
        reason: the word that travels on the wire and labels the metrics.
        retry_seconds: when asking again may help; None where waiting does not.
        worker: whose gradient it is about; empty if it is about something else.
    """

    reason: ClassVar[Reason]

    def __init__(self, message: str, *, retry_seconds: float | None = None, worker: str = "") -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds
        self.worker = worker


class SettingsError(ValueError):
    """Settings that contradict each other; raised before anything starts."""


class BadManifest(OrmoError):
    """A model description that contradicts itself or the contract."""

    reason = Reason.BAD_MANIFEST


class BadPayload(OrmoError):
    """Tensor bytes of the wrong length, in the wrong order, doubled or missing."""

    reason = Reason.BAD_PAYLOAD


class BadRequest(OrmoError):
    """A field outside its documented limits."""

    reason = Reason.BAD_REQUEST


class DiskFull(OrmoError):
    """There is no room to keep what came: the same again later."""

    reason = Reason.DISK_FULL


class Draining(OrmoError):
    """The server is about to stop."""

    reason = Reason.DRAINING


class Finished(OrmoError):
    """The run has reached its set number of gradients or samples."""

    reason = Reason.FINISHED


class ManifestDigest(OrmoError):
    """A gradient for another model than the server's."""

    reason = Reason.MANIFEST_DIGEST


class MemoryLimit(OrmoError):
    """The model needs more memory than the server may use."""

    reason = Reason.MEMORY_LIMIT


class ModelExists(OrmoError):
    """A model was offered, but there is one already."""

    reason = Reason.MODEL_EXISTS


class NonFinite(OrmoError):
    """NaN or infinity in a gradient, a buffer or an offered model."""

    reason = Reason.NON_FINITE


class NormTooLarge(OrmoError):
    """A gradient whose norm is above the set bound, or so large that the model might become infinite."""

    reason = Reason.NORM_TOO_LARGE


class NotAMember(OrmoError):
    """The worker never joined, has left, or its lease ran out: join again."""

    reason = Reason.NOT_A_MEMBER


class NotReady(OrmoError):
    """The server has no model yet."""

    reason = Reason.NOT_READY


class NotWanted(OrmoError):
    """A model from a worker that was not asked for it, or was too slow."""

    reason = Reason.NOT_WANTED


class PermissionDenied(OrmoError):
    """The caller is known, and may not do this."""

    reason = Reason.PERMISSION_DENIED


class ProtocolVersion(OrmoError):
    """The worker speaks another version of the protocol."""

    reason = Reason.PROTOCOL_VERSION


class Replaced(OrmoError):
    """A newer incarnation of the same worker id has joined."""

    reason = Reason.REPLACED


class StaleRequest(OrmoError):
    """A request number below one that the slot has used already."""

    reason = Reason.STALE_REQUEST


class Superseded(OrmoError):
    """A newer stream of the same slot took over."""

    reason = Reason.SUPERSEDED


class TicketUnknown(OrmoError):
    """The ticket was never handed out to this slot, is used up, or is void: pull again."""

    reason = Reason.TICKET_UNKNOWN


class TooManyStreams(OrmoError):
    """As many streams are open as there are threads for."""

    reason = Reason.TOO_MANY_STREAMS


class TooManyWorkers(OrmoError):
    """As many workers as allowed are members already."""

    reason = Reason.TOO_MANY_WORKERS


class TooMuchInFlight(OrmoError):
    """One caller has as many bytes of tensors under way as it may, or all together as the machine has memory for."""

    reason = Reason.TOO_MUCH_IN_FLIGHT


class Unauthenticated(OrmoError):
    """The caller is not known."""

    reason = Reason.UNAUTHENTICATED


class UnsoundWorker(OrmoError):
    """Too many of the worker's gradients were refused: this process must stop."""

    reason = Reason.UNSOUND_WORKER
