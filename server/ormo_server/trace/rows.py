"""The rows of a trace: their columns, the inputs that they stand for, and how a file of them is read."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from operator import attrgetter, or_
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
)
from pydantic_core import ErrorDetails, to_json
from typing_extensions import override

from ormo_protos.refusals import Reason
from ormo_runtime.settings import UsageError
from ormo_server.core.effects import Redeemed
from ormo_server.core.ids import TicketKey
from ormo_server.core.inputs import Input, Join, Leave, Push, Request, Requester, Return, SetLearningRate, Withdraw
from ormo_server.core.method import Run
from ormo_server.settings import TrainingSettings

FORMAT = 1
# What every trace begins with, as it is written.
OPENING = f'{{"event":"start","format":{FORMAT},'.encode()

_HEXADECIMAL = re.compile(r"0x[0-9a-f]{1,16}")


class TracedSettings(TrainingSettings):
    """How the run trained: what a `start` row says under `settings`."""

    min_workers: int = Field(1, ge=1, description="no ticket of a new run went out before this many had joined")
    max_workers: int = Field(64, ge=1, description="further workers were refused")
    max_gradient_norm: float | None = Field(None, gt=0, description="largest Euclidean norm of a gradient")
    over_norm: Literal["clip", "refuse"] = Field("clip", description="what became of longer ones")
    delay_threshold: float | None = Field(2.0, description="as `TrainingSettings`; 2 before files said so")
    waits_for_idle: bool = Field(True, description="rounds waited for idle workers: they did before files said so")

    @property
    @override
    def workers_allowed(self) -> tuple[int, int]:
        return self.min_workers, self.max_workers

    @property
    def clipped_at(self) -> float | None:
        """The norm that longer gradients were scaled down to; None if none was."""
        return self.max_gradient_norm if self.over_norm == "clip" else None

    @override
    def run(self) -> Run:
        return replace(super().run(), waits_for_idle=self.waits_for_idle)


def _number(value: object) -> object:
    if isinstance(value, str):
        if not _HEXADECIMAL.fullmatch(value):
            raise ValueError("expected 0x and 1 to 16 hexadecimal digits")
        return int(value, 16)
    return value


def _hexadecimal(value: int) -> str:
    return f"0x{value:016x}"


Count = Annotated[int, Field(ge=0)]
Id = Annotated[int, Field(ge=0), BeforeValidator(_number), PlainSerializer(_hexadecimal)]


class _Columns(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Row(_Columns):
    """What a line holds: its columns, in the order in which they are written. `event` is the kind of row."""

    event: Any


class TracedModel(_Columns):
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


class Start(Row):
    """The server got its model, or had it back.

    Attributes:
        event: the kind of row.
        format: version of the file's format.
        epoch: the server's epoch from now on.
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


# The inputs by the names of their rows.
_INPUTS: dict[str, type[Input]] = {
    "joined": Join,
    "left": Leave,
    "requested": Request,
    "withdrawn": Withdraw,
    "returned": Return,
    "pushed": Push,
    "learning_rate_set": SetLearningRate,
}
_EVENTS = {kind: event for event, kind in _INPUTS.items()}
# Numbers below 2^64 that stand for nothing but themselves; all other whole numbers count something.
_IDS = ("incarnation", "ticket_epoch")


class Recorded(NamedTuple):
    """An input that took effect, and of a push what became of it."""

    input: Input
    redeemed: Redeemed | None = None


def _columns(*kinds: type[Any]) -> dict[str, Any]:
    found = (each for kind in kinds for each in dataclasses.fields(kind))
    return {each.name: (_column_type(each), ...) for each in found}


def _column_type(column: "dataclasses.Field[Any]") -> Any:
    return Id if column.name in _IDS else Count if column.type is int else column.type


def _row_class(event: str, kind: type[Input]) -> type[Row]:
    columns = _columns(kind, Redeemed) if kind is Push else _columns(kind)
    if "buffers_kept" in columns:
        # Written only where there is something to tell: without them older programs read the row, too.
        columns["buffers_kept"] = (Literal[True] | None, None)
        columns["local_steps"] = (Annotated[int, Field(ge=1)] | None, None)
    kind_of_row: Any = Literal[event]
    return create_model(f"_{event}", __base__=Row, event=(kind_of_row, event), **columns)


_ROW_CLASSES = {event: _row_class(event, kind) for event, kind in _INPUTS.items()}


# All of an input at once: a journal's lines are formatted while answers wait for them.
_VALUES = {
    kind: (names, attrgetter(*names))
    for kind in (*_EVENTS, Redeemed)
    for names in [tuple(column.name for column in dataclasses.fields(kind))]
}


def columns_of(entry: Recorded) -> dict[str, Any]:
    """The columns of an input's row as JSON has them, without those that have nothing to tell."""
    columns = {"event": _EVENTS[type(entry.input)], **_values(entry.input)}
    if entry.redeemed is not None:
        columns |= _values(entry.redeemed)
        columns["buffers_kept"] = columns["buffers_kept"] or None
        columns["local_steps"] = columns["local_steps"] or None
    for name in _IDS:
        if name in columns:
            columns[name] = _hexadecimal(columns[name])
    return {name: value for name, value in columns.items() if value is not None}


