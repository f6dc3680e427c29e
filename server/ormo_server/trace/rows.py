"""The rows of a trace: their columns, and the inputs that they stand for."""

import hashlib
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
)
from pydantic_core import ErrorDetails

from ormo_server.core.inputs import (
    Input,
    Joined,
    LearningRateSet,
    Left,
    Pushed,
    Requested,
    Requester,
    Returned,
    Withdrawn,
)
from ormo_server.core.keys import TicketKey
from ormo_server.core.method import Run
from ormo_server.core.state import PushResult, Ticket
from ormo_server.training_settings import TrainingSettings

FORMAT = 1
# What every trace begins with, as it is written.
OPENING = f'{{"event":"start","format":{FORMAT},'.encode()

_HEXADECIMAL = re.compile(r"0x[0-9a-f]{1,16}")


@dataclass(frozen=True, slots=True)
class Refused:
    """A gradient came and was not taken. No input, for it changes nothing; but its worker goes on with its next batch.

    Attributes:
        now: as of an input.
        requester: whose it was, with a number above that of the slot's refused gradient before: retries have no row.
        ticket: that it named.
        reason: as on the wire.
    """

    now: float
    requester: Requester
    ticket: TicketKey
    reason: str


Entry = Input | Refused


class TracedSettings(TrainingSettings):
    """How the run trained: what a `start` row says under `settings`."""

    min_workers: int = Field(1, ge=1, description="no ticket of a new run went out before so many had joined")
    max_workers: int = Field(64, ge=1, description="further workers were refused")
    max_gradient_norm: float | None = Field(None, gt=0, description="largest Euclidean norm of a gradient")
    over_norm: Literal["clip", "refuse"] = Field("clip", description="what became of longer ones")
    delay_threshold: float | None = Field(2.0, description="as `TrainingSettings`; 2 before files said so")
    waits_for_idle: bool = Field(True, description="rounds waited for idle workers: they did before files said so")

    @property
    def workers_allowed(self) -> tuple[int, int]:
        """See `TrainingSettings.workers_allowed`."""
        return self.min_workers, self.max_workers

    @property
    def clipped_at(self) -> float | None:
        """The norm that longer gradients were scaled down to; None if none was."""
        return self.max_gradient_norm if self.over_norm == "clip" else None

    def run(self) -> Run:
        """See `TrainingSettings.run`."""
        return replace(super().run(), waits_for_idle=self.waits_for_idle)


def _number(value: object) -> object:
    if isinstance(value, str):
        if not _HEXADECIMAL.fullmatch(value):
            raise ValueError("expected 0x and 1 to 16 hexadecimal digits")
        return int(value, 16)
    return value


Count = Annotated[int, Field(ge=0)]
Id = Annotated[int, Field(ge=0), BeforeValidator(_number), PlainSerializer(lambda value: f"0x{value:016x}")]


class _Row(BaseModel):
    """What a line holds: its columns, in the order in which they are written."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TracedModel(_Row):
    """The model that is trained.

    Attributes:
        parameters: elements of all its trainable tensors.
        digest: of a fresh run's parameters at the start, see `digest_of`; empty in traces of earlier versions.
    """

    parameters: Count
    digest: str = ""


def digest_of(params: torch.Tensor) -> str:
    """SHA-256 of parameters, shape (d,), float32."""
    return hashlib.sha256(params.numpy().data).hexdigest()


class Start(_Row):
    """The server got its model, or had it back.

    Attributes:
        event: the kind of row.
        format: of the file.
        epoch: of the server from now on.
        iteration: where it starts; below where the segment before ended if what came after a checkpoint was lost.
        fresh: a new run, not one restored from a checkpoint.
        settings: of the training; those of `TracedSettings`.
        model: what is trained.
        time: Unix time, in seconds.
        refusals: gradients that were refused have rows; those of earlier versions have none.
    """

    event: Literal["start"]
    format: Literal[1]
    epoch: Id
    iteration: Count
    fresh: bool
    settings: dict[str, Any]
    model: TracedModel
    time: float
    refusals: bool = False

    @field_validator("settings")
    @classmethod
    def _are_usable(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            TracedSettings(**value)
        except ValidationError as error:
            raise ValueError("; ".join(map(_problem, error.errors()))) from None
        return value

    def training(self) -> TracedSettings:
        """The settings, checked and typed; `run()` of them is what the core went by."""
        return TracedSettings(**self.settings)


def _problem(details: ErrorDetails) -> str:
    place = ".".join(map(str, details["loc"]))
    message = details["msg"].removeprefix("Value error, ")
    return f"{place} is {details['input']!r}: {message}" if place else message


class _InputRow(_Row, ABC):
    @abstractmethod
    def input(self, epoch: int) -> Input:
        """What the state machine was given; the epoch is the server's."""


class _JoinedRow(_InputRow):
    event: Literal["joined"] = "joined"
    seconds: float
    worker: str
    incarnation: Id
    slots: Count

    def input(self, epoch: int) -> Joined:  # noqa: ARG002
        return Joined(self.seconds, self.worker, self.incarnation, self.slots)


class _LeftRow(_InputRow):
    event: Literal["left"] = "left"
    seconds: float
    worker: str
    incarnation: Id

    def input(self, epoch: int) -> Left:  # noqa: ARG002
        return Left(self.seconds, self.worker, self.incarnation)


class _RequestedRow(_InputRow):
    event: Literal["requested"] = "requested"
    seconds: float
    worker: str
    incarnation: Id
    slot: Count
    request: Count

    def input(self, epoch: int) -> Requested:  # noqa: ARG002
        return Requested(self.seconds, Requester(self.worker, self.incarnation, self.slot, self.request))