def _values(record: Input | Redeemed) -> dict[str, Any]:
    names, values = _VALUES[type(record)]
    return dict(zip(names, values(record), strict=True))


def recorded_of(row: Row) -> Recorded:
    """The input that a row stands for."""
    kind = _INPUTS[row.event]
    values = {column: getattr(row, column) for column in type(row).model_fields if column != "event"}
    redeemed = None
    if kind is Push:
        values["buffers_kept"] = bool(values["buffers_kept"])
        values["local_steps"] = values["local_steps"] or 0
        redeemed = Redeemed(**{column.name: values.pop(column.name) for column in dataclasses.fields(Redeemed)})
    return Recorded(kind(**values), redeemed)


class Refused(Row):
    """A gradient came and was not taken. No input, for it changes nothing; but its worker goes on with its next batch.

    Attributes:
        event: the kind of row.
        seconds, worker, incarnation, slot: as of an input.
        request: a number above that of the slot's refused gradient before: retries have no row.
        ticket, ticket_epoch: that it named, whatever was sent.
        reason: as on the wire.
    """

    event: Literal["refused"] = "refused"
    seconds: float
    worker: str
    incarnation: Id
    slot: Count
    request: Count
    ticket: int
    ticket_epoch: Id
    reason: str

    @classmethod
    def of(cls, seconds: float, requester: Requester, ticket: TicketKey, reason: Reason) -> "Refused":
        """The row of a gradient of this request, which named this ticket."""
        epoch, number = ticket
        return cls(**requester._asdict(), seconds=seconds, ticket=number, ticket_epoch=epoch, reason=reason.value)


Entry = Recorded | Refused
_input_row: Any = reduce(or_, _ROW_CLASSES.values())
_any_row: Any = Start | Refused | _input_row
_BY_EVENT = Field(discriminator="event")
INPUT_ROWS: TypeAdapter[Row] = TypeAdapter(Annotated[_input_row, _BY_EVENT])
ROWS: TypeAdapter[Row] = TypeAdapter(Annotated[_any_row, _BY_EVENT])
EVENTS = ("start", *_INPUTS, "refused")


def line_of(entry: Start | Entry) -> bytes:
    """The line that an entry becomes."""
    return (to_json(columns_of(entry)) if isinstance(entry, Recorded) else entry.model_dump_json().encode()) + b"\n"


_SHOWN_CHARACTERS = 80


@dataclass(frozen=True, slots=True)
class Segment:
    """What happened from one start of the server to the next, or to the end of the record."""

    start: Start
    inputs: list[Entry]


def read_trace(path: Path) -> list[Segment]:
    """The segments of a trace, one at least. A last line that a crash cut short is left out.

    Raises:
        UsageError: it can't be read, or is not a trace; the sentence says in which line, what came, what was expected.
    """
    segments: list[Segment] = []
    for number, row in _rows_of(path):
        if isinstance(row, Start):
            segments.append(Segment(row, []))
        elif segments:
            segments[-1].inputs.append(row if isinstance(row, Refused) else recorded_of(row))
        else:
            raise UsageError(
                f"{path}, line {number}: a {row.event!r} row came where a 'start' row was expected: the beginning of "
                "the file is missing"
            )
    if not segments:
        raise UsageError(f"{path} has no whole row: expected a trace as `ormo-server serve --trace` writes it")
    return segments


def _rows_of(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                try:
                    yield number, ROWS.validate_json(text)
                except ValidationError as error:
                    if _is_torn(text, error):
                        return
                    raise UsageError(f"{path}, line {number}: {_problem_of_row(error)}") from None
    except OSError as error:
        raise UsageError(f"the trace {path} can't be read: {error.strerror or error}") from error


def _is_torn(text: bytes, error: ValidationError) -> bool:
    return not text.endswith(b"\n") and error.errors()[0]["type"] == "json_invalid"


def _problem_of_row(error: ValidationError) -> str:
    found = error.errors()
    # With another format number everything else may rightly differ.
    first = next((details for details in found if details["loc"][1:] == ("format",)), found[0])
    kind, place = first["type"], first["loc"]
    if kind == "json_invalid":
        return f"{_lower_first(first['msg'])}: expected a row as `ormo-server serve --trace` writes it"
    if not place:
        came = first["input"].get("event") if isinstance(first["input"], dict) else first["input"]
        return f"event {_shown(came)} is not known: expected one of {', '.join(EVENTS)}"
    if place[1:] == ("format",) and kind != "missing":
        return f"the format is {_shown(first['input'])}, and this program reads {FORMAT}: use the version that wrote it"
    return _of_column(f"a {place[0]!r} row", ".".join(map(str, place[1:])), first)


def _of_column(row: str, column: str, details: ErrorDetails) -> str:
    if details["type"] == "missing":
        return f"{row} without {column!r}: expected all of its columns"
    if details["type"] == "extra_forbidden":
        return f"{row} with an unknown column {column!r}: use the version that wrote it"
    message = details["msg"].removeprefix("Value error, ")
    if column == "settings" and details["type"] == "value_error":
        return f"the settings can't be used: {message}"
    return f"{column!r} of {row} is {_shown(details['input'])}: {_lower_first(message)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"


def _lower_first(message: str) -> str:
    message = message.replace("Invalid JSON", "not JSON").replace(" line 1 column", " column")
    return message[:1].lower() + message[1:]