class _WithdrawnRow(_InputRow):
    event: Literal["withdrawn"] = "withdrawn"
    worker: str
    slot: Count

    def input(self, epoch: int) -> Withdrawn:  # noqa: ARG002
        return Withdrawn((self.worker, self.slot))


class _ReturnedRow(_InputRow):
    event: Literal["returned"] = "returned"
    seconds: float
    worker: str
    incarnation: Id
    ticket: Count
    ticket_epoch: Id

    def input(self, epoch: int) -> Returned:  # noqa: ARG002
        return Returned(self.seconds, self.worker, self.incarnation, (self.ticket_epoch, self.ticket))


class _LearningRateSetRow(_InputRow):
    event: Literal["learning_rate_set"] = "learning_rate_set"
    seconds: float
    learning_rate: float

    def input(self, epoch: int) -> LearningRateSet:  # noqa: ARG002
        return LearningRateSet(self.seconds, self.learning_rate)


class _PushedRow(_InputRow):
    # `iteration` is the ticket's, `iteration_after` the run's when the gradient had been counted. `buffers_kept` is
    # written only where it is true: without it older programs read the row, too.
    event: Literal["pushed"] = "pushed"
    seconds: float
    worker: str
    incarnation: Id
    slot: Count
    request: Count
    ticket: Count
    ticket_epoch: Id
    iteration: Count
    bucket: Count
    handed_out_seconds: float
    delay: Count
    lag: Count
    step_size: float
    discarded: bool
    samples: Count
    iteration_after: Count
    buffers_kept: Literal[True] | None = None

    def input(self, epoch: int) -> Pushed:
        slot, kept = (self.worker, self.slot), self.buffers_kept is not None
        return Pushed(
            self.seconds,
            Requester(self.worker, self.incarnation, self.slot, self.request),
            # Nobody can push for a ticket that was not delivered, and retries of a push are no inputs.
            Ticket(self.ticket_epoch, self.ticket, slot, self.iteration, self.bucket, self.handed_out_seconds, True),
            self.samples,
            PushResult(
                self.request,
                epoch,
                self.iteration_after,
                self.delay,
                self.lag,
                self.step_size,
                self.discarded,
                buffers_kept=kept,
            ),
        )


InputRow = Annotated[
    _JoinedRow | _LeftRow | _RequestedRow | _WithdrawnRow | _ReturnedRow | _PushedRow | _LearningRateSetRow,
    Field(discriminator="event"),
]


class _RefusedRow(_Row):
    event: Literal["refused"] = "refused"
    seconds: float
    worker: str
    incarnation: Id
    slot: Count
    request: Count
    ticket: int  # as it came, whatever was sent
    ticket_epoch: Id
    reason: str

    @classmethod
    def of(cls, refused: Refused) -> Self:
        who, (epoch, number) = refused.requester, refused.ticket
        return cls(
            seconds=refused.now,
            worker=who.worker,
            incarnation=who.incarnation,
            slot=who.slot,
            request=who.request,
            ticket=number,
            ticket_epoch=epoch,
            reason=refused.reason,
        )

    def input(self, epoch: int) -> Refused:  # noqa: ARG002
        """What the state machine was not given."""
        who = Requester(self.worker, self.incarnation, self.slot, self.request)
        return Refused(self.seconds, who, (self.ticket_epoch, self.ticket), self.reason)


AnyRow = Start | _RefusedRow | InputRow


def line_of(entry: Start | Entry) -> bytes:
    """The line that an entry becomes."""
    match entry:
        case Start():
            text = entry.model_dump_json()
        case Refused():
            text = _RefusedRow.of(entry).model_dump_json()
        case _:
            text = row_of(entry).model_dump_json(exclude_none=True)
    return text.encode() + b"\n"


def row_of(taken: Input) -> InputRow:
    """The row of an input."""
    match taken:
        case Pushed():
            return _pushed(taken)
        case Requested(now, who):
            return _RequestedRow(
                seconds=now, worker=who.worker, incarnation=who.incarnation, slot=who.slot, request=who.request
            )
        case Withdrawn((worker, slot)):
            return _WithdrawnRow(worker=worker, slot=slot)
        case Returned(now, worker, incarnation, (epoch, number)):
            return _ReturnedRow(seconds=now, worker=worker, incarnation=incarnation, ticket=number, ticket_epoch=epoch)
        case Joined(now, worker, incarnation, slots):
            return _JoinedRow(seconds=now, worker=worker, incarnation=incarnation, slots=slots)
        case Left(now, worker, incarnation):
            return _LeftRow(seconds=now, worker=worker, incarnation=incarnation)
        case LearningRateSet(now, learning_rate):
            return _LearningRateSetRow(seconds=now, learning_rate=learning_rate)


def _pushed(taken: Pushed) -> _PushedRow:
    who, ticket, result = taken.requester, taken.ticket, taken.result
    return _PushedRow(
        seconds=taken.now,
        worker=who.worker,
        incarnation=who.incarnation,
        slot=who.slot,
        request=who.request,
        ticket=ticket.number,
        ticket_epoch=ticket.epoch,
        iteration=ticket.iteration,
        bucket=ticket.bucket,
        handed_out_seconds=ticket.handed_out_seconds,
        delay=result.delay,
        lag=result.lag_buckets,
        step_size=result.step_size,
        discarded=result.discarded,
        samples=taken.samples,
        iteration_after=result.iteration,
        buffers_kept=True if result.buffers_kept else None,
    )
